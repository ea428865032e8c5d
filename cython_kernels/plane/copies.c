#include "copies.h"

#include <stdlib.h>
#include <string.h>

#define CACHE_LINE 64

int pi2_copies_add(pi2_copies *c, const uint8_t *from, uint8_t *to, int64_t bytes) {
  if (from == to) return 0;
  if (c->n == c->capacity) {
    const int capacity = c->capacity ? 2 * c->capacity : 16;
    pi2_copy *bigger = realloc(c->copy, (size_t)capacity * sizeof *bigger);
    if (!bigger) return -1;
    c->copy = bigger;
    c->capacity = capacity;
  }
  c->copy[c->n++] = (pi2_copy){from, to, bytes};
  return 0;
}

/* A thread copies the same part of each page (slot). So one that is copied and then copied on needs no barrier between
 * the two: whoever reads a byte of it has written that byte itself. */
void pi2_copies_run(const pi2_copies *c, int index, int threads) {
  for (int i = 0; i < c->n; i++) {
    const pi2_copy *copy = &c->copy[i];
    const int64_t lines = (copy->bytes + CACHE_LINE - 1) / CACHE_LINE;
    const int64_t begin = lines * index / threads * CACHE_LINE, end = lines * (index + 1) / threads * CACHE_LINE;
    const int64_t last = end < copy->bytes ? end : copy->bytes;
    if (begin < last) memcpy(copy->to + begin, copy->from + begin, (size_t)(last - begin));
  }
}
