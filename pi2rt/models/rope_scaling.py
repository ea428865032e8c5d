"""The mathematics of rotary position embeddings and of stretching them, in float64.

The same bits on every machine, since those of every output depend on them: powers and logarithms are rounded once from
decimals of 40 digits; everything else is what IEEE 754 rounds correctly (+ - * / and square roots). ``np.power`` and
``math.pow`` are not used: they differ in the last bit between instruction sets and C libraries.

Su et al., 2021 (RoPE); Chen et al., 2023 (linear); bloc97 and emozilla, 2023 (dynamic NTK); Peng et al., 2023
(YaRN); Ding et al., 2024 (LongRoPE); Meta, 2024 (Llama 3.1). All return inverse frequencies of shape (dims /
2,).
"""

from __future__ import annotations

import math
from decimal import Context, Decimal

import numpy as np
import numpy.typing as npt

Frequencies = npt.NDArray[np.float64]

_DECIMALS = Context(prec=40, Emin=-10_000, Emax=10_000, traps=[])


def power(base: float, exponent: float) -> float:
    """``base ** exponent`` of a positive base, the nearest float."""
    return float(_DECIMALS.power(Decimal(base), Decimal(exponent)))


def log(x: float) -> float:
    """The natural logarithm of a positive number, the nearest float."""
    return float(_DECIMALS.ln(Decimal(x)))


def plain(dims: int, base: float) -> Frequencies:
    return np.array([power(base, -(i / dims)) for i in range(0, dims, 2)], np.float64)


def linear(frequencies: Frequencies, factor: float) -> Frequencies:
    return frequencies / factor


def dynamic_ntk(dims: int, base: float, factor: float, trained: int, context: int) -> Frequencies:
    """The base grows with the context; up to the trained context nothing changes."""
    context = max(context, trained)
    stretched = factor * context / trained - (factor - 1)
    return plain(dims, base * power(stretched, dims / (dims - 2)) if dims > 2 else base)


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
        return dims * log(original / (turns * 2 * math.pi)) / (2 * log(base))

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
        return 0.1 * scale * log(factor) + 1.0 if factor > 1 else 1.0

    return one(mscale) / one(mscale_all_dim) if mscale and mscale_all_dim else one(1.0)


def longrope_magnitude(factor: float, original: int) -> float:
    return math.sqrt(1 + log(factor) / log(original)) if factor > 1 else 1.0
