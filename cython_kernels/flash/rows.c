#include "rows.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdlib.h>

#include "kernels.h"
#include "waiting.h"

#define LOOK_NS 10000000 /* how often a call looks whether it was stopped */

static int64_t up(int64_t n) { return (n + PI2_SECTOR - 1) / PI2_SECTOR * PI2_SECTOR; }

int64_t pi2_rows_buffer(int type, int64_t k) { return up(pi2_row_block_bytes(type, k)) + PI2_SECTOR; }

pi2_row_reader *pi2_rows_create(pi2_flash *flash, int type, int64_t k, int64_t offset, uint8_t *memory,
                                int64_t deadline_ns) {
  pi2_row_reader *s = calloc(1, sizeof *s);
  if (!s) return NULL;
  s->flash = flash, s->type = type, s->k = k, s->offset = offset, s->deadline_ns = deadline_ns;
  s->block_bytes = pi2_row_block_bytes(type, k);
  s->buffer_bytes = pi2_rows_buffer(type, k);
  for (int i = 0; i < PI2_ROWS_DEPTH; i++) {
    s->reads[i].to = memory + i * s->buffer_bytes;
    s->spare[s->n_spare++] = &s->reads[i];
  }
  return s;
}

/* user: the call in the upper half, and which of its rows. Reads of calls that ended before them come back in later
 * ones. */
static void start(pi2_row_reader *s, const int32_t *row, int i) {
  pi2_read *r = s->spare[--s->n_spare];
  const int64_t at = s->offset + row[i] / PI2_ROWS * s->block_bytes;
  r->offset = at / PI2_SECTOR * PI2_SECTOR;
  r->bytes = up(at + s->block_bytes) - r->offset;
  r->user = (void *)(uintptr_t)((uint64_t)s->call << 32 | (uint32_t)i);
  pi2_flash_submit(s->flash, r); /* there are as many reads as it takes */
}
/* Returns whether it was of this call, and sets its error. */
static int finish(pi2_row_reader *s, pi2_read *r, const int32_t *row, float *x, int64_t ldx, int *error) {
  const uint64_t user = (uint64_t)(uintptr_t)r->user;
  const uint32_t i = (uint32_t)user;
  s->spare[s->n_spare++] = r;
  if (user >> 32 != s->call) return 0;
  const int64_t at = s->offset + row[i] / PI2_ROWS * s->block_bytes;
  if (r->error)
    *error = r->error;
  else
    pi2_unpack_row(s->type, r->to + (at - r->offset), s->k, row[i] % PI2_ROWS, x + i * ldx);
  return 1;
}

int pi2_rows_read(pi2_row_reader *s, const int32_t *row, int n, float *x, int64_t ldx, const _Atomic int *stop) {
  pi2_read *done[PI2_ROWS_DEPTH];
  int begun = 0, left = n, error = 0;
  int64_t now = pi2_now_ns(), since = now; /* a read ended last, or this began */
  s->call++;
  while (left && !error) {
    if (!s->hangs)
      while (s->n_spare && begun < n) start(s, row, begun++);
    const int64_t more = pi2_flash_left(since, s->deadline_ns, now);
    const int got = pi2_flash_reap(s->flash, done, PI2_ROWS_DEPTH,
                                   s->hangs                      ? 0
                                   : more >= 0 && more < LOOK_NS ? more
                                                                 : LOOK_NS);
    now = pi2_now_ns();
    for (int i = 0; i < got; i++) left -= finish(s, done[i], row, x, ldx, &error);
    if (got)
      since = now, s->hangs = 0;
    else if (s->hangs || (s->deadline_ns >= 0 && now - since >= s->deadline_ns))
      s->hangs = 1, error = ETIMEDOUT;
    if (left && !error && atomic_load(stop)) error = ECANCELED;
  }
  return error;
}

int64_t pi2_rows_destroy(pi2_row_reader *s) {
  const int64_t left = pi2_flash_close(s->flash, pi2_flash_patience(s->deadline_ns));
  if (left) return left; /* `reads` and the memory are still written to */
  free(s);
  return 0;
}
