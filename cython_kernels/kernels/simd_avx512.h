/* Sixteen lanes as one AVX-512 register (F, BW, VL, DQ); PI2_VNNI adds vpdpbusd.
 *
 * Without VNNI the products go through vpmaddubsw (u8 x s8, pairs, 16-bit saturating). It never saturates here:
 * activations lie in [-127, 127], so eight sums of 4-bit pairs reach 8*2*15*127 = 30480, four of 5-bit pairs
 * 4*2*31*127 = 31496, two of 6-bit pairs 2*2*63*127 = 32004, one of |8-bit| pairs 2*128*127 = 32512, all < 32768. */
#include <immintrin.h>
#include <stdint.h>
#include <string.h>

typedef __m512 vf;
typedef __m512i vi;
typedef __m512i vb;

static inline vf v_zero(void) { return _mm512_setzero_ps(); }
static inline vf v_set(float a) { return _mm512_set1_ps(a); }
static inline vf v_load(const float *p) { return _mm512_loadu_ps(p); }
static inline void v_store(float *p, vf a) { _mm512_storeu_ps(p, a); }
static inline vf v_add(vf a, vf b) { return _mm512_add_ps(a, b); }
static inline vf v_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
static inline vf v_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
static inline vf v_div(vf a, vf b) { return _mm512_div_ps(a, b); }
static inline vf v_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
static inline vf v_max(vf a, vf b) { return _mm512_max_ps(a, b); }
static inline vf v_abs(vf a) { return _mm512_abs_ps(a); }
static inline vf v_rint(vf a) { return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
static inline vf v_pow2(vf n) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
}
static inline vf v_zero_below(vf a, vf x, float bound) {
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, _mm512_set1_ps(bound), _CMP_GE_OQ), a);
}
static inline vf v_window(vf a, float b, int lo, int hi) {
  uint32_t below_hi = hi >= 16 ? 0xffff : hi <= 0 ? 0 : (1u << hi) - 1;
  uint32_t below_lo = lo >= 16 ? 0xffff : lo <= 0 ? 0 : (1u << lo) - 1;
  return _mm512_mask_mov_ps(_mm512_set1_ps(b), (__mmask16)(below_hi & ~below_lo), a);
}
static inline float v_sum(vf a) {
  __m256 b = _mm256_add_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 c = _mm_add_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_add_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_add_ss(c, _mm_shuffle_ps(c, c, 1)));
}
static inline float v_top(vf a) {
  __m256 b = _mm256_max_ps(_mm512_castps512_ps256(a), _mm512_extractf32x8_ps(a, 1));
  __m128 c = _mm_max_ps(_mm256_castps256_ps128(b), _mm256_extractf128_ps(b, 1));
  c = _mm_max_ps(c, _mm_movehl_ps(c, c));
  return _mm_cvtss_f32(_mm_max_ss(c, _mm_shuffle_ps(c, c, 1)));
}
static inline float v_magnitude(vf a, vf b) { /* as integers, NaN is above everything */
  __m512i m = _mm512_max_epi32(_mm512_castps_si512(v_abs(a)), _mm512_castps_si512(v_abs(b)));
  __m256i n = _mm256_max_epi32(_mm512_castsi512_si256(m), _mm512_extracti64x4_epi64(m, 1));
  __m128i c = _mm_max_epi32(_mm256_castsi256_si128(n), _mm256_extracti128_si256(n, 1));
  c = _mm_max_epi32(c, _mm_unpackhi_epi64(c, c));
  return _mm_cvtss_f32(_mm_castsi128_ps(_mm_max_epi32(c, _mm_shuffle_epi32(c, 1))));
}
static inline vf v_load_f16(const uint16_t *p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)p)); }
static inline vf v_load_bf16(const uint16_t *p) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i *)p)), 16));
}
static inline vf v_load_u8(const uint8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline vf v_load_i8(const int8_t *p) {
  return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)));
}
static inline void v_store_f16(uint16_t *p, vf a) {
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtps_ph(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
static inline vi v_to_int(vf a) { return _mm512_cvtps_epi32(a); }
static inline void i_store_i8(int8_t *p, vi a) { _mm_storeu_si128((__m128i *)p, _mm512_cvtsepi32_epi8(a)); }
static inline void i_store_i16_0213(int16_t *p, vi a) {
  a = _mm512_shuffle_epi32(a, (_MM_PERM_ENUM)_MM_SHUFFLE(3, 1, 2, 0));
  _mm256_storeu_si256((__m256i *)p, _mm512_cvtsepi32_epi16(a));
}
static inline vi i_times256(vi a) { return _mm512_slli_epi32(a, 8); }
static inline vi i_add(vi a, vi b) { return _mm512_add_epi32(a, b); }
static inline int32_t i_sum(vi a) { return _mm512_reduce_add_epi32(a); }
/* 32 bytes of [-128, 127], and the sums of their halves, as sums of what is 128 larger */
static inline void i_store_i8_sums(int8_t *p, vi a, vi b, int32_t *sum_a, int32_t *sum_b) {
  const __m256i both =
      _mm256_inserti128_si256(_mm256_castsi128_si256(_mm512_cvtsepi32_epi8(a)), _mm512_cvtsepi32_epi8(b), 1);
  _mm256_storeu_si256((__m256i *)p, both);
  const __m256i eights = _mm256_sad_epu8(_mm256_xor_si256(both, _mm256_set1_epi8(-128)), _mm256_setzero_si256());
  const __m256i sums = _mm256_add_epi32(eights, _mm256_shuffle_epi32(eights, 0x4e));
  *sum_a = _mm256_extract_epi32(sums, 0) - 16 * 128;
  *sum_b = _mm256_extract_epi32(sums, 4) - 16 * 128;
}
static inline vf i_to_float(vi a) { return _mm512_cvtepi32_ps(a); }

static inline vb b_load(const uint8_t *p) { return _mm512_load_si512(p); }
static inline vb b_low(vb a) { return _mm512_and_si512(a, _mm512_set1_epi8(15)); }
static inline vb b_high(vb a) { return _mm512_and_si512(_mm512_srli_epi16(a, 4), _mm512_set1_epi8(15)); }
static inline vb b_fifth(vb a, const uint8_t *word) {
  __mmask64 m;
  memcpy(&m, word, 8);
  return _mm512_mask_add_epi8(a, m, a, _mm512_set1_epi8(16));
}
static inline vb b_sixth(vb a, vb top, int t) {
  __m512i bits = t < 2 ? _mm512_slli_epi16(top, (unsigned)(4 - 2 * t)) : _mm512_srli_epi16(top, (unsigned)(2 * t - 4));
  return _mm512_ternarylogic_epi32(a, bits, _mm512_set1_epi8(0x30), 0xf8); /* a | (bits & 0x30) */
}

static inline __m512i broadcast4(const int8_t *x) {
  int32_t four;
  memcpy(&four, x, 4);
  return _mm512_set1_epi32(four);
}
typedef struct {
  __m512i s[2];
} v6scale;
#ifdef PI2_VNNI
static inline vi dot_u4(const vb w[8], const int8_t *x) {
  vi a = _mm512_setzero_si512(), b = a; /* two chains: vpdpbusd takes five cycles */
  for (int g = 0; g < 8; g += 2) {
    a = _mm512_dpbusd_epi32(a, w[g], broadcast4(x + 4 * g));
    b = _mm512_dpbusd_epi32(b, w[g + 1], broadcast4(x + 4 * g + 4));
  }
  return _mm512_add_epi32(a, b);
}
static inline vi dot_u5(const vb w[8], const int8_t *x) { return dot_u4(w, x); }
static inline v6scale scale6_load(const int8_t *p) {
  v6scale r = {{_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)p)),
                _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 16)))}};
  return r;
}
static inline vi dot_u6(const vb w[8], const int8_t *x, v6scale s, const int16_t *half_sums) {
  /* start at -32 * sum(x): the offset costs nothing */
  vi a = _mm512_set1_epi32(-32 * half_sums[0]), b = _mm512_set1_epi32(-32 * half_sums[1]);
  for (int g = 0; g < 4; g++) {
    a = _mm512_dpbusd_epi32(a, w[g], broadcast4(x + 4 * g));
    b = _mm512_dpbusd_epi32(b, w[g + 4], broadcast4(x + 16 + 4 * g));
  }
  return _mm512_add_epi32(_mm512_mullo_epi32(a, s.s[0]), _mm512_mullo_epi32(b, s.s[1]));
}
#else
static inline vi pairs(vi a) { return _mm512_madd_epi16(a, _mm512_set1_epi16(1)); }
static inline vi dot_u4(const vb w[8], const int8_t *x) {
  vi a = _mm512_maddubs_epi16(w[0], broadcast4(x)), b = _mm512_maddubs_epi16(w[1], broadcast4(x + 4));
  for (int g = 2; g < 8; g += 2) {
    a = _mm512_add_epi16(a, _mm512_maddubs_epi16(w[g], broadcast4(x + 4 * g)));
    b = _mm512_add_epi16(b, _mm512_maddubs_epi16(w[g + 1], broadcast4(x + 4 * g + 4)));
  }
  return pairs(_mm512_add_epi16(a, b));
}
static inline vi dot_u5(const vb w[8], const int8_t *x) {
  vi a = _mm512_maddubs_epi16(w[0], broadcast4(x)), b = _mm512_maddubs_epi16(w[4], broadcast4(x + 16));
  for (int g = 1; g < 4; g++) {
    a = _mm512_add_epi16(a, _mm512_maddubs_epi16(w[g], broadcast4(x + 4 * g)));
    b = _mm512_add_epi16(b, _mm512_maddubs_epi16(w[g + 4], broadcast4(x + 16 + 4 * g)));
  }
  return _mm512_add_epi32(pairs(a), pairs(b));
}
static inline v6scale scale6_load(const int8_t *p) { /* each scale twice, as 16-bit factors of vpmaddwd */
  v6scale r;
  for (int h = 0; h < 2; h++) {
    __m512i wide = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(p + 16 * h)));
    wide = _mm512_and_si512(wide, _mm512_set1_epi32(0xffff));
    r.s[h] = _mm512_or_si512(wide, _mm512_slli_epi32(wide, 16));
  }
  return r;
}
static inline vi dot_u6(const vb w[8], const int8_t *x, v6scale s, const int16_t *half_sums) {
  vi total = _mm512_setzero_si512();
  for (int h = 0; h < 2; h++) {
    for (int g = 0; g < 4; g += 2) {
      const int8_t *y = x + 16 * h + 4 * g;
      vi a = _mm512_add_epi16(_mm512_maddubs_epi16(w[4 * h + g], broadcast4(y)),
                              _mm512_maddubs_epi16(w[4 * h + g + 1], broadcast4(y + 4)));
      total = _mm512_add_epi32(total, _mm512_madd_epi16(a, s.s[h]));
    }
  }
  /* minus 32 * (s0*sum0 + s1*sum1): interleave the two scales, one vpmaddwd */
  vi both = _mm512_mask_mov_epi16(s.s[0], 0xaaaaaaaa, s.s[1]);
  vi sums = _mm512_set1_epi32((int32_t)((uint32_t)(uint16_t)half_sums[0] | (uint32_t)(uint16_t)half_sums[1] << 16));
  return _mm512_sub_epi32(total, _mm512_slli_epi32(_mm512_madd_epi16(both, sums), 5));
}
#endif
/* |w| x (x with w's sign), so that the unsigned operand stays unsigned */
static inline vi dot_s8(const vb w[8], const int8_t *x) {
  vi total = _mm512_setzero_si512();
  for (int g = 0; g < 8; g++) {
    __m512i y = broadcast4(x + 4 * g);
    y = _mm512_mask_sub_epi8(y, _mm512_movepi8_mask(w[g]), _mm512_setzero_si512(), y);
#ifdef PI2_VNNI
    total = _mm512_dpbusd_epi32(total, _mm512_abs_epi8(w[g]), y);
#else
    total = _mm512_add_epi32(total, pairs(_mm512_maddubs_epi16(_mm512_abs_epi8(w[g]), y)));
#endif
  }
  return total;
}
typedef __m512i vw;
static inline void widen(const vb w[8], vw pairs[16], int is_signed, int zero) {
  const __m512i z = _mm512_set1_epi16((short)zero);
  for (int g = 0; g < 8; g++) {
    if (is_signed) {
      pairs[2 * g] = _mm512_srai_epi16(_mm512_slli_epi16(w[g], 8), 8);
      pairs[2 * g + 1] = _mm512_srai_epi16(w[g], 8);
    } else {
      pairs[2 * g] = _mm512_and_si512(w[g], _mm512_set1_epi16(0xff));
      pairs[2 * g + 1] = _mm512_srli_epi16(w[g], 8);
    }
    if (zero) {
      pairs[2 * g] = _mm512_sub_epi16(pairs[2 * g], z);
      pairs[2 * g + 1] = _mm512_sub_epi16(pairs[2 * g + 1], z);
    }
  }
}
static inline __m512i broadcast2(const int16_t *x) {
  int32_t two;
  memcpy(&two, x, 4);
  return _mm512_set1_epi32(two);
}
static inline vi dot_wide(const vw *pairs, const int16_t *x, int n) {
#ifdef PI2_VNNI
  vi a = _mm512_setzero_si512(), b = a;
  for (int p = 0; p < n; p += 2) {
    a = _mm512_dpwssd_epi32(a, pairs[p], broadcast2(x + 2 * p));
    b = _mm512_dpwssd_epi32(b, pairs[p + 1], broadcast2(x + 2 * p + 2));
  }
#else
  vi a = _mm512_madd_epi16(pairs[0], broadcast2(x)), b = _mm512_madd_epi16(pairs[1], broadcast2(x + 2));
  for (int p = 2; p < n; p += 2) {
    a = _mm512_add_epi32(a, _mm512_madd_epi16(pairs[p], broadcast2(x + 2 * p)));
    b = _mm512_add_epi32(b, _mm512_madd_epi16(pairs[p + 1], broadcast2(x + 2 * p + 2)));
  }
#endif
  return _mm512_add_epi32(a, b);
}
/* A block of nibbles against 32 activations, for one column: four masks of the 16-bit lanes instead of taking bytes and
 * nibbles apart. Two of them leave their products 16 and 256 times too large, in sums of their own: at most
 * 4 * 2 * 32767 * 15 * 256 < 2^30, and exact multiples. */
#define PI2_DOT_NIBBLES 1
static inline vi dot_nibbles(const uint8_t *p, const int16_t *x) {
  vi sum = _mm512_setzero_si512(), sum16 = sum, sum256 = sum;
  for (int g = 0; g < 4; g++) {
    const __m512i w = _mm512_load_si512(p + 64 * g);
    const __m512i a = _mm512_and_si512(w, _mm512_set1_epi16(0x000f)),
                  b = _mm512_and_si512(w, _mm512_set1_epi16(0x00f0));
    const __m512i c = _mm512_and_si512(w, _mm512_set1_epi16(0x0f00)), d = _mm512_srli_epi16(w, 12);
#ifdef PI2_VNNI
    sum = _mm512_dpwssd_epi32(_mm512_dpwssd_epi32(sum, a, broadcast2(x + 4 * g)), d, broadcast2(x + 18 + 4 * g));
    sum16 = _mm512_dpwssd_epi32(sum16, b, broadcast2(x + 16 + 4 * g));
    sum256 = _mm512_dpwssd_epi32(sum256, c, broadcast2(x + 2 + 4 * g));
#else
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(a, broadcast2(x + 4 * g)));
    sum = _mm512_add_epi32(sum, _mm512_madd_epi16(d, broadcast2(x + 18 + 4 * g)));
    sum16 = _mm512_add_epi32(sum16, _mm512_madd_epi16(b, broadcast2(x + 16 + 4 * g)));
    sum256 = _mm512_add_epi32(sum256, _mm512_madd_epi16(c, broadcast2(x + 2 + 4 * g)));
#endif
  }
  sum16 = _mm512_srai_epi32(sum16, 4);
  return _mm512_add_epi32(_mm512_add_epi32(sum, sum16), _mm512_srai_epi32(sum256, 8));
}
static inline vi i_zero(void) { return _mm512_setzero_si512(); }
#ifdef PI2_VNNI
/* What bytes_template.h takes: bytes of weights, unsigned, times signed ones, four columns of each lane added up */
#define PI2_ACROSS 8 /* columns: 8 float sums, 8 weights, 2 sums and a few more of 32 registers */
static inline vi i_set(int32_t a) { return _mm512_set1_epi32(a); }
static inline vi i_madd4(vi a, vb w, const int8_t *x) { return _mm512_dpbusd_epi32(a, w, broadcast4(x)); }
static inline vi i_scale6(vi a, v6scale s, int half) { return _mm512_mullo_epi32(a, s.s[half]); }
static inline uint32_t i_equal_low(const int16_t *pairs, int16_t a) { /* which of 16 pairs begin with a */
  const __m512i low = _mm512_slli_epi32(_mm512_loadu_si512(pairs), 16);
  const __mmask16 equal = _mm512_cmpeq_epi32_mask(low, _mm512_set1_epi32((int32_t)((uint32_t)(uint16_t)a << 16)));
  uint32_t which; /* not _cvtmask16_u32: GCC 12 may keep two bytes of its result on the stack and read back four */
  __asm__("kmovw %1, %0" : "=r"(which) : "k"(equal));
  return which;
}
static inline vf v_choose(uint32_t mask, vf a, vf b) { return _mm512_mask_mov_ps(b, (__mmask16)mask, a); }
static inline vb b_plus128(vb w) { return _mm512_xor_si512(w, _mm512_set1_epi8(-128)); }
#else
typedef __m512i vx;
static inline vx x_load(const int16_t *x) { return broadcast2(x); }
static inline vi i_madd(vi a, vw w, vx x) {
  vi product = _mm512_madd_epi16(w, x);
  __asm__("vpaddd %1, %0, %0" : "+v"(a) : "v"(product)); /* in place: gcc copies every sum otherwise */
  return a;
}
/* A panel's groups with int8 activations: panel_template.h says what PI2_SHORT and the functions g_ are. */
typedef __m512i vg;
typedef __m512i vx8;
#define PI2_X_GROUPS 1 /* whose activations x8_load reads */
static inline vx8 x8_load(const int8_t *x) { return broadcast4(x); }
#define PI2_SHORT 1
#define PI2_BIAS 0
static inline vb b_biased(vb w) { return w; }
static inline vg g_first(int32_t begin, vb w, vx8 x) {
  (void)begin;
  return _mm512_maddubs_epi16(w, x);
}
static inline void g_madd(vg *a, vb w, vx8 x, int g) {
  (void)g;
  vi product = _mm512_maddubs_epi16(w, x);
  __asm__("vpaddw %1, %0, %0" : "+v"(*a) : "v"(product)); /* in place, as in i_madd */
}
static inline vi g_close(vg a) { return pairs(a); }
static inline vi g_scale(vg a, const v6scale *s, int half) { return _mm512_madd_epi16(a, s->s[half]); }
/* -32 * (s0*sum0 + s1*sum1) by one vpmaddwd: -2 times the scales, 16 times the sums, of which none exceeds 16 * 127 */
static inline vg g_offsets(v6scale s) {
  vi both = _mm512_mask_mov_epi16(s.s[0], 0xaaaaaaaa, s.s[1]);
  return _mm512_sub_epi16(_mm512_setzero_si512(), _mm512_add_epi16(both, both));
}
static inline vx8 g_sums(const int16_t *half_sums) { return _mm512_slli_epi16(broadcast2(half_sums), 4); }
static inline vi g_offset(vg offsets, vx8 sums) { return _mm512_madd_epi16(offsets, sums); }
/* 32 values to int16, in the order of i_store_i16_0213 */
static inline void x_widen(const int8_t *x, int16_t *y) {
  vi wide = _mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i *)x));
  _mm512_store_si512(y, _mm512_shufflehi_epi16(_mm512_shufflelo_epi16(wide, 0xd8), 0xd8));
}
#endif
#define PI2_PANEL 4 /* of panel_template.h: 16 sums, 4 activations, 4 weights, 24 of 32 registers */
static inline uint64_t read_256(const uint8_t *p) {
  __m512i a = _mm512_xor_si512(_mm512_load_si512(p), _mm512_load_si512(p + 64));
  __m512i b = _mm512_xor_si512(_mm512_load_si512(p + 128), _mm512_load_si512(p + 192));
  a = _mm512_xor_si512(a, b);
  __m256i c = _mm256_xor_si256(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
  __m128i d = _mm_xor_si128(_mm256_castsi256_si128(c), _mm256_extracti128_si256(c, 1));
  return (uint64_t)_mm_cvtsi128_si64(d) ^ (uint64_t)_mm_extract_epi64(d, 1);
}
/* Neurons one by one; simd_scalar.h says what these do. The masks of dot_nibbles serve here too: sums of four pairs
 * times 256 stay below 2^31, and so do those of 32 columns times 16. */
static inline vi madd_add(vi sum, __m512i w, __m512i x) {
#ifdef PI2_VNNI
  return _mm512_dpwssd_epi32(sum, w, x);
#else
  return _mm512_add_epi32(sum, _mm512_madd_epi16(w, x));
#endif
}
static inline vi r_nibbles(const uint8_t *p, const int16_t *x) {
  vi sum = _mm512_setzero_si512(), sum16 = sum, sum256 = sum;
  for (int i = 0; i < 4; i++, x += 128) {
    const __m512i w = _mm512_load_si512(p + 64 * i);
    sum = madd_add(sum, _mm512_and_si512(w, _mm512_set1_epi16(0x000f)), _mm512_load_si512(x));
    sum16 = madd_add(sum16, _mm512_and_si512(w, _mm512_set1_epi16(0x00f0)), _mm512_load_si512(x + 32));
    sum256 = madd_add(sum256, _mm512_and_si512(w, _mm512_set1_epi16(0x0f00)), _mm512_load_si512(x + 64));
    sum = madd_add(sum, _mm512_srli_epi16(w, 12), _mm512_load_si512(x + 96));
  }
  sum16 = _mm512_srai_epi32(sum16, 4);
  return _mm512_add_epi32(_mm512_add_epi32(sum, sum16), _mm512_srai_epi32(sum256, 8));
}
static inline vi r_bytes(const uint8_t *p, const int16_t *x) {
  vi even = _mm512_setzero_si512(), odd = even;
  for (int i = 0; i < 8; i++, x += 64) {
    const __m512i w = _mm512_load_si512(p + 64 * i);
    even = madd_add(even, _mm512_srai_epi16(_mm512_slli_epi16(w, 8), 8), _mm512_load_si512(x));
    odd = madd_add(odd, _mm512_srai_epi16(w, 8), _mm512_load_si512(x + 32));
  }
  return _mm512_add_epi32(even, odd);
}
static inline __m512i two_factors(int32_t a, int32_t b) {
  return _mm512_set1_epi32((a & 0xffff) | (int32_t)((uint32_t)b << 16));
}
static inline void c_nibbles(vi sum[8], const uint8_t *a, const uint8_t *b, int32_t xa, int32_t xb) {
  const __m512i x = two_factors(xa, xb), v = _mm512_load_si512(a), w = _mm512_load_si512(b);
  const __m512i one = _mm512_set1_epi16(0x000f), sixteen = _mm512_set1_epi16(0x00f0);
  /* the lower halves of both words in one, then the upper: a nibble of one neuron beside that of the other */
  const __m512i halves[2] = {_mm512_mask_blend_epi16(0xaaaaaaaa, v, _mm512_slli_epi32(w, 16)),
                             _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(v, 16), w)};
  for (int h = 0; h < 2; h++) {
    const __m512i high = _mm512_srli_epi16(halves[h], 8);
    sum[4 * h] = madd_add(sum[4 * h], _mm512_and_si512(halves[h], one), x);
    sum[4 * h + 1] = madd_add(sum[4 * h + 1], _mm512_and_si512(halves[h], sixteen), x);
    sum[4 * h + 2] = madd_add(sum[4 * h + 2], _mm512_and_si512(high, one), x);
    sum[4 * h + 3] = madd_add(sum[4 * h + 3], _mm512_and_si512(high, sixteen), x);
  }
}
static inline void c_close(vi sum[8]) {
  for (int n = 1; n < 8; n += 2) sum[n] = _mm512_srai_epi32(sum[n], 4);
}
static inline void c_bytes(vi sum[4], const uint8_t *a, const uint8_t *b, int32_t xa, int32_t xb) {
  const __m512i x = two_factors(xa, xb), v = _mm512_load_si512(a), w = _mm512_load_si512(b);
  const __m512i halves[2] = {_mm512_mask_blend_epi16(0xaaaaaaaa, v, _mm512_slli_epi32(w, 16)),
                             _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(v, 16), w)};
  for (int h = 0; h < 2; h++) {
    sum[2 * h] = madd_add(sum[2 * h], _mm512_srai_epi16(_mm512_slli_epi16(halves[h], 8), 8), x);
    sum[2 * h + 1] = madd_add(sum[2 * h + 1], _mm512_srai_epi16(halves[h], 8), x);
  }
}
static inline void v_transpose(vf m[16]) {
  vf a[16];
  for (int i = 0; i < 16; i += 2) {
    a[i] = _mm512_unpacklo_ps(m[i], m[i + 1]);
    a[i + 1] = _mm512_unpackhi_ps(m[i], m[i + 1]);
  }
  for (int i = 0; i < 16; i += 4)
    for (int j = 0; j < 2; j++) {
      m[i + 2 * j] = _mm512_shuffle_ps(a[i + j], a[i + j + 2], 0x44);
      m[i + 2 * j + 1] = _mm512_shuffle_ps(a[i + j], a[i + j + 2], 0xee);
    }
  for (int i = 0; i < 4; i++) { /* m[4r + i]: column 4q + i of rows 4r.. in quarter q */
    a[i] = _mm512_shuffle_f32x4(m[i], m[i + 4], 0x88);
    a[i + 4] = _mm512_shuffle_f32x4(m[i], m[i + 4], 0xdd);
    a[i + 8] = _mm512_shuffle_f32x4(m[i + 8], m[i + 12], 0x88);
    a[i + 12] = _mm512_shuffle_f32x4(m[i + 8], m[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    m[i] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0x88);
    m[i + 8] = _mm512_shuffle_f32x4(a[i], a[i + 8], 0xdd);
    m[i + 4] = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0x88);
    m[i + 12] = _mm512_shuffle_f32x4(a[i + 4], a[i + 12], 0xdd);
  }
}
#define PI2_TILE 8
