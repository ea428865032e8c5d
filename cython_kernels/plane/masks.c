#include "masks.h"

#include <string.h>

void pi2_mask_give(pi2_run *r, pi2_slice *s, const uint32_t *allowed) {
  if (!s->masked || atomic_load(&s->mask_state)) return;
  if (allowed) memcpy(s->mask, allowed, (size_t)r->program->mask_words * sizeof *allowed);
  atomic_store(&s->mask_state, allowed ? PI2_MASK_THERE : PI2_MASK_ALL);
  atomic_fetch_add(&r->masks_given, 1);
  pi2_futex_wake(&r->masks_given);
}
void pi2_run_stop(pi2_run *r) {
  atomic_store(&r->stop, 1);
  atomic_fetch_add(&r->masks_given, 1); /* or a thread might go to sleep behind its look at `stop` */
  pi2_futex_wake(&r->masks_given);
}

/* Nanoseconds until masks that are not there are given up; the first thread that asks begins to count. */
static int64_t patience(pi2_run *r) {
  int64_t begun = atomic_load(&r->mask_wait_ns);
  const int64_t now = pi2_now_ns();
  if (!begun && atomic_compare_exchange_strong(&r->mask_wait_ns, &begun, now)) begun = now;
  return begun + r->program->mask_deadline_ns - now;
}

int pi2_masked_row_take(pi2_run *r, const pi2_worker *w, int first, int n) {
  for (;;) {
    const uint32_t given = atomic_load(&r->masks_given); /* before the look at the masks */
    const int64_t left = patience(r);
    int missing = 0;
    for (int i = 0; i < n; i++) {
      const int32_t row = r->head_row[first + i];
      if (!pi2_row_is_masked(r, row)) continue;
      pi2_slice *s = &r->slices[r->slice_of[row]];
      if (atomic_load(&s->taken)) continue;
      if (!atomic_load(&s->mask_state) && left > 0)
        missing = 1;
      else if (!atomic_exchange(&s->taken, 1))
        return i;
    }
    if (!missing || atomic_load(&r->stop)) return -1;
    const uint64_t begin = pi2_ticks();
    pi2_futex_wait(&r->masks_given, given, left);
    pi2_note_wait(r, w, begin, pi2_ticks());
  }
}
