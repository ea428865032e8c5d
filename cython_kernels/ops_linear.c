/* Matrix products of a program: projections, feed-forward, output head. */
#include <math.h>
#include <string.h>

#include "program.h"

/* One row: normalised into `floats` where the operation has a norm, and as int8 where it needs that. */
static void prepare_row(const pi2_program *p, const pi2_op *op, const float *x, int64_t k, pi2_q8 *q8, float *floats,
                        int needs_q8) {
  if (op->norm.weight) {
    p->kernels->rmsnorm(x, op->norm.weight, op->norm.offset, op->norm.eps, floats, k);
    x = floats;
  }
  if (needs_q8) pi2_quantize(p, x, k, q8);
}

pi2_input pi2_prepare(pi2_run *r, const pi2_op *op, int index, pi2_worker *w, int64_t k, const int32_t *row_of,
                      int rows, int needs_q8, int *stopped) {
  const pi2_program *p = r->program;
  pi2_scratch *s = &p->scratch[w->index];
  const float *source = op->source == PI2_FROM_X ? p->x : op->source == PI2_FROM_ATTENTION ? p->attention : p->hidden_floats;
  const int64_t ld = op->source == PI2_FROM_X ? p->dim : op->source == PI2_FROM_ATTENTION ? p->attention_columns : p->hidden;
  const int normed = op->norm.weight != NULL;
  pi2_input in = {.floats = source, .ld = ld};
  if (!normed && !needs_q8) return in;
  if (!normed && op->q8_in) { /* quantised where it was made */
    in.q8 = op->source == PI2_FROM_ATTENTION ? p->q8_attention : p->q8_hidden;
    return in;
  }
  if (rows <= PI2_REPLICATED) {
    for (int i = 0; i < rows; i++) {
      pi2_q8 q8 = pi2_q8_row(&s->q8, i);
      prepare_row(p, op, source + (row_of ? row_of[i] : i) * ld, k, &q8, s->floats + i * p->max_k, needs_q8);
    }
    in.q8 = s->q8;
    if (normed) in.floats = s->floats, in.ld = p->max_k;
    return in;
  }
  for (uint32_t i; (i = pi2_take(r, index, 0)) < (uint32_t)rows;) {
    pi2_q8 q8 = pi2_q8_row(&p->q8_prepared, i);
    prepare_row(p, op, source + (row_of ? row_of[i] : (int64_t)i) * ld, k, &q8, p->prepared + i * p->max_k, needs_q8);
  }
  *stopped = pi2_barrier(w);
  in.q8 = p->q8_prepared;
  if (normed) in.floats = p->prepared, in.ld = p->max_k;
  return in;
}

static int needs_q8(const pi2_op *op) {
  for (int i = 0; i < op->n_matrices; i++)
    if (!pi2_is_float(op->matrix[i].type)) return 1;
  return 0;
}
static int64_t row_blocks(const pi2_matrix *m) { return (m->rows + PI2_ROWS - 1) / PI2_ROWS; }

/* Row blocks per unit: enough units that the threads finish together, few enough that the cursor is no bottleneck. */
static int64_t unit_blocks(int64_t blocks, int threads) {
  int64_t unit = blocks / (threads * 8);
  return unit < 1 ? 1 : unit > 8 ? 8 : unit;
}

int pi2_op_linear(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  const pi2_program *p = r->program;
  const int64_t k = op->matrix[0].k;
  int stopped = 0;
  pi2_input in = pi2_prepare(r, op, index, w, k, NULL, r->n_rows, needs_q8(op), &stopped);
  if (stopped) return stopped;
  int64_t blocks = 0;
  for (int i = 0; i < op->n_matrices; i++) blocks += row_blocks(&op->matrix[i]);
  const int64_t unit = unit_blocks(blocks, p->threads);
  const int pass = pi2_pass_rows(k);
  float *tile = p->scratch[w->index].tile;
  float *out = op->sink == PI2_TO_Y ? p->y : p->x;
  const int64_t ldo = op->sink == PI2_TO_Y ? p->y_columns : p->dim;
  for (int64_t first; (first = pi2_take(r, index, 1) * unit) < blocks;) {
    const int64_t last = first + unit < blocks ? first + unit : blocks;
    for (int row = 0; row < r->n_rows; row += pass) {
      const int n = r->n_rows - row < pass ? r->n_rows - row : pass;
      const pi2_matrix *m = op->matrix;
      int64_t begin = 0, column = 0; /* of m: its first global block, its first output */
      for (int64_t b = first; b < last; b++) {
        while (b - begin >= row_blocks(m)) {
          begin += row_blocks(m);
          column += m->rows;
          m++;
        }
        const int64_t block = b - begin, left = m->rows - block * PI2_ROWS;
        const int64_t rows = left < PI2_ROWS ? left : PI2_ROWS;
        pi2_multiply(p, m, block, &in, row, n, tile, PI2_ROWS);
        for (int c = 0; c < n; c++) {
          float *t = tile + c * PI2_ROWS, *o = out + (row + c) * ldo + column + block * PI2_ROWS;
          if (m->bias) p->kernels->add(m->bias + block * PI2_ROWS, t, rows);
          if (op->sink == PI2_ADD_TO_X) p->kernels->add(t, o, rows);
          else memcpy(o, t, (size_t)rows * sizeof *o);
        }
      }
    }
  }
  return 0;
}

int pi2_op_ffn(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  const pi2_program *p = r->program;
  const pi2_matrix *up = &op->matrix[0], *gate = op->n_matrices > 1 ? &op->matrix[1] : NULL;
  int stopped = 0;
  pi2_input in = pi2_prepare(r, op, index, w, up->k, NULL, r->n_rows, needs_q8(op), &stopped);
  if (stopped) return stopped;
  /* Units are pairs of row blocks: 32 hidden values are one block of integers for the down projection. */
  const int64_t blocks = row_blocks(up), pairs = (blocks + 1) / 2, unit = unit_blocks(pairs, p->threads);
  const int pass = pi2_pass_rows(up->k) > 64 ? 64 : pi2_pass_rows(up->k);
  float *up_tile = p->scratch[w->index].tile, *gate_tile = up_tile + 2 * 64 * PI2_ROWS;
  for (int64_t first; (first = pi2_take(r, index, 1) * unit) < pairs;) {
    const int64_t last = first + unit < pairs ? first + unit : pairs;
    for (int row = 0; row < r->n_rows; row += pass) {
      const int n = r->n_rows - row < pass ? r->n_rows - row : pass;
      for (int64_t pair = first; pair < last; pair++) {
        const int64_t left = up->rows - pair * 32, rows = left < 32 ? left : 32;
        for (int i = 0; i < 2 && pair * 2 + i < blocks; i++) { /* tile[c*32 + i*16 + r] */
          if (gate) pi2_multiply(p, gate, pair * 2 + i, &in, row, n, gate_tile + i * 16, 32);
          pi2_multiply(p, up, pair * 2 + i, &in, row, n, up_tile + i * 16, 32);
        }
        for (int c = 0; c < n; c++) {
          float *u = up_tile + c * 32, *g = gate_tile + c * 32;
          if (up->bias) p->kernels->add(up->bias + pair * 32, u, rows);
          if (gate && gate->bias) p->kernels->add(gate->bias + pair * 32, g, rows);
          p->kernels->activate(op->activation, op->up_activation, gate ? g : NULL, u, u, rows);
          if (op->q8_out) {
            pi2_q8 o = pi2_q8_at(p, &p->q8_hidden, row + c, pair * 32);
            pi2_quantize(p, u, 32, &o);
          } else {
            memcpy(p->hidden_floats + (row + c) * p->hidden + pair * 32, u, (size_t)rows * sizeof *u);
          }
        }
      }
    }
  }
  return 0;
}

/* What becomes of one row of logits: returned, scored, sampled. */
static void finish_row(pi2_run *r, int32_t row, float *logits, pi2_worker *w) {
  const pi2_program *p = r->program;
  pi2_slice *s = &r->slices[r->slice_of[row]];
  const int at = row - s->row;
  if (p->logit_softcap > 0) p->kernels->softcap(logits, p->logit_softcap, p->vocab);
  if (s->want_logits) memcpy(s->logits + at * p->vocab, logits, (size_t)p->vocab * sizeof *logits);
  if (s->targets && s->targets[at] >= 0)
    s->scores[at] = (float)((double)logits[s->targets[at]] - p->kernels->logsumexp(logits, p->vocab));
  if (s->sample && at == s->count - 1)
    s->pick = pi2_sample(p->kernels, &p->slots[s->slot], logits, p->vocab, s->start + s->count, s->top,
                         p->scratch[w->index].candidates);
}

int pi2_op_head(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  const pi2_program *p = r->program;
  const pi2_matrix *m = &op->matrix[0];
  const int64_t blocks = row_blocks(m), unit = unit_blocks(blocks, p->threads * 4);
  int stopped = 0;
  for (int first = 0; first < r->n_head && !stopped; first += PI2_HEAD_ROWS, index++) {
    const int n = r->n_head - first < PI2_HEAD_ROWS ? r->n_head - first : PI2_HEAD_ROWS;
    pi2_input in = pi2_prepare(r, op, index, w, m->k, r->head_row + first, n, needs_q8(op), &stopped);
    if (stopped) return stopped;
    float *tile = p->scratch[w->index].tile;
    for (int64_t b; (b = pi2_take(r, index, 1) * unit) < blocks;) {
      for (int64_t block = b; block < b + unit && block < blocks; block++) {
        const int64_t left = m->rows - block * PI2_ROWS, rows = left < PI2_ROWS ? left : PI2_ROWS;
        pi2_multiply(p, m, block, &in, 0, n, tile, PI2_ROWS);
        for (int c = 0; c < n; c++) {
          if (m->bias) p->kernels->add(m->bias + block * PI2_ROWS, tile + c * PI2_ROWS, rows);
          memcpy(p->logits + c * p->vocab + block * PI2_ROWS, tile + c * PI2_ROWS, (size_t)rows * sizeof *tile);
        }
      }
    }
    stopped = pi2_barrier(w);
    for (uint32_t i; !stopped && (i = pi2_take(r, index, 2)) < (uint32_t)n;)
      finish_row(r, r->head_row[first + i], p->logits + i * p->vocab, w);
    if (!stopped && first + PI2_HEAD_ROWS < r->n_head) stopped = pi2_barrier(w); /* logits are used again */
  }
  return stopped;
}
