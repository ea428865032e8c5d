"""Shapes of synthetic models: what ``make_model.py`` knows by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

FeedForwardActivation: TypeAlias = Literal["silu", "relu", "drelu"]
"""``relu``: relu(gate) * up, ReGLU. ``drelu``: relu(gate) * relu(up), TurboSparse."""


@dataclass(frozen=True, slots=True)
class Shape:
    """``dim``: width of the residual stream; ``hidden``: neurons of a feed-forward block, of each expert where there
    are ``experts``, of which every token uses ``experts_used``."""

    dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    activation: FeedForwardActivation = "silu"
    experts: int = 0
    experts_used: int = 0

    @property
    def kv_dim(self) -> int:
        """Rows of the key and value projections."""
        return self.kv_heads * self.dim // self.heads


SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "bamboo-7b": Shape(4096, 14336, 32, 32, 8, 32000, "drelu"),
        "bamboo-small": Shape(2048, 7168, 8, 16, 4, 32000, "drelu"),
        "llama-13b": Shape(5120, 13824, 40, 40, 40, 32000, "relu"),
        "turbosparse-mixtral-47b": Shape(4096, 14336, 32, 32, 8, 32000, "drelu", experts=8, experts_used=2),
    }
)
"""In Q4_0, with promised activity: see ``synthetic_model.py``."""

K_QUANT_SHAPES: Mapping[str, Shape] = MappingProxyType(
    {
        "tinyllama-1.1b": Shape(2048, 5632, 22, 32, 4, 32000),
        "llama-0.5b": Shape(1536, 4096, 16, 24, 8, 32000),
    }
)
"""In Q4_K_M, without structure: see ``synthetic_k_quants.py``."""
