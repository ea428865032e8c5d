/* Everything one instruction set provides. Included once by each kernels_*.c, after its simd_*.h; all names are static,
 * so that no code compiled for one processor can be linked into another's path. */
#include <math.h>
#include <string.h>

#include "elementary.h"
#include "kernels.h"
#include "layout.h"

#ifndef PI2_PREFETCH
#define PI2_PREFETCH 8192 /* bytes ahead of a memory-bound stream */
#endif

/* The statement of assembler, which has no instruction, is an effect: GCC takes a function that only prefetches for one
 * without any and removes its calls (tests/kernels/cross.sh counts them). */
static inline void v_prefetch(const uint8_t *p) {
  __builtin_prefetch(p);
  __asm__ volatile("");
}
static inline void v_prefetch_second(const uint8_t *p) { /* into L2 */
  __builtin_prefetch(p, 0, 2);
  __asm__ volatile("");
}

#ifndef PI2_ACROSS
#define PI2_ACROSS 0
#endif

#include "gemm_template.h"
#if PI2_ACROSS
#include "bytes_template.h"
#else
#include "panel_template.h"
#endif
#include "vector_template.h"
#include "attention_template.h"
#include "neuron_template.h"

/* Many columns, by gemm_panel of one of the two */
#define PANEL(T, WIDE, name)                                                                                \
  static void panel_##name(const uint8_t *w, int64_t stride, int blocks, int64_t k, const pi2_q8 *x, int n, \
                           float *out, int64_t ldo) {                                                       \
    gemm_panel(T, WIDE, w, stride, blocks, k, x, n, out, ldo);                                              \
  }
#define PANELS(T, name) PANEL(T, 0, name##_a8) PANEL(T, 1, name##_a16)
PANELS(PI2_Q4_0, q4_0)
PANELS(PI2_Q4_1, q4_1)
PANELS(PI2_Q5_0, q5_0)
PANELS(PI2_Q5_1, q5_1)
PANELS(PI2_Q8_0, q8_0)
PANELS(PI2_Q4_K, q4_k)
PANELS(PI2_Q5_K, q5_k)
PANELS(PI2_Q6_K, q6_k)

#define PI2_GEMMS(a)                                                                                               \
  {[PI2_Q4_0] = gemm_q4_0_##a, [PI2_Q4_1] = gemm_q4_1_##a, [PI2_Q5_0] = gemm_q5_0_##a, [PI2_Q5_1] = gemm_q5_1_##a, \
   [PI2_Q8_0] = gemm_q8_0_##a, [PI2_Q4_K] = gemm_q4_k_##a, [PI2_Q5_K] = gemm_q5_k_##a, [PI2_Q6_K] = gemm_q6_k_##a}
#define PI2_PANELS(a)                                                                                                  \
  {[PI2_Q4_0] = panel_q4_0_##a, [PI2_Q4_1] = panel_q4_1_##a, [PI2_Q5_0] = panel_q5_0_##a, [PI2_Q5_1] = panel_q5_1_##a, \
   [PI2_Q8_0] = panel_q8_0_##a, [PI2_Q4_K] = panel_q4_k_##a, [PI2_Q5_K] = panel_q5_k_##a, [PI2_Q6_K] = panel_q6_k_##a}
#define PI2_NEURONS(f) {[PI2_Q4_0] = f##_q4_0, [PI2_Q4_1] = f##_q4_1, [PI2_Q8_0] = f##_q8_0}
#define PI2_TABLE(symbol, label, width)                                                   \
  const pi2_kernels symbol = {                                                            \
      .name = label,                                                                      \
      .lanes = width,                                                                     \
      .bytes_alone = PI2_ACROSS > 0,                                                      \
      .panel8 = PI2_PANELS(a8),                                                           \
      .panel16 = PI2_PANELS(a16),                                                         \
      .gemm8 = PI2_GEMMS(a8),                                                             \
      .gemm16 = PI2_GEMMS(a16),                                                           \
      .gemm_float = {[PI2_F32] = gemm_f32, [PI2_F16] = gemm_f16, [PI2_BF16] = gemm_bf16}, \
      .neuron_rows = PI2_NEURONS(neuron_rows),                                            \
      .neuron_columns = PI2_NEURONS(neuron_columns),                                      \
      .quantize8 = quantize8,                                                             \
      .quantize16 = quantize16,                                                           \
      .quantize_mixed = quantize_mixed,                                                   \
      .rmsnorm = rmsnorm,                                                                 \
      .add = add,                                                                         \
      .activate = activate,                                                               \
      .rope = rope,                                                                       \
      .kv_store = kv_store,                                                               \
      .attend = attend,                                                                   \
      .attend_merge = attend_merge,                                                       \
      .scale = scale,                                                                     \
      .argmax = argmax,                                                                   \
      .logsumexp = logsumexp,                                                             \
      .softcap = softcap,                                                                 \
      .read = read_bytes,                                                                 \
  };
