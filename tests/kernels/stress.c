/* The data plane under the sanitizers: a gang of three threads runs a small program of random weights, with steps
 * posted ahead and steps stopped at any moment, and gives the bits that one thread alone gives. Then again with every
 * matrix of every layer streamed from a file through the smallest ring; with ReLU, with the neurons of feed-forward
 * blocks read from a file when they are active, through the smallest cache and changing ones; and with threads that
 * assist, which lose their core at any moment, for longer than several steps take. Half of the tokens wait for masks,
 * which come at any moment.
 *
 *   stress STEPS
 *
 * Uses the scalar kernels: it is about the threads. */
#include <errno.h>
#include <math.h>
#include <poll.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include "bundles.h"
#include "masks.h"
#include "ops_attention.h"
#include "ops_embed.h"
#include "ops_linear.h"
#include "program.h"
#include "sparse.h"

enum {
  RECORDS = 32,
  DIM = 64,
  HEADS = 4,
  KV_HEADS = 2,
  HEAD_DIM = 16,
  HIDDEN = 96,
  RELU_HIDDEN = 544 /* two clusters, a page in both */,
  VOCAB = 203,
  LAYERS = 2,
  SLOTS = 3,
  MAX_ROWS = 48,
  CONTEXT = 640,
  PAGES = CONTEXT / PI2_PAGE
};

static uint64_t state = 1;
static uint32_t random_bits(void) { /* xorshift64* */
  state ^= state >> 12;
  state ^= state << 25;
  state ^= state >> 27;
  return (uint32_t)(state * 0x2545f4914f6cdd1du >> 32);
}
static int below(int n) { return (int)(random_bits() % (uint32_t)n); }
static float small(void) { return ((float)(random_bits() >> 8) * 0x1p-24f - 0.5f) * 0.25f; }

static void spin(int n) {
  for (int i = 0; i < n; i++) pi2_pause();
}
static _Noreturn void die(const char *why) {
  fprintf(stderr, "stress: %s\n", why);
  exit(2);
}
static void *allocate(int64_t bytes) {
  void *p = NULL;
  if (posix_memalign(&p, 64, (size_t)bytes)) die("out of memory");
  return p;
}

/* Random bytes with small scales, as a file would have them. */
static void random_row(int type, int64_t k, uint8_t *row) {
  const int64_t bytes = pi2_row_bytes(type, k);
  for (int64_t i = 0; i < bytes; i++) row[i] = (uint8_t)random_bits();
  if (type == PI2_F32)
    for (int64_t i = 0; i < k; i++) ((float *)row)[i] = small();
  if (type == PI2_F16) /* exponents of 2^-8 to 2^-5 */
    for (int64_t i = 0; i < k; i++) row[2 * i + 1] = (uint8_t)((row[2 * i + 1] & 0x8f) | 0x20);
  const int block = type == PI2_Q4_0 ? 18 : type == PI2_Q4_1 ? 20 : type == PI2_Q5_0 ? 22 : type == PI2_Q8_0 ? 34 : 0;
  for (int64_t i = 0; block && i < bytes; i += block) {
    row[i + 1] = type == PI2_Q8_0 ? 0x10 : 0x1c; /* about 2^-11, 2^-8 */
    if (type == PI2_Q4_1) row[i + 3] = 0xa0;
  }
}
/* keep: where the rows as a file has them go, or NULL */
static pi2_matrix random_matrix(int type, int64_t rows, int64_t k, uint8_t **keep) {
  uint8_t *file = allocate(rows * pi2_row_bytes(type, k));
  for (int64_t i = 0; i < rows; i++) random_row(type, k, file + i * pi2_row_bytes(type, k));
  uint8_t *blocks = allocate((rows + 15) / 16 * pi2_row_block_bytes(type, k));
  if (pi2_repack(type, file, rows, k, blocks)) die("weights are not finite");
  if (keep)
    *keep = file;
  else
    free(file);
  return (pi2_matrix){.type = type, .rows = rows, .k = k, .data = blocks};
}

typedef struct {
  pi2_matrix embedding, q[LAYERS], k[LAYERS], v[LAYERS], out[LAYERS], up[LAYERS], gate[LAYERS], down[LAYERS], head;
  uint8_t *up_file[LAYERS], *down_file[LAYERS]; /* with relu */
  float norm[DIM];
  int64_t half, page_bytes;
  int relu;
} model;

static model random_model(int relu) {
  static const int types[LAYERS][7] = {{PI2_Q4_0, PI2_F16, PI2_Q8_0, PI2_Q4_1, PI2_Q5_0, PI2_Q4_1, PI2_Q8_0},
                                       {PI2_F32, PI2_Q4_0, PI2_Q4_1, PI2_F16, PI2_Q8_0, PI2_Q5_0, PI2_F16}};
  const int hidden = relu ? RELU_HIDDEN : HIDDEN;
  model m = {.embedding = random_matrix(PI2_Q8_0, VOCAB, DIM, NULL),
             .head = random_matrix(PI2_Q4_1, VOCAB, DIM, NULL),
             .relu = relu};
  for (int i = 0; i < LAYERS; i++) {
    m.q[i] = random_matrix(types[i][0], HEADS * HEAD_DIM, DIM, NULL);
    m.k[i] = random_matrix(types[i][1], KV_HEADS * HEAD_DIM, DIM, NULL);
    m.v[i] = random_matrix(types[i][2], KV_HEADS * HEAD_DIM, DIM, NULL);
    m.out[i] = random_matrix(types[i][3], DIM, HEADS * HEAD_DIM, NULL);
    m.up[i] = random_matrix(relu ? PI2_Q4_0 : types[i][4], hidden, DIM, relu ? &m.up_file[i] : NULL);
    m.gate[i] = random_matrix(types[i][5], hidden, DIM, NULL);
    m.down[i] = random_matrix(relu ? PI2_Q4_0 : types[i][6], DIM, hidden, relu ? &m.down_file[i] : NULL);
  }
  for (int i = 0; i < DIM; i++) m.norm[i] = 1 + small();
  m.half = PI2_PAGE * HEAD_DIM * 2;
  m.page_bytes = 2 * m.half * KV_HEADS * LAYERS;
  return m;
}
static void free_model(model *m) {
  free((void *)m->embedding.data);
  free((void *)m->head.data);
  for (int i = 0; i < LAYERS; i++) {
    const pi2_matrix all[] = {m->q[i], m->k[i], m->v[i], m->out[i], m->up[i], m->gate[i], m->down[i]};
    for (int j = 0; j < 7; j++) free((void *)all[j].data);
    free(m->up_file[i]), free(m->down_file[i]);
  }
}

static pi2_op *add(pi2_program *p, int kind, int layer) {
  pi2_op *op = pi2_op_add(p, kind, layer);
  if (!op) die("out of memory");
  return op;
}
static void add_linear(pi2_program *p, int layer, int source, int sink, int q8_in, pi2_matrix m) {
  pi2_op *op = add(p, PI2_LINEAR, layer);
  op->source = source, op->sink = sink, op->q8_in = q8_in;
  op->n_matrices = 1, op->matrix[0] = m;
}
/* A hand-off of the input, or the answer of a unit. */
static void add_hop(pi2_program *p, int kind, int layer, pi2_norm norm, pi2_cluster_unit *unit) {
  pi2_op *op = add(p, kind, layer);
  op->norm = norm, op->sink = PI2_ADD_TO_X;
  ((pi2_hop *)op->data)->unit = unit;
}
/* `sparse`: of feed-forward blocks neurons are read; see sparse_all. `unit`: works beside these blocks, or NULL. */
static void build(pi2_program *p, const model *m, pi2_gang *gang, uint8_t *cache, int sparse, pi2_cluster_unit *unit) {
  memset(p, 0, sizeof *p);
  *p = (pi2_program){.kernels = pi2_variants()[0],
                     .gang = gang,
                     .threads = gang->n,
                     .wide = 1,
                     .dim = DIM,
                     .vocab = VOCAB,
                     .max_rows = MAX_ROWS,
                     .max_slots = SLOTS,
                     .context = CONTEXT,
                     .mask_deadline_ns = INT64_MAX / 4,
                     .n_ropes = 1,
                     .ropes = calloc(1, sizeof(pi2_rope))};
  double *frequencies = malloc(HEAD_DIM / 2 * sizeof *frequencies);
  for (int i = 0; i < HEAD_DIM / 2; i++) frequencies[i] = pow(10000, -2.0 * i / HEAD_DIM);
  p->ropes[0] = (pi2_rope){.half = HEAD_DIM / 2, .frequencies = frequencies, .magnitude = 1};
  const pi2_norm norm = {.weight = m->norm, .eps = 1e-5f};
  *(pi2_embed *)add(p, PI2_EMBED, -1)->data = (pi2_embed){.matrix = m->embedding, .scale = 1};
  for (int i = 0; i < LAYERS; i++) {
    const int out_q8 = m->out[i].type != PI2_F16, down_q8 = m->down[i].type != PI2_F16;
    pi2_op *qkv = add(p, PI2_LINEAR, i);
    qkv->norm = norm, qkv->n_matrices = 3;
    qkv->matrix[0] = m->q[i], qkv->matrix[1] = m->k[i], qkv->matrix[2] = m->v[i];
    pi2_op *attention = add(p, PI2_ATTENTION, i);
    attention->q8_out = out_q8;
    *(pi2_attention *)attention->data = (pi2_attention){.n_heads = HEADS,
                                                        .n_kv_heads = KV_HEADS,
                                                        .head_dim = HEAD_DIM,
                                                        .window = i ? 100 : 0,
                                                        .scale = 0.125f,
                                                        .softcap = i ? 30 : 0,
                                                        .rope = 0,
                                                        .kv = {.base = cache + i * KV_HEADS * 2 * m->half,
                                                               .page_stride = m->page_bytes,
                                                               .v_offset = m->half,
                                                               .head_dim = HEAD_DIM,
                                                               .type = PI2_KV_F16},
                                                        .kv_head_stride = 2 * m->half};
    add_linear(p, i, PI2_FROM_ATTENTION, PI2_ADD_TO_X, out_q8, m->out[i]);
    if (sparse) {
      pi2_op *op = add(p, PI2_SPARSE, i);
      op->norm = norm, op->sink = PI2_ADD_TO_X, op->n_matrices = 1, op->matrix[0] = m->gate[i];
      ((pi2_neuron_block *)op->data)->activation = PI2_RELU;
      continue;
    }
    if (unit) add_hop(p, PI2_HANDOFF, i, norm, unit);
    pi2_op *ffn = add(p, PI2_FFN, i);
    ffn->norm = norm, ffn->q8_out = down_q8;
    ffn->n_matrices = 2, ffn->matrix[0] = m->up[i], ffn->matrix[1] = m->gate[i];
    ((pi2_ffn *)ffn->data)->activation = m->relu ? PI2_RELU : PI2_SILU;
    add_linear(p, i, PI2_FROM_HIDDEN, PI2_ADD_TO_X, down_q8, m->down[i]);
    if (unit) add_hop(p, PI2_JOIN, i, norm, unit);
  }
  pi2_op *head = add(p, PI2_HEAD, -1);
  head->norm = norm, head->n_matrices = 1, head->matrix[0] = m->head;
}
static void prepare(pi2_program *p) {
  pi2_program_measure(p);
  const int64_t measured = p->arena.used, tails = p->tail_bytes;
  if (pi2_program_prepare(p)) die("out of memory");
  if (p->arena.used != measured || p->tail_bytes != tails) die("what is taken is not what was measured");
  for (int i = 0; i < SLOTS; i++) {
    p->slots[i] = (pi2_slot){.temperature = i ? 0.9f : 0,
                             .top_p = i == 2 ? 0.9f : 1,
                             .repetition = i ? 1.1f : 1,
                             .seed = 7u * (unsigned)i,
                             .logprobs = 2,
                             .counts = i ? p->counts + i * VOCAB : NULL};
  }
}

/* A step of the script. Every slot's sequence starts anew where it would leave the context. */
typedef struct {
  int slot, start, count, ahead, masked;
} piece; /* ahead: continue with the token sampled last */
typedef struct {
  int n;
  piece pieces[SLOTS];
  int32_t tokens[MAX_ROWS], targets[MAX_ROWS];
  uint32_t masks[SLOTS][(VOCAB + 31) / 32];
} step;

static step next_step(int at[SLOTS]) {
  step s = {.n = 0};
  int left = MAX_ROWS;
  for (int slot = 0; slot < SLOTS; slot++) {
    if (below(5) == 0 && (slot < SLOTS - 1 || s.n)) continue;
    int count = below(3) ? 1 : 1 + below(left - (SLOTS - 1 - slot));
    if (below(12) == 0) count = left - (SLOTS - 1 - slot);
    if (at[slot] + count > CONTEXT) at[slot] = 0;
    for (int i = 0; i < (VOCAB + 31) / 32; i++) s.masks[s.n][i] = 1u << below(32) | (uint32_t)below(1 << 16);
    s.pieces[s.n++] = (piece){slot, at[slot], count, count == 1 && at[slot] > 0 && below(2), below(2)};
    at[slot] += count;
    left -= count;
  }
  for (int i = 0; i < MAX_ROWS; i++) {
    s.tokens[i] = below(VOCAB);
    s.targets[i] = below(3) ? -1 : below(VOCAB);
  }
  return s;
}

typedef struct {
  pi2_pick pick[SLOTS], top[SLOTS][2];
  float scores[MAX_ROWS], logits[MAX_ROWS * VOCAB];
} result;

/* A `trial` samples nothing and returns nothing: it may be stopped, or repeated, without a trace. */
static pi2_run *post(pi2_program *p, const step *s, int trial, result *r) {
  static int32_t pages[SLOTS][PAGES];
  pi2_run *run = pi2_run_new(p);
  if (!run) die("no run is free");
  int row = 0;
  for (int i = 0; i < s->n; i++) {
    const piece *q = &s->pieces[i];
    for (int j = 0; j < PAGES; j++) pages[q->slot][j] = (j * SLOTS + q->slot) % (PAGES * SLOTS);
    int32_t *table = run->pages + i * (CONTEXT / PI2_PAGE + 1);
    memcpy(table, pages[q->slot], sizeof pages[0]);
    pi2_slice *slice = &run->slices[i];
    *slice = (pi2_slice){.slot = q->slot, .start = q->start, .count = q->count, .row = row, .pages = table};
    memcpy(run->token + row, s->tokens + row, (size_t)q->count * sizeof *run->token);
    if (!trial) {
      slice->sample = 1;
      slice->masked = q->masked;
      slice->mask = run->masks + i * p->mask_words;
      run->n_masked += q->masked;
      slice->top = r->top[i];
      if (q->ahead) run->token[row] = -1;
      memcpy(run->targets + row, s->targets + row, (size_t)q->count * sizeof *run->targets);
      slice->targets = run->targets + row;
      slice->scores = r->scores + row;
      if (i == 0) slice->want_logits = 1, slice->logits = r->logits;
    }
    row += q->count;
  }
  run->n_rows = row;
  run->n_slices = s->n;
  run->trace = row & 1;
  if (pi2_run_post(run)) die("cannot post");
  return run;
}
static void give_masks(pi2_run *run, const step *s) {
  for (int i = 0; i < s->n; i++) pi2_mask_give(run, &run->slices[i], s->masks[i]);
}
static void wait_for(pi2_gang *gang, pi2_run *run) {
  while (!run->done) {
    struct pollfd f = {.fd = gang->event_fd, .events = POLLIN};
    uint64_t n;
    if (poll(&f, 1, 60000) == 0) die("a run never ends");
    if (read(gang->event_fd, &n, sizeof n) < 0 && errno != EAGAIN) die("event");
  }
}

/* Runs in flight, oldest first; trials have no result. */
typedef struct {
  int n, stopped;
  struct {
    pi2_run *run;
    const step *step;
    result *result;
    int given; /* its masks were */
  } run[PI2_QUEUE];
} flight;
static void land(pi2_gang *gang, flight *f) {
  if (!f->run[0].given) give_masks(f->run[0].run, f->run[0].step);
  wait_for(gang, f->run[0].run);
  const pi2_run *run = f->run[0].run;
  if (!f->run[0].result)
    f->stopped += run->stopped;
  else if (run->stopped)
    die("a step that nobody stopped is stopped");
  else
    for (int i = 0; i < f->run[0].step->n; i++) f->run[0].result->pick[i] = run->slices[i].pick;
  memmove(f->run, f->run + 1, (PI2_QUEUE - 1) * sizeof f->run[0]);
  f->n--;
}
static pi2_run *fly(pi2_program *p, flight *f, const step *s, result *r) {
  while (f->n == PI2_QUEUE) land(p->gang, f);
  pi2_run *run = post(p, s, !r, r);
  f->run[f->n].run = run;
  f->run[f->n].step = s;
  f->run[f->n].given = !r || below(2);
  f->run[f->n++].result = r;
  if (!r) return run;
  for (int i = 0; i < f->n; i++) /* some come while the gang waits, and some before it has begun */
    if (i == f->n - 1 ? f->run[i].given : !f->run[i].given && below(3) == 0) {
      if (below(2)) spin(below(20000));
      give_masks(f->run[i].run, f->run[i].step);
      f->run[i].given = 1;
    }
  return run;
}

#define PIECE_BLOCKS 2 /* row blocks of a piece: activations of 32 rows belong together */
#define MOST_PIECES 1024
/* The layers' matrices in a file, to be streamed. */
typedef struct {
  char path[32];
  pi2_extent units[MOST_PIECES];
  int n;
  uint8_t *ring, *rows, *loan;
} stored;

static int pieces_of(const pi2_matrix *w) { return (int)(((w->rows + 15) / 16 + PIECE_BLOCKS - 1) / PIECE_BLOCKS); }
/* Writes the matrices that the operations use, in their order, and makes units of their pieces, those of up and gate by
 * turns; and the embedding before them, of which rows are read. */
static pi2_stream *stream_all(pi2_program *p, stored *f) {
  int64_t at = 0, largest = 0;
  strcpy(f->path, "stress.XXXXXX");
  const int fd = mkstemp(f->path);
  if (fd < 0) die("no file");
  pi2_embed *embed = p->ops[0].data;
  pi2_matrix *e = &embed->matrix;
  const int64_t rows = (e->rows + 15) / 16 * pi2_row_block_bytes(e->type, e->k);
  if (pwrite(fd, e->data, (size_t)rows, 0) != rows) die("cannot write");
  at = pi2_align(rows, PI2_SECTOR);
  for (int i = 0; i < p->n_ops; i++) {
    pi2_op *op = &p->ops[i];
    if (op->kind != PI2_LINEAR && op->kind != PI2_FFN) continue;
    for (int j = 0; j < op->n_matrices; j++) {
      pi2_matrix *w = &op->matrix[j];
      const int64_t bytes = (w->rows + 15) / 16 * pi2_row_block_bytes(w->type, w->k),
                    whole = pi2_align(bytes, PI2_SECTOR);
      uint8_t *padded = calloc(1, (size_t)whole);
      memcpy(padded, w->data, (size_t)bytes);
      if (pwrite(fd, padded, (size_t)whole, at) != whole) die("cannot write");
      free(padded);
      const int turns = op->kind == PI2_FFN, n = pieces_of(w);
      w->data = NULL;
      w->region = -1;
      w->page_blocks = PIECE_BLOCKS;
      w->stride = turns ? op->n_matrices : 1;
      w->unit = turns ? f->n + j : f->n;
      op->streamed++;
      if (f->n + n * op->n_matrices > MOST_PIECES) die("more pieces than there is room for");
      for (int i = 0; i < n; i++) {
        const int64_t size = PIECE_BLOCKS * pi2_row_block_bytes(w->type, w->k), first = at + i * size;
        const int64_t last = i + 1 < n ? first + size : at + bytes, offset = first / PI2_SECTOR * PI2_SECTOR;
        f->units[w->unit + i * w->stride] =
            (pi2_extent){offset, pi2_align(last - offset, PI2_SECTOR), first - offset, -1};
        largest = last - offset > largest ? pi2_align(last - offset, PI2_SECTOR) : largest;
      }
      if (!turns || j + 1 == op->n_matrices) f->n += n * w->stride;
      at += whole;
    }
  }
  if (fsync(fd) || close(fd)) die("cannot write");
  if (posix_memalign((void **)&f->ring, PI2_SECTOR, (size_t)(3 * largest))) die("out of memory");
  int error = 0;
  pi2_flash *flash = pi2_flash_open(f->path, PI2_IO_AUTO, 4, &error);
  if (!flash) die("no flash");
  pi2_stream *s = pi2_stream_create(flash, f->units, f->n, PI2_SECTOR, 4, f->ring, 3 * largest, -1, &error);
  if (!s) die("no stream");
  flash = pi2_flash_open(f->path, PI2_IO_PREADV, PI2_ROWS_DEPTH, &error);
  const int64_t bytes = PI2_ROWS_DEPTH * pi2_rows_buffer(e->type, e->k);
  if (!flash || posix_memalign((void **)&f->rows, PI2_SECTOR, (size_t)bytes)) die("no flash");
  embed->rows = pi2_rows_create(flash, e->type, e->k, 0, f->rows, -1);
  if (!embed->rows) die("no rows");
  e->data = NULL;
  return s;
}

/* Every third piece has a home in what long steps and unused pages of the KV cache leave free. */
static void lend_some(pi2_program *p, stored *f, const uint8_t *cache, int64_t page_bytes) {
  int64_t used = 0;
  for (int i = 0; i < f->n; i += 3) f->units[i].home = used, used += f->units[i].bytes;
  if (posix_memalign((void **)&f->loan, PI2_SECTOR, (size_t)used)) die("out of memory");
  pi2_stream_loan(p->stream, f->loan);
  p->kv = (uintptr_t)cache, p->kv_bytes = page_bytes * PAGES * SLOTS, p->kv_page_bytes = page_bytes,
  p->loan_bytes = used;
}

/* The neurons of all blocks in a file, and a cache of them. */
typedef struct {
  char path[32];
  pi2_region region[LAYERS];
  pi2_bundles bundles[LAYERS];
  uint8_t *up_scales[LAYERS], *down_scales[LAYERS], *memory;
  int least, pages;
  uint16_t order[RELU_HIDDEN];
} neurons;

/* The last neuron of each cluster first: bundles that lie in their neurons' order into another. */
static void reorder(uint8_t *all, int pages, const pi2_bundle_layout *l, uint16_t *order) {
  uint8_t *own = allocate((int64_t)pages * l->page_bytes);
  memcpy(own, all, (size_t)(pages * l->page_bytes));
  for (int64_t p = 0; p < RELU_HIDDEN; p++) {
    const int64_t first = p / PI2_CLUSTER * PI2_CLUSTER,
                  end = first + PI2_CLUSTER < RELU_HIDDEN ? first + PI2_CLUSTER : RELU_HIDDEN;
    order[p] = (uint16_t)(end - 1 - p);
    const int64_t from = first + order[p], n = l->neurons_per_page;
    memcpy(all + p / n * l->page_bytes + p % n * l->neuron_bytes,
           own + from / n * l->page_bytes + from % n * l->neuron_bytes, (size_t)l->neuron_bytes);
  }
  free(own);
}

static void sparse_all(pi2_program *p, const model *m, neurons *f) {
  const int64_t up = pi2_up_quants(PI2_Q4_0, DIM), bytes = up + pi2_down_quants(PI2_Q4_0, DIM);
  const pi2_bundle_layout layout = {PI2_SECTOR / bytes, PI2_SECTOR, bytes, up};
  const int pages = (int)((RELU_HIDDEN + layout.neurons_per_page - 1) / layout.neurons_per_page);
  *f = (neurons){
      .path = "stress.XXXXXX", .pages = LAYERS * pages, .least = (int)(PI2_CLUSTER / layout.neurons_per_page + 2)};
  const int fd = mkstemp(f->path);
  if (fd < 0) die("no file");
  for (int i = 0; i < LAYERS; i++) {
    uint8_t *all = calloc((size_t)pages, PI2_SECTOR);
    f->up_scales[i] = allocate(RELU_HIDDEN * pi2_up_scales(PI2_Q4_0, DIM));
    f->down_scales[i] = allocate(RELU_HIDDEN / 32 * pi2_down_scales(PI2_Q4_0, DIM));
    if (pi2_bundle_up(PI2_Q4_0, m->up_file[i], RELU_HIDDEN, DIM, &layout, all, f->up_scales[i]) ||
        pi2_bundle_down(PI2_Q4_0, m->down_file[i], DIM, RELU_HIDDEN, 0, RELU_HIDDEN, &layout, all, f->down_scales[i]))
      die("weights are not finite");
    if (i % 2) reorder(all, pages, &layout, f->order);
    f->region[i] = (pi2_region){(int64_t)i * pages * PI2_SECTOR, PI2_SECTOR, PI2_SECTOR, 0, i * pages, pages};
    if (pwrite(fd, all, (size_t)pages * PI2_SECTOR, f->region[i].offset) != pages * PI2_SECTOR) die("cannot write");
    free(all);
    f->bundles[i] = (pi2_bundles){.region = i,
                                  .up_type = PI2_Q4_0,
                                  .down_type = PI2_Q4_0,
                                  .neurons = RELU_HIDDEN,
                                  .per_page = layout.neurons_per_page,
                                  .gate_type = -1,
                                  .neuron_bytes = bytes,
                                  .up_bytes = up,
                                  .up_scales = f->up_scales[i],
                                  .down_scales = f->down_scales[i],
                                  .up_stride = pi2_up_scales(PI2_Q4_0, DIM),
                                  .down_stride = pi2_down_scales(PI2_Q4_0, DIM),
                                  .order = i % 2 ? f->order : NULL};
  }
  if (fsync(fd) || close(fd)) die("cannot write");
  for (int i = 0; i < p->n_ops; i++)
    if (p->ops[i].kind == PI2_SPARSE) ((pi2_neuron_block *)p->ops[i].data)->bundles = &f->bundles[p->ops[i].layer];
  if (posix_memalign((void **)&f->memory, PI2_SECTOR, (size_t)f->pages * PI2_SECTOR)) die("out of memory");
  int error = 0;
  pi2_flash *flash = pi2_flash_open(f->path, PI2_IO_AUTO, 8, &error);
  if (!flash) die("no flash");
  p->neurons = pi2_neuron_cache_create(flash, f->region, LAYERS, f->pages, PI2_SECTOR, f->memory, f->least, f->pages, 8,
                                       -1, &error);
  if (!p->neurons || pi2_neuron_cache_trace(p->neurons, RECORDS)) die("no cache");
#ifndef __SANITIZE_THREAD__ /* reads write to the same place, which nobody reads: no race that matters, but one that \
                               it tells of */
  if (pi2_neuron_cache_read_through(p->neurons, 2 * PI2_SECTOR)) die("out of memory");
#endif
  p->traced = 1;
  p->pipeline = PI2_PIPELINE_CLUSTER;
}
/* Fills slots that were never used, if there are any. */
static void fetch_some(pi2_neuron_cache *c) {
  int32_t pages[16];
  float uses[4096];
  if (c->n_pages > 4096) die("too many pages");
  pi2_neuron_cache_absent(c, uses);
  int n = 0;
  for (int32_t i = below(c->n_pages); n < 16 && i < c->n_pages; i++)
    if (uses[i] >= 0 || below(4) == 0) pages[n++] = i;
  pi2_neuron_cache_fetch(c, pages, n);
  pi2_neuron_cache_waiting(c);
}
static void take_records(pi2_neuron_cache *c) {
  pi2_read_record records[RECORDS];
  int64_t horizon = 0;
  const int64_t n = pi2_neuron_cache_take_records(c, records, &horizon), now = pi2_now_ns();
  if (n < 0 || n > RECORDS || horizon > now) die("more records than there is room for");
  for (int64_t i = 0; i < n; i++)
    if (records[i].begin_ns > records[i].end_ns || records[i].end_ns > now || !records[i].pages ||
        records[i].foreseen > records[i].pages || records[i].region >= LAYERS)
      die("a record of no read");
}
static int ask_all(pi2_neuron_cache *c, int region, int n, int32_t *pages) {
  _Atomic int32_t pending = 1;
  for (int i = 0; i < n; i++) pages[i] = i;
  const int asked = pi2_neuron_cache_ask(c, region, pages, n, &pending);
  while (atomic_load(&pending) > 1) spin(1000);
  return asked;
}
/* Fewer slots and more again, while pages are pinned in those that were to go: nobody is given these meanwhile. */
static void resize_while_pinned(pi2_neuron_cache *c, const neurons *f) {
  enum { PINNED = 16 };
  int32_t first[PINNED], second[RELU_HIDDEN];
  uint8_t kept[PINNED][64];
  const int n = f->region[1].pages;
  if (pi2_neuron_cache_resize(c, f->pages) || ask_all(c, 0, PINNED, first) != PINNED) die("no room in all slots");
  for (int i = 0; i < PINNED; i++) memcpy(kept[i], pi2_neuron_cache_at(c, 0, i), sizeof kept[i]);
  if (pi2_neuron_cache_resize(c, 2) < PINNED - 2) die("pinned slots have gone");
  if (pi2_neuron_cache_resize(c, f->pages)) die("slots are in use behind the last one");
  if (ask_all(c, 1, n, second) != n) die("no room in all slots again");
  for (int i = 0; i < PINNED; i++)
    if (memcmp(kept[i], pi2_neuron_cache_at(c, 0, i), sizeof kept[i])) die("a pinned page was overwritten");
  pi2_neuron_cache_release(c, 0, first, PINNED);
  pi2_neuron_cache_release(c, 1, second, n);
}
static void free_neurons(neurons *f) {
  unlink(f->path);
  for (int i = 0; i < LAYERS; i++) free(f->up_scales[i]), free(f->down_scales[i]);
  free(f->memory);
}

/* A unit that reads its input and adds nothing, sometimes late. */
static void *unit_main(void *argument) {
  pi2_cluster_unit *u = argument;
  unsigned late = 1;
  while (pi2_unit_take(u)) {
    const int64_t begin = pi2_now_ns();
    late = late * 1103515245u + 12345u;
    spin(late >> 16 & 1 ? 0 : (int)(late >> 16 & 0x7ff));
    for (int64_t i = 0; i < (int64_t)u->rows * DIM; i++) {
      if (u->out[i] != 0) die("a unit's output does not begin as zero");
      u->out[i] = u->x[i] > 1e30f ? 1 : 0;
    }
    pi2_unit_answer(u, 0, pi2_now_ns() - begin);
  }
  return NULL;
}
static pi2_cluster_unit *start_unit(pthread_t *thread) {
  pi2_cluster_unit *u = allocate(sizeof *u);
  memset(u, 0, sizeof *u);
  u->x = allocate(MAX_ROWS * DIM * 4), u->out = allocate(MAX_ROWS * DIM * 4);
  u->deadline_ns = -1;
  if (pthread_create(thread, NULL, unit_main, u)) die("no thread");
  return u;
}
static void end_unit(pi2_cluster_unit *u, pthread_t thread) {
  pi2_unit_close(u);
  pthread_join(thread, NULL);
  if (!u->items) die("a unit was given nothing");
  free(u->x), free(u->out), free(u);
}

/* Where assist.c has a thread suspended: mostly not at all, or for a part of an operation, or for several steps. */
static _Atomic int suspensions;
void suspend(void) {
  static _Thread_local uint32_t n = 1;
  n = n * 1103515245u + 12345u;
  const uint32_t chance = n >> 16 & 63;
  if (chance > 8) return;
  atomic_fetch_add(&suspensions, 1);
  if (chance)
    spin((int)(n >> 8 & 0xfff));
  else
    usleep(3000);
}

enum { RESIDENT, STREAMED, SPARSE, HELPED, ASSISTED };
/* Plays the script; `wild`: as many steps ahead as there may be, with trials between. Returns the trials stopped. */
static int play(const model *m, int threads, const step *script, int steps, result *results, int wild, int way) {
  static const int cores[8] = {-1, -1, -1, -1, -1, -1, -1, -1};
  uint8_t *cache = allocate(m->page_bytes * PAGES * SLOTS);
  memset(cache, 0, (size_t)(m->page_bytes * PAGES * SLOTS));
  pi2_gang *gang = pi2_gang_create(threads, cores, 20000);
  if (!gang) die("no gang");
  pi2_program p;
  pthread_t thread;
  pi2_cluster_unit *unit = way == HELPED ? start_unit(&thread) : NULL;
  build(&p, m, gang, cache, way == SPARSE, unit);
  stored file = {.n = 0};
  neurons sparse;
  if (way == STREAMED) p.stream = stream_all(&p, &file);
  if (way == SPARSE) sparse_all(&p, m, &sparse);
  p.assisting = threads / 2;
  prepare(&p);
  const int assist = way == ASSISTED || way == RESIDENT; /* in all others, operations count on every thread */
  if (p.members != threads - (assist ? p.assisting : 0)) die("others assist than can");
  if (way == STREAMED) lend_some(&p, &file, cache, m->page_bytes);
  flight f = {.n = 0};
  for (int i = 0; i < steps; i++) {
    if (wild && below(2)) {
      pi2_run *run = fly(&p, &f, &script[i], NULL);
      if (below(3)) {
        spin(below(2) ? below(200) : below(20000));
        pi2_run_stop(run);
      }
    }
    while (f.n && below(4) == 0) land(gang, &f);
    if (way == SPARSE && below(3) == 0) /* what cannot go yet goes later */
      pi2_neuron_cache_resize(p.neurons, sparse.least + below(sparse.pages - sparse.least));
    if (way == SPARSE && below(3) == 0) fetch_some(p.neurons);
    if (way == SPARSE && below(3) == 0) take_records(p.neurons);
    fly(&p, &f, &script[i], &results[i]);
  }
  while (f.n) land(gang, &f);
  if (way == ASSISTED) { /* another program, while assistants may be asleep in this one */
    pi2_gang_assist(gang, threads, NULL, NULL);
    pi2_program_free(&p);
    build(&p, m, gang, cache, 0, NULL);
    prepare(&p);
    fly(&p, &f, &script[steps - 1], NULL);
    fly(&p, &f, &script[steps - 1], NULL);
    while (f.n) land(gang, &f);
  }
  pi2_gang_destroy(gang);
  if (unit) end_unit(unit, thread);
  if (way == SPARSE) {
    resize_while_pinned(p.neurons, &sparse);
    pi2_neuron_cache_destroy(p.neurons);
    free_neurons(&sparse);
  }
  if (way == STREAMED) {
    pi2_stream_destroy(p.stream);
    pi2_rows_destroy(((pi2_embed *)p.ops[0].data)->rows);
    unlink(file.path);
    free(file.ring), free(file.rows), free(file.loan);
  }
  pi2_program_free(&p);
  free(cache);
  return f.stopped;
}

/* Gangs that end at once, with as many jobs before them as there may be: each is finished first. */
static _Atomic int ran;
static int tiny_job(void *context, pi2_worker *w) {
  pi2_job_begin(w, context);
  pi2_barrier(w);
  atomic_fetch_add(&ran, 1);
  pi2_barrier(w);
  return 0;
}
static void end_gangs(int times) {
  static const int cores[3] = {-1, -1, -1};
  static _Atomic int stop;
  for (int i = 0; i < times; i++) {
    atomic_store(&ran, 0);
    const int jobs = i % (PI2_QUEUE + 1);
    pi2_gang *gang = pi2_gang_create(3, cores, i % 2 ? 20000 : 0);
    if (!gang) die("no gang");
    for (int j = 0; j < jobs; j++)
      if (pi2_gang_post(gang, tiny_job, &stop)) die("cannot post");
    spin(below(3000));
    pi2_gang_destroy(gang);
    if (atomic_load(&ran) != 3 * jobs) die("a gang ended before its jobs");
  }
}

static int same(const step *s, const result *a, const result *b) {
  for (int i = 0; i < s->n; i++) {
    if (a->pick[i].token != b->pick[i].token || a->pick[i].token < 0) return 0;
    if (memcmp(&a->pick[i].logprob, &b->pick[i].logprob, 4) || memcmp(a->top[i], b->top[i], sizeof a->top[i])) return 0;
  }
  return !memcmp(a->scores, b->scores, sizeof a->scores) && !memcmp(a->logits, b->logits, sizeof a->logits);
}

int main(int argc, char **argv) {
  const int steps = argc > 1 ? atoi(argv[1]) : 0;
  if (steps < 1 || steps > 100000) die("usage: stress STEPS");
  alarm(600); /* a deadlock must not hang whoever runs this */
  model models[] = {random_model(0), random_model(1)};
  step *script = allocate(steps * (int64_t)sizeof *script);
  int at[SLOTS] = {0, 500, 30}; /* as if the zeros of the cache had been stored: soon beyond one split */
  for (int i = 0; i < steps; i++) script[i] = next_step(at);
  result *alone = calloc((size_t)steps, sizeof *alone), *together = calloc((size_t)steps, sizeof *together);
  static const char *const names[] = {"", ", streamed,", ", sparse,", ", with a cluster unit,", ", assisted,"};
  int stopped = 0, bad = 0;
  for (int way = RESIDENT; way <= ASSISTED; way++) {
    const model *m = &models[way == SPARSE];
    if (way != STREAMED) play(m, 1, script, steps, alone, 0, RESIDENT);
    stopped += play(m, way == ASSISTED ? 4 : 3, script, steps, together, 1, way);
    for (int i = 0; i < steps; i++)
      if (!same(&script[i], &alone[i], &together[i]) && bad++ < 5)
        printf("step %d%s differs from that of one thread\n", i, names[way]);
  }
  end_gangs(200);
  if (!suspensions) die("no thread that assists has had a part");
  printf("%d steps, %d differ; %d trials stopped; 200 gangs ended; %d suspensions\n", steps, bad, stopped, suspensions);
  free(alone);
  free(together);
  free(script);
  free_model(&models[0]), free_model(&models[1]);
  return bad != 0;
}
