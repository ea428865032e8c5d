/* io_uring through raw system calls: one ring per file, of which one thread is the producer and the consumer. */
#define _GNU_SOURCE
#include "flash_private.h"

#include <errno.h>
#include <poll.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include "waiting.h"

#if defined(__linux__) && defined(__has_include)
#if __has_include(<linux/io_uring.h>)
#include <linux/io_uring.h>
#endif
#endif

#ifdef IORING_FEAT_EXT_ARG /* kernel headers of 5.11 or later */

#ifndef __NR_io_uring_setup
#define __NR_io_uring_setup 425
#define __NR_io_uring_enter 426
#define __NR_io_uring_register 427
#endif

/* Waiting with a timeout (5.11); the two rings in one mapping; no completion lost. */
enum { NEEDED = IORING_FEAT_EXT_ARG | IORING_FEAT_SINGLE_MMAP | IORING_FEAT_NODROP };
enum { WAKE = 0, CANCEL = 1 }; /* user_data that is no read */

struct pi2_ring {
  int fd, broken;             /* broken: errno of a system call that the kernel took away */
  int fixed_file, wake_armed; /* wake_armed: a poll of wake_fd is in the ring */
  uint8_t *map;
  size_t map_bytes, sqe_bytes;
  struct io_uring_sqe *sqes;
  struct io_uring_cqe *cqes;
  _Atomic uint32_t *sq_head, *sq_tail, *cq_head, *cq_tail; /* shared with the kernel */
  uint32_t sq_mask, cq_mask;
  uint8_t *base;              /* of memory that is registered in pieces, or NULL */
  int64_t most, piece;        /* bytes of all that may be, and of one piece */
  _Atomic int64_t registered; /* the first bytes that are */
  int live;                   /* reads that the ring has */
  pi2_read *reads[PI2_FLASH_MOST];
};

static int ring_setup(unsigned entries, struct io_uring_params *p) {
  return (int)syscall(__NR_io_uring_setup, entries, p);
}
static int ring_register(int fd, unsigned what, const void *argument, unsigned n) {
  return syscall(__NR_io_uring_register, fd, what, argument, n) < 0 ? errno : 0;
}
/* timeout_ns < 0: for ever. Returns 0 or an errno. */
static int ring_enter(pi2_ring *g, unsigned submit, unsigned wait, int64_t timeout_ns) {
  struct timespec64 {
    int64_t sec, nsec;
  } t = {timeout_ns / 1000000000, timeout_ns % 1000000000};
  struct io_uring_getevents_arg argument = {.ts = timeout_ns < 0 ? 0 : (uint64_t)(uintptr_t)&t};
  return syscall(__NR_io_uring_enter, g->fd, submit, wait, IORING_ENTER_GETEVENTS | IORING_ENTER_EXT_ARG, &argument,
                 sizeof argument) < 0
             ? errno
             : 0;
}

static uint32_t unsent(pi2_ring *g) {
  return atomic_load_explicit(g->sq_tail, memory_order_relaxed) -
         atomic_load_explicit(g->sq_head, memory_order_acquire);
}
/* There is room always: one per read in flight and one to wake, or, while closing, one per read. */
static struct io_uring_sqe *next_sqe(pi2_ring *g) {
  struct io_uring_sqe *e = &g->sqes[atomic_load_explicit(g->sq_tail, memory_order_relaxed) & g->sq_mask];
  memset(e, 0, sizeof *e);
  return e;
}
static void commit_sqe(pi2_ring *g) {
  atomic_store_explicit(g->sq_tail, atomic_load_explicit(g->sq_tail, memory_order_relaxed) + 1, memory_order_release);
}

static int within_piece(pi2_ring *g, int64_t at, int64_t bytes) {
  return at >= 0 && bytes <= atomic_load(&g->registered) - at && at / g->piece == (at + bytes - 1) / g->piece;
}
static void ask(pi2_flash *f, pi2_read *r) {
  pi2_ring *g = f->ring;
  struct io_uring_sqe *e = next_sqe(g);
  uint8_t *to = r->parts ? NULL : r->to + r->got;
  e->opcode = r->parts ? IORING_OP_READV : IORING_OP_READ;
  if (to && g->base && within_piece(g, to - g->base, r->asked)) {
    e->opcode = IORING_OP_READ_FIXED;
    e->buf_index = (uint16_t)((to - g->base) / g->piece);
  }
  e->fd = g->fixed_file ? 0 : f->fd;
  /* slow: was refused once without waiting; let a kernel thread wait for it */
  e->flags = (uint8_t)((g->fixed_file ? IOSQE_FIXED_FILE : 0) | (r->slow ? IOSQE_ASYNC : 0));
  e->off = (uint64_t)(r->offset + r->got);
  e->addr = (uint64_t)(uintptr_t)(r->parts ? (void *)r->parts : to);
  e->len = (uint32_t)(r->parts ? r->n_parts : r->asked);
  e->user_data = (uint64_t)(uintptr_t)r;
  commit_sqe(g);
}

static void forget(pi2_ring *g, pi2_read *r) {
  g->reads[r->slot] = g->reads[--g->live];
  g->reads[r->slot]->slot = r->slot;
}

/* What the kernel has not taken fails with this error. */
static void take_back(pi2_flash *f, int error) {
  pi2_ring *g = f->ring;
  const uint32_t head = atomic_load_explicit(g->sq_head, memory_order_acquire);
  for (uint32_t i = head; i != atomic_load_explicit(g->sq_tail, memory_order_relaxed); i++) {
    const uint64_t user = g->sqes[i & g->sq_mask].user_data;
    if (user == WAKE) g->wake_armed = 0;
    if (user == WAKE || user == CANCEL) continue;
    pi2_read *r = (pi2_read *)(uintptr_t)user;
    forget(g, r);
    pi2_read_fail(f, r, error);
    pi2_done_push(f, r);
  }
  atomic_store_explicit(g->sq_tail, head, memory_order_release);
}

/* Moves completions to the list of finished reads. */
static void drain(pi2_flash *f) {
  pi2_ring *g = f->ring;
  uint32_t head = atomic_load_explicit(g->cq_head, memory_order_relaxed);
  for (; head != atomic_load_explicit(g->cq_tail, memory_order_acquire); head++) {
    const struct io_uring_cqe *c = &g->cqes[head & g->cq_mask];
    const uint64_t user = c->user_data;
    const int64_t result = c->res;
    atomic_store_explicit(g->cq_head, head + 1, memory_order_release);
    if (user == WAKE) g->wake_armed = 0;
    if (user == WAKE || user == CANCEL) continue;
    pi2_read *r = (pi2_read *)(uintptr_t)user;
    if (pi2_read_settle(f, r, result)) {
      forget(g, r);
      pi2_done_push(f, r);
    } else {
      ask(f, r);
    }
  }
}

/* Sends what is unsent, and waits for a completion or until the timeout (0: no waiting) has passed, or less. */
static void advance(pi2_flash *f, int64_t timeout_ns) {
  pi2_ring *g = f->ring;
  if (!g->broken) {
    const int error = ring_enter(g, unsent(g), timeout_ns != 0, timeout_ns);
    if (!error || error == EINTR || error == ETIME) return;
    if (error == EAGAIN || error == EBUSY) { /* the kernel is short of memory, or wants completions taken first */
      const struct timespec moment = {.tv_nsec = 1000000};
      if (atomic_load_explicit(g->cq_tail, memory_order_acquire) ==
          atomic_load_explicit(g->cq_head, memory_order_relaxed))
        nanosleep(&moment, NULL);
      return;
    }
    g->broken = error; /* a filter of system calls was installed after open: the reads in the kernel still end */
    g->wake_armed = 0;
  }
  take_back(f, g->broken);
  if (f->done) return;
  struct pollfd fds[2] = {{.fd = g->fd, .events = POLLIN}, {.fd = f->wake_fd, .events = POLLIN}};
  const struct timespec t = {.tv_sec = (time_t)(timeout_ns / 1000000000), .tv_nsec = (long)(timeout_ns % 1000000000)};
  ppoll(fds, 2, timeout_ns < 0 ? NULL : &t, NULL);
}

static int was_woken(pi2_flash *f) {
  uint64_t n;
  if (!atomic_load(&f->woken)) return 0;
  if (read(f->wake_fd, &n, sizeof n) < 0) { /* its writer is a moment late: a completion for nothing, later */
  }
  return atomic_exchange(&f->woken, 0);
}

void pi2_ring_submit(pi2_flash *f, pi2_read *r) {
  pi2_ring *g = f->ring;
  if (g->broken) {
    pi2_read_fail(f, r, g->broken);
    pi2_done_push(f, r);
    return;
  }
  r->slot = g->live;
  g->reads[g->live++] = r;
  ask(f, r);
}

int pi2_ring_reap(pi2_flash *f, pi2_read **done, int max, int64_t timeout_ns) {
  pi2_ring *g = f->ring;
  int64_t left = timeout_ns;
  const int64_t begin = timeout_ns > 0 ? pi2_now_ns() : 0;
  for (;;) {
    drain(f);
    const int woken = was_woken(f);
    if (f->done || woken || max <= 0 || left == 0) {
      if (unsent(g) || (!f->done && g->live)) {
        advance(f, 0);
        drain(f);
      }
      return pi2_done_take(f, done, max);
    }
    if (!g->wake_armed) {
      uint64_t n; /* of a wake that was noticed before it was written */
      if (read(f->wake_fd, &n, sizeof n) > 0 && atomic_load(&f->woken)) continue;
    }
    if (!g->wake_armed && !g->broken) {
      struct io_uring_sqe *e = next_sqe(g);
      e->opcode = IORING_OP_POLL_ADD;
      e->fd = f->wake_fd;
      e->poll_events = POLLIN;
      e->user_data = WAKE;
      commit_sqe(g);
      g->wake_armed = 1;
    }
    advance(f, left);
    if (timeout_ns > 0) {
      const int64_t passed = pi2_now_ns() - begin;
      left = passed < timeout_ns ? timeout_ns - passed : 0;
    }
  }
}

/* ---- open, close ---- */

static void ring_free(pi2_ring *g) {
  if (g->base) ring_register(g->fd, IORING_UNREGISTER_BUFFERS, NULL, 0); /* else pinned until some time after close */
  if (g->fixed_file) ring_register(g->fd, IORING_UNREGISTER_FILES, NULL, 0);
  if (g->map) munmap(g->map, g->map_bytes);
  if (g->sqes) munmap(g->sqes, g->sqe_bytes);
  if (g->fd >= 0) close(g->fd);
  free(g);
}

static int ring_create(pi2_ring *g, unsigned entries) {
  struct io_uring_params p = {.flags = 0};
#ifdef IORING_SETUP_COOP_TASKRUN
  p.flags = IORING_SETUP_COOP_TASKRUN; /* 5.19: no interrupt of the thread that submitted, which waits anyway */
#endif
  g->fd = ring_setup(entries, &p);
  if (g->fd < 0 && errno == EINVAL) {
    p = (struct io_uring_params){.flags = 0};
    g->fd = ring_setup(entries, &p);
  }
  if (g->fd < 0) return errno;
  if ((p.features & NEEDED) != NEEDED) return ENOSYS;
  const size_t sq = p.sq_off.array + p.sq_entries * sizeof(uint32_t);
  const size_t cq = p.cq_off.cqes + p.cq_entries * sizeof(struct io_uring_cqe);
  g->map_bytes = sq > cq ? sq : cq;
  g->sqe_bytes = p.sq_entries * sizeof(struct io_uring_sqe);
  void *map = mmap(NULL, g->map_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, g->fd, IORING_OFF_SQ_RING);
  if (map == MAP_FAILED) return errno;
  g->map = map;
  map = mmap(NULL, g->sqe_bytes, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_POPULATE, g->fd, IORING_OFF_SQES);
  if (map == MAP_FAILED) return errno;
  g->sqes = map;
  g->sq_head = (_Atomic uint32_t *)(void *)(g->map + p.sq_off.head);
  g->sq_tail = (_Atomic uint32_t *)(void *)(g->map + p.sq_off.tail);
  g->cq_head = (_Atomic uint32_t *)(void *)(g->map + p.cq_off.head);
  g->cq_tail = (_Atomic uint32_t *)(void *)(g->map + p.cq_off.tail);
  g->cqes = (struct io_uring_cqe *)(void *)(g->map + p.cq_off.cqes);
  g->sq_mask = p.sq_entries - 1;
  g->cq_mask = p.cq_entries - 1;
  uint32_t *array = (uint32_t *)(void *)(g->map + p.sq_off.array);
  for (uint32_t i = 0; i < p.sq_entries; i++) array[i] = i;
  return 0;
}

/* A ring for `depth` reads and the poll of wake_fd, which does nothing yet. */
static pi2_ring *ring_new(int depth, int *error) {
  pi2_ring *g = calloc(1, sizeof *g);
  if (!g) {
    *error = ENOMEM;
    return NULL;
  }
  g->fd = -1;
  *error = ring_create(g, (unsigned)depth + 2);
  if (!*error) return g;
  ring_free(g);
  return NULL;
}

pi2_ring *pi2_ring_open(pi2_flash *f, int *error) {
  pi2_ring *g = ring_new(f->depth, error);
  if (g) g->fixed_file = !ring_register(g->fd, IORING_REGISTER_FILES, &f->fd, 1);
  return g;
}

#ifdef IORING_RSRC_REGISTER_SPARSE /* kernel headers of 5.19 or later */

/* One of the pieces becomes the first `bytes` of it, or with 0 none of it. Reads in flight keep what they have pinned.
 */
static int update_piece(pi2_ring *g, int64_t piece, int64_t bytes) {
  const struct iovec part = {bytes ? g->base + piece * g->piece : NULL, (size_t)bytes};
  const struct io_uring_rsrc_update2 update = {.offset = (uint32_t)piece, .data = (uint64_t)(uintptr_t)&part, .nr = 1};
  return ring_register(g->fd, IORING_REGISTER_BUFFERS_UPDATE, &update, sizeof update);
}
/* What of a piece is among the first `bytes`. */
static int64_t in_piece(const pi2_ring *g, int64_t piece, int64_t bytes) {
  const int64_t rest = bytes - piece * g->piece;
  return rest < 0 ? 0 : rest < g->piece ? rest : g->piece;
}
int pi2_ring_register(pi2_ring *g, void *base, int64_t bytes, int64_t most, int64_t piece, int64_t *registered) {
  const int64_t before = atomic_load(&g->registered);
  *registered = before;
  if (g->base && (base != g->base || most != g->most || piece != g->piece)) return EBUSY;
  if (!g->base) {
    const struct io_uring_rsrc_register all = {.nr = (uint32_t)((most + piece - 1) / piece),
                                               .flags = IORING_RSRC_REGISTER_SPARSE};
    const int error = ring_register(g->fd, IORING_REGISTER_BUFFERS2, &all, sizeof all);
    if (error) return error == EINVAL ? EOPNOTSUPP : error;
    g->base = base, g->most = most, g->piece = piece;
  }
  const int64_t least = bytes < before ? bytes : before, end = ((bytes > before ? bytes : before) + piece - 1) / piece;
  int error = 0;
  atomic_store(&g->registered, least);
  for (int64_t i = least / piece; i < end && !error; i++) {
    error = update_piece(g, i, in_piece(g, i, bytes));
    if (!error && bytes > before) atomic_store(&g->registered, i * piece + in_piece(g, i, bytes));
  }
  *registered = atomic_load(&g->registered);
  return error;
}
/* For reads that do not end: what none of them goes to is no longer pinned. */
static void unpin_all(pi2_ring *g) {
  for (int64_t i = 0, end = g->base ? (g->most + g->piece - 1) / g->piece : 0; i < end; i++) update_piece(g, i, 0);
}

#else

int pi2_ring_register(pi2_ring *g, void *base, int64_t bytes, int64_t most, int64_t piece, int64_t *registered) {
  return (void)g, (void)base, (void)bytes, (void)most, (void)piece, *registered = 0, EOPNOTSUPP;
}
static void unpin_all(pi2_ring *g) { (void)g; }

#endif

int64_t pi2_ring_close(pi2_flash *f, int64_t patience_ns) {
  pi2_ring *g = f->ring;
  const int64_t begin = pi2_now_ns();
  take_back(f, ECANCELED);
  for (int i = 0; i < g->live && !g->broken; i++) {
    struct io_uring_sqe *e = next_sqe(g);
    e->opcode = IORING_OP_ASYNC_CANCEL;
    e->fd = -1;
    e->addr = (uint64_t)(uintptr_t)g->reads[i];
    e->user_data = CANCEL;
    commit_sqe(g);
  }
  f->done = NULL; /* nobody reaps these */
  f->done_end = &f->done;
  while (g->live) {
    const int64_t left = patience_ns < 0 ? -1 : patience_ns - (pi2_now_ns() - begin);
    if (patience_ns >= 0 && left <= 0) {
      int64_t bytes = 0;
      for (int i = 0; i < g->live; i++) bytes += g->reads[i]->bytes;
      unpin_all(g);
      return bytes;
    }
    advance(f, left);
    drain(f);
    pi2_read *dropped;
    while (pi2_done_take(f, &dropped, 1)) continue;
  }
  ring_free(g);
  f->ring = NULL;
  return 0;
}

/* Whether a filter ends whoever makes one of the calls. */
static int is_deadly(char *why, int room) {
  const pi2_deadly deadly = pi2_deadly_calls();
  const int signal = deadly.signal[PI2_CALL_URING];
  if (!signal) return 0;
  if (deadly.untried)
    snprintf(why, (size_t)room,
             "io_uring: not tried, seccomp may refuse it, and no child process could be started (%s)",
             pi2_errno_name(deadly.untried));
  else if (signal == SIGSYS)
    snprintf(why, (size_t)room, "io_uring: refused by seccomp (SIGSYS)");
  else
    snprintf(why, (size_t)room, "io_uring: refused by seccomp (signal %d)", signal);
  return 1;
}

int pi2_uring_probe(char *why, int room) {
  int error;
  if (is_deadly(why, room)) return EPERM;
  pi2_ring *g = ring_new(1, &error);
  if (g) {
    struct io_uring_sqe *e = next_sqe(g); /* seccomp may forbid one call of the two */
    e->opcode = IORING_OP_NOP;
    commit_sqe(g);
    error = ring_enter(g, 1, 1, 1000000000);
    ring_free(g);
  }
  const char *reason = error == EPERM || error == EACCES ? "not permitted by this system"
                       : error == ENOSYS                 ? "not in this kernel, or older than 5.11"
                       : error == ENOMEM                 ? "no memory for it, or over RLIMIT_MEMLOCK"
                                                         : "cannot be set up";
  if (error)
    snprintf(why, (size_t)room, "io_uring: %s (%s)", reason, pi2_errno_name(error));
  else
    snprintf(why, (size_t)room, "io_uring: permitted");
  return error;
}

#else

pi2_ring *pi2_ring_open(pi2_flash *f, int *error) {
  (void)f;
  *error = ENOSYS;
  return NULL;
}
int pi2_ring_register(pi2_ring *g, void *base, int64_t bytes, int64_t most, int64_t piece, int64_t *registered) {
  return (void)g, (void)base, (void)bytes, (void)most, (void)piece, *registered = 0, EOPNOTSUPP;
}
void pi2_ring_submit(pi2_flash *f, pi2_read *r) { (void)f, (void)r; }
int pi2_ring_reap(pi2_flash *f, pi2_read **done, int max, int64_t timeout_ns) {
  return (void)f, (void)done, (void)max, (void)timeout_ns, 0;
}
int64_t pi2_ring_close(pi2_flash *f, int64_t patience_ns) { return (void)f, (void)patience_ns, 0; }
int pi2_uring_probe(char *why, int room) {
  snprintf(why, (size_t)room, "io_uring: not built in, its kernel header was missing");
  return ENOSYS;
}

#endif
