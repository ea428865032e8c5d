/* Plain C: runs everywhere, and is what the other variants are compared with. */
#include "simd_scalar.h"
#include "kernels_template.h"

PI2_TABLE(pi2_kernels_scalar, "scalar", 1)
