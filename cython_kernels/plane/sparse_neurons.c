/* The neurons of a cluster whose pages are there: rows of gate and up, columns of down. */
#include <math.h>
#include <string.h>

#include "layout.h"
#include "sparse_work.h"

#define AHEAD 512 /* bytes of what comes next that are prefetched while something else is computed */

/* Where the neurons of a cluster lie, whose pages are all there. */
static void find_neurons(const pi2_work *k, const pi2_cluster *cluster, int64_t first, int64_t end) {
  const pi2_bundles *b = k->b;
  for (int i = 0; i < cluster->n_pages; i++) {
    const uint8_t *at = pi2_neuron_cache_at(k->cache, b->region, cluster->pages[i]);
    const int64_t from = cluster->pages[i] * b->per_page;
    for (int64_t j = from < first ? first : from; j < end && j < from + b->per_page; j++)
      k->s->places[first + pi2_neuron_at(b, first, j)] = at + (j - from) * b->neuron_bytes;
  }
}
static void prefetch(const uint8_t *p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

/* Gates of a cluster's neurons that are in the bundles; only the active neurons stay. */
static void compute_gates(pi2_work *k, int c, int row) {
  const pi2_program *p = k->p;
  const pi2_bundles *b = k->b;
  const int64_t first = (int64_t)c * PI2_CLUSTER;
  const uint8_t *const *places = k->s->places + first;
  pi2_sparse_scratch *scratch = k->scratch;
  uint16_t *list = pi2_active(k, row, c);
  float *h = k->s->values + row * p->hidden + first;
  const int n = pi2_n_active(k, row, c);
  int kept = 0;
  for (int at = 0; at < n; at += 16) {
    const int m = n - at < 16 ? n - at : 16;
    const uint8_t *rows[16], *scales[16];
    float gate[16];
    for (int i = 0; i < m; i++) {
      rows[i] = places[list[at + i]];
      scales[i] = b->gate_scales + (first + list[at + i]) * b->gate_stride;
    }
    for (int i = at + m; i < n && i < at + m + 16; i++) prefetch(places[list[i]], AHEAD);
    p->kernels->neuron_rows[b->gate_type](rows, scales, m, p->dim, scratch->arranged, scratch->arranged_d,
                                          scratch->arranged_s, gate);
    for (int i = 0; b->gate_bias && i < m; i++) gate[i] += b->gate_bias[first + list[at + i]];
    if (b->thresholds) p->kernels->activate(pi2_block_of(k->op)->activation, PI2_NONE, NULL, gate, gate, m);
    for (int i = 0; i < m; i++)
      if (pi2_active_at(k->op, first + list[at + i], gate[i])) {
        h[list[at + i]] = gate[i];
        list[kept++] = list[at + i];
      }
  }
  k->s->n_active[row * k->s->n_clusters + c] = (uint16_t)kept;
}

/* The row's activations as the kernels of single neurons want them. */
static void arrange(pi2_work *k, int row) {
  pi2_sparse_scratch *scratch = k->scratch;
  if (k->arranged == row) return;
  const pi2_q8 x = pi2_q8_row(&k->in->q8, row);
  pi2_arrange(&x, k->p->wide, k->p->dim, scratch->arranged, scratch->arranged_d, scratch->arranged_s);
  k->arranged = row;
}
int pi2_in_two_phases(const pi2_work *k) { return k->cache->regions[k->b->region].head_bytes != 0; }

void pi2_choose(pi2_work *k, int c) {
  pi2_cluster *cluster = &k->s->clusters[c];
  const int64_t first = (int64_t)c * PI2_CLUSTER, end = pi2_cluster_end(k, c);
  uint8_t is_active[PI2_CLUSTER] = {0};
  int32_t pages[PI2_CLUSTER];
  find_neurons(k, cluster, first, end);
  for (int row = 0; row < k->rows; row++) {
    if (!pi2_n_active(k, row, c)) continue;
    arrange(k, row);
    compute_gates(k, c, row);
    for (int i = 0; i < pi2_n_active(k, row, c); i++) is_active[pi2_active(k, row, c)[i]] = 1;
  }
  const int n = pi2_pages_of(k->b, first, end, is_active, pages);
  atomic_store(&cluster->pending, 1);
  pi2_neuron_cache_complete(k->cache, k->b->region, pages, n, &cluster->pending);
  atomic_store(&cluster->stage, PI2_CHOSEN);
  atomic_fetch_sub(&cluster->pending, 1);
}

void pi2_compute_up(pi2_work *k, int c, int chosen) {
  const pi2_program *p = k->p;
  const pi2_bundles *b = k->b;
  const int64_t first = (int64_t)c * PI2_CLUSTER, width = pi2_cluster_end(k, c) - first;
  const uint8_t *const *places = k->s->places + first;
  pi2_sparse_scratch *scratch = k->scratch;
  const int activation =
      b->thresholds ? PI2_NONE : pi2_block_of(k->op)->activation; /* thresholds are of activated gates */
  find_neurons(k, &k->s->clusters[c], first, first + width);
  for (int row = 0; row < k->rows; row++) {
    const uint16_t *list = pi2_active(k, row, c);
    float *h = k->s->values + row * p->hidden + first;
    if (!pi2_n_active(k, row, c)) continue;
    if (b->up_type >= 0) arrange(k, row);
    if (b->gate_type >= 0 && !chosen) compute_gates(k, c, row);
    const int n = pi2_n_active(k, row, c);
    for (int at = 0; b->up_type >= 0 && at < n; at += 16) {
      const int m = n - at < 16 ? n - at : 16;
      const uint8_t *rows[16], *scales[16];
      float gate[16], up[16];
      for (int i = 0; i < m; i++) {
        rows[i] = places[list[at + i]] + b->gate_bytes;
        scales[i] = b->up_scales + (first + list[at + i]) * b->up_stride;
        gate[i] = h[list[at + i]];
      }
      for (int i = at + m; i < n && i < at + m + 16; i++) /* the kernel does the rest */
        prefetch(places[list[i]] + b->gate_bytes, AHEAD);
      p->kernels->neuron_rows[b->up_type](rows, scales, m, p->dim, scratch->arranged, scratch->arranged_d,
                                          scratch->arranged_s, up);
      for (int i = 0; b->up_bias && i < m; i++) up[i] += b->up_bias[first + list[at + i]];
      p->kernels->activate(activation, pi2_block_of(k->op)->up_activation, gate, up, up, m);
      for (int i = 0; i < m; i++) h[list[at + i]] = up[i];
    }
    pi2_q8 q8 = pi2_q8_at(p, &p->q8_hidden, row, first);
    pi2_quantize_both(p, pi2_block_of(k->op)->mixed_down, h, width, &q8);
  }
}

typedef struct { /* columns of down of one group of 32 neurons */
  int group, n;
  const uint8_t *column[PI2_BLOCK], *scales;
  int16_t q[PI2_BLOCK];
} columns;

/* The next group with any that is not zero, from *at on; its first lines are on their way to the cache then. */
static int next_group(const pi2_work *k, int c, int row, int *at, int64_t from, int64_t lines, columns *out) {
  static const uint8_t stored[4] = {0, 2, 1, 3};
  const pi2_bundles *b = k->b;
  const int n = pi2_n_active(k, row, c);
  const uint16_t *list = pi2_active(k, row, c);
  const int64_t first = (int64_t)c * PI2_CLUSTER,
                offset = b->up_bytes + from / (b->down_type == PI2_Q8_0 ? 64 : 128) * 64;
  const uint8_t *const *places = k->s->places + first;
  const pi2_q8 x = pi2_q8_at(k->p, &k->p->q8_hidden, row, first);
  for (out->n = 0; *at < n && !out->n;) {
    out->group = list[*at] / PI2_BLOCK;
    for (; *at < n && list[*at] / PI2_BLOCK == out->group; ++*at) {
      const int j = list[*at];
      const int16_t q = k->p->wide ? ((const int16_t *)x.q)[(j & ~3) + stored[j & 3]] : x.q[j];
      if (!q) continue; /* adds zero: the second activation was, or the value is too small beside its neighbours */
      out->column[out->n] = places[j] + offset;
      out->q[out->n] = q;
      prefetch(out->column[out->n++], lines * 64 < AHEAD ? lines * 64 : AHEAD);
    }
  }
  if (out->n) {
    out->scales = b->down_scales + (first / PI2_BLOCK + out->group) * b->down_stride + 2 * from;
    prefetch(out->scales, AHEAD);
  }
  return out->n;
}
void pi2_add_down(const pi2_work *k, int c, int64_t from, int64_t to) {
  const pi2_program *p = k->p;
  const pi2_bundles *b = k->b;
  const int64_t lines = (to - from) / (b->down_type == PI2_Q8_0 ? 64 : 128);
  for (int row = 0; row < k->rows; row++) {
    const pi2_q8 x = pi2_q8_at(p, &p->q8_hidden, row, (int64_t)c * PI2_CLUSTER);
    columns both[2];
    int at = 0, now = 0;
    next_group(k, c, row, &at, from, lines, &both[0]);
    for (; both[now].n; now = !now) {
      const columns *g = &both[now];
      next_group(k, c, row, &at, from, lines, &both[!now]);
      p->kernels->neuron_columns[b->down_type](g->column, g->q, g->n, g->scales, b->down_plane, x.d[g->group],
                                               x.s[g->group], to - from, k->s->sums + row * k->s->stride + from);
    }
  }
}
