/* Mixtures of experts in a program. */
#ifndef PI2_OPS_EXPERTS_H
#define PI2_OPS_EXPERTS_H
#include "op.h"

typedef struct { /* the data of PI2_ROUTE: from logits in y; a shared expert's logit is behind the others */
  int n_experts, n_used, normalized, shared;
} pi2_route;
#endif
