/* Projections of a program: y or x += W [norm](source). */
#include "parts.h"

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
                     pi2_form_of(op), stopped);
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
  pi2_progress at = {0};
  for (pi2_part u; pi2_take_part(r, op, index, w, rows, blocks, op->matrix[0].k, 1, &at, &u);)
    if (!linear_part(r, op, &u, &in, w)) return 0;
  return 0;
}
/* The tile holds all products of a part before the first output is written. */
static void assist_linear(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  pi2_program *p = r->program;
  int stopped = 0;
  const int rows = pi2_rows(r, op);
  const pi2_input in = linear_input(r, op, index, w, rows, &stopped);
  const int64_t blocks = all_row_blocks(op);
  for (pi2_part u; pi2_claim_part(r, op, index, w, rows, blocks, op->matrix[0].k, 1, &u);) {
    float *tile = p->scratch[w->index].tile;
    int64_t column, from, to;
    int i;
    for (int64_t at = u.first, begin = at; (i = next_of_matrix(op, &u, &at, &column, &from, &to)) >= 0; begin = at)
      pi2_multiply(p, &op->matrix[i], from, (int)(to - from), &in, u.row, u.rows, tile + (begin - u.first) * PI2_ROWS,
                   PI2_TILE_LD);
    if (!pi2_claim_write(p, w)) return;
    for (int64_t at = u.first, begin = at; (i = next_of_matrix(op, &u, &at, &column, &from, &to)) >= 0; begin = at)
      put_linear(r, op, &op->matrix[i], column, from, to, u.row, u.rows, tile + (begin - u.first) * PI2_ROWS);
    pi2_end_part(r, index, w, &u);
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
