/* AVX2, FMA, F16C (Haswell, Zen and later). */
#include "simd_avx2.h"
#include "kernels_template.h"

PI2_TABLE(pi2_kernels_avx2, "avx2", 8)
