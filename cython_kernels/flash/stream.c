#define _GNU_SOURCE
#include "stream.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "pages.h"
#include "waiting.h"

#define PIECE (16 << 20) /* of the ring: few reads of a megabyte go across two */
#define LOOK_NS 10000000 /* how often a thread that waits for a unit looks whether its run was stopped */

static void tell_ready(pi2_stream *s) {
  atomic_fetch_add(&s->ready_word, 1);
  if (atomic_load(&s->sleepers)) pi2_futex_wake(&s->ready_word);
}
static void fail(pi2_stream *s, int error) {
  atomic_store(&s->error, error);
  tell_ready(s);
}
static pi2_placed *placed(pi2_stream *s, uint64_t position) { return &s->placed[position % (uint64_t)s->n]; }
static const pi2_extent *unit(const pi2_stream *s, uint64_t position) { return &s->units[position % (uint64_t)s->n]; }

/* Frees what is released and no read writes to any more. */
static void advance_tail(pi2_stream *s, uint64_t released) {
  while (s->tail < s->next && s->tail < released && !placed(s, s->tail)->pending) s->tail++;
  if (s->tail == s->next && s->tail < released) { /* a lap that nobody wants: go on where the next begins */
    s->tail = s->next = released;
  }
}
/* Whether a unit's home is in these bytes of the loan. */
static int has_home(const pi2_extent *u, int64_t lent) {
  return lent > 0 && u->home >= 0 && u->home + u->bytes <= lent;
}
/* Finds room for the next unit: in its home, or in the ring behind the newest, or at its start once the oldest lies
 * behind that. */
static int place(pi2_stream *s) {
  const pi2_extent *u = unit(s, s->next);
  pi2_placed *p = placed(s, s->next);
  if (s->next - s->tail >= (uint64_t)s->n) return 0;
  p->home = has_home(u, atomic_load_explicit(&s->lent, memory_order_relaxed));
  if (p->home) {
    p->at = s->loan + u->home;
  } else {
    if (s->oldest < s->tail) s->oldest = s->tail;
    while (s->oldest < s->next && placed(s, s->oldest)->home) s->oldest++;
    int64_t at = s->oldest == s->next ? 0 : s->head;
    if (s->oldest != s->next) {
      const int64_t oldest = placed(s, s->oldest)->at - s->ring;
      if (at > oldest) {
        if (at + u->bytes > s->ring_bytes) at = 0;
        if (at == 0 && u->bytes > oldest) return 0;
      } else if (at + u->bytes > oldest) {
        return 0;
      }
    }
    p->at = s->ring + at;
    s->head = at + u->bytes;
  }
  p->submitted = p->home && p->kept ? u->bytes : 0;
  p->pending = p->dropped = 0;
  if (!p->submitted) atomic_store_explicit(&p->begin_ns, pi2_now_ns(), memory_order_relaxed);
  s->next++;
  return 1;
}
/* Hands reads to flash, oldest unit first, until `depth` are in flight. Returns 0 where the ring is full before. */
static int submit(pi2_stream *s) {
  uint64_t position = s->tail;
  while (s->n_spare && !atomic_load(&s->error)) {
    while (position < s->next && placed(s, position)->submitted == unit(s, position)->bytes) position++;
    if (position == s->next) {
      if (!place(s)) return 0;
      continue; /* perhaps it was kept */
    }
    pi2_placed *p = placed(s, position);
    const pi2_extent *u = unit(s, position);
    if (position < atomic_load(&s->released)) { /* not wanted any more: only its reads in flight are waited for */
      p->submitted = u->bytes;
      p->dropped = 1;
      continue;
    }
    pi2_read *r = s->spare[--s->n_spare];
    r->offset = u->offset + p->submitted;
    r->bytes = u->bytes - p->submitted < s->read_bytes ? u->bytes - p->submitted : s->read_bytes;
    r->to = p->at + p->submitted;
    r->user = (void *)(uintptr_t)position;
    p->submitted += r->bytes;
    p->pending++;
    if (pi2_flash_submit(s->flash, r)) {
      p->pending--;
      s->spare[s->n_spare++] = r;
      fail(s, EIO);
    }
  }
  return 1;
}
/* Submits what there is room for. */
static void advance(pi2_stream *s) {
  for (;;) {
    const uint64_t released = atomic_load(&s->released);
    advance_tail(s, released);
    if (submit(s)) return;
    atomic_store(&s->full, 1);
    if (atomic_load(&s->released) == released) return; /* who releases from now on sees that it is full */
  }
}
static void finish(pi2_stream *s, pi2_read *r) {
  const uint64_t position = (uint64_t)(uintptr_t)r->user;
  pi2_placed *p = placed(s, position);
  p->pending--;
  s->spare[s->n_spare++] = r;
  if (r->error) fail(s, r->error);
  if (atomic_load(&s->error)) return;
  atomic_fetch_add_explicit(&s->bytes, r->bytes, memory_order_relaxed);
  if (p->pending || p->submitted != unit(s, position)->bytes) return;
  atomic_store_explicit(&p->end_ns, pi2_now_ns(), memory_order_relaxed);
  if (!p->home || p->dropped) return;
  p->kept = 1;
  atomic_fetch_add_explicit(&s->kept_bytes, unit(s, position)->bytes, memory_order_relaxed);
}
/* Uses no more than `bytes` of the loan any more. Nothing is in flight, and no thread computes: what was read ahead is
 * forgotten from the first unit on that lies behind these. */
static void take_back(pi2_stream *s, int64_t bytes) {
  advance_tail(s, atomic_load(&s->released));
  uint64_t keep = s->tail;
  for (; keep < s->next; keep++) {
    if (placed(s, keep)->home && !has_home(unit(s, keep), bytes)) break;
    if (!placed(s, keep)->home) s->head = placed(s, keep)->at - s->ring + unit(s, keep)->bytes;
  }
  s->next = keep;
  if (s->oldest > keep) s->oldest = keep;
  if (atomic_load(&s->ready) > keep) atomic_store(&s->ready, keep);
  for (int i = 0; i < s->n; i++) {
    if (!s->placed[i].kept || has_home(&s->units[i], bytes)) continue;
    s->placed[i].kept = 0;
    atomic_fetch_sub_explicit(&s->kept_bytes, s->units[i].bytes, memory_order_relaxed);
  }
  pi2_pages_discard(s->loan + bytes, atomic_load(&s->lent) - bytes);
}
/* Returns whether units may be placed: not while memory is to be taken back, which reads in flight still go to. */
static int follow_lending(pi2_stream *s) {
  if (atomic_load(&s->wanted) == atomic_load(&s->lent)) return 1;
  pthread_mutex_lock(&s->lending);
  const int64_t wanted = atomic_load(&s->wanted);
  const int less = wanted < atomic_load(&s->lent), idle = s->n_spare == s->depth && !atomic_load(&s->error);
  if (less && idle) take_back(s, wanted);
  if (!less || idle) atomic_store(&s->lent, wanted);
  pthread_mutex_unlock(&s->lending);
  if (less && idle) tell_ready(s);
  return !less || idle;
}
/* Tells what has arrived. */
static void advance_ready(pi2_stream *s) {
  const uint64_t before = atomic_load(&s->ready);
  uint64_t ready = before > s->tail ? before : s->tail; /* below the tail nothing is wanted */
  if (atomic_load(&s->error)) return;
  while (ready < s->next && !placed(s, ready)->pending && placed(s, ready)->submitted == unit(s, ready)->bytes) ready++;
  if (ready == before) return;
  atomic_store(&s->ready, ready);
  tell_ready(s);
}
static void *reader_main(void *argument) {
  pi2_stream *s = argument;
  pi2_read *done[64];
  int64_t since = 0; /* a read ended last, or the first one began; 0: none is in flight */
  pi2_flash_begin_reader(s->flash, "pi2rt/flash");
  while (!atomic_load(&s->closing)) {
    const uint32_t word = atomic_load(&s->work_word);
    if (follow_lending(s)) advance(s);
    advance_ready(s);
    if (s->n_spare == s->depth) { /* nothing in flight: the ring is full, or reading has failed */
      since = 0;
      if (atomic_load(&s->work_word) == word && !atomic_load(&s->closing)) pi2_futex_wait(&s->work_word, word, -1);
      continue;
    }
    const int64_t begin = pi2_now_ns();
    if (!since) since = begin;
    const int n = pi2_flash_reap(s->flash, done, 64, pi2_flash_left(since, s->deadline_ns, begin));
    const int64_t end = pi2_now_ns();
    atomic_fetch_add_explicit(&s->busy_ns, end - begin, memory_order_relaxed);
    if (n)
      since = end;
    else if (s->deadline_ns >= 0 && end - since >= s->deadline_ns) {
      since = end;
      fail(s, ETIMEDOUT);
    }
    for (int i = 0; i < n; i++) finish(s, done[i]);
    advance_ready(s); /* before more is submitted: somebody may wait */
  }
  return NULL;
}

pi2_stream *pi2_stream_create(pi2_flash *flash, const pi2_extent *units, int n, int64_t read_bytes, int depth,
                              uint8_t *ring, int64_t ring_bytes, int64_t deadline_ns, int *error) {
  pi2_stream *s = aligned_alloc(64, (sizeof *s + 63) / 64 * 64);
  if (s) {
    memset(s, 0, sizeof *s);
    s->flash = flash, s->units = units, s->n = n, s->read_bytes = read_bytes, s->depth = depth;
    s->ring = ring, s->ring_bytes = ring_bytes, s->deadline_ns = deadline_ns;
    pthread_mutex_init(&s->lending, NULL);
    s->placed = calloc((size_t)n, sizeof *s->placed);
    s->reads = calloc((size_t)depth, sizeof *s->reads);
    s->spare = calloc((size_t)depth, sizeof *s->spare);
    for (int i = 0; s->reads && s->spare && i < depth; i++) s->spare[s->n_spare++] = &s->reads[i];
  }
  *error = ENOMEM;
  if (s && s->placed && s->reads && s->spare) {
    pi2_flash_register(flash, ring, ring_bytes, ring_bytes, PIECE); /* pinned once, where that is permitted */
    *error = pthread_create(&s->thread, NULL, reader_main, s);
  }
  if (!*error) return s;
  if (s) free(s->placed), free(s->reads), free(s->spare);
  free(s);
  return NULL;
}
static void wake_reader(pi2_stream *s) {
  atomic_fetch_add(&s->work_word, 1);
  pi2_futex_wake(&s->work_word);
  pi2_flash_wake(s->flash);
}
int64_t pi2_stream_destroy(pi2_stream *s) {
  atomic_store(&s->closing, 1);
  wake_reader(s);
  pthread_join(s->thread, NULL);
  const int64_t left = pi2_flash_close(s->flash, pi2_flash_patience(s->deadline_ns));
  if (left) return left; /* `reads` and the ring are still written to */
  pthread_mutex_destroy(&s->lending);
  free(s->placed), free(s->reads), free(s->spare), free(s);
  return 0;
}
void pi2_stream_loan(pi2_stream *s, uint8_t *loan) {
  pthread_mutex_lock(&s->lending);
  s->loan = loan;
  pthread_mutex_unlock(&s->lending);
}
void pi2_stream_lend(pi2_stream *s, int64_t bytes, const _Atomic int *stop) {
  if (atomic_load(&s->wanted) == bytes && atomic_load(&s->lent) <= bytes) return;
  pthread_mutex_lock(&s->lending);
  atomic_store(&s->wanted, bytes);
  const int less = bytes < atomic_load(&s->lent);
  pthread_mutex_unlock(&s->lending);
  if (!less) return; /* the reader sees it where it looks for room */
  wake_reader(s);
  while (atomic_load(&s->lent) > bytes) {
    const uint32_t word = atomic_load(&s->ready_word);
    if (atomic_load(&s->error) ||
        atomic_load(stop)) { /* nothing is given back: no unit may be forgotten while others compute */
      pthread_mutex_lock(&s->lending);
      atomic_store(&s->wanted, atomic_load(&s->lent));
      pthread_mutex_unlock(&s->lending);
      return;
    }
    atomic_fetch_add(&s->sleepers, 1);
    if (atomic_load(&s->lent) > bytes && !atomic_load(&s->error)) pi2_futex_wait(&s->ready_word, word, LOOK_NS);
    atomic_fetch_sub(&s->sleepers, 1);
  }
}

uint64_t pi2_stream_begin(pi2_stream *s) {
  const uint64_t first = s->laps++ * (uint64_t)s->n;
  if (atomic_load(&s->released) >= first) return first;
  atomic_store(&s->released, first);
  wake_reader(s);
  return first;
}
const uint8_t *pi2_stream_get(pi2_stream *s, uint64_t position, int64_t spin_ns, const _Atomic int *stop) {
  int64_t deadline = 0;
  for (uint32_t i = 1; atomic_load_explicit(&s->ready, memory_order_acquire) <= position; i++) {
    if (atomic_load_explicit(&s->error, memory_order_acquire)) return NULL;
    if (i % 16 == 0) pi2_pause();
    if (i % 256) continue;
    if (atomic_load(stop)) return NULL;
    const int64_t now = pi2_now_ns();
    if (!deadline)
      deadline = now + spin_ns;
    else if (now > deadline) {
      const uint32_t word = atomic_load(&s->ready_word);
      atomic_fetch_add(&s->sleepers, 1);
      if (atomic_load(&s->ready) <= position && !atomic_load(&s->error)) pi2_futex_wait(&s->ready_word, word, LOOK_NS);
      atomic_fetch_sub(&s->sleepers, 1);
    }
  }
  return placed(s, position)->at + unit(s, position)->skip;
}
int pi2_stream_release(pi2_stream *s, uint64_t position, uint64_t end) {
  if (!atomic_compare_exchange_strong(&s->released, &position, end)) return 0;
  if (atomic_exchange(&s->full, 0)) wake_reader(s);
  return 1;
}
