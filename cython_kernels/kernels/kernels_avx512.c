/* AVX-512 F, BW, VL, DQ (Skylake-SP and later). Compiled again by kernels_avx512vnni.c. */
#include "simd_avx512.h"
#include "kernels_template.h"

#ifdef PI2_VNNI
PI2_TABLE(pi2_kernels_avx512vnni, "avx512vnni", 16)
#else
PI2_TABLE(pi2_kernels_avx512, "avx512", 16)
#endif
