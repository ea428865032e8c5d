/* Matrix products of many columns, written once like those of gemm_template.h: PI2_PANEL row blocks together.
 *
 * Their weights of one block are unpacked once for all n columns, into a buffer in L1, and PI2_PANEL x 4 integer sums
 * stay in registers while the buffer passes by: a column's activations are broadcast once for all row blocks, and each
 * float sum waits in `out`. The same sums in the same order as gemm_tile, so the same bits.
 *
 * int16 activations: i_madd adds the products of a step (a PI2_STEPS-th of the block's columns) to 32-bit sums.
 *
 * int8 activations: g_first and g_madd add up the products of groups of four columns. With PI2_SHORT these sums have 16
 * bits, begin at 0, and are closed before they could overflow: after all 8 groups of 4-bit weights, 4 of 5-bit ones, 2
 * of 6-bit ones (simd_avx512.h has the bounds). Otherwise they have 32 bits and begin at a number that makes up for the
 * zero point of Q6_K and for the PI2_BIAS that b_biased added to Q8_0's weights. g_close turns them into 32-bit sums,
 * g_scale into sums times a scale of Q6_K.
 *
 * int16 activations of which there are bytes, too (quantize_mixed): the high ones go the way of int8 activations, and
 * where a column has low ones, the sums with them are added to 256 times those with the high ones.
 *
 * Statements of assembler without an instruction keep the compiler from filling registers with what comes later. */

#define PI2_AHEAD                                                                                           \
  8 /* blocks of each row block that a panel has asked for when it computes; the next panel's at its end */

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
  unpack_weights(type, quants + b * quants_stride(type), q);
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

/* Adds integer sums of a block to the float sums in out. */
INLINE void panel_add(int type, const int tile, vi dot[PI2_PANEL][4], const vf *dw, const vf *mw, const panel_input *x,
                      float *out, int64_t ldo) {
  const float *d = x->d, *s = x->s;
  vf by[PI2_PANEL], plus[PI2_PANEL];
  __asm__ volatile("" : "+r"(out), "+r"(d), "+r"(s) : "r"(dw), "r"(mw) : "memory");
  for (int r = 0; r < PI2_PANEL; r++) by[r] = dw[r], plus[r] = mw[r];
  for (int c = 0; c < tile; c++, out += ldo, d += x->ldb, s += x->ldb) {
    /* read before out is written: the compiler cannot know that they differ */
    const vf dc = v_set(*d), sc = v_set(*s);
    __asm__("" : "+r"(out), "+r"(d), "+r"(s));
    for (int r = 0; r < PI2_PANEL; r++) {
      vf f = v_fma(v_mul(i_to_float(dot[r][c]), dc), by[r], v_load(out + r * PI2_ROWS));
      if (has_min(type)) f = v_fma(sc, plus[r], f);
      v_store(out + r * PI2_ROWS, f);
    }
  }
}

/* Weights to ask for while one tile of columns is computed: PI2_AHEAD_LINES cache lines of each row block, a few at a
 * time. All at once would fill the line buffers, of which a core has about a dozen, and stop it until memory has
 * answered. */
#define PI2_AHEAD_LINES (PI2_STEPS / PI2_PANEL)
typedef struct {
  const uint8_t *at, *end; /* of the first row block, or NULL */
  int64_t stride;
} panel_ahead;
/* Four streams and more: the hardware follows too few of them. Behind this panel lies the next. */
INLINE panel_ahead ahead_of(int type, const uint8_t *w, int64_t stride, int64_t k, int64_t b) {
  const uint8_t *quants = w + pi2_scales_bytes_of(type, k);
  const int64_t blocks = k / PI2_BLOCK, soon = b + PI2_AHEAD, size = quants_stride(type);
  quants += soon < blocks ? soon * size : PI2_PANEL * stride + (soon - blocks) * size;
  return (panel_ahead){quants, quants + size, stride};
}
INLINE void go_ahead(panel_ahead *a) {
  if (a->at && (a->at += PI2_AHEAD_LINES * 64) >= a->end) a->at = NULL;
}
INLINE void prefetch_all(panel_ahead a) {
  for (int i = 0; a.at && i < PI2_STEPS; i++) v_prefetch(a.at + i % PI2_PANEL * a.stride + i / PI2_PANEL * 64);
}

INLINE void panel16_columns(int type, const int tile, const panel_block *p, const int16_t *const *y,
                            const panel_input *x, panel_ahead ahead, float *out, int64_t ldo) {
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
    panel_add(type, tile, sum, p->dw[half], p->mw, x, out, ldo);
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
/* The integer sums of a block with `tile` columns of int8. */
INLINE void panel8_sums(int type, const int tile, const panel_block *p, const panel_input *x, vi dot[PI2_PANEL][4]) {
  const int parts = parts_of(type), groups = 8 / parts;
  vi waiting[PI2_PANEL][4]; /* for the next part, in memory */
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
          if (g > from)
            g_madd(&sum[r][c], w, v[c], g);
          else
            sum[r][c] = g_first(begin_of(type, half, x, c), w, v[c]);
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
}
INLINE void panel8_columns(int type, const int tile, const panel_block *p, const panel_input *x, float *out,
                           int64_t ldo) {
  vi dot[PI2_PANEL][4];
  panel8_sums(type, tile, p, x, dot);
  panel_add(type, tile, dot, p->dw[0], p->mw, x, out, ldo);
}

INLINE void panel_tile(int type, const int wide, const int tile, const panel_block *p, const pi2_q8 *x, int c,
                       int64_t b, panel_ahead ahead, float *out, int64_t ldo) {
  panel_input in = {
      .d = x->d + c * x->ldb + b, .s = x->s + c * x->ldb + b, .h = x->h + 2 * (c * x->ldb + b), .ldb = x->ldb};
  const int8_t *q = x->q + c * x->ldq + (b * PI2_BLOCK << wide);
  __asm__("" : "+r"(q)); /* one pointer, not one for each column, from tile to tile */
  for (int i = 0; i < tile; i++) in.q[i] = q + i * x->ldq;
  out += c * ldo;
  if (!is_wide(type, wide)) {
    prefetch_all(ahead);
    panel8_columns(type, tile, p, &in, out, ldo);
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

INLINE void panel_columns(int type, const int wide, const uint8_t *w, int64_t stride, int64_t k, const pi2_q8 *x, int n,
                          float *out, int64_t ldo) {
  for (int64_t b = 0; b < k / PI2_BLOCK; b++) {
    panel_block p;
    for (int r = 0; r < PI2_PANEL; r++) panel_unpack(type, wide, w + r * stride, k, b, r, &p);
    panel_ahead ahead = ahead_of(type, w, stride, k, b);
    int c = 0;
    for (; c + 4 <= n; c += 4) {
      panel_tile(type, wide, 4, &p, x, c, b, ahead, out, ldo);
      go_ahead(&ahead);
    }
    ahead.at = NULL;
    for (; c < n; c++) panel_tile(type, wide, 1, &p, x, c, b, ahead, out, ldo);
  }
}

/* Activations that have a second form. PI2_COLUMNS of them at a time, so that a block's fine ones are bits of a number.
 */
#define PI2_COLUMNS 32
#define PI2_BLOCKS 64
INLINE void find_fine(const pi2_q8 *x, int c, int n, int64_t b, int blocks, uint32_t *fine) {
  for (int i = 0; i < blocks; i++) fine[i] = 0;
  for (int j = 0; j < n; j++) {
    const int16_t *h = x->h + 2 * ((c + j) * x->ldb + b);
    const uint32_t bit = (uint32_t)1 << j;
    for (int i = 0; i < blocks; i++) {
      uint32_t two; /* the first of them in its low half: so compilers make vectors of it */
      memcpy(&two, h + 2 * i, 4);
      fine[i] |= (two & 0xffff) == (uint16_t)PI2_FINE ? bit : 0;
    }
  }
}
/* The numbers of n columns, the fine ones last: nothing could foresee a branch for each of them. Returns how many are
 * not. */
INLINE int order_columns(uint32_t fine, int n, uint8_t *order) {
  static const uint8_t all[PI2_COLUMNS] = {0,  1,  2,  3,  4,  5,  6,  7,  8,  9,  10, 11, 12, 13, 14, 15,
                                           16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31};
  memcpy(order, all, sizeof all);
  const int coarse = n - __builtin_popcount(fine);
  const uint64_t first = ((uint64_t)1 << coarse) - 1, last = (((uint64_t)1 << n) - 1) & ~first;
  for (uint64_t from = fine & first, to = ~(uint64_t)fine & last; from; from &= from - 1, to &= to - 1) {
    const int i = __builtin_ctzll(from), j = __builtin_ctzll(to);
    order[i] = (uint8_t)j;
    order[j] = (uint8_t)i;
  }
  return coarse;
}

/* `tile` columns by their high bytes; to the last `fine` of them come the low ones. */
INLINE void panel_bytes_tile(int type, const int tile, const int fine, const panel_block *p, const pi2_q8 *x, int c,
                             const uint8_t *order, int64_t b, float *out, int64_t ldo) {
  panel_input in = {.h = x->h}, one = in;
  vi dot[PI2_PANEL][4], low[PI2_PANEL][4];
  for (int i = 0; i < tile; i++) in.q[i] = x->high + (c + order[i]) * x->ldh + b * PI2_BLOCK;
  panel8_sums(type, tile, p, &in, dot);
  if (fine) {
    for (int i = 0; i < tile; i++)
      for (int r = 0; r < PI2_PANEL; r++) dot[r][i] = i_times256(dot[r][i]);
    for (int i = tile - fine; i < tile; i++) {
      one.q[0] = in.q[i] + (x->low - x->high);
      panel8_sums(type, 1, p, &one, low);
      for (int r = 0; r < PI2_PANEL; r++) dot[r][i] = i_add(dot[r][i], low[r][0]);
    }
  }
  vf by[PI2_PANEL], plus[PI2_PANEL];
  __asm__ volatile("" : "+r"(p), "+r"(order), "+r"(out), "+r"(b) : : "memory");
  for (int r = 0; r < PI2_PANEL; r++) by[r] = p->dw[0][r], plus[r] = p->mw[r];
  for (int i = 0; i < tile; i++) {
    const int64_t at = c + order[i];
    const float d = x->d[at * x->ldb + b];
    const vf dc = v_set(fine ? d : d * 256.0f), sc = v_set(x->s[at * x->ldb + b]);
    float *o = out + at * ldo;
    __asm__("" : "+r"(o));
    for (int r = 0; r < PI2_PANEL; r++) {
      vf f = v_fma(v_mul(i_to_float(dot[r][i]), dc), by[r], v_load(o + r * PI2_ROWS));
      if (has_min(type)) f = v_fma(sc, plus[r], f);
      v_store(o + r * PI2_ROWS, f);
    }
  }
}
INLINE void panel_bytes(int type, const uint8_t *w, int64_t stride, int64_t k, const pi2_q8 *x, int c, int n,
                        float *out, int64_t ldo) {
  const int64_t blocks = k / PI2_BLOCK;
  uint32_t fine[PI2_BLOCKS];
  uint8_t order[PI2_COLUMNS];
  for (int64_t b = 0; b < blocks; b++) {
    if (b % PI2_BLOCKS == 0) find_fine(x, c, n, b, (int)(blocks - b < PI2_BLOCKS ? blocks - b : PI2_BLOCKS), fine);
    panel_block p;
    for (int r = 0; r < PI2_PANEL; r++) panel_unpack(type, 0, w + r * stride, k, b, r, &p);
    panel_ahead ahead = ahead_of(type, w, stride, k, b);
    const int coarse = order_columns(fine[b % PI2_BLOCKS], n, order);
    int i = 0;
    for (; i + 4 <= n; i += 4) {
      prefetch_all(ahead);
      go_ahead(&ahead);
      if (i + 4 <= coarse)
        panel_bytes_tile(type, 4, 0, &p, x, c, order + i, b, out, ldo);
      else
        panel_bytes_tile(type, 4, i < coarse ? i + 4 - coarse : 4, &p, x, c, order + i, b, out, ldo);
    }
    for (; i < n; i++)
      if (i < coarse)
        panel_bytes_tile(type, 1, 0, &p, x, c, order + i, b, out, ldo);
      else
        panel_bytes_tile(type, 1, 1, &p, x, c, order + i, b, out, ldo);
  }
}

/* PI2_PANEL row blocks at once, and what is left one by one */
INLINE void gemm_panel(int type, const int wide, const uint8_t *w, int64_t stride, int blocks, int64_t k,
                       const pi2_q8 *x, int n, float *out, int64_t ldo) {
  int b = 0;
  for (; b + PI2_PANEL <= blocks; b += PI2_PANEL, w += PI2_PANEL * stride, out += PI2_PANEL * PI2_ROWS) {
    for (int c = 0; c < n; c++)
      for (int r = 0; r < PI2_PANEL; r++) v_store(out + c * ldo + r * PI2_ROWS, v_zero());
    /* Q6_K adds up its halves in another order, and sums with signed bytes are too large, or need a bias */
    if (wide && x->high && type != PI2_Q8_0 && type != PI2_Q6_K)
      for (int c = 0; c < n; c += PI2_COLUMNS)
        panel_bytes(type, w, stride, k, x, c, n - c < PI2_COLUMNS ? n - c : PI2_COLUMNS, out, ldo);
    else
      panel_columns(type, wide, w, stride, k, x, n, out, ldo);
  }
  for (; b < blocks; b++, w += stride, out += PI2_ROWS) gemm_tiles(type, wide, w, k, x, n, out, ldo);
}
