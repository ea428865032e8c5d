/* A gang: pinned native threads that run one job at a time together, with barriers inside.
 *
 * The threads of several actors may form one gang (big and little cores share each layer's rows through atomic cursors,
 * with no hop through Python). Waiting spins for a bounded time, then sleeps on a futex; idle threads sleep at once, so
 * that the control plane finds a free core. Threads that assist (assist.h) run no jobs and meet at no barrier. */
#ifndef PI2_GANG_H
#define PI2_GANG_H
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "api.h"
#include "waiting.h"

#define PI2_QUEUE 8 /* runs of a program in flight, at most */
#define PI2_JOBS 16 /* jobs posted and not finished, at most: a run is done a moment before its job is finished */

typedef struct pi2_gang pi2_gang;
typedef struct pi2_worker {
  pi2_gang *gang;
  int index, core; /* core < 0: not pinned */
  pthread_t thread;
  uint32_t seen;
} pi2_worker;

/* Runs on every thread; `stopped` (see pi2_barrier) is per job. Returns nonzero on thread 0 when whoever waits must
 * know at once. Else the event is held back while more than one job is left: the control plane wakes up with cold
 * caches, and one wake-up for several short steps is enough. */
typedef int (*pi2_job)(void *context, pi2_worker *worker);
/* Runs on threads that assist, while jobs are unfinished. Returns what pi2_gang_idle gave. */
typedef uint32_t (*pi2_assisting)(void *context, pi2_worker *worker);

struct pi2_gang {
  int n, event_fd;     /* event_fd: readable when jobs have finished */
  _Atomic int members; /* the first threads, which run jobs; the others assist */
  pi2_assisting assist;
  void *assist_context;
  _Atomic int assisting; /* threads that may be in `assist` */
  _Atomic uint32_t from; /* jobs before it were run by the members that there were */
  int64_t spin_ns;
  pi2_worker *workers;
  struct {
    pi2_job run;
    void *context;
  } queue[PI2_JOBS];
  _Atomic uint32_t posted;   /* futex: jobs posted */
  _Atomic uint32_t finished; /* jobs finished */
  _Atomic uint32_t told;     /* so many jobs, from the first one on, report whatever is left */
  _Atomic int64_t last;      /* job at which the threads end, or -1 */
  _Alignas(64) _Atomic uint32_t arrived;
  _Alignas(64) _Atomic uint32_t phase; /* futex: barriers passed */
  _Alignas(64) _Atomic int sleepers;
  _Atomic int *stop; /* of the running job: asked to stop */
  int stopped;       /* latched at a barrier: all threads agree */
};

/* NULL and errno on failure. cores[i] < 0 leaves thread i unpinned. */
PI2_API pi2_gang *pi2_gang_create(int n, const int *cores, int64_t spin_ns);
/* Returns 0, or -1 when PI2_JOBS jobs are unfinished. Called from one thread only. */
int pi2_gang_post(pi2_gang *gang, pi2_job run, void *context);
/* All jobs posted so far report each as soon as it has finished. Before the next post, by the thread that posts. */
void pi2_gang_report(pi2_gang *gang);
/* Joins all threads; unfinished jobs are finished first (stop them before). */
PI2_API void pi2_gang_destroy(pi2_gang *gang);
/* Lets all threads but the first `members` run `assist` instead of jobs; `members` = n and NULL: all run jobs again.
 * Waits until none is left in the function that they ran before. All jobs are finished, and none is posted meanwhile.
 */
PI2_API void pi2_gang_assist(pi2_gang *gang, int members, pi2_assisting assist, void *context);
/* Whether all jobs are finished; *posted: how many these are. */
int pi2_gang_idle(pi2_gang *gang, uint32_t *posted);
/* All members of the running job meet. Returns nonzero, the same on every thread, when the job was asked to stop. */
int pi2_barrier(pi2_worker *worker);
/* First thing of a job, on every thread: names the flag that stops it. */
void pi2_job_begin(pi2_worker *worker, _Atomic int *stop);

#endif
