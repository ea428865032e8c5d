/* AVX-512 with vpdpbusd (Cascade Lake, Zen 4 and later): the same kernels, another dot product. */
#define PI2_VNNI 1
#include "kernels_avx512.c"
