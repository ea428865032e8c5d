/* What flash.c and flash_uring.c share. */
#ifndef PI2_FLASH_PRIVATE_H
#define PI2_FLASH_PRIVATE_H
#include <pthread.h>
#include <semaphore.h>
#include <stdatomic.h>

#include "flash.h"
#include "system_calls.h"

typedef struct pi2_ring pi2_ring;

struct pi2_flash {
  int fd, direct, depth, wake_fd; /* wake_fd: of io_uring */
  int64_t file_bytes, page;
  pi2_deadly deadly; /* calls that nobody may make */
  int in_flight;     /* submitted and not reaped; of the one thread */
  atomic_int closing, woken;
  pi2_read *done, **done_end; /* finished, not reaped; of the preadv backend: under `mutex` */
  pi2_ring *ring;             /* NULL: preadv */
  int threads;
  pthread_t thread[PI2_FLASH_THREADS];
  pthread_mutex_t mutex;
  /* Counts what is queued. Not a condition variable: several threads wait, and glibc before 2.41 may lose a signal then
   * (its bug 25847). One thread waits for `finished`. */
  sem_t work;
  pthread_cond_t finished;
  pi2_read *queue, **queue_end; /* under `mutex` */
  int64_t reading;              /* bytes of the reads that threads are at; under `mutex` */
  _Atomic int64_t ended_at;     /* where the file ended in a read that failed for it; -1: none has */
  _Atomic int64_t registered_bytes, reads, bytes, errors, retries, short_reads, latency_ns,
      latency[PI2_FLASH_LATENCIES];
  char io_reason[96], direct_reason[96];
};

const char *pi2_errno_name(int error);

/* What the kernel answered to a read of r->asked bytes: a length, or -errno. Returns 1 when the read is finished (error
 * and got are set, and it is counted), 0 when it goes on with pi2_read_next. */
int pi2_read_settle(pi2_flash *f, pi2_read *r, int64_t result);
/* Sets r->asked: the next thing to ask for is that many bytes at r->offset + r->got. */
void pi2_read_next(pi2_read *r);
void pi2_read_fail(pi2_flash *f, pi2_read *r, int error);
void pi2_done_push(pi2_flash *f, pi2_read *r);
int pi2_done_take(pi2_flash *f, pi2_read **done, int max);

/* NULL and *error. f->fd, depth, wake_fd are set. */
pi2_ring *pi2_ring_open(pi2_flash *f, int *error);
/* As pi2_flash_register, in pieces of `piece` bytes. *registered: how many are. */
int pi2_ring_register(pi2_ring *ring, void *base, int64_t bytes, int64_t most, int64_t piece, int64_t *registered);
void pi2_ring_submit(pi2_flash *f, pi2_read *r);
int pi2_ring_reap(pi2_flash *f, pi2_read **done, int max, int64_t timeout_ns);
int64_t pi2_ring_close(pi2_flash *f, int64_t patience_ns); /* as pi2_flash_close */
#endif
