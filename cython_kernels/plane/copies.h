/* Copies of state that a step makes before its slices: pages of keys and values, slots of fixed arrays. */
#ifndef PI2_COPIES_H
#define PI2_COPIES_H
#include <stdint.h>

#include "api.h"

typedef struct {
  const uint8_t *from;
  uint8_t *to;
  int64_t bytes;
} pi2_copy;

typedef struct {
  pi2_copy *copy;
  int n, capacity;
} pi2_copies;

/* Appends one; `from` and `to` are the same or do not overlap. Returns 0, or -1 out of memory. */
PI2_API int pi2_copies_add(pi2_copies *copies, const uint8_t *from, uint8_t *to, int64_t bytes);
/* The share of thread `index` of `threads` in all of them, in their order. Each thread calls it. */
void pi2_copies_run(const pi2_copies *copies, int index, int threads);
#endif
