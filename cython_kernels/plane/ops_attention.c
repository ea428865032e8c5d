/* Attention of a program: rotation, KV store, scores and values over the sequence's pages. */
#include <string.h>

#include "program.h"

static void norm_and_rotate(const pi2_program *p, const pi2_op *op, const pi2_norm *norm, float *head, int64_t row) {
  if (norm->weight) p->kernels->rmsnorm(head, norm->weight, norm->offset, norm->eps, head, op->head_dim);
  if (op->rope < 0) return;
  const pi2_rope *rope = &p->ropes[op->rope];
  p->kernels->rope(head, rope->cosine + row * rope->half, rope->sine + row * rope->half, rope->half, rope->interleaved);
}
static pi2_kv cache_of(const pi2_op *op, int kv_head, const int32_t *pages) {
  pi2_kv kv = op->kv;
  kv.base += kv_head * op->kv_head_stride;
  kv.pages = pages;
  return kv;
}
static void copy_padded(const float *from, float *to, int n, int padded) {
  for (int i = 0; i < n; i++) to[i] = from[i]; /* few: not worth a call */
  for (int i = n; i < padded; i++) to[i] = 0;
}
/* y row: queries of all heads, then keys, then values */
static void store(pi2_run *r, const pi2_op *op, int64_t row, int kv_head, float *scratch) {
  const pi2_program *p = r->program;
  const float *y = p->y + row * p->y_columns + (op->n_heads + kv_head) * op->head_dim;
  pi2_kv kv = cache_of(op, kv_head, r->slices[r->slice_of[row]].pages);
  float *key = scratch, *value = scratch + kv.head_dim;
  copy_padded(y, key, op->head_dim, kv.head_dim);
  copy_padded(y + op->n_kv_heads * op->head_dim, value, op->head_dim, kv.head_dim);
  norm_and_rotate(p, op, &op->k_norm, key, row);
  p->kernels->kv_store(&kv, r->position[row], key, value);
}

/* Rotated, scaled queries of the unit: vector i*group + g is row i, head g of the group. */
static int gather(pi2_run *r, const pi2_op *op, const pi2_unit *u, float *queries, int32_t *lo, int32_t *hi) {
  const pi2_program *p = r->program;
  const int group = op->n_heads / op->n_kv_heads, hd = op->head_dim, padded = op->kv.head_dim;
  for (int i = 0; i < u->rows; i++) {
    const int64_t row = u->row + i;
    const int32_t position = r->position[row];
    for (int g = 0; g < group; g++) {
      float *q = queries + (i * group + g) * padded;
      copy_padded(p->y + row * p->y_columns + (u->kv_head * group + g) * hd, q, hd, padded);
      norm_and_rotate(p, op, &op->q_norm, q, row);
      p->kernels->scale(q, op->scale, q, hd);
      lo[i * group + g] = op->window && position + 1 > op->window ? position + 1 - op->window : 0;
      hi[i * group + g] = position + 1;
    }
  }
  return u->rows * group;
}

/* acc/sum of the unit's vectors to the attention output, and as integers where the next operation wants it. */
static void finish(pi2_run *r, const pi2_op *op, const pi2_unit *u, const float *sum, const float *acc) {
  const pi2_program *p = r->program;
  const int group = op->n_heads / op->n_kv_heads, hd = op->head_dim, width = group * hd, padded = op->kv.head_dim;
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
static float *partial_of(const pi2_program *p, const pi2_op *op, const pi2_unit *u, int split) {
  const int group = op->n_heads / op->n_kv_heads;
  const int64_t per_head = p->max_head_dim + 16, per_slice = p->max_heads * p->partial_splits * per_head;
  return p->partial + u->slice * per_slice +
         ((int64_t)u->kv_head * group * p->partial_splits + (int64_t)split * group) * per_head;
}

static void attend_tile(pi2_run *r, const pi2_op *op, const pi2_unit *u, pi2_scratch *s) {
  const pi2_program *p = r->program;
  const int hd = op->kv.head_dim;
  int32_t lo[128], hi[128];
  const int nq = gather(r, op, u, s->queries, lo, hi);
  float *max = s->acc, *sum = max + nq, *acc = sum + nq;
  float *max2 = s->acc2, *sum2 = max2 + nq, *acc2 = sum2 + nq;
  pi2_kv kv = cache_of(op, u->kv_head, r->slices[u->slice].pages);
  const int64_t from = lo[0], to = hi[nq - 1];
  const int64_t split = pi2_split(r->position[u->row]);
  int fresh = 1;
  for (int64_t begin = from / split * split; begin < to; begin += split) {
    const int64_t first = begin < from ? from : begin, last = begin + split < to ? begin + split : to;
    p->kernels->attend(&kv, s->queries, hd, nq, lo, hi, first, last, op->softcap, fresh ? max : max2,
                       fresh ? sum : sum2, fresh ? acc : acc2, s->scores);
    for (int i = 0; i < nq && !fresh; i++)
      p->kernels->attend_merge(&max[i], &sum[i], acc + i * hd, max2[i], sum2[i], acc2 + i * hd, hd);
    fresh = 0;
  }
  finish(r, op, u, sum, acc);
}

/* One split of a single row; whoever finishes the row's last split merges them, in order. */
static void attend_split(pi2_run *r, const pi2_op *op, const pi2_unit *u, pi2_scratch *s) {
  const pi2_program *p = r->program;
  const int group = op->n_heads / op->n_kv_heads, hd = op->kv.head_dim;
  int32_t lo[128], hi[128]; /* groups beyond 128 are refused when the program is built */
  const int nq = gather(r, op, u, s->queries, lo, hi);
  const int64_t size = pi2_split(r->position[u->row]);
  const int first_split = (int)(lo[0] / size);
  if (u->split < first_split) return; /* outside the window */
  pi2_kv kv = cache_of(op, u->kv_head, r->slices[u->slice].pages);
  if (u->split == u->splits - 1) store(r, op, u->row, u->kv_head, s->acc2);
  const int64_t begin = u->split * size, end = begin + size;
  float *out = partial_of(p, op, u, u->split);
  p->kernels->attend(&kv, s->queries, hd, nq, lo, hi, begin < lo[0] ? lo[0] : begin, end < hi[0] ? end : hi[0],
                     op->softcap, out, out + group, out + 2 * group, s->scores);
  const uint32_t parts = (uint32_t)(u->splits - first_split);
  _Atomic uint32_t *counter = &r->splits_left[u->slice * p->max_kv_heads + u->kv_head];
  if (parts > 1 && atomic_fetch_add(counter, 1) + 1 != parts) return;
  if (parts > 1) atomic_store(counter, 0); /* for the next layer */
  float *whole = partial_of(p, op, u, first_split);
  for (int split = first_split + 1; split < u->splits; split++) {
    float *part = partial_of(p, op, u, split);
    for (int g = 0; g < group; g++)
      p->kernels->attend_merge(&whole[g], &whole[group + g], whole + 2 * group + g * hd, part[g], part[group + g],
                               part + 2 * group + g * hd, hd);
  }
  finish(r, op, u, whole + group, whole + 2 * group);
}

void pi2_op_store(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  for (uint32_t row; (row = pi2_take(r, index, 0)) < (uint32_t)r->n_rows;)
    for (int h = 0; h < op->n_kv_heads; h++) store(r, op, row, h, r->program->scratch[w->index].acc2);
}

int pi2_op_attention(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  const pi2_program *p = r->program;
  pi2_scratch *s = &p->scratch[w->index];
  if (r->n_prefill) { /* rows of a chunk see each other: all keys first */
    for (uint32_t i; (i = pi2_take(r, index, 0)) < (uint32_t)r->n_prefill;)
      for (int h = 0; h < op->n_kv_heads; h++) store(r, op, r->prefill_row[i], h, s->acc2);
    int stopped = pi2_barrier(w);
    if (stopped) return stopped;
  }
  if (!r->n_prefill) { /* units that are alike */
    for (int64_t first, last; pi2_take_near(r, index, r->n_units, 1, w->index, &first, &last);) {
      pi2_count(&s->taken.attention, last - first);
      for (int64_t i = first; i < last; i++)
        if (r->units[i].kv_head < op->n_kv_heads) attend_split(r, op, &r->units[i], s);
    }
    return 0;
  }
  for (uint32_t i; (i = pi2_take(r, index, 1)) < (uint32_t)r->n_units;) {
    const pi2_unit *u = &r->units[i];
    if (u->kv_head >= op->n_kv_heads) continue;
    pi2_count(&s->taken.attention, 1);
    if (u->splits)
      attend_split(r, op, u, s);
    else
      attend_tile(r, op, u, s);
  }
  return 0;
}
