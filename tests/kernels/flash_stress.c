/* The flash reader under the sanitizers: random reads of a file whose bytes are known, at every depth and through both
 * backends, while other threads wake the reader and ask for its statistics; and readers that close with reads in
 * flight.
 *
 *   flash_stress READS */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "flash.h"
#include "gang.h"

enum { BLOCKS = 512, MOST_BLOCKS = 16, ENDINGS = 60 };

static uint64_t state = 1;
static uint32_t random_bits(void) { /* xorshift64* */
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return (uint32_t)(state * 0x2545f4914f6cdd1du >> 32);
}
static int below(int n) { return (int)(random_bits() % (uint32_t)n); }

static _Noreturn void die(const char *why) {
  fprintf(stderr, "flash_stress: %s\n", why);
  exit(2);
}
static uint8_t *allocate(int64_t bytes) {
  void *p = NULL;
  if (posix_memalign(&p, PI2_SECTOR, (size_t)bytes)) die("out of memory");
  return p;
}

/* The file: each word says where it is. Its last block is half a block. */
static void write_file(int fd) {
  static uint64_t block[PI2_SECTOR / 8];
  for (int64_t i = 0; i < BLOCKS; i++) {
    for (int64_t j = 0; j < PI2_SECTOR / 8; j++) block[j] = (uint64_t)(i * PI2_SECTOR + 8 * j);
    const int64_t bytes = i == BLOCKS - 1 ? PI2_SECTOR / 2 : PI2_SECTOR;
    if (write(fd, block, (size_t)bytes) != bytes) die("cannot write the file");
  }
  if (fsync(fd)) die("cannot write the file");
}
static void check(const pi2_read *r) {
  const int64_t file = BLOCKS * (int64_t)PI2_SECTOR - PI2_SECTOR / 2, rest = file > r->offset ? file - r->offset : 0;
  if (r->got != (rest < r->bytes ? rest : r->bytes)) die("bytes are missing");
  if (r->error != (r->got < r->bytes ? PI2_EOF : 0)) die("another error");
  for (int64_t i = 0; i < r->got; i += 8) {
    uint64_t word;
    memcpy(&word, r->to + i, 8);
    if (word != (uint64_t)(r->offset + i)) die("bytes of another place");
  }
}

typedef struct {
  pi2_flash *flash;
  atomic_int end;
  int64_t times;
} bystander;
static void *disturb(void *argument) {
  bystander *b = argument;
  struct pi2_flash_statistics s;
  while (!atomic_load(&b->end)) {
    pi2_flash_wake(b->flash);
    pi2_flash_statistics(b->flash, &s);
    if (s.errors > s.reads) die("statistics");
    b->times++;
    usleep(50);
  }
  return NULL;
}

typedef struct {
  pi2_flash *flash;
  int depth, n_free;
  uint8_t *memory;
  pi2_read *reads, **free;
} reader;
static reader open_reader(const char *path, enum pi2_io io, int depth) {
  int error = 0;
  reader r = {.flash = pi2_flash_open(path, io, depth, &error), .depth = depth};
  if (!r.flash) die(strerror(error));
  const int64_t bytes = depth * (int64_t)MOST_BLOCKS * PI2_SECTOR;
  r.memory = allocate(bytes);
  memset(r.memory, 0xff, (size_t)bytes);
  r.reads = calloc((size_t)depth, sizeof *r.reads);
  r.free = calloc((size_t)depth, sizeof *r.free);
  if (!r.reads || !r.free) die("out of memory");
  for (int i = 0; i < depth; i++) {
    r.reads[i].to = r.memory + i * (int64_t)MOST_BLOCKS * PI2_SECTOR;
    r.free[r.n_free++] = &r.reads[i];
  }
  if (below(2)) /* may fail: it makes no difference to the bytes */
    pi2_flash_register(r.flash, r.memory, bytes, bytes, PI2_SECTOR);
  return r;
}
static void start(reader *r) {
  pi2_read *q = r->free[--r->n_free];
  q->bytes = (1 + below(below(4) ? 2 : MOST_BLOCKS)) * (int64_t)PI2_SECTOR;
  q->offset = (below(25) ? below(BLOCKS + 1) : BLOCKS - 1) * (int64_t)PI2_SECTOR; /* so that some end too early */
  if (pi2_flash_submit(r->flash, q)) die("cannot submit");
}
static int64_t reap(reader *r) {
  static const int64_t timeouts[] = {0, 0, 20000, 10000000, -1};
  pi2_read *done[PI2_FLASH_MOST], one_more = {.offset = 0};
  if (!r->n_free && pi2_flash_submit(r->flash, &one_more) != -1) die("more reads than the depth");
  const int n = pi2_flash_reap(r->flash, done, 1 + below(r->depth), timeouts[below(5)]);
  for (int i = 0; i < n; i++) {
    check(done[i]);
    r->free[r->n_free++] = done[i];
  }
  return n;
}
/* Frees the memory that reads in flight went to: nothing may write to it once close has returned. */
static void close_reader(reader *r) {
  const size_t bytes = (size_t)r->depth * MOST_BLOCKS * PI2_SECTOR;
  pi2_flash_close(r->flash, -1);
  memset(r->memory, 0x55, bytes);
  memset(r->reads, 0x55, (size_t)r->depth * sizeof *r->reads);
  for (int i = below(3000); i > 0; i--) pi2_pause();
  for (size_t i = 0; i < bytes; i++)
    if (r->memory[i] != 0x55) die("a read wrote after close");
  free(r->memory);
  free(r->reads);
  free(r->free);
}

static void play(const char *path, enum pi2_io io, int depth, int64_t reads) {
  reader r = open_reader(path, io, depth);
  bystander b = {.flash = r.flash};
  pthread_t thread;
  if (pthread_create(&thread, NULL, disturb, &b)) die("no thread");
  int64_t begun = 0, finished = 0;
  while (finished < reads) {
    while (begun < reads && r.n_free && below(8)) start(&r), begun++;
    if (r.n_free < depth) finished += reap(&r);
  }
  atomic_store(&b.end, 1);
  pthread_join(thread, NULL);
  struct pi2_flash_statistics s;
  pi2_flash_statistics(r.flash, &s);
  int64_t sum = 0;
  for (int i = 0; i < PI2_FLASH_LATENCIES; i++) sum += s.latency[i];
  if (s.reads != reads || sum != reads || !s.errors || s.errors == reads) die("reads are not counted");
  close_reader(&r);
}

int main(int argc, char **argv) {
  const int reads = argc > 1 ? atoi(argv[1]) : 0;
  if (reads < 100 || reads > 1000000) die("usage: flash_stress READS");
  alarm(600); /* a deadlock must not hang whoever runs this */
  char path[] = "flash_stress.XXXXXX", why[96];
  const int fd = mkstemp(path);
  if (fd < 0) die("no file");
  write_file(fd);
  const int uring = pi2_uring_probe(why, sizeof why) == 0;
  printf("%s\n", why);
  static const int depths[] = {1, 2, 7, 64};
  for (enum pi2_io io = uring ? PI2_IO_URING : PI2_IO_PREADV; io <= PI2_IO_PREADV; io++) {
    for (int i = 0; i < 4; i++) play(path, io, depths[i], reads);
    for (int i = 0; i < ENDINGS; i++) {
      reader r = open_reader(path, io, depths[i % 4]);
      for (int j = below(r.depth + 1); j > 0; j--) start(&r);
      if (r.n_free < r.depth && below(2)) reap(&r);
      close_reader(&r);
    }
  }
  close(fd);
  unlink(path);
  printf("%d reads at each of 4 depths, %d readers closed at once, %s\n", reads, ENDINGS,
         uring ? "both backends" : "preadv alone");
  return 0;
}
