/* Which neurons of a sparse block are active. */
#include <math.h>
#include <string.h>

#include "layout.h"
#include "sparse_work.h"

void pi2_decide(const pi2_program *p, const pi2_op *op, int64_t at, int64_t width, float *g, uint8_t *is_active) {
  const pi2_bundles *b = pi2_bundles_of(op);
  const pi2_matrix *m = &op->matrix[0];
  if (m->bias) p->kernels->add(m->bias + at, g, width);
  if (b->gate_type >= 0) {
    for (int64_t j = 0; j < width; j++) is_active[j] = !op->n_matrices || !(g[j] <= 0), g[j] = 0;
    return;
  }
  if (b->up_type < 0 || b->thresholds) p->kernels->activate(pi2_block_of(op)->activation, PI2_NONE, NULL, g, g, width);
  for (int64_t j = 0; j < width; j++) is_active[j] = (uint8_t)pi2_active_at(op, at + j, g[j]);
}

int pi2_pages_of(const pi2_bundles *b, int64_t first, int64_t end, const uint8_t *wanted, int32_t *pages) {
  int n = 0;
  for (int64_t place = first; place < end; place++) {
    if (!wanted[pi2_neuron_at(b, first, place)]) continue;
    const int32_t page = (int32_t)(place / b->per_page);
    if (!n || pages[n - 1] != page) pages[n++] = page;
  }
  return n;
}

int pi2_by_sign(const pi2_op *op) {
  const pi2_bundles *b = pi2_bundles_of(op);
  return (pi2_block_of(op)->activation == PI2_RELU || pi2_block_of(op)->activation == PI2_RELU2) && b->up_type >= 0 &&
         b->gate_type < 0 && !b->thresholds;
}
/* How near neurons were to being active: 1 where the gate was not negative, 0 where it was so by half the root mean
 * square of gates or more, and what lies between in proportion. The most of what is there and of this row. */
static void weigh_near(const float *g, int64_t width, float *near) {
  float squares = 0;
  for (int64_t j = 0; j < width; j++) squares += g[j] * g[j];
  const float scale = squares > 0 ? 2 / sqrtf(squares / (float)width) : 0;
  for (int64_t j = 0; j < width; j++) near[j] = 1 + g[j] * scale > near[j] ? 1 + g[j] * scale : near[j];
}
/* Tells the cache, which keeps what will be used soon: a neuron that was nearly active is active for one of the next
 * tokens more likely than others. */
static void note_near(const pi2_work *k, int64_t first, int64_t end, const uint8_t *wanted, const float *near) {
  const pi2_bundles *b = k->b;
  const int32_t from = (int32_t)(first / b->per_page);
  float part[PI2_CLUSTER + 1] = {0}; /* of a use, by page; the pages that are asked for are used */
  for (int64_t place = first; place < end; place++) {
    const int64_t i = pi2_neuron_at(b, first, place);
    float *page = &part[place / b->per_page - from];
    if (wanted[i])
      *page = 1;
    else if (near[i] > *page)
      *page = near[i];
  }
  pi2_neuron_cache_near(k->cache, b->region, from, (int)((end - 1) / b->per_page - from + 1), part);
}

void pi2_gate_cluster(pi2_work *k, int c) {
  const pi2_program *p = k->p;
  const pi2_op *op = k->op;
  const pi2_bundles *b = k->b;
  const pi2_matrix *m = &op->matrix[0];
  const int64_t first = (int64_t)c * PI2_CLUSTER, end = pi2_cluster_end(k, c);
  const int pass = pi2_pass_rows(m->k);
  float *tile = p->scratch[k->w->index].tile;
  uint8_t wanted[PI2_CLUSTER] = {0};
  float near[PI2_CLUSTER] = {0};
  const int elsewhere = pi2_is_elsewhere(b, c);
  const int weigh = !elsewhere && k->rows <= PI2_REPLICATED && k->cache->n_slots < k->cache->n_pages && pi2_by_sign(op);
  const int streamed = op->n_matrices && pi2_is_streamed(m);
  const int64_t end_block = (end + PI2_ROWS - 1) / PI2_ROWS;
  if (streamed && !pi2_pieces_get(k->r, m, k->w, first / PI2_ROWS, end_block)) return;
  for (int row = 0; row < k->rows; row += pass) {
    const int rows = k->rows - row < pass ? k->rows - row : pass;
    for (int i = 0; i < rows; i++) k->s->n_active[(row + i) * k->s->n_clusters + c] = 0;
    for (int64_t at = first; at < end && !elsewhere; at += PI2_TILE_WIDTH) {
      const int64_t width = end - at < PI2_TILE_WIDTH ? end - at : PI2_TILE_WIDTH,
                    blocks = (width + PI2_ROWS - 1) / PI2_ROWS;
      if (op->n_matrices)
        pi2_multiply(p, m, at / PI2_ROWS, (int)blocks, b->gate_type < 0 ? k->in : &k->predicted, row, rows, tile,
                     PI2_TILE_LD);
      for (int i = 0; i < rows; i++) {
        float *g = tile + i * PI2_TILE_LD, *h = k->s->values + (row + i) * p->hidden + at;
        uint16_t *list = pi2_active(k, row + i, c);
        int n = pi2_n_active(k, row + i, c);
        uint8_t is_active[PI2_TILE_WIDTH];
        pi2_decide(p, op, at, width, g, is_active);
        if (weigh) weigh_near(g, width, near + at - first);
        for (int64_t j = 0; j < width; j++) h[j] = is_active[j] ? g[j] : 0;
        for (int64_t j = 0; j < width; j++) wanted[at - first + j] |= is_active[j];
        for (int64_t j = 0; j < width; j++) {
          list[n] = (uint16_t)(at - first + j);
          n += is_active[j];
        }
        k->s->n_active[(row + i) * k->s->n_clusters + c] = (uint16_t)n;
      }
    }
  }
  if (streamed) pi2_pieces_release(k->r, m, first / PI2_ROWS, end_block, k->rows);
  if (weigh) note_near(k, first, end, wanted, near);
  pi2_cluster *cluster = &k->s->clusters[c];
  cluster->n_pages = pi2_pages_of(b, first, end, wanted, cluster->pages), cluster->asked = 0;
  int64_t bytes = 0;
  for (int64_t i = first, group = -1; i < end; i++) {
    if (!wanted[i - first]) continue;
    bytes += k->b->neuron_bytes + k->b->up_stride;
    if (i / PI2_BLOCK != group) bytes += k->b->down_stride, group = i / PI2_BLOCK;
  }
  atomic_fetch_add_explicit(&k->r->neuron_bytes, bytes, memory_order_relaxed);
  atomic_store(&cluster->pending, 1); /* until all are asked for */
  atomic_store(&cluster->ranges_left, k->s->n_ranges);
  atomic_store(&cluster->stage, PI2_GATED);
  atomic_fetch_add(&k->s->gated, 1);
}
