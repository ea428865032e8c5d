/* System calls that pi2rt can do without, where a sandbox takes them away.
 *
 * One that is refused gives an errno where it is made, and whoever makes it goes another way. But a filter of
 * system calls (seccomp) may also end whoever makes it: Android's does, for one, to a process that asks for
 * io_uring. So where a filter is in force, a child process tries them first. */
#ifndef PI2_SYSTEM_CALLS_H
#define PI2_SYSTEM_CALLS_H

enum pi2_call {
  PI2_CALL_URING,  /* io_uring_setup, _enter, _register */
  PI2_CALL_NOWAIT, /* preadv2 */
  PI2_CALL_STATX,
  PI2_CALL_PRIORITY, /* getpriority, setpriority */
  PI2_CALL_SLICE,    /* sched_getattr, sched_setattr */
  PI2_CALL_AFFINITY, /* sched_setaffinity */
  PI2_CALLS
};

typedef struct {
  int signal[PI2_CALLS]; /* which ends the thread that makes this call, or 0 */
  int untried; /* errno: there is a filter, and no child could be started to try it; `signal` is SIGSYS then */
} pi2_deadly;

/* Of this thread, and those that it starts: filters are inherited. Cheap where there is no filter, and where they
 * are the ones of the last call; else a fork. */
pi2_deadly pi2_deadly_calls(void);
#endif
