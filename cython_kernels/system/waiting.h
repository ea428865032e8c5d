/* The clock of all native code, and how its threads sleep. */
#ifndef PI2_WAITING_H
#define PI2_WAITING_H
#include <limits.h>
#include <linux/futex.h>
#include <stdatomic.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

/* CLOCK_MONOTONIC, as time.perf_counter_ns. */
static inline int64_t pi2_now_ns(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (int64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}
/* Sleeps while *word is `expected`, for timeout_ns at most (< 0: for ever). It may also end for no reason. */
static inline void pi2_futex_wait(_Atomic uint32_t *word, uint32_t expected, int64_t timeout_ns) {
  const struct timespec t = {timeout_ns / 1000000000, timeout_ns % 1000000000};
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, timeout_ns < 0 ? NULL : &t, NULL, 0);
}
/* Wakes all threads that sleep on *word. Who changes it does so before. */
static inline void pi2_futex_wake(_Atomic uint32_t *word) {
  syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, NULL, NULL, 0);
}
#if defined(__x86_64__)
#include <x86intrin.h>
static inline uint64_t pi2_ticks(void) { return __rdtsc(); }
static inline void pi2_pause(void) { _mm_pause(); }
#elif defined(__aarch64__)
static inline uint64_t pi2_ticks(void) {
  uint64_t t;
  __asm__ volatile("mrs %0, cntvct_el0" : "=r"(t));
  return t;
}
static inline void pi2_pause(void) { __asm__ volatile("yield"); }
#else
static inline uint64_t pi2_ticks(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (uint64_t)t.tv_sec * 1000000000u + (uint64_t)t.tv_nsec;
}
static inline void pi2_pause(void) {}
#endif
#endif
