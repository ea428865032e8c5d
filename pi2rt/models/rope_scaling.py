"""The mathematics of rotary position embeddings and of stretching them, in float64.

Su et al., 2021 (RoPE); Chen et al., 2023 (linear); bloc97 and emozilla, 2023 (dynamic NTK); Peng et al., 2023
(YaRN); Ding et al., 2024 (LongRoPE); Meta, 2024 (Llama 3.1). All return inverse frequencies of shape (dims /
2,).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

Frequencies = npt.NDArray[np.float64]


def plain(dims: int, base: float) -> Frequencies:
    exponents = np.arange(0, dims, 2, dtype=np.float64) / dims
    return np.asarray(np.power(base, -exponents), np.float64)


def linear(frequencies: Frequencies, factor: float) -> Frequencies:
    return frequencies / factor


def dynamic_ntk(dims: int, base: float, factor: float, trained: int, context: int) -> Frequencies:
    """The base grows with the context; up to the trained context nothing changes."""
    context = max(context, trained)
    stretched = factor * context / trained - (factor - 1)
    return plain(dims, base * stretched ** (dims / (dims - 2)) if dims > 2 else base)


def llama3(frequencies: Frequencies, factor: float, low: float, high: float, original: int) -> Frequencies:
    """Wavelengths above ``original / low`` are stretched by ``factor``, those below ``original / high`` are
    left, and in between the two are blended."""
    turns = original * frequencies / (2 * math.pi)  # of each pair over the original context
    keep = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - keep) * frequencies / factor + keep * frequencies


def yarn(
    dims: int,
    base: float,
    factor: float,
    original: int,
    *,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    truncate: bool = True,
    extrapolation: float = 1.0,
) -> Frequencies:
    """Pairs that turn more than ``beta_fast`` times over the original context keep their frequency, those
    that turn less than ``beta_slow`` times are stretched by ``factor``, with a linear ramp between."""

    def pair_of(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = pair_of(beta_fast), pair_of(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    keep = extrapolation * (1 - np.clip((np.arange(dims // 2) - low) / (high - low), 0.0, 1.0))
    frequencies = plain(dims, base)
    stretched: Frequencies = frequencies / factor * (1 - keep) + frequencies * keep
    return stretched


def yarn_magnitude(factor: float, mscale: float = 1.0, mscale_all_dim: float = 0.0) -> float:
    def one(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    return one(mscale) / one(mscale_all_dim) if mscale and mscale_all_dim else one(1.0)


def longrope_magnitude(factor: float, original: int) -> float:
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
