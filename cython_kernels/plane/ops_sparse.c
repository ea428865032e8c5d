/* The sparse feed-forward block of a program; sparse.h says how it goes. */
#include <string.h>

#include "layout.h"
#include "sparse_work.h"

#define WAIT_NS 20000000 /* after which a thread that waits looks whether the run was stopped */

/* What the block that runs next works on: one that follows another begins while the places of that one are put in
 * order, so they take turns where there are two. */
static pi2_sparse *place_of(const pi2_run *run, int turn) {
  return pi2_sparse_of(run->program)->sparse[run->n_rows <= PI2_REPLICATED ? turn : 0];
}

/* Asks for what clusters need, in order, so that the oldest is never short of what a younger one has pinned. Returns
 * whether anything changed. */
static int ask(pi2_work *k) {
  pi2_sparse *s = k->s;
  if (k->p->pipeline != PI2_PIPELINE_CLUSTER && atomic_load(&s->gated) < k->n_clusters) return 0;
  const int at = atomic_load(&s->next_asked);
  if (at == k->n_clusters || atomic_load(&s->clusters[at].stage) != PI2_GATED || atomic_exchange(&s->asking, 1))
    return 0;
  int changed = 0;
  for (int c; (c = atomic_load(&s->next_asked)) < k->n_clusters;) {
    pi2_cluster *cluster = &s->clusters[c];
    if (atomic_load(&cluster->stage) != PI2_GATED) break;
    const int got = pi2_neuron_cache_ask(k->cache, k->b->region, cluster->pages + cluster->asked,
                                         cluster->n_pages - cluster->asked, &cluster->pending);
    cluster->asked += got;
    changed |= got > 0;
    if (cluster->asked < cluster->n_pages) { /* no room: when something is released, somebody comes again */
      atomic_store(&s->crowded, 1);
      break;
    }
    atomic_fetch_sub(&cluster->pending, 1);
    atomic_store(&cluster->stage, PI2_ASKED);
    atomic_store(&s->next_asked, c + 1);
    changed = 1;
  }
  atomic_store(&s->asking, 0);
  if (changed) pi2_neuron_cache_signal(k->cache); /* some have all they need */
  return changed;
}
/* The block's result for these rows of the stream. */
static void close_range(const pi2_work *k, int64_t from, int64_t to) {
  const pi2_program *p = k->p;
  const int64_t width = (to < p->dim ? to : p->dim) - from;
  for (int row = 0; row < k->rows; row++) {
    float *t = k->s->sums + row * k->s->stride + from;
    if (k->b->down_bias) p->kernels->add(k->b->down_bias + from, t, width);
    pi2_put(k->r, k->op, row, from, t, width);
  }
}
static int64_t range_start(const pi2_sparse *s, int range) { return s->stride / 128 * range / s->n_ranges * 128; }

/* Takes a range of the stream's rows as far as clusters are computed. Returns whether there was any. */
static int advance_range(pi2_work *k) {
  pi2_sparse *s = k->s;
  if (atomic_load(&s->arrived) < k->p->threads) return 0;
  for (int i = 0; i < s->n_ranges; i++) {
    const int range = (i + k->w->index * s->n_ranges / k->p->threads) % s->n_ranges;
    int next = atomic_load(&s->range[range].next);
    if (next == k->n_clusters || atomic_load(&s->clusters[next].stage) != PI2_COMPUTED) continue;
    if (atomic_exchange(&s->range[range].busy, 1)) continue;
    const int64_t from = range_start(s, range), to = range_start(s, range + 1);
    next = atomic_load(&s->range[range].next);
    if (next == 0)
      for (int row = 0; row < k->rows; row++) memset(s->sums + row * s->stride + from, 0, (size_t)(to - from) * 4);
    int changed = 0;
    for (; next < k->n_clusters && atomic_load(&s->clusters[next].stage) == PI2_COMPUTED; next++, changed = 1) {
      pi2_add_down(k, next, from, to);
      pi2_cluster *cluster = &s->clusters[next];
      if (atomic_fetch_sub(&cluster->ranges_left, 1) == 1)
        pi2_neuron_cache_release(k->cache, k->b->region, cluster->pages, cluster->n_pages);
    }
    if (changed && next == k->n_clusters) {
      close_range(k, from, to);
      atomic_fetch_add(&k->r->cursors[4 * k->index + 2], 1); /* ranges that are finished */
    }
    atomic_store(&s->range[range].next, next);
    atomic_store(&s->range[range].busy, 0);
    if (changed) return 1;
  }
  return 0;
}

/* Rows of up of any cluster that is in memory. Returns whether there was one. */
static int take_cluster(pi2_work *k) {
  pi2_sparse *s = k->s;
  const int asked = atomic_load(&s->next_asked);
  if (k->p->pipeline == PI2_PIPELINE_NONE && !atomic_load(&s->crowded)) {
    if (asked < k->n_clusters) return 0;
    for (int c = 0; c < asked; c++)
      if (atomic_load(&s->clusters[c].pending)) return 0;
  }
  for (int c = 0; c < asked; c++) {
    pi2_cluster *cluster = &s->clusters[c];
    int32_t stage = atomic_load(&cluster->stage);
    if ((stage != PI2_ASKED && stage != PI2_CHOSEN) || atomic_load(&cluster->pending)) continue;
    if (!atomic_compare_exchange_strong(&cluster->stage, &stage, PI2_TAKEN)) continue;
    if (stage == PI2_ASKED && pi2_in_two_phases(k)) {
      pi2_choose(k, c);
    } else {
      pi2_compute_up(k, c, stage == PI2_CHOSEN);
      atomic_store(&cluster->stage, PI2_COMPUTED);
      atomic_fetch_add(&s->computed, 1);
    }
    pi2_neuron_cache_signal(k->cache);
    return 1;
  }
  return 0;
}

/* Back to where a block begins: behind the barrier that ends one. */
static void reset(pi2_sparse *s) {
  for (int c = 0; c < s->n_clusters; c++) atomic_store(&s->clusters[c].stage, PI2_IDLE);
  for (int i = 0; i < PI2_RANGES; i++) atomic_store(&s->range[i].next, 0), atomic_store(&s->range[i].busy, 0);
  atomic_store(&s->arrived, 0);
  atomic_store(&s->asking, 0);
  atomic_store(&s->next_asked, 0);
  atomic_store(&s->gated, 0);
  atomic_store(&s->computed, 0);
  atomic_store(&s->crowded, 0);
}

static pi2_work work_of(pi2_run *r, const pi2_op *op, int index, pi2_worker *w, int turn, const pi2_input *in) {
  const pi2_program *p = r->program;
  return (pi2_work){.r = r,
                    .p = p,
                    .op = op,
                    .b = pi2_bundles_of(op),
                    .s = place_of(r, turn),
                    .cache = p->neurons,
                    .w = w,
                    .scratch = &pi2_sparse_of(p)->scratch[w->index],
                    .in = in,
                    .predicted = {.floats = p->reduced, .ld = p->reduced_columns},
                    .index = index,
                    .rows = pi2_rows(r, op),
                    .arranged = -1,
                    .n_clusters = (int)((pi2_bundles_of(op)->neurons + PI2_CLUSTER - 1) / PI2_CLUSTER)};
}
/* The next expert of the same mixture, for a few rows: its gates can be computed while this one waits. NULL: there is
 * none, or its gates are in the bundles. */
static const pi2_op *next_expert(const pi2_run *r, const pi2_op *op) {
  const pi2_program *p = r->program;
  int next = op->expert < 0 || p->pipeline != PI2_PIPELINE_CLUSTER || r->n_rows > PI2_REPLICATED
                 ? 0
                 : pi2_block_of(op)->next_sparse;
  while (next && !pi2_rows(r, &p->ops[next])) next = pi2_block_of(&p->ops[next])->next_sparse;
  return next && pi2_bundles_of(&p->ops[next])->gate_type < 0 ? &p->ops[next] : NULL;
}
/* The next gates of a block, if any are left. */
static int take_gates(pi2_work *k) {
  if (atomic_load(&k->r->cursors[4 * k->index + 1]) >= (uint32_t)k->n_clusters) return 0;
  const uint32_t c = pi2_take(k->r, k->index, 1);
  if (c >= (uint32_t)k->n_clusters) return 0;
  pi2_gate_cluster(k, (int)c);
  return 1;
}

static int run(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  const pi2_program *p = r->program;
  const int turn = pi2_sparse_of(p)->scratch[w->index].turn;
  int stopped = 0;
  pi2_input in = pi2_prepare(r, op, index, w, p->dim, pi2_row_of(r, op), pi2_rows(r, op), PI2_AS_WORDS,
                             &stopped); /* that is what single neurons meet */
  if (stopped) return stopped;
  pi2_work k = work_of(r, op, index, w, turn, &in), next = {0};
  pi2_sparse *s = k.s;
  const pi2_op *expert = next_expert(r, op);
  pi2_input its = {0};
  const int sure = expert && pi2_prepare_ahead(&k, expert, 1, &its);
  pi2_guesses ahead = {0};
  if (sure)
    next = work_of(r, expert, (int)(expert - p->ops), w, !turn, &its);
  else
    ahead = pi2_guess(&k);
  if (w->index == 0) pi2_neuron_cache_block(k.cache);
  if (atomic_fetch_add(&s->arrived, 1) + 1 == p->threads) pi2_neuron_cache_signal(k.cache);
  _Atomic uint32_t *ranges_done = &r->cursors[4 * index + 2];
  while (atomic_load(ranges_done) < (uint32_t)s->n_ranges) {
    if (atomic_load_explicit(&r->stop, memory_order_relaxed)) return 0; /* the closing barrier tells everybody */
    const uint32_t seen = atomic_load(&k.cache->event);
    const int error = atomic_load(&k.cache->error);
    if (error) {
      r->error = error;
      atomic_store(&r->stop, 1);
      return 0;
    }
    ask(&k);
    if (take_gates(&k)) continue; /* first of all: what it needs can be on its way while the rest is computed */
    if (take_cluster(&k)) {
      pi2_count(&p->scratch[w->index].taken.clusters, 1);
      continue;
    }
    if (p->pipeline == PI2_PIPELINE_CLUSTER || atomic_load(&s->computed) == k.n_clusters || atomic_load(&s->crowded))
      if (advance_range(&k)) continue;
    if (ask(&k)) continue;
    if (atomic_load(&s->next_asked) == k.n_clusters) { /* it can end, whatever the next one pins */
      if (sure && (ask(&next) || take_gates(&next))) continue;
      if (ahead.n && atomic_load(&k.cache->in_flight)) {
        const uint32_t c = pi2_take(r, index, 3);
        if (c < (uint32_t)(ahead.n * k.n_clusters)) {
          pi2_reduce_ahead(&k, ahead.op[0], &ahead.in);
          pi2_foresee_cluster(&k, ahead.op[c / k.n_clusters], (int)c % k.n_clusters, &ahead.in);
          continue;
        }
      }
    }
    const uint64_t begin = pi2_ticks();
    const int64_t begin_ns = pi2_now_ns();
    const int reading = atomic_load(&k.cache->in_flight);
    pi2_neuron_cache_wait(k.cache, seen, WAIT_NS);
    if (reading) atomic_fetch_add_explicit(&k.cache->stall_ns, pi2_now_ns() - begin_ns, memory_order_relaxed);
    pi2_note_wait(r, w, begin, pi2_ticks());
  }
  if (p->threads > 1) pi2_neuron_cache_signal(k.cache); /* whoever waits leaves, too */
  return 0;
}

static int done(pi2_run *r, const pi2_op *op, pi2_worker *w, int stopped) {
  int *turn = &pi2_sparse_of(r->program)->scratch[w->index].turn;
  if (w->index == 0) reset(place_of(r, *turn)); /* barriers away from its next use, */
  *turn = !*turn;
  if (op->expert >= 0 && r->n_rows > PI2_REPLICATED && !stopped) stopped = pi2_barrier(w); /* but for this case */
  return stopped;
}

static void begin(pi2_run *r, pi2_worker *w) {
  const pi2_program *p = r->program;
  pi2_sparse_of(p)->scratch[w->index].turn = 0;
  if (w->index) return;
  pi2_neuron_cache_step(p->neurons);
  r->before = pi2_neuron_cache_counts(p->neurons);
}
static void end(pi2_run *r, int stopped) {
  const pi2_program *p = r->program;
  if (stopped) {
    for (int i = 0; i < 2; i++) reset(pi2_sparse_of(p)->sparse[i]);
    pi2_neuron_cache_abandon(p->neurons);
  }
  r->used = pi2_neuron_cache_counts(p->neurons);
}

static void measure(pi2_program *p, const pi2_op *op) {
  pi2_widen(&p->hidden, pi2_bundles_of(op)->neurons);
  if (op->sink == PI2_TO_Y) pi2_widen(&p->y_columns, p->dim);
}
/* Buffers of one block, for the largest there is. `values` NULL: of its own. */
static pi2_sparse *take_place(pi2_program *p, pi2_arena *a, int64_t rows, float *values) {
  pi2_sparse *s = pi2_arena_take(a, 1, sizeof *s);
  const int64_t n_clusters = (p->hidden + PI2_CLUSTER - 1) / PI2_CLUSTER, stride = pi2_align(p->dim, 128);
  int64_t n_ranges = stride / 128 < 2 * p->threads ? stride / 128 : 2 * p->threads;
  if (n_ranges > PI2_RANGES) n_ranges = PI2_RANGES;
  pi2_cluster *clusters = pi2_arena_take(a, n_clusters, sizeof *clusters);
  uint16_t *active = pi2_take_rows(p, a, rows, p->hidden * (int64_t)sizeof *active);
  uint16_t *n_active = pi2_arena_take(a, rows * n_clusters, sizeof *n_active);
  int32_t *pages = pi2_arena_take(a, p->hidden, sizeof *pages);
  const uint8_t **places = pi2_arena_take(a, p->hidden, sizeof *places);
  if (!values) values = pi2_arena_take(a, rows * p->hidden, sizeof *values);
  float *sums = pi2_take_rows(p, a, rows, stride * (int64_t)sizeof *sums);
  if (!a->base) return NULL;
  s->n_clusters = (int32_t)n_clusters, s->n_ranges = (int32_t)n_ranges, s->stride = stride;
  s->clusters = clusters, s->active = active, s->n_active = n_active, s->pages = pages, s->places = places;
  s->values = values, s->sums = sums;
  for (int c = 0; c < n_clusters; c++) clusters[c].pages = pages + c * PI2_CLUSTER;
  reset(s);
  return s;
}
/* Which blocks follow which. */
static void link_blocks(pi2_program *p) {
  for (int i = p->n_ops - 1, next = 0, route = 0; i > 0; i--) {
    if (p->ops[i].kind == PI2_ROUTE) next = 0, route = i;
    if (p->ops[i].kind != PI2_SPARSE) continue;
    pi2_neuron_block *data = p->ops[i].data;
    data->next_sparse = next, data->next_route = route, next = i;
  }
}
static void prepare(pi2_program *p, pi2_arena *a) {
  pi2_sparse_common c = {.scratch = pi2_arena_take(a, p->threads, sizeof *c.scratch)};
  link_blocks(p);
  c.sparse[0] = take_place(p, a, p->max_rows, p->hidden_floats);
  c.sparse[1] = take_place(p, a, PI2_REPLICATED, NULL);
  const int64_t arranged = pi2_align(p->dim, 512);
  for (int t = 0; t < p->threads; t++) {
    const pi2_sparse_scratch s = {.ahead = pi2_take_q8(p, a, PI2_REPLICATED, p->dim, p->mixed),
                                  .ahead_floats =
                                      pi2_arena_take(a, 2 * PI2_REPLICATED * p->dim, sizeof *s.ahead_floats),
                                  .arranged = pi2_arena_take(a, arranged, sizeof *s.arranged),
                                  .arranged_d = pi2_arena_take(a, arranged / PI2_BLOCK, sizeof *s.arranged_d),
                                  .arranged_s = pi2_arena_take(a, arranged / PI2_BLOCK, sizeof *s.arranged_s)};
    if (a->base) c.scratch[t] = s;
  }
  for (int i = 0; p->traced && i < PI2_QUEUE; i++) {
    pi2_run *r = &p->runs[i];
    r->waits = pi2_arena_take(a, (int64_t)p->threads * PI2_WAITS, sizeof *r->waits);
    r->n_waits = pi2_arena_take(a, p->threads, sizeof *r->n_waits);
  }
  p->shared[PI2_SPARSE] = pi2_keep(a, &c, sizeof c);
}

const pi2_op_class pi2_sparse_class = {.name = "ffn",
                                       .data_bytes = sizeof(pi2_neuron_block),
                                       .measure = measure,
                                       .prepare = prepare,
                                       .begin = begin,
                                       .run = run,
                                       .done = done,
                                       .end = end,
                                       .on_all_threads = 1};
