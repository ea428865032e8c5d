"""What a block remembers of a sequence between two steps: pages that grow with it, or arrays of a fixed size."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

PAGE_TOKENS = 64
"""Positions in one KV page."""


@dataclass(frozen=True, slots=True)
class Paged:
    """Keys and values of every position, in pages. ``window``: only of the last so many positions; None: of all."""

    kv_heads: int
    head_dim: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class FixedArray:
    """One array of a slot, such as a convolution window (channels, width - 1) or an SSM state (heads, d, n)."""

    name: str
    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize


@dataclass(frozen=True, slots=True)
class Fixed:
    """Arrays that each token updates in place: what was before is gone. They are those of the slot that a slice names,
    and zeros where it starts at position 0."""

    arrays: tuple[FixedArray, ...]


State: TypeAlias = Paged | Fixed


@dataclass(frozen=True, slots=True)
class BlockState:
    """The state of block ``block`` of layer ``layer``."""

    layer: int
    block: int
    state: State
