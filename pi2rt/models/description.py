"""What a model is, without running it: hyperparameters and a list of layers.

A layer is a list of blocks; a block reads the residual stream, adds to it, and may keep state. Executors read
this description and nothing else, so an architecture is one file that builds one of these (see ``llama.py``).
Tensors are named as the model file names them; shapes are numpy's (rows, columns): a linear map is
``y = W @ x + b``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Activation: TypeAlias = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2"]


@dataclass(frozen=True, slots=True)
class Linear:
    """``y = W @ x + b``; ``weight``: tensor of shape (outputs, inputs), ``bias``: of shape (outputs,)."""

    weight: str
    bias: str | None = None


@dataclass(frozen=True, slots=True)
class Norm:
    """RMSNorm: ``y = x * rsqrt(mean(x**2) + eps) * (weight + offset)``. Zhang and Sennrich, 2019."""

    weight: str
    eps: float
    offset: float = 0.0  # 1.0 in Gemma checkpoints from Hugging Face; GGUF files have it added already


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


@dataclass(frozen=True, slots=True)
class Attention:
    """Grouped-query attention over a KV cache. Query head ``h`` reads KV head
    ``h // (n_heads // n_kv_heads)``.

    ``window``: a query at position p sees keys in (p - window, p]; None sees all. ``softcap``: logits become
    ``softcap * tanh(logits / softcap)``. ``q_norm``/``k_norm`` act on each head, before the rotation.
    """

    norm: Norm
    q: Linear
    k: Linear
    v: Linear
    out: Linear
    n_heads: int
    n_kv_heads: int
    head_dim: int
    scale: float
    rope: Rope | None
    window: int | None = None
    softcap: float | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    post_norm: Norm | None = None  # applied to the block's output before it is added to the residual stream


@dataclass(frozen=True, slots=True)
class FeedForward:
    """``down(activation(gate(x)) * up(x))``, or ``down(activation(up(x)))`` where ``gate`` is None.

    ``up_activation`` acts on ``up(x)`` of a gated block: dReLU has ``activation="relu"`` and
    ``up_activation="relu"``.
    """

    norm: Norm
    up: Linear
    down: Linear
    hidden: int
    activation: Activation
    gate: Linear | None = None
    up_activation: Activation | None = None
    post_norm: Norm | None = None


Block: TypeAlias = Attention | FeedForward


@dataclass(frozen=True, slots=True)
class Layer:
    """Blocks in order; each one is ``x = x + post_norm(block(norm(x)))``."""

    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A decoder-only language model. ``head.weight == embedding`` where the two are tied."""

    architecture: str
    name: str
    dim: int
    vocab_size: int
    context_length: int
    embedding: str  # tensor of shape (vocab_size, dim)
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Linear
    embedding_scale: float = 1.0
    logit_softcap: float | None = None
