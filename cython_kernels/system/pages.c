#define _GNU_SOURCE
#include "pages.h"

#include <errno.h>
#include <stdatomic.h>
#include <stdio.h>
#include <sys/mman.h>
#include <unistd.h>

int64_t pi2_page_bytes(void) {
  static _Atomic int64_t known;
  int64_t bytes = atomic_load_explicit(&known, memory_order_relaxed);
  if (!bytes) {
    bytes = sysconf(_SC_PAGESIZE);
    atomic_store_explicit(&known, bytes, memory_order_relaxed);
  }
  return bytes;
}

static int64_t ask_huge_page_bytes(void) {
  long long bytes = 0;
  FILE *f = fopen("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size", "re");
  if (f) {
    if (fscanf(f, "%lld", &bytes) != 1) bytes = 0;
    fclose(f);
  }
  const int64_t page = pi2_page_bytes();
  /* Else what a page of entries of 8 bytes each maps, which is what the kernel takes: 2, 32 and 512 MiB. */
  return bytes >= page && (bytes & (bytes - 1)) == 0 ? bytes : page / 8 * page;
}
int64_t pi2_huge_page_bytes(void) {
  static _Atomic int64_t known;
  int64_t bytes = atomic_load_explicit(&known, memory_order_relaxed);
  if (!bytes) {
    bytes = ask_huge_page_bytes();
    atomic_store_explicit(&known, bytes, memory_order_relaxed);
  }
  return bytes;
}

pi2_pages pi2_pages_within(void *base, int64_t bytes) {
  const uintptr_t page = (uintptr_t)pi2_page_bytes(), at = (uintptr_t)base;
  const uintptr_t begin = (at + page - 1) & ~(page - 1), end = (at + (uintptr_t)(bytes > 0 ? bytes : 0)) & ~(page - 1);
  return end > begin ? (pi2_pages){(uint8_t *)begin, (int64_t)(end - begin)} : (pi2_pages){(uint8_t *)begin, 0};
}

void *pi2_pages_map(int64_t bytes, int huge) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void *base = mmap(NULL, (size_t)bytes, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (base == MAP_FAILED) return NULL;
  madvise(base, (size_t)bytes, MADV_DONTFORK);
  if (huge) madvise(base, (size_t)bytes, MADV_HUGEPAGE); /* fewer page walks; refusal costs only speed */
  return base;
}
void pi2_pages_small(void *base, int64_t bytes) { madvise(base, (size_t)bytes, MADV_NOHUGEPAGE); }
void pi2_pages_unmap(void *base, int64_t bytes) { munmap(base, (size_t)bytes); }
int pi2_pages_discard(void *base, int64_t bytes) {
  const pi2_pages pages = pi2_pages_within(base, bytes);
  return pages.bytes && madvise(pages.base, (size_t)pages.bytes, MADV_DONTNEED) ? errno : 0;
}
int pi2_pages_abandon(void *base, int64_t bytes) {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
  return mmap(base, (size_t)bytes, PROT_NONE, flags, -1, 0) == MAP_FAILED ? errno : 0;
}
