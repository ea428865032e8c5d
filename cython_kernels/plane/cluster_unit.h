/* A cluster unit beside the gang: another device, or a thread of its own, that multiplies some neuron clusters of a
 * block while the gang computes the others.
 *
 * Two operations stand around a sparse block. PI2_HANDOFF writes the block's normalised input where the unit reads it,
 * and asks. PI2_JOIN waits for the answer, and adds it to where the block's result goes. One item is in flight at most,
 * so that input and output have one place each. */
#ifndef PI2_CLUSTER_UNIT_H
#define PI2_CLUSTER_UNIT_H
#include <stdatomic.h>
#include <stdint.h>

#include "api.h"

enum { PI2_UNIT_FAILED = -1001, PI2_UNIT_LATE = -1002 }; /* errors of a run, beside those of reads */

typedef struct {
  float *x, *out;                         /* (max_rows, dim) each; out is zero when the unit is asked */
  int64_t deadline_ns;                    /* an answer that takes longer is a failure; < 0: none is */
  _Alignas(64) _Atomic uint32_t asked;    /* futex: items */
  _Alignas(64) _Atomic uint32_t answered; /* futex: items */
  _Atomic int sleepers;                   /* threads that wait for an answer */
  _Atomic int closing, failed;
  int32_t layer, rows; /* of the item that was asked for last */
  _Atomic int64_t items, item_rows, busy_ns, stall_ns;
} pi2_cluster_unit;

typedef struct { /* the data of PI2_HANDOFF and PI2_JOIN */
  pi2_cluster_unit *unit;
} pi2_hop;

/* -- the unit's thread */
/* Waits for an item. Returns 1, and layer and rows are its; 0 when closing. The item ends with pi2_unit_answer. */
PI2_API int pi2_unit_take(pi2_cluster_unit *u);
/* `failed`: out is not usable, nor will another item be taken. */
PI2_API void pi2_unit_answer(pi2_cluster_unit *u, int failed, int64_t busy_ns);
/* -- any thread */
PI2_API void pi2_unit_close(pi2_cluster_unit *u);
/* -- threads of the gang */
/* Asks for an item: x is written, and out is zero in so many rows. Nothing is in flight. */
PI2_API void pi2_unit_ask(pi2_cluster_unit *u, int layer, int rows);
/* Waits until nothing is in flight. Returns 0, or an error of the above, or 1 where *stop was set. */
PI2_API int pi2_unit_wait(pi2_cluster_unit *u, int64_t spin_ns, const _Atomic int *stop);
#endif
