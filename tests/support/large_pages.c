/* A kernel with larger pages, imitated: to be loaded before the C library, with PAGES=16384 (or 65536) in the
 * environment.
 *
 * What asks for the page size is told that one, mappings begin and end at multiples of it, and calls on ranges of
 * pages treat their arguments as such a kernel does: a beginning inside a page is EINVAL, and a length is rounded
 * up. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/auxv.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

static size_t page(void) {
  static size_t found;
  if (!found) found = (size_t)atol(getenv("PAGES"));
  return found;
}
static size_t whole(size_t bytes) { return (bytes + page() - 1) & -page(); }
static int inside(const void *p) { return ((uintptr_t)p & (page() - 1)) != 0; }
static int refused(void) { return errno = EINVAL, -1; }

long sysconf(int name) {
  static long (*real)(int);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "sysconf");
  if (name == _SC_PAGESIZE) return (long)page();
  const long value = real(name);
  return name == _SC_PHYS_PAGES || name == _SC_AVPHYS_PAGES ? value * real(_SC_PAGESIZE) / (long)page() : value;
}
int getpagesize(void) { return (int)page(); }
unsigned long getauxval(unsigned long type) {
  static unsigned long (*real)(unsigned long);
  if (!real) *(void **)&real = dlsym(RTLD_NEXT, "getauxval");
  return type == AT_PAGESZ ? page() : real(type);
}

int madvise(void *p, size_t bytes, int advice) {
  return inside(p) ? refused() : (int)syscall(SYS_madvise, p, whole(bytes), advice);
}
int mprotect(void *p, size_t bytes, int protection) {
  return inside(p) ? refused() : (int)syscall(SYS_mprotect, p, whole(bytes), protection);
}
int mincore(void *p, size_t bytes, unsigned char *resident) {
  if (inside(p)) return refused();
  for (size_t at = 0; at < bytes; at += page()) {
    unsigned char part[16] = {0}; /* of 4096 bytes each, if not more */
    const size_t rest = whole(bytes) == bytes || bytes - at > page() ? page() : bytes - at;
    if (syscall(SYS_mincore, (uint8_t *)p + at, rest, part)) return -1;
    resident[at / page()] = 0;
    for (size_t i = 0; i < sizeof part; i++) resident[at / page()] |= part[i];
  }
  return 0;
}
/* Mappings of io_uring, whose places are the kernel's choice. */
static _Atomic(void *) elsewhere[1024];
static int is_elsewhere(void *p, void *then) {
  void *is = p;
  for (size_t i = 0; i < sizeof elsewhere / sizeof *elsewhere; i++, is = p)
    if (atomic_compare_exchange_strong(&elsewhere[i], &is, then)) return 1;
  return 0;
}
int munmap(void *p, size_t bytes) {
  if (is_elsewhere(p, NULL)) return (int)syscall(SYS_munmap, p, bytes);
  return inside(p) ? refused() : (int)syscall(SYS_munmap, p, whole(bytes));
}
static void *map(void *p, size_t bytes, int protection, int flags, int fd, off_t offset) {
  return (void *)syscall(SYS_mmap, p, bytes, protection, flags, fd, offset);
}
void *mmap(void *p, size_t bytes, int protection, int flags, int fd, off_t offset) {
  if (flags & MAP_ANONYMOUS) bytes = whole(bytes);
  if (flags & MAP_FIXED) return inside(p) ? (refused(), MAP_FAILED) : map(p, bytes, protection, flags, fd, offset);
  const size_t more = whole(bytes) + page();
  uint8_t *room = map(NULL, more, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (room == MAP_FAILED) return MAP_FAILED;
  uint8_t *begin = (uint8_t *)whole((uintptr_t)room), *end = begin + whole(bytes);
  if (begin > room) syscall(SYS_munmap, room, begin - room);
  if (room + more > end) syscall(SYS_munmap, end, room + more - end);
  void *got = map(begin, bytes, protection, flags | MAP_FIXED, fd, offset);
  if (got == MAP_FAILED) {
    syscall(SYS_munmap, begin, whole(bytes));
    got = map(p, bytes, protection, flags, fd, offset);
    if (got != MAP_FAILED) is_elsewhere(NULL, got);
  }
  return got;
}
#if defined(__GLIBC__) && __SIZEOF_POINTER__ == 8 /* off_t has 64 bits: programs call either name */
void *mmap64(void *, size_t, int, int, int, off_t) __attribute__((alias("mmap")));
#endif
