/* Sixteen lanes in plain C: the reference that every other instruction set equals bit for bit. */
#include <math.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  float v[16];
} vf;
typedef struct {
  int32_t v[16];
} vi;
typedef struct {
  uint8_t v[64];
} vb; /* 16 rows x 4 columns */

#define LANES for (int i = 0; i < 16; i++)

static inline float half_to_float(uint16_t h) {
  uint32_t sign = (uint32_t)(h & 0x8000) << 16, exponent = (h >> 10) & 31, mantissa = h & 0x3ff, bits;
  if (exponent == 0) { /* zero or subnormal: mantissa * 2^-24, exact */
    float f = (float)mantissa * 5.9604644775390625e-8f;
    memcpy(&bits, &f, 4);
    bits |= sign;
  } else if (exponent == 31) {
    bits = sign | 0x7f800000 | mantissa << 13 | (mantissa ? 0x400000 : 0); /* quiet NaN, as hardware does */
  } else {
    bits = sign | (exponent + 112) << 23 | mantissa << 13;
  }
  float f;
  memcpy(&f, &bits, 4);
  return f;
}
static inline uint16_t float_to_half(float f) { /* round to nearest even */
  uint32_t x;
  memcpy(&x, &f, 4);
  uint16_t sign = (uint16_t)(x >> 16 & 0x8000);
  x &= 0x7fffffff;
  if (x > 0x7f800000) return (uint16_t)(sign | 0x7e00 | (x >> 13 & 0x3ff));
  if (x >= 0x477ff000) return sign | 0x7c00;
  if (x < 0x38800000) { /* subnormal half: let the adder round at bit 2^-24 */
    float a;
    memcpy(&a, &x, 4);
    a += 0.5f; /* ulp of [0.5, 1) is 2^-24 */
    uint32_t r;
    memcpy(&r, &a, 4);
    return (uint16_t)(sign | (r - 0x3f000000));
  }
  uint32_t odd = x >> 13 & 1;
  return (uint16_t)(sign | ((x - 0x38000000 + 0xfff + odd) >> 13));
}

static inline vf v_zero(void) {
  vf r;
  LANES r.v[i] = 0;
  return r;
}
static inline vf v_set(float a) {
  vf r;
  LANES r.v[i] = a;
  return r;
}
static inline vf v_load(const float *p) {
  vf r;
  memcpy(&r, p, 64);
  return r;
}
static inline void v_store(float *p, vf a) { memcpy(p, &a, 64); }
static inline vf v_add(vf a, vf b) {
  LANES a.v[i] += b.v[i];
  return a;
}
static inline vf v_sub(vf a, vf b) {
  LANES a.v[i] -= b.v[i];
  return a;
}
static inline vf v_mul(vf a, vf b) {
  LANES a.v[i] *= b.v[i];
  return a;
}
static inline vf v_div(vf a, vf b) {
  LANES a.v[i] /= b.v[i];
  return a;
}
static inline vf v_fma(vf a, vf b, vf c) {
  LANES c.v[i] = fmaf(a.v[i], b.v[i], c.v[i]);
  return c;
}
static inline vf v_max(vf a, vf b) {
  LANES a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
  return a;
} /* NaN in a: b */
static inline vf v_abs(vf a) {
  LANES a.v[i] = fabsf(a.v[i]);
  return a;
}
static inline vf v_rint(vf a) {
  LANES a.v[i] = rintf(a.v[i]);
  return a;
}
static inline vf v_pow2(vf n) { /* n whole, in [-126, 127] */
  vf r;
  LANES {
    uint32_t bits = (uint32_t)((int32_t)n.v[i] + 127) << 23;
    memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
static inline vf v_zero_below(vf a, vf x, float bound) {
  LANES a.v[i] = x.v[i] >= bound ? a.v[i] : 0;
  return a;
}
/* lanes i with lo <= i < hi keep a, the others become b */
static inline vf v_window(vf a, float b, int lo, int hi) {
  LANES a.v[i] = i >= lo && i < hi ? a.v[i] : b;
  return a;
}
static inline float v_sum(vf a) {
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; i++) a.v[i] += a.v[i + n];
  return a.v[0];
}
static inline float v_top(vf a) {
  for (int n = 8; n; n /= 2)
    for (int i = 0; i < n; i++) a.v[i] = a.v[i] > a.v[i + n] ? a.v[i] : a.v[i + n];
  return a.v[0];
}
static inline float v_magnitude(vf a, vf b) {
  float top = 0;
  LANES top = top >= fabsf(a.v[i]) || top != top ? top : fabsf(a.v[i]);
  LANES top = top >= fabsf(b.v[i]) || top != top ? top : fabsf(b.v[i]);
  return top;
}
static inline vf v_load_f16(const uint16_t *p) {
  vf r;
  LANES r.v[i] = half_to_float(p[i]);
  return r;
}
static inline vf v_load_bf16(const uint16_t *p) {
  vf r;
  LANES {
    uint32_t bits = (uint32_t)p[i] << 16;
    memcpy(&r.v[i], &bits, 4);
  }
  return r;
}
static inline vf v_load_u8(const uint8_t *p) {
  vf r;
  LANES r.v[i] = p[i];
  return r;
}
static inline vf v_load_i8(const int8_t *p) {
  vf r;
  LANES r.v[i] = p[i];
  return r;
}
static inline void v_store_f16(uint16_t *p, vf a) { LANES p[i] = float_to_half(a.v[i]); }
/* rounds to nearest even, saturates to [-128, 127] */
static inline vi v_to_int(vf a) {
  vi r;
  LANES r.v[i] = (int32_t)rintf(a.v[i]);
  return r;
}
static inline void i_store_i8(int8_t *p, vi a) {
  LANES p[i] = (int8_t)(a.v[i] > 127 ? 127 : a.v[i] < -128 ? -128 : a.v[i]);
}
/* as int16, saturated, each four values in the order 0, 2, 1, 3 */
static inline void i_store_i16_0213(int16_t *p, vi a) {
  LANES {
    int32_t v = a.v[(i & ~3) + (i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : i % 4)];
    p[i] = (int16_t)(v > 32767 ? 32767 : v < -32768 ? -32768 : v);
  }
}
static inline vi i_times256(vi a) {
  LANES a.v[i] *= 256;
  return a;
}
static inline vi i_add(vi a, vi b) {
  LANES a.v[i] += b.v[i];
  return a;
}
static inline int32_t i_sum(vi a) {
  int32_t s = 0;
  LANES s += a.v[i];
  return s;
}
static inline void i_store_i8_sums(int8_t *p, vi a, vi b, int32_t *sum_a, int32_t *sum_b) {
  i_store_i8(p, a);
  i_store_i8(p + 16, b);
  *sum_a = i_sum(a);
  *sum_b = i_sum(b);
}
static inline vf i_to_float(vi a) {
  vf r;
  LANES r.v[i] = (float)a.v[i];
  return r;
}

static inline vb b_load(const uint8_t *p) {
  vb r;
  memcpy(&r, p, 64);
  return r;
}
static inline vb b_low(vb a) {
  for (int i = 0; i < 64; i++) a.v[i] &= 15;
  return a;
}
static inline vb b_high(vb a) {
  for (int i = 0; i < 64; i++) a.v[i] >>= 4;
  return a;
}
/* adds 16 to byte i where bit i of the word is set */
static inline vb b_fifth(vb a, const uint8_t *word) {
  for (int i = 0; i < 64; i++) a.v[i] |= (uint8_t)((word[i / 8] >> i % 8 & 1) << 4);
  return a;
}
/* adds bits 2t, 2t+1 of top as bits 4, 5 */
static inline vb b_sixth(vb a, vb top, int t) {
  for (int i = 0; i < 64; i++) a.v[i] |= (uint8_t)((top.v[i] >> 2 * t & 3) << 4);
  return a;
}

static inline vi dot_groups(const vb *w, const int8_t *x, int groups, int is_signed) {
  vi r;
  LANES {
    int32_t sum = 0;
    for (int g = 0; g < groups; g++)
      for (int j = 0; j < 4; j++)
        sum += (is_signed ? (int8_t)w[g].v[i * 4 + j] : (int32_t)w[g].v[i * 4 + j]) * x[g * 4 + j];
    r.v[i] = sum;
  }
  return r;
}
static inline vi dot_u4(const vb w[8], const int8_t *x) { return dot_groups(w, x, 8, 0); }
static inline vi dot_u5(const vb w[8], const int8_t *x) { return dot_groups(w, x, 8, 0); }
static inline vi dot_s8(const vb w[8], const int8_t *x) { return dot_groups(w, x, 8, 1); }
/* sum over both halves h of scale[h] * (dot of 6-bit quants minus 32): Q6_K's block; half_sums: sums of x */
typedef struct {
  int8_t s[2][16];
} v6scale;
static inline v6scale scale6_load(const int8_t *p) {
  v6scale r;
  memcpy(&r, p, 32);
  return r;
}
static inline vi dot_u6(const vb w[8], const int8_t *x, v6scale s, const int16_t *half_sums) {
  vi a = dot_groups(w, x, 4, 0), b = dot_groups(w + 4, x + 16, 4, 0);
  LANES a.v[i] = s.s[0][i] * (a.v[i] - 32 * half_sums[0]) + s.s[1][i] * (b.v[i] - 32 * half_sums[1]);
  return a;
}
/* Weights of a block as int16 for int16 activations: pairs[2g] holds columns 0 and 2 of group g, pairs[2g+1] columns 1
 * and 3, less `zero`. */
typedef struct {
  int16_t v[32];
} vw;
static inline void widen(const vb w[8], vw pairs[16], int is_signed, int zero) {
  for (int g = 0; g < 8; g++)
    for (int i = 0; i < 64; i++) {
      int16_t value = is_signed ? (int8_t)w[g].v[i] : (int16_t)w[g].v[i];
      pairs[2 * g + i % 2].v[i / 2] = (int16_t)(value - zero);
    }
}
/* n/2 groups of columns; x in the order of i_store_i16_0213. |w| <= 128, |x| <= 32767: 32 products stay below 2^31 */
static inline vi dot_wide(const vw *pairs, const int16_t *x, int n) {
  vi r;
  LANES {
    int32_t sum = 0;
    for (int p = 0; p < n; p++) sum += pairs[p].v[2 * i] * x[2 * p] + pairs[p].v[2 * i + 1] * x[2 * p + 1];
    r.v[i] = sum;
  }
  return r;
}
/* one step of a panel: two columns of a row's weights times two activations, broadcast */
typedef struct {
  int16_t v[2];
} vx;
static inline vx x_load(const int16_t *x) {
  vx r = {{x[0], x[1]}};
  return r;
}
static inline vi i_zero(void) {
  vi r;
  LANES r.v[i] = 0;
  return r;
}
static inline vi i_madd(vi a, vw w, vx x) {
  LANES a.v[i] += w.v[2 * i] * x.v[0] + w.v[2 * i + 1] * x.v[1];
  return a;
}
/* a panel's groups with int8 activations: panel_template.h says what PI2_SHORT and the functions g_ are */
typedef vi vg;
typedef struct {
  int8_t v[4];
} vx8;
#define PI2_X_GROUPS 1
#define PI2_SHORT 0
#define PI2_BIAS 0
static inline vb b_biased(vb w) { return w; }
static inline vx8 x8_load(const int8_t *x) {
  vx8 r;
  memcpy(&r, x, 4);
  return r;
}
static inline void g_madd(vg *a, vb w, vx8 x, int g) {
  (void)g;
  LANES for (int j = 0; j < 4; j++) a->v[i] += (int8_t)w.v[4 * i + j] * x.v[j]; /* weights without a sign end at 63 */
}
static inline vg g_first(int32_t begin, vb w, vx8 x) {
  vg a;
  LANES a.v[i] = begin;
  g_madd(&a, w, x, 0);
  return a;
}
static inline vi g_close(vg a) { return a; }
static inline vi g_scale(vg a, const v6scale *s, int half) {
  LANES a.v[i] *= s->s[half][i];
  return a;
}
#define PI2_PANEL 1
static inline uint64_t read_256(const uint8_t *p) {
  uint64_t s = 0, w;
  for (int i = 0; i < 256; i += 8) {
    memcpy(&w, p + i, 8);
    s ^= w;
  }
  return s;
}
/* Neurons one by one; neuron_template.h says what lies where. Sixteen blocks of a row, a lane each: 256 bytes of
 * nibbles or 512 of bytes, times activations x[16][16 lanes][2]. */
static inline vi r_nibbles(const uint8_t *p, const int16_t *x) {
  vi r;
  LANES {
    int32_t sum = 0;
    for (int v = 0; v < 16; v++)
      for (int j = 0; j < 2; j++) {
        const int byte = p[64 * (v / 4) + 4 * i + 2 * j + v % 4 / 2];
        sum += (v % 2 ? byte >> 4 : byte & 15) * x[32 * v + 2 * i + j];
      }
    r.v[i] = sum;
  }
  return r;
}
static inline vi r_bytes(const uint8_t *p, const int16_t *x) {
  vi r;
  LANES {
    int32_t sum = 0;
    for (int v = 0; v < 16; v++)
      for (int j = 0; j < 2; j++) sum += (int8_t)p[64 * (v / 2) + 4 * i + 2 * j + v % 2] * x[32 * v + 2 * i + j];
    r.v[i] = sum;
  }
  return r;
}
/* Two neurons' columns times an activation each: 128 rows of nibbles, sixteen to a sum, or 64 of bytes. c_close: once,
 * at the end of at most 16 such pairs of nibbles. */
static inline void c_nibbles(vi sum[8], const uint8_t *a, const uint8_t *b, int32_t xa, int32_t xb) {
  LANES for (int n = 0; n < 8; n++) sum[n].v[i] +=
      (a[4 * i + n / 2] >> n % 2 * 4 & 15) * xa + (b[4 * i + n / 2] >> n % 2 * 4 & 15) * xb;
}
static inline void c_close(vi sum[8]) { (void)sum; }
static inline void c_bytes(vi sum[4], const uint8_t *a, const uint8_t *b, int32_t xa, int32_t xb) {
  LANES for (int n = 0; n < 4; n++) sum[n].v[i] += (int8_t)a[4 * i + n] * xa + (int8_t)b[4 * i + n] * xb;
}
static inline void v_transpose(vf m[16]) {
  LANES for (int j = 0; j < i; j++) {
    const float a = m[i].v[j];
    m[i].v[j] = m[j].v[i];
    m[j].v[i] = a;
  }
}
#define PI2_TILE 4
#define PI2_GENERIC 1
