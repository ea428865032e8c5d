#include "parts.h"

#include "sparse.h"

/* One row: normalised into `floats` where the operation has a norm, and as int8 where it needs that. */
static void prepare_row(const pi2_program *p, const pi2_op *op, const float *x, int64_t k, pi2_q8 *q8, float *floats,
                        int needs_q8) {
  if (op->norm.weight) {
    p->kernels->rmsnorm(x, op->norm.weight, op->norm.offset, op->norm.eps, floats, k);
    x = floats;
  }
  if (!needs_q8) return;
  /* hidden values by clusters, for a sparse block knows no more of them at once */
  const int64_t part = op->source == PI2_FROM_HIDDEN && op->mixed ? PI2_CLUSTER : k;
  for (int64_t at = 0; at < k; at += part) {
    const pi2_q8 o = pi2_q8_at(p, q8, 0, at);
    pi2_quantize_both(p, op->mixed, x + at, k - at < part ? k - at : part, &o);
  }
}

pi2_input pi2_prepare(pi2_run *r, const pi2_op *op, int index, pi2_worker *w, int64_t k, const int32_t *row_of,
                      int rows, int form, int *stopped) {
  const pi2_program *p = r->program;
  pi2_scratch *s = &p->scratch[w->index];
  const float *source = op->source == PI2_FROM_X           ? p->x
                        : op->source == PI2_FROM_ATTENTION ? p->attention
                                                           : p->hidden_floats;
  const int64_t ld = op->source == PI2_FROM_X           ? p->dim
                     : op->source == PI2_FROM_ATTENTION ? p->attention_columns
                                                        : p->hidden;
  const int normed = op->norm.weight != NULL, needs_q8 = form != PI2_AS_FLOATS;
  pi2_input in = {.floats = source, .ld = ld};
  if (!normed && !needs_q8) return in;
  if (!normed && op->q8_in) { /* quantised where it was made */
    in.q8 = op->source == PI2_FROM_ATTENTION ? p->q8_attention : p->q8_hidden;
    in.q8.high = NULL; /* in parts of rows, so in one form */
    return in;
  }
  if (rows <= PI2_REPLICATED) {
    for (int i = 0; i < rows; i++) {
      pi2_q8 q8 = pi2_q8_row(&s->q8, i);
      prepare_row(p, op, source + (row_of ? row_of[i] : i) * ld, k, &q8, s->floats + i * p->max_k, needs_q8);
    }
    in.q8 = s->q8;
    if (!op->mixed) in.q8.high = NULL;
    if (normed) in.floats = s->floats, in.ld = p->max_k;
    return in;
  }
  pi2_q8 prepared = op->source == PI2_FROM_HIDDEN ? p->q8_hidden : p->q8_prepared;
  if (op->mixed && p->kernels->bytes_alone && form != PI2_AS_WORDS) prepared.q = NULL;
  if (w->index < p->members) { /* where a thread assists, these have done it */
    for (uint32_t i; (i = pi2_take(r, index, 0)) < (uint32_t)rows;) {
      pi2_q8 q8 = pi2_q8_row(&prepared, i);
      prepare_row(p, op, source + (row_of ? row_of[i] : (int64_t)i) * ld, k, &q8, p->prepared + i * k, needs_q8);
    }
    *stopped = pi2_barrier(w);
  }
  in.q8 = prepared;
  if (!op->mixed) in.q8.high = NULL;
  if (normed) in.floats = p->prepared, in.ld = k;
  return in;
}

int pi2_form_of(const pi2_op *op) {
  for (int i = 0; i < op->n_matrices; i++)
    if (!pi2_is_float(op->matrix[i].type)) return PI2_AS_INTEGERS;
  return PI2_AS_FLOATS;
}

#define STREAMED_BLOCKS 8 /* that a thread takes of what has just been read */

/* The next part of `blocks` row blocks, times `rows` rows. Rows of one pass: parts along the weights, ever smaller, or
 * in their order where they are streamed. More: tiles of row blocks and a pass of rows, in an order that keeps the
 * weights of a tile in the cache. `tag`: of a thread that assists, whose parts are a tile at most; else PI2_ANY_TAG. */
static int next_part(pi2_run *r, const pi2_op *op, int index, const pi2_worker *w, int rows, int64_t blocks, int64_t k,
                     int step, uint64_t tag, pi2_part *out) {
  const int pass = pi2_pass_rows(k), passes = (rows + pass - 1) / pass, assists = tag != PI2_ANY_TAG;
  if (passes <= 1) {
    out->row = 0;
    out->rows = rows;
    if (op->streamed) {
      out->first = (int64_t)pi2_take(r, index, 1) * STREAMED_BLOCKS;
      out->last = out->first + STREAMED_BLOCKS < blocks ? out->first + STREAMED_BLOCKS : blocks;
      return out->first < blocks;
    }
    if (rows >= PI2_PANEL_ROWS) step = 8; /* of a tile, so that shares stay even */
    return pi2_take_near(r, index, blocks, step, assists ? PI2_TILE_BLOCKS : blocks, tag, w->index, &out->first,
                         &out->last);
  }
  const int64_t unit = assists ? pi2_take_unit_tagged(r, index, tag) : pi2_take_unit(r, index);
  out->first = unit / passes * op->tile_blocks;
  out->last = out->first + op->tile_blocks < blocks ? out->first + op->tile_blocks : blocks;
  out->row = (int)(unit % passes) * pass;
  out->rows = rows - out->row < pass ? rows - out->row : pass;
  return unit >= 0 && out->first < blocks;
}

int pi2_take_part(pi2_run *r, const pi2_op *op, int index, const pi2_worker *w, int rows, int64_t blocks, int64_t k,
                  int step, pi2_progress *at, pi2_part *out) {
  if (!at->began) {
    pi2_stage_open(r, index, w);
    at->began = pi2_ticks();
  }
  if (!next_part(r, op, index, w, rows, blocks, k, step, PI2_ANY_TAG, out) &&
      !pi2_take_over(r, index, w, at->began, at->done, out))
    return 0;
  at->done += (out->last - out->first) * out->rows;
  pi2_count(&r->program->scratch[w->index].taken.row_blocks, out->last - out->first);
  return 1;
}
int pi2_claim_part(pi2_run *r, const pi2_op *op, int index, const pi2_worker *w, int rows, int64_t blocks, int64_t k,
                   int step, pi2_part *out) {
  pi2_program *p = r->program;
  if (rows < 1 || !pi2_claim_begin(p, w)) return 0;
  if (!next_part(r, op, index, w, rows, blocks, k, step, pi2_stage_tag(p, w), out)) {
    pi2_claim_drop(p, w);
    return 0;
  }
  pi2_claim_hold(p, w, out);
  return 1;
}
void pi2_end_part(pi2_run *r, int index, const pi2_worker *w, const pi2_part *part) {
  pi2_count(&r->program->scratch[w->index].taken.row_blocks, part->last - part->first);
  pi2_claim_end(r, index, w);
}
