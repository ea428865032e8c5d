/* The sparse feed-forward block of a program; sparse.h says how it goes. */
#include <math.h>
#include <string.h>

#include "layout.h"
#include "ops_experts.h"
#include "program.h"
#include "sparse.h"

#define AHEAD 512     /* bytes of what comes next that are prefetched while something else is computed */
#define PI2_GUESSES 8 /* blocks that are looked ahead for at once */
#define PI2_DOUBTFUL                                                                                            \
  0.1f /* of the mean of the gates that are positive: those below are foreseen in vain about as often as not */
#define WAIT_NS 20000000 /* after which a thread that waits looks whether the run was stopped */

typedef struct {             /* one thread's own */
  _Alignas(64) pi2_q8 ahead; /* (PI2_REPLICATED, dim) what the next sparse block may be computed on */
  float *ahead_floats;       /* the same; behind it what a predictor's first matrix makes of it */
  int16_t *arranged;         /* activations in the order of single neurons' rows, and their scales */
  float *arranged_d, *arranged_s;
  int turn; /* which of the two sparse blocks' places is next */
} scratch;
typedef struct {
  pi2_sparse *sparse[2]; /* the second for steps of few rows */
  scratch *scratch;      /* (threads) */
} common;

static const common *common_of(const pi2_program *p) { return p->shared[PI2_SPARSE]; }
static const pi2_neuron_block *data_of(const pi2_op *op) { return op->data; }
static const pi2_bundles *bundles_of(const pi2_op *op) { return data_of(op)->bundles; }
/* What the block that runs next works on: one that follows another begins while the places of that one are put in
 * order, so they take turns where there are two. */
static pi2_sparse *place_of(const pi2_run *run, int turn) {
  return common_of(run->program)->sparse[run->n_rows <= PI2_REPLICATED ? turn : 0];
}

/* What the block is computed on, the same for all threads. */
typedef struct {
  pi2_run *r;
  const pi2_program *p;
  const pi2_op *op;
  const pi2_bundles *b;
  pi2_sparse *s;
  pi2_neuron_cache *cache;
  pi2_worker *w;
  scratch *scratch;
  const pi2_input *in;
  pi2_input predicted;                   /* of a predictor's second matrix: the operation before has put it there */
  int index, rows, n_clusters, arranged; /* arranged: row whose activations are in the scratch */
} block;

static int64_t cluster_end(const block *k, int c) {
  const int64_t end = (int64_t)(c + 1) * PI2_CLUSTER;
  return end < k->b->neurons ? end : k->b->neurons;
}
/* Whether a cluster unit computes it. */
static int is_elsewhere(const pi2_bundles *b, int c) { return b->elsewhere && b->elsewhere[c]; }
static uint16_t *active(const block *k, int row, int c) { return k->s->active + row * k->p->hidden + c * PI2_CLUSTER; }
static int n_active(const block *k, int row, int c) { return k->s->n_active[row * k->s->n_clusters + c]; }

/* Whether a neuron is active, by its gate. With ReLU a gate that is not positive gives zero, and the others are active;
 * of other activations all are. With thresholds, g is the activated gate: lossy, but for 0. NaN is always active: it
 * must not get lost. */
static inline int active_at(const pi2_op *op, int64_t neuron, float g) {
  if (bundles_of(op)->thresholds) return !(fabsf(g) <= bundles_of(op)->thresholds[neuron]);
  return (data_of(op)->activation != PI2_RELU && data_of(op)->activation != PI2_RELU2) || !(g <= 0);
}
/* From the deciding matrix' products of neurons [at, at + width) to what decides, in place, and to which are active.
 * Where gates are in the bundles, those are only neurons that may be active, whose gates are computed once they are
 * read: those for which a predictor's value is positive, and all where there is none. */
static void decide(const pi2_program *p, const pi2_op *op, int64_t at, int64_t width, float *g, uint8_t *is_active) {
  const pi2_bundles *b = bundles_of(op);
  const pi2_matrix *m = &op->matrix[0];
  if (m->bias) p->kernels->add(m->bias + at, g, width);
  if (b->gate_type >= 0) {
    for (int64_t j = 0; j < width; j++) is_active[j] = !op->n_matrices || !(g[j] <= 0), g[j] = 0;
    return;
  }
  if (b->up_type < 0 || b->thresholds) p->kernels->activate(data_of(op)->activation, PI2_NONE, NULL, g, g, width);
  for (int64_t j = 0; j < width; j++) is_active[j] = (uint8_t)active_at(op, at + j, g[j]);
}

/* The neuron of a cluster, counted from its first, whose bundle lies at a place. */
static inline int64_t neuron_at(const pi2_bundles *b, int64_t first, int64_t place) {
  return b->order ? b->order[place] : place - first;
}
/* Pages of a cluster's neurons that are wanted, ascending. Returns how many. */
static int pages_of(const pi2_bundles *b, int64_t first, int64_t end, const uint8_t *wanted, int32_t *pages) {
  int n = 0;
  for (int64_t place = first; place < end; place++) {
    if (!wanted[neuron_at(b, first, place)]) continue;
    const int32_t page = (int32_t)(place / b->per_page);
    if (!n || pages[n - 1] != page) pages[n++] = page;
  }
  return n;
}

/* Whether what `decide` leaves in the tile are gates, of which the positive ones are active. */
static int by_sign(const pi2_op *op) {
  const pi2_bundles *b = bundles_of(op);
  return (data_of(op)->activation == PI2_RELU || data_of(op)->activation == PI2_RELU2) && b->up_type >= 0 &&
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
static void note_near(const block *k, int64_t first, int64_t end, const uint8_t *wanted, const float *near) {
  const pi2_bundles *b = k->b;
  const int32_t from = (int32_t)(first / b->per_page);
  float part[PI2_CLUSTER + 1] = {0}; /* of a use, by page; the pages that are asked for are used */
  for (int64_t place = first; place < end; place++) {
    const int64_t i = neuron_at(b, first, place);
    float *page = &part[place / b->per_page - from];
    if (wanted[i])
      *page = 1;
    else if (near[i] > *page)
      *page = near[i];
  }
  pi2_neuron_cache_near(k->cache, b->region, from, (int)((end - 1) / b->per_page - from + 1), part);
}

/* The deciding matrix of a cluster: which are active, for which rows, on which pages. Nothing, where it cannot be read.
 */
static void gate_cluster(block *k, int c) {
  const pi2_program *p = k->p;
  const pi2_op *op = k->op;
  const pi2_bundles *b = k->b;
  const pi2_matrix *m = &op->matrix[0];
  const int64_t first = (int64_t)c * PI2_CLUSTER, end = cluster_end(k, c);
  const int pass = pi2_pass_rows(m->k);
  float *tile = p->scratch[k->w->index].tile;
  uint8_t wanted[PI2_CLUSTER] = {0};
  float near[PI2_CLUSTER] = {0};
  const int elsewhere = is_elsewhere(b, c);
  const int weigh = !elsewhere && k->rows <= PI2_REPLICATED && k->cache->n_slots < k->cache->n_pages && by_sign(op);
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
        uint16_t *list = active(k, row + i, c);
        int n = n_active(k, row + i, c);
        uint8_t is_active[PI2_TILE_WIDTH];
        decide(p, op, at, width, g, is_active);
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
  cluster->n_pages = pages_of(b, first, end, wanted, cluster->pages), cluster->asked = 0;
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

/* -- looking ahead: the stream changes little from block to block, so that what it is now tells mostly which neurons of
 * the next block will be active. Threads that would only wait for flash compute its gates on it, and their neurons are
 * read while this block ends and attention runs. The true gates decide; what was foreseen in vain cost a read. */

/* What the next blocks' gates are computed on: x as it is now, normalised. It is their true input where they are
 * experts of the same mixture (`exact`); else int8 will do, which takes less time. Returns whether there is any. */
static int prepare_ahead(const block *k, const pi2_op *next, int exact, pi2_input *in) {
  const pi2_program *p = k->p;
  scratch *scratch = k->scratch;
  const int rows = pi2_rows(k->r, next), predicted = bundles_of(next)->gate_type >= 0;
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
/* What the predictor's first matrix makes of that, once. */
static void reduce_ahead(const block *k, const pi2_op *next, pi2_input *in) {
  const pi2_matrix *first = &next[-1].matrix[0];
  float *reduced = k->scratch->ahead_floats + PI2_REPLICATED * k->p->dim;
  if (bundles_of(next)->gate_type < 0 || in->floats == reduced) return;
  pi2_multiply(k->p, first, 0, (int)((first->rows + PI2_ROWS - 1) / PI2_ROWS), in, 0, k->rows, reduced, k->p->dim);
  in->floats = reduced;
}

/* Blocks whose gates may be computed in vain. */
typedef struct {
  int n;
  const pi2_op *op[PI2_GUESSES];
  pi2_input in;
} guesses;

/* The experts that the next mixture's router would choose now, of a single row. */
static void guess_experts(const block *k, guesses *g) {
  const pi2_program *p = k->p;
  const pi2_op *at = &p->ops[data_of(k->op)->next_route], *router = at - 1;
  const pi2_route *route = at->data;
  const int wanted = route->n_used < PI2_GUESSES ? route->n_used : PI2_GUESSES;
  const int64_t blocks = (route->n_experts + PI2_ROWS - 1) / PI2_ROWS;
  float *logits = p->scratch[k->w->index].tile;
  int32_t chosen[PI2_GUESSES];
  if (at[1].kind != PI2_SPARSE || router->streamed || blocks > PI2_TILE_ROWS || k->r->n_rows > 1) return;
  pi2_op first = at[1];
  first.expert = -1; /* nobody has chosen it yet: its input is the row */
  if (!prepare_ahead(k, &first, 0, &g->in)) return;
  pi2_multiply(p, &router->matrix[0], 0, (int)blocks, &g->in, 0, 1, logits, blocks * PI2_ROWS);
  pi2_largest(logits, route->n_experts, wanted, chosen);
  for (int i = 0; i < wanted; i++) g->op[g->n++] = at + 1 + chosen[i];
}
/* What to look ahead for, if reading is worth it. */
static guesses guess(const block *k) {
  const pi2_program *p = k->p;
  const pi2_neuron_cache *c = k->cache;
  guesses g = {0};
  if (p->pipeline != PI2_PIPELINE_CLUSTER || k->r->n_rows > PI2_REPLICATED) return g;
  if (c->used < c->n_slots || c->n_slots == c->n_pages) return g; /* all is there, or has room */
  if (k->op->expert >= 0) {
    if (data_of(k->op)->next_route) guess_experts(k, &g);
  } else if (data_of(k->op)->next_sparse) {
    g.op[0] = &p->ops[data_of(k->op)->next_sparse];
    g.n = prepare_ahead(k, g.op[0], 0, &g.in);
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
  const float least = n ? PI2_DOUBTFUL * sum / (float)n : 0;
  for (int64_t j = 0; j < width; j++) is_active[j] &= !(g[j] < least);
}
static void foresee_cluster(const block *k, const pi2_op *next, int c, const pi2_input *in) {
  const pi2_program *p = k->p;
  const pi2_matrix *m = &next->matrix[0];
  const int64_t first = (int64_t)c * PI2_CLUSTER, end = cluster_end(k, c);
  float *tile = p->scratch[k->w->index].tile;
  int32_t pages[PI2_CLUSTER];
  uint8_t wanted[PI2_CLUSTER];
  if (is_elsewhere(bundles_of(next), c)) return;
  for (int64_t at = first; at < end; at += PI2_TILE_WIDTH) {
    const int64_t width = end - at < PI2_TILE_WIDTH ? end - at : PI2_TILE_WIDTH;
    pi2_multiply(p, m, at / PI2_ROWS, (int)((width + PI2_ROWS - 1) / PI2_ROWS), in, 0, k->rows, tile, PI2_TILE_LD);
    uint8_t is_active[PI2_REPLICATED][PI2_TILE_WIDTH] = {{0}};
    for (int row = 0; row < k->rows; row++) {
      decide(p, next, at, width, tile + row * PI2_TILE_LD, is_active[row]);
      if (by_sign(next)) drop_doubtful(tile + row * PI2_TILE_LD, width, is_active[row]);
    }
    for (int64_t j = 0; j < width; j++) {
      int any = 0;
      for (int row = 0; row < k->rows; row++) any |= is_active[row][j];
      wanted[at - first + j] = (uint8_t)any;
    }
  }
  pi2_neuron_cache_foresee(k->cache, bundles_of(next)->region, pages,
                           pages_of(bundles_of(next), first, end, wanted, pages));
}

/* Asks for what clusters need, in order, so that the oldest is never short of what a younger one has pinned. Returns
 * whether anything changed. */
static int ask(block *k) {
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

/* Where the neurons of a cluster lie, whose pages are all there. */
static void find_neurons(const block *k, const pi2_cluster *cluster, int64_t first, int64_t end) {
  const pi2_bundles *b = k->b;
  for (int i = 0; i < cluster->n_pages; i++) {
    const uint8_t *at = pi2_neuron_cache_at(k->cache, b->region, cluster->pages[i]);
    const int64_t from = cluster->pages[i] * b->per_page;
    for (int64_t j = from < first ? first : from; j < end && j < from + b->per_page; j++)
      k->s->places[first + neuron_at(b, first, j)] = at + (j - from) * b->neuron_bytes;
  }
}
static void prefetch(const uint8_t *p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i);
}

/* Gates of a cluster's neurons that are in the bundles; only the active neurons stay. */
static void compute_gates(block *k, int c, int row) {
  const pi2_program *p = k->p;
  const pi2_bundles *b = k->b;
  const int64_t first = (int64_t)c * PI2_CLUSTER;
  const uint8_t *const *places = k->s->places + first;
  scratch *scratch = k->scratch;
  uint16_t *list = active(k, row, c);
  float *h = k->s->values + row * p->hidden + first;
  const int n = n_active(k, row, c);
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
    if (b->thresholds) p->kernels->activate(data_of(k->op)->activation, PI2_NONE, NULL, gate, gate, m);
    for (int i = 0; i < m; i++)
      if (active_at(k->op, first + list[at + i], gate[i])) {
        h[list[at + i]] = gate[i];
        list[kept++] = list[at + i];
      }
  }
  k->s->n_active[row * k->s->n_clusters + c] = (uint16_t)kept;
}

/* The row's activations as the kernels of single neurons want them. */
static void arrange(block *k, int row) {
  scratch *scratch = k->scratch;
  if (k->arranged == row) return;
  const pi2_q8 x = pi2_q8_row(&k->in->q8, row);
  pi2_arrange(&x, k->p->wide, k->p->dim, scratch->arranged, scratch->arranged_d, scratch->arranged_s);
  k->arranged = row;
}
static int in_two_phases(const block *k) { return k->cache->regions[k->b->region].head_bytes != 0; }

/* The first of two phases is there: gates of a cluster's neurons, and the rest of those that are active is asked for.
 */
static void choose(block *k, int c) {
  pi2_cluster *cluster = &k->s->clusters[c];
  const int64_t first = (int64_t)c * PI2_CLUSTER, end = cluster_end(k, c);
  uint8_t is_active[PI2_CLUSTER] = {0};
  int32_t pages[PI2_CLUSTER];
  find_neurons(k, cluster, first, end);
  for (int row = 0; row < k->rows; row++) {
    if (!n_active(k, row, c)) continue;
    arrange(k, row);
    compute_gates(k, c, row);
    for (int i = 0; i < n_active(k, row, c); i++) is_active[active(k, row, c)[i]] = 1;
  }
  const int n = pages_of(k->b, first, end, is_active, pages);
  atomic_store(&cluster->pending, 1);
  pi2_neuron_cache_complete(k->cache, k->b->region, pages, n, &cluster->pending);
  atomic_store(&cluster->stage, PI2_CHOSEN);
  atomic_fetch_sub(&cluster->pending, 1);
}

/* Rows of up of a cluster's neurons, and with them the hidden values, as integers. `chosen`: its gates are computed. */
static void compute_up(block *k, int c, int chosen) {
  const pi2_program *p = k->p;
  const pi2_bundles *b = k->b;
  const int64_t first = (int64_t)c * PI2_CLUSTER, width = cluster_end(k, c) - first;
  const uint8_t *const *places = k->s->places + first;
  scratch *scratch = k->scratch;
  const int activation = b->thresholds ? PI2_NONE : data_of(k->op)->activation; /* thresholds are of activated gates */
  find_neurons(k, &k->s->clusters[c], first, first + width);
  for (int row = 0; row < k->rows; row++) {
    const uint16_t *list = active(k, row, c);
    float *h = k->s->values + row * p->hidden + first;
    if (!n_active(k, row, c)) continue;
    if (b->up_type >= 0) arrange(k, row);
    if (b->gate_type >= 0 && !chosen) compute_gates(k, c, row);
    const int n = n_active(k, row, c);
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
      p->kernels->activate(activation, data_of(k->op)->up_activation, gate, up, up, m);
      for (int i = 0; i < m; i++) h[list[at + i]] = up[i];
    }
    pi2_q8 q8 = pi2_q8_at(p, &p->q8_hidden, row, first);
    pi2_quantize_both(p, data_of(k->op)->mixed_down, h, width, &q8);
  }
}

typedef struct { /* columns of down of one group of 32 neurons */
  int group, n;
  const uint8_t *column[PI2_BLOCK], *scales;
  int16_t q[PI2_BLOCK];
} columns;

/* The next group with any that is not zero, from *at on; its first lines are on their way to the cache then. */
static int next_group(const block *k, int c, int row, int *at, int64_t from, int64_t lines, columns *out) {
  static const uint8_t stored[4] = {0, 2, 1, 3};
  const pi2_bundles *b = k->b;
  const int n = n_active(k, row, c);
  const uint16_t *list = active(k, row, c);
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
/* Columns of down of a cluster's neurons, for rows [from, to) of the stream. */
static void add_down(const block *k, int c, int64_t from, int64_t to) {
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
/* The block's result for these rows of the stream. */
static void close_range(const block *k, int64_t from, int64_t to) {
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
static int advance_range(block *k) {
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
      add_down(k, next, from, to);
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
static int take_cluster(block *k) {
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
    if (stage == PI2_ASKED && in_two_phases(k)) {
      choose(k, c);
    } else {
      compute_up(k, c, stage == PI2_CHOSEN);
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

static block block_of(pi2_run *r, const pi2_op *op, int index, pi2_worker *w, int turn, const pi2_input *in) {
  const pi2_program *p = r->program;
  return (block){.r = r,
                 .p = p,
                 .op = op,
                 .b = bundles_of(op),
                 .s = place_of(r, turn),
                 .cache = p->neurons,
                 .w = w,
                 .scratch = &common_of(p)->scratch[w->index],
                 .in = in,
                 .predicted = {.floats = p->reduced, .ld = p->reduced_columns},
                 .index = index,
                 .rows = pi2_rows(r, op),
                 .arranged = -1,
                 .n_clusters = (int)((bundles_of(op)->neurons + PI2_CLUSTER - 1) / PI2_CLUSTER)};
}
/* The next expert of the same mixture, for a few rows: its gates can be computed while this one waits. NULL: there is
 * none, or its gates are in the bundles. */
static const pi2_op *next_expert(const pi2_run *r, const pi2_op *op) {
  const pi2_program *p = r->program;
  int next = op->expert < 0 || p->pipeline != PI2_PIPELINE_CLUSTER || r->n_rows > PI2_REPLICATED
                 ? 0
                 : data_of(op)->next_sparse;
  while (next && !pi2_rows(r, &p->ops[next])) next = data_of(&p->ops[next])->next_sparse;
  return next && bundles_of(&p->ops[next])->gate_type < 0 ? &p->ops[next] : NULL;
}
/* The next gates of a block, if any are left. */
static int take_gates(block *k) {
  if (atomic_load(&k->r->cursors[4 * k->index + 1]) >= (uint32_t)k->n_clusters) return 0;
  const uint32_t c = pi2_take(k->r, k->index, 1);
  if (c >= (uint32_t)k->n_clusters) return 0;
  gate_cluster(k, (int)c);
  return 1;
}

static int run(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  const pi2_program *p = r->program;
  const int turn = common_of(p)->scratch[w->index].turn;
  int stopped = 0;
  pi2_input in = pi2_prepare(r, op, index, w, p->dim, pi2_row_of(r, op), pi2_rows(r, op), PI2_AS_WORDS,
                             &stopped); /* that is what single neurons meet */
  if (stopped) return stopped;
  block k = block_of(r, op, index, w, turn, &in), next = {0};
  pi2_sparse *s = k.s;
  const pi2_op *expert = next_expert(r, op);
  pi2_input its = {0};
  const int sure = expert && prepare_ahead(&k, expert, 1, &its);
  guesses ahead = {0};
  if (sure)
    next = block_of(r, expert, (int)(expert - p->ops), w, !turn, &its);
  else
    ahead = guess(&k);
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
          reduce_ahead(&k, ahead.op[0], &ahead.in);
          foresee_cluster(&k, ahead.op[c / k.n_clusters], (int)c % k.n_clusters, &ahead.in);
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
  int *turn = &common_of(r->program)->scratch[w->index].turn;
  if (w->index == 0) reset(place_of(r, *turn)); /* barriers away from its next use, */
  *turn = !*turn;
  if (op->expert >= 0 && r->n_rows > PI2_REPLICATED && !stopped) stopped = pi2_barrier(w); /* but for this case */
  return stopped;
}

static void begin(pi2_run *r, pi2_worker *w) {
  const pi2_program *p = r->program;
  common_of(p)->scratch[w->index].turn = 0;
  if (w->index) return;
  pi2_neuron_cache_step(p->neurons);
  r->before = pi2_neuron_cache_counts(p->neurons);
}
static void end(pi2_run *r, int stopped) {
  const pi2_program *p = r->program;
  if (stopped) {
    for (int i = 0; i < 2; i++) reset(common_of(p)->sparse[i]);
    pi2_neuron_cache_abandon(p->neurons);
  }
  r->used = pi2_neuron_cache_counts(p->neurons);
}

static void measure(pi2_program *p, const pi2_op *op) {
  pi2_widen(&p->hidden, bundles_of(op)->neurons);
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
  common c = {.scratch = pi2_arena_take(a, p->threads, sizeof *c.scratch)};
  link_blocks(p);
  c.sparse[0] = take_place(p, a, p->max_rows, p->hidden_floats);
  c.sparse[1] = take_place(p, a, PI2_REPLICATED, NULL);
  const int64_t arranged = pi2_align(p->dim, 512);
  for (int t = 0; t < p->threads; t++) {
    const scratch s = {.ahead = pi2_take_q8(p, a, PI2_REPLICATED, p->dim, p->mixed),
                       .ahead_floats = pi2_arena_take(a, 2 * PI2_REPLICATED * p->dim, sizeof *s.ahead_floats),
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
                                       .end = end};
