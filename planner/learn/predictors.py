"""Low-rank predictors of which neurons of a ReLU block are active, for packs whose gates are not in memory.

A gate's product is linear in the block's input, so the best predictor of a given rank is the best approximation of
the gate matrix of that rank, as far as inputs go that occur: with G, (tokens, neurons), the products of some text,
each neuron's divided by its standard deviation d, and V, (neurons, rank), the first right singular vectors of G,

    G ~ (G V) V^T,  and  G V = x (V^T D^-1 W)^T:   first = V^T D^-1 W, (rank, dim);  second = V, (neurons, rank).

V comes from a randomised subspace iteration (Halko, Martinsson and Tropp, 2011). What is left over has a standard
deviation s for each neuron; a neuron is taken to be active where the prediction is above -k s. One k for the block is
chosen on text that was not used for V, so that the wanted share of active neurons is found (its recall), whatever the
precision."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pi2rt.formats.predictor import Predictor
from pi2rt.runtime.step import Floats

ITERATIONS = 3
OVERSAMPLING = 16
HELD_BACK = 4
"""The last of so many parts of the text is for choosing k."""

MARGIN = 0.25
"""Of the active neurons that may be missed, the share that is aimed at: other text is harder."""


@dataclass(frozen=True, slots=True)
class Quality:
    """On text that was not used for it: ``recall``, share of active neurons that were foreseen; ``precision``, share of
    those foreseen that are active; ``asked``, share of all neurons that are foreseen."""

    recall: float
    precision: float
    asked: float


def default_rank(dim: int) -> int:
    """A sixteenth of the model's width, in whole vectors: in half precision less than a third of gates in 4 bits."""
    return max(16, -(-dim // 16 // 16) * 16)


def train(
    products: Sequence[Floats], weight: Floats, bias: Floats | None, rank: int, recall: float
) -> Predictor:
    """A predictor of one block.

    Args:
        products: of each text those of the gate, with its bias, float32 (tokens, neurons).
        weight: the gate, float32 (neurons, dim). bias: float32 (neurons,).
        rank: of the predictor; no more than there are inputs, neurons or tokens is used.
        recall: share of active neurons that are to be found, below 1.
    """
    offset = np.zeros(len(weight), np.float32) if bias is None else bias
    both = np.concatenate(products)
    used = max(1, len(both) - len(both) // HELD_BACK)
    linear = both - offset
    spread = np.maximum(np.std(linear[:used], axis=0), np.finfo(np.float32).tiny ** 0.5)
    scaled = linear / spread
    v = _subspace(scaled[:used], min(rank, *weight.shape, used))
    predicted = (scaled @ v) @ v.T
    left = np.std(scaled[:used] - predicted[:used], axis=0) + np.float32(1e-6)
    first, second = v.T @ (weight / spread[:, None]), v
    shrink = max(1.0, float(np.abs(first).max()) / 1e3)  # half precision ends at 65504
    k = _margin((predicted + offset / spread)[used:] / left, both[used:] > 0, recall)
    return Predictor(
        (first / shrink).astype(np.float16),
        second.astype(np.float16),
        np.asarray((offset / spread + k * left) / shrink, np.float32),
    )


def ask_for_all(neurons: int, dim: int) -> Predictor:
    """Of an expert about which nothing is known: every neuron may be active."""
    nothing = np.zeros((1, dim), np.float16), np.zeros((neurons, 1), np.float16)
    return Predictor(*nothing, np.ones(neurons, np.float32))


def measure(predictor: Predictor, inputs: Sequence[Floats], products: Sequence[Floats]) -> Quality:
    """How good it is. Where nothing is active, all that does is found.

    Args:
        predictor: of one block.
        inputs: of each text what the gate is applied to, float32 (tokens, dim).
        products: of each text those of the gate, with its bias.
    """
    found = firing = asked = total = 0
    first, second = predictor.first.astype(np.float32), predictor.second.astype(np.float32)
    for x, product in zip(inputs, products, strict=True):
        foreseen = (x @ first.T) @ second.T + predictor.bias > 0
        fires = product > 0
        found += int(np.count_nonzero(foreseen & fires))
        firing += int(np.count_nonzero(fires))
        asked += int(np.count_nonzero(foreseen))
        total += foreseen.size
    return Quality(found / firing if firing else 1.0, found / max(1, asked), asked / total if total else 1.0)


def _subspace(values: Floats, rank: int) -> Floats:
    """The first right singular vectors of (tokens, neurons), as columns: (neurons, rank)."""
    width = min(rank + OVERSAMPLING, *values.shape)
    random = np.random.default_rng(0)
    basis = values.T @ random.standard_normal((len(values), width)).astype(np.float32)
    for _ in range(ITERATIONS):
        basis = np.linalg.qr(basis)[0]
        basis = values.T @ (values @ basis)
    basis = np.linalg.qr(basis)[0]
    _, _, right = np.linalg.svd(values @ basis, full_matrices=False)
    return np.asarray(basis @ right[:rank].T, np.float32)


def _margin(scores: Floats, fires: np.ndarray[tuple[int, ...], np.dtype[np.bool_]], recall: float) -> float:
    """k so that of the neurons that are active the wanted share has a score above -k; not below 0."""
    found = np.sort(-scores[fires])
    if not len(found):
        return 0.0
    missed = (1 - recall) * MARGIN
    return max(0.0, float(found[min(len(found) - 1, math.ceil((1 - missed) * len(found)) - 1)]) + 1e-4)
