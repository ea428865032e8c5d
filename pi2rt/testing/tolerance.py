"""How far an executor's numbers may be from the reference and from its own, and what follows for a token.

Vendor units multiply and add in other formats and orders, so what is bit for bit on one executor is a small error on
another. Two logits that are nearer than that error are a near tie: either token is right.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from pi2rt.executors.reference.sampling import sample
from pi2rt.runtime.step import Floats, Int32s, Sampled, Sampling

NEAR_TIE = 8.0
"""Two logits are a near tie where they differ by less than so many errors: of each the error is one RMS, so of their
difference it is the root of two, and six times that is not seen in a vocabulary."""

HOST_ERROR = 1e-6
"""Relative error of bias, penalties and softmax on the same logits, float32 in any order."""

_TRIALS = 32


@dataclass(frozen=True, slots=True)
class Tolerance:
    """What the suite allows. Errors of logits are relative: of one position, the norm of the difference over the norm
    of the expected logits.

    ``reference``: error against the reference. ``within``: the share of positions that keep to it; less than 1.0 only
    for an inexact unit and a model with a router, which at a near tie chooses another expert. ``top1``: the share of
    positions where the most likely token is that of the reference, near ties not counted. ``repeat``: error between
    two ways to compute the same on this executor (chunks, batches, pages, another start of the program); 0.0 asks for
    the same bits. ``scores``: absolute error of a log probability against the logits of the same step.
    """

    reference: float = 1e-3
    within: float = 1.0
    top1: float = 1.0
    repeat: float = 0.0
    scores: float = 1e-3


def relative_errors(got: Floats, expected: Floats) -> Floats:
    """For each position, of logits (t, vocab_size): float32 (t,), infinite where one is not finite."""
    with np.errstate(all="ignore"):
        difference = np.linalg.norm(got.astype(np.float64) - expected, axis=-1)
        errors = difference / np.maximum(np.linalg.norm(expected.astype(np.float64), axis=-1), 1e-30)
    return np.where(np.isfinite(errors), errors, np.inf).astype(np.float32)


def near_ties(logits: Floats, chosen: Int32s, error: float) -> npt.NDArray[np.bool_]:
    """Whether, by position of logits (t, vocab_size), the ``chosen`` token (t,) is the most likely one or in a near tie
    with it: bool (t,)."""
    rms = np.sqrt(np.mean(np.square(logits), axis=-1))
    behind = logits.max(axis=-1) - np.take_along_axis(logits, chosen[:, None], axis=-1)[:, 0]
    near: npt.NDArray[np.bool_] = behind <= NEAR_TIE * error * rms
    return near


def allowed_tokens(
    logits: Floats, sampling: Sampling, counts: Int32s, position: int, error: float = HOST_ERROR
) -> frozenset[int]:
    """The tokens that may be sampled from logits (vocab_size,) that are known up to a relative ``error``: what the
    reference picks from them, and from the same logits with random errors of that size. Arguments as
    ``reference.sampling.sample`` has them. Empty where the logits are unusable.
    """
    random = np.random.RandomState(position)
    spread = np.float32(error * np.sqrt(np.mean(np.square(logits))))
    tokens = []
    for trial in range(_TRIALS):
        noise = random.standard_normal(len(logits)).astype(np.float32) * spread if trial else np.float32(0)
        picked = sample(logits + noise, sampling, counts, position)
        if isinstance(picked, Sampled):
            tokens.append(picked.token)
    return frozenset(tokens)
