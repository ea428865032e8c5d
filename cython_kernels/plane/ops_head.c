/* The output head: logits, and what becomes of them. */
#include <math.h>
#include <string.h>

#include "masks.h"
#include "ops_linear.h"
#include "parts.h"

typedef struct {
  float *logits;              /* (PI2_HEAD_ROWS, vocab) */
  pi2_candidate **candidates; /* (threads) of (vocab) */
} head_buffers;

/* After a token that is no draft, or a draft that was right, as single steps would: in their order, on one thread. */
static void verify_row(pi2_run *r, pi2_slice *s, int at, float *logits, pi2_candidate *candidates) {
  const pi2_program *p = r->program;
  pi2_slot *slot = &p->slots[s->slot];
  if (s->closed || at < s->count - 1 - s->drafts) return;
  pi2_pick *top = s->top ? s->top + s->n_picks * slot->logprobs : NULL;
  const pi2_pick pick = pi2_sample(p->kernels, slot, logits, p->vocab, s->start + at + 1, NULL, top, candidates);
  s->picks[s->n_picks++] = pick;
  s->closed = pick.token < 0 || slot->ended || at == s->count - 1 || pick.token != r->token[s->row + at + 1];
}
/* The token behind a slice, by its mask where it has one. */
static pi2_pick pick_token(const pi2_program *p, const pi2_slice *s, float *logits, pi2_candidate *candidates) {
  const int state = s->masked ? atomic_load(&s->mask_state) : PI2_MASK_ALL;
  if (state == PI2_MASK_MISSING) return (pi2_pick){PI2_UNUSABLE - PI2_BY_MASK, NAN}; /* it came too late */
  return pi2_sample(p->kernels, &p->slots[s->slot], logits, p->vocab, s->start + s->count,
                    state == PI2_MASK_THERE ? s->mask : NULL, s->top, candidates);
}
/* What becomes of one row of logits: returned, scored, sampled. */
static void finish_row(pi2_run *r, const pi2_head *head, int32_t row, float *logits, pi2_candidate *candidates) {
  const pi2_program *p = r->program;
  pi2_slice *s = &r->slices[r->slice_of[row]];
  const int at = row - s->row;
  if (head->softcap > 0) p->kernels->softcap(logits, head->softcap, p->vocab);
  if (s->want_logits) memcpy(s->logits + at * p->vocab, logits, (size_t)p->vocab * sizeof *logits);
  if (s->targets && s->targets[at] >= 0)
    s->scores[at] = (float)((double)logits[s->targets[at]] - p->kernels->logsumexp(logits, p->vocab));
  if (s->sample && s->drafts)
    verify_row(r, s, at, logits, candidates);
  else if (s->sample && at == s->count - 1)
    s->pick = pick_token(p, s, logits, candidates);
}

/* Products of at most PI2_TILE_BLOCKS row blocks become logits. */
static void put_logits(const pi2_run *r, const pi2_op *op, int64_t first, int64_t last, int row, int rows,
                       float *tile) {
  const pi2_program *p = r->program;
  const head_buffers *b = p->shared[PI2_HEAD];
  const pi2_matrix *m = &op->matrix[0];
  const int64_t begin = first * PI2_ROWS, end = last * PI2_ROWS < m->rows ? last * PI2_ROWS : m->rows;
  for (int c = 0; c < rows; c++) {
    if (m->bias) p->kernels->add(m->bias + begin, tile + c * PI2_TILE_LD, end - begin);
    memcpy(b->logits + (row + c) * p->vocab + begin, tile + c * PI2_TILE_LD, (size_t)(end - begin) * sizeof *tile);
  }
}
static int rows_from(const pi2_run *r, int first) {
  return r->n_head - first < PI2_HEAD_ROWS ? r->n_head - first : PI2_HEAD_ROWS;
}
static int run_head(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  const pi2_program *p = r->program;
  const head_buffers *b = p->shared[PI2_HEAD];
  const pi2_matrix *m = &op->matrix[0];
  float *tile = p->scratch[w->index].tile;
  int stopped = 0;
  for (int first = 0; first < r->n_head && !stopped; first += PI2_HEAD_ROWS, index++) {
    const int n = rows_from(r, first);
    const pi2_input in = pi2_prepare(r, op, index, w, m->k, r->head_row + first, n, pi2_form_of(op), &stopped);
    if (stopped) return stopped;
    pi2_progress at = {0};
    for (pi2_part u; pi2_take_part(r, op, index, w, n, pi2_row_blocks(m), m->k, 1, &at, &u);)
      for (int64_t from = u.first; from < u.last; from += PI2_TILE_BLOCKS) {
        const int64_t to = from + PI2_TILE_BLOCKS < u.last ? from + PI2_TILE_BLOCKS : u.last;
        pi2_multiply(p, m, from, (int)(to - from), &in, u.row, u.rows, tile, PI2_TILE_LD);
        put_logits(r, op, from, to, u.row, u.rows, tile);
      }
    stopped = pi2_barrier(w);
    for (uint32_t i; !stopped && (i = pi2_take(r, index, 2)) < (uint32_t)n;) {
      const int32_t slice = r->slice_of[r->head_row[first + i]];
      if (r->n_masked && pi2_row_is_masked(r, r->head_row[first + i])) continue; /* these come last */
      if (r->slices[slice].drafts && i && r->slice_of[r->head_row[first + i - 1]] == slice) continue; /* done below */
      do finish_row(r, op->data, r->head_row[first + i], b->logits + i * p->vocab, b->candidates[w->index]);
      while (r->slices[slice].drafts && ++i < (uint32_t)n && r->slice_of[r->head_row[first + i]] == slice);
    }
    for (int i; !stopped && r->n_masked && (i = pi2_masked_row_take(r, w, first, n)) >= 0;)
      finish_row(r, op->data, r->head_row[first + i], b->logits + i * p->vocab, b->candidates[w->index]);
    if (!stopped && first + PI2_HEAD_ROWS < r->n_head) stopped = pi2_barrier(w); /* logits are used again */
  }
  return stopped;
}
static void assist_head(pi2_run *r, const pi2_op *op, int index, pi2_worker *w) {
  pi2_program *p = r->program;
  const pi2_matrix *m = &op->matrix[0];
  float *tile = p->scratch[w->index].tile;
  int stopped = 0;
  const int first = (index - (int)(op - p->ops)) * PI2_HEAD_ROWS, n = rows_from(r, first);
  if (n < 1) return;
  const pi2_input in = pi2_prepare(r, op, index, w, m->k, r->head_row + first, n, pi2_form_of(op), &stopped);
  for (pi2_part u; pi2_claim_part(r, op, index, w, n, pi2_row_blocks(m), m->k, 1, &u);) {
    pi2_multiply(p, m, u.first, (int)(u.last - u.first), &in, u.row, u.rows, tile, PI2_TILE_LD);
    if (!pi2_claim_write(p, w)) return;
    put_logits(r, op, u.first, u.last, u.row, u.rows, tile);
    pi2_end_part(r, index, w, &u);
  }
}

static void prepare_head(pi2_program *p, pi2_arena *a) {
  const head_buffers b = {.logits = pi2_take_rows(p, a, PI2_HEAD_ROWS, p->vocab * 4),
                          .candidates = pi2_arena_take(a, p->threads, sizeof *b.candidates)};
  for (int t = 0; t < p->threads; t++) {
    pi2_candidate *candidates = pi2_arena_take(a, p->vocab, sizeof *candidates);
    if (a->base) b.candidates[t] = candidates;
  }
  p->shared[PI2_HEAD] = pi2_keep(a, &b, sizeof b);
}

const pi2_op_class pi2_head_class = {
    .name = "head", .data_bytes = sizeof(pi2_head), .prepare = prepare_head, .run = run_head, .assist = assist_head};
