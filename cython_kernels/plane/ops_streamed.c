/* Matrices that are not in memory: their pieces pass through a ring (stream.h), in the order in which operations use
 * them.
 *
 * Threads take the row blocks of such a matrix in order, so that the oldest piece in the ring is always one that
 * somebody computes with, and what it makes room for is read. A piece is released once all its row blocks have met all
 * rows. Where rows are so many that they come in several passes, each tile meets all of them before the next one: so it
 * must lie in one piece, or the passes that are not taken yet would keep a piece in the ring that has room for no
 * other. */
#include <sys/mman.h>

#include "program.h"

void pi2_pieces_prepare(pi2_program *p, pi2_arena *a) {
  if (!p->n_pieces) return;
  p->piece_blocks = pi2_arena_take(a, p->n_pieces, sizeof *p->piece_blocks);
  p->piece_left = pi2_arena_take(a, p->n_pieces, sizeof *p->piece_left);
  if (!a->base) return;
  for (int i = 0; i < p->n_tails; i++) /* or the first rows might bring them along, where huge pages are preferred */
    madvise(p->tail_of[i].base, (size_t)p->tail_of[i].bytes, MADV_NOHUGEPAGE);
  for (int i = 0; i < p->n_ops; i++)
    for (int j = 0; j < p->ops[i].n_matrices; j++) {
      const pi2_matrix *m = &p->ops[i].matrix[j];
      if (!pi2_is_streamed(m)) continue;
      const int64_t parts = pi2_parts(m), blocks = pi2_row_blocks(m);
      while (parts > 1 && m->page_blocks % p->ops[i].tile_blocks) p->ops[i].tile_blocks /= 2;
      for (int64_t piece = 0; piece < parts; piece++) {
        const int64_t left = blocks - piece * m->page_blocks;
        p->piece_blocks[m->unit + piece * m->stride] = left < m->page_blocks ? left : m->page_blocks;
      }
    }
}

/* How much of the loan this run leaves alone. Rows of long steps are given back to the system behind them. */
static int64_t lendable(const pi2_run *r) {
  pi2_program *p = r->program;
  for (int i = 0; i < r->copies.n; i++) {
    const pi2_copy *copy = &r->copies.copy[i];
    const uintptr_t end = (uintptr_t)copy->to + (uintptr_t)copy->bytes; /* a slot's lies elsewhere */
    if ((uintptr_t)copy->to >= p->kv && end <= p->kv + (uintptr_t)p->kv_bytes && (int64_t)(end - p->kv) > p->kv_used)
      p->kv_used = (int64_t)(end - p->kv);
  }
  for (int i = 0; i < r->n_slices; i++) {
    const pi2_slice *s = &r->slices[i];
    for (int page = s->start / PI2_PAGE; page * PI2_PAGE < s->start + s->count; page++) {
      const int64_t end = (s->pages[page] + 1) * p->kv_page_bytes;
      p->kv_used = end > p->kv_used ? end : p->kv_used;
    }
  }
  const int few = r->n_rows <= PI2_FEW_ROWS;
  for (int i = 0; few && p->tails_touched && i < p->n_tails; i++)
    pi2_pages_discard(p->tail_of[i].base, p->tail_of[i].bytes);
  p->tails_touched = !few;
  const uintptr_t huge = (uintptr_t)pi2_huge_page_bytes(); /* of which all may be taken where one byte is touched */
  const uintptr_t used = (p->kv + (uintptr_t)p->kv_used + huge - 1) & ~(huge - 1);
  int64_t bytes = (int64_t)(p->kv + (uintptr_t)p->kv_bytes - used);
  bytes = (bytes > 0 ? bytes : 0) + (few ? p->tail_bytes : 0);
  return (bytes < p->loan_bytes ? bytes : p->loan_bytes) / PI2_SECTOR * PI2_SECTOR;
}

void pi2_pieces_begin(pi2_run *r) {
  pi2_program *p = r->program;
  r->base = pi2_stream_begin(p->stream);
  if (p->loan_bytes) pi2_stream_lend(p->stream, lendable(r), &r->stop);
  r->kept_bytes = atomic_load(&p->stream->kept_bytes);
  for (int64_t i = 0; i < p->n_pieces; i++)
    atomic_store_explicit(&p->piece_left[i], p->piece_blocks[i] * r->n_rows, memory_order_relaxed);
}

int pi2_pieces_get(pi2_run *r, const pi2_matrix *m, const pi2_worker *w, int64_t first, int64_t last) {
  pi2_stream *s = r->program->stream;
  const uint64_t begin = pi2_ticks();
  const int64_t begin_ns = pi2_now_ns();
  for (int64_t i = first / m->page_blocks; i * m->page_blocks < last; i++) {
    m->page[i] = pi2_stream_get(s, r->base + (uint64_t)(m->unit + i * m->stride), w->gang->spin_ns, &r->stop);
    if (m->page[i]) continue;
    if (atomic_load(&s->error)) r->error = atomic_load(&s->error);
    atomic_store(&r->stop, 1); /* the closing barrier tells everybody */
    return 0;
  }
  if (w->index == 0) atomic_fetch_add_explicit(&s->stall_ns, pi2_now_ns() - begin_ns, memory_order_relaxed);
  pi2_note_wait(r, w, begin, pi2_ticks());
  return 1;
}

void pi2_pieces_release(pi2_run *r, const pi2_matrix *m, int64_t first, int64_t last, int rows) {
  const pi2_program *p = r->program;
  int done = 0;
  for (int64_t i = first / m->page_blocks; i * m->page_blocks < last; i++) {
    const int64_t from = i * m->page_blocks, to = from + m->page_blocks;
    const int64_t n = ((to < last ? to : last) - (from > first ? from : first)) * rows;
    done |= atomic_fetch_sub(&p->piece_left[m->unit + i * m->stride], n) == n;
  }
  for (int moved = !done; !moved;) { /* of two threads that end neighbours at the same time, the later one sees both */
    const uint64_t at = atomic_load(&p->stream->released);
    uint64_t end = at;
    while (end < r->base + (uint64_t)p->n_pieces && !atomic_load(&p->piece_left[end - r->base])) end++;
    moved = end == at || pi2_stream_release(p->stream, at, end);
  }
}
