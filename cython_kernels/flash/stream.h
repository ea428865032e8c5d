/* The streaming segment: weights that do not fit, read in the order in which a program uses them, round and round.
 *
 * A dense model needs every weight in every step, so a cache of the recently used ones would always miss. Here one
 * thread reads ahead into a ring: unit after unit (a unit is a piece of a matrix), over the end of a step into the
 * next, until the ring is full. The threads of the gang wait for a unit where they need it, and release units in their
 * order.
 *
 * Positions count units for ever: position p is unit p mod n of lap p div n, and a run uses one lap. A run that was
 * stopped leaves the rest of its lap unread: the next one begins at its own.
 *
 * Memory that is kept free for something else is reclaimable: the stream may use it meanwhile. Some units have a home
 * there, and once read they are resident and not read again, until it is taken back (pi2_stream_lend). */
#ifndef PI2_STREAM_H
#define PI2_STREAM_H
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "api.h"
#include "flash.h"

typedef struct {
  int64_t offset, bytes; /* in the file; multiples of PI2_SECTOR */
  int64_t skip;          /* of these, bytes before the unit */
  int64_t home;          /* in reclaimable memory; -1: none */
} pi2_extent;

typedef struct { /* a unit on its way or in the ring */
  uint8_t *at;
  int64_t submitted;                /* bytes handed to flash */
  int pending;                      /* reads in flight */
  int home;                         /* it lies in reclaimable memory, and not in the ring */
  int kept;                         /* reclaimable memory has all of the unit, from an earlier lap or this one */
  int dropped;                      /* released before all of it was asked for */
  _Atomic int64_t begin_ns, end_ns; /* of its last reading, for traces */
} pi2_placed;

typedef struct pi2_stream {
  pi2_flash *flash;
  const pi2_extent *units;
  int n, depth;
  int64_t read_bytes, deadline_ns;
  uint8_t *ring;
  int64_t ring_bytes;
  pthread_t thread;
  /* the reader's own */
  pi2_placed *placed;  /* (n), by position mod n */
  uint64_t tail, next; /* positions [tail, next) hold memory */
  uint64_t oldest;     /* the first of these that lies in the ring, if any */
  int64_t head;        /* where the next one goes, if there is room */
  pi2_read *reads;     /* (depth) */
  pi2_read **spare;
  int n_spare;
  /* shared */
  _Alignas(64) _Atomic uint32_t ready_word; /* futex: changes when `ready` or `error` does */
  _Atomic uint64_t ready;                   /* positions below it have arrived */
  _Atomic int error;                        /* sticky: nothing arrives any more */
  _Atomic int sleepers;
  _Alignas(64) _Atomic uint64_t released; /* positions below it are not needed */
  _Atomic uint32_t work_word;             /* futex: the reader has something to look at */
  _Atomic int full;                       /* the reader had no room for the next unit: a release is news to it */
  _Atomic int closing;
  pthread_mutex_t lending; /* of the next three; they change with it held, and are read without */
  uint8_t *loan;
  _Atomic int64_t lent, wanted;   /* bytes of the loan that may be used; that shall be: the reader sees to it */
  _Atomic int64_t kept_bytes;     /* of units that need not be read */
  _Atomic int64_t bytes, busy_ns; /* read; time with a read in flight */
  _Atomic int64_t stall_ns;       /* that thread 0 has waited for units */
  uint64_t laps;                  /* begun by runs */
} pi2_stream;

/* Starts the reader. `units` (n >= 1) and `ring` (aligned to PI2_SECTOR) outlive the stream; the ring has room for the
 * units that are used together and, where they differ in size, the largest beside them. NULL and *error (an errno) on
 * failure. Reading fails with ETIMEDOUT when reads are in flight and none ends for `deadline_ns` (< 0: never). */
PI2_API pi2_stream *pi2_stream_create(pi2_flash *flash, const pi2_extent *units, int n, int64_t read_bytes, int depth,
                                      uint8_t *ring, int64_t ring_bytes, int64_t deadline_ns, int *error);
/* The memory in which units have their homes (sectors, before any of it is used); it outlives the stream. */
PI2_API void pi2_stream_loan(pi2_stream *s, uint8_t *loan);
/* Thread 0 of a run, behind pi2_stream_begin and before the others look: the first `bytes` of it may be used from now
 * on. Where more were, waits until nobody reads into these and gives them back to the system; not so once reading has
 * failed, or where `stop` is set before. */
void pi2_stream_lend(pi2_stream *s, int64_t bytes, const _Atomic int *stop);
/* Stops and joins the reader, closes the flash. 0: nobody writes to the ring afterwards; else, as pi2_flash_close. */
PI2_API int64_t pi2_stream_destroy(pi2_stream *s);

/* Thread 0 of a run, before the others look: the position of its first unit. What earlier runs left is dropped. */
uint64_t pi2_stream_begin(pi2_stream *s);
/* Waits for a position and returns the unit's address; NULL once reading has failed, or where `stop` is set before it
 * has arrived. */
const uint8_t *pi2_stream_get(pi2_stream *s, uint64_t position, int64_t spin_ns, const _Atomic int *stop);
/* No thread needs the units of [position, end) any more, and before `position` all are released. Returns 0, and does
 * nothing, where another thread has released the one at `position`. */
int pi2_stream_release(pi2_stream *s, uint64_t position, uint64_t end);
#endif
