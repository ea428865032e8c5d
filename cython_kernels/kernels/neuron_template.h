/* Products with single neurons: rows of up and columns of down, as bundles have them (docs/pack-format.md), for the
 * neurons that are active.
 *
 * The same integers and the same float operations in the same order as gemm_template.h over whole matrices: what is
 * left out there would add zero. So sparse and dense results are the same bits. */

#define PI2_CHUNK 512 /* columns of a row that lie together, a lane for each block of 32 */

INLINE int neuron_bytes_wide(int type) { return type == PI2_Q8_0; }
INLINE int64_t rows_plane(int64_t k) { return pi2_align(k / PI2_BLOCK, 16) * 2; }

/* out[i], i < m <= 16. x: pi2_neuron_input's arrangement, with scales d, s padded by zeros to whole chunks. */
INLINE void neuron_rows(int type, const uint8_t *const *rows, const uint8_t *const *scales, int m, int64_t k,
                        const int16_t *x, const float *d, const float *s, float *out) {
  const int64_t blocks = k / PI2_BLOCK, bytes = neuron_bytes_wide(type) ? PI2_CHUNK : PI2_CHUNK / 2;
  vf sum = v_zero();
  for (int64_t c = 0; c * 16 < blocks; c++) {
    vf t[16], dw[16], mw[16];
    for (int i = 0; i < 16; i++) t[i] = dw[i] = v_zero();
    if (type == PI2_Q4_1)
      for (int i = 0; i < 16; i++) mw[i] = v_zero();
    const vf dx = v_load(d + 16 * c);
    for (int i = 0; i < m; i++) {
      const uint8_t *p = rows[i] + c * bytes;
      for (int64_t line = 0; line < bytes; line += 64) v_prefetch(p + 2 * bytes + line);
      const vi dot = neuron_bytes_wide(type) ? r_bytes(p, x + c * PI2_CHUNK) : r_nibbles(p, x + c * PI2_CHUNK);
      t[i] = v_mul(i_to_float(dot), dx);
      dw[i] = v_load_f16((const uint16_t *)(scales[i] + 32 * c));
      if (type == PI2_Q4_1) mw[i] = v_load_f16((const uint16_t *)(scales[i] + rows_plane(k) + 32 * c));
    }
    v_transpose(t);
    v_transpose(dw);
    if (type == PI2_Q4_1) v_transpose(mw);
    const int n = blocks - 16 * c < 16 ? (int)(blocks - 16 * c) : 16;
    for (int b = 0; b < n; b++) {
      sum = v_fma(t[b], dw[b], sum);
      if (type == PI2_Q4_0) sum = v_fma(v_set(s[16 * c + b]), v_mul(dw[b], v_set(-8.0f)), sum);
      if (type == PI2_Q4_1) sum = v_fma(v_set(s[16 * c + b]), mw[b], sum);
    }
  }
  float all[16];
  v_store(all, sum);
  memcpy(out, all, (size_t)m * sizeof *out);
}

/* sum[n] of `width` vectors of 16 rows, added to out with the group's scales */
INLINE void close_columns(int type, const vi *sum, int width, const uint8_t *scales, int64_t plane, float d, float s,
                          float *out) {
  for (int n = 0; n < width; n++, scales += 32, out += 16) {
    const vf dw = v_load_f16((const uint16_t *)scales);
    vf o = v_fma(v_mul(i_to_float(sum[n]), v_set(d)), dw, v_load(out));
    if (type == PI2_Q4_0) o = v_fma(v_set(s), v_mul(dw, v_set(-8.0f)), o);
    if (type == PI2_Q4_1) o = v_fma(v_set(s), v_load_f16((const uint16_t *)(scales + plane)), o);
    v_store(out, o);
  }
}
/* out[r] += for r < rows (a multiple of 128): m columns of one group of 32 neurons, times q[i] * d; s: d * sum of q. */
INLINE void neuron_columns(int type, const uint8_t *const *columns, const int16_t *q, int m, const uint8_t *scales,
                           int64_t plane, float d, float s, int64_t rows, float *out) {
  const int wide = neuron_bytes_wide(type), width = wide ? 4 : 8;
  for (int64_t r = 0; r < rows; r += 16 * width) {
    const int64_t at = r / (16 * width) * 64;
    vi sum[8];
    for (int n = 0; n < width; n++) sum[n] = i_zero();
    for (int i = 0; i < m; i += 2) {
      const uint8_t *a = columns[i] + at, *b = i + 1 < m ? columns[i + 1] + at : a;
      const int32_t xb = i + 1 < m ? q[i + 1] : 0;
      v_prefetch(a + 256);
      v_prefetch(b + 256);
      if (wide)
        c_bytes(sum, a, b, q[i], xb);
      else
        c_nibbles(sum, a, b, q[i], xb);
    }
    if (!wide) c_close(sum);
    close_columns(type, sum, width, scales + 2 * r, plane, d, s, out + r);
  }
}
#define NEURONS(T, name)                                                                                           \
  static void neuron_rows_##name(const uint8_t *const *rows, const uint8_t *const *scales, int m, int64_t k,       \
                                 const int16_t *x, const float *d, const float *s, float *out) {                   \
    neuron_rows(T, rows, scales, m, k, x, d, s, out);                                                              \
  }                                                                                                                \
  static void neuron_columns_##name(const uint8_t *const *columns, const int16_t *q, int m, const uint8_t *scales, \
                                    int64_t plane, float d, float s, int64_t rows, float *out) {                   \
    neuron_columns(T, columns, q, m, scales, plane, d, s, rows, out);                                              \
  }
NEURONS(PI2_Q4_0, q4_0)
NEURONS(PI2_Q4_1, q4_1)
NEURONS(PI2_Q8_0, q8_0)
#undef NEURONS
