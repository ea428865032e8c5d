/* A program: a model's forward pass as a flat array of operations with pointers, built once, run once per step.
 *
 * The same program serves every batch size: an operation reads the number of rows from the run. Between operations all
 * threads of the gang meet; inside one, units of rows are handed out by an atomic cursor, so that unequal cores share
 * a layer. Steps with few rows repeat small per-row work (norm, quantisation) on every thread instead of paying for
 * another barrier. */
#ifndef PI2_PROGRAM_H
#define PI2_PROGRAM_H
#include <stdatomic.h>
#include <string.h>

#include "api.h"
#include "arena.h"
#include "assist.h"
#include "cluster_unit.h"
#include "copies.h"
#include "gang.h"
#include "kernels.h"
#include "neuron_cache.h"
#include "op.h"
#include "pages.h"
#include "sampler.h"
#include "stream.h"

#define PI2_REPLICATED 4   /* rows up to which every thread prepares all inputs itself */
#define PI2_PANEL_ROWS 8   /* rows from which on row blocks are multiplied together */
#define PI2_TILE_ROWS 32   /* rows of a GEMM output tile */
#define PI2_TILE_BLOCKS 16 /* row blocks of one; even: the pairs of ops_linear.c */
#define PI2_TILE_WIDTH (PI2_TILE_BLOCKS * PI2_ROWS)
/* Of a tile's floats: rows a power of two apart would meet in few sets of a cache. */
#define PI2_TILE_LD (PI2_TILE_WIDTH + PI2_ROWS)
#define PI2_HEAD_ROWS 32 /* rows of logits at once */
#define PI2_FEW_ROWS 8   /* rows of a short step: what buffers have for more is reclaimable meanwhile */
#define PI2_TAILS 32     /* buffers that have rows */
#define PI2_WAITS 4096   /* of a thread in a run that are recorded, at most */

typedef struct {
  int half, interleaved;
  const double *frequencies; /* (half) */
  float magnitude;
  float *cosine, *sine; /* (max_rows, half), filled per step */
} pi2_rope;

typedef struct { /* which rows go to which expert; a shared one is the last */
  int n_experts;
  int32_t *count;  /* (experts) */
  int32_t *row;    /* (experts, max_rows), ascending */
  float *weight;   /* as row */
  int32_t *chosen; /* (max_rows, used) and their weights, before they are sorted by expert */
  float *share;
} pi2_routing;

typedef struct {                        /* one slice of a step */
  int32_t slot, start, count, row;      /* row: of its first token */
  const int32_t *pages;                 /* owned by the run */
  int32_t sample, want_logits, skipped; /* skipped: its sequence had ended when the run began */
  const int32_t *targets;               /* (count), owned by the run, or NULL */
  float *scores;                        /* (count) or NULL */
  float *logits;                        /* (count, vocab), owned by the caller, or NULL */
  pi2_pick pick;
  pi2_pick *top; /* (1 + drafts, slot's logprobs) or NULL */
  /* The last `drafts` tokens are guesses: the token before them and each of them that was right has a pick. */
  int32_t drafts, n_picks, closed; /* closed: there are no more picks */
  pi2_pick *picks;                 /* (1 + drafts) or NULL, owned by the run */
  /* Its token waits for a mask (masks.h). */
  int32_t masked;
  uint32_t *mask;         /* (mask_words), owned by the run */
  _Atomic int mask_state; /* PI2_MASK_*: set when the mask is complete */
  _Atomic int taken;      /* a thread samples it */
} pi2_slice;
enum { PI2_MASK_MISSING, PI2_MASK_THERE, PI2_MASK_ALL };

typedef struct {
  uint64_t begin, end;
} pi2_wait; /* ticks */

typedef struct pi2_run {
  struct pi2_program *program;
  int n_rows, n_slices, n_prefill, n_head, trace;
  int urgent;                           /* its result is told at once, see pi2_job */
  int32_t *token, *position, *slice_of; /* (max_rows); token -1: the slot's last */
  int32_t *head_row;                    /* (max_rows) rows that need logits */
  int32_t *prefill_row;                 /* (max_rows) rows whose keys must be stored before attention */
  int32_t *masked_row;                  /* (max_slots) scratch of the order of head rows */
  pi2_slice *slices;                    /* (max_slots) */
  pi2_copies copies;                    /* of state, before anything is computed */
  int32_t *pages, *targets;             /* arenas of this run's page tables and targets */
  float *scores;
  pi2_pick *picks;              /* (max_rows) arena of slices with drafts */
  uint32_t *masks;              /* (max_slots, mask_words) arena of masked slices */
  int n_masked;                 /* slices that are */
  _Atomic uint32_t masks_given; /* futex: masks that have come, and requests to stop */
  _Atomic int64_t mask_wait_ns; /* when the first thread began to wait for one; 0: none has */
  _Atomic int stop;
  _Atomic uint32_t *cursors;
  _Atomic uint64_t *shares;   /* (threads, share_stride) what is taken of a thread's share of an operation: row blocks
                                 from the front, << 24 from the back, << 48 a tag */
  _Atomic uint64_t *units;    /* (cursors) units taken of an operation of several passes, << 32 a tag */
  uint32_t serial;            /* which run of the program it is: the tag is its lowest bits */
  void *shared[PI2_OP_COUNT]; /* of the operations of a class in this run */
  int stopped;
  _Atomic int64_t neuron_bytes;         /* of neurons that were active, with their scales */
  int64_t skipped_bytes, cluster_bytes; /* of experts that nobody chose; read of those that are in pages */
  pi2_neuron_counts before, used;       /* before: when it began */
  uint64_t base;                        /* position of the first streamed unit */
  int64_t kept_bytes;                   /* of streamed ones that needed no reading, when it began */
  _Atomic int error; /* errno of a read that failed, or that of a cluster unit: the run was stopped by it */
  _Atomic int done;  /* last to be set: whoever sees it sees the results */
  int64_t begin_ns, end_ns;
  uint64_t begin_ticks, end_ticks;
  uint64_t *busy;              /* (threads) ticks in kernels */
  uint64_t *op_begin, *op_end; /* (threads, ops) ticks, where trace is on */
  pi2_wait *waits;             /* (threads, PI2_WAITS) within operations, where trace is on; or NULL */
  uint32_t *n_waits;           /* (threads) */
} pi2_run;

typedef struct { /* units of work that a thread took from the cursors, since the program was made */
  _Atomic int64_t row_blocks, clusters, attention;
} pi2_taken;
/* Only the thread itself counts, so that no locked instruction is needed; others may read. */
static inline void pi2_count(_Atomic int64_t *counter, int64_t more) {
  atomic_store_explicit(counter, atomic_load_explicit(counter, memory_order_relaxed) + more, memory_order_relaxed);
}

typedef struct {          /* one thread's own */
  _Alignas(64) pi2_q8 q8; /* (PI2_REPLICATED, max k) */
  float *floats;          /* (PI2_REPLICATED, max k) */
  float *tile;            /* GEMM outputs */
  const uint8_t **pieces; /* (PI2_MATRICES, max_pieces) of the running operation, where they have arrived */
  uint64_t waited;        /* ticks in the running operation */
  pi2_taken taken;
} pi2_scratch;

typedef struct pi2_program {
  const pi2_kernels *kernels;
  pi2_gang *gang;
  pi2_stream *stream;         /* or NULL: all weights are in memory */
  pi2_neuron_cache *neurons;  /* of SPARSE operations, or NULL */
  pi2_neuron_cache *clusters; /* of experts' matrices that are in pages, or NULL */
  const uint8_t **page_table; /* (PI2_MATRICES, max_pages) of the running operation */
  int32_t *page_numbers;      /* (max_pages) 0, 1, ... */
  int64_t max_pages;
  int64_t n_pieces;            /* units of the stream */
  int64_t *piece_blocks;       /* (pieces) row blocks of each */
  _Atomic int64_t *piece_left; /* of these, times rows, those that the running step has not computed with yet */
  int64_t max_pieces;
  pi2_pages tail_of[PI2_TAILS]; /* rows that short steps have no use for, in whole pages of memory */
  int n_tails, tails_touched;
  int64_t tail_bytes;
  int64_t loan_bytes; /* of the stream's, at most: of these rows, and of a KV cache that was never used so far */
  uintptr_t kv;       /* where that lies, */
  int64_t kv_bytes, kv_page_bytes,
      kv_used; /* all, a page, and from the first one's begin to the end of the last that was used */
  int tail;    /* the last attention, if of what follows it nothing is streamed or in pages: a step without logits ends
                  there; else -1 */
  int64_t share_stride; /* cursors of an operation and of further tiles of the head, in cache lines */
  pi2_routing routing;
  int pipeline;
  int wide;   /* activations are int16, else int8 */
  int mixed;  /* some operations' are in both forms (pi2_q8) */
  int traced; /* runs may be: there is room for what they record of waiting */
  int64_t dim, vocab, max_rows, max_slots, context, max_k, hidden, y_columns, attention_columns;
  int64_t reduced_columns;  /* of what predictors' first matrices make */
  int64_t prepared_k;       /* the largest k of what `prepared` and q8_prepared take: all but hidden values, which have
                               q8_hidden */
  int64_t mask_words;       /* of a mask of the vocabulary */
  int64_t mask_deadline_ns; /* how long a step waits for masks */
  int threads, n_ropes, n_ops, ops_capacity;
  int assisting, members;    /* threads that are to assist, the last ones; threads that run jobs: all, where some
                                operation needs them */
  pi2_assistant *assistants; /* (threads - members) */
  _Alignas(64) _Atomic uint64_t open; /* the stage whose input is complete (assist.c) */
  _Alignas(64) pi2_op *ops;
  pi2_rope *ropes;
  float *x, *y, *reduced, *attention, *hidden_floats, *prepared;
  pi2_q8 q8_prepared, q8_attention, q8_hidden;
  pi2_slot *slots;
  int32_t *counts; /* (max_slots, vocab) for those of slots */
  pi2_scratch *scratch;
  int used[PI2_OP_COUNT];     /* operations of each class */
  void *shared[PI2_OP_COUNT]; /* of the operations of a class */
  pi2_run runs[PI2_QUEUE];
  uint32_t next_run;
  pi2_arena arena; /* all of these buffers */
} pi2_program;

/* Another operation, zero but for its kind, its layer, `expert`, and its data, which are zeros. NULL: out of memory. It
 * moves with the next one; its data stay where they are. */
PI2_API pi2_op *pi2_op_add(pi2_program *p, int kind, int layer);
/* Widths and sizes of all buffers, without memory for them. After this p->arena.used and p->tail_bytes are those of a
 * prepared program. Weights and readers may be missing: of a matrix only shape and place count. */
PI2_API void pi2_program_measure(pi2_program *p);
/* Memory for all buffers. Returns 0, or -1 out of memory. */
PI2_API int pi2_program_prepare(pi2_program *p);
/* Of a measured or prepared program, or one that is not complete. It owns operations and rotations, not the weights. */
PI2_API void pi2_program_free(pi2_program *p);
/* Of a prepare hook: a buffer of rows, of which those that short steps have no use for are reclaimable; rows of
 * integers. */
void *pi2_take_rows(pi2_program *p, pi2_arena *a, int64_t rows, int64_t bytes);
pi2_q8 pi2_take_q8(pi2_program *p, pi2_arena *a, int64_t rows, int64_t k, int mixed);
/* The same in the arena. NULL while it measures. */
static inline void *pi2_keep(pi2_arena *a, const void *value, size_t size) {
  void *kept = pi2_arena_take(a, 1, size);
  return a->base ? memcpy(kept, value, size) : NULL;
}
static inline void pi2_widen(int64_t *width, int64_t to) { *width = to > *width ? to : *width; }

/* A run to fill (rows, slices), then post. NULL when PI2_QUEUE are unfinished. */
PI2_API pi2_run *pi2_run_new(pi2_program *p);
/* Derives head rows and what classes need from the slices, and hands the run to the gang. Returns 0, or -1 when the
 * gang has PI2_JOBS jobs. */
PI2_API int pi2_run_post(pi2_run *run);

/* The job the gang runs; context is the run. */
int pi2_run_job(void *run, pi2_worker *worker);

/* ops_experts.c: pages of experts' matrices. pi2_pages_get is called on every thread and waits until those of an
 * operation are there; nonzero if the run was stopped. The others are for thread 0; pi2_pages_release follows the
 * closing barrier. */
void pi2_largest(const float *value, int n, int wanted, int32_t *chosen); /* of equal ones those that come first */
void pi2_pages_prepare(pi2_program *p, pi2_arena *a);
void pi2_pages_begin(pi2_run *run);
int pi2_pages_get(pi2_run *run, const pi2_op *op, pi2_worker *w);
void pi2_pages_release(const pi2_program *p, const pi2_op *op);
void pi2_pages_end(pi2_run *run, int stopped);

/* ops_streamed.c: pieces of matrices that pass through a ring. */
void pi2_pieces_prepare(pi2_program *p, pi2_arena *a);
void pi2_pieces_begin(pi2_run *run); /* thread 0 */
/* Waits for those with row blocks [first, last); only then m may be multiplied by these. Returns 0 when reading has
 * failed or the run was stopped: the operation ends, and its closing barrier tells the other threads. */
int pi2_pieces_get(pi2_run *run, const pi2_matrix *m, const pi2_worker *w, int64_t first, int64_t last);
/* These row blocks have met `rows` more rows of the step. */
void pi2_pieces_release(pi2_run *run, const pi2_matrix *m, int64_t first, int64_t last, int rows);
/* Where the tile that begins at row block `from` of a matrix ends, before `to`: it lies in one piece. */
static inline int64_t pi2_tile_end(const pi2_matrix *m, int64_t from, int64_t to) {
  int64_t end = from + PI2_TILE_BLOCKS < to ? from + PI2_TILE_BLOCKS : to;
  if (pi2_is_streamed(m) && (from / m->page_blocks + 1) * m->page_blocks < end)
    end = (from / m->page_blocks + 1) * m->page_blocks;
  return end;
}

/* Rows that an operation works on: of the step, or only those of its expert, or that need logits, which they are then.
 */
static inline int pi2_rows(const pi2_run *run, const pi2_op *op) {
  return op->head_only ? run->n_head : op->expert < 0 ? run->n_rows : run->program->routing.count[op->expert];
}
static inline const int32_t *pi2_row_of(const pi2_run *run, const pi2_op *op) {
  return op->head_only    ? run->head_row
         : op->expert < 0 ? NULL
                          : run->program->routing.row + op->expert * run->program->max_rows;
}
/* A row's output, `width` values from column `column` on, in the place that the operation has for it. Overwrites t. */
static inline void pi2_put(const pi2_run *run, const pi2_op *op, int row, int64_t column, float *t, int64_t width) {
  const pi2_program *p = run->program;
  if (op->sink == PI2_MIX_INTO_Y) {
    const int64_t at = op->expert * p->max_rows + row;
    p->kernels->scale(t, p->routing.weight[at], t, width);
    p->kernels->add(t, p->y + p->routing.row[at] * p->y_columns + column, width);
  } else if (op->sink == PI2_ADD_TO_X) {
    p->kernels->add(t, p->x + (op->head_only ? run->head_row[row] : row) * p->dim + column, width);
  } else if (op->sink == PI2_TO_REDUCED) {
    memcpy(p->reduced + row * p->reduced_columns + column, t, (size_t)width * sizeof *t);
  } else {
    memcpy(p->y + row * p->y_columns + column, t, (size_t)width * sizeof *t);
  }
}

/* Inputs of a matrix product, as its type wants them. */
typedef struct {
  pi2_q8 q8;
  const float *floats;
  int64_t ld;
  int narrow; /* q8 is int8, whatever the program's others are */
} pi2_input;
enum pi2_form { PI2_AS_FLOATS, PI2_AS_INTEGERS, PI2_AS_WORDS }; /* integers: in whatever form kernels prefer */
/* Prepares `rows` rows: row i is source row rows_of[i] (or i, where NULL). May meet a barrier; *stopped is set then. */
pi2_input pi2_prepare(pi2_run *run, const pi2_op *op, int index, pi2_worker *w, int64_t k, const int32_t *row_of,
                      int rows, int form, int *stopped);
static inline pi2_q8 pi2_q8_row(const pi2_q8 *x, int64_t row) {
  pi2_q8 r = *x;
  if (r.q) r.q += row * r.ldq;
  if (r.high) r.high += row * r.ldh, r.low += row * r.ldh;
  r.d += row * r.ldb;
  r.s += row * r.ldb;
  r.h += 2 * row * r.ldb;
  return r;
}
/* A thread has waited within an operation. */
static inline void pi2_note_wait(pi2_run *run, const pi2_worker *w, uint64_t begin, uint64_t end) {
  run->program->scratch[w->index].waited += end - begin;
  if (!run->trace || !run->waits || run->n_waits[w->index] == PI2_WAITS) return;
  run->waits[w->index * PI2_WAITS + run->n_waits[w->index]++] = (pi2_wait){begin, end};
}
/* Next unit of cursor c (0..3) of operation `index`. */
static inline uint32_t pi2_take(pi2_run *run, int index, int c) {
  return atomic_fetch_add_explicit(&run->cursors[4 * index + c], 1, memory_order_relaxed);
}
/* Next unit of an operation of several passes. */
static inline int64_t pi2_take_unit(pi2_run *run, int index) {
  return (int64_t)(uint32_t)atomic_fetch_add_explicit(&run->units[index], 1, memory_order_relaxed);
}
/* The same for a thread that assists: -1 where it is another run's. */
static inline int64_t pi2_take_unit_tagged(pi2_run *run, int index, uint64_t tag) {
  uint64_t taken = atomic_load_explicit(&run->units[index], memory_order_relaxed);
  do {
    if (taken >> 32 != (uint32_t)tag) return -1;
  } while (!atomic_compare_exchange_weak_explicit(&run->units[index], &taken, taken + 1, memory_order_relaxed,
                                                  memory_order_relaxed));
  return (int64_t)(uint32_t)taken;
}
/* Where the share of thread t begins: `total` items cut evenly, in multiples of `step`. */
static inline int64_t pi2_share(int64_t total, int step, int threads, int t) {
  return t == threads ? total : total * t / threads / step * step;
}
#define PI2_SHARE_BITS 24
#define PI2_ANY_TAG UINT64_MAX
/* Of a share [begin, end): half of what is left, a multiple of `step`, `most` at most; from its end where `behind`.
 * `tag`: 0 is given where the share is another run's; of threads that run jobs it is this one's. */
static inline int pi2_take_half(_Atomic uint64_t *share, int64_t begin, int64_t end, int step, int64_t most, int behind,
                                uint64_t tag, int64_t *first, int64_t *last) {
  const uint64_t mask = ((uint64_t)1 << PI2_SHARE_BITS) - 1;
  uint64_t taken = atomic_load_explicit(share, memory_order_relaxed);
  for (;;) {
    if (tag != PI2_ANY_TAG && taken >> 2 * PI2_SHARE_BITS != (tag & 0xffff)) return 0;
    const int64_t from = begin + (int64_t)(taken & mask), to = end - (int64_t)(taken >> PI2_SHARE_BITS & mask);
    if (from >= to) return 0;
    int64_t part = (to - from) / 2 / step * step;
    if (part > most) part = most;
    if (part < step) part = step < to - from ? step : to - from;
    const uint64_t now = taken + (behind ? (uint64_t)part << PI2_SHARE_BITS : (uint64_t)part);
    if (!atomic_compare_exchange_weak_explicit(share, &taken, now, memory_order_relaxed, memory_order_relaxed))
      continue;
    *first = behind ? to - part : from;
    *last = *first + part;
    return 1;
  }
}
/* Next part [*first, *last) of `total` items, a multiple of `step` long (but for the end), of cursor `index`. A thread
 * goes through its own share from the front, by halves of what is left, so that it reads memory in one stream; then it
 * helps the others from the ends of theirs. Returns 0 when nothing is left. `most`, `tag`: see pi2_take_half. */
static inline int pi2_take_near(pi2_run *run, int index, int64_t total, int step, int64_t most, uint64_t tag, int me,
                                int64_t *first, int64_t *last) {
  const int threads = run->program->threads;
  for (int i = 0; i < threads; i++) {
    const int t = me + i < threads ? me + i : me + i - threads;
    const int64_t begin = pi2_share(total, step, threads, t), end = pi2_share(total, step, threads, t + 1);
    if (pi2_take_half(&run->shares[t * run->program->share_stride + index], begin, end, step, most, i > 0, tag, first,
                      last))
      return 1;
  }
  return 0;
}
static inline int pi2_is_float(int type) { return type == PI2_F32 || type == PI2_F16 || type == PI2_BF16; }
static inline void pi2_quantize(const pi2_program *p, const float *x, int64_t k, const pi2_q8 *o) {
  (p->wide ? p->kernels->quantize16 : p->kernels->quantize8)(x, k, o);
}
/* The same; `mixed`: in both forms. What is fine is decided over all of x. */
static inline void pi2_quantize_both(const pi2_program *p, int mixed, const float *x, int64_t k, const pi2_q8 *o) {
  if (mixed)
    p->kernels->quantize_mixed(x, k, o);
  else
    pi2_quantize(p, x, k, o);
}
/* A row from a column on, which is a multiple of 32. */
static inline pi2_q8 pi2_q8_at(const pi2_program *p, const pi2_q8 *x, int64_t row, int64_t column) {
  pi2_q8 r = pi2_q8_row(x, row);
  if (r.q) r.q += column << p->wide;
  if (r.high) r.high += column, r.low += column;
  r.d += column / 32;
  r.s += column / 32;
  r.h += column / 16;
  return r;
}
/* Row blocks [block, block + count) of m times `n` rows from row `row` on: tile[c*ld + 16*i + r] for block + i. They
 * lie side by side. */
static inline void pi2_multiply_contiguous(const pi2_program *p, const pi2_matrix *m, int64_t block, int count,
                                           const pi2_input *in, int64_t row, int n, float *tile, int64_t ld) {
  const pi2_kernels *k = p->kernels;
  const int64_t size = pi2_row_block_bytes(m->type, m->k);
  const uint8_t *w = m->data ? m->data + block * size : m->page[block / m->page_blocks] + block % m->page_blocks * size;
  const pi2_q8 x = pi2_q8_row(&in->q8, row);
  const int wide = p->wide && !in->narrow;
  if (pi2_is_float(m->type)) {
    for (int i = 0; i < count; i++)
      k->gemm_float[m->type](w + i * size, m->k, in->floats + row * in->ld, in->ld, n, tile + 16 * i, ld);
    return;
  }
  if (n >= PI2_PANEL_ROWS || !x.q) {
    (wide ? k->panel16 : k->panel8)[m->type](w, size, count, m->k, &x, n, tile, ld);
    return;
  }
  for (int i = 0; i < count; i++) (wide ? k->gemm16 : k->gemm8)[m->type](w + i * size, m->k, &x, n, tile + 16 * i, ld);
}
/* As pi2_multiply_contiguous; the blocks may lie in several pages. */
static inline void pi2_multiply(const pi2_program *p, const pi2_matrix *m, int64_t block, int count,
                                const pi2_input *in, int64_t row, int n, float *tile, int64_t ld) {
  for (int i = 0, part; i < count; i += part) {
    const int64_t left = m->data ? count : m->page_blocks - (block + i) % m->page_blocks;
    part = left < count - i ? (int)left : count - i;
    pi2_multiply_contiguous(p, m, block + i, part, in, row, n, tile + PI2_ROWS * i, ld);
  }
}
/* Rows per pass, so that their activations stay in L2 while the unit's row blocks pass by. */
static inline int pi2_pass_rows(int64_t k) {
  int64_t rows = (384 * 1024 / (k > 0 ? 2 * k : 1)) / 8 * 8;
  return (int)(rows < 8 ? 8 : rows > PI2_TILE_ROWS ? PI2_TILE_ROWS : rows);
}
#endif
