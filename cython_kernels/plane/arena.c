#include "arena.h"

#include <errno.h>

#include "kernels.h"
#include "pages.h"

/* The address sanitizer knows where separate buffers end; of these it is told. */
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#define GAP 64
#else
#define GAP 0
#endif

void *pi2_arena_take(pi2_arena *a, int64_t count, size_t size) {
  const int64_t bytes = pi2_align(count * (int64_t)size + 64, 64); /* the 64 behind are nobody's */
  void *taken = (void *)((uintptr_t)a->base + (uintptr_t)a->used);
  a->used += bytes + GAP;
#ifdef __SANITIZE_ADDRESS__
  if (a->base) ASAN_POISON_MEMORY_REGION((uint8_t *)taken + bytes, GAP);
#endif
  return taken;
}

int pi2_arena_map(pi2_arena *a) {
  a->bytes = a->used;
  a->used = 0;
  a->base = pi2_pages_map(a->bytes, 0);
  return a->base ? 0 : errno;
}

void pi2_arena_unmap(pi2_arena *a) {
  if (!a->base) return;
#ifdef __SANITIZE_ADDRESS__
  ASAN_UNPOISON_MEMORY_REGION(a->base, (size_t)a->bytes);
#endif
  pi2_pages_unmap(a->base, a->bytes);
  a->base = NULL;
}
