/* An arena: all buffers of a program in one block of memory, taken one after the other by code that runs twice. The
 * first time there is no memory, and only sizes are summed; the second time the block is there. So the sum is what is
 * taken, to the byte, and is known for a program that never runs. */
#ifndef PI2_ARENA_H
#define PI2_ARENA_H
#include <stddef.h>
#include <stdint.h>

typedef struct {
  uint8_t *base; /* NULL: it measures */
  int64_t used, bytes;
} pi2_arena;

/* Place for `count` items of `size` bytes: zeros, aligned to 64, resident where touched. While the arena measures, the
 * address is nobody's: it may be kept and compared, but what lies there must not be touched. */
void *pi2_arena_take(pi2_arena *a, int64_t count, size_t size);
/* Memory for what was measured, from the beginning on. 0 or an errno. */
int pi2_arena_map(pi2_arena *a);
void pi2_arena_unmap(pi2_arena *a);
#endif
