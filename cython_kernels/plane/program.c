#include "program.h"

#include <errno.h>
#include <stdlib.h>
#include <string.h>

#include "elementary.h"

void *pi2_allocate(pi2_program *p, int64_t count, size_t size) {
  int64_t bytes = pi2_align(count * (int64_t)size + 64, 64);
  p->activation_bytes += bytes;
  return aligned_alloc(64, (size_t)bytes); /* touched on use: the first large batch pays, not the start */
}
/* The rows of a buffer that short steps have no use for. */
static void note_tail(pi2_program *p, uint8_t *base, int64_t rows, int64_t bytes) {
  if (!base || rows <= PI2_FEW_ROWS || p->n_tails == PI2_TAILS) return;
  const pi2_pages tail = pi2_pages_within(base + PI2_FEW_ROWS * bytes, (rows - PI2_FEW_ROWS) * bytes);
  if (!tail.bytes) return;
  p->tail_of[p->n_tails++] = tail;
  p->tail_bytes += tail.bytes;
}
static void *allocate_rows(pi2_program *p, int64_t rows, int64_t bytes) {
  void *base = pi2_allocate(p, rows, (size_t)bytes);
  note_tail(p, base, rows, bytes);
  return base;
}
static int64_t stride(int64_t bytes) {
  return pi2_align(bytes, 64) + 64; /* off the 4096 bytes that would map a tile's rows to one cache set */
}
static int allocate_q8(pi2_program *p, pi2_q8 *q, int64_t rows, int64_t k, int mixed) {
  q->ldq = stride(k << p->wide);
  q->ldb = k / PI2_BLOCK;
  q->q = allocate_rows(p, rows, q->ldq);
  if (mixed) {
    q->ldh = stride(k);
    if (!(q->high = pi2_allocate(p, 2 * rows * q->ldh, 1))) return 0;
    q->low = q->high + rows * q->ldh;
    note_tail(p, (uint8_t *)q->high, rows, q->ldh);
    note_tail(p, (uint8_t *)q->low, rows, q->ldh);
  }
  q->d = pi2_allocate(p, rows * q->ldb, 4);
  q->s = pi2_allocate(p, rows * q->ldb, 4);
  q->h = pi2_allocate(p, rows * q->ldb * 2, 2);
  return q->q && q->d && q->s && q->h;
}
static void free_q8(pi2_q8 *q) {
  free(q->q);
  free(q->high);
  free(q->d);
  free(q->s);
  free(q->h);
}

static int64_t cursors(const pi2_program *p) { return p->n_ops + p->max_rows / PI2_HEAD_ROWS + 1; }

static int prepare_run(pi2_program *p, pi2_run *r) {
  const int64_t pages = p->context / PI2_PAGE + 1;
  r->program = p;
  r->done = 1;
  r->token = pi2_allocate(p, p->max_rows, 4);
  r->position = pi2_allocate(p, p->max_rows, 4);
  r->slice_of = pi2_allocate(p, p->max_rows, 4);
  r->head_row = pi2_allocate(p, p->max_rows, 4);
  r->prefill_row = pi2_allocate(p, p->max_rows, 4);
  r->slices = pi2_allocate(p, p->max_slots, sizeof(pi2_slice));
  r->pages = pi2_allocate(p, p->max_slots * pages, 4);
  r->targets = pi2_allocate(p, p->max_rows, 4);
  r->scores = pi2_allocate(p, p->max_rows, 4);
  r->cursors = pi2_allocate(p, 4 * cursors(p), 4);
  r->shares = pi2_allocate(p, p->threads * p->share_stride, 8);
  r->splits_left = pi2_allocate(p, p->max_slots * p->max_kv_heads, 4);
  r->busy = pi2_allocate(p, p->threads, 8);
  r->op_begin = pi2_allocate(p, (int64_t)p->threads * p->n_ops, 8);
  r->op_end = pi2_allocate(p, (int64_t)p->threads * p->n_ops, 8);
  if (p->traced && p->neurons) {
    r->waits = pi2_allocate(p, (int64_t)p->threads * PI2_WAITS, sizeof *r->waits);
    r->n_waits = pi2_allocate(p, p->threads, sizeof *r->n_waits);
    if (!r->waits || !r->n_waits) return 0;
  }
  return r->token && r->position && r->slice_of && r->head_row && r->prefill_row && r->slices && r->pages &&
         r->targets && r->scores && r->cursors && r->shares && r->splits_left && r->busy && r->op_begin && r->op_end;
}
static void free_run(pi2_run *r) {
  free(r->token);
  free(r->position);
  free(r->slice_of);
  free(r->head_row);
  free(r->prefill_row);
  free(r->slices);
  free(r->copies.copy);
  free(r->pages);
  free(r->targets);
  free(r->scores);
  free(r->cursors);
  free(r->shares);
  free(r->splits_left);
  free(r->busy);
  free(r->op_begin);
  free(r->op_end);
  free(r->units);
  free(r->waits);
  free(r->n_waits);
}

/* Buffers of one sparse block, for the largest there is. */
static pi2_sparse *new_sparse(pi2_program *p, int64_t rows, float *values) {
  pi2_sparse *s = aligned_alloc(64, (sizeof *s + 63) / 64 * 64);
  if (!s) return NULL;
  memset(s, 0, sizeof *s);
  s->n_clusters = (int32_t)((p->hidden + PI2_CLUSTER - 1) / PI2_CLUSTER);
  s->stride = pi2_align(p->dim, 128);
  s->n_ranges = (int32_t)(s->stride / 128 < 2 * p->threads ? s->stride / 128 : 2 * p->threads);
  if (s->n_ranges > PI2_RANGES) s->n_ranges = PI2_RANGES;
  s->clusters = pi2_allocate(p, s->n_clusters, sizeof *s->clusters);
  s->active = allocate_rows(p, rows, p->hidden * (int64_t)sizeof *s->active);
  s->n_active = pi2_allocate(p, rows * s->n_clusters, sizeof *s->n_active);
  s->pages = pi2_allocate(p, p->hidden, sizeof *s->pages);
  s->places = pi2_allocate(p, p->hidden, sizeof *s->places);
  s->values = values ? values : pi2_allocate(p, rows * p->hidden, sizeof *s->values);
  s->sums = allocate_rows(p, rows, s->stride * (int64_t)sizeof *s->sums);
  if (s->clusters && s->active && s->n_active && s->pages && s->places && s->values && s->sums) {
    for (int c = 0; c < s->n_clusters; c++) s->clusters[c] = (pi2_cluster){.pages = s->pages + c * PI2_CLUSTER};
    pi2_sparse_reset(s);
  }
  return s;
}
static void free_sparse(const pi2_program *p, pi2_sparse *s) {
  if (!s) return;
  if (s->values != p->hidden_floats) free(s->values);
  free(s->clusters);
  free(s->active);
  free(s->n_active);
  free(s->pages);
  free((void *)s->places);
  free(s->sums);
  free(s);
}
static int prepare_sparse(pi2_program *p) {
  for (int i = 0; i < 2; i++) {
    const pi2_sparse *s = p->sparse[i] =
        i ? new_sparse(p, PI2_REPLICATED, NULL) : new_sparse(p, p->max_rows, p->hidden_floats);
    if (!s || !s->clusters || !s->active || !s->n_active || !s->pages || !s->places || !s->values || !s->sums) return 0;
  }
  for (int i = p->n_ops - 1, next = 0, route = 0; i > 0; i--) {
    if (p->ops[i].kind == PI2_ROUTE) next = 0, route = i;
    if (p->ops[i].kind == PI2_SPARSE) p->ops[i].next_sparse = next, p->ops[i].next_route = route, next = i;
  }
  for (int t = 0; t < p->threads; t++) {
    pi2_scratch *scratch = &p->scratch[t];
    scratch->ahead_floats = pi2_allocate(p, 2 * PI2_REPLICATED * p->dim, sizeof *scratch->ahead_floats);
    if (!scratch->ahead_floats || !allocate_q8(p, &scratch->ahead, PI2_REPLICATED, p->dim, p->mixed)) return 0;
    scratch->arranged = pi2_allocate(p, pi2_align(p->dim, 512), sizeof *scratch->arranged);
    scratch->arranged_d = pi2_allocate(p, pi2_align(p->dim, 512) / PI2_BLOCK, sizeof *scratch->arranged_d);
    scratch->arranged_s = pi2_allocate(p, pi2_align(p->dim, 512) / PI2_BLOCK, sizeof *scratch->arranged_s);
    if (!scratch->arranged || !scratch->arranged_d || !scratch->arranged_s) return 0;
  }
  return 1;
}

static int prepare_routing(pi2_program *p, int64_t experts, int64_t used) {
  pi2_routing *g = &p->routing;
  g->n_experts = (int)experts;
  g->count = pi2_allocate(p, experts, sizeof *g->count);
  g->row = pi2_allocate(p, experts * p->max_rows, sizeof *g->row);
  g->weight = pi2_allocate(p, experts * p->max_rows, sizeof *g->weight);
  g->chosen = pi2_allocate(p, p->max_rows * used, sizeof *g->chosen);
  g->share = pi2_allocate(p, p->max_rows * used, sizeof *g->share);
  return g->count && g->row && g->weight && g->chosen && g->share;
}
/* Where the pages of an operation's matrices lie, while it runs. */
static int prepare_pages(pi2_program *p) {
  if (!p->clusters) return 1;
  for (int i = 0; i < p->clusters->n_regions; i++)
    p->max_pages = p->clusters->regions[i].pages > p->max_pages ? p->clusters->regions[i].pages : p->max_pages;
  p->page_table = pi2_allocate(p, PI2_MATRICES * p->max_pages, sizeof *p->page_table);
  p->page_numbers = pi2_allocate(p, p->max_pages, sizeof *p->page_numbers);
  if (!p->page_table || !p->page_numbers) return 0;
  for (int64_t i = 0; i < p->max_pages; i++) p->page_numbers[i] = (int32_t)i;
  for (int i = 0; i < p->n_ops; i++)
    for (int j = 0; j < p->ops[i].n_matrices; j++) p->ops[i].matrix[j].page = p->page_table + j * p->max_pages;
  return 1;
}

/* What becomes of a row behind the last attention matters only if it needs logits. */
static void find_tail(pi2_program *p) {
  int at = p->n_ops - 1;
  while (at >= 0 && p->ops[at].kind != PI2_ATTENTION) at--;
  p->tail = at;
  if (at < 0) return;
  for (int i = at + 1; i < p->n_ops; i++) {
    const pi2_op *op = &p->ops[i];
    if (op->kind == PI2_HEAD) continue;
    if ((op->kind != PI2_LINEAR && op->kind != PI2_FFN && op->kind != PI2_ADD) || op->expert >= 0 || op->streamed ||
        op->paged) {
      p->tail = -1;
      return;
    }
  }
  pi2_op *ffn = &p->ops[at + 2], *down = ffn + 1;
  if (at + 5 == p->n_ops && ffn->kind == PI2_FFN && down->kind == PI2_LINEAR && down->sink == PI2_ADD_TO_X &&
      down->source == PI2_FROM_HIDDEN)
    ffn->head_only = down->head_only = 1;
}

int pi2_program_prepare(pi2_program *p) {
  const int64_t rows = p->max_rows;
  int64_t experts = 0, used = 0;
  int ok = 1;
  for (int i = 0; i < p->n_ops; i++) {
    const pi2_op *op = &p->ops[i];
    p->ops[i].tile_blocks = PI2_TILE_BLOCKS;
    if (op->sink == PI2_MIX_INTO_Y) p->y_columns = p->dim > p->y_columns ? p->dim : p->y_columns;
    if (op->kind == PI2_ROUTE) {
      experts = op->n_experts + op->shared > experts ? op->n_experts + op->shared : experts;
      used = op->n_used + op->shared > used ? op->n_used + op->shared : used;
    }
    for (int j = 0; j < op->n_matrices; j++) {
      const int64_t k = op->matrix[j].k;
      p->max_k = k > p->max_k ? k : p->max_k;
      if ((op->source != PI2_FROM_HIDDEN || op->norm.weight) && k > p->prepared_k) p->prepared_k = k;
    }
    if (op->kind == PI2_LINEAR) {
      int64_t columns = 0;
      for (int j = 0; j < op->n_matrices; j++) columns += op->matrix[j].rows;
      int64_t *most = op->sink == PI2_TO_REDUCED ? &p->reduced_columns : &p->y_columns;
      *most = columns > *most ? columns : *most;
    } else if (op->kind == PI2_FFN || op->kind == PI2_SPARSE) {
      if (op->kind == PI2_SPARSE && op->sink == PI2_TO_Y) p->y_columns = p->dim > p->y_columns ? p->dim : p->y_columns;
      const int64_t hidden = op->kind == PI2_SPARSE ? op->bundles->neurons : op->matrix[0].rows;
      p->hidden = hidden > p->hidden ? hidden : p->hidden;
    } else if (op->kind == PI2_ATTENTION) {
      int64_t columns = (int64_t)op->n_heads * op->head_dim;
      p->attention_columns = columns > p->attention_columns ? columns : p->attention_columns;
      p->max_heads = op->n_heads > p->max_heads ? op->n_heads : p->max_heads;
      p->max_kv_heads = op->n_kv_heads > p->max_kv_heads ? op->n_kv_heads : p->max_kv_heads;
      p->max_head_dim = op->kv.head_dim > p->max_head_dim ? op->kv.head_dim : p->max_head_dim;
      const int group = op->n_heads / op->n_kv_heads;
      p->max_group = group > p->max_group ? group : p->max_group;
    }
  }
  for (int i = 0; i < p->n_ropes; i++) {
    p->ropes[i].cosine = pi2_allocate(p, rows * p->ropes[i].half, 4);
    p->ropes[i].sine = pi2_allocate(p, rows * p->ropes[i].half, 4);
    ok &= p->ropes[i].cosine && p->ropes[i].sine;
  }
  find_tail(p);
  if (experts) ok &= prepare_routing(p, experts, used);
  ok &= prepare_pages(p);
  p->partial_splits = p->context > 4 * PI2_LARGEST_SPLIT ? p->context / PI2_LARGEST_SPLIT + 1 : 4;
  p->x = allocate_rows(p, rows, p->dim * 4);
  p->y = allocate_rows(p, rows, p->y_columns * 4);
  p->reduced = allocate_rows(p, rows, p->reduced_columns * 4);
  p->attention = allocate_rows(p, rows, p->attention_columns * 4);
  p->hidden_floats = allocate_rows(p, rows, p->hidden * 4);
  p->prepared = allocate_rows(p, rows, p->prepared_k * 4);
  p->logits = allocate_rows(p, PI2_HEAD_ROWS, p->vocab * 4);
  p->partial = pi2_allocate(p, p->max_slots * p->max_heads * p->partial_splits * (p->max_head_dim + 16), 4);
  if (p->rows) ok &= (p->row_tokens = pi2_allocate(p, rows, sizeof *p->row_tokens)) != NULL;
  p->slots = calloc((size_t)p->max_slots, sizeof *p->slots);
  p->scratch = calloc((size_t)p->threads, sizeof *p->scratch);
  ok &= allocate_q8(p, &p->q8_prepared, rows, p->prepared_k, p->mixed);
  ok &= allocate_q8(p, &p->q8_attention, rows, p->attention_columns, 0);
  ok &= allocate_q8(p, &p->q8_hidden, rows, p->hidden, p->mixed);
  ok &= p->x && p->y && p->reduced && p->attention && p->hidden_floats && p->prepared && p->logits && p->partial &&
        p->slots && p->scratch;
  if (!ok) return -1;
  const int64_t vectors = p->max_group > 64 ? p->max_group : 64; /* queries of one attention tile */
  for (int t = 0; t < p->threads; t++) {
    pi2_scratch *s = &p->scratch[t];
    ok &= allocate_q8(p, &s->q8, PI2_REPLICATED, p->max_k, p->mixed);
    s->floats = pi2_allocate(p, PI2_REPLICATED * p->max_k, 4);
    s->tile = pi2_allocate(p, 2 * PI2_TILE_ROWS * PI2_TILE_LD, 4);
    s->queries = pi2_allocate(p, vectors * p->max_head_dim, 4);
    s->scores = pi2_allocate(p, vectors * PI2_PAGE, 4);
    s->acc = pi2_allocate(p, vectors * (p->max_head_dim + 2), 4);
    s->acc2 = pi2_allocate(p, vectors * (p->max_head_dim + 2), 4);
    s->candidates = pi2_allocate(p, p->vocab, sizeof(pi2_candidate));
    ok &= s->floats && s->tile && s->queries && s->scores && s->acc && s->acc2 && s->candidates;
  }
  ok &= pi2_pieces_prepare(p);
  p->share_stride = pi2_align(cursors(p), 8);
  for (int i = 0; i < PI2_QUEUE; i++) ok &= prepare_run(p, &p->runs[i]);
  if (p->neurons) ok &= prepare_sparse(p);
  return ok ? 0 : -1;
}

void pi2_program_free(pi2_program *p) {
  for (int i = 0; i < p->n_ropes; i++) {
    free((void *)p->ropes[i].frequencies);
    free(p->ropes[i].cosine);
    free(p->ropes[i].sine);
  }
  for (int i = 0; p->slots && i < p->max_slots; i++) {
    free(p->slots[i].bias_ids);
    free(p->slots[i].bias);
    free(p->slots[i].counts);
  }
  for (int t = 0; p->scratch && t < p->threads; t++) {
    pi2_scratch *s = &p->scratch[t];
    free_q8(&s->q8);
    free(s->floats);
    free(s->tile);
    free(s->queries);
    free(s->scores);
    free(s->acc);
    free(s->acc2);
    free(s->candidates);
    free((void *)s->pieces);
    free(s->arranged);
    free(s->arranged_d);
    free(s->arranged_s);
    free(s->ahead_floats);
    free_q8(&s->ahead);
  }
  free_sparse(p, p->sparse[0]);
  free_sparse(p, p->sparse[1]);
  for (int i = 0; i < PI2_QUEUE; i++) free_run(&p->runs[i]);
  free_q8(&p->q8_prepared);
  free_q8(&p->q8_attention);
  free_q8(&p->q8_hidden);
  free(p->x);
  free(p->y);
  free(p->reduced);
  free(p->attention);
  free(p->hidden_floats);
  free(p->prepared);
  free(p->logits);
  free(p->routing.count);
  free(p->routing.row);
  free(p->routing.weight);
  free(p->routing.chosen);
  free(p->routing.share);
  free((void *)p->page_table);
  free(p->page_numbers);
  free(p->piece_blocks);
  free((void *)p->piece_left);
  free(p->partial);
  free(p->row_tokens);
  free(p->slots);
  free(p->scratch);
  free(p->ops);
  free(p->ropes);
}

pi2_run *pi2_run_new(pi2_program *p) {
  pi2_run *r = &p->runs[p->next_run % PI2_QUEUE];
  if (!r->done) return NULL;
  r->n_rows = r->n_slices = r->n_units = r->n_prefill = r->n_head = r->trace = r->urgent = 0;
  r->copies.n = 0;
  return r;
}

static int add_unit(pi2_run *r, pi2_unit unit) {
  if (r->n_units == r->units_capacity) {
    int64_t capacity = r->units_capacity ? 2 * r->units_capacity : 256;
    pi2_unit *bigger = realloc(r->units, (size_t)capacity * sizeof *bigger);
    if (!bigger) return -1;
    r->units = bigger;
    r->units_capacity = capacity;
  }
  r->units[r->n_units++] = unit;
  return 0;
}

/* Units of attention: the same for every layer, with the most KV heads of any; a layer with fewer skips. Single rows
 * are cut along the context, so that a long one is shared; rows of a chunk are cut in tiles, the last (longest) first.
 */
static int make_units(pi2_run *r) {
  const pi2_program *p = r->program;
  for (int i = 0; i < r->n_slices; i++) {
    const pi2_slice *s = &r->slices[i];
    if (s->count == 1) {
      const int splits = s->start / pi2_split(s->start) + 1;
      for (int split = splits - 1; split >= 0; split--)
        for (int h = 0; h < p->max_kv_heads; h++)
          if (add_unit(r, (pi2_unit){i, s->row, 1, h, split, splits})) return -1;
    } else {
      const int tile = p->max_group <= 8 ? 8 : p->max_group <= 32 ? 2 : 1; /* at most 64 query vectors, in eights */
      for (int first, last = s->count; last > 0; last = first) {           /* rows of a tile are split alike */
        const int begin = pi2_split_begin(pi2_split(s->start + last - 1)) - s->start;
        first = (last - 1) / tile * tile;
        if (first < begin) first = begin;
        for (int h = 0; h < p->max_kv_heads; h++)
          if (add_unit(r, (pi2_unit){i, s->row + first, last - first, h, 0, 0})) return -1;
      }
    }
  }
  return 0;
}

int pi2_run_post(pi2_run *r) {
  pi2_program *p = r->program;
  for (int i = 0; i < r->n_slices; i++) {
    const pi2_slice *s = &r->slices[i];
    for (int j = 0; j < s->count; j++) {
      r->slice_of[s->row + j] = i;
      r->position[s->row + j] = s->start + j;
      if (s->count > 1) r->prefill_row[r->n_prefill++] = s->row + j;
      if (s->want_logits || (s->targets && s->targets[j] >= 0) || (s->sample && j == s->count - 1))
        r->head_row[r->n_head++] = s->row + j;
    }
  }
  if (make_units(r)) return -1;
  memset((void *)r->cursors, 0, (size_t)(4 * cursors(p)) * 4);
  memset((void *)r->shares, 0, (size_t)(p->threads * p->share_stride) * 8);
  memset((void *)r->splits_left, 0, (size_t)(p->max_slots * p->max_kv_heads) * 4);
  memset(r->busy, 0, (size_t)p->threads * 8);
  if (r->n_waits) memset(r->n_waits, 0, (size_t)p->threads * sizeof *r->n_waits);
  atomic_store(&r->stop, 0);
  r->stopped = 0;
  atomic_store(&r->done, 0);
  atomic_store(&r->error, 0);
  atomic_store(&r->neuron_bytes, 0);
  r->skipped_bytes = r->cluster_bytes = 0;
  if (pi2_gang_post(p->gang, pi2_run_job, r)) return -1;
  p->next_run++;
  return 0;
}

static int32_t token_of(const pi2_run *r, int row) {
  return r->token[row] >= 0 ? r->token[row] : r->program->slots[r->slices[r->slice_of[row]].slot].last;
}
/* All rows of an embedding that is not in memory: a thread that reads them one by one would wait for each. */
static void read_embedding(pi2_run *r) {
  const pi2_program *p = r->program;
  for (int row = 0; row < r->n_rows; row++) p->row_tokens[row] = token_of(r, row);
  const int error = pi2_rows_read(p->rows, p->row_tokens, r->n_rows, p->x, p->dim, &r->stop);
  if (!error) return;
  if (error != ECANCELED || !atomic_load(&r->stop)) r->error = error;
  atomic_store(&r->stop, 1); /* the barrier behind this operation ends the run on every thread */
}

/* Token embeddings and, with them, the step's rotations. */
static void op_embed(pi2_run *r, int index, pi2_worker *w) {
  const pi2_program *p = r->program;
  const int scaled = p->embedding_scale != 1.0f;
  if (p->rows && w->index == 0) {
    read_embedding(r);
    for (int row = 0; scaled && row < r->n_rows; row++)
      p->kernels->scale(p->x + row * p->dim, p->embedding_scale, p->x + row * p->dim, p->dim);
  }
  for (uint32_t row; (row = pi2_take(r, index, 0)) < (uint32_t)r->n_rows;) {
    float *x = p->x + row * p->dim;
    if (!p->rows) {
      pi2_unpack_row(p->embedding.type, p->embedding.data, p->dim, token_of(r, (int)row), x);
      if (scaled) p->kernels->scale(x, p->embedding_scale, x, p->dim);
    }
    for (int i = 0; i < p->n_ropes; i++) {
      const pi2_rope *rope = &p->ropes[i];
      pi2_rotation(rope->frequencies, rope->half, r->position[row], rope->magnitude, rope->cosine + row * rope->half,
                   rope->sine + row * rope->half);
    }
  }
}

/* x += y, through the second norm of a block that has one */
static void op_add(pi2_run *r, const pi2_op *op, int index) {
  const pi2_program *p = r->program;
  for (uint32_t row; (row = pi2_take(r, index, 0)) < (uint32_t)r->n_rows;) {
    float *y = p->y + row * p->y_columns;
    if (op->norm.weight) p->kernels->rmsnorm(y, op->norm.weight, op->norm.offset, op->norm.eps, y, p->dim);
    p->kernels->add(y, p->x + row * p->dim, p->dim);
  }
}

int pi2_run_job(void *context, pi2_worker *w) {
  pi2_run *r = context;
  pi2_program *p = r->program;
  if (w->index == 0) { /* before the others can be at work: kernel time never exceeds the run's */
    if (p->stream) pi2_pieces_begin(r);
    if (p->neurons) pi2_neuron_cache_step(p->neurons), r->before = pi2_neuron_cache_counts(p->neurons);
    if (p->clusters) pi2_neuron_cache_step(p->clusters), r->cluster_bytes = -atomic_load(&p->clusters->bytes);
    r->begin_ns = pi2_now_ns();
    r->begin_ticks = pi2_ticks();
  }
  pi2_job_begin(w, &r->stop);
  p->scratch[w->index].turn = 0;
  int stopped = 0;
  uint64_t busy = 0;
  if (r->copies.n) { /* the first operation, of embeddings, touches no state, and its closing barrier follows */
    const uint64_t begin = pi2_ticks();
    pi2_copies_run(&r->copies, w->index, p->threads);
    busy += pi2_ticks() - begin;
  }
  for (int i = 0; i < p->n_ops && !stopped; i++) {
    const pi2_op *op = &p->ops[i];
    pi2_op streamed;
    const int behind = p->tail >= 0 && i >= p->tail && !r->n_head; /* of a chunk that is not a prompt's last */
    if ((op->expert >= 0 && !p->routing.count[op->expert]) ||
        (behind && op->kind != PI2_ATTENTION)) { /* nobody wants it */
      if (w->index == 0) r->skipped_bytes += op->weight_bytes;
      if (r->trace) r->op_begin[w->index * p->n_ops + i] = r->op_end[w->index * p->n_ops + i] = pi2_ticks();
      continue;
    }
    if (op->streamed) {
      streamed = *op;
      op = &streamed;
      for (int j = 0; j < op->n_matrices; j++)
        if (pi2_is_streamed(&op->matrix[j])) streamed.matrix[j].page = p->scratch[w->index].pieces + j * p->max_pieces;
    }
    if (op->paged && (stopped = pi2_pages_get(r, op, w))) break;
    const uint64_t begin = pi2_ticks();
    p->scratch[w->index].waited = 0;
    switch (op->kind) {
    case PI2_EMBED: op_embed(r, i, w); break;
    case PI2_LINEAR: stopped = pi2_op_linear(r, op, i, w); break;
    case PI2_ATTENTION:
      if (behind)
        pi2_op_store(r, op, i, w);
      else
        stopped = pi2_op_attention(r, op, i, w);
      break;
    case PI2_FFN: stopped = pi2_op_ffn(r, op, i, w); break;
    case PI2_ADD: op_add(r, op, i); break;
    case PI2_ROUTE: pi2_op_route(r, op, i, w, &stopped); break;
    case PI2_HEAD: stopped = pi2_op_head(r, op, i, w); break;
    case PI2_SPARSE: stopped = pi2_op_sparse(r, op, i, w); break;
    }
    const uint64_t end = pi2_ticks();
    busy += end - begin - p->scratch[w->index].waited;
    if (r->trace) {
      r->op_begin[w->index * p->n_ops + i] = begin;
      r->op_end[w->index * p->n_ops + i] = end;
    }
    if (!stopped) stopped = pi2_barrier(w);
    if (op->kind == PI2_SPARSE) {
      int *turn = &p->scratch[w->index].turn;
      if (w->index == 0) pi2_sparse_reset(pi2_sparse_of(r, *turn)); /* barriers away from its next use, */
      *turn = !*turn;
      if (op->expert >= 0 && r->n_rows > PI2_REPLICATED && !stopped) stopped = pi2_barrier(w); /* but for this case */
    }
    if (op->paged && w->index == 0 && !stopped) pi2_pages_release(p, op);
  }
  r->busy[w->index] = busy;
  if (w->index == 0) {
    if (stopped && p->neurons) {
      for (int i = 0; i < 2; i++) pi2_sparse_reset(p->sparse[i]);
      pi2_neuron_cache_abandon(p->neurons);
    }
    if (stopped && p->clusters) pi2_neuron_cache_abandon(p->clusters);
    if (p->neurons) r->used = pi2_neuron_cache_counts(p->neurons);
    if (p->clusters) r->cluster_bytes += atomic_load(&p->clusters->bytes);
    r->end_ticks = pi2_ticks();
    r->end_ns = pi2_now_ns();
    r->stopped = stopped;
  }
  const int urgent = r->urgent || stopped; /* once it is done, the run may be another one */
  pi2_barrier(w);                          /* what the run wrote is complete; the gang may report it */
  if (w->index == 0) r->done = 1;
  return urgent;
}
