/* Attention over KV pages, tiled: one page (64 positions) is scored, one softmax correction follows, then V is added.
 *
 * Keys are stored [position/16][head_dim][16]: sixteen positions are sixteen lanes, so scores need no sum across lanes,
 * and one load of keys serves every query vector of the tile (grouped heads, and rows of a prefill chunk). Online
 * softmax: Milakov and Gimelshein, 2018; tiling over keys: Dao et al., FlashAttention, 2022. */

static void kv_store(const pi2_kv *kv, int64_t position, const float *k, const float *v) {
  uint8_t *page = (uint8_t *)kv->base + kv->pages[position / PI2_PAGE] * kv->page_stride;
  const int at = (int)(position % PI2_PAGE), hd = kv->head_dim;
  if (kv->type == PI2_KV_Q8) {
    float k_top = 0, v_top_ = 0;
    for (int i = 0; i < hd; i++) {
      k_top = fabsf(k[i]) > k_top ? fabsf(k[i]) : k_top;
      v_top_ = fabsf(v[i]) > v_top_ ? fabsf(v[i]) : v_top_;
    }
    float dk = k_top / 127.0f, dv = v_top_ / 127.0f;
    float ik = dk > 1e-37f ? 1.0f / dk : 0.0f, iv = dv > 1e-37f ? 1.0f / dv : 0.0f;
    int8_t *keys = (int8_t *)page, *values = (int8_t *)page + kv->v_offset;
    for (int i = 0; i < hd; i++) {
      keys[((at / 16) * hd + i) * 16 + at % 16] = (int8_t)rintf(k[i] * ik);
      values[at * hd + i] = (int8_t)rintf(v[i] * iv);
    }
    ((float *)(keys + PI2_PAGE * hd))[at] = dk;
    ((float *)(values + PI2_PAGE * hd))[at] = dv;
    return;
  }
  if (kv->type == PI2_KV_F32) {
    float *keys = (float *)page, *values = (float *)(page + kv->v_offset);
    for (int i = 0; i < hd; i++) keys[((at / 16) * hd + i) * 16 + at % 16] = k[i];
    memcpy(values + at * hd, v, (size_t)hd * sizeof *v);
    return;
  }
  uint16_t *keys = (uint16_t *)page, *values = (uint16_t *)(page + kv->v_offset);
  for (int i = 0; i < hd; i += 16) {
    uint16_t halves[16];
    v_store_f16(halves, v_load(k + i));
    for (int j = 0; j < 16; j++) keys[((at / 16) * hd + i + j) * 16 + at % 16] = halves[j];
    v_store_f16(values + at * hd + i, v_load(v + i));
  }
}

INLINE vf kv_load(const int type, const uint8_t *p, int64_t i) {
  return type == PI2_KV_Q8    ? v_load_i8((const int8_t *)p + i)
         : type == PI2_KV_F16 ? v_load_f16((const uint16_t *)p + i)
                              : v_load((const float *)p + i);
}

/* Both products keep two sums for each query vector, of even and odd terms: with the three vectors of a small group one
 * sum each would wait for its own latency. */

/* Few query vectors wait for memory: while the keys of a page are read, its values are asked for, and with these the
 * keys of the next page, which lies elsewhere, so that no hardware would guess it. Into L2: a core has many more lines
 * under way to it than to L1 (Zen 4, three queries, pages apart: 11 GB/s without, 14 to L1, 23 so). `ahead`: what is
 * asked for, or NULL; `i`: of this many elements so far. */
INLINE void ask_ahead(const int type, const uint8_t *ahead, int64_t i) {
  const int64_t bytes = type == PI2_KV_Q8 ? 32 : type == PI2_KV_F16 ? 64 : 128; /* of 32 elements */
  if (ahead)
    for (int64_t line = 0; line < bytes; line += 64) v_prefetch_second(ahead + i / 32 * bytes + line);
}

/* scores[i*64 + j] = q[i] . key j of the page; positions [first, last) of it, in whole sixteens */
INLINE void score_tile(const int type, const int tile, const uint8_t *keys, const uint8_t *ahead, int hd,
                       const float *q, int64_t ldq, int first, int last, float *scores) {
  for (int b = first / 16; b * 16 < last; b++) {
    vf even[PI2_TILE], odd[PI2_TILE];
    for (int i = 0; i < tile; i++) even[i] = odd[i] = v_zero();
    for (int d = 0; d < hd; d += 2) {
      const int64_t at = (int64_t)(b * hd + d) * 16;
      vf key0 = kv_load(type, keys, at), key1 = kv_load(type, keys, at + 16);
      ask_ahead(type, ahead, at);
      for (int i = 0; i < tile; i++) {
        even[i] = v_fma(v_set(q[i * ldq + d]), key0, even[i]);
        odd[i] = v_fma(v_set(q[i * ldq + d + 1]), key1, odd[i]);
      }
    }
    for (int i = 0; i < tile; i++) v_store(scores + i * PI2_PAGE + b * 16, v_add(even[i], odd[i]));
  }
}
/* acc[i] += sum over positions of p[i*64 + j] * value j */
INLINE void value_tile(const int type, const int tile, const uint8_t *values, const uint8_t *ahead, int hd,
                       const float *p, int first, int last, float *acc) {
  for (int d = 0; d < hd; d += 16) {
    vf even[PI2_TILE], odd[PI2_TILE];
    for (int i = 0; i < tile; i++) {
      even[i] = v_load(acc + i * hd + d);
      odd[i] = v_zero();
    }
    for (int j = first & ~1; j < last; j += 2) { /* p is zero outside, and the page's own rows are there to load */
      ask_ahead(type, ahead, (int64_t)d * PI2_PAGE + 16 * j);
      vf value0 = j >= first ? kv_load(type, values, (int64_t)j * hd + d) : v_zero();
      vf value1 = j + 1 < last ? kv_load(type, values, (int64_t)(j + 1) * hd + d) : v_zero();
      for (int i = 0; i < tile; i++) {
        even[i] = v_fma(v_set(p[i * PI2_PAGE + j]), value0, even[i]);
        odd[i] = v_fma(v_set(p[i * PI2_PAGE + j + 1]), value1, odd[i]);
      }
    }
    for (int i = 0; i < tile; i++) v_store(acc + i * hd + d, v_add(even[i], odd[i]));
  }
}

INLINE void attend_as(const int type, const pi2_kv *kv, const float *q, int64_t ldq, int nq, const int32_t *lo,
                      const int32_t *hi, int64_t begin, int64_t end, float cap, float *max, float *sum, float *acc,
                      float *scratch) {
  const int hd = kv->head_dim, q8 = type == PI2_KV_Q8;
  for (int i = 0; i < nq; i++) {
    max[i] = -__builtin_inff();
    sum[i] = 0;
    for (int d = 0; d < hd; d += 16) v_store(acc + (int64_t)i * hd + d, v_zero());
  }
  for (int64_t base = begin / PI2_PAGE * PI2_PAGE; base < end; base += PI2_PAGE) {
    const uint8_t *keys = kv->base + kv->pages[base / PI2_PAGE] * kv->page_stride, *values = keys + kv->v_offset;
    const int first = base < begin ? (int)(begin - base) : 0;
    const int last = end - base < PI2_PAGE ? (int)(end - base) : PI2_PAGE;
    const uint8_t *next =
        nq <= PI2_TILE && base + PI2_PAGE < end ? kv->base + kv->pages[base / PI2_PAGE + 1] * kv->page_stride : NULL;
    int done = 0;
    for (; nq - done >= PI2_TILE; done += PI2_TILE)
      score_tile(type, PI2_TILE, keys, values, hd, q + done * ldq, ldq, first, last, scratch + done * PI2_PAGE);
    for (; nq - done >= 4; done += 4)
      score_tile(type, 4, keys, values, hd, q + done * ldq, ldq, first, last, scratch + done * PI2_PAGE);
    for (; nq - done >= 3; done += 3)
      score_tile(type, 3, keys, values, hd, q + done * ldq, ldq, first, last, scratch + done * PI2_PAGE);
    for (; done < nq; done++)
      score_tile(type, 1, keys, values, hd, q + done * ldq, ldq, first, last, scratch + done * PI2_PAGE);

    const float *key_scale = (const float *)(keys + PI2_PAGE * hd); /* used where q8 */
    const float *value_scale = (const float *)(values + PI2_PAGE * hd);
    for (int i = 0; i < nq; i++) {
      float *p = scratch + i * PI2_PAGE;
      const int from = lo[i] - base > first ? (int)(lo[i] - base) : first;
      const int to = hi[i] - base < last ? (int)(hi[i] - base) : last;
      float *a = acc + (int64_t)i * hd;
      if (from >= to) { /* sees nothing here; zeros keep value_tile branch-free */
        for (int b = first / 16; b * 16 < last; b++) v_store(p + b * 16, v_zero());
        continue;
      }
      vf top = v_set(-__builtin_inff());
      for (int b = first / 16; b * 16 < last; b++) {
        vf s = v_load(p + b * 16);
        if (q8) s = v_mul(s, v_load(key_scale + b * 16));
        if (cap > 0) {
          v_store(p + b * 16, s);
          softcap(p + b * 16, cap, 16);
          s = v_load(p + b * 16);
        }
        if (from > b * 16 || to < b * 16 + 16) s = v_window(s, -__builtin_inff(), from - b * 16, to - b * 16);
        v_store(p + b * 16, s);
        top = v_max(top, s);
      }
      float page_max = v_top(top), new_max = page_max > max[i] ? page_max : max[i];
      vf total = v_zero(), m = v_set(new_max);
      for (int b = first / 16; b * 16 < last; b++) {
        vf e = v_exp(v_sub(v_load(p + b * 16), m)); /* 0 outside the window: e^-inf, and of NaN too */
        total = v_add(total, e);
        if (q8) e = v_window(v_mul(e, v_load(value_scale + b * 16)), 0.0f, from - b * 16, to - b * 16);
        v_store(p + b * 16, e);
      }
      if (new_max > max[i]) { /* exp(-inf) is 0 on the first page */
        float f[16];
        v_store(f, v_exp(v_set(max[i] - new_max)));
        sum[i] *= f[0];
        for (int d = 0; d < hd; d += 16) v_store(a + d, v_mul(v_load(a + d), v_set(f[0])));
        max[i] = new_max;
      }
      sum[i] += v_sum(total);
    }
    for (done = 0; nq - done >= PI2_TILE; done += PI2_TILE)
      value_tile(type, PI2_TILE, values, next, hd, scratch + done * PI2_PAGE, first, last, acc + (int64_t)done * hd);
    for (; nq - done >= 4; done += 4)
      value_tile(type, 4, values, next, hd, scratch + done * PI2_PAGE, first, last, acc + (int64_t)done * hd);
    for (; nq - done >= 3; done += 3)
      value_tile(type, 3, values, next, hd, scratch + done * PI2_PAGE, first, last, acc + (int64_t)done * hd);
    for (; done < nq; done++)
      value_tile(type, 1, values, next, hd, scratch + done * PI2_PAGE, first, last, acc + (int64_t)done * hd);
  }
}
static void attend(const pi2_kv *kv, const float *q, int64_t ldq, int nq, const int32_t *lo, const int32_t *hi,
                   int64_t begin, int64_t end, float cap, float *max, float *sum, float *acc, float *scratch) {
  switch (kv->type) {
  case PI2_KV_F16: attend_as(PI2_KV_F16, kv, q, ldq, nq, lo, hi, begin, end, cap, max, sum, acc, scratch); break;
  case PI2_KV_Q8: attend_as(PI2_KV_Q8, kv, q, ldq, nq, lo, hi, begin, end, cap, max, sum, acc, scratch); break;
  default: attend_as(PI2_KV_F32, kv, q, ldq, nq, lo, hi, begin, end, cap, max, sum, acc, scratch);
  }
}

static void attend_merge(float *max, float *sum, float *acc, float max2, float sum2, const float *acc2, int hd) {
  if (!(sum2 > 0)) return; /* the split saw nothing */
  float both = max2 > *max ? max2 : *max;
  float e[16], in[16] = {0};
  in[0] = *max - both;
  in[1] = max2 - both;
  v_store(e, v_exp(v_load(in)));
  vf f1 = v_set(e[0]), f2 = v_set(e[1]);
  *sum = fmaf(sum2, e[1], *sum * e[0]);
  for (int d = 0; d < hd; d += 16) v_store(acc + d, v_fma(v_load(acc2 + d), f2, v_mul(v_load(acc + d), f1)));
  *max = both;
}
