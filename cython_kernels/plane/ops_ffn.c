/* Feed-forward blocks of whole matrices: hidden = act(gate) * up. Their down projection is a PI2_LINEAR. */
#include <string.h>

#include "ops_linear.h"
#include "parts.h"

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
  return pi2_prepare(r, op, index, w, op->matrix[0].k, pi2_row_of(r, op), rows, pi2_form_of(op), stopped);
}
static int run_ffn(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  int stopped = 0;
  const int rows = pi2_rows(r, op);
  const pi2_input in = ffn_input(r, op, index, w, rows, &stopped);
  if (stopped) return stopped;
  const int64_t blocks = pi2_row_blocks(&op->matrix[0]);
  pi2_progress at = {0};
  for (pi2_part u; pi2_take_part(r, op, index, w, rows, blocks, op->matrix[0].k, 2, &at, &u);)
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
  for (pi2_part u; pi2_claim_part(r, op, index, w, rows, blocks, op->matrix[0].k, 2, &u);) {
    ffn_products(r, op, u.first, u.last, u.row, u.rows, &in, tile);
    if (!pi2_claim_write(p, w)) return;
    put_hidden(r, op, u.first, u.last, u.row, u.rows, tile);
    pi2_end_part(r, index, w, &u);
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
