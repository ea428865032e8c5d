#include "assist.h"

#include <sched.h>

#include "program.h"

#define LATE 4             /* times as long as it would take the thread that waits */
#define POLL_NS 100000     /* an assistant that has found nothing for longer than threads spin looks so often */
#define INDEX_BITS 24      /* of a stage: the operation's number + 1; above it the run's. 0: none is open */
#define YIELD_TICKS 100000 /* a member that waits for longer lets others have its core */

#ifdef PI2_SUSPEND /* tests: as if the system took the core away now and then */
void PI2_SUSPEND(void);
#else
#define PI2_SUSPEND() ((void)0)
#endif

static uint64_t stage_of(const pi2_run *r, int index) {
  return (uint64_t)r->serial << INDEX_BITS | (uint64_t)(index + 1);
}
static pi2_assistant *assistant_of(const pi2_program *p, const pi2_worker *w) {
  return &p->assistants[w->index - p->members];
}
uint64_t pi2_stage_tag(const pi2_program *p, const pi2_worker *w) {
  return atomic_load_explicit(&assistant_of(p, w)->stage, memory_order_relaxed) >> INDEX_BITS;
}

void pi2_stage_open(pi2_run *r, int index, const pi2_worker *w) {
  pi2_program *p = r->program;
  if (p->members < p->threads && w->index == 0) atomic_store(&p->open, stage_of(r, index));
}

/* Where the assistant has a part of the stage: 1 once it is late and this thread's, else waits for it and gives 0.
 *
 * The claim's number makes the exchange safe: what was read of the part belongs to the claim that is exchanged. */
static int take_over_from(pi2_assistant *a, uint64_t stage, double pace, uint64_t *waited, pi2_part *part) {
  const uint64_t begin = pi2_ticks();
  uint64_t now = begin;
  int taken = 0;
  for (;; now = pi2_ticks()) {
    uint64_t claim = atomic_load(&a->claim);
    const int state = claim & 3;
    if (state == PI2_FREE || atomic_load(&a->stage) != stage) break;
    if (state == PI2_HELD) {
      const uint64_t since = atomic_load_explicit(&a->since, memory_order_relaxed);
      part->first = atomic_load_explicit(&a->first, memory_order_relaxed);
      part->last = atomic_load_explicit(&a->last, memory_order_relaxed);
      part->row = atomic_load_explicit(&a->row, memory_order_relaxed);
      part->rows = atomic_load_explicit(&a->rows, memory_order_relaxed);
      const double due = LATE * pace * (double)((part->last - part->first) * part->rows);
      if ((double)(int64_t)(now - since) > due &&
          atomic_compare_exchange_strong(&a->claim, &claim, (claim & ~(uint64_t)3) | PI2_FREE)) {
        taken = 1;
        break;
      }
    }
    if (now - begin > YIELD_TICKS)
      sched_yield();
    else
      pi2_pause();
  }
  *waited += now - begin;
  return taken;
}
int pi2_take_over(pi2_run *r, int index, const pi2_worker *w, uint64_t began, int64_t blocks, pi2_part *part) {
  const pi2_program *p = r->program;
  const int n = p->threads - p->members;
  if (!n) return 0;
  const double pace = blocks ? (double)(pi2_ticks() - began) / (double)blocks : 0;
  const uint64_t stage = stage_of(r, index);
  for (int i = 0; i < n; i++)
    if (take_over_from(&p->assistants[i], stage, pace, &p->scratch[w->index].waited, part)) return 1;
  return 0;
}

void pi2_assistants_begin(pi2_run *r) {
  const pi2_program *p = r->program;
  for (int64_t i = (int64_t)p->members * p->n_ops; r->trace && i < (int64_t)p->threads * p->n_ops; i++)
    r->op_begin[i] = r->op_end[i] = r->begin_ticks;
}
void pi2_assistants_end(pi2_run *r) {
  pi2_program *p = r->program;
  if (p->members == p->threads) return;
  atomic_store(&p->open, 0);
  for (int t = p->members; t < p->threads; t++) {
    pi2_assistant *a = &p->assistants[t - p->members];
    const uint64_t busy = atomic_load_explicit(&a->busy, memory_order_relaxed);
    r->busy[t] = busy - a->told;
    a->told = busy;
  }
}

/* The claim is told before the stage is looked at, and members look at claims before the stage can end: so either the
 * assistant sees that the stage has ended, or members see the claim. */
int pi2_claim_begin(pi2_program *p, const pi2_worker *w) {
  pi2_assistant *a = assistant_of(p, w);
  const uint64_t number = (atomic_load_explicit(&a->claim, memory_order_relaxed) >> 2) + 1;
  atomic_store(&a->claim, number << 2 | PI2_TAKING);
  PI2_SUSPEND();
  if (atomic_load(&p->open) == atomic_load_explicit(&a->stage, memory_order_relaxed)) return 1;
  pi2_claim_drop(p, w);
  return 0;
}
static void set_state(pi2_assistant *a, enum pi2_claim_state state) {
  const uint64_t claim = atomic_load_explicit(&a->claim, memory_order_relaxed);
  atomic_store_explicit(&a->claim, (claim & ~(uint64_t)3) | state, memory_order_release);
}
void pi2_claim_drop(pi2_program *p, const pi2_worker *w) { set_state(assistant_of(p, w), PI2_FREE); }
void pi2_claim_hold(pi2_program *p, const pi2_worker *w, const pi2_part *part) {
  pi2_assistant *a = assistant_of(p, w);
  atomic_store_explicit(&a->since, pi2_ticks(), memory_order_relaxed);
  atomic_store_explicit(&a->first, part->first, memory_order_relaxed);
  atomic_store_explicit(&a->last, part->last, memory_order_relaxed);
  atomic_store_explicit(&a->row, part->row, memory_order_relaxed);
  atomic_store_explicit(&a->rows, part->rows, memory_order_relaxed);
  set_state(a, PI2_HELD);
  PI2_SUSPEND();
}
int pi2_claim_write(pi2_program *p, const pi2_worker *w) {
  pi2_assistant *a = assistant_of(p, w);
  uint64_t claim = atomic_load_explicit(&a->claim, memory_order_relaxed);
  if ((claim & 3) != PI2_HELD) return 0;
  return atomic_compare_exchange_strong(&a->claim, &claim, (claim & ~(uint64_t)3) | PI2_WRITING);
}
void pi2_claim_end(pi2_run *r, int index, const pi2_worker *w) {
  pi2_program *p = r->program;
  pi2_assistant *a = assistant_of(p, w);
  const uint64_t begin = atomic_load_explicit(&a->since, memory_order_relaxed), end = pi2_ticks();
  atomic_store_explicit(&a->busy, atomic_load_explicit(&a->busy, memory_order_relaxed) + end - begin,
                        memory_order_relaxed);
  if (r->trace) {
    const int64_t at = (int64_t)w->index * p->n_ops + (index < p->n_ops ? index : p->n_ops - 1);
    if (r->op_begin[at] == r->op_end[at]) r->op_begin[at] = begin;
    r->op_end[at] = end;
  }
  set_state(a, PI2_FREE);
}

uint32_t pi2_assist(void *context, pi2_worker *w) {
  pi2_program *p = context;
  pi2_gang *g = p->gang;
  pi2_assistant *a = assistant_of(p, w);
  int64_t idle_since = 0;
  uint64_t done = 0;
  for (uint32_t i = 1, posted;; i++) {
    const uint64_t stage = atomic_load_explicit(&p->open, memory_order_acquire);
    if (stage && stage != done) {
      const int index = (int)(stage & (((uint64_t)1 << INDEX_BITS) - 1)) - 1;
      const pi2_op *op = &p->ops[index < p->n_ops ? index : p->n_ops - 1]; /* further rows of the head */
      atomic_store_explicit(&a->stage, stage, memory_order_relaxed);
      pi2_op_classes[op->kind]->assist(&p->runs[(stage >> INDEX_BITS) % PI2_QUEUE], op, index, w);
      done = stage;
      idle_since = 0;
    } else if (pi2_gang_idle(g, &posted)) {
      return posted;
    } else if (i % 64) {
      pi2_pause();
    } else {
      const int64_t now = pi2_now_ns();
      if (!idle_since) idle_since = now;
      const uint32_t phase = atomic_load(&g->phase);
      if (now - idle_since >= g->spin_ns) pi2_futex_wait(&g->phase, phase, POLL_NS);
    }
  }
}
