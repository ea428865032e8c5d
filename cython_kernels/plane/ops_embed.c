/* Token embeddings and, with them, the step's rotations. */
#include <errno.h>

#include "elementary.h"
#include "ops_embed.h"
#include "program.h"

static int32_t token_of(const pi2_run *r, int row) {
  return r->token[row] >= 0 ? r->token[row] : r->program->slots[r->slices[r->slice_of[row]].slot].last;
}
/* All rows of an embedding that is not in memory: a thread that reads them one by one would wait for each. */
static void read_embedding(pi2_run *r, const pi2_embed *e) {
  const pi2_program *p = r->program;
  int32_t *tokens = p->shared[PI2_EMBED];
  for (int row = 0; row < r->n_rows; row++) tokens[row] = token_of(r, row);
  const int error = pi2_rows_read(e->rows, tokens, r->n_rows, p->x, p->dim, &r->stop);
  if (!error) return;
  if (error != ECANCELED || !atomic_load(&r->stop)) r->error = error;
  atomic_store(&r->stop, 1); /* the barrier behind this operation ends the run on every thread */
}

static int run(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  const pi2_program *p = r->program;
  const pi2_embed *e = op->data;
  const int scaled = e->scale != 1.0f;
  if (e->rows && w->index == 0) {
    read_embedding(r, e);
    for (int row = 0; scaled && row < r->n_rows; row++)
      p->kernels->scale(p->x + row * p->dim, e->scale, p->x + row * p->dim, p->dim);
  }
  for (uint32_t row; (row = pi2_take(r, index, 0)) < (uint32_t)r->n_rows;) {
    float *x = p->x + row * p->dim;
    if (!e->rows) {
      pi2_unpack_row(e->matrix.type, e->matrix.data, p->dim, token_of(r, (int)row), x);
      if (scaled) p->kernels->scale(x, e->scale, x, p->dim);
    }
    for (int i = 0; i < p->n_ropes; i++) {
      const pi2_rope *rope = &p->ropes[i];
      pi2_rotation(rope->frequencies, rope->half, r->position[row], rope->magnitude, rope->cosine + row * rope->half,
                   rope->sine + row * rope->half);
    }
  }
  return 0;
}

/* The tokens of a step whose rows are read. */
static void prepare(pi2_program *p, pi2_arena *a) {
  p->shared[PI2_EMBED] = pi2_arena_take(a, p->max_rows, sizeof(int32_t));
}

const pi2_op_class pi2_embed_class = {.name = "embed", .data_bytes = sizeof(pi2_embed), .prepare = prepare, .run = run};
