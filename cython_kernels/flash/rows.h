/* Rows of a matrix that stays on flash: an embedding, of which a step needs one row for each of its tokens.
 *
 * One thread reads, several rows at a time, each with the blocks of the file around its row block. The flash is read
 * with preadv: a thread that has submitted to io_uring may have to wait for that when it ends, and this one computes,
 * too. */
#ifndef PI2_ROWS_H
#define PI2_ROWS_H
#include "api.h"
#include "flash.h"

#define PI2_ROWS_DEPTH 8 /* reads in flight; a step of decoding needs one for each sequence */

typedef struct pi2_row_reader {
  pi2_flash *flash;
  int type;
  int64_t k, offset, block_bytes; /* of the matrix in the file; bytes of a row block */
  int64_t buffer_bytes, deadline_ns;
  int n_spare, hangs; /* hangs: the deadline has passed, and no read has ended since */
  uint32_t call;
  pi2_read reads[PI2_ROWS_DEPTH], *spare[PI2_ROWS_DEPTH];
} pi2_row_reader;

/* Bytes of one of the PI2_ROWS_DEPTH buffers, for a matrix of `k` columns of `type`. */
PI2_API int64_t pi2_rows_buffer(int type, int64_t k);
/* `memory`: the buffers, aligned to PI2_SECTOR; outlives this. `flash`: of as many reads, through preadv. NULL: out of
 * memory. Reading fails with ETIMEDOUT when none of the reads in flight ends for `deadline_ns` (< 0: never). */
PI2_API pi2_row_reader *pi2_rows_create(pi2_flash *flash, int type, int64_t k, int64_t offset, uint8_t *memory,
                                        int64_t deadline_ns);
/* Row `row[i]` to `x + i * ldx`, for i < n; k floats each. Returns 0 or an error: an errno or PI2_EOF; ECANCELED
 * because `stop` was set. What is in flight then ends later, and nobody gets it. */
int pi2_rows_read(pi2_row_reader *s, const int32_t *row, int n, float *x, int64_t ldx, const _Atomic int *stop);
/* Closes the flash: as pi2_flash_close, of the memory. */
PI2_API int64_t pi2_rows_destroy(pi2_row_reader *s);
#endif
