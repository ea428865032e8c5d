/* Matrix products, written once over the sixteen lanes of simd_*.h and compiled for every instruction set.
 *
 * One row block (16 rows, in registers a lane each) times a tile of up to PI2_TILE columns: a block of 32 weights is
 * unpacked once and used for every column of the tile. A column's float sum runs over the blocks in order, whatever
 * the tile, so results do not depend on the batch. */

#ifdef PI2_GENERIC /* one copy with arguments, not one for each type and tile: the scalar variant need not be fast */
#ifdef __clang__   /* which does not clone, and does not know the word */
#define INLINE static __attribute__((noinline))
#else
#define INLINE static __attribute__((noinline, noclone))
#endif
#else
#define INLINE static inline __attribute__((always_inline))
#endif

#ifndef PI2_STEPS
#define PI2_STEPS 16 /* in which a block of weights meets int16 activations: two of its 32 columns each */
#endif

#ifndef PI2_DOT_NIBBLES /* has a shorter way from a block of nibbles to one sum */
#define PI2_DOT_NIBBLES 0
static inline vi dot_nibbles(const uint8_t *p, const int16_t *x) {
  (void)p, (void)x;
  return i_zero();
}
#endif

/* Groups g and g + 4 of a block, four columns each, as bytes; g < 4. `block`: its quants. */
INLINE void unpack_two(int type, const uint8_t *block, int g, vb *low, vb *high) {
  if (type == PI2_Q8_0) {
    *low = b_load(block + 64 * g);
    *high = b_load(block + 64 * (g + 4));
    return;
  }
  const vb both = b_load(block + 64 * g);
  *low = b_low(both);
  *high = b_high(both);
  if (type == PI2_Q5_0 || type == PI2_Q5_1 || type == PI2_Q5_K) {
    *low = b_fifth(*low, block + 256 + 8 * g);
    *high = b_fifth(*high, block + 256 + 8 * (g + 4));
  } else if (type == PI2_Q6_K) {
    *low = b_sixth(*low, b_load(block + 256), g);
    *high = b_sixth(*high, b_load(block + 320), g);
  }
}
/* How a block of a type is unpacked: w[8], one register per group of four columns. */
INLINE void unpack_weights(int type, const uint8_t *block, vb w[8]) {
  for (int g = 0; g < 4; g++) unpack_two(type, block, g, &w[g], &w[g + 4]);
}
INLINE int quants_stride(int type) {
  return type == PI2_Q4_0 || type == PI2_Q4_1 || type == PI2_Q4_K   ? 256
         : type == PI2_Q5_0 || type == PI2_Q5_1 || type == PI2_Q5_K ? 320
         : type == PI2_Q6_K                                         ? 384
                                                                    : 512;
}
INLINE int block_bytes(int type) { /* with its part of the scales */
  return quants_stride(type) + (type == PI2_Q4_1 || type == PI2_Q5_1   ? 64
                                : type == PI2_Q4_K || type == PI2_Q5_K ? 40
                                : type == PI2_Q6_K                     ? 36
                                                                       : 32);
}
INLINE int has_min(int type) { return type != PI2_Q8_0 && type != PI2_Q6_K; }

INLINE int has_super(int type) { return type == PI2_Q4_K || type == PI2_Q5_K; }

/* The scales of 256 columns of a type that has them */
typedef struct {
  vf d, minus_dmin;
} super_scales;
INLINE void unpack_super(const uint8_t *scales, int64_t b, super_scales *out) {
  const uint8_t *super = scales + (b >> 3) * 320;
  out->d = v_load_f16((const uint16_t *)super);
  out->minus_dmin = v_sub(v_zero(), v_load_f16((const uint16_t *)(super + 32)));
}
/* value = dw * q + mw; the zero points of Q4_0 and Q5_0 become minimums. `super` is block b's, where the type has them.
 */
INLINE void unpack_scales(int type, const uint8_t *scales, int64_t b, const super_scales *super, vf *dw, vf *mw) {
  *mw = v_zero();
  switch (type) {
  case PI2_Q4_0:
  case PI2_Q5_0:
    *dw = v_load_f16((const uint16_t *)(scales + b * 32));
    *mw = v_mul(*dw, v_set(type == PI2_Q4_0 ? -8.0f : -16.0f));
    break;
  case PI2_Q4_1:
  case PI2_Q5_1:
    *dw = v_load_f16((const uint16_t *)(scales + b * 64));
    *mw = v_load_f16((const uint16_t *)(scales + b * 64 + 32));
    break;
  case PI2_Q4_K:
  case PI2_Q5_K: { /* products of 11 and 6 significant bits: exact */
    const uint8_t *fine = scales + (b >> 3) * 320 + 64 + (b & 7) * 32;
    *dw = v_mul(super->d, v_load_u8(fine));
    *mw = v_mul(super->minus_dmin, v_load_u8(fine + 16));
    break;
  }
  case PI2_Q6_K: *dw = v_load_f16((const uint16_t *)(scales + (b >> 3) * 288)); break;
  default: *dw = v_load_f16((const uint16_t *)(scales + b * 32));
  }
}

/* Q6_K's two scales of a block, each for 16 columns */
INLINE void six_scales(const uint8_t *scales, int64_t b, vf d, vf out[2]) {
  const int8_t *fine = (const int8_t *)scales + (b >> 3) * 288 + 32 + (b & 7) * 32;
  out[0] = v_mul(d, v_load_i8(fine));
  out[1] = v_mul(d, v_load_i8(fine + 16));
}

/* out[c][16], c < tile; tile is a constant at every call, so the loops over it unroll into registers */
INLINE void gemm_tile(int type, const int wide, const int tile, const uint8_t *w, int64_t k, const pi2_q8 *x,
                      int64_t row, float *out, int64_t ldo) {
  const uint8_t *scales = w, *quants = w + pi2_scales_bytes_of(type, k);
  const int8_t *xq[PI2_TILE];
  vf sum[PI2_TILE];
  for (int c = 0; c < tile; c++) {
    xq[c] = x->q + (row + c) * x->ldq;
    sum[c] = v_zero();
  }
  const float *xd = x->d + row * x->ldb, *xs = x->s + row * x->ldb;
  const int16_t *xh = x->h + 2 * row * x->ldb;
  const int64_t ldb = x->ldb, blocks = k / PI2_BLOCK;
  const uint8_t *ahead = quants + PI2_PREFETCH;
  const int straight = PI2_DOT_NIBBLES && wide && tile == 1 && quants_stride(type) == 256;
  super_scales super = {v_zero(), v_zero()};
  for (int64_t b = 0; b < blocks; b++) {
    vb q[8];
    vf dw, mw, d6[2];
    if (!straight) unpack_weights(type, quants + b * quants_stride(type), q);
    if (has_super(type) && b % 8 == 0) unpack_super(scales, b, &super);
    unpack_scales(type, scales, b, &super, &dw, &mw);
    /* few columns wait for memory: as many bytes as a block has, in the order of memory, scales and the next rows too
     */
    for (int i = 0; i < block_bytes(type); i += 64) v_prefetch_second(ahead + b * block_bytes(type) + i);
    if (straight) {
      const vi dot = dot_nibbles(quants + b * 256, (const int16_t *)xq[0] + b * PI2_BLOCK);
      sum[0] = v_fma(v_mul(i_to_float(dot), v_set(xd[b])), dw, sum[0]);
      sum[0] = v_fma(v_set(xs[b]), mw, sum[0]);
    } else if (wide) {
      vw pairs[PI2_STEPS];
      widen(q, pairs, type == PI2_Q8_0, type == PI2_Q6_K ? 32 : 0);
      if (type == PI2_Q6_K) six_scales(scales, b, dw, d6);
      for (int c = 0; c < tile; c++) {
        const int16_t *y = (const int16_t *)xq[c] + b * PI2_BLOCK;
        const vf d = v_set(xd[c * ldb + b]);
        if (type == PI2_Q6_K) {
          sum[c] = v_fma(v_mul(i_to_float(dot_wide(pairs, y, PI2_STEPS / 2)), d), d6[0], sum[c]);
          sum[c] = v_fma(v_mul(i_to_float(dot_wide(pairs + PI2_STEPS / 2, y + 16, PI2_STEPS / 2)), d), d6[1], sum[c]);
        } else {
          sum[c] = v_fma(v_mul(i_to_float(dot_wide(pairs, y, PI2_STEPS)), d), dw, sum[c]);
          if (has_min(type)) sum[c] = v_fma(v_set(xs[c * ldb + b]), mw, sum[c]);
        }
      }
    } else {
      v6scale s6;
      if (type == PI2_Q6_K) s6 = scale6_load((const int8_t *)scales + (b >> 3) * 288 + 32 + (b & 7) * 32);
      for (int c = 0; c < tile; c++) {
        const int8_t *y = xq[c] + b * PI2_BLOCK;
        vi dot = type == PI2_Q6_K                                           ? dot_u6(q, y, s6, xh + 2 * (c * ldb + b))
                 : type == PI2_Q8_0                                         ? dot_s8(q, y)
                 : type == PI2_Q5_0 || type == PI2_Q5_1 || type == PI2_Q5_K ? dot_u5(q, y)
                                                                            : dot_u4(q, y);
        sum[c] = v_fma(v_mul(i_to_float(dot), v_set(xd[c * ldb + b])), dw, sum[c]);
        if (has_min(type)) sum[c] = v_fma(v_set(xs[c * ldb + b]), mw, sum[c]);
      }
    }
  }
  for (int c = 0; c < tile; c++) v_store(out + c * ldo, sum[c]);
}

/* Tiles of 8 (where registers allow), 4, 2 and 1 columns make up any n. */
#define GEMM_TILES(N)                                                                              \
  for (; n - done >= N; done += N) gemm_tile(type, wide, N, w, k, x, done, out + done * ldo, ldo);
INLINE void gemm_tiles(int type, const int wide, const uint8_t *w, int64_t k, const pi2_q8 *x, int n, float *out,
                       int64_t ldo) {
  int done = 0;
  GEMM_TILES(PI2_TILE)
  GEMM_TILES(4)
  GEMM_TILES(2)
  GEMM_TILES(1)
}
#define GEMM(T, WIDE, name)                                                                               \
  static void gemm_##name(const uint8_t *w, int64_t k, const pi2_q8 *x, int n, float *out, int64_t ldo) { \
    gemm_tiles(T, WIDE, w, k, x, n, out, ldo);                                                            \
  }
#define GEMMS(T, name) GEMM(T, 0, name##_a8) GEMM(T, 1, name##_a16)
GEMMS(PI2_Q4_0, q4_0)
GEMMS(PI2_Q4_1, q4_1)
GEMMS(PI2_Q5_0, q5_0)
GEMMS(PI2_Q5_1, q5_1)
GEMMS(PI2_Q8_0, q8_0)
GEMMS(PI2_Q4_K, q4_k)
GEMMS(PI2_Q5_K, q5_k)
GEMMS(PI2_Q6_K, q6_k)

/* Float weights [k][16], float activations. Two sums per column, even and odd k, hide the latency of one column. */
INLINE vf load_weights(int type, const uint8_t *w, int64_t i) {
  return type == PI2_F32   ? v_load((const float *)w + i * 16)
         : type == PI2_F16 ? v_load_f16((const uint16_t *)w + i * 16)
                           : v_load_bf16((const uint16_t *)w + i * 16);
}
INLINE void gemm_float_tile(int type, const int tile, const uint8_t *w, int64_t k, const float *x, int64_t ldx,
                            float *out, int64_t ldo) {
  vf even[PI2_TILE], odd[PI2_TILE];
  for (int c = 0; c < tile; c++) even[c] = odd[c] = v_zero();
  int64_t i = 0;
  for (; i + 1 < k; i += 2) {
    vf w0 = load_weights(type, w, i), w1 = load_weights(type, w, i + 1);
    for (int c = 0; c < tile; c++) {
      even[c] = v_fma(v_set(x[c * ldx + i]), w0, even[c]);
      odd[c] = v_fma(v_set(x[c * ldx + i + 1]), w1, odd[c]);
    }
  }
  if (i < k) {
    vf w0 = load_weights(type, w, i);
    for (int c = 0; c < tile; c++) even[c] = v_fma(v_set(x[c * ldx + i]), w0, even[c]);
  }
  for (int c = 0; c < tile; c++) v_store(out + c * ldo, v_add(even[c], odd[c]));
}
#define GEMM_FLOAT(T, name)                                                                                           \
  static void gemm_##name(const uint8_t *w, int64_t k, const float *x, int64_t ldx, int n, float *out, int64_t ldo) { \
    int done = 0;                                                                                                     \
    for (; n - done >= PI2_TILE; done += PI2_TILE)                                                                    \
      gemm_float_tile(T, PI2_TILE, w, k, x + done * ldx, ldx, out + done * ldo, ldo);                                 \
    for (; n - done >= 2; done += 2) gemm_float_tile(T, 2, w, k, x + done * ldx, ldx, out + done * ldo, ldo);         \
    if (n > done) gemm_float_tile(T, 1, w, k, x + done * ldx, ldx, out + done * ldo, ldo);                            \
  }
GEMM_FLOAT(PI2_F32, f32)
GEMM_FLOAT(PI2_F16, f16)
GEMM_FLOAT(PI2_BF16, bf16)
