/* Sixteen lanes as four NEON registers (Armv8.2 with the dot product extension). */
#include <arm_neon.h>
#include <stdint.h>

typedef struct {
  float32x4_t v[4];
} vf;
typedef struct {
  int32x4_t v[4];
} vi;
typedef struct {
  uint8x16_t v[4];
} vb; /* rows 4i..4i+3, four columns each */

#define QUARTERS for (int i = 0; i < 4; i++)

static inline vf v_set(float a) {
  vf r;
  QUARTERS r.v[i] = vdupq_n_f32(a);
  return r;
}
static inline vf v_zero(void) { return v_set(0.0f); }
static inline vf v_load(const float *p) {
  vf r;
  QUARTERS r.v[i] = vld1q_f32(p + 4 * i);
  return r;
}
static inline void v_store(float *p, vf a) { QUARTERS vst1q_f32(p + 4 * i, a.v[i]); }
static inline vf v_add(vf a, vf b) {
  QUARTERS a.v[i] = vaddq_f32(a.v[i], b.v[i]);
  return a;
}
static inline vf v_sub(vf a, vf b) {
  QUARTERS a.v[i] = vsubq_f32(a.v[i], b.v[i]);
  return a;
}
static inline vf v_mul(vf a, vf b) {
  QUARTERS a.v[i] = vmulq_f32(a.v[i], b.v[i]);
  return a;
}
static inline vf v_div(vf a, vf b) {
  QUARTERS a.v[i] = vdivq_f32(a.v[i], b.v[i]);
  return a;
}
static inline vf v_fma(vf a, vf b, vf c) {
  QUARTERS c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]);
  return c;
}
/* not vmaxq: it returns NaN where either is, and orders the zeros */
static inline float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline vf v_max(vf a, vf b) {
  QUARTERS a.v[i] = larger(a.v[i], b.v[i]);
  return a;
}
static inline vf v_abs(vf a) {
  QUARTERS a.v[i] = vabsq_f32(a.v[i]);
  return a;
}
static inline vf v_rint(vf a) {
  QUARTERS a.v[i] = vrndnq_f32(a.v[i]);
  return a;
}
static inline vf v_pow2(vf n) {
  QUARTERS n.v[i] = vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtq_s32_f32(n.v[i]), vdupq_n_s32(127)), 23));
  return n;
}
static inline vf v_zero_below(vf a, vf x, float bound) {
  QUARTERS a.v[i] = vbslq_f32(vcgeq_f32(x.v[i], vdupq_n_f32(bound)), a.v[i], vdupq_n_f32(0.0f));
  return a;
}
static inline vf v_window(vf a, float b, int lo, int hi) {
  static const int32_t first[4] = {0, 1, 2, 3};
  QUARTERS {
    int32x4_t lane = vaddq_s32(vld1q_s32(first), vdupq_n_s32(4 * i));
    uint32x4_t in = vandq_u32(vcgeq_s32(lane, vdupq_n_s32(lo)), vcltq_s32(lane, vdupq_n_s32(hi)));
    a.v[i] = vbslq_f32(in, a.v[i], vdupq_n_f32(b));
  }
  return a;
}
static inline float v_sum(vf a) {
  float32x4_t b = vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
  float32x2_t c = vadd_f32(vget_low_f32(b), vget_high_f32(b));
  return vget_lane_f32(c, 0) + vget_lane_f32(c, 1);
}
static inline float v_top(vf a) {
  float32x4_t b = larger(larger(a.v[0], a.v[2]), larger(a.v[1], a.v[3]));
  b = larger(b, vextq_f32(b, b, 2));
  return vgetq_lane_f32(larger(b, vextq_f32(b, b, 1)), 0);
}
static inline float v_magnitude(vf a, vf b) { /* as integers, NaN is above everything */
  int32x4_t m = vdupq_n_s32(0);
  QUARTERS m =
      vmaxq_s32(m, vmaxq_s32(vreinterpretq_s32_f32(vabsq_f32(a.v[i])), vreinterpretq_s32_f32(vabsq_f32(b.v[i]))));
  return vgetq_lane_f32(vreinterpretq_f32_s32(vdupq_n_s32(vmaxvq_s32(m))), 0);
}
static inline vf v_load_f16(const uint16_t *p) {
  vf r;
  QUARTERS r.v[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p + 4 * i)));
  return r;
}
static inline vf v_load_bf16(const uint16_t *p) {
  vf r;
  QUARTERS r.v[i] = vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p + 4 * i), 16));
  return r;
}
static inline vf v_load_u8(const uint8_t *p) {
  uint8x16_t b = vld1q_u8(p);
  uint16x8_t l = vmovl_u8(vget_low_u8(b)), h = vmovl_u8(vget_high_u8(b));
  vf r = {{vcvtq_f32_u32(vmovl_u16(vget_low_u16(l))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(l))),
           vcvtq_f32_u32(vmovl_u16(vget_low_u16(h))), vcvtq_f32_u32(vmovl_u16(vget_high_u16(h)))}};
  return r;
}
static inline vi load_i8(const int8_t *p) {
  int8x16_t b = vld1q_s8(p);
  int16x8_t l = vmovl_s8(vget_low_s8(b)), h = vmovl_s8(vget_high_s8(b));
  vi r = {{vmovl_s16(vget_low_s16(l)), vmovl_s16(vget_high_s16(l)), vmovl_s16(vget_low_s16(h)),
           vmovl_s16(vget_high_s16(h))}};
  return r;
}
static inline vf i_to_float(vi a) {
  vf r;
  QUARTERS r.v[i] = vcvtq_f32_s32(a.v[i]);
  return r;
}
static inline vf v_load_i8(const int8_t *p) { return i_to_float(load_i8(p)); }
static inline void v_store_f16(uint16_t *p, vf a) {
  QUARTERS vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
static inline vi v_to_int(vf a) {
  vi r;
  QUARTERS r.v[i] = vcvtnq_s32_f32(a.v[i]);
  return r;
}
static inline void i_store_i8(int8_t *p, vi a) {
  int16x8_t l = vcombine_s16(vqmovn_s32(a.v[0]), vqmovn_s32(a.v[1]));
  int16x8_t h = vcombine_s16(vqmovn_s32(a.v[2]), vqmovn_s32(a.v[3]));
  vst1q_s8(p, vcombine_s8(vqmovn_s16(l), vqmovn_s16(h)));
}
static inline void i_store_i16_0213(int16_t *p, vi a) {
  static const uint8_t order[16] = {0, 1, 4, 5, 2, 3, 6, 7, 8, 9, 12, 13, 10, 11, 14, 15};
  for (int i = 0; i < 4; i += 2) {
    int16x8_t both = vcombine_s16(vqmovn_s32(a.v[i]), vqmovn_s32(a.v[i + 1]));
    vst1q_s16(p + 4 * i, vreinterpretq_s16_u8(vqtbl1q_u8(vreinterpretq_u8_s16(both), vld1q_u8(order))));
  }
}
static inline vi i_times256(vi a) {
  QUARTERS a.v[i] = vshlq_n_s32(a.v[i], 8);
  return a;
}
static inline vi i_add(vi a, vi b) {
  QUARTERS a.v[i] = vaddq_s32(a.v[i], b.v[i]);
  return a;
}
static inline int32_t i_sum(vi a) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}
static inline void i_store_i8_sums(int8_t *p, vi a, vi b, int32_t *sum_a, int32_t *sum_b) {
  i_store_i8(p, a);
  i_store_i8(p + 16, b);
  *sum_a = i_sum(a);
  *sum_b = i_sum(b);
}

static inline vb b_load(const uint8_t *p) {
  vb r;
  QUARTERS r.v[i] = vld1q_u8(p + 16 * i);
  return r;
}
static inline vb b_low(vb a) {
  QUARTERS a.v[i] = vandq_u8(a.v[i], vdupq_n_u8(15));
  return a;
}
static inline vb b_high(vb a) {
  QUARTERS a.v[i] = vshrq_n_u8(a.v[i], 4);
  return a;
}
static inline vb b_fifth(vb a, const uint8_t *word) {
  /* each byte of the word to eight bytes, each of which looks at its own bit */
  static const uint8_t own[8] = {1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t bit = vcombine_u8(vld1_u8(own), vld1_u8(own)), sixteen = vdupq_n_u8(16);
  QUARTERS {
    uint8x16_t both = vcombine_u8(vdup_n_u8(word[2 * i]), vdup_n_u8(word[2 * i + 1]));
    a.v[i] = vorrq_u8(a.v[i], vandq_u8(vtstq_u8(both, bit), sixteen));
  }
  return a;
}
static inline vb b_sixth(vb a, vb top, int t) {
  const int8x16_t by = vdupq_n_s8((int8_t)(4 - 2 * t)); /* negative: to the right */
  QUARTERS a.v[i] = vorrq_u8(a.v[i], vandq_u8(vshlq_u8(top.v[i], by), vdupq_n_u8(0x30)));
  return a;
}

/* acc + w (four columns of four rows) . x (lane-th four of sixteen); weights up to 63 are the same signed or not */
#define SDOT(acc, w, x, lane) vdotq_laneq_s32(acc, vreinterpretq_s8_u8(w), x, lane)
static inline vi dot_half(vi a, const vb *w, const int8_t *x) {
  const int8x16_t y = vld1q_s8(x);
  QUARTERS {
    a.v[i] = SDOT(a.v[i], w[0].v[i], y, 0);
    a.v[i] = SDOT(a.v[i], w[1].v[i], y, 1);
    a.v[i] = SDOT(a.v[i], w[2].v[i], y, 2);
    a.v[i] = SDOT(a.v[i], w[3].v[i], y, 3);
  }
  return a;
}
static inline vi i_set(int32_t a) {
  vi r;
  QUARTERS r.v[i] = vdupq_n_s32(a);
  return r;
}
static inline vi dot_s8(const vb w[8], const int8_t *x) { return dot_half(dot_half(i_set(0), w, x), w + 4, x + 16); }
static inline vi dot_u4(const vb w[8], const int8_t *x) { return dot_s8(w, x); }
static inline vi dot_u5(const vb w[8], const int8_t *x) { return dot_s8(w, x); }
typedef struct {
  vi s[2];
} v6scale;
static inline v6scale scale6_load(const int8_t *p) {
  v6scale r = {{load_i8(p), load_i8(p + 16)}};
  return r;
}
static inline vi dot_u6(const vb w[8], const int8_t *x, v6scale s, const int16_t *half_sums) {
  /* start at -32 * sum(x): the offset costs nothing */
  vi a = dot_half(i_set(-32 * half_sums[0]), w, x), b = dot_half(i_set(-32 * half_sums[1]), w + 4, x + 16);
  QUARTERS a.v[i] = vmlaq_s32(vmulq_s32(a.v[i], s.s[0].v[i]), b.v[i], s.s[1].v[i]);
  return a;
}
/* int16 activations as two int8: x = 256*high + low, low from 0 to 255, as signed low - 128 with 128 * sum(w) to make
 * up for it. That is half the instructions that multiplying in 16 bits takes, and those have one pipe on many cores. */
#define PI2_STEPS 2
#define ALWAYS static inline __attribute__((always_inline))
typedef struct { /* sixteen columns */
  vb w[4];
  vi sum; /* 128 * the sum of each row's */
} vw;
typedef struct {
  int8x16_t low, high;
} vx;
ALWAYS void widen(const vb w[8], vw steps[2], int is_signed, int zero) {
  (void)is_signed; /* unsigned weights end at 63 */
  for (int s = 0; s < 2; s++) {
    vi sum = i_set(0);
    for (int g = 0; g < 4; g++) QUARTERS {
        uint8x16_t four = vsubq_u8(w[4 * s + g].v[i], vdupq_n_u8((uint8_t)zero));
        steps[s].w[g].v[i] = four;
        sum.v[i] = vdotq_s32(sum.v[i], vreinterpretq_s8_u8(four), vdupq_n_s8(1));
      }
    QUARTERS steps[s].sum.v[i] = vshlq_n_s32(sum.v[i], 7);
  }
}
ALWAYS vx x_load(const int16_t *x) {
  static const uint8_t order[16] = {0, 2, 1, 3, 4, 6, 5, 7, 8, 10, 9, 11, 12, 14, 13, 15};
  const uint8x16_t to = vld1q_u8(order), a = vld1q_u8((const uint8_t *)x), b = vld1q_u8((const uint8_t *)x + 16);
  vx r = {vreinterpretq_s8_u8(veorq_u8(vqtbl1q_u8(vuzp1q_u8(a, b), to), vdupq_n_u8(128))),
          vreinterpretq_s8_u8(vqtbl1q_u8(vuzp2q_u8(a, b), to))};
  return r;
}
ALWAYS vi i_zero(void) { return i_set(0); }
ALWAYS vi i_madd(vi a, vw s, vx x) {
  QUARTERS {
    int32x4_t high = vdupq_n_s32(0), low = vaddq_s32(a.v[i], s.sum.v[i]);
    high = SDOT(high, s.w[0].v[i], x.high, 0);
    low = SDOT(low, s.w[0].v[i], x.low, 0);
    high = SDOT(high, s.w[1].v[i], x.high, 1);
    low = SDOT(low, s.w[1].v[i], x.low, 1);
    high = SDOT(high, s.w[2].v[i], x.high, 2);
    low = SDOT(low, s.w[2].v[i], x.low, 2);
    high = SDOT(high, s.w[3].v[i], x.high, 3);
    low = SDOT(low, s.w[3].v[i], x.low, 3);
    a.v[i] = vaddq_s32(low, vshlq_n_s32(high, 8));
  }
  return a;
}
ALWAYS vi dot_wide(const vw *steps, const int16_t *x, int n) {
  vi r = i_zero();
  for (int p = 0; p < n; p++) r = i_madd(r, steps[p], x_load(x + 16 * p));
  return r;
}
/* A panel's groups with int8 activations: panel_template.h says what PI2_SHORT and the functions g_ are. */
typedef vi vg;
typedef int8x16_t vx8;
#define PI2_X_GROUPS 4
#define PI2_SHORT 0
#define PI2_BIAS 0
ALWAYS vb b_biased(vb w) { return w; }
ALWAYS vx8 x8_load(const int8_t *x) { return vld1q_s8(x); }
ALWAYS void g_madd(vg *a, vb w, vx8 x, int g) {
  QUARTERS switch (g % 4) { /* the lane must be a constant without optimisation, too */
  case 0: a->v[i] = SDOT(a->v[i], w.v[i], x, 0); break;
  case 1: a->v[i] = SDOT(a->v[i], w.v[i], x, 1); break;
  case 2: a->v[i] = SDOT(a->v[i], w.v[i], x, 2); break;
  default: a->v[i] = SDOT(a->v[i], w.v[i], x, 3);
  }
}
ALWAYS vg g_first(int32_t begin, vb w, vx8 x) {
  vg a = i_set(begin);
  g_madd(&a, w, x, 0);
  return a;
}
ALWAYS vi g_close(vg a) { return a; }
ALWAYS vi g_scale(vg a, const v6scale *s, int half) {
  QUARTERS a.v[i] = vmulq_s32(a.v[i], s->s[half].v[i]);
  return a;
}
#define PI2_PANEL 1
static inline uint64_t read_256(const uint8_t *p) {
  uint8x16_t a = vdupq_n_u8(0), b = a; /* two chains */
  for (int i = 0; i < 256; i += 32) {
    a = veorq_u8(a, vld1q_u8(p + i));
    b = veorq_u8(b, vld1q_u8(p + i + 16));
  }
  uint64x2_t c = vreinterpretq_u64_u8(veorq_u8(a, b));
  return vgetq_lane_u64(c, 0) ^ vgetq_lane_u64(c, 1);
}
/* Neurons one by one; simd_scalar.h says what these do. */
ALWAYS int32x4_t madd_add(int32x4_t sum, int16x8_t w, const int16_t *x) {
  const int16x8_t y = vld1q_s16(x);
  const int32x4_t low = vmull_s16(vget_low_s16(w), vget_low_s16(y)), high = vmull_high_s16(w, y);
  return vaddq_s32(sum, vpaddq_s32(low, high));
}
ALWAYS vi r_nibbles(const uint8_t *p, const int16_t *x) {
  vi sum = i_set(0);
  const uint16x8_t low = vdupq_n_u16(15);
  for (int i = 0; i < 4; i++, x += 128)
    for (int s = 0; s < 4; s++) {
      const uint16x8_t w = vreinterpretq_u16_u8(vld1q_u8(p + 64 * i + 16 * s));
      const int16_t *y = x + 8 * s;
      sum.v[s] = madd_add(sum.v[s], vreinterpretq_s16_u16(vandq_u16(w, low)), y);
      sum.v[s] = madd_add(sum.v[s], vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(w, 4), low)), y + 32);
      sum.v[s] = madd_add(sum.v[s], vreinterpretq_s16_u16(vandq_u16(vshrq_n_u16(w, 8), low)), y + 64);
      sum.v[s] = madd_add(sum.v[s], vreinterpretq_s16_u16(vshrq_n_u16(w, 12)), y + 96);
    }
  return sum;
}
ALWAYS vi r_bytes(const uint8_t *p, const int16_t *x) {
  vi sum = i_set(0);
  for (int i = 0; i < 8; i++, x += 64)
    for (int s = 0; s < 4; s++) {
      const int16x8_t w = vreinterpretq_s16_u8(vld1q_u8(p + 64 * i + 16 * s));
      sum.v[s] = madd_add(sum.v[s], vshrq_n_s16(vshlq_n_s16(w, 8), 8), x + 8 * s);
      sum.v[s] = madd_add(sum.v[s], vshrq_n_s16(w, 8), x + 8 * s + 32);
    }
  return sum;
}
/* 16-bit lanes: nibbles of the words' lower halves beside each other, then of the upper; vmlal widens by itself */
ALWAYS void c_nibbles(vi sum[8], const uint8_t *a, const uint8_t *b, int32_t xa, int32_t xb) {
  const uint16x4_t low = vdup_n_u16(15);
  for (int s = 0; s < 4; s++) {
    const uint32x4_t v = vreinterpretq_u32_u8(vld1q_u8(a + 16 * s)), w = vreinterpretq_u32_u8(vld1q_u8(b + 16 * s));
    const uint16x4_t vs[2] = {vmovn_u32(v), vshrn_n_u32(v, 16)}, ws[2] = {vmovn_u32(w), vshrn_n_u32(w, 16)};
    for (int h = 0; h < 2; h++) {
      const uint16x4_t f[4] = {vand_u16(vs[h], low), vand_u16(vshr_n_u16(vs[h], 4), low),
                               vand_u16(vshr_n_u16(vs[h], 8), low), vshr_n_u16(vs[h], 12)};
      const uint16x4_t g[4] = {vand_u16(ws[h], low), vand_u16(vshr_n_u16(ws[h], 4), low),
                               vand_u16(vshr_n_u16(ws[h], 8), low), vshr_n_u16(ws[h], 12)};
      for (int n = 0; n < 4; n++) {
        int32x4_t t = vmlal_n_s16(sum[4 * h + n].v[s], vreinterpret_s16_u16(f[n]), (int16_t)xa);
        sum[4 * h + n].v[s] = vmlal_n_s16(t, vreinterpret_s16_u16(g[n]), (int16_t)xb);
      }
    }
  }
}
ALWAYS void c_close(vi sum[8]) { (void)sum; }
ALWAYS void c_bytes(vi sum[4], const uint8_t *a, const uint8_t *b, int32_t xa, int32_t xb) {
  for (int s = 0; s < 4; s++) {
    const int32x4_t v = vreinterpretq_s32_u8(vld1q_u8(a + 16 * s)), w = vreinterpretq_s32_u8(vld1q_u8(b + 16 * s));
    const int32x4_t f[4] = {vshrq_n_s32(vshlq_n_s32(v, 24), 24), vshrq_n_s32(vshlq_n_s32(v, 16), 24),
                            vshrq_n_s32(vshlq_n_s32(v, 8), 24), vshrq_n_s32(v, 24)};
    const int32x4_t g[4] = {vshrq_n_s32(vshlq_n_s32(w, 24), 24), vshrq_n_s32(vshlq_n_s32(w, 16), 24),
                            vshrq_n_s32(vshlq_n_s32(w, 8), 24), vshrq_n_s32(w, 24)};
    for (int n = 0; n < 4; n++) sum[n].v[s] = vmlaq_n_s32(vmlaq_n_s32(sum[n].v[s], f[n], xa), g[n], xb);
  }
}
ALWAYS void v_transpose(vf m[16]) {
  vf t[16];
  for (int r = 0; r < 4; r++)
    for (int c = 0; c < 4; c++) { /* the 4 x 4 block of rows 4r.., columns 4c.. goes to rows 4c.., columns 4r.. */
      const float32x4_t a = m[4 * r].v[c], b = m[4 * r + 1].v[c], d = m[4 * r + 2].v[c], e = m[4 * r + 3].v[c];
      const float64x2_t ab0 = vreinterpretq_f64_f32(vtrn1q_f32(a, b)), ab1 = vreinterpretq_f64_f32(vtrn2q_f32(a, b));
      const float64x2_t de0 = vreinterpretq_f64_f32(vtrn1q_f32(d, e)), de1 = vreinterpretq_f64_f32(vtrn2q_f32(d, e));
      t[4 * c].v[r] = vreinterpretq_f32_f64(vtrn1q_f64(ab0, de0));
      t[4 * c + 1].v[r] = vreinterpretq_f32_f64(vtrn1q_f64(ab1, de1));
      t[4 * c + 2].v[r] = vreinterpretq_f32_f64(vtrn2q_f64(ab0, de0));
      t[4 * c + 3].v[r] = vreinterpretq_f32_f64(vtrn2q_f64(ab1, de1));
    }
  for (int i = 0; i < 16; i++) m[i] = t[i];
}
#define PI2_TILE 4
