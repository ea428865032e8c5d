/* Matrix products of many columns, written once like those of gemm_template.h: PI2_PANEL row blocks together.
 *
 * Their weights of one block are unpacked once for all n columns, into a buffer of the first-level cache, and PI2_PANEL x 4
 * integer sums stay in registers while the buffer passes by: a column's activations are broadcast once for all row blocks,
 * and each float sum waits in `out`. The same sums in the same order as gemm_tile, so the same bits.
 *
 * int16 activations: i_madd adds the products of a step (a PI2_STEPS-th of the block's columns) to 32-bit sums.
 *
 * int8 activations: g_first and g_madd add up the products of groups of four columns. With PI2_SHORT these sums have 16
 * bits, begin at 0, and are closed before they could overflow: after all 8 groups of 4-bit weights, 4 of 5-bit ones, 2 of
 * 6-bit ones (simd_avx512.h has the bounds). Otherwise they have 32 bits and begin at a number that makes up for the zero
 * point of Q6_K and for the PI2_BIAS that b_biased added to Q8_0's weights. g_close turns them into 32-bit sums, g_scale
 * into sums times a scale of Q6_K.
 *
 * int16 activations some of whose blocks have 8 bits (quantize_mixed): tiles of such blocks go the way of int8 ones.
 *
 * Statements of assembler without an instruction keep the compiler from filling registers with what comes later. */

#define PI2_AHEAD 8 /* blocks of each row block that a panel has asked for when it computes; the next panel's at its end */

/* One block of a panel's weights, unpacked. The halves of Q6_K have a scale each. */
typedef struct {
  vf dw[2][PI2_PANEL], mw[PI2_PANEL];
  vw pairs[PI2_PANEL][PI2_STEPS]; /* for int16 activations */
  vb groups[PI2_PANEL][8];        /* for int8 ones, */
  v6scale six[PI2_PANEL];         /* with the scales of Q6_K */
#if PI2_SHORT
  vg offsets[PI2_PANEL]; /* and these, of which g_offset makes what its zero point adds */
#endif
} panel_block;

/* `tile` columns of activations in one block */
typedef struct {
  const int8_t *q[4];
  const float *d, *s; /* `ldb` apart */
  const int16_t *h;   /* 2 * `ldb` apart */
  int64_t ldb;
} panel_input;

/* Signed bytes that have no bias are multiplied in 16 bits: 8-bit products are too large for short sums. */
INLINE int is_wide(int type, const int wide) { return wide || (PI2_SHORT && type == PI2_Q8_0); }

INLINE void panel_unpack(int type, const int wide, const uint8_t *w, int64_t k, int64_t b, int r, panel_block *p) {
  const uint8_t *scales = w, *quants = w + pi2_scales_bytes_of(type, k);
  vb q[8];
  vf dw;
  super_scales super = {v_zero(), v_zero()};
  unpack_weights(type, quants, b, q);
  if (has_super(type)) unpack_super(scales, b, &super);
  unpack_scales(type, scales, b, &super, &dw, &p->mw[r]);
  p->dw[0][r] = dw;
  if (is_wide(type, wide)) {
    if (type == PI2_Q6_K) {
      vf two[2];
      six_scales(scales, b, dw, two);
      p->dw[0][r] = two[0];
      p->dw[1][r] = two[1];
    }
    widen(q, p->pairs[r], type == PI2_Q8_0, type == PI2_Q6_K ? 32 : 0);
    return;
  }
  for (int g = 0; g < 8; g++) p->groups[r][g] = type == PI2_Q8_0 ? b_biased(q[g]) : q[g];
  if (type == PI2_Q6_K) {
    p->six[r] = scale6_load((const int8_t *)scales + (b >> 3) * 288 + 32 + (b & 7) * 32);
#if PI2_SHORT
    p->offsets[r] = g_offsets(p->six[r]);
#endif
  }
}

/* Adds integer sums of a block to the float sums in out. `coarse`: they are a 256th of what the scales are for. */
INLINE void panel_add(int type, const int coarse, const int tile, vi dot[PI2_PANEL][4], const vf *dw, const vf *mw,
                      const panel_input *x, float *out, int64_t ldo) {
  const float *d = x->d, *s = x->s;
  vf by[PI2_PANEL], plus[PI2_PANEL];
  __asm__ volatile("" : "+r"(out), "+r"(d), "+r"(s) : "r"(dw), "r"(mw) : "memory");
  for (int r = 0; r < PI2_PANEL; r++) by[r] = dw[r], plus[r] = mw[r];
  for (int c = 0; c < tile; c++, out += ldo, d += x->ldb, s += x->ldb) {
    /* read before out is written: the compiler cannot know that they differ */
    const vf dc = v_set(coarse ? *d * 256.0f : *d), sc = v_set(*s);
    __asm__("" : "+r"(out), "+r"(d), "+r"(s));
    for (int r = 0; r < PI2_PANEL; r++) {
      vf f = v_fma(v_mul(i_to_float(dot[r][c]), dc), by[r], v_load(out + r * PI2_ROWS));
      if (has_min(type)) f = v_fma(sc, plus[r], f);
      v_store(out + r * PI2_ROWS, f);
    }
  }
}

/* Weights to ask for while one tile of columns is computed: PI2_AHEAD_LINES cache lines of each row block, a few at a time.
 * All at once would fill the line buffers, of which a core has about a dozen, and stop it until memory has answered. */
#define PI2_AHEAD_LINES (PI2_STEPS / PI2_PANEL)
typedef struct {
  const uint8_t *at; /* of the first row block, or NULL */
  int64_t stride;
} panel_ahead;

INLINE void panel16_columns(int type, const int tile, const panel_block *p, const int16_t *const *y, const panel_input *x,
                            panel_ahead ahead, float *out, int64_t ldo) {
  const int halves = type == PI2_Q6_K ? 2 : 1, steps = PI2_STEPS / halves;
  for (int half = 0; half < halves; half++) {
    vi sum[PI2_PANEL][4];
    for (int r = 0; r < PI2_PANEL; r++)
      for (int c = 0; c < tile; c++) sum[r][c] = i_zero();
    for (int step = half * steps; step < (half + 1) * steps; step++) {
      if (ahead.at) v_prefetch(ahead.at + step % PI2_PANEL * ahead.stride + step / PI2_PANEL * 64);
      for (int c = 0; c < tile; c++) {
        const vx v = x_load(y[c] + PI2_BLOCK / PI2_STEPS * step);
        for (int r = 0; r < PI2_PANEL; r++) sum[r][c] = i_madd(sum[r][c], p->pairs[r][step], v);
      }
    }
    panel_add(type, 0, tile, sum, p->dw[half], p->mw, x, out, ldo);
  }
}

INLINE int parts_of(int type) { /* of a block, each closed at its end */
  if (type == PI2_Q6_K) return PI2_SHORT ? 4 : 2;
  return PI2_SHORT && (type == PI2_Q5_0 || type == PI2_Q5_1 || type == PI2_Q5_K) ? 2 : 1;
}
INLINE int32_t begin_of(int type, int half, const panel_input *x, int c) {
  const int16_t *h = x->h + 2 * c * x->ldb;
  return PI2_SHORT ? 0 : type == PI2_Q6_K ? -32 * h[half] : type == PI2_Q8_0 ? -PI2_BIAS * (h[0] + h[1]) : 0;
}
INLINE void panel8_columns(int type, const int coarse, const int tile, const panel_block *p, const panel_input *x, float *out,
                           int64_t ldo) {
  const int parts = parts_of(type), groups = 8 / parts;
  vi dot[PI2_PANEL][4], waiting[PI2_PANEL][4]; /* for the next part, in memory */
#pragma GCC unroll 4
  for (int part = 0; part < parts; part++) {
    const int from = part * groups, half = from / 4;
    vg sum[PI2_PANEL][4];
    vx8 v[4];
#pragma GCC unroll 8
    for (int g = from; g < from + groups; g++) {
      if (g % PI2_X_GROUPS == 0)
        for (int c = 0; c < tile; c++) v[c] = x8_load(x->q[c] + 4 * g);
      for (int r = 0; r < PI2_PANEL; r++) {
        const vb w = p->groups[r][g];
        for (int c = 0; c < tile; c++)
          if (g > from) g_madd(&sum[r][c], w, v[c], g);
          else sum[r][c] = g_first(begin_of(type, half, x, c), w, v[c]);
      }
      __asm__ volatile("" : : "r"(p) : "memory");
    }
    for (int c = 0; c < tile; c++) {
#if PI2_SHORT
      const vx8 h = g_sums(x->h + 2 * c * x->ldb);
#endif
      for (int r = 0; r < PI2_PANEL; r++) {
        vi more = type == PI2_Q6_K ? g_scale(sum[r][c], &p->six[r], half) : g_close(sum[r][c]);
#if PI2_SHORT
        if (type == PI2_Q6_K && part == 0) more = i_add(more, g_offset(p->offsets[r], h));
#endif
        if (part) more = i_add(more, waiting[r][c]);
        *(part + 1 < parts ? &waiting[r][c] : &dot[r][c]) = more;
      }
    }
    if (part + 1 < parts) __asm__ volatile("" : : "r"(waiting) : "memory");
  }
  panel_add(type, coarse, tile, dot, p->dw[0], p->mw, x, out, ldo);
}

/* `coarse`: the columns' blocks stand as int8 `behind` their int16 ones. */
INLINE void panel_tile(int type, const int wide, const int coarse, const int64_t behind, const int tile, const panel_block *p,
                       const pi2_q8 *x, int c, int64_t b, panel_ahead ahead, float *out, int64_t ldo) {
  panel_input in = {.d = x->d + c * x->ldb + b, .s = x->s + c * x->ldb + b, .h = x->h + 2 * (c * x->ldb + b), .ldb = x->ldb};
  const int8_t *q = x->q + c * x->ldq + (coarse ? behind + b * PI2_BLOCK : b * PI2_BLOCK << wide);
  __asm__("" : "+r"(q)); /* one pointer, not one for each column, from tile to tile */
  for (int i = 0; i < tile; i++) in.q[i] = q + i * x->ldq;
  out += c * ldo;
  if (!is_wide(type, wide)) {
    for (int i = 0; ahead.at && i < PI2_STEPS; i++)
      v_prefetch(ahead.at + i % PI2_PANEL * ahead.stride + i / PI2_PANEL * 64);
    panel8_columns(type, coarse, tile, p, &in, out, ldo);
    return;
  }
  const int16_t *y[4];
#if PI2_SHORT
  int16_t widened[4 * PI2_BLOCK] __attribute__((aligned(64)));
  if (!wide)
    for (int i = 0; i < tile; i++) x_widen(in.q[i], widened + i * PI2_BLOCK);
  __asm__ volatile("" : : "r"(widened) : "memory");
  for (int i = 0; i < tile; i++) y[i] = wide ? (const int16_t *)in.q[i] : widened + i * PI2_BLOCK;
#else
  for (int i = 0; i < tile; i++) y[i] = (const int16_t *)in.q[i];
#endif
  panel16_columns(type, tile, p, y, &in, ahead, out, ldo);
}

/* Whether block b of n columns has 8 bits in all of them. */
INLINE int is_coarse(const pi2_q8 *x, int c, int n, int64_t b) {
  const int16_t *h = x->h + 2 * (c * x->ldb + b);
  int fine = 0;
  for (int i = 0; i < n; i++) fine |= h[2 * i * x->ldb] == PI2_FINE;
  return !fine;
}
INLINE void gemm_panel(int type, const int wide, const uint8_t *w, int64_t stride, int64_t k, const pi2_q8 *x, int n,
                       float *out, int64_t ldo) {
  const int64_t blocks = k / PI2_BLOCK;
  for (int c = 0; c < n; c++)
    for (int r = 0; r < PI2_PANEL; r++) v_store(out + c * ldo + r * PI2_ROWS, v_zero());
  const uint8_t *quants = w + pi2_scales_bytes_of(type, k);
  const int mixed = wide && !is_wide(type, 0) && type != PI2_Q6_K; /* which adds its halves in another order */
  for (int64_t b = 0; b < blocks; b++) {
    panel_block p, narrow; /* for int16 blocks and for int8 ones, when a tile of them comes */
    int has_p = !mixed, has_narrow = 0;
    for (int r = 0; !mixed && r < PI2_PANEL; r++) panel_unpack(type, wide, w + r * stride, k, b, r, &p);
    /* Four streams and more: the hardware follows too few of them. Behind this panel lies the next. */
    const int64_t soon = b + PI2_AHEAD;
    panel_ahead ahead = {.stride = stride, .at = quants + (soon < blocks ? soon * quants_stride(type)
                                                           : PI2_PANEL * stride + (soon - blocks) * quants_stride(type))};
    const uint8_t *const end = ahead.at + quants_stride(type);
    int c = 0;
    for (; c + 4 <= n; c += 4) {
      if (mixed && is_coarse(x, c, 4, b)) {
        for (int r = 0; !has_narrow && r < PI2_PANEL; r++) panel_unpack(type, 0, w + r * stride, k, b, r, &narrow);
        has_narrow = 1;
        panel_tile(type, 0, 1, 2 * k, 4, &narrow, x, c, b, ahead, out, ldo);
      } else {
        for (int r = 0; !has_p && r < PI2_PANEL; r++) panel_unpack(type, wide, w + r * stride, k, b, r, &p);
        has_p = 1;
        panel_tile(type, wide, 0, 0, 4, &p, x, c, b, ahead, out, ldo);
      }
      if (ahead.at && (ahead.at += PI2_AHEAD_LINES * 64) >= end) ahead.at = NULL;
    }
    ahead.at = NULL;
    for (int r = 0; c < n && !has_p && r < PI2_PANEL; r++) panel_unpack(type, wide, w + r * stride, k, b, r, &p);
    for (; c < n; c++) panel_tile(type, wide, 0, 0, 1, &p, x, c, b, ahead, out, ldo);
  }
}
#define PANEL(T, WIDE, name)                                                                              \
  static void panel_##name(const uint8_t *w, int64_t stride, int64_t k, const pi2_q8 *x, int n, float *out, \
                           int64_t ldo) {                                                                 \
    gemm_panel(T, WIDE, w, stride, k, x, n, out, ldo);                                                    \
  }
#define PANELS(T, name) PANEL(T, 0, name##_a8) PANEL(T, 1, name##_a16)
PANELS(PI2_Q4_0, q4_0)
PANELS(PI2_Q4_1, q4_1)
PANELS(PI2_Q5_0, q5_0)
PANELS(PI2_Q5_1, q5_1)
PANELS(PI2_Q8_0, q8_0)
PANELS(PI2_Q4_K, q4_k)
PANELS(PI2_Q5_K, q5_k)
PANELS(PI2_Q6_K, q6_k)
