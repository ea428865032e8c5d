#define _GNU_SOURCE
#include "gang.h"

#include <errno.h>
#include <sched.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/eventfd.h>
#include <unistd.h>

#include "system_calls.h"
#include "waiting.h"

/* Waits until *word differs from `old`: spins for spin_ns, then sleeps. `sleepers` lets the waker skip the system call.
 */
static void wait_change(pi2_gang *g, _Atomic uint32_t *word, uint32_t old, int64_t spin_ns) {
  if (spin_ns > 0) {
    int64_t deadline = 0;
    for (uint32_t i = 1;; i++) {
      if (atomic_load_explicit(word, memory_order_acquire) != old) return;
      if (i % 16 == 0) pi2_pause();
      if (i % 256 == 0) {
        int64_t now = pi2_now_ns();
        if (!deadline)
          deadline = now + spin_ns;
        else if (now > deadline)
          break;
      }
    }
  }
  atomic_fetch_add(&g->sleepers, 1);
  while (atomic_load(word) == old) pi2_futex_wait(word, old, -1);
  atomic_fetch_sub(&g->sleepers, 1);
}
static void change(pi2_gang *g, _Atomic uint32_t *word) {
  atomic_fetch_add(word, 1); /* sequentially consistent: a sleeper registered before it is seen below */
  if (atomic_load(&g->sleepers)) pi2_futex_wake(word);
}

int pi2_barrier(pi2_worker *w) {
  pi2_gang *g = w->gang;
  uint32_t phase = atomic_load_explicit(&g->phase, memory_order_relaxed);
  if (atomic_fetch_add(&g->arrived, 1) + 1 == (uint32_t)g->members) {
    atomic_store_explicit(&g->arrived, 0, memory_order_relaxed);
    g->stopped = atomic_load_explicit(g->stop, memory_order_relaxed);
    change(g, &g->phase);
  } else {
    wait_change(g, &g->phase, phase, g->spin_ns);
  }
  return g->stopped;
}

void pi2_job_begin(pi2_worker *w, _Atomic int *stop) {
  /* Every thread stores the same pointer before its first barrier; the job before ended with one. */
  if (w->index == 0) w->gang->stop = stop;
  pi2_gang *g = w->gang;
  uint32_t phase = atomic_load_explicit(&g->phase, memory_order_relaxed);
  if (atomic_fetch_add(&g->arrived, 1) + 1 == (uint32_t)g->members) {
    atomic_store_explicit(&g->arrived, 0, memory_order_relaxed);
    g->stopped = 0;
    change(g, &g->phase);
  } else {
    wait_change(g, &g->phase, phase, g->spin_ns);
  }
}

int pi2_gang_idle(pi2_gang *g, uint32_t *posted) {
  const int64_t last = atomic_load(&g->last);
  const uint32_t finished = atomic_load(&g->finished);
  *posted = last >= 0 ? (uint32_t)last : atomic_load(&g->posted);
  return finished == *posted;
}
/* 1: this thread has assisted, where it does. `assisting` is told before `members` is read, and pi2_gang_assist changes
 * `members` before it waits. */
static int assisted(pi2_worker *w) {
  pi2_gang *g = w->gang;
  atomic_fetch_add(&g->assisting, 1);
  const int assists = w->index >= atomic_load(&g->members);
  if (assists) w->seen = g->assist(g->assist_context, w);
  atomic_fetch_sub(&g->assisting, 1);
  return assists;
}

static void *worker_main(void *argument) {
  pi2_worker *w = argument;
  pi2_gang *g = w->gang;
  if (w->core >= 0) {
    cpu_set_t set;
    CPU_ZERO(&set);
    CPU_SET((unsigned)w->core, &set);
    sched_setaffinity(0, sizeof set, &set); /* a core that went away leaves the thread unpinned */
  }
  char name[16];
  snprintf(name, sizeof name, "pi2rt/%d", w->index);
  pthread_setname_np(pthread_self(), name);
  for (;;) {
    wait_change(g, &g->posted, w->seen, 0);
    if (atomic_load(&g->last) == w->seen) return NULL;
    if (w->index && assisted(w)) continue;
    const uint32_t from = atomic_load(&g->from);
    if ((int32_t)(w->seen - from) < 0) { /* it assisted, and has woken up late: others have run these jobs */
      w->seen = from;
      continue;
    }
    const int urgent = g->queue[w->seen % PI2_JOBS].run(g->queue[w->seen % PI2_JOBS].context, w);
    w->seen++;
    /* the job's last barrier has passed: everything it wrote is visible */
    if (w->index == 0) {
      const uint32_t finished = atomic_fetch_add(&g->finished, 1) + 1;
      const uint64_t one = 1;
      /* Nobody waits in vain: the jobs left over end too, and the last but one of them reports. */
      if (urgent || atomic_load(&g->posted) - finished <= 1 || (int32_t)(atomic_load(&g->told) - finished) >= 0)
        if (write(g->event_fd, &one, sizeof one) < 0) { /* full counter: it is readable already */
        }
    }
  }
}

pi2_gang *pi2_gang_create(int n, const int *cores, int64_t spin_ns) {
  pi2_gang *g = aligned_alloc(64, (sizeof *g + 63) / 64 * 64);
  if (!g) return NULL;
  *g = (pi2_gang){.n = n, .members = n, .spin_ns = spin_ns, .last = -1};
  g->event_fd = eventfd(0, EFD_NONBLOCK | EFD_CLOEXEC);
  g->workers = calloc((size_t)n, sizeof *g->workers);
  if (g->event_fd < 0 || !g->workers) goto fail;
  const int pins = !pi2_deadly_calls().signal[PI2_CALL_AFFINITY];
  for (int i = 0; i < n; i++) {
    g->workers[i] = (pi2_worker){.gang = g, .index = i, .core = pins ? cores[i] : -1};
    int error = pthread_create(&g->workers[i].thread, NULL, worker_main, &g->workers[i]);
    if (error) {
      g->n = i;
      g->members = i;
      pi2_gang_destroy(g);
      errno = error;
      return NULL;
    }
  }
  return g;
fail:
  if (g->event_fd >= 0) close(g->event_fd);
  free(g->workers);
  free(g);
  return NULL;
}

int pi2_gang_post(pi2_gang *g, pi2_job run, void *context) {
  uint32_t posted = atomic_load(&g->posted);
  if (posted - atomic_load(&g->finished) >= PI2_JOBS) return -1;
  g->queue[posted % PI2_JOBS].run = run;
  g->queue[posted % PI2_JOBS].context = context;
  change(g, &g->posted);
  return 0;
}

void pi2_gang_report(pi2_gang *g) { atomic_store(&g->told, atomic_load(&g->posted)); }

void pi2_gang_assist(pi2_gang *g, int members, pi2_assisting assist, void *context) {
  atomic_store(&g->from, atomic_load(&g->posted));
  atomic_store(&g->members, g->n);
  while (atomic_load(&g->assisting)) sched_yield(); /* jobs are finished, so it ends as soon as it has a core */
  g->assist = assist;
  g->assist_context = context;
  atomic_store(&g->members, members);
}

void pi2_gang_destroy(pi2_gang *g) {
  atomic_store(&g->last, atomic_load(&g->posted)); /* before any thread can come to it: they end there */
  atomic_fetch_add(&g->posted, 1);
  pi2_futex_wake(&g->posted);
  for (int i = 0; i < g->n; i++) pthread_join(g->workers[i].thread, NULL);
  close(g->event_fd);
  free(g->workers);
  free(g);
}
