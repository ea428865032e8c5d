/* Element-wise kernels over the sixteen lanes of simd_*.h. Tails (n not a multiple of 16) go through a padded copy, so
 * that a value's bits do not depend on where in the vector it stands. */

/* e^x: x = n ln2 + r, |r| <= ln2/2; e^r by Cephes' polynomial (2 ulp); 0 below -87.33, clamped above 88.37 */
INLINE vf v_exp(vf x) {
  vf y = v_max(v_sub(v_zero(), v_max(v_sub(v_zero(), x), v_set(-88.3762626647949f))), v_set(-87.3365447504019f));
  vf n = v_rint(v_mul(y, v_set(1.44269504088896341f)));
  vf r = v_fma(n, v_set(-0.693359375f), y);
  r = v_fma(n, v_set(2.12194440e-4f), r);
  vf p = v_set(1.9875691500e-4f);
  p = v_fma(p, r, v_set(1.3981999507e-3f));
  p = v_fma(p, r, v_set(8.3334519073e-3f));
  p = v_fma(p, r, v_set(4.1665795894e-2f));
  p = v_fma(p, r, v_set(1.6666665459e-1f));
  p = v_fma(p, r, v_set(5.0000001201e-1f));
  p = v_fma(v_mul(r, r), p, v_add(r, v_set(1.0f)));
  return v_zero_below(v_mul(p, v_pow2(n)), x, -87.3365447504019f);
}

INLINE vf v_load_tail(const float *p, int64_t n) {
  float padded[16] = {0};
  memcpy(padded, p, (size_t)n * sizeof(float));
  return v_load(padded);
}
INLINE void v_store_tail(float *p, vf a, int64_t n) {
  float padded[16];
  v_store(padded, a);
  memcpy(p, padded, (size_t)n * sizeof(float));
}
/* Runs `body` with i the offset and m the count (16, or the tail's). */
#define CHUNKS(n, body)                            \
  for (int64_t i = 0; i < (n); i += 16) {          \
    const int64_t m = (n) - i < 16 ? (n) - i : 16; \
    body                                           \
  }
#define LOAD(p) (m == 16 ? v_load((p) + i) : v_load_tail((p) + i, m))
#define STORE(p, a)                \
  do {                             \
    if (m == 16)                   \
      v_store((p) + i, a);         \
    else                           \
      v_store_tail((p) + i, a, m); \
  } while (0)

/* The scale that maps a block's largest magnitude to `limit`, and its inverse; both 0 for a block of zeros, or of
 * numbers so small that the inverse is not finite. A block with a number that is not finite becomes zeros with a scale
 * that is not finite either: what it meets is NaN, and a broken model cannot go on as if nothing had happened. */
INLINE float block_scale(vf *x0, vf *x1, float limit, float *inverse) {
  const float top = v_magnitude(*x0, *x1), scale = top / limit;
  *inverse = 1.0f / scale;
  if (top <= 3.4028234664e38f && *inverse <= 3.0e38f) return scale;
  *inverse = 0.0f;
  if (top <= 3.4028234664e38f) return 0.0f;
  *x0 = *x1 = v_zero();
  return __builtin_nanf("");
}
static void quantize8(const float *x, int64_t k, const pi2_q8 *o) {
  for (int64_t b = 0; b < k / PI2_BLOCK; b++) {
    vf x0 = v_load(x + b * 32), x1 = v_load(x + b * 32 + 16);
    float inverse, scale = block_scale(&x0, &x1, 127.0f, &inverse);
    vi i0 = v_to_int(v_mul(x0, v_set(inverse))), i1 = v_to_int(v_mul(x1, v_set(inverse)));
    int32_t h0, h1;
    i_store_i8_sums(o->q + b * 32, i0, i1, &h0, &h1);
    o->d[b] = scale;
    o->s[b] = scale * (float)(h0 + h1);
    o->h[2 * b] = (int16_t)h0;
    o->h[2 * b + 1] = (int16_t)h1;
  }
}
INLINE void quantize_words(const float *x, int64_t b, float limit, const pi2_q8 *o, vi i[2]) {
  vf x0 = v_load(x + b * 32), x1 = v_load(x + b * 32 + 16);
  float inverse, scale = block_scale(&x0, &x1, limit, &inverse);
  i[0] = v_to_int(v_mul(x0, v_set(inverse))), i[1] = v_to_int(v_mul(x1, v_set(inverse)));
  if (o->q) {
    i_store_i16_0213((int16_t *)o->q + b * 32, i[0]);
    i_store_i16_0213((int16_t *)o->q + b * 32 + 16, i[1]);
  }
  o->d[b] = scale;
  o->s[b] = scale * (float)i_sum(i_add(i[0], i[1]));
}
static void quantize16(const float *x, int64_t k, const pi2_q8 *o) {
  for (int64_t b = 0; b < k / PI2_BLOCK; b++) {
    vi i[2];
    quantize_words(x, b, 32767.0f, o, i);
    o->h[2 * b] = o->h[2 * b + 1] = 0;
  }
}
INLINE void quantize_both(const float *x, int64_t b, const pi2_q8 *o) {
  vi i[2];
  quantize_words(x, b, 32639.0f, o, i); /* 127 * 256 + 127 */
  for (int half = 0; half < 2; half++) {
    /* a quarter, so that a half is rounded up, and the low byte is in [-128, 127] */
    const vf words = i_to_float(i[half]);
    const vi bytes = v_to_int(v_mul(v_add(words, v_set(0.25f)), v_set(1.0f / 256.0f)));
    i_store_i8(o->high + b * 32 + half * 16, bytes);
    i_store_i8(o->low + b * 32 + half * 16, v_to_int(v_fma(i_to_float(bytes), v_set(-256.0f), words)));
  }
  o->h[2 * b] = PI2_FINE;
  o->h[2 * b + 1] = 0;
}
/* int16, of which all but the largest blocks have 8 bits: those are 256 times what quantize8 makes of them. A block is
 * fine where its largest magnitude exceeds PI2_FINER times the root mean square of all blocks' largest magnitudes:
 * where most of the error would be (docs/design.md). */
static void quantize_mixed(const float *x, int64_t k, const pi2_q8 *o) {
  const int64_t blocks = k / PI2_BLOCK;
  float *d = o->d;
  double squares = 0;
  for (int64_t b = 0; b < blocks; b++) {
    d[b] = v_magnitude(v_load(x + b * 32), v_load(x + b * 32 + 16));
    squares += (double)d[b] * d[b];
  }
  const double limit = squares * (PI2_FINER * PI2_FINER) / (double)(blocks ? blocks : 1);
  for (int64_t b = 0; b < blocks; b++) {
    /* so small that a 256th of the scale might not be exact: fine, too; and what is not finite, so that it is NaN once
     */
    if (!((double)d[b] * d[b] <= limit && d[b] >= 1e-30f)) {
      quantize_both(x, b, o);
      continue;
    }
    const float scale = d[b] / 127.0f, inverse = 1.0f / scale; /* as block_scale has them: d[b] is no extreme */
    const vi i0 = v_to_int(v_mul(v_load(x + b * 32), v_set(inverse)));
    const vi i1 = v_to_int(v_mul(v_load(x + b * 32 + 16), v_set(inverse)));
    int32_t h0, h1;
    i_store_i8_sums(o->high + b * 32, i0, i1, &h0, &h1);
    if (o->q) {
      i_store_i16_0213((int16_t *)o->q + b * 32, i_times256(i0));
      i_store_i16_0213((int16_t *)o->q + b * 32 + 16, i_times256(i1));
    }
    d[b] = scale / 256.0f;
    o->s[b] = scale * (float)(h0 + h1);
    o->h[2 * b] = (int16_t)h0;
    o->h[2 * b + 1] = (int16_t)h1;
  }
}

static void rmsnorm(const float *x, const float *w, float offset, float eps, float *y, int64_t n) {
  vf squares = v_zero();
  CHUNKS(n, {
    vf a = LOAD(x);
    squares = v_fma(a, a, squares);
  })
  float r = 1.0f / sqrtf(v_sum(squares) / (float)n + eps);
  vf rr = v_set(r), o = v_set(offset);
  CHUNKS(n, { STORE(y, v_mul(v_mul(LOAD(x), rr), v_add(LOAD(w), o))); })
}

static void add(const float *x, float *y, int64_t n) {
  CHUNKS(n, { STORE(y, v_add(LOAD(y), LOAD(x))); })
}

static void scale(const float *x, float a, float *y, int64_t n) {
  vf aa = v_set(a);
  CHUNKS(n, { STORE(y, v_mul(LOAD(x), aa)); })
}

INLINE vf act(int kind, vf x) {
  switch (kind) {
  case PI2_SILU: /* exp is clamped at 2.3e38: below -1e30, where silu is 0, x itself has to be */
    x = v_max(v_set(-1e30f), x);
    return v_div(x, v_add(v_set(1.0f), v_exp(v_sub(v_zero(), x))));
  case PI2_GELU_TANH: { /* x * sigmoid(2 t), t = sqrt(2/pi) (x + 0.044715 x^3): equal to 0.5 x (1 + tanh t) */
    vf t = v_mul(v_fma(v_mul(v_mul(x, x), x), v_set(0.044715f), x), v_set(-1.5957691216057308f));
    x = v_max(v_set(-1e30f), x);
    return v_div(x, v_add(v_set(1.0f), v_exp(t)));
  }
  case PI2_GELU: {
    float e[16];
    v_store(e, x);
    for (int i = 0; i < 16; i++) e[i] = 0.5f * e[i] * (1.0f + (float)pi2_erf((double)(e[i] * 0.70710678118654752f)));
    return v_load(e);
  }
  case PI2_RELU: return v_max(x, v_zero());
  case PI2_RELU2: {
    vf r = v_max(x, v_zero());
    return v_mul(r, r);
  }
  default: return x;
  }
}
INLINE void activate_as(int kind, int up_kind, const float *gate, const float *up, float *out, int64_t n) {
  CHUNKS(n, {
    if (gate)
      STORE(out, v_mul(act(kind, LOAD(gate)), act(up_kind, LOAD(up))));
    else
      STORE(out, act(kind, LOAD(up)));
  })
}
static void activate(int kind, int up_kind, const float *gate, const float *up, float *out, int64_t n) {
  if (kind == PI2_SILU && !up_kind)
    activate_as(PI2_SILU, PI2_NONE, gate, up, out, n); /* the common one, inlined */
  else
    activate_as(kind, up_kind, gate, up, out, n);
}

static void rope(float *x, const float *cosine, const float *sine, int half, int interleaved) {
  if (interleaved) {
    for (int i = 0; i < half; i++) {
      float a = x[2 * i], b = x[2 * i + 1];
      x[2 * i] = fmaf(a, cosine[i], -(b * sine[i]));
      x[2 * i + 1] = fmaf(a, sine[i], b * cosine[i]);
    }
    return;
  }
  CHUNKS(half, {
    vf a = LOAD(x);
    vf b = LOAD(x + half);
    vf c = LOAD(cosine);
    vf s = LOAD(sine);
    STORE(x, v_fma(a, c, v_sub(v_zero(), v_mul(b, s))));
    STORE(x + half, v_fma(a, s, v_mul(b, c)));
  })
}

static int64_t argmax(const float *x, int64_t n) {
  vf best = v_set(-__builtin_inff());
  CHUNKS(n, {
    vf a = m == 16 ? v_load(x + i) : v_window(v_load_tail(x + i, m), -__builtin_inff(), 0, (int)m);
    best = v_max(a, best);
  })
  float top = v_top(best);
  for (int64_t i = 0; i < n; i++)
    if (x[i] == top) return i;
  return 0; /* all NaN */
}

static double logsumexp(const float *x, int64_t n) {
  float top = x[argmax(x, n)];
  double total = 0;
  for (int64_t begin = 0; begin < n; begin += 4096) { /* float sums of 4096, then double */
    const int64_t count = n - begin < 4096 ? n - begin : 4096;
    vf sum = v_zero();
    const float *p = x + begin;
    CHUNKS(count, {
      vf e = v_exp(v_sub(LOAD(p), v_set(top)));
      sum = v_add(sum, m == 16 ? e : v_window(e, 0.0f, 0, (int)m));
    })
    total += (double)v_sum(sum);
  }
  return (double)top + pi2_log(total);
}

static void softcap(float *x, float cap, int64_t n) { /* tanh t = 1 - 2 / (e^2t + 1) */
  CHUNKS(n, {
    vf e = v_exp(v_mul(LOAD(x), v_set(2.0f / cap)));
    STORE(x, v_mul(v_set(cap), v_sub(v_set(1.0f), v_div(v_set(2.0f), v_add(e, v_set(1.0f))))));
  })
}

static uint64_t read_bytes(const uint8_t *p, int64_t n) {
  uint64_t s = 0;
  for (int64_t i = 0; i < n; i += 256) {
    s ^= read_256(p + i);
    v_prefetch(p + i + PI2_PREFETCH);
    v_prefetch(p + i + PI2_PREFETCH + 64);
    v_prefetch(p + i + PI2_PREFETCH + 128);
    v_prefetch(p + i + PI2_PREFETCH + 192);
  }
  return s;
}
