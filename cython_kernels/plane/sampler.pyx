"""What was drawn, as steps return it; and one draw by itself (sampler.h)."""

from libc.stdint cimport int32_t, int64_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memset

from pi2rt.cython_kernels.kernels.declarations cimport *
from pi2rt.cython_kernels.kernels.variants cimport Variant
from pi2rt.cython_kernels.plane.declarations cimport *

import numpy as np

from pi2rt.host.limits import memory_failure
from pi2rt.runtime.step import Sampled, Unusable


cdef outcome(pi2_pick pick, top):
    """``top``: None, or int32 (logprobs, 2), pairs of an id and a float32."""
    if pick.token < 0:
        return unusable(pick.token)
    if top is None:
        return Sampled(pick.token, pick.logprob)
    ids, values = top[:, 0], top[:, 1].view(np.float32)
    return Sampled(pick.token, pick.logprob, tuple(zip(ids.tolist(), values.tolist())))


def unusable(int32_t token):
    """``Unusable`` for what ``sample`` gives instead of a token, a negative number."""
    cdef int by = PI2_UNUSABLE - token
    names = []
    if by & PI2_BY_MASK:
        names.append("token_mask")
    if by & PI2_BY_BIAS:
        names.append("logit_bias")
    if by & PI2_BY_REPETITION:
        names.append("repetition_penalty")
    if by & PI2_BY_PENALTIES:
        names += "presence_penalty", "frequency_penalty"
    return Unusable(tuple(names))


def sample(Variant kernels not None, logits, sampling, counts, int64_t position, allowed=None):
    """One draw by itself, for tests: as ``pi2rt.executors.reference.sampling.sample``. Returns (token, logprob); see
    ``unusable`` for negative tokens."""
    cdef const uint32_t[::1] words = allowed
    cdef pi2_slot s
    cdef float[::1] x = np.array(logits, np.float32)
    cdef int32_t[::1] c = np.array(counts, np.int32)
    cdef int64_t n = x.shape[0]
    memset(&s, 0, sizeof(pi2_slot))
    s.temperature, s.top_k, s.top_p, s.min_p = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
    s.repetition, s.presence, s.frequency = (sampling.repetition_penalty, sampling.presence_penalty,
                                             sampling.frequency_penalty)
    s.seed, s.logprobs = sampling.seed & 0xffffffffffffffff, min(0, sampling.logprobs)
    ids = np.array([i for i, _ in sampling.logit_bias] or [0], np.int32)
    values = np.array([v for _, v in sampling.logit_bias] or [0], np.float32)
    cdef int32_t[::1] iv = ids
    cdef float[::1] vv = values
    s.n_bias, s.bias_ids, s.bias = len(sampling.logit_bias), &iv[0], &vv[0]
    if sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty:
        s.counts = &c[0]
    cdef pi2_candidate *scratch = <pi2_candidate *>malloc(n * sizeof(pi2_candidate))
    if scratch == NULL:
        raise memory_failure("sampling", n * sizeof(pi2_candidate))
    pick = pi2_sample(kernels.table, &s, &x[0], n, position, NULL if words is None else &words[0], NULL, scratch)
    free(scratch)
    return pick.token, pick.logprob
