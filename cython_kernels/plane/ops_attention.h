/* Attention of a program. */
#ifndef PI2_OPS_ATTENTION_H
#define PI2_OPS_ATTENTION_H
#include "op.h"

typedef struct {                             /* the data of PI2_ATTENTION */
  int n_heads, n_kv_heads, head_dim, window; /* window 0: all. kv.head_dim: padded to a multiple of 16 */
  float scale, softcap;
  int rope; /* index or -1 */
  pi2_norm q_norm, k_norm;
  pi2_kv kv; /* base, strides; the page table is the slice's */
  int64_t kv_head_stride;
} pi2_attention;
#endif
