/* A feed-forward block of which only the neurons that are active are read and computed: the cluster pipeline.
 *
 * The deciding matrix (gate; up, where there is no gate; a predictor, where gates are not in memory) is computed whole.
 * Its rows are cut into clusters of PI2_CLUSTER neurons. Of each cluster the neurons that were active are asked for
 * (neuron_cache.h); once they are in memory their rows of up are computed, and then their columns of down are added to
 * the residual stream. Clusters are at different stages at the same time, and a thread takes whatever can be done next:
 * no barrier between the matrices, order only within a cluster.
 *
 * The columns are added by ranges of the stream's rows, each range cluster after cluster: the sums have one order,
 * whatever arrives first and whoever computes it. So a result does not depend on what the cache held, and is the dense
 * one; with thresholds it is that of a dense block whose activations below them are zero.
 *
 * Where gates are in the bundles as well, a predictor decides what is read, and the gates then what is computed. In two
 * phases only the first sectors of a bundle are read, which hold its gate, and the rest once that has let it through.
 *
 * There are two of what a block works on. Experts of a mixture have the same input: while one waits for flash, the
 * gates of the next one are computed already, and its neurons asked for. */
#ifndef PI2_SPARSE_H
#define PI2_SPARSE_H
#include <stdatomic.h>
#include <stdint.h>

#define PI2_CLUSTER 512
#define PI2_RANGES 32 /* of the stream's rows, at most */

enum pi2_pipeline { /* how much of reading and computing overlaps; for measuring what each is worth */
                    PI2_PIPELINE_NONE,   /* read, when all gates are known; compute, when all is read */
                    PI2_PIPELINE_MATRIX, /* compute of a matrix what is there while the rest is read; then the next
                                            matrix */
                    PI2_PIPELINE_CLUSTER
};

typedef struct {                  /* where the neurons of a block lie; docs/pack-format.md */
  int region, up_type, down_type; /* up_type -1: no gate, so up decides and only columns of down are read */
  int gate_type;                  /* -1: gates are not in the bundles */
  int64_t neurons, per_page, neuron_bytes;
  int64_t gate_bytes, up_bytes; /* from a neuron's beginning to its row of up, and to its column of down */
  const uint8_t *gate_scales;
  int64_t gate_stride;
  const float *gate_bias;
  const uint8_t *up_scales, *down_scales;
  int64_t up_stride, down_stride, down_plane; /* scales: per neuron; per 32 neurons; from scales to minimums */
  const float *up_bias, *down_bias;
  const float *thresholds; /* (neurons): only those are active whose |act(gate)| is above; NULL: exact */
  /* (neurons): of each place the neuron whose bundle lies there, counted from the cluster's first, a permutation of
   * each cluster; NULL: every neuron at its own place. Nothing but pages and offsets in them depends on it. */
  const uint16_t *order;
  const uint8_t *elsewhere; /* (clusters): not 0: a cluster unit computes this one; NULL: none */
} pi2_bundles;

typedef struct { /* the data of PI2_SPARSE: y or x += down(act(gate) * up); its matrix, if any, decides */
  const pi2_bundles *bundles;
  int activation, up_activation;
  int mixed_down;  /* hidden values become int16 in both forms (pi2_q8), cluster by cluster */
  int next_sparse; /* the operation of the next sparse block, or 0; of an expert's, that of its mixture's next expert */
  int next_route;  /* of an expert's: the operation that routes in the next mixture, or 0 */
} pi2_neuron_block;

/* CHOSEN: its true gates, which are in the bundles, are computed, and what follows them is read where they let it
 * through. */
enum { PI2_IDLE, PI2_GATED, PI2_ASKED, PI2_TAKEN, PI2_CHOSEN, PI2_COMPUTED };
typedef struct { /* a cluster while its block runs */
  _Atomic int32_t stage;
  _Atomic int32_t pending;     /* pages it waits for */
  _Atomic int32_t ranges_left; /* that have not added its columns */
  int32_t n_pages, asked;
  int32_t *pages;
} pi2_cluster;

typedef struct {
  int32_t n_clusters, n_ranges;
  pi2_cluster *clusters;
  uint16_t *active;   /* (max_rows, hidden): per row and cluster the active neurons, ascending, within the cluster */
  uint16_t *n_active; /* (max_rows, clusters) */
  int32_t *pages;     /* (hidden) */
  const uint8_t **places;          /* (hidden) of neurons that are active, once they are there */
  float *values;                   /* (max_rows, hidden) of gates; then of the neurons */
  float *sums;                     /* (max_rows, stride): of down */
  int64_t stride;                  /* dim, in whole lines of 128 rows */
  _Atomic int32_t arrived;         /* threads that have read the stream: before all have, nobody writes to it */
  _Atomic int32_t asking;          /* a thread is */
  _Atomic int32_t next_asked;      /* clusters below it have been asked for, completely */
  _Atomic int32_t gated, computed; /* clusters */
  _Atomic int32_t
      crowded; /* there was no room for what one needs: what is there must go first, whatever the pipeline */
  struct {
    _Alignas(64) _Atomic int32_t busy;
    _Atomic int32_t next;
  } range[PI2_RANGES]; /* next: cluster to add */
} pi2_sparse;
#endif
