/* vpdpbusd and vpdpwssd by AVX-512 BW, exactly: products in 16 and 32 bits, summed in 32. For processors without VNNI,
 * so that the logic of kernels_avx512vnni.c is tested on them too. */
#include <immintrin.h>

static inline __m512i emulated_dpbusd(__m512i sum, __m512i u, __m512i s) {
  const __m512i low = _mm512_set1_epi16(0xff), one = _mm512_set1_epi16(1);
  __m512i even = _mm512_mullo_epi16(_mm512_and_si512(u, low), _mm512_srai_epi16(_mm512_slli_epi16(s, 8), 8));
  __m512i odd = _mm512_mullo_epi16(_mm512_srli_epi16(u, 8), _mm512_srai_epi16(s, 8));
  sum = _mm512_add_epi32(sum, _mm512_madd_epi16(even, one));
  return _mm512_add_epi32(sum, _mm512_madd_epi16(odd, one));
}
#define _mm512_dpbusd_epi32(sum, u, s) emulated_dpbusd(sum, u, s)
#define _mm512_dpwssd_epi32(sum, a, b) _mm512_add_epi32(sum, _mm512_madd_epi16(a, b))
