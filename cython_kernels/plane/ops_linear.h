/* Matrix products of a program. */
#ifndef PI2_OPS_LINEAR_H
#define PI2_OPS_LINEAR_H
#include "op.h"

/* PI2_LINEAR, without data: y or x += W [norm](source), outputs of its matrices one after the other. PI2_FFN: hidden =
 * act(gate) * up, of its matrices up and gate. PI2_HEAD: logits, of one matrix. */
typedef struct { /* the data of PI2_FFN */
  int activation, up_activation;
} pi2_ffn;

typedef struct { /* the data of PI2_HEAD */
  float softcap; /* 0: none */
} pi2_head;
#endif
