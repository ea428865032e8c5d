#include "cluster_unit.h"

#include <string.h>

#include "program.h"

#define LOOK_NS 10000000 /* how often a thread that waits for an answer looks whether its run was stopped */

int pi2_unit_take(pi2_cluster_unit *u) {
  for (;;) {
    const uint32_t asked = atomic_load(&u->asked);
    if (atomic_load(&u->closing)) return 0;
    if (asked != atomic_load(&u->answered)) return 1;
    pi2_futex_wait(&u->asked, asked, -1);
  }
}
void pi2_unit_answer(pi2_cluster_unit *u, int failed, int64_t busy_ns) {
  atomic_fetch_add_explicit(&u->busy_ns, busy_ns, memory_order_relaxed);
  atomic_fetch_add_explicit(&u->items, 1, memory_order_relaxed);
  atomic_fetch_add_explicit(&u->item_rows, u->rows, memory_order_relaxed);
  if (failed) atomic_store(&u->failed, 1);
  atomic_store(&u->answered, atomic_load(&u->asked));
  if (atomic_load(&u->sleepers)) pi2_futex_wake(&u->answered); /* who sleeps said so before it looked */
}
void pi2_unit_close(pi2_cluster_unit *u) {
  atomic_store(&u->closing, 1);
  atomic_fetch_add(&u->asked, 1); /* or the thread might go to sleep behind its look at `closing` */
  pi2_futex_wake(&u->asked);
}

void pi2_unit_ask(pi2_cluster_unit *u, int layer, int rows) {
  u->layer = layer, u->rows = rows;
  atomic_fetch_add(&u->asked, 1);
  pi2_futex_wake(&u->asked);
}
int pi2_unit_wait(pi2_cluster_unit *u, int64_t spin_ns, const _Atomic int *stop) {
  const int64_t begin = pi2_now_ns();
  const uint32_t asked = atomic_load(&u->asked); /* nobody asks meanwhile */
  for (uint32_t i = 1;; i++) {
    const uint32_t answered = atomic_load_explicit(&u->answered, memory_order_acquire);
    if (atomic_load_explicit(&u->failed, memory_order_acquire)) return PI2_UNIT_FAILED;
    if (answered == asked) return 0;
    if (i % 16 == 0) pi2_pause();
    if (i % 256) continue;
    if (atomic_load(stop)) return 1;
    const int64_t waited = pi2_now_ns() - begin;
    if (u->deadline_ns >= 0 && waited > u->deadline_ns) return PI2_UNIT_LATE;
    if (waited <= spin_ns) continue;
    atomic_fetch_add(&u->sleepers, 1);
    if (atomic_load(&u->answered) == answered) pi2_futex_wait(&u->answered, answered, LOOK_NS);
    atomic_fetch_sub(&u->sleepers, 1);
    i = 255; /* looks at once, and sleeps again */
  }
}

static pi2_cluster_unit *unit_of(const pi2_op *op) { return ((const pi2_hop *)op->data)->unit; }

/* Waits for the unit. Returns whether it is there; if not, the run ends at the closing barrier of this operation. */
static int wait_for_unit(pi2_run *r, pi2_cluster_unit *u, const pi2_worker *w) {
  const uint64_t begin = pi2_ticks();
  const int64_t begin_ns = pi2_now_ns();
  const int problem = pi2_unit_wait(u, w->gang->spin_ns, &r->stop);
  if (w->index == 0) atomic_fetch_add_explicit(&u->stall_ns, pi2_now_ns() - begin_ns, memory_order_relaxed);
  pi2_note_wait(r, w, begin, pi2_ticks());
  if (problem < 0) r->error = problem;
  if (problem) atomic_store(&r->stop, 1);
  return !problem;
}

static int hand_off(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  const pi2_program *p = r->program;
  pi2_cluster_unit *u = unit_of(op);
  const int rows = pi2_rows(r, op);
  const int32_t *row_of = pi2_row_of(r, op);
  if (!wait_for_unit(r, u, w)) return 0; /* a step that was stopped may have left an item in flight */
  for (int row = w->index; row < rows; row += p->threads) {
    const float *x = p->x + (row_of ? row_of[row] : row) * p->dim;
    float *to = u->x + row * p->dim;
    if (op->norm.weight)
      p->kernels->rmsnorm(x, op->norm.weight, op->norm.offset, op->norm.eps, to, p->dim);
    else
      memcpy(to, x, (size_t)p->dim * sizeof *to);
    memset(u->out + row * p->dim, 0, (size_t)p->dim * sizeof *u->out);
  }
  if (atomic_fetch_add(&r->cursors[4 * index], 1) + 1 == (uint32_t)p->threads) /* the last one: all is written */
    pi2_unit_ask(u, op->layer, rows);
  return 0;
}

static int join(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  const pi2_program *p = r->program;
  pi2_cluster_unit *u = unit_of(op);
  const int rows = pi2_rows(r, op);
  (void)index;
  if (!wait_for_unit(r, u, w)) return 0;
  for (int row = w->index; row < rows; row += p->threads) {
    float *to =
        op->sink == PI2_ADD_TO_X ? p->x + (op->head_only ? r->head_row[row] : row) * p->dim : p->y + row * p->y_columns;
    p->kernels->add(u->out + row * p->dim, to, p->dim);
  }
  return 0;
}

static int on_head_rows(const pi2_op *op) { return op->expert < 0; }

const pi2_op_class pi2_handoff_class = {.name = "hand off",
                                        .data_bytes = sizeof(pi2_hop),
                                        .run = hand_off,
                                        .on_all_threads = 1,
                                        .by_row = 1,
                                        .on_head_rows = on_head_rows};
const pi2_op_class pi2_join_class = {.name = "join",
                                     .data_bytes = sizeof(pi2_hop),
                                     .run = join,
                                     .on_all_threads = 1,
                                     .by_row = 1,
                                     .on_head_rows = on_head_rows};
