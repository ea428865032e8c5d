/* The segmented neuron cache: memory for pages of neuron bundles, filled from flash when a neuron is active.
 *
 * A page (one bundle, or as many as fit into 4 KiB) has a slot or none. Compute threads ask for the pages of a cluster
 * at once: what is there is pinned and counted as used; what is not takes the slot of a page that was used little of
 * late, and goes to the one thread that reads. A cluster's `pending` falls by one with each page that arrives, so that
 * a cluster is computed the moment its bytes are there; nobody waits for another's. A page that is pinned or on its way
 * is never evicted. Nothing is allocated after the start.
 *
 * Eviction: of a few slots in a row, that of the page used least, where every use counts PI2_FADE times what one in the
 * step after it does. Which neurons are active is a power law, and a step may miss as many pages as half the cache
 * holds: by LRU the newest push out the often used, and a page's history would be lost with its slot. So it is kept for
 * all pages. All gates are computed, so neurons that were nearly active are known, too, and count as used in part: of
 * the synthetic 7B model with room for 22 % of its neurons, 20.0 % of what a token needs is missing with that and
 * 20.9 % without (tokens 76 to 100 of a text; by simulation, a sixth less than without were each neuron's probability
 * known, and 45 % less were the future known). */
#ifndef PI2_NEURON_CACHE_H
#define PI2_NEURON_CACHE_H
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>

#include "api.h"
#include "flash.h"

#define PI2_FADE 0.93f             /* a use counts half after 10 steps */
#define PI2_FADE_STEPS 256         /* and nothing after so many */
#define PI2_SAMPLE 32              /* slots of which one is given up */
#define PI2_MERGED 64              /* pages in one read, at most */
#define PI2_MERGED_BYTES (1 << 20) /* of several pages in one read, at most */

typedef struct {                  /* pages of one feed-forward block, or of one matrix */
  int64_t offset;                 /* in the file */
  int64_t page_bytes, last_bytes; /* last: of the last page */
  int64_t head_bytes;             /* whole sectors, less than a page: what is read of one that is asked for; 0: all */
  int32_t first, pages;           /* their numbers among all */
} pi2_region;

typedef struct { /* how much a page was used, as of a step */
  float uses;
  uint32_t step;
} pi2_use;

typedef struct {
  int32_t page; /* or -1 */
  int32_t pins;
  uint8_t state, fresh; /* fresh: foreseen, and nobody has asked for it yet */
  uint8_t part;         /* what there is, or comes: all of the page, or its head */
  uint8_t alone;        /* a read through a gap has failed: maybe only because of the gap */
  uint32_t wanted;      /* nobody takes it before `asked` has come to this */
  pi2_use use;          /* of the page, while it has the slot: the search for the least used reads slots in a row */
  _Atomic int32_t *pending[2]; /* of whom it is read for: a page may end one cluster and begin the next */
} pi2_page_slot;

typedef struct { /* a read that has ended, for traces */
  int64_t begin_ns, end_ns;
  int32_t region;
  uint16_t pages, foreseen; /* foreseen: of the pages */
} pi2_read_record;

typedef struct { /* pages in a row, into any slots, and gaps between them, into the scrap: one read */
  pi2_read read;
  int64_t begin_ns; /* where reads are recorded; 0: not in flight */
  int count, foreseen;
  int64_t gap_pages, gap_bytes;
  int32_t slot[PI2_MERGED];
  struct iovec part[2 * PI2_MERGED];
} pi2_fetch;

typedef struct pi2_neuron_cache {
  pi2_flash *flash;
  const pi2_region *regions;
  int n_regions, depth;
  int64_t slot_bytes, deadline_ns;
  uint8_t *memory;
  _Atomic int32_t n_slots;   /* written under the mutex, as `used` */
  int32_t n_pages, capacity; /* capacity: slots there can be */
  pthread_t thread;
  /* under the mutex */
  pthread_mutex_t mutex;
  _Atomic int32_t *slot_of; /* (n_pages) or -1; whoever has pinned a page may read its entry without the mutex */
  pi2_page_slot *slots;
  pi2_use *use; /* (n_pages) of those without a slot */
  uint32_t step;
  float fade[PI2_FADE_STEPS];
  _Atomic int32_t used;   /* slots in use, from the first on */
  int32_t touched;        /* slots ever used; the records of others were never written to, and take no memory */
  int32_t hand, unpinned; /* unpinned: of the present ones */
  int32_t *queue;         /* (capacity) ring of slots to be filled */
  uint64_t queue_head, queue_tail;
  uint32_t asked;                         /* times that a block began to ask */
  int64_t hits, early, misses, evictions; /* early: of the hits, read because foreseen and asked for the first time */
  int64_t completed;                      /* rests of pages that were read because their neurons are active */
  int64_t gap_pages, gap_bytes;           /* that nobody asked for, read to make one read of two */
  int64_t read_through;                   /* bytes of a gap, at most */
  uint8_t *scrap;                         /* (read_through) where gaps go */
  int64_t missed_bytes;                   /* of misses and early ones */
  pi2_read_record *records;               /* (n_records) ring of reads that have ended, or NULL */
  int64_t n_records, recorded, taken;
  /* the reader's own */
  pi2_fetch *fetches;
  pi2_fetch **spare;
  int n_spare;
  /* shared */
  _Alignas(64) _Atomic uint32_t event; /* futex: something arrived, failed, or was computed */
  _Atomic int sleepers;
  _Atomic int error; /* errno, or PI2_EOF, of a read that failed in this run; ETIMEDOUT: none has ended for long */
  _Atomic int hangs; /* none has ended since */
  _Alignas(64) _Atomic uint32_t work; /* futex: the reader has something to do */
  _Atomic int reader;                 /* what it waits for: nothing, work, or a read (then in_flight may rise) */
  _Atomic int in_flight;
  _Atomic int closing;
  _Atomic int64_t bytes, reads_done, busy_ns;
  _Atomic int64_t stall_ns; /* of all threads, in which they had nothing to compute before something arrives */
} pi2_neuron_cache;

/* Starts the reader. `regions` and `memory` (capacity * slot_bytes, aligned to PI2_SECTOR) outlive the cache.
 * NULL and *error on failure. */
PI2_API pi2_neuron_cache *pi2_neuron_cache_create(pi2_flash *flash, const pi2_region *regions, int n_regions,
                                                  int32_t n_pages, int64_t slot_bytes, uint8_t *memory, int32_t n_slots,
                                                  int32_t capacity, int depth, int64_t deadline_ns, int *error);
/* Other than so many slots (at most the capacity), also while runs use them. What lies in slots that go is dropped, at
 * once or when its last use ends: returns how many still are used. Their memory is not written to once there are none.
 */
PI2_API int32_t pi2_neuron_cache_resize(pi2_neuron_cache *c, int32_t n_slots);
/* Joins the reader and closes the flash. 0: nobody writes to the memory afterwards; else, as pi2_flash_close. */
PI2_API int64_t pi2_neuron_cache_destroy(pi2_neuron_cache *c);

/* From now on the last n reads are recorded. Before any run; returns 0 or -1 (out of memory). */
PI2_API int pi2_neuron_cache_trace(pi2_neuron_cache *c, int64_t n);
/* Copies the records of reads that have ended since the last call, at most n_records, and returns how many. Every read
 * that began before *horizon is among those that were taken, or was lost because too many ended. */
PI2_API int64_t pi2_neuron_cache_take_records(pi2_neuron_cache *c, pi2_read_record *to, int64_t *horizon);

/* Reads pages [first, first + count) of a region in order into slots that were never used, while there are any, and
 * waits for them: before any run. 0, an errno or PI2_EOF. */
PI2_API int pi2_neuron_cache_fill(pi2_neuron_cache *c, int region, int32_t first, int32_t count);

/* More room, while runs go on: what to fill it with. Fills in how much each page (n_pages) is used, -1 where it is
 * present or on its way. */
PI2_API void pi2_neuron_cache_absent(pi2_neuron_cache *c, float *uses);
/* Starts reading those of pages[0..n) (numbers among all) that are not there into slots that were never used. Returns 0
 * once there are none of these. Nobody waits for them; a read that fails leaves its page absent. */
PI2_API int pi2_neuron_cache_fetch(pi2_neuron_cache *c, const int32_t *pages, int n);
/* Pages whose reads have not begun. */
PI2_API int64_t pi2_neuron_cache_waiting(pi2_neuron_cache *c);

/* From now on a read runs through gaps of so many bytes between two pages that wait one behind the other, whatever lies
 * there, and so is one instead of two: worth it while a gap takes less time than a read. Once, before any run; 0 or
 * ENOMEM. A read that fails with a gap is tried without. Not of heads: what lies between these is not read in order not
 * to read it. */
PI2_API int pi2_neuron_cache_read_through(pi2_neuron_cache *c, int64_t bytes);
/* A step begins; a block begins to ask. */
void pi2_neuron_cache_step(pi2_neuron_cache *c);
void pi2_neuron_cache_block(pi2_neuron_cache *c);
/* Of pages: asked for; missed, and of these foreseen; their bytes. Reads that have ended, and their bytes; of these,
 * pages and bytes of gaps. */
typedef struct {
  int64_t asked, missed, foreseen, missed_bytes, reads, read_bytes, gap_pages, gap_bytes;
} pi2_neuron_counts;
pi2_neuron_counts pi2_neuron_cache_counts(pi2_neuron_cache *c);
/* Pins pages[0..n) (numbers within the region; no page is asked for by more than two before it is there) until there is
 * no room left; returns how many. Adds one to *pending for each that is not there yet, which falls again when it
 * arrives; whoever sees it fall to 0 is told by `event`. */
int pi2_neuron_cache_ask(pi2_neuron_cache *c, int region, const int32_t *pages, int n, _Atomic int32_t *pending);
/* Pages [first, first + n) of a region were used in part, from 0 to 1 each: their neurons were nearly active. Those of
 * 1 are asked for anyway, and not counted here. */
void pi2_neuron_cache_near(pi2_neuron_cache *c, int region, int32_t first, int n, const float *part);
/* As `ask`, of pages that this one has pinned and that are there, maybe without more than their heads: the rest is
 * read. Needs no room, so all of them are. */
void pi2_neuron_cache_complete(pi2_neuron_cache *c, int region, const int32_t *pages, int n, _Atomic int32_t *pending);
void pi2_neuron_cache_release(pi2_neuron_cache *c, int region, const int32_t *pages, int n);
/* A run was stopped: nothing is pinned, nobody is told. */
void pi2_neuron_cache_abandon(pi2_neuron_cache *c);

/* Starts reading those of pages[0..n) that are not there, for the block that asks next. As far as there is room that
 * nobody else will need. */
void pi2_neuron_cache_foresee(pi2_neuron_cache *c, int region, const int32_t *pages, int n);
/* Where a pinned page lies that has arrived. */
static inline const uint8_t *pi2_neuron_cache_at(const pi2_neuron_cache *c, int region, int32_t page) {
  return c->memory +
         atomic_load_explicit(&c->slot_of[c->regions[region].first + page], memory_order_relaxed) * c->slot_bytes;
}
void pi2_neuron_cache_signal(pi2_neuron_cache *c);
/* Waits until `event` is no longer `seen`, for at most timeout_ns. */
PI2_API void pi2_neuron_cache_wait(pi2_neuron_cache *c, uint32_t seen, int64_t timeout_ns);
#endif
