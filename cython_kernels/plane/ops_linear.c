/* Matrix products of a program: projections, feed-forward, output head. */
#include <math.h>
#include <string.h>

#include "masks.h"
#include "ops_linear.h"
#include "program.h"
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

static int form_of(const pi2_op *op) {
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
    return pi2_take_tagged(r, index, blocks, step, assists ? PI2_TILE_BLOCKS : blocks, tag, w->index, &out->first,
                           &out->last);
  }
  const int64_t unit = assists ? pi2_take_unit_tagged(r, index, tag) : pi2_take_unit(r, index);
  out->first = unit / passes * op->tile_blocks;
  out->last = out->first + op->tile_blocks < blocks ? out->first + op->tile_blocks : blocks;
  out->row = (int)(unit % passes) * pass;
  out->rows = rows - out->row < pass ? rows - out->row : pass;
  return unit >= 0 && out->first < blocks;
}

/* A member's way through the parts of an operation: its own, and then those of assistants that are late. */
typedef struct {
  uint64_t began; /* ticks */
  int64_t done;   /* row blocks times rows */
} progress;
static int take_part(pi2_run *r, const pi2_op *op, int index, const pi2_worker *w, int rows, int64_t blocks, int64_t k,
                     int step, progress *at, pi2_part *out) {
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
/* The next part for a thread that assists, claimed. */
static int claim_part(pi2_run *r, const pi2_op *op, int index, const pi2_worker *w, int rows, int64_t blocks, int64_t k,
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
static void end_part(pi2_run *r, int index, const pi2_worker *w, const pi2_part *part) {
  pi2_count(&r->program->scratch[w->index].taken.row_blocks, part->last - part->first);
  pi2_claim_end(r, index, w);
}

/* Products of at most PI2_TILE_BLOCKS row blocks [first, last) of one matrix become outputs, from column `column` on.
 */
static void put_linear(const pi2_run *r, const pi2_op *op, const pi2_matrix *m, int64_t column, int64_t first,
                       int64_t last, int row, int rows, float *tile) {
  const int64_t begin = first * PI2_ROWS, end = last * PI2_ROWS < m->rows ? last * PI2_ROWS : m->rows,
                width = end - begin;
  for (int c = 0; c < rows; c++) {
    if (m->bias) r->program->kernels->add(m->bias + begin, tile + c * PI2_TILE_LD, width);
    pi2_put(r, op, row + c, column + begin, tile + c * PI2_TILE_LD, width);
  }
}
/* The next row blocks [*first, *last) of one matrix, of a part of all of them: the number of that matrix, -1 behind the
 * last. *at: how far it is, the part's first row block to begin with; *column: the matrix's first output. */
static int next_of_matrix(const pi2_op *op, const pi2_part *u, int64_t *at, int64_t *column, int64_t *first,
                          int64_t *last) {
  int64_t start = 0;
  *column = 0;
  for (int i = 0; i < op->n_matrices && *at < u->last; i++) {
    const int64_t n = pi2_row_blocks(&op->matrix[i]);
    if (*at < start + n) {
      *first = *at - start;
      *last = u->last - start < n ? u->last - start : n;
      *at = start + *last;
      return i;
    }
    start += n;
    *column += op->matrix[i].rows;
  }
  return -1;
}
/* Returns 0 where weights cannot be read. */
static int linear_part(pi2_run *r, const pi2_op *op, const pi2_part *u, const pi2_input *in, const pi2_worker *w) {
  const pi2_program *p = r->program;
  float *tile = p->scratch[w->index].tile;
  int64_t at = u->first, column, from, to;
  for (int i; (i = next_of_matrix(op, u, &at, &column, &from, &to)) >= 0;) {
    const pi2_matrix *m = &op->matrix[i];
    const int streamed = pi2_is_streamed(m);
    for (int64_t b = from, end; b < to; b = end) {
      end = pi2_tile_end(m, b, to);
      if (streamed && !pi2_pieces_get(r, m, w, b, end)) return 0;
      pi2_multiply(p, m, b, (int)(end - b), in, u->row, u->rows, tile, PI2_TILE_LD);
      put_linear(r, op, m, column, b, end, u->row, u->rows, tile);
      if (streamed) pi2_pieces_release(r, m, b, end, u->rows);
    }
  }
  return 1;
}

static pi2_input linear_input(pi2_run *r, const pi2_op *op, int index, pi2_worker *w, int rows, int *stopped) {
  return pi2_prepare(r, op, index, w, op->matrix[0].k, op->source == PI2_FROM_X ? pi2_row_of(r, op) : NULL, rows,
                     form_of(op), stopped);
}
static int64_t all_row_blocks(const pi2_op *op) {
  int64_t blocks = 0;
  for (int i = 0; i < op->n_matrices; i++) blocks += pi2_row_blocks(&op->matrix[i]);
  return blocks;
}
static int run_linear(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  int stopped = 0;
  const int rows = pi2_rows(r, op);
  const pi2_input in = linear_input(r, op, index, w, rows, &stopped);
  if (stopped) return stopped;
  const int64_t blocks = all_row_blocks(op);
  progress at = {0};
  for (pi2_part u; take_part(r, op, index, w, rows, blocks, op->matrix[0].k, 1, &at, &u);)
    if (!linear_part(r, op, &u, &in, w)) return 0;
  return 0;
}
/* All products of a part lie in the tile before the first output is written. */
static void assist_linear(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  pi2_program *p = r->program;
  int stopped = 0;
  const int rows = pi2_rows(r, op);
  const pi2_input in = linear_input(r, op, index, w, rows, &stopped);
  const int64_t blocks = all_row_blocks(op);
  for (pi2_part u; claim_part(r, op, index, w, rows, blocks, op->matrix[0].k, 1, &u);) {
    float *tile = p->scratch[w->index].tile;
    int64_t column, from, to;
    int i;
    for (int64_t at = u.first, begin = at; (i = next_of_matrix(op, &u, &at, &column, &from, &to)) >= 0; begin = at)
      pi2_multiply(p, &op->matrix[i], from, (int)(to - from), &in, u.row, u.rows, tile + (begin - u.first) * PI2_ROWS,
                   PI2_TILE_LD);
    if (!pi2_claim_write(p, w)) return;
    for (int64_t at = u.first, begin = at; (i = next_of_matrix(op, &u, &at, &column, &from, &to)) >= 0; begin = at)
      put_linear(r, op, &op->matrix[i], column, from, to, u.row, u.rows, tile + (begin - u.first) * PI2_ROWS);
    end_part(r, index, w, &u);
  }
}

static const char *name_linear(const pi2_op *op) {
  if (op->n_matrices == 3) return "qkv";
  return op->source == PI2_FROM_X ? "router" : op->source == PI2_FROM_ATTENTION ? "out" : "down";
}
static void measure_linear(pi2_program *p, const pi2_op *op) {
  int64_t columns = 0;
  for (int j = 0; j < op->n_matrices; j++) columns += op->matrix[j].rows;
  pi2_widen(op->sink == PI2_TO_REDUCED ? &p->reduced_columns : &p->y_columns, columns);
}
static int linear_on_head_rows(const pi2_op *op) { return op->source == PI2_FROM_HIDDEN && op->sink == PI2_ADD_TO_X; }

const pi2_op_class pi2_linear_class = {.name = "linear",
                                       .name_of = name_linear,
                                       .measure = measure_linear,
                                       .run = run_linear,
                                       .assist = assist_linear,
                                       .by_row = 1,
                                       .on_head_rows = linear_on_head_rows};

/* Products of at most PI2_TILE_BLOCKS row blocks, up to the activation: hidden values, in the first tile of scratch. */
static void ffn_products(const pi2_run *r, const pi2_op *op, int64_t first, int64_t last, int row, int rows,
                         const pi2_input *in, float *tile) {
  const pi2_program *p = r->program;
  const pi2_ffn *ffn = op->data;
  const pi2_matrix *up = &op->matrix[0], *gate = op->n_matrices > 1 ? &op->matrix[1] : NULL;
  const int count = (int)(last - first);
  const int64_t begin = first * PI2_ROWS, end = last * PI2_ROWS < up->rows ? last * PI2_ROWS : up->rows,
                width = end - begin;
  float *gate_tile = tile + PI2_TILE_ROWS * PI2_TILE_LD;
  if (gate) pi2_multiply(p, gate, first, count, in, row, rows, gate_tile, PI2_TILE_LD);
  pi2_multiply(p, up, first, count, in, row, rows, tile, PI2_TILE_LD);
  for (int c = 0; c < rows; c++) {
    float *u = tile + c * PI2_TILE_LD, *g = gate_tile + c * PI2_TILE_LD;
    if (up->bias) p->kernels->add(up->bias + begin, u, width);
    if (gate && gate->bias) p->kernels->add(gate->bias + begin, g, width);
    p->kernels->activate(ffn->activation, ffn->up_activation, gate ? g : NULL, u, u, width);
  }
}
/* They go where the down projection takes them: a whole number of 32s, so of blocks of integers. */
static void put_hidden(const pi2_run *r, const pi2_op *op, int64_t first, int64_t last, int row, int rows,
                       const float *tile) {
  const pi2_program *p = r->program;
  const int64_t begin = first * PI2_ROWS, all = op->matrix[0].rows, end = last * PI2_ROWS < all ? last * PI2_ROWS : all,
                width = end - begin;
  for (int c = 0; c < rows; c++) {
    const float *u = tile + c * PI2_TILE_LD;
    if (op->q8_out) {
      pi2_q8 o = pi2_q8_at(p, &p->q8_hidden, row + c, begin);
      pi2_quantize(p, u, width, &o);
    } else {
      memcpy(p->hidden_floats + (row + c) * p->hidden + begin, u, (size_t)width * sizeof *u);
    }
  }
}
/* Returns 0 where weights cannot be read. */
static int ffn_part(pi2_run *r, const pi2_op *op, const pi2_part *u, const pi2_input *in, const pi2_worker *w) {
  float *tile = r->program->scratch[w->index].tile;
  /* where both are streamed, their pieces have as many row blocks */
  const pi2_matrix *streamed = pi2_is_streamed(&op->matrix[0]) ? &op->matrix[0] : &op->matrix[op->n_matrices - 1];
  for (int64_t b = u->first, end; b < u->last; b = end) {
    end = pi2_tile_end(streamed, b, u->last);
    for (int i = 0; i < op->n_matrices; i++) /* a piece of each, one behind the other in the ring */
      if (pi2_is_streamed(&op->matrix[i]) && !pi2_pieces_get(r, &op->matrix[i], w, b, end)) return 0;
    ffn_products(r, op, b, end, u->row, u->rows, in, tile);
    put_hidden(r, op, b, end, u->row, u->rows, tile);
    for (int i = 0; i < op->n_matrices; i++)
      if (pi2_is_streamed(&op->matrix[i])) pi2_pieces_release(r, &op->matrix[i], b, end, u->rows);
  }
  return 1;
}

static pi2_input ffn_input(pi2_run *r, const pi2_op *op, int index, pi2_worker *w, int rows, int *stopped) {
  return pi2_prepare(r, op, index, w, op->matrix[0].k, pi2_row_of(r, op), rows, form_of(op), stopped);
}
static int run_ffn(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  int stopped = 0;
  const int rows = pi2_rows(r, op);
  const pi2_input in = ffn_input(r, op, index, w, rows, &stopped);
  if (stopped) return stopped;
  const int64_t blocks = pi2_row_blocks(&op->matrix[0]);
  progress at = {0};
  for (pi2_part u; take_part(r, op, index, w, rows, blocks, op->matrix[0].k, 2, &at, &u);)
    if (!ffn_part(r, op, &u, &in, w)) return 0;
  return 0;
}
static void assist_ffn(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  pi2_program *p = r->program;
  float *tile = p->scratch[w->index].tile;
  int stopped = 0;
  const int rows = pi2_rows(r, op);
  const pi2_input in = ffn_input(r, op, index, w, rows, &stopped);
  const int64_t blocks = pi2_row_blocks(&op->matrix[0]);
  for (pi2_part u; claim_part(r, op, index, w, rows, blocks, op->matrix[0].k, 2, &u);) {
    ffn_products(r, op, u.first, u.last, u.row, u.rows, &in, tile);
    if (!pi2_claim_write(p, w)) return;
    put_hidden(r, op, u.first, u.last, u.row, u.rows, tile);
    end_part(r, index, w, &u);
  }
}

static void measure_ffn(pi2_program *p, const pi2_op *op) { pi2_widen(&p->hidden, op->matrix[0].rows); }
static int ffn_on_head_rows(const pi2_op *op) { return op->expert < 0; }

const pi2_op_class pi2_ffn_class = {.name = "ffn",
                                    .data_bytes = sizeof(pi2_ffn),
                                    .measure = measure_ffn,
                                    .run = run_ffn,
                                    .assist = assist_ffn,
                                    .by_row = 1,
                                    .on_head_rows = ffn_on_head_rows};

typedef struct {
  float *logits;              /* (PI2_HEAD_ROWS, vocab) */
  pi2_candidate **candidates; /* (threads) of (vocab) */
} head_buffers;

/* After a token that is no draft, or a draft that was right, as single steps would: in their order, on one thread. */
static void verify_row(pi2_run *r, pi2_slice *s, int at, float *logits, pi2_candidate *candidates) {
  const pi2_program *p = r->program;
  pi2_slot *slot = &p->slots[s->slot];
  if (s->closed || at < s->count - 1 - s->drafts) return;
  pi2_pick *top = s->top ? s->top + s->n_picks * slot->logprobs : NULL;
  const pi2_pick pick = pi2_sample(p->kernels, slot, logits, p->vocab, s->start + at + 1, NULL, top, candidates);
  s->picks[s->n_picks++] = pick;
  s->closed = pick.token < 0 || slot->ended || at == s->count - 1 || pick.token != r->token[s->row + at + 1];
}
/* The token behind a slice, by its mask where it has one. */
static pi2_pick pick_token(const pi2_program *p, const pi2_slice *s, float *logits, pi2_candidate *candidates) {
  const int state = s->masked ? atomic_load(&s->mask_state) : PI2_MASK_ALL;
  if (state == PI2_MASK_MISSING) return (pi2_pick){PI2_UNUSABLE - PI2_BY_MASK, NAN}; /* it came too late */
  return pi2_sample(p->kernels, &p->slots[s->slot], logits, p->vocab, s->start + s->count,
                    state == PI2_MASK_THERE ? s->mask : NULL, s->top, candidates);
}
/* What becomes of one row of logits: returned, scored, sampled. */
static void finish_row(pi2_run *r, const pi2_head *head, int32_t row, float *logits, pi2_candidate *candidates) {
  const pi2_program *p = r->program;
  pi2_slice *s = &r->slices[r->slice_of[row]];
  const int at = row - s->row;
  if (head->softcap > 0) p->kernels->softcap(logits, head->softcap, p->vocab);
  if (s->want_logits) memcpy(s->logits + at * p->vocab, logits, (size_t)p->vocab * sizeof *logits);
  if (s->targets && s->targets[at] >= 0)
    s->scores[at] = (float)((double)logits[s->targets[at]] - p->kernels->logsumexp(logits, p->vocab));
  if (s->sample && s->drafts)
    verify_row(r, s, at, logits, candidates);
  else if (s->sample && at == s->count - 1)
    s->pick = pick_token(p, s, logits, candidates);
}

/* Products of at most PI2_TILE_BLOCKS row blocks become logits. */
static void put_logits(const pi2_run *r, const pi2_op *op, int64_t first, int64_t last, int row, int rows,
                       float *tile) {
  const pi2_program *p = r->program;
  const head_buffers *b = p->shared[PI2_HEAD];
  const pi2_matrix *m = &op->matrix[0];
  const int64_t begin = first * PI2_ROWS, end = last * PI2_ROWS < m->rows ? last * PI2_ROWS : m->rows;
  for (int c = 0; c < rows; c++) {
    if (m->bias) p->kernels->add(m->bias + begin, tile + c * PI2_TILE_LD, end - begin);
    memcpy(b->logits + (row + c) * p->vocab + begin, tile + c * PI2_TILE_LD, (size_t)(end - begin) * sizeof *tile);
  }
}
static int rows_from(const pi2_run *r, int first) {
  return r->n_head - first < PI2_HEAD_ROWS ? r->n_head - first : PI2_HEAD_ROWS;
}
static int run_head(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  const pi2_program *p = r->program;
  const head_buffers *b = p->shared[PI2_HEAD];
  const pi2_matrix *m = &op->matrix[0];
  float *tile = p->scratch[w->index].tile;
  int stopped = 0;
  for (int first = 0; first < r->n_head && !stopped; first += PI2_HEAD_ROWS, index++) {
    const int n = rows_from(r, first);
    const pi2_input in = pi2_prepare(r, op, index, w, m->k, r->head_row + first, n, form_of(op), &stopped);
    if (stopped) return stopped;
    progress at = {0};
    for (pi2_part u; take_part(r, op, index, w, n, pi2_row_blocks(m), m->k, 1, &at, &u);)
      for (int64_t from = u.first; from < u.last; from += PI2_TILE_BLOCKS) {
        const int64_t to = from + PI2_TILE_BLOCKS < u.last ? from + PI2_TILE_BLOCKS : u.last;
        pi2_multiply(p, m, from, (int)(to - from), &in, u.row, u.rows, tile, PI2_TILE_LD);
        put_logits(r, op, from, to, u.row, u.rows, tile);
      }
    stopped = pi2_barrier(w);
    for (uint32_t i; !stopped && (i = pi2_take(r, index, 2)) < (uint32_t)n;) {
      const int32_t slice = r->slice_of[r->head_row[first + i]];
      if (r->n_masked && pi2_row_is_masked(r, r->head_row[first + i])) continue; /* these come last */
      if (r->slices[slice].drafts && i && r->slice_of[r->head_row[first + i - 1]] == slice) continue; /* done below */
      do finish_row(r, op->data, r->head_row[first + i], b->logits + i * p->vocab, b->candidates[w->index]);
      while (r->slices[slice].drafts && ++i < (uint32_t)n && r->slice_of[r->head_row[first + i]] == slice);
    }
    for (int i; !stopped && r->n_masked && (i = pi2_masked_row_take(r, w, first, n)) >= 0;)
      finish_row(r, op->data, r->head_row[first + i], b->logits + i * p->vocab, b->candidates[w->index]);
    if (!stopped && first + PI2_HEAD_ROWS < r->n_head) stopped = pi2_barrier(w); /* logits are used again */
  }
  return stopped;
}
static void assist_head(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  pi2_program *p = r->program;
  const pi2_matrix *m = &op->matrix[0];
  float *tile = p->scratch[w->index].tile;
  int stopped = 0;
  const int first = (index - (int)(op - p->ops)) * PI2_HEAD_ROWS, n = rows_from(r, first);
  if (n < 1) return;
  const pi2_input in = pi2_prepare(r, op, index, w, m->k, r->head_row + first, n, form_of(op), &stopped);
  for (pi2_part u; claim_part(r, op, index, w, n, pi2_row_blocks(m), m->k, 1, &u);) {
    pi2_multiply(p, m, u.first, (int)(u.last - u.first), &in, u.row, u.rows, tile, PI2_TILE_LD);
    if (!pi2_claim_write(p, w)) return;
    put_logits(r, op, u.first, u.last, u.row, u.rows, tile);
    end_part(r, index, w, &u);
  }
}

static void prepare_head(pi2_program *p, pi2_arena *a) {
  const head_buffers b = {.logits = pi2_take_rows(p, a, PI2_HEAD_ROWS, p->vocab * 4),
                          .candidates = pi2_arena_take(a, p->threads, sizeof *b.candidates)};
  for (int t = 0; t < p->threads; t++) {
    pi2_candidate *candidates = pi2_arena_take(a, p->vocab, sizeof *candidates);
    if (a->base) b.candidates[t] = candidates;
  }
  p->shared[PI2_HEAD] = pi2_keep(a, &b, sizeof b);
}

const pi2_op_class pi2_head_class = {
    .name = "head", .data_bytes = sizeof(pi2_head), .prepare = prepare_head, .run = run_head, .assist = assist_head};
