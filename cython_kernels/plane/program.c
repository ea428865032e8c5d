#include "program.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "masks.h"

#define PI2_KIND(number, name) extern const pi2_op_class pi2_##name##_class;
PI2_OP_KINDS(PI2_KIND)
#undef PI2_KIND
#define PI2_KIND(number, name) [PI2_##number] = &pi2_##name##_class,
const pi2_op_class *const pi2_op_classes[PI2_OP_COUNT] = {PI2_OP_KINDS(PI2_KIND)};
#undef PI2_KIND

const char *pi2_op_name(const pi2_op *op) {
  const pi2_op_class *class = pi2_op_classes[op->kind];
  return class->name_of ? class->name_of(op) : class->name;
}

pi2_op *pi2_op_add(pi2_program *p, int kind, int layer) {
  if (p->n_ops == p->ops_capacity) {
    const int capacity = p->ops_capacity ? 2 * p->ops_capacity : 64;
    pi2_op *ops = realloc(p->ops, (size_t)capacity * sizeof *ops);
    if (!ops) return NULL;
    p->ops = ops;
    p->ops_capacity = capacity;
  }
  const size_t bytes = pi2_op_classes[kind]->data_bytes;
  void *data = bytes ? calloc(1, bytes) : NULL;
  if (bytes && !data) return NULL;
  pi2_op *op = &p->ops[p->n_ops++];
  *op = (pi2_op){.kind = kind, .layer = layer, .expert = -1, .data = data};
  return op;
}

/* The rows of a buffer that short steps have no use for. */
static void note_tail(pi2_program *p, uint8_t *base, int64_t rows, int64_t bytes) {
  if (rows <= PI2_FEW_ROWS || p->n_tails == PI2_TAILS) return;
  const uintptr_t tail_at = (uintptr_t)base + (uintptr_t)(PI2_FEW_ROWS * bytes);
  const pi2_pages tail = pi2_pages_within((void *)tail_at, (rows - PI2_FEW_ROWS) * bytes);
  if (!tail.bytes) return;
  p->tail_of[p->n_tails++] = tail;
  p->tail_bytes += tail.bytes;
}
void *pi2_take_rows(pi2_program *p, pi2_arena *a, int64_t rows, int64_t bytes) {
  void *base = pi2_arena_take(a, rows, (size_t)bytes);
  note_tail(p, base, rows, bytes);
  return base;
}
static int64_t stride(int64_t bytes) {
  return pi2_align(bytes, 64) + 64; /* off the 4096 bytes that would map a tile's rows to one cache set */
}
pi2_q8 pi2_take_q8(pi2_program *p, pi2_arena *a, int64_t rows, int64_t k, int mixed) {
  pi2_q8 q = {.ldq = stride(k << p->wide), .ldb = k / PI2_BLOCK};
  q.q = pi2_take_rows(p, a, rows, q.ldq);
  if (mixed) {
    q.ldh = stride(k);
    q.high = pi2_arena_take(a, 2 * rows * q.ldh, 1);
    q.low = (int8_t *)((uintptr_t)q.high + (uintptr_t)(rows * q.ldh));
    note_tail(p, (uint8_t *)q.high, rows, q.ldh);
    note_tail(p, (uint8_t *)q.low, rows, q.ldh);
  }
  q.d = pi2_arena_take(a, rows * q.ldb, 4);
  q.s = pi2_arena_take(a, rows * q.ldb, 4);
  q.h = pi2_arena_take(a, rows * q.ldb * 2, 2);
  return q;
}

static int64_t cursors(const pi2_program *p) { return p->n_ops + p->max_rows / PI2_HEAD_ROWS + 1; }

static void prepare_run(pi2_program *p, pi2_arena *a, pi2_run *r) {
  const int64_t pages = p->context / PI2_PAGE + 1;
  r->program = p;
  r->done = 1;
  r->token = pi2_arena_take(a, p->max_rows, 4);
  r->position = pi2_arena_take(a, p->max_rows, 4);
  r->slice_of = pi2_arena_take(a, p->max_rows, 4);
  r->head_row = pi2_arena_take(a, p->max_rows, 4);
  r->prefill_row = pi2_arena_take(a, p->max_rows, 4);
  r->masked_row = pi2_arena_take(a, p->max_slots, 4);
  r->slices = pi2_arena_take(a, p->max_slots, sizeof(pi2_slice));
  r->pages = pi2_arena_take(a, p->max_slots * pages, 4);
  r->targets = pi2_arena_take(a, p->max_rows, 4);
  r->scores = pi2_arena_take(a, p->max_rows, 4);
  r->picks = pi2_arena_take(a, p->max_rows, sizeof *r->picks);
  r->masks = pi2_arena_take(a, p->max_slots * p->mask_words, 4);
  r->cursors = pi2_arena_take(a, 4 * cursors(p), 4);
  r->shares = pi2_arena_take(a, p->threads * p->share_stride, 8);
  r->units = pi2_arena_take(a, cursors(p), 8);
  r->busy = pi2_arena_take(a, p->threads, 8);
  r->op_begin = pi2_arena_take(a, (int64_t)p->threads * p->n_ops, 8);
  r->op_end = pi2_arena_take(a, (int64_t)p->threads * p->n_ops, 8);
}
static void prepare_scratch(pi2_program *p, pi2_arena *a) {
  pi2_scratch *scratch = pi2_arena_take(a, p->threads, sizeof *scratch);
  for (int t = 0; t < p->threads; t++) {
    const pi2_scratch s = {.q8 = pi2_take_q8(p, a, PI2_REPLICATED, p->max_k, p->mixed),
                           .floats = pi2_arena_take(a, PI2_REPLICATED * p->max_k, 4),
                           .tile = pi2_arena_take(a, 2 * PI2_TILE_ROWS * PI2_TILE_LD, 4),
                           .pieces = pi2_arena_take(a, PI2_MATRICES * p->max_pieces, sizeof *s.pieces)};
    if (a->base) scratch[t] = s;
  }
  p->scratch = scratch;
}

/* What becomes of a row behind the last attention matters only if it needs logits. */
static void find_tail(pi2_program *p) {
  int at = p->n_ops - 1;
  while (at >= 0 && !pi2_op_classes[p->ops[at].kind]->run_tail) at--;
  p->tail = at;
  if (at < 0) return;
  const int end = p->n_ops - 1; /* the head */
  for (int i = at + 1; i < end; i++) {
    const pi2_op *op = &p->ops[i];
    if (!pi2_op_classes[op->kind]->by_row || op->expert >= 0 || op->streamed || op->paged) {
      p->tail = -1;
      return;
    }
  }
  const int first = at + 2; /* behind attention's own output, which is of all rows */
  for (int i = first; i < end; i++) {
    const pi2_op_class *class = pi2_op_classes[p->ops[i].kind];
    if (!class->on_head_rows || !class->on_head_rows(&p->ops[i])) return;
  }
  for (int i = first; i < end; i++) p->ops[i].head_only = 1;
}

/* Threads that run jobs. The others may assist where they can help with every matrix. */
static void find_members(pi2_program *p) {
  p->members = p->threads - p->assisting;
  for (int i = 0; i < p->n_ops; i++) {
    const pi2_op *op = &p->ops[i];
    const pi2_op_class *class = pi2_op_classes[op->kind];
    const int helpless = op->n_matrices && (op->streamed || op->paged || !class->assist);
    if (class->on_all_threads || helpless) p->members = p->threads;
  }
}
/* Widths of what operations share. */
static void measure_ops(pi2_program *p) {
  memset(p->used, 0, sizeof p->used);
  for (int i = 0; i < p->n_ops; i++) {
    pi2_op *op = &p->ops[i];
    const pi2_op_class *class = pi2_op_classes[op->kind];
    p->used[op->kind]++;
    op->tile_blocks = PI2_TILE_BLOCKS;
    if (op->sink == PI2_MIX_INTO_Y) pi2_widen(&p->y_columns, p->dim);
    for (int j = 0; j < op->n_matrices; j++) {
      const pi2_matrix *m = &op->matrix[j];
      pi2_widen(&p->max_k, m->k);
      if (op->source != PI2_FROM_HIDDEN || op->norm.weight) pi2_widen(&p->prepared_k, m->k);
      if (pi2_is_paged(m)) pi2_widen(&p->max_pages, pi2_parts(m));
      if (!pi2_is_streamed(m)) continue;
      pi2_widen(&p->max_pieces, pi2_parts(m));
      pi2_widen(&p->n_pieces, m->unit + (pi2_parts(m) - 1) * m->stride + 1);
    }
    if (class->measure) class->measure(p, op);
  }
}

/* Takes all buffers from the arena. */
static void take_buffers(pi2_program *p) {
  pi2_arena *a = &p->arena;
  const int64_t rows = p->max_rows;
  p->n_tails = 0;
  p->tail_bytes = 0;
  p->mask_words = (p->vocab + 31) / 32;
  p->share_stride = pi2_align(cursors(p), 8);
  for (int i = 0; i < p->n_ropes; i++) {
    p->ropes[i].cosine = pi2_arena_take(a, rows * p->ropes[i].half, 4);
    p->ropes[i].sine = pi2_arena_take(a, rows * p->ropes[i].half, 4);
  }
  pi2_pages_prepare(p, a);
  p->x = pi2_take_rows(p, a, rows, p->dim * 4);
  p->y = pi2_take_rows(p, a, rows, p->y_columns * 4);
  p->reduced = pi2_take_rows(p, a, rows, p->reduced_columns * 4);
  p->attention = pi2_take_rows(p, a, rows, p->attention_columns * 4);
  p->hidden_floats = pi2_take_rows(p, a, rows, p->hidden * 4);
  p->prepared = pi2_take_rows(p, a, rows, p->prepared_k * 4);
  p->slots = pi2_arena_take(a, p->max_slots, sizeof *p->slots);
  p->counts = pi2_arena_take(a, p->max_slots * p->vocab, sizeof *p->counts);
  p->q8_prepared = pi2_take_q8(p, a, rows, p->prepared_k, p->mixed);
  p->q8_attention = pi2_take_q8(p, a, rows, p->attention_columns, 0);
  p->q8_hidden = pi2_take_q8(p, a, rows, p->hidden, p->mixed);
  prepare_scratch(p, a);
  p->assistants = pi2_arena_take(a, p->threads - p->members, sizeof *p->assistants);
  for (int i = 0; i < PI2_QUEUE; i++) prepare_run(p, a, &p->runs[i]);
  for (int i = 0; i < PI2_OP_COUNT; i++)
    if (p->used[i] && pi2_op_classes[i]->prepare) pi2_op_classes[i]->prepare(p, a);
  pi2_pieces_prepare(p, a); /* knows the tails of all rows */
}

void pi2_program_measure(pi2_program *p) {
  measure_ops(p);
  find_tail(p);
  find_members(p);
  p->arena = (pi2_arena){0};
  take_buffers(p);
}

int pi2_program_prepare(pi2_program *p) {
  pi2_program_measure(p);
  if (pi2_arena_map(&p->arena)) return -1;
  take_buffers(p);
  if (p->members < p->threads || p->gang->members < p->threads)
    pi2_gang_assist(p->gang, p->members, p->members < p->threads ? pi2_assist : NULL, p);
  return 0;
}

void pi2_program_free(pi2_program *p) {
  for (int i = 0; i < p->n_ropes; i++) free((void *)p->ropes[i].frequencies);
  for (int i = 0; p->arena.base && i < p->max_slots; i++) {
    free(p->slots[i].bias_ids);
    free(p->slots[i].bias);
    free(p->slots[i].ends);
  }
  for (int i = 0; i < PI2_QUEUE; i++) free(p->runs[i].copies.copy);
  for (int i = 0; i < p->n_ops; i++) free(p->ops[i].data);
  free(p->ops);
  free(p->ropes);
  pi2_arena_unmap(&p->arena);
}

pi2_run *pi2_run_new(pi2_program *p) {
  pi2_run *r = &p->runs[p->next_run % PI2_QUEUE];
  if (!r->done) return NULL;
  r->n_rows = r->n_slices = r->n_prefill = r->n_head = r->n_masked = r->trace = r->urgent = 0;
  r->copies.n = 0;
  return r;
}

/* Rows that wait for masks come last, so that all others are finished before the head waits. Their order among
 * themselves stays. */
static void order_masked(pi2_run *r) {
  int others = 0, masked = 0;
  for (int i = 0; i < r->n_head; i++) {
    const int32_t row = r->head_row[i];
    if (pi2_row_is_masked(r, row))
      r->masked_row[masked++] = row;
    else
      r->head_row[others++] = row;
  }
  memcpy(r->head_row + others, r->masked_row, (size_t)masked * sizeof *r->masked_row);
}

/* What follows from the slices that are not skipped. */
static void derive(pi2_run *r) {
  const pi2_program *p = r->program;
  r->n_prefill = r->n_head = 0;
  for (int i = 0; i < r->n_slices; i++) {
    const pi2_slice *s = &r->slices[i];
    for (int j = 0; j < s->count && !s->skipped; j++) {
      r->slice_of[s->row + j] = i;
      r->position[s->row + j] = s->start + j;
      if (s->count > 1) r->prefill_row[r->n_prefill++] = s->row + j;
      if (s->want_logits || (s->targets && s->targets[j] >= 0) || (s->sample && j >= s->count - 1 - s->drafts))
        r->head_row[r->n_head++] = s->row + j;
    }
  }
  if (r->n_masked) order_masked(r);
  for (int i = 0; i < PI2_OP_COUNT; i++)
    if (p->used[i] && pi2_op_classes[i]->post) pi2_op_classes[i]->post(r);
}

/* Thread 0, before the others begin: takes out slices that continue a sequence which has ended meanwhile. Rows of the
 * others move together. */
static void skip_ended(pi2_run *r) {
  int rows = 0, skipped = 0;
  for (int i = 0; i < r->n_slices; i++) {
    pi2_slice *s = &r->slices[i];
    if (r->token[s->row] < 0 && r->program->slots[s->slot].ended) {
      s->skipped = skipped = 1;
      continue;
    }
    memmove(r->token + rows, r->token + s->row, (size_t)s->count * sizeof *r->token);
    s->row = rows;
    rows += s->count;
  }
  if (!skipped) return;
  r->n_rows = rows;
  derive(r);
}

int pi2_run_post(pi2_run *r) {
  pi2_program *p = r->program;
  derive(r);
  memset((void *)r->cursors, 0, (size_t)(4 * cursors(p)) * 4);
  r->serial = p->next_run;
  for (int64_t i = 0; i < p->threads * p->share_stride; i++)
    atomic_store_explicit(&r->shares[i], (uint64_t)(r->serial & 0xffff) << 2 * PI2_SHARE_BITS, memory_order_relaxed);
  for (int64_t i = 0; i < cursors(p); i++)
    atomic_store_explicit(&r->units[i], (uint64_t)r->serial << 32, memory_order_relaxed);
  memset(r->busy, 0, (size_t)p->threads * 8);
  if (r->n_waits) memset(r->n_waits, 0, (size_t)p->threads * sizeof *r->n_waits);
  atomic_store(&r->stop, 0);
  r->stopped = 0;
  atomic_store(&r->done, 0);
  atomic_store(&r->error, 0);
  atomic_store(&r->neuron_bytes, 0);
  r->skipped_bytes = r->cluster_bytes = 0;
  atomic_store(&r->mask_wait_ns, 0);
  /* Its masks follow from what the runs before it bring, so these report, each as soon as it has ended. */
  if (r->n_masked) pi2_gang_report(p->gang);
  if (pi2_gang_post(p->gang, pi2_run_job, r)) return -1;
  p->next_run++;
  return 0;
}

int pi2_run_job(void *context, pi2_worker *w) {
  pi2_run *r = context;
  pi2_program *p = r->program;
  for (int i = 0; i < PI2_OP_COUNT; i++)
    if (p->used[i] && pi2_op_classes[i]->begin) pi2_op_classes[i]->begin(r, w);
  if (w->index == 0) { /* before the others can be at work: kernel time never exceeds the run's */
    skip_ended(r);
    if (p->stream && (r->n_rows || r->copies.n)) pi2_pieces_begin(r);
    if (p->clusters) pi2_pages_begin(r);
    r->begin_ns = pi2_now_ns();
    r->begin_ticks = pi2_ticks();
    pi2_assistants_begin(r);
  }
  pi2_job_begin(w, &r->stop);
  int stopped = 0;
  uint64_t busy = 0;
  if (r->copies.n) { /* the first operation, of embeddings, touches no state, and its closing barrier follows */
    const uint64_t begin = pi2_ticks();
    pi2_copies_run(&r->copies, w->index, p->members);
    busy += pi2_ticks() - begin;
  }
  const int n_ops = r->n_rows ? p->n_ops : 0;
  for (int i = 0; i < n_ops && !stopped; i++) {
    const pi2_op *op = &p->ops[i];
    const pi2_op_class *class = pi2_op_classes[op->kind];
    pi2_op streamed;
    const int behind = p->tail >= 0 && i >= p->tail && !r->n_head; /* of a chunk that is not a prompt's last */
    const pi2_op_run run = behind ? class->run_tail : class->run;
    if (!run || (op->expert >= 0 && !p->routing.count[op->expert])) { /* nobody wants it */
      if (w->index == 0) r->skipped_bytes += op->weight_bytes;
      if (r->trace) r->op_begin[w->index * p->n_ops + i] = r->op_end[w->index * p->n_ops + i] = pi2_ticks();
      continue;
    }
    if (op->streamed) {
      streamed = *op;
      op = &streamed;
      for (int j = 0; j < op->n_matrices; j++)
        if (pi2_is_streamed(&op->matrix[j])) streamed.matrix[j].page = p->scratch[w->index].pieces + j * p->max_pieces;
    }
    if (op->paged && (stopped = pi2_pages_get(r, op, w))) break;
    const uint64_t begin = pi2_ticks();
    p->scratch[w->index].waited = 0;
    stopped = run(r, op, i, w);
    const uint64_t end = pi2_ticks();
    busy += end - begin - p->scratch[w->index].waited;
    if (r->trace) {
      r->op_begin[w->index * p->n_ops + i] = begin;
      r->op_end[w->index * p->n_ops + i] = end;
    }
    if (!stopped) stopped = pi2_barrier(w);
    if (class->done) stopped = class->done(r, op, w, stopped);
    if (op->paged && w->index == 0 && !stopped) pi2_pages_release(p, op);
  }
  if (!n_ops && r->trace)
    for (int i = 0; i < p->n_ops; i++)
      r->op_begin[w->index * p->n_ops + i] = r->op_end[w->index * p->n_ops + i] = pi2_ticks();
  r->busy[w->index] = busy;
  if (w->index == 0) {
    for (int i = 0; i < PI2_OP_COUNT; i++)
      if (p->used[i] && pi2_op_classes[i]->end) pi2_op_classes[i]->end(r, stopped);
    if (p->clusters) pi2_pages_end(r, stopped);
    pi2_assistants_end(r);
    r->end_ticks = pi2_ticks();
    r->end_ns = pi2_now_ns();
    r->stopped = stopped;
  }
  const int urgent = r->urgent || stopped; /* once it is done, the run may be another one */
  pi2_barrier(w);                          /* what the run wrote is complete; the gang may report it */
  if (w->index == 0) r->done = 1;
  return urgent;
}
