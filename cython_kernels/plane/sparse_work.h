/* The work on a sparse block: what its files share. sparse.h says how a block goes; ops_sparse.c does what is next of
 * it, sparse_gates.c says which neurons are active, sparse_ahead.c looks ahead, sparse_neurons.c computes neurons. */
#ifndef PI2_SPARSE_WORK_H
#define PI2_SPARSE_WORK_H
#include <math.h>

#include "program.h"
#include "sparse.h"

#define PI2_GUESSES 8 /* blocks that are looked ahead for at once */

typedef struct {             /* one thread's own */
  _Alignas(64) pi2_q8 ahead; /* (PI2_REPLICATED, dim) what the next sparse block may be computed on */
  float *ahead_floats;       /* the same; behind it what a predictor's first matrix makes of it */
  int16_t *arranged;         /* activations in the order of single neurons' rows, and their scales */
  float *arranged_d, *arranged_s;
  int turn; /* which of the two sparse blocks' places is next */
} pi2_sparse_scratch;
typedef struct {
  pi2_sparse *sparse[2];       /* the second for steps of few rows */
  pi2_sparse_scratch *scratch; /* (threads) */
} pi2_sparse_common;

static inline const pi2_sparse_common *pi2_sparse_of(const pi2_program *p) { return p->shared[PI2_SPARSE]; }
static inline const pi2_neuron_block *pi2_block_of(const pi2_op *op) { return op->data; }
static inline const pi2_bundles *pi2_bundles_of(const pi2_op *op) { return pi2_block_of(op)->bundles; }

/* What the block is computed on, the same for all threads. */
typedef struct {
  pi2_run *r;
  const pi2_program *p;
  const pi2_op *op;
  const pi2_bundles *b;
  pi2_sparse *s;
  pi2_neuron_cache *cache;
  pi2_worker *w;
  pi2_sparse_scratch *scratch;
  const pi2_input *in;
  pi2_input predicted;                   /* of a predictor's second matrix: the operation before has put it there */
  int index, rows, n_clusters, arranged; /* arranged: row whose activations are in the scratch */
} pi2_work;

static inline int64_t pi2_cluster_end(const pi2_work *k, int c) {
  const int64_t end = (int64_t)(c + 1) * PI2_CLUSTER;
  return end < k->b->neurons ? end : k->b->neurons;
}
/* Whether a cluster unit computes it. */
static inline int pi2_is_elsewhere(const pi2_bundles *b, int c) { return b->elsewhere && b->elsewhere[c]; }
static inline uint16_t *pi2_active(const pi2_work *k, int row, int c) {
  return k->s->active + row * k->p->hidden + c * PI2_CLUSTER;
}
static inline int pi2_n_active(const pi2_work *k, int row, int c) { return k->s->n_active[row * k->s->n_clusters + c]; }
/* The neuron of a cluster, counted from its first, whose bundle lies at a place. */
static inline int64_t pi2_neuron_at(const pi2_bundles *b, int64_t first, int64_t place) {
  return b->order ? b->order[place] : place - first;
}
/* Whether a neuron is active, by its gate. With ReLU a gate that is not positive gives zero, and the others are active;
 * of other activations all are. With thresholds, g is the activated gate: lossy, but for 0. NaN is always active: it
 * must not get lost. */
static inline int pi2_active_at(const pi2_op *op, int64_t neuron, float g) {
  if (pi2_bundles_of(op)->thresholds) return !(fabsf(g) <= pi2_bundles_of(op)->thresholds[neuron]);
  return (pi2_block_of(op)->activation != PI2_RELU && pi2_block_of(op)->activation != PI2_RELU2) || !(g <= 0);
}

/* -- sparse_gates.c */
/* From the deciding matrix' products of neurons [at, at + width) to what decides, in place, and to which are active.
 * Where gates are in the bundles, those are only neurons that may be active, whose gates are computed once they are
 * read: those for which a predictor's value is positive, and all where there is none. */
void pi2_decide(const pi2_program *p, const pi2_op *op, int64_t at, int64_t width, float *g, uint8_t *is_active);
/* Pages of a cluster's neurons that are wanted, ascending. Returns how many. */
int pi2_pages_of(const pi2_bundles *b, int64_t first, int64_t end, const uint8_t *wanted, int32_t *pages);
/* Whether what `decide` leaves in the tile are gates, of which the positive ones are active. */
int pi2_by_sign(const pi2_op *op);
/* The deciding matrix of a cluster: which are active, for which rows, on which pages. Nothing, where it cannot be read.
 */
void pi2_gate_cluster(pi2_work *k, int c);

/* -- sparse_ahead.c */
/* Blocks whose gates may be computed in vain. */
typedef struct {
  int n;
  const pi2_op *op[PI2_GUESSES];
  pi2_input in;
} pi2_guesses;

/* What the next blocks' gates are computed on: x as it is now, normalised. It is their true input where they are
 * experts of the same mixture (`exact`); else int8 will do, which takes less time. Returns whether there is any. */
int pi2_prepare_ahead(const pi2_work *k, const pi2_op *next, int exact, pi2_input *in);
/* What the predictor's first matrix makes of that, once. */
void pi2_reduce_ahead(const pi2_work *k, const pi2_op *next, pi2_input *in);
/* What to look ahead for, if reading is worth it. */
pi2_guesses pi2_guess(const pi2_work *k);
void pi2_foresee_cluster(const pi2_work *k, const pi2_op *next, int c, const pi2_input *in);

/* -- sparse_neurons.c */
int pi2_in_two_phases(const pi2_work *k);
/* The first of two phases is there: gates of a cluster's neurons, and the rest of those that are active is asked for.
 */
void pi2_choose(pi2_work *k, int c);
/* Rows of up of a cluster's neurons, and with them the hidden values, as integers. `chosen`: its gates are computed. */
void pi2_compute_up(pi2_work *k, int c, int chosen);
/* Columns of down of a cluster's neurons, for rows [from, to) of the stream. */
void pi2_add_down(const pi2_work *k, int c, int64_t from, int64_t to);
#endif
