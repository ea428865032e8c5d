/* Attention of a program: rotation, KV store, scores and values over the sequence's pages. */
#include <string.h>

#include "ops_attention.h"
#include "program.h"

#define TILE_VECTORS 64 /* queries of one tile, at most, but for a single row's */

/* Positions whose attention is one partial sum, for a row at `position`: a page at least, then a quarter of the
 * context, at most LARGEST_SPLIT. For a small model has few KV heads, and a thread for which none is left would idle.
 * It follows from the position alone, so that bits depend neither on threads nor on chunks and batches. */
#define LARGEST_SPLIT 512
static int32_t split_of(int32_t position) {
  int32_t split = PI2_PAGE;
  while (split < LARGEST_SPLIT && position >= 4 * split) split *= 2;
  return split;
}
/* The first position that is split so. */
static int32_t split_begin(int32_t split) { return split > PI2_PAGE ? 2 * split : 0; }
static int64_t most_splits(int64_t context) { return context > 4 * LARGEST_SPLIT ? context / LARGEST_SPLIT + 1 : 4; }

typedef struct {
  int32_t slice, row, rows, kv_head, split, splits;
} unit;
typedef struct { /* of a run */
  unit *units;
  int64_t n_units, n_stores;     /* stores: the first ones, which write a key and a value; where threads assist */
  _Atomic uint32_t *splits_left; /* (max_slots, max KV heads): splits done in this layer */
} run_units;
typedef struct { /* one thread's own */
  _Alignas(64) float *queries;
  float *scores, *acc, *acc2;
} scratch;
typedef struct {                                /* of all operations */
  int64_t n_heads, n_kv_heads, head_dim, group; /* the most of any; head_dim: padded */
  float *partial; /* (max_slots, heads, splits, head_dim + 16) of rows that are split along the context */
  int64_t splits;
  scratch *scratch;
} common;

static const common *common_of(const pi2_program *p) { return p->shared[PI2_ATTENTION]; }

static void norm_and_rotate(const pi2_program *p, const pi2_attention *at, const pi2_norm *norm, float *head,
                            int64_t row) {
  if (norm->weight) p->kernels->rmsnorm(head, norm->weight, norm->offset, norm->eps, head, at->head_dim);
  if (at->rope < 0) return;
  const pi2_rope *rope = &p->ropes[at->rope];
  p->kernels->rope(head, rope->cosine + row * rope->half, rope->sine + row * rope->half, rope->half, rope->interleaved);
}
static pi2_kv cache_of(const pi2_attention *at, int kv_head, const int32_t *pages) {
  pi2_kv kv = at->kv;
  kv.base += kv_head * at->kv_head_stride;
  kv.pages = pages;
  return kv;
}
static void copy_padded(const float *from, float *to, int n, int padded) {
  for (int i = 0; i < n; i++) to[i] = from[i]; /* few: not worth a call */
  for (int i = n; i < padded; i++) to[i] = 0;
}
/* y row: queries of all heads, then keys, then values */
static void store(pi2_run *r, const pi2_attention *at, int64_t row, int kv_head, float *pair) {
  const pi2_program *p = r->program;
  const float *y = p->y + row * p->y_columns + (at->n_heads + kv_head) * at->head_dim;
  pi2_kv kv = cache_of(at, kv_head, r->slices[r->slice_of[row]].pages);
  float *key = pair, *value = pair + kv.head_dim;
  copy_padded(y, key, at->head_dim, kv.head_dim);
  copy_padded(y + at->n_kv_heads * at->head_dim, value, at->head_dim, kv.head_dim);
  norm_and_rotate(p, at, &at->k_norm, key, row);
  p->kernels->kv_store(&kv, r->position[row], key, value);
}

/* Rotated, scaled queries of the unit: vector i*group + g is row i, head g of the group. */
static int gather(pi2_run *r, const pi2_attention *at, const unit *u, float *queries, int32_t *lo, int32_t *hi) {
  const pi2_program *p = r->program;
  const int group = at->n_heads / at->n_kv_heads, hd = at->head_dim, padded = at->kv.head_dim;
  for (int i = 0; i < u->rows; i++) {
    const int64_t row = u->row + i;
    const int32_t position = r->position[row];
    for (int g = 0; g < group; g++) {
      float *q = queries + (i * group + g) * padded;
      copy_padded(p->y + row * p->y_columns + (u->kv_head * group + g) * hd, q, hd, padded);
      norm_and_rotate(p, at, &at->q_norm, q, row);
      p->kernels->scale(q, at->scale, q, hd);
      lo[i * group + g] = at->window && position + 1 > at->window ? position + 1 - at->window : 0;
      hi[i * group + g] = position + 1;
    }
  }
  return u->rows * group;
}

/* acc/sum of the unit's vectors to the attention output, and as integers where the next operation wants it. */
static void finish(pi2_run *r, const pi2_op *op, const unit *u, const float *sum, const float *acc) {
  const pi2_attention *at = op->data;
  const pi2_program *p = r->program;
  const int group = at->n_heads / at->n_kv_heads, hd = at->head_dim, width = group * hd, padded = at->kv.head_dim;
  for (int i = 0; i < u->rows; i++) {
    float *out = p->attention + (u->row + i) * p->attention_columns + u->kv_head * width;
    for (int g = 0; g < group; g++)
      p->kernels->scale(acc + (i * group + g) * padded, 1.0f / sum[i * group + g], out + g * hd, hd);
    if (op->q8_out) {
      pi2_q8 o = pi2_q8_at(p, &p->q8_attention, u->row + i, (int64_t)u->kv_head * width);
      pi2_quantize(p, out, width, &o);
    }
  }
}

/* Result of one split of one row and KV head: [max(group), sum(group), acc(group, head_dim)] */
static float *partial_of(const pi2_program *p, const pi2_attention *at, const unit *u, int split) {
  const common *c = common_of(p);
  const int group = at->n_heads / at->n_kv_heads;
  const int64_t per_head = c->head_dim + 16, per_slice = c->n_heads * c->splits * per_head;
  return c->partial + u->slice * per_slice +
         ((int64_t)u->kv_head * group * c->splits + (int64_t)split * group) * per_head;
}

/* The results of a tile in s->acc: [max(vectors), sum(vectors), acc(vectors, head_dim)]. Returns the vectors. */
static int tile_products(pi2_run *r, const pi2_op *op, const unit *u, const scratch *s) {
  const pi2_program *p = r->program;
  const pi2_attention *at = op->data;
  const int hd = at->kv.head_dim;
  int32_t lo[128], hi[128];
  const int nq = gather(r, at, u, s->queries, lo, hi);
  float *max = s->acc, *sum = max + nq, *acc = sum + nq;
  float *max2 = s->acc2, *sum2 = max2 + nq, *acc2 = sum2 + nq;
  pi2_kv kv = cache_of(at, u->kv_head, r->slices[u->slice].pages);
  const int64_t from = lo[0], to = hi[nq - 1];
  const int64_t split = split_of(r->position[u->row]);
  int fresh = 1;
  for (int64_t begin = from / split * split; begin < to; begin += split) {
    const int64_t first = begin < from ? from : begin, last = begin + split < to ? begin + split : to;
    p->kernels->attend(&kv, s->queries, hd, nq, lo, hi, first, last, at->softcap, fresh ? max : max2,
                       fresh ? sum : sum2, fresh ? acc : acc2, s->scores);
    for (int i = 0; i < nq && !fresh; i++)
      p->kernels->attend_merge(&max[i], &sum[i], acc + i * hd, max2[i], sum2[i], acc2 + i * hd, hd);
    fresh = 0;
  }
  return nq;
}
static void attend_tile(pi2_run *r, const pi2_op *op, const unit *u, const scratch *s) {
  const int nq = tile_products(r, op, u, s);
  finish(r, op, u, s->acc + nq, s->acc + 2 * nq);
}

/* One split of a single row, [max(group), sum(group), acc(group, head_dim)] into `out`. Returns 0 where it lies outside
 * of the window. */
static int split_products(pi2_run *r, const pi2_op *op, const unit *u, const scratch *s, float *out) {
  const pi2_attention *at = op->data;
  const int group = at->n_heads / at->n_kv_heads;
  int32_t lo[128], hi[128]; /* groups beyond 128 are refused when the program is built */
  const int nq = gather(r, at, u, s->queries, lo, hi);
  const int64_t size = split_of(r->position[u->row]), begin = u->split * size, end = begin + size;
  const int64_t first = begin < lo[0] ? lo[0] : begin, last = end < hi[0] ? end : hi[0];
  const pi2_kv kv = cache_of(at, u->kv_head, r->slices[u->slice].pages);
  if (first >= last) return 0;
  r->program->kernels->attend(&kv, s->queries, at->kv.head_dim, nq, lo, hi, first, last, at->softcap, out, out + group,
                              out + 2 * group, s->scores);
  return 1;
}
/* A split is in its place: whoever finishes the row's last one merges them, in order. */
static void close_split(pi2_run *r, const pi2_op *op, const unit *u) {
  const pi2_program *p = r->program;
  const pi2_attention *at = op->data;
  const int group = at->n_heads / at->n_kv_heads, hd = at->kv.head_dim;
  const int32_t position = r->position[u->row],
                low = at->window && position + 1 > at->window ? position + 1 - at->window : 0;
  const int first_split = (int)(low / split_of(position));
  const uint32_t parts = (uint32_t)(u->splits - first_split);
  const run_units *units = r->shared[PI2_ATTENTION];
  _Atomic uint32_t *counter = &units->splits_left[u->slice * common_of(p)->n_kv_heads + u->kv_head];
  if (parts > 1 && atomic_fetch_add(counter, 1) + 1 != parts) return;
  if (parts > 1) atomic_store(counter, 0); /* for the next layer */
  float *whole = partial_of(p, at, u, first_split);
  for (int split = first_split + 1; split < u->splits; split++) {
    float *part = partial_of(p, at, u, split);
    for (int g = 0; g < group; g++)
      p->kernels->attend_merge(&whole[g], &whole[group + g], whole + 2 * group + g * hd, part[g], part[group + g],
                               part + 2 * group + g * hd, hd);
  }
  finish(r, op, u, whole + group, whole + 2 * group);
}
static void attend_split(pi2_run *r, const pi2_op *op, const unit *u, const scratch *s) {
  if (u->split == u->splits - 1) store(r, op->data, u->row, u->kv_head, s->acc2);
  if (split_products(r, op, u, s, partial_of(r->program, op->data, u, u->split))) close_split(r, op, u);
}

/* Behind the last attention nobody wants anything: its keys and values alone. */
static int run_tail(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  const pi2_attention *at = op->data;
  const scratch *s = &common_of(r->program)->scratch[w->index];
  for (uint32_t row; (row = pi2_take(r, index, 0)) < (uint32_t)r->n_rows;)
    for (int h = 0; h < at->n_kv_heads; h++) store(r, at, row, h, s->acc2);
  return 0;
}

static void attend(pi2_run *r, const pi2_op *op, int64_t i, const scratch *s, _Atomic int64_t *taken) {
  const run_units *all = r->shared[PI2_ATTENTION];
  const unit *u = &all->units[i];
  if (u->kv_head >= ((const pi2_attention *)op->data)->n_kv_heads) return;
  pi2_count(taken, 1);
  if (u->splits)
    attend_split(r, op, u, s);
  else
    attend_tile(r, op, u, s);
}
/* The next units that store nothing: of a step of single rows units are alike, so a thread takes neighbours. */
static int next_units(pi2_run *r, int index, int me, uint64_t tag, int64_t *first, int64_t *last) {
  const run_units *all = r->shared[PI2_ATTENTION];
  const int64_t n = all->n_units - all->n_stores;
  if (!r->n_prefill) {
    if (!pi2_take_near(r, index, n, 1, tag == PI2_ANY_TAG ? n : 1, tag, me, first, last)) return 0;
  } else {
    *first = tag == PI2_ANY_TAG ? pi2_take_unit(r, index) : pi2_take_unit_tagged(r, index, tag);
    if (*first < 0 || *first >= n) return 0;
    *last = *first + 1;
  }
  *first += all->n_stores, *last += all->n_stores;
  return 1;
}

static int run(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  const pi2_attention *at = op->data;
  _Atomic int64_t *taken = &r->program->scratch[w->index].taken.attention;
  const scratch *s = &common_of(r->program)->scratch[w->index];
  const run_units *all = r->shared[PI2_ATTENTION];
  if (r->n_prefill) { /* rows of a chunk see each other: all keys first */
    for (uint32_t i; (i = pi2_take(r, index, 0)) < (uint32_t)r->n_prefill;)
      for (int h = 0; h < at->n_kv_heads; h++) store(r, at, r->prefill_row[i], h, s->acc2);
    int stopped = pi2_barrier(w);
    if (stopped) return stopped;
  }
  pi2_stage_open(r, index, w);
  const uint64_t began = pi2_ticks();
  int64_t done = 0;
  for (uint32_t i; all->n_stores && (i = pi2_take(r, index, 2)) < (uint32_t)all->n_stores; done++)
    attend(r, op, i, s, taken);
  pi2_part part;
  for (int64_t first, last; next_units(r, index, w->index, PI2_ANY_TAG, &first, &last); done += last - first)
    for (int64_t i = first; i < last; i++) attend(r, op, i, s, taken);
  for (; pi2_take_over(r, index, w, began, done, &part); done++) attend(r, op, part.first, s, taken);
  return 0;
}
/* Of units that store nothing: a key is written by a member alone. */
static void assist(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  pi2_program *p = r->program;
  const pi2_attention *at = op->data;
  const int group = at->n_heads / at->n_kv_heads;
  const scratch *s = &common_of(p)->scratch[w->index];
  const run_units *all = r->shared[PI2_ATTENTION];
  while (pi2_claim_begin(p, w)) {
    pi2_part part = {.rows = 1};
    if (!next_units(r, index, w->index, pi2_stage_tag(p, w), &part.first, &part.last)) {
      pi2_claim_drop(p, w);
      return;
    }
    const unit u = all->units[part.first];
    pi2_claim_hold(p, w, &part);
    const int is_there = u.kv_head < at->n_kv_heads;
    int found = 0; /* vectors, or whether a split has any positions */
    if (is_there) found = u.splits ? split_products(r, op, &u, s, s->acc) : tile_products(r, op, &u, s);
    if (!pi2_claim_write(p, w)) return;
    if (found && u.splits) {
      memcpy(partial_of(p, at, &u, u.split), s->acc, (size_t)(group * (at->kv.head_dim + 2)) * sizeof *s->acc);
      close_split(r, op, &u);
    } else if (found) {
      finish(r, op, &u, s->acc + found, s->acc + 2 * found);
    }
    if (is_there) pi2_count(&p->scratch[w->index].taken.attention, 1);
    pi2_claim_end(r, index, w);
  }
}

static int tile_rows(const common *c) { /* at most TILE_VECTORS queries, in eights */
  return c->group <= 8 ? 8 : c->group <= 32 ? 2 : 1;
}

/* The most units that the slices of a run make. A single row makes `splits` for each KV head at most. Of a chunk each
 * tile makes one; its last tile may be short, and so may one before each position where splits become larger, of which
 * there are three (2, 4 and 8 pages): no more than four, and so no more than `splits`, beside the full ones. */
static int64_t most_units(const pi2_program *p, const common *c) {
  return c->n_kv_heads * (p->max_rows / tile_rows(c) + p->max_slots * c->splits);
}

/* Units of attention: the same for every layer, with the most KV heads of any; a layer with fewer skips. Single rows
 * are cut along the context, so that a long one is shared; rows of a chunk are cut in tiles, the last (longest) first.
 * Where threads assist, what stores a key comes before all others.
 */
static void post(pi2_run *r) {
  const common *c = common_of(r->program);
  run_units *all = r->shared[PI2_ATTENTION];
  unit *next = all->units;
  const int assisted = r->program->members < r->program->threads;
  for (int i = 0; assisted && i < r->n_slices; i++) {
    const pi2_slice *s = &r->slices[i];
    const int splits = s->start / split_of(s->start) + 1;
    for (int h = 0; !s->skipped && s->count == 1 && h < c->n_kv_heads; h++)
      *next++ = (unit){i, s->row, 1, h, splits - 1, splits};
  }
  all->n_stores = next - all->units;
  for (int i = 0; i < r->n_slices; i++) {
    const pi2_slice *s = &r->slices[i];
    if (s->skipped) continue;
    if (s->count == 1) {
      const int splits = s->start / split_of(s->start) + 1;
      for (int split = splits - 1 - assisted; split >= 0; split--)
        for (int h = 0; h < c->n_kv_heads; h++) *next++ = (unit){i, s->row, 1, h, split, splits};
    } else {
      const int tile = tile_rows(c);
      for (int first, last = s->count; last > 0; last = first) { /* rows of a tile are split alike */
        const int begin = split_begin(split_of(s->start + last - 1)) - s->start;
        first = (last - 1) / tile * tile;
        if (first < begin) first = begin;
        for (int h = 0; h < c->n_kv_heads; h++) *next++ = (unit){i, s->row + first, last - first, h, 0, 0};
      }
    }
  }
  all->n_units = next - all->units;
  memset((void *)all->splits_left, 0, (size_t)(r->program->max_slots * c->n_kv_heads) * 4);
}

static void measure(pi2_program *p, const pi2_op *op) {
  const pi2_attention *at = op->data;
  pi2_widen(&p->attention_columns, (int64_t)at->n_heads * at->head_dim);
}
static void prepare(pi2_program *p, pi2_arena *a) {
  common c = {.splits = most_splits(p->context)};
  for (int i = 0; i < p->n_ops; i++) {
    if (p->ops[i].kind != PI2_ATTENTION) continue;
    const pi2_attention *at = p->ops[i].data;
    pi2_widen(&c.n_heads, at->n_heads);
    pi2_widen(&c.n_kv_heads, at->n_kv_heads);
    pi2_widen(&c.head_dim, at->kv.head_dim);
    pi2_widen(&c.group, at->n_heads / at->n_kv_heads);
  }
  c.partial = pi2_arena_take(a, p->max_slots * c.n_heads * c.splits * (c.head_dim + 16), 4);
  const int64_t vectors = c.group > TILE_VECTORS ? c.group : TILE_VECTORS;
  c.scratch = pi2_arena_take(a, p->threads, sizeof *c.scratch);
  for (int t = 0; t < p->threads; t++) {
    const scratch s = {.queries = pi2_arena_take(a, vectors * c.head_dim, 4),
                       .scores = pi2_arena_take(a, vectors * PI2_PAGE, 4),
                       .acc = pi2_arena_take(a, vectors * (c.head_dim + 2), 4),
                       .acc2 = pi2_arena_take(a, vectors * (c.head_dim + 2), 4)};
    if (a->base) c.scratch[t] = s;
  }
  for (int i = 0; i < PI2_QUEUE; i++) {
    const run_units all = {.units = pi2_arena_take(a, most_units(p, &c), sizeof *all.units),
                           .splits_left = pi2_arena_take(a, p->max_slots * c.n_kv_heads, 4)};
    p->runs[i].shared[PI2_ATTENTION] = pi2_keep(a, &all, sizeof all);
  }
  p->shared[PI2_ATTENTION] = pi2_keep(a, &c, sizeof c);
}

const pi2_op_class pi2_attention_class = {.name = "attention",
                                          .data_bytes = sizeof(pi2_attention),
                                          .measure = measure,
                                          .prepare = prepare,
                                          .post = post,
                                          .run = run,
                                          .run_tail = run_tail,
                                          .assist = assist};
