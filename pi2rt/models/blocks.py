"""The kinds of blocks. A block reads the residual stream, adds to it, and may keep state.

A block says itself what code outside of executors has to know of it. So a new kind is a class here or anywhere, and
one line in the table of each executor that runs it. Tensors are named as the model file names them; shapes are numpy's
(rows, columns): a linear map is ``y = W @ x + b``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from pi2rt.models.parts import Activation, Linear, Named, Norm, Rope
from pi2rt.models.states import Paged, State


class Operation(NamedTuple):
    """Names of the matrices that one operation of a step uses together. ``feed_forward``: their rows or columns are
    those of neurons. ``down``: where the operation decides which neurons are active, the matrix that has them as
    columns; where a pack stores these in bundles, the operation goes by neuron clusters."""

    matrices: tuple[str, ...]
    feed_forward: bool = False
    down: str | None = None


class Block(ABC):
    """``norm``: of the block's input. ``post_norm``: of its output, before that is added to the residual stream."""

    __slots__ = ()
    kind: ClassVar[str]
    """For messages and tables."""

    norm: Norm
    post_norm: Norm | None

    @abstractmethod
    def own_tensors(self, dim: int) -> Named:
        """Those of the block without its norms, for a model of width ``dim``."""

    def tensors(self, dim: int) -> Named:
        """All of the block."""
        yield from self.norm.tensors(dim)
        yield from self.own_tensors(dim)
        if self.post_norm is not None:
            yield from self.post_norm.tensors(dim)

    def operations(self) -> Iterator[Operation]:
        """The matrices that every step uses, in their order: those that can be streamed."""
        yield from ()

    def feed_forwards(self) -> Iterator[FeedForward]:
        """The block, if it is a feed-forward one; the experts of a mixture in the order in which their outputs are
        added."""
        yield from ()

    def routed_operations(self) -> Iterator[Operation]:
        """The matrices that a step uses only where a router chose them: those that can be kept in pages."""
        yield from ()

    def vectors_multiplied_by(self) -> Iterator[str]:
        """Names of vectors that are used as matrices of one row."""
        yield from ()

    def state(self) -> State | None:
        """What it keeps of a sequence between two steps."""
        return None


@dataclass(frozen=True, slots=True)
class Attention(Block):
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

    kind: ClassVar[str] = "attention"

    def own_tensors(self, dim: int) -> Named:
        heads, kv_heads = self.n_heads * self.head_dim, self.n_kv_heads * self.head_dim
        yield from self.q.tensors(heads, dim)
        yield from self.k.tensors(kv_heads, dim)
        yield from self.v.tensors(kv_heads, dim)
        for norm in (self.q_norm, self.k_norm):
            if norm is not None:
                yield from norm.tensors(self.head_dim)
        yield from self.out.tensors(dim, heads)

    def operations(self) -> Iterator[Operation]:
        yield Operation((self.q.weight, self.k.weight, self.v.weight))
        yield Operation((self.out.weight,))

    def state(self) -> State | None:
        return Paged(self.n_kv_heads, self.head_dim, self.window)


@dataclass(frozen=True, slots=True)
class FeedForward(Block):
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

    kind: ClassVar[str] = "feed-forward"

    def own_tensors(self, dim: int) -> Named:
        if self.gate is not None:
            yield from self.gate.tensors(self.hidden, dim)
        yield from self.up.tensors(self.hidden, dim)
        yield from self.down.tensors(dim, self.hidden)

    def operations(self) -> Iterator[Operation]:
        yield from _neuron_operations(self.up, self.gate, self.down)

    def feed_forwards(self) -> Iterator[FeedForward]:
        yield self


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
class MixtureOfExperts(Block):
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

    kind: ClassVar[str] = "mixture of experts"

    def own_tensors(self, dim: int) -> Named:
        yield from self.router.tensors(self.n_experts, dim)
        into, back = (self.hidden, dim), (dim, self.hidden)
        for (
            gate,
            up,
            down,
        ) in self._matrices():  # there are thousands: neither blocks nor iterators are made for each
            for linear, shape in ((gate, into), (up, into), (down, back)):
                if linear is not None:
                    yield linear.weight, shape
                    if linear.bias is not None:
                        yield linear.bias, shape[:1]
        if self.shared is not None:
            yield self.shared.router, self.shared.router_shape
        if (shared := self.shared_expert()) is not None:
            yield from shared.own_tensors(dim)

    def feed_forwards(self) -> Iterator[FeedForward]:
        yield from map(self.expert, range(self.n_experts))
        if (shared := self.shared_expert()) is not None:
            yield shared

    def routed_operations(self) -> Iterator[Operation]:
        for gate, up, down in self._matrices():
            yield from _neuron_operations(up, gate, down)

    def vectors_multiplied_by(self) -> Iterator[str]:
        if self.shared is not None:
            yield self.shared.router

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

    def _matrices(self) -> Iterator[tuple[Linear | None, Linear, Linear]]:
        """Gate, up and down of each expert that the router chooses from."""
        gates = (None,) * self.n_experts if self.gate is None else self.gate
        return zip(gates, self.up, self.down, strict=True)


def _neuron_operations(up: Linear, gate: Linear | None, down: Linear) -> Iterator[Operation]:
    together = (up.weight,) if gate is None else (up.weight, gate.weight)
    yield Operation(together, feed_forward=True, down=down.weight)
    yield Operation((down.weight,), feed_forward=True)
