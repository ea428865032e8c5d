/* Sizes inside a row block, as inline functions: the kernels need them as constants (kernels.h has the layout). */
#ifndef PI2_LAYOUT_H
#define PI2_LAYOUT_H
#include "kernels.h"

static inline int64_t pi2_scales_bytes_of(int type, int64_t k) {
  int64_t b = k / 32, s = k / 256;
  switch (type) {
  case PI2_Q4_0:
  case PI2_Q5_0:
  case PI2_Q8_0: return pi2_align(b * 32, 64);
  case PI2_Q4_1:
  case PI2_Q5_1: return b * 64;
  case PI2_Q4_K:
  case PI2_Q5_K: return s * 320;
  case PI2_Q6_K: return pi2_align(s * 288, 64);
  default: return 0;
  }
}
static inline int64_t pi2_quants_bytes_of(int type, int64_t k) {
  int64_t b = k / 32;
  switch (type) {
  case PI2_Q4_0:
  case PI2_Q4_1:
  case PI2_Q4_K: return b * 256;
  case PI2_Q5_0:
  case PI2_Q5_1:
  case PI2_Q5_K: return b * 320;
  case PI2_Q6_K: return b * 384;
  case PI2_Q8_0: return b * 512;
  case PI2_F32: return pi2_align(k * 64, 64);
  case PI2_F16:
  case PI2_BF16: return pi2_align(k * 32, 64);
  default: return 0;
  }
}
#endif
