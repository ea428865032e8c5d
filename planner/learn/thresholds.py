"""Thresholds below which a neuron of a SiLU or GELU block is inactive. No training, only statistics of some text.

A neuron is active where the magnitude of its activated gate is above its threshold t:

- CATS (Lee et al., 2024, arXiv:2404.08763): one t for all neurons of a block, the quantile of the magnitudes at the
  wanted share.
- CHESS (He et al., EMNLP 2024, arXiv:2409.01366, its channel-wise thresholding): what is lost with a neuron is about
  its gate's magnitude times the mean magnitude of its up. The quantile of that product over all neurons, divided by
  the mean of its own up, is a neuron's t.

Quantiles are taken of each text and averaged, as the authors of CHESS do.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from pi2rt.formats.calibration import METHODS, BlockCalibration, Floats, Method, recorded, recorded_shares


@dataclass(frozen=True, slots=True)
class Activations:
    """What is kept of a block for its thresholds. ``gates``: of each text the magnitudes of the activated gates,
    float32 (tokens, neurons); ``up``: of each neuron the mean magnitude of its up, float32 (neurons,), 1 in a block
    without gate."""

    gates: tuple[Floats, ...]
    up: Floats

    @classmethod
    def of(cls, factors: Iterable[tuple[Floats, Floats | None]]) -> Activations:
        """From what ``executors.layer_walk`` shows of a block; no gates where no text has tokens."""
        gates, sums, tokens = [], np.zeros(1), 0
        for gate, up in factors:
            if not len(gate):  # of an expert that no token of this text has chosen
                continue
            gates.append(np.abs(gate))
            tokens += len(gate)
            sums = sums + (len(gate) if up is None else np.abs(up).sum(0, dtype=np.float64))
        if not gates:
            return cls((), np.ones(0, np.float32))
        means = np.broadcast_to(sums / tokens, gates[0].shape[1:])
        return cls(tuple(gates), np.ascontiguousarray(means, np.float32))

    def firing(self, thresholds: Floats) -> Floats:
        """Of each neuron the share of tokens whose gate is above its threshold: float32 (neurons,). ``thresholds``:
        (1,) or (neurons,)."""
        fired = sum(np.count_nonzero(gate > thresholds, axis=0) for gate in self.gates)
        return np.asarray(fired / sum(len(gate) for gate in self.gates), np.float32)


def cats(activations: Activations, wanted: float) -> Floats:
    """One threshold, float32 (1,), under which lies the share ``wanted`` of all magnitudes."""
    return np.array([np.mean([_quantile(gate, wanted) for gate in activations.gates])], np.float32)


def chess(activations: Activations, wanted: float) -> Floats:
    """A threshold for each neuron, float32 (neurons,); the largest finite number where its up was always zero."""
    up = activations.up
    level = np.mean([_quantile(gate * up, wanted) for gate in activations.gates])
    if level == 0:  # enough of them are inactive without thresholds
        return np.zeros_like(up)
    most = np.finfo(np.float32).max
    with np.errstate(divide="ignore", over="ignore"):
        return np.minimum(np.where(up > 0, np.float32(level) / up, most), most).astype(np.float32)


def calibrate_block(layer: int, down: str, activations: Activations, wanted: float) -> BlockCalibration:
    """The record of a block: how often its neurons are active, and thresholds by each method at which about the share
    ``wanted`` of them is inactive."""
    values: dict[Method, Floats] = {"cats": cats(activations, wanted), "chess": chess(activations, wanted)}
    return BlockCalibration(
        layer,
        down,
        len(activations.up),
        recorded_shares(activations.firing(np.zeros(1, np.float32))),
        {method: recorded(each, activations.firing(each)) for method, each in values.items()},
        tokens=sum(map(len, activations.gates)),
    )


def exact_block(layer: int, down: str, neurons: int) -> BlockCalibration:
    """The record of an expert that no token has chosen: its thresholds are zero."""
    every, none = np.ones(neurons, np.float32), np.zeros(1, np.float32)
    thresholds = {method: recorded(none, every) for method in METHODS}
    return BlockCalibration(layer, down, neurons, recorded_shares(every), thresholds, tokens=0)


def _quantile(values: Floats, share: float) -> float:
    """The smallest value so that at least this share is not above it."""
    place = min(values.size - 1, max(0, math.ceil(share * values.size) - 1))
    return float(np.partition(values, place, axis=None)[place])
