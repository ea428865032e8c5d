#include "sampler.h"

#include <float.h>
#include <math.h>
#include <stdlib.h>

#include "elementary.h"

static uint64_t splitmix64(uint64_t z) { /* Steele, Lea, Flood, 2014 */
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
  z = (z ^ z >> 27) * 0x94d049bb133111ebu;
  return z ^ z >> 31;
}
double pi2_uniform(uint64_t seed, uint64_t position) {
  return (double)(splitmix64(seed ^ splitmix64(position)) >> 11) * 0x1p-53;
}

static int is_allowed(const uint32_t *allowed, int64_t token) {
  return !allowed || (allowed[token / 32] >> (token % 32) & 1);
}

/* Tokens that are not allowed become impossible. Returns PI2_BY_MASK where one of them had a finite logit, or 0. */
static int forbid(const uint32_t *allowed, float *logits, int64_t vocab) {
  int by = 0;
  for (int64_t word = 0; word < (vocab + 31) / 32; word++) {
    if (!~allowed[word]) continue;
    const int64_t end = 32 * word + 32 < vocab ? 32 * word + 32 : vocab;
    for (int64_t i = 32 * word; i < end; i++) {
      if (allowed[word] >> (i % 32) & 1) continue;
      if (isfinite(logits[i])) by = PI2_BY_MASK;
      logits[i] = -INFINITY;
    }
  }
  return by;
}

/* Bias and penalties. Returns which of them (PI2_BY_*) made a logit NaN or plus infinite, or 0; *forbidding: which of
 * them made finite ones minus infinite. Only what they change is looked at: the others were finite before. Penalties
 * leave the minus infinity of a token that is not allowed as it is; a bias of plus infinity would not. */
static int penalise(const pi2_slot *s, const uint32_t *allowed, float *logits, int64_t vocab, int *forbidding) {
  for (int32_t i = 0; i < s->n_bias; i++) {
    if (!is_allowed(allowed, s->bias_ids[i])) continue;
    float *x = &logits[s->bias_ids[i]];
    const int finite = isfinite(*x);
    *x += s->bias[i];
    if (!(*x < INFINITY)) return PI2_BY_BIAS;
    if (finite && !isfinite(*x)) *forbidding |= PI2_BY_BIAS;
  }
  if (!s->counts) return 0;
  for (int64_t i = 0; i < vocab; i++) {
    if (!s->counts[i]) continue;
    const float old = logits[i], x = old > 0 ? old / s->repetition : old * s->repetition;
    if (!(x < INFINITY)) return PI2_BY_REPETITION;
    if (isfinite(old) && !isfinite(x)) *forbidding |= PI2_BY_REPETITION;
    logits[i] = x - (s->presence + s->frequency * (float)s->counts[i]);
    if (!(logits[i] < INFINITY)) return PI2_BY_PENALTIES;
    if (isfinite(x) && !isfinite(logits[i])) *forbidding |= PI2_BY_PENALTIES;
  }
  return 0;
}

/* Whether the model's logits are usable: none NaN or plus infinite, one finite at least. */
static int usable(const pi2_kernels *k, const float *logits, int64_t vocab) {
  int wrong = 0; /* no early end, so that it is vectorised: a hundredth of what argmax and the head's product take */
  for (int64_t i = 0; i < vocab; i++) wrong |= !(logits[i] < INFINITY);
  return !wrong && isfinite(logits[k->argmax(logits, vocab)]);
}

static int descending(const void *a, const void *b) {
  const pi2_candidate *x = a, *y = b;
  if (x->value != y->value) return x->value < y->value ? 1 : -1;
  return x->id < y->id ? -1 : x->id > y->id;
}

/* The candidates from `bound` on, sorted: the head of the full sorted list. */
static int64_t collect(const float *x, int64_t vocab, float bound, pi2_candidate *out) {
  int64_t n = 0;
  for (int64_t i = 0; i < vocab; i++) {
    if (x[i] >= bound) out[n++] = (pi2_candidate){x[i], (int32_t)i};
  }
  qsort(out, (size_t)n, sizeof *out, descending);
  return n;
}

/* Draws from x/temperature; `largest` is the largest x. Sorting a whole vocabulary takes as long as a layer, so the
 * sorted head is widened only until it holds all that the draw can reach. */
static int32_t draw(const pi2_kernels *k, const pi2_slot *s, const float *x, int64_t vocab, float largest,
                    int64_t position, pi2_candidate *head) {
  /* Relative to the largest: near zero, a temperature then leaves the others at minus infinity, and not all at plus.
   * Rounding may make neighbours equal here, so order and weights come from x itself. */
  float *scaled = (float *)head, inverse = fminf(1.0f / s->temperature, FLT_MAX);
  for (int64_t i = 0; i < vocab; i++) scaled[i] = (x[i] - largest) * inverse;
  const double all = k->logsumexp(scaled, vocab), u = pi2_uniform(s->seed, (uint64_t)position);
  const double temperature = s->temperature, floor_ = (double)s->min_p * pi2_exp(-all);
#define PROBABILITY(c) pi2_exp(((double)(c).value - largest) / temperature - all)
  for (float range = 12;; range *= 4) {
    const int whole = range > 1e4f;
    int64_t n = collect(x, vocab, whole ? -INFINITY : largest - range * s->temperature, head);
    if (!whole && s->top_k && n < s->top_k && n < vocab) continue;
    if (s->top_k && n > s->top_k) n = s->top_k;
    double mass = 0, total = 1;
    if (s->top_k) {
      total = 0;
      for (int64_t i = 0; i < n; i++) total += PROBABILITY(head[i]);
    }
    int64_t kept = 0;
    int closed = s->top_k != 0 || n == vocab; /* no candidate beyond the head can matter */
    while (kept < n) {
      double p = PROBABILITY(head[kept]);
      if (s->min_p > 0 && p < floor_) {
        closed = 1;
        break;
      }
      mass += p;
      kept++;
      if (mass >= (double)s->top_p * total && s->top_p < 1) {
        closed = 1;
        break;
      }
    }
    /* without a cut-off the tail's mass is known without listing it */
    const double target = u * (closed ? mass : total);
    if (!closed && mass <= target && !whole) continue;
    if (!closed && (s->top_p < 1 || s->min_p > 0) && !whole) continue; /* the cut lies beyond the head */
    double sum = 0;
    for (int64_t i = 0; i < kept; i++) {
      sum += PROBABILITY(head[i]);
      if (sum > target) return head[i].id;
    }
    return kept ? head[kept - 1].id : (int32_t)k->argmax(x, vocab);
  }
#undef PROBABILITY
}

/* The n largest of x, equals by index, in one pass: most values are smaller than the last of those found so far. */
static void most_likely(const float *x, int64_t vocab, int32_t n, double all, pi2_pick *top) {
  int32_t have = 0;
  for (int64_t i = 0; n && i < vocab; i++) {
    if (have == n && !(x[i] > x[top[n - 1].token])) continue;
    int32_t j = have < n ? have++ : n - 1;
    for (; j > 0 && x[i] > x[top[j - 1].token]; j--) top[j] = top[j - 1];
    top[j].token = (int32_t)i;
  }
  for (int32_t j = 0; j < have; j++) top[j].logprob = (float)((double)x[top[j].token] - all);
}

pi2_pick pi2_sample(const pi2_kernels *k, pi2_slot *s, float *logits, int64_t vocab, int64_t position,
                    const uint32_t *allowed, pi2_pick *top, pi2_candidate *scratch) {
  if (!usable(k, logits, vocab)) return (pi2_pick){PI2_UNUSABLE, NAN};
  int forbidding = allowed ? forbid(allowed, logits, vocab) : 0;
  const int by = penalise(s, allowed, logits, vocab, &forbidding);
  if (by) return (pi2_pick){PI2_UNUSABLE - by, NAN};
  const int64_t best = k->argmax(logits, vocab);
  if (!isfinite(logits[best])) return (pi2_pick){PI2_UNUSABLE - forbidding, NAN};
  pi2_pick pick = {0, NAN};
  double all = 0;
  if (s->logprobs >= 0) {
    all = k->logsumexp(logits, vocab);
    most_likely(logits, vocab, s->logprobs, all, top);
  }
  pick.token = s->temperature <= 0 ? (int32_t)best : draw(k, s, logits, vocab, logits[best], position, scratch);
  if (s->logprobs >= 0) pick.logprob = (float)((double)logits[pick.token] - all);
  if (s->counts) s->counts[pick.token]++;
  s->last = pick.token;
  s->ended |= s->limit && position + 1 >= s->limit;
  for (int32_t i = 0; i < s->n_ends; i++) s->ended |= s->ends[i] == pick.token;
  return pick;
}
