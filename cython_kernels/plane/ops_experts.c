/* Mixtures of experts: which rows go to which, and the pages of matrices that are not all in memory.
 *
 * An expert is a feed-forward block behind a router, and its operations are those of any such block, on the rows that
 * chose it: gathered on the way in, added times the expert's weight on the way out. Experts follow each other in
 * ascending order, so that a row's sum has one order, whoever computes it. An operation whose expert nobody chose is
 * skipped. */
#include <string.h>

#include "elementary.h"
#include "ops_experts.h"
#include "program.h"

#define WAIT_NS 20000000 /* after which a thread that waits looks whether the run was stopped */

void pi2_largest(const float *value, int n, int wanted, int32_t *chosen) {
  for (int i = 0; i < n; i++) { /* insertion, for few are wanted */
    int place = i < wanted ? i : wanted;
    for (; place > 0 && value[i] > value[chosen[place - 1]]; place--)
      if (place < wanted) chosen[place] = chosen[place - 1];
    if (place < wanted) chosen[place] = i;
  }
}

/* The experts of one row and their weights: those of the largest logits, of equal ones those of the lower experts, and
 * behind them the shared one. Makes room for their outputs where the logits were. */
static void choose(const pi2_program *p, const pi2_route *op, int64_t row) {
  float *logit = p->y + row * p->y_columns;
  const int64_t at = row * (op->n_used + op->shared);
  int32_t *chosen = p->routing.chosen + at;
  float *weight = p->routing.share + at, sum = 0;
  pi2_largest(logit, op->n_experts, op->n_used, chosen);
  const float largest = logit[chosen[0]];
  if (op->normalized)
    for (int i = 0; i < op->n_used; i++) sum += pi2_expf(logit[chosen[i]] - largest);
  else
    for (int i = 0; i < op->n_experts; i++) sum += pi2_expf(logit[i] - largest);
  for (int i = 0; i < op->n_used; i++) weight[i] = pi2_expf(logit[chosen[i]] - largest) / sum;
  if (op->shared) {
    chosen[op->n_used] = op->n_experts;
    weight[op->n_used] = 1.0f / (1.0f + pi2_expf(-logit[op->n_experts]));
  }
  memset(logit, 0, (size_t)p->dim * sizeof *logit);
}

/* The rows of every expert, in their order, each with the expert's weight. */
static void sort_by_expert(const pi2_run *r, const pi2_route *op) {
  const pi2_program *p = r->program;
  const pi2_routing *g = &p->routing;
  const int used = op->n_used + op->shared;
  memset(g->count, 0, (size_t)g->n_experts * sizeof *g->count);
  for (int row = 0; row < r->n_rows; row++)
    for (int i = 0; i < used; i++) {
      const int64_t expert = g->chosen[row * used + i], at = expert * p->max_rows + g->count[expert]++;
      g->row[at] = row;
      g->weight[at] = g->share[row * used + i];
    }
}

/* Starts reading what the chosen experts need, in the order of its use: while one computes, the next is on its way. */
static void foresee(const pi2_program *p, int index) {
  pi2_neuron_cache_block(p->clusters);
  for (int i = index + 1; p->ops[i].expert >= 0; i++) {
    if (!p->routing.count[p->ops[i].expert]) continue;
    for (int j = 0; j < p->ops[i].n_matrices; j++) {
      const pi2_matrix *m = &p->ops[i].matrix[j];
      if (pi2_is_paged(m)) pi2_neuron_cache_foresee(p->clusters, m->region, p->page_numbers, (int)pi2_parts(m));
    }
  }
}

static int run(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  const pi2_program *p = r->program;
  const pi2_route *route = op->data;
  if (r->n_rows > PI2_REPLICATED) {
    for (uint32_t row; (row = pi2_take(r, index, 0)) < (uint32_t)r->n_rows;) choose(p, route, row);
    const int stopped = pi2_barrier(w);
    if (stopped) return stopped;
  }
  if (w->index) return 0;
  if (r->n_rows <= PI2_REPLICATED)
    for (int row = 0; row < r->n_rows; row++) choose(p, route, row);
  sort_by_expert(r, route);
  if (p->clusters) foresee(p, index);
  return 0;
}

static void prepare(pi2_program *p, pi2_arena *a) {
  int64_t experts = 0, used = 0;
  for (int i = 0; i < p->n_ops; i++) {
    if (p->ops[i].kind != PI2_ROUTE) continue;
    const pi2_route *route = p->ops[i].data;
    pi2_widen(&experts, route->n_experts + route->shared);
    pi2_widen(&used, route->n_used + route->shared);
  }
  p->routing = (pi2_routing){.n_experts = (int)experts,
                             .count = pi2_arena_take(a, experts, sizeof *p->routing.count),
                             .row = pi2_arena_take(a, experts * p->max_rows, sizeof *p->routing.row),
                             .weight = pi2_arena_take(a, experts * p->max_rows, sizeof *p->routing.weight),
                             .chosen = pi2_arena_take(a, p->max_rows * used, sizeof *p->routing.chosen),
                             .share = pi2_arena_take(a, p->max_rows * used, sizeof *p->routing.share)};
}

const pi2_op_class pi2_route_class = {.name = "route", .data_bytes = sizeof(pi2_route), .prepare = prepare, .run = run};

void pi2_pages_prepare(pi2_program *p, pi2_arena *a) {
  if (!p->max_pages) return;
  p->page_table = pi2_arena_take(a, PI2_MATRICES * p->max_pages, sizeof *p->page_table);
  p->page_numbers = pi2_arena_take(a, p->max_pages, sizeof *p->page_numbers);
  for (int i = 0; i < p->n_ops; i++)
    for (int j = 0; j < p->ops[i].n_matrices; j++) p->ops[i].matrix[j].page = p->page_table + j * p->max_pages;
  for (int64_t i = 0; a->base && i < p->max_pages; i++) p->page_numbers[i] = (int32_t)i;
}
void pi2_pages_begin(pi2_run *r) {
  pi2_neuron_cache *c = r->program->clusters;
  pi2_neuron_cache_step(c);
  r->cluster_bytes = -atomic_load(&c->bytes);
}
void pi2_pages_end(pi2_run *r, int stopped) {
  pi2_neuron_cache *c = r->program->clusters;
  if (stopped) pi2_neuron_cache_abandon(c);
  r->cluster_bytes += atomic_load(&c->bytes);
}

/* Pins the pages of a matrix and waits for them. Returns 0 when reading failed or the run was stopped. */
static int get_matrix(pi2_run *r, const pi2_matrix *m) {
  const pi2_program *p = r->program;
  pi2_neuron_cache *c = p->clusters;
  const int n = (int)pi2_parts(m);
  _Atomic int32_t pending = 0;
  for (int asked = 0;;) {
    const uint32_t seen = atomic_load(&c->event);
    const int error = atomic_load(&c->error);
    if (error) r->error = error;
    if (error || atomic_load(&r->stop)) break;
    asked += pi2_neuron_cache_ask(c, m->region, p->page_numbers + asked, n - asked, &pending);
    if (asked == n && !atomic_load(&pending)) {
      for (int i = 0; i < n; i++) m->page[i] = pi2_neuron_cache_at(c, m->region, i);
      return 1;
    }
    pi2_neuron_cache_wait(c, seen, WAIT_NS);
  }
  pi2_neuron_cache_abandon(c); /* `pending` goes with this call */
  return 0;
}
int pi2_pages_get(pi2_run *r, const pi2_op *op, pi2_worker *w) {
  const int64_t begin = pi2_now_ns();
  if (w->index == 0) {
    for (int j = 0; j < op->n_matrices; j++)
      if (pi2_is_paged(&op->matrix[j]) && !get_matrix(r, &op->matrix[j])) {
        atomic_store(&r->stop, 1);
        break;
      }
    atomic_fetch_add_explicit(&r->program->clusters->stall_ns, pi2_now_ns() - begin, memory_order_relaxed);
  }
  return pi2_barrier(w);
}
void pi2_pages_release(const pi2_program *p, const pi2_op *op) {
  for (int j = 0; j < op->n_matrices; j++)
    if (pi2_is_paged(&op->matrix[j]))
      pi2_neuron_cache_release(p->clusters, op->matrix[j].region, p->page_numbers, (int)pi2_parts(&op->matrix[j]));
}
