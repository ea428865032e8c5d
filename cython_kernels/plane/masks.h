/* Masks of tokens that come while a step runs: a grammar knows what it allows only once it has seen the token before,
 * which the model needs at once. So all is computed but the token; the rows that need no mask are finished, and the
 * others wait for theirs. The control plane gives it from another thread, and wakes who waits. */
#ifndef PI2_MASKS_H
#define PI2_MASKS_H
#include "program.h"

/* -- the control plane */
/* Of a slice in flight that is masked: what it allows, (mask_words) that are copied, or NULL for all. The first one
 * counts. */
PI2_API void pi2_mask_give(pi2_run *run, pi2_slice *slice, const uint32_t *allowed);
/* Asks a run to end at its next barrier, and ends its wait for masks. */
PI2_API void pi2_run_stop(pi2_run *run);

/* -- threads of the gang */
/* Whether a row of the step is sampled by a mask. */
static inline int pi2_row_is_masked(const pi2_run *run, int32_t row) {
  const pi2_slice *s = &run->slices[run->slice_of[row]];
  return s->masked && row == s->row + s->count - 1;
}
/* Takes the next masked row whose mask is there, or will not come, of the rows head_row[first] to [first + n); sleeps
 * while there is none. Returns its index from `first` on; -1: all are taken, or the run was asked to stop. Every thread
 * that meets at barriers calls it until then, so that all are awake when the last mask has come. */
int pi2_masked_row_take(pi2_run *run, const pi2_worker *w, int first, int n);
#endif
