/* Asynchronous reads of one file, past the page cache: the native half of the flash actor.
 *
 * One thread (the flash reader) submits, reaps and closes; any thread may wake it or ask for the statistics. Through
 * io_uring where the system permits it, else through threads that call pread. O_DIRECT where the file system has it,
 * else what was read is dropped from the page cache at once. */
#ifndef PI2_FLASH_H
#define PI2_FLASH_H
#include <stdint.h>
#include <sys/uio.h>

#include "api.h"

/* Of a file: offsets, lengths and addresses of reads are multiples of it, which O_DIRECT asks for. The logical block of
 * a device is no larger. It says nothing of the pages of memory (pages.h). */
#define PI2_SECTOR 4096
#define PI2_FLASH_MOST 256  /* reads in flight, at most */
#define PI2_FLASH_THREADS 8 /* of the preadv backend, at most */
#define PI2_FLASH_LATENCIES 24
#define PI2_FLASH_PARTS 256
#define PI2_EOF (-1) /* pi2_read.error: the file ends before the read does */

typedef struct pi2_flash pi2_flash;
enum pi2_io { PI2_IO_AUTO, PI2_IO_URING, PI2_IO_PREADV };

/* One read. The caller's memory, not touched by the caller between submit and reap (or close). */
typedef struct pi2_read {
  int64_t offset, bytes; /* multiples of PI2_SECTOR; bytes > 0 */
  uint8_t *to;           /* aligned to PI2_SECTOR; not used with parts */
  struct iovec
      *parts;  /* NULL, or where the bytes go instead, together `bytes` long, each as `to`; used up by the read */
  int n_parts; /* at most PI2_FLASH_PARTS */
  void *user;
  int error;          /* set when reaped: 0, an errno, or PI2_EOF */
  int64_t got;        /* bytes that arrived, from the front: all of them without an error */
  int64_t latency_ns; /* set when reaped: from submit until the bytes were there */
  /* private */
  int64_t asked, submitted_ns;
  struct pi2_read *next;
  int slot;
  uint8_t tries, stalls, slow;
} pi2_read;

struct pi2_flash_statistics {
  enum pi2_io io;     /* URING or PREADV */
  int direct;         /* O_DIRECT */
  int depth, threads; /* threads: of the preadv backend */
  int64_t file_bytes; /* at open */
  int64_t registered_bytes;
  int64_t reads, bytes; /* reads finished, failed ones too; bytes that arrived */
  int64_t errors;       /* reads that failed, PI2_EOF too */
  int64_t retries;      /* after EIO, EINTR, EAGAIN */
  int64_t short_reads;  /* answers with less than was asked for, at the end of the file too */
  int64_t latency_ns;   /* sum over reads */
  int64_t
      latency[PI2_FLASH_LATENCIES]; /* number of reads by latency: [0] under 1 us, [i] under 2^i us, last: all others */
  char io_reason[96];               /* "io_uring: not permitted by this system (EPERM)" */
  char direct_reason[96];
};

/* Opens the file and holds it: what is renamed over the path later is not read. NULL and *error, an errno, on failure:
 * ESPIPE for what is neither a regular file nor a block device, EINVAL for a bad depth, and with PI2_IO_URING the
 * errno of pi2_uring_probe, or EOPNOTSUPP where reads of the file cannot be told not to wait: of those, PI2_IO_AUTO
 * takes preadv. `depth`: reads in flight at most, 1 to PI2_FLASH_MOST. */
PI2_API pi2_flash *pi2_flash_open(const char *path, enum pi2_io io, int depth, int *error);

/* Optional: declares that reads will mostly go to the first `bytes` of the `most` at `base`, which io_uring then pins
 * once instead of at each read: in pieces, multiples of `unit`; a read across two of them is pinned by itself. Again,
 * with the same base, most and unit: to more of them, or to fewer, once no read goes to those that are let go. The
 * first time before any read; later from any thread, one at a time. 0, or an errno with no harm done, and the first
 * pieces may be pinned: EOPNOTSUPP without io_uring or before Linux 5.19, ENOMEM over RLIMIT_MEMLOCK, EBUSY for another
 * base. The memory must live until close. */
PI2_API int pi2_flash_register(pi2_flash *f, void *base, int64_t bytes, int64_t most, int64_t unit);
PI2_API int64_t pi2_flash_registered(pi2_flash *f); /* bytes that are pinned */

/* 0, or -1: `depth` reads are in flight. The read starts now or, together with others submitted since, at the next
 * reap; so a reap follows soon. One that cannot be is reaped with its error. */
PI2_API int pi2_flash_submit(pi2_flash *f, pi2_read *r);

/* Number of reads that have finished, in order of finishing, at most `max`. Waits for the first one: timeout_ns 0: does
 * not wait; < 0: for ever. 0: the timeout passed, or somebody woke this thread. max 0: starts what was submitted. */
PI2_API int pi2_flash_reap(pi2_flash *f, pi2_read **done, int max, int64_t timeout_ns);

/* From any thread, before close: the reap that waits, or else the next one, returns without waiting. */
PI2_API void pi2_flash_wake(pi2_flash *f);

/* Waits for reads in flight, cancelling what can be, for at most patience_ns (< 0: for ever); they are not reaped. 0:
 * nothing of the caller is written to after. Else the device does not answer, and so many bytes may still be written:
 * `f` and the reads must stay for good, and so must the addresses that the reads go to; see pi2_pages_abandon. */
PI2_API int64_t pi2_flash_close(pi2_flash *f, int64_t patience_ns);

/* First thing of a thread that reads `f`: names it, and lets it have a core at once when something has arrived. It
 * needs one for moments only, but where it waits for those that compute, up to `depth` reads end meanwhile and the
 * device goes idle: with two computing threads on two cores it waited 30 % of the time, 160 us each. A short slice, by
 * which Linux 6.12 and later run first whoever has one; and a higher priority where this process may take one (as root,
 * or by RLIMIT_NICE). */
void pi2_flash_begin_reader(const pi2_flash *f, const char *name);

/* How long a reader with this deadline waits for its reads when it closes: as long, but for a second at most, for an
 * executor has several readers and five seconds to close. */
static inline int64_t pi2_flash_patience(int64_t deadline_ns) {
  return deadline_ns < 1000000000 ? deadline_ns : 1000000000;
}
/* For reap: what is left of a deadline that began at `since`, at `now`; -1, where there is none. */
static inline int64_t pi2_flash_left(int64_t since, int64_t deadline_ns, int64_t now) {
  const int64_t left = deadline_ns - (now - since);
  return deadline_ns < 0 ? -1 : left > 0 ? left : 0;
}

/* The offset at which the file ended in the last read that failed with PI2_EOF; -1: none has. From any thread. */
PI2_API int64_t pi2_flash_ended_at(pi2_flash *f);
/* Which way the file is read, and why: of io_reason. Lives as long as `f`. */
PI2_API const char *pi2_flash_io_reason(const pi2_flash *f);
PI2_API void pi2_flash_statistics(pi2_flash *f, struct pi2_flash_statistics *s);
PI2_API int64_t pi2_flash_reads(pi2_flash *f); /* that have ended */

/* Whether this thread may use io_uring: 0, or an errno. `why`: a sentence either way. A filter that would
 * end whoever asks for io_uring is EPERM. */
PI2_API int pi2_uring_probe(char *why, int room);
#endif
