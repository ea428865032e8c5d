/* Picking a token, as executors/reference/sampling.py specifies it. */
#ifndef PI2_SAMPLER_H
#define PI2_SAMPLER_H
#include <stdint.h>

#include "api.h"
#include "kernels.h"

typedef struct {
  float temperature, top_p, min_p, repetition, presence, frequency;
  int32_t top_k;
  uint64_t seed;
  int32_t logprobs; /* -1: none; n: of the chosen and the n likeliest */
  int32_t n_bias;
  int32_t *bias_ids; /* owned */
  float *bias;       /* owned */
  int32_t *counts;   /* (vocab) or NULL without penalties */
  int32_t last;      /* the token sampled last; always a valid one */
  int32_t n_ends;
  int32_t *ends; /* owned, tokens each of which ends the sequence */
  int64_t limit; /* tokens that it may have; 0: any number */
  int ended;     /* one of them was sampled, or so many tokens are there */
} pi2_slot;

/* pi2_pick.token where nothing can be picked: the model's own logits are NaN or infinite; less than that by the sum of
 * those parameters (PI2_BY_*) that made them so. */
enum { PI2_UNUSABLE = -1, PI2_BY_BIAS = 1, PI2_BY_REPETITION = 2, PI2_BY_PENALTIES = 4, PI2_BY_MASK = 8 };
typedef struct {
  int32_t token;
  float logprob;
} pi2_pick;

/* Scratch for one row: candidate list. */
typedef struct {
  float value;
  int32_t id;
} pi2_candidate;

/* logits (vocab) are changed in place. `position` is that of the sampled token. top: (slot->logprobs, at most vocab).
 * scratch: vocab candidates. allowed: bits of the tokens that may be picked, (vocab + 31) / 32 words, or NULL: all.
 * Updates slot->last, ->ended and the counts, unless nothing can be picked. */
PI2_API pi2_pick pi2_sample(const pi2_kernels *k, pi2_slot *slot, float *logits, int64_t vocab, int64_t position,
                            const uint32_t *allowed, pi2_pick *top, pi2_candidate *scratch);
double pi2_uniform(uint64_t seed, uint64_t position);
#endif
