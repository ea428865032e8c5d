"""The forward pass in plain numpy float32: what the blocks of a description mean.

Shapes in comments: t tokens of one sequence, n positions it has after them, h query heads, g key-value heads,
d elements of a head.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from pi2rt.memory import BlockPages, StateStore
from pi2rt.models import (
    Activation,
    Attention,
    Block,
    FeedForward,
    Linear,
    MixtureOfExperts,
    ModelDescription,
    Norm,
    Rope,
)
from pi2rt.runtime.step import Floats, Int32s, StateCopy

Weights = Mapping[str, Floats]
Mark = tuple[str, int, int]
"""(block, start, end), in nanoseconds of ``time.perf_counter_ns``."""

LOGIT_ROWS = 64  # rows of logits at once, which bounds memory


class StoppedError(Exception):
    """The forward pass was asked to stop between two layers."""


class Place(NamedTuple):
    """Where a block stands, and in which sequence: ``start`` positions are before its rows; ``table``: int32, the
    sequence's page table; ``slot``: of its fixed arrays."""

    layer: int
    number: int
    start: int
    table: Int32s
    slot: int = 0


class ReferenceModel:
    """A model, all of whose blocks are of kinds in ``BLOCKS``, and the KV pages that it works on.

    Functions in ``BLOCKS`` compute with ``linear``, ``norm``, ``pages``, ``arrays`` and ``weights``.

    Args:
        model: what to compute.
        weights: float32 arrays by tensor name, shaped as ``iterate_tensors`` says.
        store: of the pages. Keys and values are rounded to its type.
    """

    def __init__(self, model: ModelDescription, weights: Weights, store: StateStore) -> None:
        self.model = model
        self.weights = weights
        self._store = store  # which the arrays below do not keep
        self._pages = store.blocks()

    def copy(self, copy: StateCopy) -> None:
        """Replaces a page or a slot by another one."""
        if copy.kind == "page":
            self._store.copy_page(copy.source, copy.target)
        else:
            self._store.copy_slot(copy.source, copy.target)

    def forward(
        self,
        tokens: Int32s,
        start: int,
        pages: Int32s,
        slot: int = 0,
        *,
        should_stop: Callable[[], bool] = lambda: False,
        marks: list[Mark] | None = None,
    ) -> Floats:
        """Runs all layers over consecutive tokens of one sequence and writes their keys and values.

        Args:
            tokens: int32 (t,), at positions ``start`` on.
            start: positions before them, whose keys and values are in the cache.
            pages: int32, the sequence's page table.
            slot: of the sequence's fixed arrays, where blocks keep any.
            should_stop: asked before every layer.
            marks: gets one entry for each block.

        Returns:
            The residual stream after the last layer, (t, dim), before the final norm.

        Raises:
            StoppedError: ``should_stop`` said so.
        """
        x = self.weights[self.model.embedding][tokens] * np.float32(self.model.embedding_scale)  # (t, dim)
        for i, layer in enumerate(self.model.layers):
            if should_stop():
                raise StoppedError
            for j, block in enumerate(layer.blocks):
                begun = time.perf_counter_ns()
                x = self.behind(i, j, x, start, pages, slot)
                if marks is not None:
                    marks.append((f"{i} {type(block).__name__}", begun, time.perf_counter_ns()))
        return x

    def behind(self, layer: int, number: int, x: Floats, start: int, pages: Int32s, slot: int = 0) -> Floats:
        """The residual stream (t, dim) behind a block, from the one before it. Arguments as ``forward``."""
        block = self.model.layers[layer].blocks[number]
        place = Place(layer, number, start, pages, slot)
        y = BLOCKS[type(block)](self, block, self.normalized(block, x), place)
        return self.add(block, x, y)

    def normalized(self, block: Block, x: Floats) -> Floats:
        """A block's input, of the stream (t, dim) before it."""
        return self.norm(block.norm, x)

    def factors(self, block: FeedForward, x: Floats) -> tuple[Floats, Floats | None]:
        """Of a block's input (t, dim) the two factors of its hidden values, (t, hidden) each: the activated gate and up
        after its own activation; or, without gate, the activated up and None."""
        up = self.linear(block.up, x)  # (t, hidden)
        if block.gate is None:
            return activate(block.activation, up), None
        if block.up_activation is not None:
            up = activate(block.up_activation, up)
        return activate(block.activation, self.linear(block.gate, x)), up

    def gate_product(self, block: FeedForward, x: Floats) -> tuple[Floats, Floats]:
        """A gated block's input, (t, dim), and what the gate makes of it, (t, hidden)."""
        assert block.gate is not None
        return x, self.linear(block.gate, x)

    def down(self, block: FeedForward, hidden: Floats) -> Floats:
        """A block's output, (t, dim), of its hidden values."""
        return self.linear(block.down, hidden)

    def route(self, block: MixtureOfExperts, x: Floats) -> tuple[npt.NDArray[np.intp], Floats]:
        """The experts that each token of a block's input chooses, and their weights: (t, n) each, of which the last
        column is the shared expert's, number ``n_experts``, where there is one."""
        logits = self.linear(block.router, x)  # (t, n_experts)
        chosen = np.argsort(-logits, axis=-1, kind="stable")[:, : block.n_used]  # (t, n_used)
        weights: Floats  # (t, n_used)
        if block.normalized:
            weights = _softmax(np.take_along_axis(logits, chosen, axis=-1))
        else:
            weights = np.take_along_axis(_softmax(logits), chosen, axis=-1)
        if block.shared is not None:
            weight = _sigmoid(x @ self.weights[block.shared.router].reshape(-1, 1))  # (t, 1)
            weights = np.concatenate([weights, weight], axis=-1)
            chosen = np.concatenate([chosen, np.full((len(x), 1), block.n_experts)], axis=-1)
        return chosen, weights

    def add(self, block: Block, x: Floats, y: Floats) -> Floats:
        """The stream behind a block, from the one before it and the block's output."""
        return x + (y if block.post_norm is None else self.norm(block.post_norm, y))

    def logits(self, x: Floats) -> Floats:
        """(t, dim) to (t, vocab_size)."""
        out = np.empty((len(x), self.model.vocab_size), np.float32)
        for i in range(0, len(x), LOGIT_ROWS):
            rows = slice(i, i + LOGIT_ROWS)
            y = self.linear(self.model.head, self.norm(self.model.final_norm, x[rows]))
            out[rows] = _softcap(y, self.model.logit_softcap)
        return out

    # -- what blocks compute with

    def linear(self, linear: Linear, x: Floats) -> Floats:
        """A matrix of the description times x, (t, columns) to (t, rows), and its bias, where it has one."""
        y: Floats = x @ self.weights[linear.weight].T
        return y if linear.bias is None else y + self.weights[linear.bias]

    def norm(self, norm: Norm, x: Floats) -> Floats:
        """RMS norm over the last axis."""
        mean = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
        weight = self.weights[norm.weight] + np.float32(norm.offset)
        y: Floats = x / np.sqrt(mean + np.float32(norm.eps)) * weight
        return y

    def pages(self, place: Place) -> BlockPages:
        """Keys and values of a block that keeps them, of all sequences."""
        return self._pages[place.layer, place.number]

    def arrays(self, place: Place) -> dict[str, npt.NDArray[Any]]:
        """Fixed arrays of a block in the sequence's slot, by name; views, to be updated. Zeros where the sequence
        begins."""
        found = {
            each.array.name: self._store.array(place.slot, each)
            for each in self._store.layout.fixed
            if (each.layer, each.block) == (place.layer, place.number)
        }
        if place.start == 0:
            for values in found.values():
                values.fill(0)
        return found


def rotate(rope: Rope, x: Floats, positions: npt.NDArray[np.int64]) -> Floats:
    """Rotates the heads (t, heads, d) of tokens at ``positions`` (t,). Angles are float64: at position 100
    000 those of float32 would be off by a hundredth of a radian."""
    angles = positions[:, None, None] * np.array(rope.inverse_frequencies)  # (t, 1, pairs)
    cos = (np.cos(angles) * rope.magnitude).astype(np.float32)
    sin = (np.sin(angles) * rope.magnitude).astype(np.float32)
    pairs = len(rope.inverse_frequencies)
    if rope.style == "interleaved":
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    a, b = x[..., first], x[..., second]
    out = x.copy()
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out


def activate(kind: Activation, x: Floats) -> Floats:
    """Element by element; float32 in and out."""
    y: Floats
    if kind == "silu":
        with np.errstate(over="ignore"):  # exp of a large number: the quotient is 0, as it should be
            y = x / (1 + np.exp(-x))
    elif kind == "gelu":
        y = np.float32(0.5) * x * (1 + _erf(x * np.float32(math.sqrt(0.5))))
    elif kind == "gelu_tanh":
        cube = np.float32(0.044715) * x * x * x
        y = np.float32(0.5) * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + cube)))
    elif kind == "relu":
        y = np.maximum(x, 0)
    elif kind == "relu2":
        y = np.square(np.maximum(x, 0))
    else:
        raise ValueError(f"unknown activation {kind!r}")
    return y


def _sigmoid(x: Floats) -> Floats:
    with np.errstate(over="ignore"):  # as in activate
        y: Floats = np.reciprocal(1 + np.exp(-x))
    return y


def _erf(x: Floats) -> Floats:
    return np.vectorize(math.erf, otypes=[np.float32])(x)  # type: ignore[no-any-return]


def _softmax(scores: Floats) -> Floats:
    weights = np.exp(scores - np.max(scores, axis=-1, keepdims=True))
    result: Floats = weights / np.sum(weights, axis=-1, keepdims=True)
    return result


def _softcap(x: Floats, cap: float | None) -> Floats:
    return x if cap is None else np.tanh(x / np.float32(cap)) * np.float32(cap)


def attention(model: ReferenceModel, block: Attention, x: Floats, place: Place) -> Floats:
    start, table, pages = place.start, place.table, model.pages(place)
    t, d = len(x), block.head_dim
    q = model.linear(block.q, x).reshape(t, block.n_heads, d)  # (t, h, d)
    k = model.linear(block.k, x).reshape(t, block.n_kv_heads, d)  # (t, g, d)
    v = model.linear(block.v, x).reshape(t, block.n_kv_heads, d)  # (t, g, d)
    if block.q_norm is not None:
        q = model.norm(block.q_norm, q)
    if block.k_norm is not None:
        k = model.norm(block.k_norm, k)
    positions = np.arange(start, start + t)
    if block.rope is not None:
        q, k = rotate(block.rope, q, positions), rotate(block.rope, k, positions)

    pages.write(table, start, k, v)
    end = start + t
    first = 0 if block.window is None else max(0, start + 1 - block.window)  # what is before may be gone
    keys, values = pages.read(table, end, first)  # (n, g, d) each

    seen = np.arange(first, end) <= positions[:, None]  # (t, n)
    if block.window is not None:
        seen &= np.arange(first, end) > positions[:, None] - block.window
    hidden = np.where(seen, np.float32(0), np.float32(-np.inf))
    group = block.n_heads // block.n_kv_heads
    out = np.empty((t, block.n_heads, d), np.float32)
    for head in range(block.n_heads):
        scores = q[:, head] @ keys[:, head // group].T * np.float32(block.scale)  # (t, n)
        weights = _softmax(_softcap(scores, block.softcap) + hidden)
        out[:, head] = weights @ values[:, head // group]
    return model.linear(block.out, out.reshape(t, -1))


def feed_forward(model: ReferenceModel, block: FeedForward, x: Floats, place: Place) -> Floats:
    gate, up = model.factors(block, x)
    return model.down(block, gate if up is None else gate * up)


def mixture(model: ReferenceModel, block: MixtureOfExperts, x: Floats, place: Place) -> Floats:
    chosen, weights = model.route(block, x)
    out = np.zeros_like(x)
    for number, expert in enumerate(block.feed_forwards()):
        tokens, places = np.nonzero(chosen == number)
        if len(tokens):
            out[tokens] += weights[tokens, places, None] * feed_forward(model, expert, x[tokens], place)
    return out


BLOCKS: dict[type[Block], Callable[[ReferenceModel, Any, Floats, Place], Floats]] = {
    Attention: attention,
    FeedForward: feed_forward,
    MixtureOfExperts: mixture,
}
"""What each kind of block computes: of the model, the block, its normalised input (t, dim) and its place, the output
(t, dim) before the second norm. A new kind is a function in a file of its own, which uses public names of the model,
and a line here."""
