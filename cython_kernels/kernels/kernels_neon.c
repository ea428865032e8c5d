/* NEON with the dot product extension (Armv8.2 and later: Cortex-A76, Neoverse N1, Apple M1). */
#include "simd_neon.h"
#include "kernels_template.h"

PI2_TABLE(pi2_kernels_neon, "neon", 4)
