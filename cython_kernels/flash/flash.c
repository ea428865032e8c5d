#define _GNU_SOURCE
#include "flash_private.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "pages.h"
#include "waiting.h"

#ifndef O_DIRECT
#define O_DIRECT 0
#endif

enum { EIO_TRIES = 2, PASSING_TRIES = 64 };
enum {
  MOST_PIECES = 8192,
  LEAST_PIECE = 2 << 20
}; /* of registered memory. The kernel's limits are 16,384 of them, and 1 GiB each */
#define MOST_ASKED (1 << 30) /* the kernel gives at most 2 GiB at a time */

const char *pi2_errno_name(int error) { /* strerrorname_np is of glibc 2.32 */
  switch (error) {
  case EPERM: return "EPERM";
  case EAGAIN: return "EAGAIN";
  case EACCES: return "EACCES";
  case ENOSYS: return "ENOSYS";
  case EINVAL: return "EINVAL";
  case ENOMEM: return "ENOMEM";
  case EMFILE: return "EMFILE";
  case ENFILE: return "ENFILE";
  case EOPNOTSUPP: return "EOPNOTSUPP";
  case ETIME: return "ETIME";
  default: return "another error";
  }
}

static void count(_Atomic int64_t *counter, int64_t n) { atomic_fetch_add_explicit(counter, n, memory_order_relaxed); }
static int64_t counted(_Atomic int64_t *counter) { return atomic_load_explicit(counter, memory_order_relaxed); }

/* ---- the thread that reads ---- */

#define READER_NICE (-15)
#define READER_SLICE_NS 100000 /* the shortest there is */

void pi2_flash_begin_reader(const pi2_flash *f, const char *name) {
  pthread_setname_np(pthread_self(), name);
  const pid_t me = (pid_t)syscall(SYS_gettid); /* Linux has priorities by thread */
  if (!f->deadly.signal[PI2_CALL_PRIORITY] && getpriority(PRIO_PROCESS, (id_t)me) > READER_NICE)
    setpriority(PRIO_PROCESS, (id_t)me, READER_NICE); /* or not: EACCES */
#ifdef SYS_sched_setattr
  if (f->deadly.signal[PI2_CALL_SLICE]) return;
  struct {
    uint32_t size, policy;
    uint64_t flags;
    int32_t nice;
    uint32_t priority;
    uint64_t runtime, deadline, period;
  } attributes;
  if (syscall(SYS_sched_getattr, me, &attributes, sizeof attributes, 0) || attributes.policy != 0)
    return;                             /* 0: SCHED_OTHER */
  attributes.runtime = READER_SLICE_NS; /* before 6.12 nobody reads it */
  attributes.size = sizeof attributes;
  syscall(SYS_sched_setattr, me, &attributes, 0);
#endif
}

/* ---- one read ---- */

void pi2_read_next(pi2_read *r) {
  const int64_t rest = r->bytes - r->got;
  r->asked = rest < MOST_ASKED ? rest : MOST_ASKED;
}

static int finish(pi2_flash *f, pi2_read *r, int error) {
  r->error = error;
  r->latency_ns = pi2_now_ns() - r->submitted_ns;
  if (!f->direct && r->got > 0) { /* whole pages of whatever size: the kernel keeps those that are named in part */
    const int64_t begin = r->offset / f->page * f->page, end = (r->offset + r->got + f->page - 1) / f->page * f->page;
    posix_fadvise(f->fd, begin, end - begin, POSIX_FADV_DONTNEED);
  }
  int bucket = 0;
  for (int64_t us = r->latency_ns / 1000; us && bucket < PI2_FLASH_LATENCIES - 1; us >>= 1) bucket++;
  count(&f->latency[bucket], 1);
  count(&f->latency_ns, r->latency_ns);
  count(&f->bytes, r->got);
  count(&f->errors, error != 0);
  count(&f->reads, 1);
  return 1;
}

void pi2_read_fail(pi2_flash *f, pi2_read *r, int error) { finish(f, r, error); }

static int ended(pi2_flash *f, pi2_read *r) {
  int64_t end = r->offset + r->got; /* or before: the read may begin beyond it */
  struct stat s;
  if (!fstat(f->fd, &s) && S_ISREG(s.st_mode) && s.st_size < end) end = s.st_size;
  atomic_store_explicit(&f->ended_at, end, memory_order_relaxed);
  return finish(f, r, PI2_EOF);
}

int pi2_read_settle(pi2_flash *f, pi2_read *r, int64_t result) {
  if (atomic_load(&f->closing)) return finish(f, r, ECANCELED); /* nobody reaps it */
  if (result < 0) {
    const int error = (int)-result;
    /* ECANCELED without closing: the thread that submitted has ended, and io_uring takes its requests back */
    const int passing = error == EINTR || error == EAGAIN || error == ECANCELED;
    if (r->tries >= (passing ? PASSING_TRIES : error == EIO ? EIO_TRIES : 0)) return finish(f, r, error);
    r->tries++;
    r->slow = 1;
    count(&f->retries, 1);
    pi2_read_next(r);
    return 0;
  }
  if (result < r->asked) count(&f->short_reads, 1);
  if (result == 0) return ended(f, r);
  r->tries = 0;
  /* O_DIRECT continues at whole blocks only. Less than one block, twice: the file ends there. */
  const int64_t whole = f->direct ? result & -PI2_SECTOR : result;
  if (whole)
    r->stalls = 0;
  else if (r->stalls++) {
    r->got += result;
    return ended(f, r);
  }
  r->got += whole;
  if (r->got == r->bytes) return finish(f, r, 0);
  for (int64_t rest = whole; r->parts && rest;) {
    const int64_t length = (int64_t)r->parts->iov_len, gone = rest < length ? rest : length;
    r->parts->iov_base = (uint8_t *)r->parts->iov_base + gone;
    r->parts->iov_len -= (size_t)gone;
    rest -= gone;
    if (gone == length) r->parts++, r->n_parts--;
  }
  pi2_read_next(r);
  return 0;
}

void pi2_done_push(pi2_flash *f, pi2_read *r) {
  r->next = NULL;
  *f->done_end = r;
  f->done_end = &r->next;
}
int pi2_done_take(pi2_flash *f, pi2_read **done, int max) {
  int n = 0;
  while (n < max && f->done) {
    done[n++] = f->done;
    f->done = f->done->next;
  }
  if (!f->done) f->done_end = &f->done;
  return n;
}

/* ---- the preadv backend ---- */

static void *io_main(void *argument) {
  pi2_flash *f = argument;
  for (;;) {
    while (sem_wait(&f->work)) { /* EINTR */
    }
    pthread_mutex_lock(&f->mutex);
    if (atomic_load(&f->closing)) { /* what is still queued is dropped */
      pthread_mutex_unlock(&f->mutex);
      return NULL;
    }
    pi2_read *r = f->queue;
    f->queue = r->next;
    if (!f->queue) f->queue_end = &f->queue;
    f->reading += r->bytes;
    pthread_mutex_unlock(&f->mutex);
    ssize_t n;
    do {
      struct iovec part = {.iov_base = r->to + r->got, .iov_len = (size_t)r->asked};
      n = preadv(f->fd, r->parts ? r->parts : &part, r->parts ? r->n_parts : 1, r->offset + r->got);
    } while (!pi2_read_settle(f, r, n < 0 ? -errno : n));
    pthread_mutex_lock(&f->mutex);
    f->reading -= r->bytes;
    pi2_done_push(f, r);
    pthread_cond_signal(&f->finished);
    pthread_mutex_unlock(&f->mutex);
  }
}

/* As pi2_flash_close. */
static int64_t pool_join(pi2_flash *f, int64_t patience_ns) {
  pthread_mutex_lock(&f->mutex);
  atomic_store(&f->closing, 1);
  pthread_mutex_unlock(&f->mutex);
  for (int i = 0; i < f->threads; i++) sem_post(&f->work);
  struct timespec until;
  clock_gettime(CLOCK_REALTIME, &until); /* the clock of pthread_timedjoin_np */
  until.tv_sec += (time_t)(patience_ns / 1000000000);
  until.tv_nsec += (long)(patience_ns % 1000000000);
  if (until.tv_nsec >= 1000000000) until.tv_sec++, until.tv_nsec -= 1000000000;
  for (int i = 0; i < f->threads; i++) {
    if (patience_ns >= 0 && !pthread_timedjoin_np(f->thread[i], NULL, &until)) continue;
    pthread_mutex_lock(&f->mutex);
    const int64_t left = patience_ns < 0 ? 0 : f->reading;
    pthread_mutex_unlock(&f->mutex);
    if (left) return left;
    pthread_join(f->thread[i], NULL); /* it is at no read, but has not had a core */
  }
  return 0;
}

static int pool_start(pi2_flash *f) {
  const int threads = f->depth < PI2_FLASH_THREADS ? f->depth : PI2_FLASH_THREADS;
  sigset_t all, before; /* signals are for the threads that expect them */
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  int error = 0;
  while (!error && f->threads < threads) {
    error = pthread_create(&f->thread[f->threads], NULL, io_main, f);
    if (!error) pthread_setname_np(f->thread[f->threads++], "pi2rt/io");
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (error) pool_join(f, -1);
  return error;
}

static int pool_reap(pi2_flash *f, pi2_read **done, int max, int64_t timeout_ns) {
  struct timespec until;
  if (timeout_ns > 0) {
    const int64_t now = pi2_now_ns(), at = timeout_ns < INT64_MAX - now ? now + timeout_ns : INT64_MAX;
    until = (struct timespec){.tv_sec = (time_t)(at / 1000000000), .tv_nsec = (long)(at % 1000000000)};
  }
  int n = 0, error = 0;
  pthread_mutex_lock(&f->mutex);
  for (;;) {
    n = pi2_done_take(f, done, max);
    if (atomic_exchange(&f->woken, 0) || n || max <= 0 || timeout_ns == 0 || error == ETIMEDOUT) break;
    error = timeout_ns < 0 ? pthread_cond_wait(&f->finished, &f->mutex)
                           : pthread_cond_timedwait(&f->finished, &f->mutex, &until);
  }
  pthread_mutex_unlock(&f->mutex);
  return n;
}

/* ---- open, close ---- */

/* One read as the others will be. Returns 0 or an errno. */
static int try_direct(int fd) {
  void *block = NULL;
  if (posix_memalign(&block, PI2_SECTOR, PI2_SECTOR)) return ENOMEM;
  const int error = pread(fd, block, PI2_SECTOR, 0) < 0 ? errno : 0;
  free(block);
  return error;
}

/* Whether reads of this file may wait where they were told not to, as those of FUSE do: io_uring then waits when a read
 * is started, and gains nothing. What is more, where such a file system has O_DIRECT, io_uring goes on after a short
 * read at the place where that one began, and reports success (seen in Linux 6.18). */
static int waits_anyway(const pi2_flash *f) {
#ifdef RWF_NOWAIT
  if (f->deadly.signal[PI2_CALL_NOWAIT]) return 0;
  void *block = NULL;
  if (posix_memalign(&block, PI2_SECTOR, PI2_SECTOR)) return 1;
  const struct iovec part = {.iov_base = block, .iov_len = PI2_SECTOR};
  const int refused = preadv2(f->fd, &part, 1, 0, RWF_NOWAIT) < 0 && errno == EOPNOTSUPP;
  free(block);
  return refused;
#else
  return (void)f, 0;
#endif
}

/* Sets fd, direct, file_bytes. Returns 0 or an errno. */
static int open_file(pi2_flash *f, const char *path) {
  /* O_NONBLOCK: a pipe without a writer must not hang us */
  const int flags = O_RDONLY | O_CLOEXEC | O_NONBLOCK;
  f->direct = O_DIRECT != 0;
  f->fd = open(path, flags | O_DIRECT);
  int refused = 0;
  if (f->fd < 0 && errno == EINVAL && O_DIRECT != 0) {
    refused = EINVAL;
    f->direct = 0;
    f->fd = open(path, flags);
  }
  if (f->fd < 0) return errno;
  struct stat s;
  if (fstat(f->fd, &s)) return errno;
  if (S_ISDIR(s.st_mode)) return EISDIR;
  if (!S_ISREG(s.st_mode) && !S_ISBLK(s.st_mode)) return ESPIPE;
  f->file_bytes = S_ISBLK(s.st_mode) ? lseek(f->fd, 0, SEEK_END) : s.st_size;
  int mode = fcntl(f->fd, F_GETFL);
  if (mode < 0 || fcntl(f->fd, F_SETFL, mode & ~O_NONBLOCK)) return errno;
#ifdef STATX_DIOALIGN
  struct statx x; /* says so where the file system would take O_DIRECT and read through the page cache all the same */
  if (f->direct && !f->deadly.signal[PI2_CALL_STATX] && !statx(f->fd, "", AT_EMPTY_PATH, STATX_DIOALIGN, &x) &&
      (x.stx_mask & STATX_DIOALIGN) &&
      (x.stx_dio_offset_align == 0 || x.stx_dio_offset_align > PI2_SECTOR || x.stx_dio_mem_align > PI2_SECTOR))
    refused = EOPNOTSUPP;
#endif
  if (f->direct && !refused) {
    const int error = try_direct(f->fd);
    if (error == EINVAL || error == EOPNOTSUPP || error == ENOTSUP) refused = error;
  }
  if (f->direct && refused) {
    /* of the same descriptor: the path may name another file by now */
    if (fcntl(f->fd, F_SETFL, mode & ~(O_NONBLOCK | O_DIRECT))) return errno;
    f->direct = 0;
  }
  if (f->direct)
    snprintf(f->direct_reason, sizeof f->direct_reason, "O_DIRECT: the page cache is bypassed");
  else {
    snprintf(f->direct_reason, sizeof f->direct_reason,
             "buffered: no O_DIRECT on this file (%s); pages are dropped after reading",
             O_DIRECT ? pi2_errno_name(refused) : "not of this system");
    posix_fadvise(f->fd, 0, 0, POSIX_FADV_RANDOM); /* no readahead, which nobody would drop */
  }
  return 0;
}

static pi2_flash *give_up(pi2_flash *f, int error, int *why) {
  if (f->wake_fd >= 0) close(f->wake_fd);
  if (f->fd >= 0) close(f->fd);
  sem_destroy(&f->work);
  pthread_cond_destroy(&f->finished);
  pthread_mutex_destroy(&f->mutex);
  free(f);
  *why = error;
  return NULL;
}

pi2_flash *pi2_flash_open(const char *path, enum pi2_io io, int depth, int *error) {
  if (depth < 1 || depth > PI2_FLASH_MOST) {
    *error = EINVAL;
    return NULL;
  }
  pi2_flash *f = calloc(1, sizeof *f);
  if (!f) {
    *error = ENOMEM;
    return NULL;
  }
  f->fd = f->wake_fd = -1;
  atomic_init(&f->ended_at, -1);
  f->depth = depth;
  f->page = pi2_page_bytes();
  f->done_end = &f->done;
  f->queue_end = &f->queue;
  pthread_condattr_t clock;
  pthread_condattr_init(&clock);
  pthread_condattr_setclock(&clock, CLOCK_MONOTONIC);
  pthread_mutex_init(&f->mutex, NULL);
  sem_init(&f->work, 0, 0);
  pthread_cond_init(&f->finished, &clock);
  pthread_condattr_destroy(&clock);
  f->deadly = pi2_deadly_calls();
  int problem = open_file(f, path);
  if (problem) return give_up(f, problem, error);

  if (io == PI2_IO_PREADV)
    snprintf(f->io_reason, sizeof f->io_reason, "preadv: asked for");
  else {
    problem = pi2_uring_probe(f->io_reason, sizeof f->io_reason);
    if (!problem && waits_anyway(f)) {
      snprintf(f->io_reason, sizeof f->io_reason,
               "preadv: reads of this file system cannot be told not to wait (EOPNOTSUPP)");
      problem = EOPNOTSUPP;
    } else if (!problem) {
      f->wake_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
      f->ring = f->wake_fd < 0 ? (problem = errno, NULL) : pi2_ring_open(f, &problem);
      if (!f->ring)
        snprintf(f->io_reason, sizeof f->io_reason, "io_uring: cannot be set up (%s)", pi2_errno_name(problem));
    }
    if (problem && io == PI2_IO_URING) return give_up(f, problem, error);
  }
  if (!f->ring && (problem = pool_start(f))) return give_up(f, problem, error);
  return f;
}

int pi2_flash_register(pi2_flash *f, void *base, int64_t bytes, int64_t most, int64_t unit) {
  if (bytes <= 0 || bytes > most || (uintptr_t)base % PI2_SECTOR || bytes % PI2_SECTOR || unit <= 0 ||
      unit % PI2_SECTOR)
    return EINVAL;
  if (!f->ring) return EOPNOTSUPP;
  const int64_t least = most / MOST_PIECES + 1 > LEAST_PIECE ? most / MOST_PIECES + 1 : LEAST_PIECE;
  int64_t registered = 0;
  const int error = pi2_ring_register(f->ring, base, bytes, most, (least + unit - 1) / unit * unit, &registered);
  atomic_store_explicit(&f->registered_bytes, registered, memory_order_relaxed);
  return error;
}

int64_t pi2_flash_registered(pi2_flash *f) { return counted(&f->registered_bytes); }

int pi2_flash_submit(pi2_flash *f, pi2_read *r) {
  if (f->in_flight == f->depth) return -1;
  f->in_flight++;
  r->error = 0;
  r->got = r->latency_ns = 0;
  r->tries = r->stalls = r->slow = 0;
  r->next = NULL;
  r->submitted_ns = pi2_now_ns();
  int64_t parts = 0;
  for (int i = 0; r->parts && i < r->n_parts; i++)
    parts += (uintptr_t)r->parts[i].iov_base % PI2_SECTOR ? INT64_MIN / PI2_FLASH_MOST : (int64_t)r->parts[i].iov_len;
  const int wrong = (r->parts && (r->n_parts > PI2_FLASH_PARTS || parts != r->bytes || parts > MOST_ASKED)) ||
                    r->offset < 0 || r->offset % PI2_SECTOR || r->bytes <= 0 || r->bytes % PI2_SECTOR ||
                    r->bytes > INT64_MAX - r->offset || (!r->parts && (uintptr_t)r->to % PI2_SECTOR);
  if (!wrong)
    pi2_read_next(r);
  else
    pi2_read_fail(f, r, EINVAL);
  if (f->ring) {
    if (wrong)
      pi2_done_push(f, r);
    else
      pi2_ring_submit(f, r);
    return 0;
  }
  pthread_mutex_lock(&f->mutex);
  if (wrong)
    pi2_done_push(f, r);
  else {
    *f->queue_end = r;
    f->queue_end = &r->next;
    sem_post(&f->work);
  }
  pthread_mutex_unlock(&f->mutex);
  return 0;
}

int pi2_flash_reap(pi2_flash *f, pi2_read **done, int max, int64_t timeout_ns) {
  const int n = (f->ring ? pi2_ring_reap : pool_reap)(f, done, max, timeout_ns);
  f->in_flight -= n;
  return n;
}

void pi2_flash_wake(pi2_flash *f) {
  if (f->ring) {
    const uint64_t one = 1;
    if (!atomic_exchange(&f->woken, 1))
      if (write(f->wake_fd, &one, sizeof one) < 0) { /* full counter: it is readable already */
      }
    return;
  }
  pthread_mutex_lock(&f->mutex);
  atomic_store(&f->woken, 1);
  pthread_cond_signal(&f->finished);
  pthread_mutex_unlock(&f->mutex);
}

int64_t pi2_flash_close(pi2_flash *f, int64_t patience_ns) {
  int ignored;
  atomic_store(&f->closing, 1);
  const int64_t left = (f->ring ? pi2_ring_close : pool_join)(f, patience_ns);
  if (left) return left;
  give_up(f, 0, &ignored);
  return 0;
}

void pi2_flash_statistics(pi2_flash *f, struct pi2_flash_statistics *s) {
  *s = (struct pi2_flash_statistics){
      .io = f->ring ? PI2_IO_URING : PI2_IO_PREADV,
      .direct = f->direct,
      .depth = f->depth,
      .threads = f->threads,
      .file_bytes = f->file_bytes,
      .registered_bytes = counted(&f->registered_bytes),
      .reads = counted(&f->reads),
      .bytes = counted(&f->bytes),
      .errors = counted(&f->errors),
      .retries = counted(&f->retries),
      .short_reads = counted(&f->short_reads),
      .latency_ns = counted(&f->latency_ns),
  };
  for (int i = 0; i < PI2_FLASH_LATENCIES; i++) s->latency[i] = counted(&f->latency[i]);
  memcpy(s->io_reason, f->io_reason, sizeof s->io_reason);
  memcpy(s->direct_reason, f->direct_reason, sizeof s->direct_reason);
}
int64_t pi2_flash_reads(pi2_flash *f) { return counted(&f->reads); }
int64_t pi2_flash_ended_at(pi2_flash *f) { return counted(&f->ended_at); }
const char *pi2_flash_io_reason(const pi2_flash *f) { return f->io_reason; }
