"""What a model is, without running it: hyperparameters and a list of layers.

A layer is a list of blocks; a block reads the residual stream, adds to it, and may keep state. Executors read
this description and nothing else, so an architecture is one file that builds one of these (see ``llama.py``).
Tensors are named as the model file names them; shapes are numpy's (rows, columns): a linear map is
``y = W @ x + b``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pi2rt.models.states import BlockState, Paged, State

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

    def state(self) -> State | None:
        return Paged(self.n_kv_heads, self.head_dim, self.window)


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

    def state(self) -> State | None:
        return None


@dataclass(frozen=True, slots=True)
class SharedExpert:
    """An expert that every token uses, its output times ``sigmoid(router . x)``; activations as its mixture has them.

    ``router``: tensor of ``router_shape``, (dim,) or (1, dim), as the file has it.
    """

    up: Linear
    down: Linear
    hidden: int
    router: str
    router_shape: tuple[int, ...]
    gate: Linear | None = None


@dataclass(frozen=True, slots=True)
class MixtureOfExperts:
    """The sum over the ``n_used`` experts whose router logits are largest of weight times
    ``down(activation(gate(x)) * up(x))``, and of the shared expert's output. Shazeer et al., 2017.

    Of equal logits the one of the lower expert goes first. Weights are the softmax over the logits of the chosen where
    ``normalized`` (the same as one over all, divided by the sum of the chosen), and else the softmax over all, which
    sums to less than 1. ``hidden``: neurons of each expert. ``gate``, ``activation`` and ``up_activation`` as
    ``FeedForward`` has them.
    """

    norm: Norm
    router: Linear  # of shape (n_experts, dim)
    up: tuple[Linear, ...]  # of each expert
    down: tuple[Linear, ...]
    hidden: int
    n_experts: int
    n_used: int
    normalized: bool
    activation: Activation
    gate: tuple[Linear, ...] | None = None
    up_activation: Activation | None = None
    shared: SharedExpert | None = None
    post_norm: Norm | None = None

    def state(self) -> State | None:
        return None

    def expert(self, number: int) -> FeedForward:
        """One of them by itself: what it does to the block's normalised input."""
        gate = None if self.gate is None else self.gate[number]
        up, down = self.up[number], self.down[number]
        return FeedForward(self.norm, up, down, self.hidden, self.activation, gate, self.up_activation)

    def shared_expert(self) -> FeedForward | None:
        """The shared one, before its weight."""
        if self.shared is None:
            return None
        up, down, hidden, gate = self.shared.up, self.shared.down, self.shared.hidden, self.shared.gate
        return FeedForward(self.norm, up, down, hidden, self.activation, gate, self.up_activation)

    def experts(self) -> Iterator[FeedForward]:
        """All of them in the order in which their outputs are added: the shared one last."""
        yield from map(self.expert, range(self.n_experts))
        shared = self.shared_expert()
        if shared is not None:
            yield shared


Block: TypeAlias = Attention | FeedForward | MixtureOfExperts


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

    def states(self) -> tuple[BlockState, ...]:
        """What the blocks keep of a sequence, in their order; those that keep nothing are left out."""
        return tuple(
            BlockState(i, j, state)
            for i, layer in enumerate(self.layers)
            for j, block in enumerate(layer.blocks)
            if (state := block.state()) is not None
        )

    def feed_forwards(self) -> Iterator[FeedForward]:
        """Every feed-forward block in order, the experts of mixtures among them."""
        for layer in self.layers:
            for block in layer.blocks:
                yield from feed_forwards(block)


def feed_forwards(block: Block) -> Iterator[FeedForward]:
    """The block, if it is one; a mixture's experts."""
    if isinstance(block, FeedForward):
        yield block
    elif isinstance(block, MixtureOfExperts):
        yield from block.experts()
