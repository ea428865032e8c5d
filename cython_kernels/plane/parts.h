/* The parts of a matrix product: what a thread takes next, members and assistants alike, and its inputs. */
#ifndef PI2_PARTS_H
#define PI2_PARTS_H
#include "assist.h"
#include "program.h"

/* PI2_AS_FLOATS where all matrices of an operation have floats. */
int pi2_form_of(const pi2_op *op);

/* A member's way through the parts of an operation: its own, and then those of assistants that are late. */
typedef struct {
  uint64_t began; /* ticks */
  int64_t done;   /* row blocks times rows */
} pi2_progress;
/* The next part of `blocks` row blocks in multiples of `step`, each of k values, times `rows` rows. */
int pi2_take_part(pi2_run *r, const pi2_op *op, int index, const pi2_worker *w, int rows, int64_t blocks, int64_t k,
                  int step, pi2_progress *at, pi2_part *out);
/* The same for a thread that assists: a tile at most, claimed. Behind pi2_claim_write and the results, pi2_end_part. */
int pi2_claim_part(pi2_run *r, const pi2_op *op, int index, const pi2_worker *w, int rows, int64_t blocks, int64_t k,
                   int step, pi2_part *out);
void pi2_end_part(pi2_run *r, int index, const pi2_worker *w, const pi2_part *part);
#endif
