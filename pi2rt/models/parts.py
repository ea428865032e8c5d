"""What blocks are made of: linear maps, norms, rotations. Each names its tensors and says their shapes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]

Named: TypeAlias = Iterator[tuple[str, tuple[int, ...]]]
"""Names and shapes (numpy's: rows first) of tensors, in the order of their use."""


@dataclass(frozen=True, slots=True)
class Linear:
    """``y = W @ x + b``; ``weight``: tensor of shape (outputs, inputs), ``bias``: of shape (outputs,)."""

    weight: str
    bias: str | None = None

    def tensors(self, outputs: int, inputs: int) -> Named:
        yield self.weight, (outputs, inputs)
        if self.bias is not None:
            yield self.bias, (outputs,)


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm: ``y = x * rsqrt(mean(x**2) + eps) * (weight + offset)``. Zhang and Sennrich, 2019."""

    weight: str
    eps: float
    offset: float = 0.0  # 1.0 in Gemma checkpoints from Hugging Face; GGUF files have it added already

    def tensors(self, dim: int) -> Named:
        yield self.weight, (dim,)


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary position embedding with its scaling already folded into the frequencies (``models/rope.py``).

    Pair ``i`` of a head is rotated by ``position * inverse_frequencies[i]``; cosine and sine are multiplied
    by ``magnitude`` (YaRN). ``interleaved`` pairs (2i, 2i+1), ``halves`` pairs (i, i + dims/2). Elements from
    ``2 * len(inverse_frequencies)`` on pass through.
    """

    style: Literal["interleaved", "halves"]
    inverse_frequencies: tuple[float, ...]
    magnitude: float = 1.0
