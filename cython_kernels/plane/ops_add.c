/* x += y, through the second norm of a block that has one. */
#include "program.h"

static int run(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  const pi2_program *p = r->program;
  (void)w;
  for (uint32_t row; (row = pi2_take(r, index, 0)) < (uint32_t)r->n_rows;) {
    float *y = p->y + row * p->y_columns;
    if (op->norm.weight) p->kernels->rmsnorm(y, op->norm.weight, op->norm.offset, op->norm.eps, y, p->dim);
    p->kernels->add(y, p->x + row * p->dim, p->dim);
  }
  return 0;
}

const pi2_op_class pi2_add_class = {.name = "add", .run = run, .by_row = 1};
