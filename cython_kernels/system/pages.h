/* Pages of memory. Their size is the system's: 4 KiB on x86-64, but 16 or 64 KiB on many arm64 kernels. The kernel
 * acts on whole pages and rounds up what it is given, which would take in the neighbour's bytes: here every range
 * is rounded inwards. */
#ifndef PI2_PAGES_H
#define PI2_PAGES_H
#include <stdint.h>

#include "api.h"

PI2_API int64_t pi2_page_bytes(void);
/* Of a transparent huge page: how much may be taken where one byte of it is touched. */
PI2_API int64_t pi2_huge_page_bytes(void);

typedef struct {
  uint8_t *base;
  int64_t bytes;
} pi2_pages;
/* The whole pages among these bytes; maybe none. */
pi2_pages pi2_pages_within(void *base, int64_t bytes);

/* Zeroed memory that begins at a page and is resident where touched; NULL and errno on failure. `huge`: in huge
 * pages where the system has them.
 *
 * A child of fork() does not have it (MADV_DONTFORK). Reads that are under way write to the pages that they found
 * when they began: after a fork, whoever of parent and child writes first would get a copy, and what arrives may
 * end up in the other's. Nor does a child make the parent copy gigabytes of weights. So in a child nobody may
 * touch it or unmap it: its addresses may be somebody else's by then. */
PI2_API void *pi2_pages_map(int64_t bytes, int huge);
/* No huge pages there, whatever the system prefers: what is resident is what was touched. Refusal does not matter,
 * for then the system has none. */
PI2_API void pi2_pages_small(void *base, int64_t bytes);
PI2_API void pi2_pages_unmap(void *base, int64_t bytes);
/* Gives the whole pages among these bytes back to the system; they read as zeros until they are written again. What
 * is not a whole page stays as it is. 0 or an errno. */
PI2_API int pi2_pages_discard(void *base, int64_t bytes);
/* In place of unmapping, for memory that reads which do not end go to: what has reached a device cannot be
 * cancelled. The addresses stay taken, so that nobody else's memory gets them, but have no memory any
 * more. A read that copies fails there; the pages that a device writes to by itself are the kernel's, which frees
 * them after it. 0 or an errno: then the memory is as it was. */
PI2_API int pi2_pages_abandon(void *base, int64_t bytes);
#endif
