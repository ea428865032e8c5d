/* An operation of a program, and what its kind knows how to do.
 *
 * program.c goes through operations by the hooks of their classes alone. So a new kind is a file ops_*.c with its
 * class, and a line in PI2_OP_KINDS. */
#ifndef PI2_OP_H
#define PI2_OP_H
#include "api.h"
#include "arena.h"
#include "gang.h"
#include "kernels.h"

#define PI2_MATRICES 3 /* of one operation */

/* KIND(PI2_<first>, pi2_<second>_class) */
#define PI2_OP_KINDS(KIND)   \
  KIND(EMBED, embed)         \
  KIND(LINEAR, linear)       \
  KIND(ATTENTION, attention) \
  KIND(FFN, ffn)             \
  KIND(ADD, add)             \
  KIND(HEAD, head)           \
  KIND(SPARSE, sparse)       \
  KIND(ROUTE, route)         \
  KIND(HANDOFF, handoff)     \
  KIND(JOIN, join)

enum pi2_op_kind {
#define PI2_KIND(number, name) PI2_##number,
  PI2_OP_KINDS(PI2_KIND)
#undef PI2_KIND
      PI2_OP_COUNT
};

typedef struct {
  int type;
  int64_t rows, k;
  const uint8_t *data;  /* row blocks; NULL: in pages or streamed in pieces, and known only while its operation runs */
  const float *bias;    /* (rows) or NULL */
  int unit, stride;     /* of the stream, where streamed: its first piece, and from each to its next */
  int region;           /* of the clusters, where data is NULL and this not -1: the matrix of an expert, in pages */
  int64_t page_blocks;  /* row blocks of a page or piece */
  const uint8_t **page; /* where each page or piece lies */
} pi2_matrix;
static inline int64_t pi2_row_blocks(const pi2_matrix *m) { return (m->rows + PI2_ROWS - 1) / PI2_ROWS; }
static inline int pi2_is_streamed(const pi2_matrix *m) { return !m->data && m->region < 0; }
static inline int pi2_is_paged(const pi2_matrix *m) { return !m->data && m->region >= 0; }
/* Pages or pieces of one that is not in memory. */
static inline int64_t pi2_parts(const pi2_matrix *m) {
  return (pi2_row_blocks(m) + m->page_blocks - 1) / m->page_blocks;
}

typedef struct { /* weight NULL: no norm */
  const float *weight;
  float offset, eps;
} pi2_norm;

enum pi2_source { PI2_FROM_X, PI2_FROM_ATTENTION, PI2_FROM_HIDDEN };
/* Mix: times the expert's weight, added. Reduced: what a predictor's second matrix is multiplied by. */
enum pi2_sink { PI2_TO_Y, PI2_ADD_TO_X, PI2_MIX_INTO_Y, PI2_TO_REDUCED };

typedef struct pi2_op { /* what any kind may have; zero where it does not */
  int kind, layer;
  pi2_norm norm; /* of its input */
  int source, sink, n_matrices;
  pi2_matrix matrix[PI2_MATRICES];
  int streamed, tile_blocks; /* how many of its matrices are; row blocks that all rows meet before the next ones do */
  int paged;                 /* how many of its matrices are */
  int expert;                /* whose rows it works on; -1: all rows */
  int head_only;             /* works on rows that need logits alone: nothing reads what others would become */
  int64_t weight_bytes;      /* of its matrices */
  int mixed;                 /* the rows that it quantises become int16 in both forms (pi2_q8) */
  int q8_in, q8_out; /* the source is integers already; the next operation wants them: quantise while in cache */
  void *data;        /* its kind's own, of its class's data_bytes */
} pi2_op;

struct pi2_program;
struct pi2_run;
/* Work on every thread, which ends before the closing barrier. Nonzero if stopped at an inner one. */
typedef int (*pi2_op_run)(struct pi2_run *run, const pi2_op *op, int index, pi2_worker *w);

/* Hooks may be NULL but for `run`. Those of a class are called where the program has an operation of it. */
typedef struct {
  const char *name; /* of its operations, in traces */
  const char *(*name_of)(const pi2_op *op);
  size_t data_bytes;
  /* -- when the program is built */
  void (*measure)(struct pi2_program *p, const pi2_op *op); /* raises the widths of common buffers to what op needs */
  /* Takes what all operations of the class share, and keeps it in p->shared and runs' `shared`. Runs twice: while the
   * arena measures, what it has taken must not be touched. */
  void (*prepare)(struct pi2_program *p, pi2_arena *a);
  /* -- when a step is posted, on the thread of the control plane */
  void (*post)(struct pi2_run *run);
  /* -- while a step runs, on every thread */
  void (*begin)(struct pi2_run *run, pi2_worker *w); /* before the first operation; no barrier follows */
  pi2_op_run run;
  pi2_op_run run_tail; /* see pi2_program.tail; NULL: nothing is left to do */
  /* Parts of an open stage, on a thread that assists (assist.h). NULL: all threads run jobs, if the program has an
   * operation of the class with weights. */
  void (*assist)(struct pi2_run *run, const pi2_op *op, int index, pi2_worker *w);
  int (*done)(struct pi2_run *run, const pi2_op *op, pi2_worker *w, int stopped); /* behind the closing barrier */
  void (*end)(struct pi2_run *run, int stopped); /* thread 0, behind the last operation */
  /* -- what it is */
  int on_all_threads;                    /* it counts on every thread of the gang: none assists in its program */
  int by_row;                            /* of each row nothing but that row comes of it: rows may be left out */
  int (*on_head_rows)(const pi2_op *op); /* whether it can work on the rows that need logits alone (head_only) */
} pi2_op_class;

extern const pi2_op_class *const pi2_op_classes[PI2_OP_COUNT];
/* Of an operation, in traces. */
PI2_API const char *pi2_op_name(const pi2_op *op);
#endif
