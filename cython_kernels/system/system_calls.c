#define _GNU_SOURCE
#include "system_calls.h"

#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <unistd.h>

#ifndef __NR_io_uring_setup /* the same on all architectures */
#define __NR_io_uring_setup 425
#define __NR_io_uring_enter 426
#define __NR_io_uring_register 427
#endif

enum { UNKNOWN = -2 };
/* How many filters this thread has. 0: none. -1: nobody says. */
static int64_t filters(void) {
  char text[4096];
  const int fd = open("/proc/thread-self/status", O_RDONLY | O_CLOEXEC);
  if (fd < 0) return -1;
  size_t got = 0;
  for (ssize_t n; got < sizeof text - 1 && (n = read(fd, text + got, sizeof text - 1 - got)) > 0;) got += (size_t)n;
  close(fd);
  text[got] = 0;
  const char *mode = strstr(text, "\nSeccomp:"), *count = strstr(text, "\nSeccomp_filters:");
  if (!got) return -1;
  if (!mode || atoi(mode + sizeof "\nSeccomp:" - 1) == 0) return 0;
  return count ? atoll(count + sizeof "\nSeccomp_filters:" - 1) : -1; /* not before Linux 5.9 */
}

/* In the child: arguments that do nothing, for a filter looks at the number first of all. */
static void make(enum pi2_call call) {
  switch (call) {
  case PI2_CALL_URING:
    syscall(__NR_io_uring_setup, 0, NULL);
    syscall(__NR_io_uring_enter, -1, 0, 0, 0, NULL, 0);
    syscall(__NR_io_uring_register, -1, 0, NULL, 0);
    break;
  case PI2_CALL_NOWAIT:
#ifdef SYS_preadv2
    syscall(SYS_preadv2, -1, NULL, 0, 0, 0, 0);
#endif
    break;
  case PI2_CALL_STATX:
#ifdef SYS_statx
    syscall(SYS_statx, -1, "", 0, 0, NULL);
#endif
    break;
  case PI2_CALL_PRIORITY:
    syscall(SYS_getpriority, PRIO_PROCESS, 0);
    syscall(SYS_setpriority, -1, 0, 0);
    break;
  case PI2_CALL_SLICE:
#ifdef SYS_sched_setattr
    syscall(SYS_sched_getattr, 0, NULL, 0, 0);
    syscall(SYS_sched_setattr, 0, NULL, 0);
#endif
    break;
  case PI2_CALL_AFFINITY: syscall(SYS_sched_setaffinity, 0, 0, NULL); break;
  case PI2_CALLS: break;
  }
}

/* Tries call after call in a child, and those behind one that ended it in another one.
 *
 * The child is a raw clone: no handlers of atfork, and, in a process of many threads, nothing but system calls.
 * It has no exit signal, so that nobody else's SIGCHLD handler or wait() sees it. It shares no memory but one word:
 * Linux before 5.16 ends, with one that dumps core, all that share its memory. All signals are blocked meanwhile,
 * or the child would run this process's handlers; the one that ends it cannot be. */
static pi2_deadly try_calls(void) {
  pi2_deadly found = {.untried = 0};
  volatile int *at = mmap(NULL, sizeof *at, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_ANONYMOUS, -1, 0);
  if (at == MAP_FAILED) found.untried = errno;
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_BLOCK, &all, &before);
  for (int first = 0; first < PI2_CALLS && !found.untried;) {
    *at = first;
    const pid_t child = (pid_t)syscall(SYS_clone, 0, NULL, NULL, NULL, NULL);
    if (child == 0) {
      syscall(SYS_prctl, PR_SET_DUMPABLE, 0, 0, 0, 0); /* no core file for what was expected */
      for (; *at < PI2_CALLS; ++*at) make((enum pi2_call) * at);
      for (;;) syscall(SYS_exit_group, 0);
    }
    int status = 0;
    pid_t ended = child;
    while (child > 0 && (ended = waitpid(child, &status, __WALL)) < 0 && errno == EINTR) continue;
    if (child < 0 || ended < 0) {
      found.untried = errno;
      for (int i = first; i < PI2_CALLS; i++) found.signal[i] = SIGSYS;
      break;
    }
    if (!WIFSIGNALED(status)) break;
    if (*at < PI2_CALLS) found.signal[*at] = WTERMSIG(status);
    first = *at + 1;
  }
  pthread_sigmask(SIG_SETMASK, &before, NULL);
  if (at != MAP_FAILED)
    munmap((void *)at, sizeof *at);
  else
    for (int i = 0; i < PI2_CALLS; i++) found.signal[i] = SIGSYS;
  return found;
}

pi2_deadly pi2_deadly_calls(void) {
  static _Thread_local struct {
    int64_t filters;
    pi2_deadly found;
  } known; /* of no filter: nothing is deadly */
  const int64_t now = filters();
  if (now == known.filters) return known.found;
  known.found = now ? try_calls() : (pi2_deadly){.untried = 0};
  known.filters = known.found.untried ? UNKNOWN : now; /* a thread's filters are never taken away */
  return known.found;
}
