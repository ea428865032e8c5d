/* Looking ahead: the stream changes little from block to block, so that what it is now tells mostly which neurons of
 * the next block will be active. Threads that would only wait for flash compute its gates on it, and their neurons are
 * read while this block ends and attention runs. The true gates decide; what was foreseen in vain cost a read. */
#include <math.h>
#include <string.h>

#include "ops_experts.h"
#include "sparse_work.h"

#define DOUBTFUL                                                                                                \
  0.1f /* of the mean of the gates that are positive: those below are foreseen in vain about as often as not */

int pi2_prepare_ahead(const pi2_work *k, const pi2_op *next, int exact, pi2_input *in) {
  const pi2_program *p = k->p;
  pi2_sparse_scratch *scratch = k->scratch;
  const int rows = pi2_rows(k->r, next), predicted = pi2_bundles_of(next)->gate_type >= 0;
  const int32_t *row_of = pi2_row_of(k->r, next);
  const pi2_kernels *kernels = p->kernels;
  if (!next->matrix[0].data || !next->norm.weight || pi2_is_float(next->matrix[0].type) != predicted) return 0;
  if (predicted && pi2_align(next[-1].matrix[0].rows, PI2_ROWS) > p->dim) return 0;
  for (int row = 0; row < rows; row++) {
    const pi2_q8 q8 = pi2_q8_row(&scratch->ahead, row);
    float *floats = scratch->ahead_floats + row * p->dim;
    kernels->rmsnorm(p->x + (row_of ? row_of[row] : row) * p->dim, next->norm.weight, next->norm.offset, next->norm.eps,
                     floats, p->dim);
    if (!predicted && exact)
      pi2_quantize_both(p, next->mixed, floats, p->dim, &q8);
    else if (!predicted)
      kernels->quantize8(floats, p->dim, &q8);
  }
  pi2_q8 ahead = scratch->ahead;
  if (!next->mixed || !exact) ahead.high = NULL;
  *in = (pi2_input){.q8 = ahead, .floats = scratch->ahead_floats, .ld = p->dim, .narrow = !exact};
  return 1;
}
void pi2_reduce_ahead(const pi2_work *k, const pi2_op *next, pi2_input *in) {
  const pi2_matrix *first = &next[-1].matrix[0];
  float *reduced = k->scratch->ahead_floats + PI2_REPLICATED * k->p->dim;
  if (pi2_bundles_of(next)->gate_type < 0 || in->floats == reduced) return;
  pi2_multiply(k->p, first, 0, (int)((first->rows + PI2_ROWS - 1) / PI2_ROWS), in, 0, k->rows, reduced, k->p->dim);
  in->floats = reduced;
}

/* The experts that the next mixture's router would choose now, of a single row. */
static void guess_experts(const pi2_work *k, pi2_guesses *g) {
  const pi2_program *p = k->p;
  const pi2_op *at = &p->ops[pi2_block_of(k->op)->next_route], *router = at - 1;
  const pi2_route *route = at->data;
  const int wanted = route->n_used < PI2_GUESSES ? route->n_used : PI2_GUESSES;
  const int64_t blocks = (route->n_experts + PI2_ROWS - 1) / PI2_ROWS;
  float *logits = p->scratch[k->w->index].tile;
  int32_t chosen[PI2_GUESSES];
  if (at[1].kind != PI2_SPARSE || router->streamed || blocks > PI2_TILE_ROWS || k->r->n_rows > 1) return;
  pi2_op first = at[1];
  first.expert = -1; /* nobody has chosen it yet: its input is the row */
  if (!pi2_prepare_ahead(k, &first, 0, &g->in)) return;
  pi2_multiply(p, &router->matrix[0], 0, (int)blocks, &g->in, 0, 1, logits, blocks * PI2_ROWS);
  pi2_largest(logits, route->n_experts, wanted, chosen);
  for (int i = 0; i < wanted; i++) g->op[g->n++] = at + 1 + chosen[i];
}
pi2_guesses pi2_guess(const pi2_work *k) {
  const pi2_program *p = k->p;
  const pi2_neuron_cache *c = k->cache;
  pi2_guesses g = {0};
  if (p->pipeline != PI2_PIPELINE_CLUSTER || k->r->n_rows > PI2_REPLICATED) return g;
  if (c->used < c->n_slots || c->n_slots == c->n_pages) return g; /* all pages are cached, or slots are free */
  if (k->op->expert >= 0) {
    if (pi2_block_of(k->op)->next_route) guess_experts(k, &g);
  } else if (pi2_block_of(k->op)->next_sparse) {
    g.op[0] = &p->ops[pi2_block_of(k->op)->next_sparse];
    g.n = pi2_prepare_ahead(k, g.op[0], 0, &g.in);
  }
  return g;
}
/* Of neurons whose gates are positive by a guess: those that hardly are do not count. Of the synthetic 7B model, where
 * reads are what a token waits for, 4 % of all reads are in vain without this, and half a percent with it. */
static void drop_doubtful(const float *g, int64_t width, uint8_t *is_active) {
  float sum = 0;
  int n = 0;
  for (int64_t j = 0; j < width; j++)
    if (is_active[j]) sum += g[j], n++;
  const float least = n ? DOUBTFUL * sum / (float)n : 0;
  for (int64_t j = 0; j < width; j++) is_active[j] &= !(g[j] < least);
}
void pi2_foresee_cluster(const pi2_work *k, const pi2_op *next, int c, const pi2_input *in) {
  const pi2_program *p = k->p;
  const pi2_matrix *m = &next->matrix[0];
  const int64_t first = (int64_t)c * PI2_CLUSTER, end = pi2_cluster_end(k, c);
  float *tile = p->scratch[k->w->index].tile;
  int32_t pages[PI2_CLUSTER];
  uint8_t wanted[PI2_CLUSTER];
  if (pi2_is_elsewhere(pi2_bundles_of(next), c)) return;
  for (int64_t at = first; at < end; at += PI2_TILE_WIDTH) {
    const int64_t width = end - at < PI2_TILE_WIDTH ? end - at : PI2_TILE_WIDTH;
    pi2_multiply(p, m, at / PI2_ROWS, (int)((width + PI2_ROWS - 1) / PI2_ROWS), in, 0, k->rows, tile, PI2_TILE_LD);
    uint8_t is_active[PI2_REPLICATED][PI2_TILE_WIDTH] = {{0}};
    for (int row = 0; row < k->rows; row++) {
      pi2_decide(p, next, at, width, tile + row * PI2_TILE_LD, is_active[row]);
      if (pi2_by_sign(next)) drop_doubtful(tile + row * PI2_TILE_LD, width, is_active[row]);
    }
    for (int64_t j = 0; j < width; j++) {
      int any = 0;
      for (int row = 0; row < k->rows; row++) any |= is_active[row][j];
      wanted[at - first + j] = (uint8_t)any;
    }
  }
  pi2_neuron_cache_foresee(k->cache, pi2_bundles_of(next)->region, pages,
                           pi2_pages_of(pi2_bundles_of(next), first, end, wanted, pages));
}
