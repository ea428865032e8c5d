#define _GNU_SOURCE
#include "neuron_cache.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "pages.h"
#include "waiting.h"

enum { ABSENT, COMING, PRESENT }; /* state of a slot: of no page, being read, usable */
enum { WHOLE, HEAD, REST };       /* part of a page: REST while it is being read behind a head */
enum { RUNNING, WAITS_FOR_WORK, WAITS_FOR_READS };

void pi2_neuron_cache_signal(pi2_neuron_cache *c) {
  atomic_fetch_add(&c->event, 1);
  if (atomic_load(&c->sleepers)) pi2_futex_wake(&c->event);
}
void pi2_neuron_cache_wait(pi2_neuron_cache *c, uint32_t seen, int64_t timeout_ns) {
  atomic_fetch_add(&c->sleepers, 1);
  if (atomic_load(&c->event) == seen) pi2_futex_wait(&c->event, seen, timeout_ns);
  atomic_fetch_sub(&c->sleepers, 1);
}
static void wake_reader(pi2_neuron_cache *c) {
  atomic_fetch_add(&c->work, 1);
  const int waits = atomic_load(&c->reader);
  if (waits == WAITS_FOR_WORK) pi2_futex_wake(&c->work);
  if (waits == WAITS_FOR_READS && atomic_load(&c->in_flight) < c->depth) pi2_flash_wake(c->flash);
}

static int region_of(const pi2_neuron_cache *c, int32_t page) {
  int low = 0, high = c->n_regions - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (c->regions[middle].first <= page)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

/* How much a page is used, as of this step. */
static float uses(const pi2_neuron_cache *c, const pi2_use *u) {
  const uint32_t age = c->step - u->step;
  return age < PI2_FADE_STEPS ? u->uses * c->fade[age] : 0.0f;
}
static void use(pi2_neuron_cache *c, pi2_page_slot *s) { s->use = (pi2_use){uses(c, &s->use) + 1.0f, c->step}; }
/* The slot becomes the page's, which is to be read. */
static pi2_page_slot *give_slot(pi2_neuron_cache *c, int32_t slot, int32_t page, uint8_t part) {
  c->slots[slot] = (pi2_page_slot){.page = page, .state = COMING, .part = part, .use = c->use[page]};
  atomic_store_explicit(&c->slot_of[page], slot, memory_order_relaxed);
  return &c->slots[slot];
}
/* The page of a slot loses it. */
static void take_page(pi2_neuron_cache *c, pi2_page_slot *s) {
  if (s->page < 0) return;
  atomic_store_explicit(&c->slot_of[s->page], -1, memory_order_relaxed);
  c->use[s->page] = s->use;
  s->page = -1;
}
static int32_t new_slot(pi2_neuron_cache *c) {
  const int32_t slot = c->used++;
  if (c->touched < c->used) c->touched = c->used;
  return slot;
}
/* A slot for a new page: one never used, or that of the least used among the next few that nobody needs. -1: all are
 * pinned or on their way. */
static int32_t take_slot(pi2_neuron_cache *c) {
  if (c->used < c->n_slots) return new_slot(c);
  if (!c->unpinned) return -1;
  int32_t chosen = -1;
  float least = 0;
  for (int32_t seen = 0; chosen < 0 || seen < PI2_SAMPLE; seen++) {
    const int32_t at = c->hand;
    const pi2_page_slot *s = &c->slots[at];
    c->hand = at + 1 < c->n_slots ? at + 1 : 0;
    if (s->pins || s->state == COMING || (s->wanted > c->asked && seen < c->n_slots)) continue;
    const float mine = s->page < 0 ? -1.0f : uses(c, &s->use);
    if (chosen < 0 || mine < least) chosen = at, least = mine;
  }
  c->evictions += c->slots[chosen].page >= 0;
  take_page(c, &c->slots[chosen]);
  c->unpinned--;
  return chosen;
}
static void drop(pi2_neuron_cache *c, pi2_page_slot *s) {
  c->evictions += s->page >= 0;
  take_page(c, s);
  s->state = ABSENT;
}
/* Of a slot that nobody needs any more: it may be given up, or is one of those that go. */
static void unpin(pi2_neuron_cache *c, pi2_page_slot *s) {
  if (s - c->slots < c->n_slots)
    c->unpinned++;
  else
    drop(c, s);
}
/* Slots are pinned for reads once, where that is permitted. */
static void pin_memory(pi2_neuron_cache *c) {
  pi2_flash_register(c->flash, c->memory, atomic_load(&c->n_slots) * c->slot_bytes, c->capacity * c->slot_bytes,
                     c->slot_bytes);
}
static int in_use(const pi2_page_slot *s) { return s->pins || s->state == COMING; }
/* There may be more slots now than a moment ago, while some that were to go still are in use behind the last used one.
 * Nobody may be given these as new: all slots up to the last of them count as used again. */
static void use_again(pi2_neuron_cache *c) {
  int32_t end = c->touched < c->n_slots ? c->touched : c->n_slots;
  while (end > c->used && !in_use(&c->slots[end - 1])) end--;
  for (; c->used < end; c->used++) c->unpinned += !in_use(&c->slots[c->used]);
}
int32_t pi2_neuron_cache_resize(pi2_neuron_cache *c, int32_t n_slots) {
  int32_t left = 0;
  pthread_mutex_lock(&c->mutex);
  for (int32_t i = n_slots; i < c->touched; i++) {
    pi2_page_slot *s = &c->slots[i];
    if (in_use(s)) {
      left++;
      continue;
    }
    if (i < c->n_slots && i < c->used) c->unpinned--;
    if (s->page >= 0) drop(c, s);
  }
  if (!left || n_slots < c->n_slots) {
    c->n_slots = n_slots;
    if (c->used > n_slots) c->used = n_slots;
    if (c->hand >= n_slots) c->hand = 0;
    use_again(c);
  }
  pthread_mutex_unlock(&c->mutex);
  if (!left && pi2_flash_registered(c->flash)) pin_memory(c); /* else it was not permitted */
  return left;
}
void pi2_neuron_cache_step(pi2_neuron_cache *c) {
  pthread_mutex_lock(&c->mutex);
  c->step++;
  pthread_mutex_unlock(&c->mutex);
  if (atomic_load(&c->hangs)) atomic_store(&c->error, ETIMEDOUT); /* not to wait as long for every step */
}
void pi2_neuron_cache_block(pi2_neuron_cache *c) {
  pthread_mutex_lock(&c->mutex);
  c->asked++;
  pthread_mutex_unlock(&c->mutex);
}
pi2_neuron_counts pi2_neuron_cache_counts(pi2_neuron_cache *c) {
  pthread_mutex_lock(&c->mutex);
  const pi2_neuron_counts n = {c->hits + c->misses,         c->misses + c->early,   c->early,     c->missed_bytes,
                               atomic_load(&c->reads_done), atomic_load(&c->bytes), c->gap_pages, c->gap_bytes};
  pthread_mutex_unlock(&c->mutex);
  return n;
}
static void enqueue(pi2_neuron_cache *c, int32_t slot) { c->queue[c->queue_tail++ % (uint64_t)c->capacity] = slot; }
static uint8_t first_part(const pi2_region *g) { return g->head_bytes ? HEAD : WHOLE; }
static int64_t asked_bytes(const pi2_region *g) { return g->head_bytes ? g->head_bytes : g->page_bytes; }

int pi2_neuron_cache_ask(pi2_neuron_cache *c, int region, const int32_t *pages, int n, _Atomic int32_t *pending) {
  const int32_t first = c->regions[region].first;
  int asked = 0, reads = 0;
  pthread_mutex_lock(&c->mutex);
  for (; asked < n; asked++) {
    const int32_t page = first + pages[asked];
    int32_t slot = atomic_load_explicit(&c->slot_of[page], memory_order_relaxed);
    if (slot < 0) {
      if ((slot = take_slot(c)) < 0) break;
      pi2_page_slot *s = give_slot(c, slot, page, first_part(&c->regions[region]));
      s->pins = 1, s->pending[0] = pending;
      use(c, s);
      atomic_fetch_add(pending, 1);
      enqueue(c, slot);
      reads++;
      c->misses++;
      c->missed_bytes += asked_bytes(&c->regions[region]);
      continue;
    }
    pi2_page_slot *s = &c->slots[slot];
    if (s->state == COMING) { /* foreseen, or left over from a run that was stopped */
      s->pending[s->pending[0] != NULL] = pending;
      atomic_fetch_add(pending, 1);
    } else if (!s->pins) {
      c->unpinned--;
    }
    if (s->fresh) {
      s->fresh = 0;
      c->early++;
      c->missed_bytes += asked_bytes(&c->regions[region]);
    }
    s->pins++;
    use(c, s);
    c->hits++;
  }
  pthread_mutex_unlock(&c->mutex);
  if (reads) wake_reader(c);
  return asked;
}
void pi2_neuron_cache_near(pi2_neuron_cache *c, int region, int32_t first, int n, const float *part) {
  const int32_t from = c->regions[region].first + first;
  pthread_mutex_lock(&c->mutex);
  for (int32_t i = 0; i < n; i++) {
    if (!(part[i] > 0 && part[i] < 1)) continue;
    const int32_t slot = atomic_load_explicit(&c->slot_of[from + i], memory_order_relaxed);
    pi2_use *u = slot < 0 ? &c->use[from + i] : &c->slots[slot].use;
    *u = (pi2_use){uses(c, u) + part[i], c->step};
  }
  pthread_mutex_unlock(&c->mutex);
}
void pi2_neuron_cache_complete(pi2_neuron_cache *c, int region, const int32_t *pages, int n, _Atomic int32_t *pending) {
  const pi2_region *g = &c->regions[region];
  int reads = 0;
  pthread_mutex_lock(&c->mutex);
  for (int i = 0; i < n; i++) {
    const int32_t slot = atomic_load_explicit(&c->slot_of[g->first + pages[i]], memory_order_relaxed);
    pi2_page_slot *s = &c->slots[slot];
    if (s->part == WHOLE) continue;
    s->state = COMING, s->part = REST, s->pending[0] = pending;
    atomic_fetch_add(pending, 1);
    enqueue(c, slot);
    reads++;
    c->completed++;
    c->missed_bytes += g->page_bytes - g->head_bytes;
  }
  pthread_mutex_unlock(&c->mutex);
  if (reads) wake_reader(c);
}
void pi2_neuron_cache_foresee(pi2_neuron_cache *c, int region, const int32_t *pages, int n) {
  const int32_t first = c->regions[region].first;
  int reads = 0;
  pthread_mutex_lock(&c->mutex);
  for (int i = 0; i < n && c->unpinned > c->n_slots / 2; i++) {
    const int32_t page = first + pages[i];
    int32_t slot = atomic_load_explicit(&c->slot_of[page], memory_order_relaxed);
    if (slot < 0) {
      if ((slot = take_slot(c)) < 0) break;
      give_slot(c, slot, page, first_part(&c->regions[region]))->fresh = 1;
      enqueue(c, slot);
      reads++;
    }
    c->slots[slot].wanted = c->asked + 2; /* the next block is the one after this */
  }
  pthread_mutex_unlock(&c->mutex);
  if (reads) wake_reader(c);
}
void pi2_neuron_cache_absent(pi2_neuron_cache *c, float *result) {
  pthread_mutex_lock(&c->mutex);
  for (int32_t i = 0; i < c->n_pages; i++)
    result[i] = atomic_load_explicit(&c->slot_of[i], memory_order_relaxed) < 0 ? uses(c, &c->use[i]) : -1.0f;
  pthread_mutex_unlock(&c->mutex);
}
int pi2_neuron_cache_fetch(pi2_neuron_cache *c, const int32_t *pages, int n) {
  pthread_mutex_lock(&c->mutex);
  for (int i = 0; i < n && c->used < c->n_slots; i++) {
    if (atomic_load_explicit(&c->slot_of[pages[i]], memory_order_relaxed) >= 0) continue;
    const int32_t slot = take_slot(c);
    give_slot(c, slot, pages[i], WHOLE);
    enqueue(c, slot);
  }
  const int room = c->used < c->n_slots;
  pthread_mutex_unlock(&c->mutex);
  wake_reader(c);
  return room;
}
int64_t pi2_neuron_cache_waiting(pi2_neuron_cache *c) {
  pthread_mutex_lock(&c->mutex);
  const int64_t n = (int64_t)(c->queue_tail - c->queue_head);
  pthread_mutex_unlock(&c->mutex);
  return n;
}
void pi2_neuron_cache_release(pi2_neuron_cache *c, int region, const int32_t *pages, int n) {
  const int32_t first = c->regions[region].first;
  pthread_mutex_lock(&c->mutex);
  for (int i = 0; i < n; i++) {
    pi2_page_slot *s = &c->slots[atomic_load_explicit(&c->slot_of[first + pages[i]], memory_order_relaxed)];
    if (!--s->pins) unpin(c, s);
  }
  pthread_mutex_unlock(&c->mutex);
}
void pi2_neuron_cache_abandon(pi2_neuron_cache *c) {
  pthread_mutex_lock(&c->mutex);
  for (int32_t i = 0; i < c->touched; i++) {
    pi2_page_slot *s = &c->slots[i];
    const int was = s->pins;
    s->pins = 0;
    s->pending[0] = s->pending[1] = NULL;
    if (was && s->state != COMING) unpin(c, s);
  }
  pthread_mutex_unlock(&c->mutex);
  atomic_store(&c->error, 0);
}

/* -- the reader */

int pi2_neuron_cache_read_through(pi2_neuron_cache *c, int64_t bytes) {
  uint8_t *scrap = bytes ? pi2_pages_map(bytes, 0) : NULL;
  if (bytes && !scrap) return ENOMEM;
  pthread_mutex_lock(&c->mutex);
  c->scrap = scrap, c->read_through = bytes;
  pthread_mutex_unlock(&c->mutex);
  return 0;
}
/* Pages from the end of what a read has, `next`, to that of the slot: 0 where that is the neighbour, -1 where they are
 * too many. */
static int32_t gap_to(const pi2_neuron_cache *c, const pi2_fetch *f, int32_t next, const pi2_page_slot *s,
                      int64_t page_bytes) {
  const int32_t gap = s->page - next;
  if (gap <= 0) return gap ? -1 : 0;
  return s->part == WHOLE && !s->alone && !c->slots[f->slot[0]].alone && gap <= c->read_through / page_bytes ? gap : -1;
}
/* A read with gaps has failed, maybe for what nobody asked for: once more without them. Under the mutex. */
static void read_alone(pi2_neuron_cache *c, const pi2_fetch *f) {
  for (int i = 0; i < f->count; i++) {
    c->slots[f->slot[i]].alone = 1;
    enqueue(c, f->slot[i]);
  }
}
/* The next read: the oldest page that waits, and those behind it that are its neighbours in the file, or nearly. Under
 * the mutex. */
static void start(pi2_neuron_cache *c) {
  pi2_fetch *f = c->spare[--c->n_spare];
  const int32_t first = c->slots[c->queue[c->queue_head % (uint64_t)c->capacity]].page; /* COMING: nobody changes it */
  const pi2_region *g = &c->regions[region_of(c, first)];
  pi2_read *r = &f->read;
  r->bytes = r->n_parts = 0;
  f->foreseen = 0;
  f->gap_pages = f->gap_bytes = 0;
  int32_t next = first;
  f->begin_ns = c->records ? pi2_now_ns() : 0;
  const int part = c->slots[c->queue[c->queue_head % (uint64_t)c->capacity]].part;
  const int64_t from = part == REST ? g->head_bytes : 0;
  for (f->count = 0; c->queue_head != c->queue_tail && f->count < (part == WHOLE ? PI2_MERGED : 1);
       c->queue_head++, f->count++) {
    const int32_t slot = c->queue[c->queue_head % (uint64_t)c->capacity];
    const int32_t page = c->slots[slot].page, end = g->first + g->pages,
                  gap = gap_to(c, f, next, &c->slots[slot], g->page_bytes);
    if (gap < 0 || page >= end || c->slots[slot].part != part) break;
    const int64_t bytes = part == HEAD ? g->head_bytes : (page + 1 < end ? g->page_bytes : g->last_bytes) - from;
    const int64_t between = gap * g->page_bytes;
    if (f->count && r->bytes + between + bytes > PI2_MERGED_BYTES) break;
    if (gap) f->part[r->n_parts++] = (struct iovec){c->scrap, (size_t)between};
    f->gap_pages += gap, f->gap_bytes += between;
    f->slot[f->count] = slot;
    f->foreseen += c->slots[slot].wanted != 0;
    f->part[r->n_parts++] = (struct iovec){c->memory + slot * c->slot_bytes + from, (size_t)bytes};
    r->bytes += between + bytes;
    next = page + 1;
  }
  r->offset = g->offset + (first - g->first) * g->page_bytes + from;
  r->to = f->part[0].iov_base;
  r->parts = r->n_parts > 1 ? f->part : NULL;
  r->user = f;
  atomic_fetch_add(&c->in_flight, 1);
  if (pi2_flash_submit(c->flash, r)) { /* cannot be: there are as many reads as it takes */
    atomic_fetch_sub(&c->in_flight, 1);
    atomic_store(&c->error, EIO);
    f->begin_ns = 0;
    c->spare[c->n_spare++] = f;
  }
}
static void record(pi2_neuron_cache *c, pi2_fetch *f) {
  c->records[c->recorded++ % c->n_records] = (pi2_read_record){
      f->begin_ns, pi2_now_ns(), region_of(c, c->slots[f->slot[0]].page), (uint16_t)f->count, (uint16_t)f->foreseen};
  f->begin_ns = 0;
}
int pi2_neuron_cache_trace(pi2_neuron_cache *c, int64_t n) {
  pi2_read_record *records = calloc((size_t)n, sizeof *records);
  if (!records) return -1;
  pthread_mutex_lock(&c->mutex);
  free(c->records);
  c->records = records, c->n_records = n, c->recorded = c->taken = 0;
  pthread_mutex_unlock(&c->mutex);
  return 0;
}
int64_t pi2_neuron_cache_take_records(pi2_neuron_cache *c, pi2_read_record *to, int64_t *horizon) {
  int64_t n = 0;
  pthread_mutex_lock(&c->mutex);
  if (c->recorded - c->taken > c->n_records) c->taken = c->recorded - c->n_records; /* the oldest are lost */
  for (; c->taken < c->recorded; c->taken++) to[n++] = c->records[c->taken % c->n_records];
  *horizon = pi2_now_ns();
  for (int i = 0; i < c->depth; i++)
    if (c->fetches[i].begin_ns && c->fetches[i].begin_ns < *horizon) *horizon = c->fetches[i].begin_ns;
  pthread_mutex_unlock(&c->mutex);
  return n;
}
/* Returns whether somebody has to be told. Under the mutex. */
static int finish(pi2_neuron_cache *c, pi2_read *r) {
  pi2_fetch *f = r->user;
  int tell = 0, failed = 0; /* failed: somebody waits for what could not be read */
  if (f->begin_ns) record(c, f);
  c->spare[c->n_spare++] = f;
  atomic_fetch_sub(&c->in_flight, 1);
  atomic_fetch_add_explicit(&c->bytes, r->got, memory_order_relaxed);
  atomic_fetch_add_explicit(&c->reads_done, 1, memory_order_relaxed);
  if (r->error && f->gap_pages) {
    read_alone(c, f);
    return 0;
  }
  c->gap_pages += f->gap_pages, c->gap_bytes += f->gap_bytes;
  for (int i = 0; i < f->count; i++) {
    pi2_page_slot *s = &c->slots[f->slot[i]];
    if (r->error) take_page(c, s); /* it is not there; its cluster never becomes ready */
    s->state = r->error ? ABSENT : PRESENT;
    if (s->part == REST) s->part = WHOLE;
    if (!s->pins) unpin(c, s);
    failed |= r->error && s->pending[0];
    for (int j = 0; j < 2; j++) {
      if (s->pending[j] && !r->error && atomic_fetch_sub(s->pending[j], 1) == 1) tell = 1;
      s->pending[j] = NULL;
    }
  }
  if (failed) atomic_store(&c->error, r->error);
  return tell || failed;
}
static void *reader_main(void *argument) {
  pi2_neuron_cache *c = argument;
  pi2_read *done[PI2_FLASH_MOST];
  int64_t since = 0; /* a read ended last, or the first one began; 0: none is in flight */
  pi2_flash_begin_reader(c->flash, "pi2rt/neurons");
  while (!atomic_load(&c->closing)) {
    const uint32_t work = atomic_load(&c->work);
    pthread_mutex_lock(&c->mutex);
    while (c->n_spare && c->queue_head != c->queue_tail) start(c);
    const int full = c->queue_head != c->queue_tail;
    pthread_mutex_unlock(&c->mutex);
    if (c->n_spare == c->depth) {
      since = 0;
      atomic_store(&c->reader, WAITS_FOR_WORK);
      if (atomic_load(&c->work) == work && !atomic_load(&c->closing)) pi2_futex_wait(&c->work, work, -1);
      atomic_store(&c->reader, RUNNING);
      continue;
    }
    const int64_t begin = pi2_now_ns();
    atomic_store(&c->reader, WAITS_FOR_READS);
    /* what was asked for meanwhile is started before waiting: its wake-up may have come too early */
    const int more = !full && atomic_load(&c->work) != work;
    if (!since) since = begin;
    const int n =
        pi2_flash_reap(c->flash, done, PI2_FLASH_MOST, more ? 0 : pi2_flash_left(since, c->deadline_ns, begin));
    const int64_t end = pi2_now_ns();
    const int late = !n && c->deadline_ns >= 0 && end - since >= c->deadline_ns;
    atomic_store(&c->reader, RUNNING);
    atomic_fetch_add_explicit(&c->busy_ns, end - begin, memory_order_relaxed);
    if (n) atomic_store(&c->hangs, 0);
    if (late) atomic_store(&c->hangs, 1), atomic_store(&c->error, ETIMEDOUT);
    if (n || late) since = end;
    int tell = late;
    pthread_mutex_lock(&c->mutex);
    for (int i = 0; i < n; i++) tell |= finish(c, done[i]);
    pthread_mutex_unlock(&c->mutex);
    if (tell) pi2_neuron_cache_signal(c);
  }
  return NULL;
}

int pi2_neuron_cache_fill(pi2_neuron_cache *c, int region, int32_t first, int32_t count) {
  const pi2_region *g = &c->regions[region];
  _Atomic int32_t pending = 1;
  pthread_mutex_lock(&c->mutex);
  for (int32_t i = first; i < first + count && c->used < c->n_slots; i++) {
    const int32_t slot = new_slot(c);
    give_slot(c, slot, g->first + i, WHOLE)->pending[0] = &pending;
    atomic_fetch_add(&pending, 1);
    enqueue(c, slot);
  }
  pthread_mutex_unlock(&c->mutex);
  wake_reader(c);
  atomic_fetch_sub(&pending, 1);
  for (;;) {
    const uint32_t seen = atomic_load(&c->event);
    const int error = atomic_load(&c->error);
    if (error) {
      pi2_neuron_cache_abandon(c); /* `pending` goes with this call */
      return error;
    }
    if (atomic_load(&pending) == 0) return 0;
    pi2_neuron_cache_wait(c, seen, 100000000);
  }
}

pi2_neuron_cache *pi2_neuron_cache_create(pi2_flash *flash, const pi2_region *regions, int n_regions, int32_t n_pages,
                                          int64_t slot_bytes, uint8_t *memory, int32_t n_slots, int32_t capacity,
                                          int depth, int64_t deadline_ns, int *error) {
  pi2_neuron_cache *c = aligned_alloc(64, (sizeof *c + 63) / 64 * 64);
  *error = ENOMEM;
  if (!c) return NULL;
  memset(c, 0, sizeof *c);
  c->flash = flash, c->regions = regions, c->n_regions = n_regions, c->n_pages = n_pages;
  c->slot_bytes = slot_bytes, c->memory = memory, c->capacity = capacity, c->depth = depth;
  c->deadline_ns = deadline_ns;
  atomic_init(&c->n_slots, n_slots);
  c->slot_of = malloc((size_t)n_pages * sizeof *c->slot_of);
  c->slots = calloc((size_t)capacity, sizeof *c->slots);
  c->use = calloc((size_t)n_pages, sizeof *c->use);
  for (int i = 0; i < PI2_FADE_STEPS; i++) c->fade[i] = i ? c->fade[i - 1] * PI2_FADE : 1.0f;
  c->queue = calloc((size_t)capacity, sizeof *c->queue);
  c->fetches = calloc((size_t)depth, sizeof *c->fetches);
  c->spare = calloc((size_t)depth, sizeof *c->spare);
  if (c->slot_of && c->slots && c->use && c->queue && c->fetches && c->spare) {
    for (int32_t i = 0; i < n_pages; i++) atomic_init(&c->slot_of[i], -1);
    for (int i = 0; i < depth; i++) c->spare[c->n_spare++] = &c->fetches[i];
    pin_memory(c);
    *error = pthread_mutex_init(&c->mutex, NULL);
    if (!*error && (*error = pthread_create(&c->thread, NULL, reader_main, c))) pthread_mutex_destroy(&c->mutex);
  }
  if (!*error) return c;
  free((void *)c->slot_of), free(c->slots), free(c->use), free(c->queue), free(c->fetches), free(c->spare), free(c);
  return NULL;
}
int64_t pi2_neuron_cache_destroy(pi2_neuron_cache *c) {
  atomic_store(&c->closing, 1);
  atomic_fetch_add(&c->work, 1);
  pi2_futex_wake(&c->work);
  pi2_flash_wake(c->flash);
  pthread_join(c->thread, NULL);
  const int64_t left = pi2_flash_close(c->flash, pi2_flash_patience(c->deadline_ns));
  if (left) return left; /* slots and memory are still written to */
  pthread_mutex_destroy(&c->mutex);
  free((void *)c->slot_of), free(c->slots), free(c->use), free(c->queue), free(c->fetches), free(c->spare),
      free(c->records);
  if (c->scrap) pi2_pages_unmap(c->scrap, c->read_through);
  free(c);
  return 0;
}
