/* Which variants this binary has, and which of them this processor runs. */
#include "kernels.h"
#include "variants.h" /* generated: PI2_HAVE_... */

#ifdef __x86_64__
#include <cpuid.h>
#endif
#ifdef __aarch64__
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

extern const pi2_kernels pi2_kernels_scalar;
#ifdef PI2_HAVE_avx2
extern const pi2_kernels pi2_kernels_avx2;
#endif
#ifdef PI2_HAVE_avx512
extern const pi2_kernels pi2_kernels_avx512;
#endif
#ifdef PI2_HAVE_avx512vnni
extern const pi2_kernels pi2_kernels_avx512vnni;
#endif
#ifdef PI2_HAVE_neon
extern const pi2_kernels pi2_kernels_neon;
#endif

static const pi2_kernels *const variants[] = {&pi2_kernels_scalar,
#ifdef PI2_HAVE_avx2
                                              &pi2_kernels_avx2,
#endif
#ifdef PI2_HAVE_avx512
                                              &pi2_kernels_avx512,
#endif
#ifdef PI2_HAVE_avx512vnni
                                              &pi2_kernels_avx512vnni,
#endif
#ifdef PI2_HAVE_neon
                                              &pi2_kernels_neon,
#endif
                                              NULL};

const pi2_kernels *const *pi2_variants(void) { return variants; }

#if defined(__x86_64__) && defined(PI2_HAVE_avx2)
/* clang before 19 does not know the name. What the system must support is asked with avx2. */
static int has_f16c(void) {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C);
}
#endif

int pi2_variant_runs(const pi2_kernels *k) {
#ifdef __x86_64__
#ifdef PI2_HAVE_avx2
  if (k == &pi2_kernels_avx2) return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
#endif
#if defined(PI2_HAVE_avx512) || defined(PI2_HAVE_avx512vnni)
  int avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
#ifdef PI2_HAVE_avx512
  if (k == &pi2_kernels_avx512) return avx512;
#endif
#ifdef PI2_HAVE_avx512vnni
  if (k == &pi2_kernels_avx512vnni) return avx512 && __builtin_cpu_supports("avx512vnni");
#endif
#endif
#if defined(__aarch64__) && defined(PI2_HAVE_neon)
  if (k == &pi2_kernels_neon) return (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) != 0;
#endif
  return k == &pi2_kernels_scalar;
}
