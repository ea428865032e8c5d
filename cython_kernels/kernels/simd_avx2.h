/* Sixteen lanes as two AVX2 registers (with FMA and F16C): lanes 0-7 and 8-15.
 *
 * Dot products go through vpmaddubsw, whose 16-bit sums never saturate here; simd_avx512.h has the bounds. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef struct {
  __m256 l, h;
} vf;
typedef struct {
  __m256i l, h;
} vi;
typedef struct {
  __m256i l, h;
} vb;

static inline vf two(__m256 l, __m256 h) {
  vf r = {l, h};
  return r;
}
static inline vi two_i(__m256i l, __m256i h) {
  vi r = {l, h};
  return r;
}
static inline vb two_b(__m256i l, __m256i h) {
  vb r = {l, h};
  return r;
}

static inline vf v_set(float a) { return two(_mm256_set1_ps(a), _mm256_set1_ps(a)); }
static inline vf v_zero(void) { return v_set(0.0f); }
static inline vf v_load(const float *p) { return two(_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)); }
static inline void v_store(float *p, vf a) {
  _mm256_storeu_ps(p, a.l);
  _mm256_storeu_ps(p + 8, a.h);
}
static inline vf v_add(vf a, vf b) { return two(_mm256_add_ps(a.l, b.l), _mm256_add_ps(a.h, b.h)); }
static inline vf v_sub(vf a, vf b) { return two(_mm256_sub_ps(a.l, b.l), _mm256_sub_ps(a.h, b.h)); }
static inline vf v_mul(vf a, vf b) { return two(_mm256_mul_ps(a.l, b.l), _mm256_mul_ps(a.h, b.h)); }
static inline vf v_div(vf a, vf b) { return two(_mm256_div_ps(a.l, b.l), _mm256_div_ps(a.h, b.h)); }
static inline vf v_fma(vf a, vf b, vf c) { return two(_mm256_fmadd_ps(a.l, b.l, c.l), _mm256_fmadd_ps(a.h, b.h, c.h)); }
static inline vf v_max(vf a, vf b) { return two(_mm256_max_ps(a.l, b.l), _mm256_max_ps(a.h, b.h)); }
static inline vf v_abs(vf a) {
  const __m256 sign = _mm256_set1_ps(-0.0f);
  return two(_mm256_andnot_ps(sign, a.l), _mm256_andnot_ps(sign, a.h));
}
#define NEAREST (_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)
static inline vf v_rint(vf a) { return two(_mm256_round_ps(a.l, NEAREST), _mm256_round_ps(a.h, NEAREST)); }
static inline __m256 pow2_of(__m256 n) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
}
static inline vf v_pow2(vf n) { return two(pow2_of(n.l), pow2_of(n.h)); }
static inline vf v_zero_below(vf a, vf x, float bound) {
  const __m256 b = _mm256_set1_ps(bound);
  return two(_mm256_and_ps(a.l, _mm256_cmp_ps(x.l, b, _CMP_GE_OQ)),
             _mm256_and_ps(a.h, _mm256_cmp_ps(x.h, b, _CMP_GE_OQ)));
}
static inline vf v_window(vf a, float b, int lo, int hi) {
  const __m256i l = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7), h = _mm256_add_epi32(l, _mm256_set1_epi32(8));
  const __m256i from = _mm256_set1_epi32(lo), to = _mm256_set1_epi32(hi);
  const __m256i in_l = _mm256_andnot_si256(_mm256_cmpgt_epi32(from, l), _mm256_cmpgt_epi32(to, l));
  const __m256i in_h = _mm256_andnot_si256(_mm256_cmpgt_epi32(from, h), _mm256_cmpgt_epi32(to, h));
  const __m256 other = _mm256_set1_ps(b);
  return two(_mm256_blendv_ps(other, a.l, _mm256_castsi256_ps(in_l)),
             _mm256_blendv_ps(other, a.h, _mm256_castsi256_ps(in_h)));
}
static inline float v_sum(vf a) {
  __m256 b = _mm256_add_ps(a.l, a.h);
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
static inline float v_top(vf a) {
  __m256 b = _mm256_max_ps(a.l, a.h);
  __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}
static inline float v_magnitude(vf a, vf b) { /* as integers, NaN is above everything */
  const __m256i bits = _mm256_set1_epi32(0x7fffffff);
  __m256i l = _mm256_max_epi32(_mm256_and_si256(_mm256_castps_si256(a.l), bits),
                               _mm256_and_si256(_mm256_castps_si256(b.l), bits));
  __m256i h = _mm256_max_epi32(_mm256_and_si256(_mm256_castps_si256(a.h), bits),
                               _mm256_and_si256(_mm256_castps_si256(b.h), bits));
  l = _mm256_max_epi32(l, h);
  __m128i c = _mm_max_epi32(_mm256_castsi256_si128(l), _mm256_extracti128_si256(l, 1));
  c = _mm_max_epi32(c, _mm_unpackhi_epi64(c, c));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(c, _mm_shuffle_epi32(c, 1))));
}
static inline __m128i load_128(const void *p) { return _mm_loadu_si128((const __m128i *)p); }
static inline __m128i load_64(const void *p) { return _mm_loadl_epi64((const __m128i *)p); }
static inline vf v_load_f16(const uint16_t *p) {
  return two(_mm256_cvtph_ps(load_128(p)), _mm256_cvtph_ps(load_128(p + 8)));
}
static inline __m256 from_bf16(const uint16_t *p) {
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load_128(p)), 16));
}
static inline vf v_load_bf16(const uint16_t *p) { return two(from_bf16(p), from_bf16(p + 8)); }
static inline vf v_load_u8(const uint8_t *p) {
  return two(_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load_64(p))),
             _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load_64(p + 8))));
}
static inline vf v_load_i8(const int8_t *p) {
  return two(_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_64(p))),
             _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load_64(p + 8))));
}
static inline void v_store_f16(uint16_t *p, vf a) {
  _mm_storeu_si128((__m128i *)p, _mm256_cvtps_ph(a.l, NEAREST));
  _mm_storeu_si128((__m128i *)(p + 8), _mm256_cvtps_ph(a.h, NEAREST));
}
static inline vi v_to_int(vf a) { return two_i(_mm256_cvtps_epi32(a.l), _mm256_cvtps_epi32(a.h)); }
static inline void i_store_i8(int8_t *p, vi a) {
  __m128i l = _mm_packs_epi32(_mm256_castsi256_si128(a.l), _mm256_extracti128_si256(a.l, 1));
  __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(a.h), _mm256_extracti128_si256(a.h, 1));
  _mm_storeu_si128((__m128i *)p, _mm_packs_epi16(l, h));
}
static inline void i_store_i16_0213(int16_t *p, vi a) {
  __m256i both = _mm256_packs_epi32(_mm256_shuffle_epi32(a.l, 0xd8), _mm256_shuffle_epi32(a.h, 0xd8));
  _mm256_storeu_si256((__m256i *)p, _mm256_permute4x64_epi64(both, 0xd8)); /* packs works in halves */
}
static inline vi i_times256(vi a) { return (vi){_mm256_slli_epi32(a.l, 8), _mm256_slli_epi32(a.h, 8)}; }
static inline vi i_add(vi a, vi b) { return (vi){_mm256_add_epi32(a.l, b.l), _mm256_add_epi32(a.h, b.h)}; }
static inline int32_t i_sum(vi a) {
  __m256i b = _mm256_add_epi32(a.l, a.h);
  __m128i c = _mm_add_epi32(_mm256_castsi256_si128(b), _mm256_extracti128_si256(b, 1));
  c = _mm_add_epi32(c, _mm_shuffle_epi32(c, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(c, _mm_shuffle_epi32(c, 0xb1)));
}
static inline void i_store_i8_sums(int8_t *p, vi a, vi b, int32_t *sum_a, int32_t *sum_b) {
  i_store_i8(p, a);
  i_store_i8(p + 16, b);
  *sum_a = i_sum(a);
  *sum_b = i_sum(b);
}
static inline vf i_to_float(vi a) { return two(_mm256_cvtepi32_ps(a.l), _mm256_cvtepi32_ps(a.h)); }

static inline vb b_load(const uint8_t *p) {
  return two_b(_mm256_load_si256((const __m256i *)p), _mm256_load_si256((const __m256i *)(p + 32)));
}
static inline vb b_low(vb a) {
  const __m256i m = _mm256_set1_epi8(15);
  return two_b(_mm256_and_si256(a.l, m), _mm256_and_si256(a.h, m));
}
static inline vb b_high(vb a) { return b_low(two_b(_mm256_srli_epi16(a.l, 4), _mm256_srli_epi16(a.h, 4))); }
static inline vb b_fifth(vb a, const uint8_t *word) {
  /* each byte of the word to eight bytes, each of which looks at its own bit */
  const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i bit = _mm256_set1_epi64x((int64_t)0x8040201008040201), sixteen = _mm256_set1_epi8(16);
  int32_t l, h;
  memcpy(&l, word, 4);
  memcpy(&h, word + 4, 4);
  __m256i in_l = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(l), spread), bit);
  __m256i in_h = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(h), spread), bit);
  return two_b(_mm256_or_si256(a.l, _mm256_and_si256(_mm256_cmpeq_epi8(in_l, bit), sixteen)),
               _mm256_or_si256(a.h, _mm256_and_si256(_mm256_cmpeq_epi8(in_h, bit), sixteen)));
}
static inline __m256i sixth_of(__m256i a, __m256i top, int t) {
  __m256i bits = t < 2 ? _mm256_slli_epi16(top, 4 - 2 * t) : _mm256_srli_epi16(top, 2 * t - 4);
  return _mm256_or_si256(a, _mm256_and_si256(bits, _mm256_set1_epi8(0x30)));
}
static inline vb b_sixth(vb a, vb top, int t) { return two_b(sixth_of(a.l, top.l, t), sixth_of(a.h, top.h, t)); }

static inline __m256i broadcast4(const int8_t *x) {
  int32_t four;
  memcpy(&four, x, 4);
  return _mm256_set1_epi32(four);
}
static inline __m256i pairs(__m256i a) { return _mm256_madd_epi16(a, _mm256_set1_epi16(1)); }
static inline vi add_16(vi a, vi b) { return two_i(_mm256_add_epi16(a.l, b.l), _mm256_add_epi16(a.h, b.h)); }
static inline vi product(vb w, const int8_t *x) { /* 16-bit: columns 0, 1 and 2, 3 of each row */
  __m256i y = broadcast4(x);
  return two_i(_mm256_maddubs_epi16(w.l, y), _mm256_maddubs_epi16(w.h, y));
}
static inline vi products4(const vb *w, const int8_t *x) {
  return add_16(add_16(product(w[0], x), product(w[1], x + 4)), add_16(product(w[2], x + 8), product(w[3], x + 12)));
}
static inline vi dot_u4(const vb w[8], const int8_t *x) {
  vi a = add_16(products4(w, x), products4(w + 4, x + 16));
  return two_i(pairs(a.l), pairs(a.h));
}
static inline vi dot_u5(const vb w[8], const int8_t *x) {
  vi a = products4(w, x), b = products4(w + 4, x + 16);
  return two_i(_mm256_add_epi32(pairs(a.l), pairs(b.l)), _mm256_add_epi32(pairs(a.h), pairs(b.h)));
}
typedef struct {
  vi s[2];
} v6scale;
static inline __m256i scale_twice(const int8_t *p) { /* each scale twice, as 16-bit factors of vpmaddwd */
  __m256i wide = _mm256_and_si256(_mm256_cvtepi8_epi32(load_64(p)), _mm256_set1_epi32(0xffff));
  return _mm256_or_si256(wide, _mm256_slli_epi32(wide, 16));
}
static inline v6scale scale6_load(const int8_t *p) {
  v6scale r = {{two_i(scale_twice(p), scale_twice(p + 8)), two_i(scale_twice(p + 16), scale_twice(p + 24))}};
  return r;
}
static inline vi dot_u6(const vb w[8], const int8_t *x, v6scale s, const int16_t *half_sums) {
  /* -32 * (s0*sum0 + s1*sum1) first: interleave the two scales, one vpmaddwd */
  __m256i sums =
      _mm256_set1_epi32((int32_t)((uint32_t)(uint16_t)half_sums[0] | (uint32_t)(uint16_t)half_sums[1] << 16));
  __m256i l = _mm256_slli_epi32(_mm256_madd_epi16(_mm256_blend_epi16(s.s[0].l, s.s[1].l, 0xaa), sums), 5);
  __m256i h = _mm256_slli_epi32(_mm256_madd_epi16(_mm256_blend_epi16(s.s[0].h, s.s[1].h, 0xaa), sums), 5);
  vi total = two_i(_mm256_sub_epi32(_mm256_setzero_si256(), l), _mm256_sub_epi32(_mm256_setzero_si256(), h));
  for (int i = 0; i < 8; i += 2) {
    vi a = add_16(product(w[i], x + 4 * i), product(w[i + 1], x + 4 * i + 4)), f = s.s[i / 4];
    total.l = _mm256_add_epi32(total.l, _mm256_madd_epi16(a.l, f.l));
    total.h = _mm256_add_epi32(total.h, _mm256_madd_epi16(a.h, f.h));
  }
  return total;
}
/* |w| x (x with w's sign), so that the unsigned operand stays unsigned */
static inline __m256i signed_product(__m256i w, __m256i x) {
  return pairs(_mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(x, w)));
}
static inline vi dot_s8(const vb w[8], const int8_t *x) {
  vi total = two_i(_mm256_setzero_si256(), _mm256_setzero_si256());
  for (int g = 0; g < 8; g++) {
    __m256i y = broadcast4(x + 4 * g);
    total.l = _mm256_add_epi32(total.l, signed_product(w[g].l, y));
    total.h = _mm256_add_epi32(total.h, signed_product(w[g].h, y));
  }
  return total;
}
typedef vb vw;
static inline void widen_half(__m256i w, __m256i *even, __m256i *odd, int is_signed, int zero) {
  if (is_signed) {
    *even = _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8);
    *odd = _mm256_srai_epi16(w, 8);
  } else {
    *even = _mm256_and_si256(w, _mm256_set1_epi16(0xff));
    *odd = _mm256_srli_epi16(w, 8);
  }
  if (zero) {
    *even = _mm256_sub_epi16(*even, _mm256_set1_epi16((short)zero));
    *odd = _mm256_sub_epi16(*odd, _mm256_set1_epi16((short)zero));
  }
}
static inline void widen(const vb w[8], vw wide[16], int is_signed, int zero) {
  for (int g = 0; g < 8; g++) {
    widen_half(w[g].l, &wide[2 * g].l, &wide[2 * g + 1].l, is_signed, zero);
    widen_half(w[g].h, &wide[2 * g].h, &wide[2 * g + 1].h, is_signed, zero);
  }
}
static inline vi dot_wide(const vw *wide, const int16_t *x, int n) {
  vi total = two_i(_mm256_setzero_si256(), _mm256_setzero_si256());
  for (int p = 0; p < n; p++) {
    __m256i y = broadcast4((const int8_t *)(x + 2 * p));
    total.l = _mm256_add_epi32(total.l, _mm256_madd_epi16(wide[p].l, y));
    total.h = _mm256_add_epi32(total.h, _mm256_madd_epi16(wide[p].h, y));
  }
  return total;
}
/* As in simd_avx512.h: four masks of the 16-bit lanes; products 16 and 256 times too large have sums of their own. */
#define PI2_DOT_NIBBLES 1
static inline __m256i dot_nibbles_half(const uint8_t *p, const int16_t *x) {
  __m256i sum = _mm256_setzero_si256(), sum16 = sum, sum256 = sum;
  for (int g = 0; g < 4; g++) {
    const __m256i w = _mm256_load_si256((const __m256i *)(p + 64 * g));
    const __m256i a = _mm256_and_si256(w, _mm256_set1_epi16(0x000f)),
                  b = _mm256_and_si256(w, _mm256_set1_epi16(0x00f0));
    const __m256i c = _mm256_and_si256(w, _mm256_set1_epi16(0x0f00)), d = _mm256_srli_epi16(w, 12);
    const int8_t *y = (const int8_t *)(x + 4 * g);
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(a, broadcast4(y)));
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16(d, broadcast4(y + 36)));
    sum16 = _mm256_add_epi32(sum16, _mm256_madd_epi16(b, broadcast4(y + 32)));
    sum256 = _mm256_add_epi32(sum256, _mm256_madd_epi16(c, broadcast4(y + 4)));
  }
  sum = _mm256_add_epi32(sum, _mm256_srai_epi32(sum16, 4));
  return _mm256_add_epi32(sum, _mm256_srai_epi32(sum256, 8));
}
static inline vi dot_nibbles(const uint8_t *p, const int16_t *x) {
  return two_i(dot_nibbles_half(p, x), dot_nibbles_half(p + 32, x));
}
typedef __m256i vx;
static inline vx x_load(const int16_t *x) { return broadcast4((const int8_t *)x); }
static inline vi i_zero(void) { return two_i(_mm256_setzero_si256(), _mm256_setzero_si256()); }
static inline vi i_madd(vi a, vw w, vx x) {
  vi product = two_i(_mm256_madd_epi16(w.l, x), _mm256_madd_epi16(w.h, x));
  __asm__("vpaddd %1, %0, %0"
          : "+x"(a.l)
          : "x"(product.l)); /* at once: gcc keeps the products of many steps, in memory */
  __asm__("vpaddd %1, %0, %0" : "+x"(a.h) : "x"(product.h));
  return a;
}
/* A panel's groups with int8 activations, as in simd_avx512.h. */
typedef vi vg;
typedef __m256i vx8;
#define PI2_X_GROUPS 1
#define PI2_SHORT 1
#define PI2_BIAS 0
static inline vb b_biased(vb w) { return w; }
static inline vx8 x8_load(const int8_t *x) { return broadcast4(x); }
static inline vg g_first(int32_t begin, vb w, vx8 x) {
  (void)begin;
  return two_i(_mm256_maddubs_epi16(w.l, x), _mm256_maddubs_epi16(w.h, x));
}
static inline void g_madd(vg *a, vb w, vx8 x, int g) {
  (void)g;
  vg product = g_first(0, w, x);
  __asm__("vpaddw %1, %0, %0" : "+x"(a->l) : "x"(product.l)); /* at once, as in i_madd */
  __asm__("vpaddw %1, %0, %0" : "+x"(a->h) : "x"(product.h));
}
static inline vi g_close(vg a) { return two_i(pairs(a.l), pairs(a.h)); }
static inline vi g_scale(vg a, const v6scale *s, int half) {
  return two_i(_mm256_madd_epi16(a.l, s->s[half].l), _mm256_madd_epi16(a.h, s->s[half].h));
}
static inline __m256i offsets_half(__m256i a, __m256i b) {
  __m256i both = _mm256_blend_epi16(a, b, 0xaa);
  return _mm256_sub_epi16(_mm256_setzero_si256(), _mm256_add_epi16(both, both));
}
static inline vg g_offsets(v6scale s) {
  return two_i(offsets_half(s.s[0].l, s.s[1].l), offsets_half(s.s[0].h, s.s[1].h));
}
static inline vx8 g_sums(const int16_t *half_sums) {
  return _mm256_slli_epi16(broadcast4((const int8_t *)half_sums), 4);
}
static inline vi g_offset(vg offsets, vx8 sums) {
  return two_i(_mm256_madd_epi16(offsets.l, sums), _mm256_madd_epi16(offsets.h, sums));
}
static inline void x_widen(const int8_t *x, int16_t *y) {
  for (int i = 0; i < 32; i += 16) {
    __m256i wide = _mm256_cvtepi8_epi16(load_128(x + i));
    _mm256_store_si256((__m256i *)(y + i), _mm256_shufflehi_epi16(_mm256_shufflelo_epi16(wide, 0xd8), 0xd8));
  }
}
#define PI2_PANEL 1 /* 8 sums, 4 activations, 2 weights: 14 of 16 registers */
static inline uint64_t read_256(const uint8_t *p) {
  const __m256i *q = (const __m256i *)p;
  __m256i a = _mm256_setzero_si256();
  for (int i = 0; i < 8; i++) a = _mm256_xor_si256(a, _mm256_load_si256(q + i));
  __m128i b = _mm_xor_si128(_mm256_castsi256_si128(a), _mm256_extracti128_si256(a, 1));
  return (uint64_t)_mm_cvtsi128_si64(b) ^ (uint64_t)_mm_extract_epi64(b, 1);
}
/* Neurons one by one; simd_scalar.h says what these do, simd_avx512.h how far the sums can grow. */
static inline __m256i madd_add(__m256i sum, __m256i w, const int16_t *x) {
  return _mm256_add_epi32(sum, _mm256_madd_epi16(w, _mm256_load_si256((const __m256i *)x)));
}
static inline __m256i r_nibbles_half(const uint8_t *p, const int16_t *x) {
  __m256i sum = _mm256_setzero_si256(), sum16 = sum, sum256 = sum;
  for (int i = 0; i < 4; i++, x += 128) {
    const __m256i w = _mm256_load_si256((const __m256i *)(p + 64 * i));
    sum = madd_add(sum, _mm256_and_si256(w, _mm256_set1_epi16(0x000f)), x);
    sum16 = madd_add(sum16, _mm256_and_si256(w, _mm256_set1_epi16(0x00f0)), x + 32);
    sum256 = madd_add(sum256, _mm256_and_si256(w, _mm256_set1_epi16(0x0f00)), x + 64);
    sum = madd_add(sum, _mm256_srli_epi16(w, 12), x + 96);
  }
  sum = _mm256_add_epi32(sum, _mm256_srai_epi32(sum16, 4));
  return _mm256_add_epi32(sum, _mm256_srai_epi32(sum256, 8));
}
static inline vi r_nibbles(const uint8_t *p, const int16_t *x) {
  return two_i(r_nibbles_half(p, x), r_nibbles_half(p + 32, x + 16));
}
static inline __m256i r_bytes_half(const uint8_t *p, const int16_t *x) {
  __m256i even = _mm256_setzero_si256(), odd = even;
  for (int i = 0; i < 8; i++, x += 64) {
    const __m256i w = _mm256_load_si256((const __m256i *)(p + 64 * i));
    even = madd_add(even, _mm256_srai_epi16(_mm256_slli_epi16(w, 8), 8), x);
    odd = madd_add(odd, _mm256_srai_epi16(w, 8), x + 32);
  }
  return _mm256_add_epi32(even, odd);
}
static inline vi r_bytes(const uint8_t *p, const int16_t *x) {
  return two_i(r_bytes_half(p, x), r_bytes_half(p + 32, x + 16));
}
static inline void c_add(__m256i *sum, __m256i w, __m256i x) { *sum = _mm256_add_epi32(*sum, _mm256_madd_epi16(w, x)); }
/* The lower (or upper) halves of both words in one: what belongs to one neuron beside what belongs to the other. */
static inline void c_halves(const uint8_t *a, const uint8_t *b, __m256i out[2]) {
  const __m256i v = _mm256_load_si256((const __m256i *)a), w = _mm256_load_si256((const __m256i *)b);
  out[0] = _mm256_blend_epi16(v, _mm256_slli_epi32(w, 16), 0xaa);
  out[1] = _mm256_blend_epi16(_mm256_srli_epi32(v, 16), w, 0xaa);
}
static inline __m256i two_factors(int32_t a, int32_t b) {
  return _mm256_set1_epi32((a & 0xffff) | (int32_t)((uint32_t)b << 16));
}
static inline void c_nibbles(vi sum[8], const uint8_t *a, const uint8_t *b, int32_t xa, int32_t xb) {
  const __m256i x = two_factors(xa, xb), one = _mm256_set1_epi16(0x000f), sixteen = _mm256_set1_epi16(0x00f0);
  for (int side = 0; side < 2; side++) {
    __m256i halves[2];
    c_halves(a + 32 * side, b + 32 * side, halves);
    for (int h = 0; h < 2; h++) {
      const __m256i high = _mm256_srli_epi16(halves[h], 8);
      c_add(side ? &sum[4 * h].h : &sum[4 * h].l, _mm256_and_si256(halves[h], one), x);
      c_add(side ? &sum[4 * h + 1].h : &sum[4 * h + 1].l, _mm256_and_si256(halves[h], sixteen), x);
      c_add(side ? &sum[4 * h + 2].h : &sum[4 * h + 2].l, _mm256_and_si256(high, one), x);
      c_add(side ? &sum[4 * h + 3].h : &sum[4 * h + 3].l, _mm256_and_si256(high, sixteen), x);
    }
  }
}
static inline void c_close(vi sum[8]) {
  for (int n = 1; n < 8; n += 2) sum[n] = two_i(_mm256_srai_epi32(sum[n].l, 4), _mm256_srai_epi32(sum[n].h, 4));
}
static inline void c_bytes(vi sum[4], const uint8_t *a, const uint8_t *b, int32_t xa, int32_t xb) {
  const __m256i x = two_factors(xa, xb);
  for (int side = 0; side < 2; side++) {
    __m256i halves[2];
    c_halves(a + 32 * side, b + 32 * side, halves);
    for (int h = 0; h < 2; h++) {
      c_add(side ? &sum[2 * h].h : &sum[2 * h].l, _mm256_srai_epi16(_mm256_slli_epi16(halves[h], 8), 8), x);
      c_add(side ? &sum[2 * h + 1].h : &sum[2 * h + 1].l, _mm256_srai_epi16(halves[h], 8), x);
    }
  }
}
static inline void transpose_quarter(__m256 m[8]) {
  __m256 a[8];
  for (int i = 0; i < 8; i += 2) {
    a[i] = _mm256_unpacklo_ps(m[i], m[i + 1]);
    a[i + 1] = _mm256_unpackhi_ps(m[i], m[i + 1]);
  }
  for (int i = 0; i < 8; i += 4)
    for (int j = 0; j < 2; j++) {
      m[i + 2 * j] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      m[i + 2 * j + 1] = _mm256_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) {
    a[i] = _mm256_permute2f128_ps(m[i], m[i + 4], 0x20);
    a[i + 4] = _mm256_permute2f128_ps(m[i], m[i + 4], 0x31);
  }
  for (int i = 0; i < 8; i++) m[i] = a[i];
}
static inline void v_transpose(vf m[16]) {
  __m256 quarter[4][8];
  for (int i = 0; i < 8; i++) {
    quarter[0][i] = m[i].l, quarter[1][i] = m[i + 8].l;
    quarter[2][i] = m[i].h, quarter[3][i] = m[i + 8].h;
  }
  for (int q = 0; q < 4; q++) transpose_quarter(quarter[q]);
  for (int i = 0; i < 8; i++) {
    m[i] = two(quarter[0][i], quarter[1][i]);
    m[i + 8] = two(quarter[2][i], quarter[3][i]);
  }
}
#define PI2_TILE 4
