/* Products of many columns of bytes, where one instruction multiplies bytes and adds the products to 32-bit sums
 * (PI2_ACROSS): one row block times PI2_ACROSS columns. A block of weights is unpacked into eight registers for all of
 * them, and their float sums stay in registers over PI2_CHUNK_BLOCKS blocks, whose activations have been put side by
 * side, where L1 keeps them for all row blocks. On Zen 4 a block of Q4_1 takes 64 multiplications of bytes and 24 of
 * floats, one a cycle: 340 billion operations a second at 3.66 GHz would be all there is, of which 285 are reached
 * where no column is fine.
 *
 * Same sums in the same order as gemm_tile, so the same bits. Bytes of weights are unsigned here: a column's sum begins
 * at what makes up for the zero point of Q6_K, and for the 128 that were added to Q8_0's.
 *
 * int16 activations of which there are bytes, too (quantize_mixed): where a column is fine, the low ones are added to
 * 256 times the sum with the high ones. That is a branch, which row block after row block goes the same way. Of Q6_K
 * the halves then have a float scale each, as they have in gemm_tile. */

#define PI2_CHUNK_BLOCKS 32 /* a multiple of the eight to which Q4_K and Q6_K have one scale */

typedef struct {
  int8_t high[PI2_CHUNK_BLOCKS * PI2_BLOCK], low[PI2_CHUNK_BLOCKS * PI2_BLOCK];
  float d[PI2_CHUNK_BLOCKS], s[PI2_CHUNK_BLOCKS]; /* d: of what the sum counts, 256ths where the column is fine */
  int32_t begin[2 * PI2_CHUNK_BLOCKS];            /* of sums over halves of a block, where the type is corrected; */
  int32_t begin_low[2 * PI2_CHUNK_BLOCKS];        /* of those with low bytes */
  uint32_t fine;                                  /* a bit for each block */
} __attribute__((aligned(64))) bytes_column;

/* Types whose weights are not unsigned bytes as they are, and by how much too large these are */
INLINE int is_corrected(int type) { return type == PI2_Q8_0 || type == PI2_Q6_K; }
INLINE int32_t zero_point(int type) { return type == PI2_Q6_K ? 32 : 128; }
INLINE int32_t sum16(const int8_t *x) {
  int32_t sum = 0;
  for (int i = 0; i < 16; i++) sum += x[i];
  return sum;
}

INLINE void gather_column(int type, const int wide, const pi2_q8 *x, int64_t row, int64_t b, int blocks,
                          bytes_column *to) {
  const int8_t *high = (wide ? x->high + row * x->ldh : x->q + row * x->ldq) + b * PI2_BLOCK;
  const float *d = x->d + row * x->ldb + b, *s = x->s + row * x->ldb + b;
  const int16_t *h = x->h + 2 * (row * x->ldb + b);
  uint32_t fine = 0;
  int i = 0;
  for (; i + 16 <= blocks; i += 16) {
    const uint32_t which = wide ? i_equal_low(h + 2 * i, PI2_FINE) : 0xffff;
    v_store(to->d + i, v_choose(which, v_load(d + i), v_mul(v_load(d + i), v_set(256.0f))));
    v_store(to->s + i, v_load(s + i));
    if (wide) fine |= which << i;
  }
  for (; i < blocks; i++) {
    const int coarse = wide && h[2 * i] != PI2_FINE;
    to->d[i] = coarse ? d[i] * 256.0f : d[i];
    to->s[i] = s[i];
    if (wide) fine |= (uint32_t)!coarse << i;
  }
  for (i = 0; i < blocks; i++) memcpy(to->high + i * PI2_BLOCK, high + i * PI2_BLOCK, PI2_BLOCK);
  for (uint32_t left = fine; left; left &= left - 1) {
    const int at = __builtin_ctz(left) * PI2_BLOCK;
    memcpy(to->low + at, high + (x->low - x->high) + at, PI2_BLOCK);
  }
  to->fine = fine;
  if (!is_corrected(type)) return;
  for (i = 0; i < 2 * blocks; i++) to->begin[i] = -zero_point(type) * h[i];
  for (uint32_t left = fine; wide && left; left &= left - 1) /* there, h has no sums */
    for (int half = 0; half < 2; half++) {
      i = 2 * __builtin_ctz(left) + half;
      to->begin[i] = -zero_point(type) * sum16(to->high + 16 * i);
      to->begin_low[i] = -zero_point(type) * sum16(to->low + 16 * i);
    }
}

/* The sums of a block's halves with one column, [0] and [1] */
INLINE void bytes_dot(const vb w[8], const int8_t *x, vi sum[2]) {
  for (int g = 0; g < 4; g++)
    for (int half = 0; half < 2; half++) sum[half] = i_madd4(sum[half], w[4 * half + g], x + 16 * half + 4 * g);
}

/* `blocks` blocks of a row block, b the first, times `tile` columns; out[c*ldo + r] is what the blocks before have
 * made. `next`: the row block that comes next, from its block `next_b` on. */
INLINE void bytes_tile(int type, const int wide, const int tile, const uint8_t *w, int64_t k, int64_t b, int blocks,
                       const uint8_t *next, int64_t next_b, const bytes_column *x, float *out, int64_t ldo) {
  const uint8_t *scales = w, *quants = w + pi2_scales_bytes_of(type, k);
  const int scale_bytes = block_bytes(type) - quants_stride(type);
  const uint8_t *next_quants = next + pi2_scales_bytes_of(type, k) + next_b * quants_stride(type);
  super_scales super = {v_zero(), v_zero()};
  const int halves = type == PI2_Q6_K && wide ? 2 : 1; /* each with its float scale */
  vf sum[PI2_ACROSS];
  for (int c = 0; c < tile; c++) sum[c] = v_load(out + c * ldo);
  for (int i = 0; i < blocks; i++, b++) {
    vb q[8];
    vf dw, mw, d6[2];
    v6scale s6;
    unpack_weights(type, quants + b * quants_stride(type), q);
    if (type == PI2_Q8_0)
      for (int g = 0; g < 8; g++) q[g] = b_plus128(q[g]);
    if (has_super(type) && i % 8 == 0) unpack_super(scales, b, &super);
    unpack_scales(type, scales, b, &super, &dw, &mw);
    if (halves == 2)
      six_scales(scales, b, dw, d6);
    else if (type == PI2_Q6_K)
      s6 = scale6_load((const int8_t *)scales + (b >> 3) * 288 + 32 + (b & 7) * 32);
    v_prefetch(next + (next_b + i) * scale_bytes);
    for (int line = 0; line < quants_stride(type); line += 64) v_prefetch(next_quants + i * quants_stride(type) + line);
#pragma GCC unroll 8
    for (int c = 0; c < tile; c++) {
      vi dot[2] = {i_zero(), i_zero()};
      const int fine = wide && __builtin_expect(x[c].fine >> i & 1, 0);
      if (is_corrected(type))
        for (int half = 0; half < 2; half++) dot[half] = i_set(x[c].begin[2 * i + half]);
      bytes_dot(q, x[c].high + i * PI2_BLOCK, dot);
      if (fine) {
        for (int half = 0; half < 2; half++) {
          dot[half] = i_times256(dot[half]);
          if (is_corrected(type)) dot[half] = i_add(dot[half], i_set(x[c].begin_low[2 * i + half]));
        }
        bytes_dot(q, x[c].low + i * PI2_BLOCK, dot);
      }
      const vf d = v_set(x[c].d[i]);
      if (halves == 2) {
        for (int half = 0; half < 2; half++) sum[c] = v_fma(v_mul(i_to_float(dot[half]), d), d6[half], sum[c]);
        continue;
      }
      const vi all = type == PI2_Q6_K ? i_add(i_scale6(dot[0], s6, 0), i_scale6(dot[1], s6, 1)) : i_add(dot[0], dot[1]);
      sum[c] = v_fma(v_mul(i_to_float(all), d), dw, sum[c]);
      if (has_min(type)) sum[c] = v_fma(v_set(x[c].s[i]), mw, sum[c]);
    }
  }
  for (int c = 0; c < tile; c++) v_store(out + c * ldo, sum[c]);
}

/* `rows` row blocks times `tile` columns, `first` the first; out is zero. */
INLINE void bytes_columns(int type, const int wide, const int tile, const uint8_t *w, int64_t stride, int rows,
                          int64_t k, const pi2_q8 *x, int first, float *out, int64_t ldo) {
  bytes_column columns[PI2_ACROSS];
  for (int64_t b = 0; b < k / PI2_BLOCK; b += PI2_CHUNK_BLOCKS) {
    const int blocks = k / PI2_BLOCK - b < PI2_CHUNK_BLOCKS ? (int)(k / PI2_BLOCK - b) : PI2_CHUNK_BLOCKS;
    for (int c = 0; c < tile; c++) gather_column(type, wide, x, first + c, b, blocks, &columns[c]);
    for (int r = 0; r < rows; r++) {
      const int64_t soon = r + 1 < rows ? b : b + blocks < k / PI2_BLOCK ? b + blocks : 0;
      const uint8_t *next = w + (r + 1 < rows ? r + 1 : soon ? 0 : rows) * stride;
      bytes_tile(type, wide, tile, w + r * stride, k, b, blocks, next, soon, columns, out + first * ldo + r * PI2_ROWS,
                 ldo);
    }
  }
}
INLINE void gemm_panel(int type, const int wide, const uint8_t *w, int64_t stride, int rows, int64_t k, const pi2_q8 *x,
                       int n, float *out, int64_t ldo) {
  /* int16 activations of which there are no bytes, and int8 where there is nothing to correct: gemm_tile is as good */
  if (wide ? !x->high : !is_corrected(type)) {
    for (int r = 0; r < rows; r++) gemm_tiles(type, wide, w + r * stride, k, x, n, out + r * PI2_ROWS, ldo);
    return;
  }
  for (int c = 0; c < n; c++)
    for (int r = 0; r < rows; r++) v_store(out + c * ldo + r * PI2_ROWS, v_zero());
  int c = 0;
  for (; c + PI2_ACROSS <= n; c += PI2_ACROSS)
    bytes_columns(type, wide, PI2_ACROSS, w, stride, rows, k, x, c, out, ldo);
  for (; c + 4 <= n; c += 4) bytes_columns(type, wide, 4, w, stride, rows, k, x, c, out, ldo);
  for (; c < n; c++) bytes_columns(type, wide, 1, w, stride, rows, k, x, c, out, ldo);
}
