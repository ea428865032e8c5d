/* Sixteen lanes as four NEON registers (Armv8.2 with the dot product extension). */
#include <arm_neon.h>
#include <stdint.h>

typedef struct { float32x4_t v[4]; } vf;
typedef struct { int32x4_t v[4]; } vi;
typedef struct { uint8x16_t v[4]; } vb; /* rows 4i..4i+3, four columns each */

#define QUARTERS for (int i = 0; i < 4; i++)

static inline vf v_set(float a) { vf r; QUARTERS r.v[i] = vdupq_n_f32(a); return r; }
static inline vf v_zero(void) { return v_set(0.0f); }
static inline vf v_load(const float *p) { vf r; QUARTERS r.v[i] = vld1q_f32(p + 4 * i); return r; }
static inline void v_store(float *p, vf a) { QUARTERS vst1q_f32(p + 4 * i, a.v[i]); }
static inline vf v_add(vf a, vf b) { QUARTERS a.v[i] = vaddq_f32(a.v[i], b.v[i]); return a; }
static inline vf v_sub(vf a, vf b) { QUARTERS a.v[i] = vsubq_f32(a.v[i], b.v[i]); return a; }
static inline vf v_mul(vf a, vf b) { QUARTERS a.v[i] = vmulq_f32(a.v[i], b.v[i]); return a; }
static inline vf v_div(vf a, vf b) { QUARTERS a.v[i] = vdivq_f32(a.v[i], b.v[i]); return a; }
static inline vf v_fma(vf a, vf b, vf c) { QUARTERS c.v[i] = vfmaq_f32(c.v[i], a.v[i], b.v[i]); return c; }
/* not vmaxq: it returns NaN where either is, and orders the zeros */
static inline float32x4_t larger(float32x4_t a, float32x4_t b) { return vbslq_f32(vcgtq_f32(a, b), a, b); }
static inline vf v_max(vf a, vf b) { QUARTERS a.v[i] = larger(a.v[i], b.v[i]); return a; }
static inline vf v_abs(vf a) { QUARTERS a.v[i] = vabsq_f32(a.v[i]); return a; }
static inline vf v_rint(vf a) { QUARTERS a.v[i] = vrndnq_f32(a.v[i]); return a; }
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
static inline vf i_to_float(vi a) { vf r; QUARTERS r.v[i] = vcvtq_f32_s32(a.v[i]); return r; }
static inline vf v_load_i8(const int8_t *p) { return i_to_float(load_i8(p)); }
static inline void v_store_f16(uint16_t *p, vf a) {
  QUARTERS vst1_u16(p + 4 * i, vreinterpret_u16_f16(vcvt_f16_f32(a.v[i])));
}
static inline vi v_to_int(vf a) { vi r; QUARTERS r.v[i] = vcvtnq_s32_f32(a.v[i]); return r; }
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
static inline int32_t i_sum(vi a) {
  return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}

static inline vb b_load(const uint8_t *p) { vb r; QUARTERS r.v[i] = vld1q_u8(p + 16 * i); return r; }
static inline vb b_low(vb a) { QUARTERS a.v[i] = vandq_u8(a.v[i], vdupq_n_u8(15)); return a; }
static inline vb b_high(vb a) { QUARTERS a.v[i] = vshrq_n_u8(a.v[i], 4); return a; }
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
static inline vi i_set(int32_t a) { vi r; QUARTERS r.v[i] = vdupq_n_s32(a); return r; }
static inline vi dot_s8(const vb w[8], const int8_t *x) { return dot_half(dot_half(i_set(0), w, x), w + 4, x + 16); }
static inline vi dot_u4(const vb w[8], const int8_t *x) { return dot_s8(w, x); }
static inline vi dot_u5(const vb w[8], const int8_t *x) { return dot_s8(w, x); }
typedef struct { vi s[2]; } v6scale;
static inline v6scale scale6_load(const int8_t *p) { v6scale r = {{load_i8(p), load_i8(p + 16)}}; return r; }
static inline vi dot_u6(const vb w[8], const int8_t *x, v6scale s, const int16_t *half_sums) {
  /* start at -32 * sum(x): the offset costs nothing */
  vi a = dot_half(i_set(-32 * half_sums[0]), w, x), b = dot_half(i_set(-32 * half_sums[1]), w + 4, x + 16);
  QUARTERS a.v[i] = vmlaq_s32(vmulq_s32(a.v[i], s.s[0].v[i]), b.v[i], s.s[1].v[i]);
  return a;
}
/* Columns of a group apart, each 16 rows of int16: there is no multiply that adds pairs of 16 bits. */
typedef struct { int16x8_t column[2][2]; } vw; /* [first or second of the pair][rows 0-7, 8-15] */
static inline int16x8_t widen_8(uint8x8_t w, int is_signed, int zero) {
  int16x8_t r = is_signed ? vmovl_s8(vreinterpret_s8_u8(w)) : vreinterpretq_s16_u16(vmovl_u8(w));
  return zero ? vsubq_s16(r, vdupq_n_s16((int16_t)zero)) : r;
}
static inline void widen(const vb w[8], vw pairs[16], int is_signed, int zero) {
  for (int g = 0; g < 8; g++) {
    for (int half = 0; half < 2; half++) { /* rows 8*half to 8*half+7 */
      uint8x16_t a = w[g].v[2 * half], b = w[g].v[2 * half + 1];
      uint8x16_t even = vuzp1q_u8(a, b), odd = vuzp2q_u8(a, b); /* columns 0 2 0 2 ..., 1 3 1 3 ... */
      uint8x16_t c02 = vcombine_u8(vget_low_u8(vuzp1q_u8(even, even)), vget_low_u8(vuzp2q_u8(even, even)));
      uint8x16_t c13 = vcombine_u8(vget_low_u8(vuzp1q_u8(odd, odd)), vget_low_u8(vuzp2q_u8(odd, odd)));
      pairs[2 * g].column[0][half] = widen_8(vget_low_u8(c02), is_signed, zero);
      pairs[2 * g].column[1][half] = widen_8(vget_high_u8(c02), is_signed, zero);
      pairs[2 * g + 1].column[0][half] = widen_8(vget_low_u8(c13), is_signed, zero);
      pairs[2 * g + 1].column[1][half] = widen_8(vget_high_u8(c13), is_signed, zero);
    }
  }
}
static inline vi dot_wide(const vw *pairs, const int16_t *x, int n) {
  vi r;
  QUARTERS r.v[i] = vdupq_n_s32(0);
  for (int p = 0; p < n; p++)
    for (int c = 0; c < 2; c++)
      for (int half = 0; half < 2; half++) {
        int16x8_t w = pairs[p].column[c][half];
        r.v[2 * half] = vmlal_n_s16(r.v[2 * half], vget_low_s16(w), x[2 * p + c]);
        r.v[2 * half + 1] = vmlal_n_s16(r.v[2 * half + 1], vget_high_s16(w), x[2 * p + c]);
      }
  return r;
}
typedef int16x4_t vx;
static inline vx x_load(const int16_t *x) { int16x4_t r = vdup_n_s16(x[0]); return vset_lane_s16(x[1], r, 1); }
static inline vi i_zero(void) { return i_set(0); }
static inline vi i_madd(vi a, vw w, vx x) {
  for (int half = 0; half < 2; half++) {
    a.v[2 * half] = vmlal_lane_s16(a.v[2 * half], vget_low_s16(w.column[0][half]), x, 0);
    a.v[2 * half] = vmlal_lane_s16(a.v[2 * half], vget_low_s16(w.column[1][half]), x, 1);
    a.v[2 * half + 1] = vmlal_lane_s16(a.v[2 * half + 1], vget_high_s16(w.column[0][half]), x, 0);
    a.v[2 * half + 1] = vmlal_lane_s16(a.v[2 * half + 1], vget_high_s16(w.column[1][half]), x, 1);
  }
  return a;
}
#define PI2_PANEL 1
static inline void v_prefetch(const uint8_t *p) { __builtin_prefetch(p); }
static inline uint64_t read_256(const uint8_t *p) {
  uint8x16_t a = vdupq_n_u8(0), b = a; /* two chains */
  for (int i = 0; i < 256; i += 32) {
    a = veorq_u8(a, vld1q_u8(p + i));
    b = veorq_u8(b, vld1q_u8(p + i + 16));
  }
  uint64x2_t c = vreinterpretq_u64_u8(veorq_u8(a, b));
  return vgetq_lane_u64(c, 0) ^ vgetq_lane_u64(c, 1);
}
#define PI2_TILE 4
