"""Sampling, exactly: the one place that says which token comes next. Other executors must pick the same.

Arithmetic: bias and penalties in float32, probabilities in float64. Order: token mask, logit bias, repetition penalty,
presence and frequency penalty, (log probabilities are taken here,) temperature, top-k, top-p, min-p, draw.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pi2rt.runtime.step import Floats, Int32s, Sampled, Sampling, Unusable
from pi2rt.runtime.token_mask import TokenMask, allows

Doubles = npt.NDArray[np.float64]

_MASK = (1 << 64) - 1


def sample(
    logits: Floats, sampling: Sampling, counts: Int32s, position: int, allowed: TokenMask | None = None
) -> Sampled | Unusable:
    """Picks one token, or says why none can be picked.

    Args:
        logits: float32 (vocab_size,), as the model gives them; not changed.
        sampling: how to pick.
        counts: int32 (vocab_size,), how often each token was there already (history and generated).
        position: of the token to be picked; with the seed it decides the random number.
        allowed: the tokens that may be picked; None: all.
    """
    changed = penalised(logits, sampling, counts, allowed)
    if isinstance(changed, Unusable):
        return changed
    if sampling.temperature == 0:
        token = int(np.argmax(changed))  # the lowest index among equals
    else:
        token = _draw(changed, sampling, uniform(sampling.seed, position))
    if sampling.logprobs < 0:
        return Sampled(token)
    logprobs = log_softmax(changed)
    ranked = _descending(changed)[: sampling.logprobs]
    return Sampled(token, float(logprobs[token]), tuple((int(i), float(logprobs[i])) for i in ranked))


def penalised(
    logits: Floats, sampling: Sampling, counts: Int32s, allowed: TokenMask | None = None
) -> Floats | Unusable:
    """A copy of the logits (vocab_size,) after mask, bias and penalties. Keskar et al., 2019, for the repetition
    penalty. Logits are usable while none is NaN or plus infinity and at least one is finite; each stage that ends that
    is to blame, and stages that together forbid every token are so together. Nothing changes the minus infinity of a
    token that is not allowed."""
    if not _usable(logits):
        return Unusable()
    forbidding: tuple[str, ...] = ()
    hidden = None
    if allowed is not None:
        hidden = ~allows(allowed, len(logits))
        if np.any(np.isfinite(logits) & hidden):
            forbidding = ("token_mask",)
        logits = np.where(hidden, np.float32(-np.inf), logits)
    for names, stage in (
        (("logit_bias",), _biased),
        (("repetition_penalty",), _repetition_penalised),
        (("presence_penalty", "frequency_penalty"), _count_penalised),
    ):
        with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
            changed = stage(logits, sampling, counts)
        if hidden is not None:
            changed = np.where(hidden, np.float32(-np.inf), changed)
        if not np.all(changed < np.inf):  # also where one is NaN
            return Unusable(names)
        if np.any(np.isfinite(logits) & ~np.isfinite(changed)):
            forbidding += names
        logits = changed
    return logits if _usable(logits) else Unusable(forbidding)


def _usable(logits: Floats) -> bool:
    return bool(np.all(logits < np.inf) and np.any(np.isfinite(logits)))


def _biased(logits: Floats, sampling: Sampling, counts: Int32s) -> Floats:
    logits = logits.copy()
    for token, bias in sampling.logit_bias:
        logits[token] += np.float32(bias)
    return logits


def _repetition_penalised(logits: Floats, sampling: Sampling, counts: Int32s) -> Floats:
    if sampling.repetition_penalty == 1.0:
        return logits
    penalty = np.float32(sampling.repetition_penalty)
    changed = np.where(logits > 0, logits / penalty, logits * penalty)
    return np.where(counts > 0, changed, logits)


def _count_penalised(logits: Floats, sampling: Sampling, counts: Int32s) -> Floats:
    presence, frequency = np.float32(sampling.presence_penalty), np.float32(sampling.frequency_penalty)
    return np.where(counts > 0, logits - (presence + frequency * counts.astype(np.float32)), logits)


def log_softmax(logits: npt.NDArray[np.float32]) -> Doubles:
    """Natural log probabilities over the last axis, float64."""
    shifted = logits.astype(np.float64) - np.max(logits, axis=-1, keepdims=True)
    result: Doubles = shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))
    return result


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) that depends on seed and position alone, so on nothing else in the batch."""
    return (splitmix64(seed ^ splitmix64(position)) >> 11) * 2.0**-53


def splitmix64(x: int) -> int:
    """Steele, Lea and Flood, 2014: one step of the generator whose state is ``x``, modulo 2**64."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & _MASK
    return x ^ (x >> 31)


def _draw(logits: Floats, sampling: Sampling, u: float) -> int:
    candidates = _descending(logits)
    if sampling.top_k > 0:
        candidates = candidates[: sampling.top_k]
    likeliest = logits[candidates].astype(np.float64)  # descending
    with np.errstate(over="ignore", under="ignore"):  # a temperature near 0 leaves one candidate
        weights = np.exp((likeliest - likeliest[0]) / sampling.temperature)  # of the first: 1
    mass = np.cumsum(weights)
    kept = len(weights)
    if sampling.top_p < 1.0:
        kept = int(np.searchsorted(mass, sampling.top_p * mass[-1], side="left")) + 1
    if sampling.min_p > 0.0:
        kept = min(kept, int(np.count_nonzero(weights >= sampling.min_p)))
    kept = max(1, min(kept, len(weights)))
    chosen = int(np.searchsorted(mass[:kept], u * mass[kept - 1], side="right"))
    return int(candidates[min(chosen, kept - 1)])


def _descending(logits: Floats) -> npt.NDArray[np.intp]:
    """Token ids from the likeliest on, equals by id."""
    return np.argsort(-logits, kind="stable")
