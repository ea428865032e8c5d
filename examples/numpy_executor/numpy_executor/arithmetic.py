"""Llama and its relatives in float32: what runs between token ids and logits. Put your own unit here.

Shapes in comments: t tokens of one sequence, n positions that it has after them, g key-value heads, q query heads that
share one of those, d elements of a head.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from pi2rt import RequestError, UnsupportedModelError
from pi2rt.formats import ModelFile
from pi2rt.formats.quants import dequantize
from pi2rt.memory import BlockPages, MemoryNeed, StateLayout, StateStore, weight_bytes
from pi2rt.models import Attention, FeedForward, Linear, ModelDescription, Norm, Rope, iterate_tensors
from pi2rt.models.block_check import check_blocks, kinds_of

Floats = npt.NDArray[np.float32]
Int32s = npt.NDArray[np.int32]

KINDS = kinds_of((Attention, FeedForward))
_LIBRARIES = 48 << 20  # buffers of the BLAS that numpy uses


class Stopped(Exception):
    """Somebody asked for it."""


def refuse(file: ModelFile, model: ModelDescription) -> None:
    """An executor says at once what it cannot do. A wrong answer would be worse."""
    check_blocks(file.path, model, KINDS, "numpy")
    for layer in model.layers:
        for block in layer.blocks:
            plain = block.post_norm is None
            if isinstance(block, FeedForward):
                plain &= block.gate is not None
                plain &= (block.activation, block.up_activation) == ("silu", None)
            if not plain:
                problem = f"have a kind of {block.kind!r} that the numpy executor does not run"
                raise UnsupportedModelError(file.path, "layers", problem)


def need(file: ModelFile, model: ModelDescription, rows: int, context: int) -> MemoryNeed:
    """The most that the executor takes, for steps of ``rows`` tokens: pi2rt keeps a memory budget by it."""
    hidden = max(block.hidden for block in model.feed_forwards())
    attentions = [block for layer in model.layers for block in layer.blocks if isinstance(block, Attention)]
    heads = max(block.n_heads for block in attentions)
    width = max(block.n_heads * block.head_dim for block in attentions)
    floats = rows * (8 * model.dim + 3 * hidden + 6 * width + 3 * heads * context)
    floats += 6 * context * width + 3 * rows * model.vocab_size
    largest = max(
        info.nbytes for info in file.tensors.values()
    )  # as it is in the file, while it is dequantised
    layout = StateLayout.of(model, "f32", context)
    return MemoryNeed(
        weights=weight_bytes(file, model, floats=True),
        page=layout.page_bytes,
        activations=4 * floats + largest + _LIBRARIES,
        window_page=layout.window_page_bytes,
    )


def load(file: ModelFile, model: ModelDescription, report: Callable[[int, int], None]) -> dict[str, Floats]:
    """All weights by name, float32. ``report(done, total)``, in bytes of the file, after each of them."""
    infos = [file.tensors[name] for name, _ in iterate_tensors(model)]
    total, done = sum(info.nbytes for info in infos), 0
    weights = {}
    for info in infos:
        if info.layout != "rows":
            raise RequestError(f"{file.path} is a pack; the numpy executor reads the file it was made from")
        weights[info.name] = dequantize(info.type, file.read(info.name), info.shape)
        done += info.nbytes
        report(done, total)
    return weights


class NumpyModel:
    """The forward pass. Keys and values go to the pages of ``store``, which are pi2rt's."""

    def __init__(self, model: ModelDescription, weights: dict[str, Floats], store: StateStore) -> None:
        self.model, self.weights = model, weights
        self.store = store
        self.pages = store.blocks()  # of each attention block, by (layer, block)

    def forward(self, tokens: Int32s, start: int, table: Int32s, should_stop: Callable[[], bool]) -> Floats:
        """Tokens (t,) at positions ``start`` on of the sequence with this page table, to (t, dim)."""
        x = self.weights[self.model.embedding][tokens] * np.float32(self.model.embedding_scale)
        for i, layer in enumerate(self.model.layers):
            if should_stop():
                raise Stopped
            for j, block in enumerate(layer.blocks):
                y = self.norm(block.norm, x)
                if isinstance(block, Attention):
                    x = x + self.attention(block, y, start, table, self.pages[i, j])
                else:
                    x = x + self.feed_forward(block, y)
        return x

    def logits(self, x: Floats) -> Floats:
        """(t, dim) to (t, vocab_size)."""
        return self.linear(self.model.head, self.norm(self.model.final_norm, x))

    def attention(self, block: Attention, x: Floats, start: int, table: Int32s, pages: BlockPages) -> Floats:
        t, g, d = len(x), block.n_kv_heads, block.head_dim
        positions = np.arange(start, start + t)
        queries = self.linear(block.q, x).reshape(t, block.n_heads, d)
        keys = self.linear(block.k, x).reshape(t, g, d)
        if block.q_norm is not None:
            queries = self.norm(block.q_norm, queries)
        if block.k_norm is not None:
            keys = self.norm(block.k_norm, keys)
        if block.rope is not None:
            queries, keys = rotate(block.rope, queries, positions), rotate(block.rope, keys, positions)
        pages.write(table, start, keys, self.linear(block.v, x).reshape(t, g, d))

        n = start + t
        keys, values = pages.read(table, n)  # (n, g, d) each
        scores = np.einsum("tgqd,ngd->gqtn", queries.reshape(t, g, -1, d), keys) * np.float32(block.scale)
        seen = np.arange(n) <= positions[:, None]  # (t, n)
        if block.window is not None:
            seen &= np.arange(n) > positions[:, None] - block.window
        weights = softmax(np.where(seen, scores, np.float32(-np.inf)))
        out = np.einsum("gqtn,ngd->tgqd", weights, values)
        return self.linear(block.out, out.reshape(t, -1))

    def feed_forward(self, block: FeedForward, x: Floats) -> Floats:
        gate = self.linear(block.gate, x)
        return self.linear(block.down, gate / (1 + np.exp(-gate)) * self.linear(block.up, x))

    def linear(self, linear: Linear, x: Floats) -> Floats:
        y = x @ self.weights[linear.weight].T
        return y if linear.bias is None else y + self.weights[linear.bias]

    def norm(self, norm: Norm, x: Floats) -> Floats:
        mean = np.mean(np.square(x), axis=-1, keepdims=True, dtype=np.float32)
        weight = self.weights[norm.weight] + np.float32(norm.offset)
        return x / np.sqrt(mean + np.float32(norm.eps)) * weight


def rotate(rope: Rope, x: Floats, positions: npt.NDArray[np.int64]) -> Floats:
    """Rotates the heads (t, heads, d) of tokens at ``positions`` (t,)."""
    angles = positions[:, None, None] * np.array(rope.inverse_frequencies)  # float64: positions are large
    cos = (np.cos(angles) * rope.magnitude).astype(np.float32)
    sin = (np.sin(angles) * rope.magnitude).astype(np.float32)
    pairs = len(rope.inverse_frequencies)
    if rope.style == "interleaved":
        first, second = slice(0, 2 * pairs, 2), slice(1, 2 * pairs, 2)
    else:
        first, second = slice(0, pairs), slice(pairs, 2 * pairs)
    out = x.copy()
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def softmax(scores: Floats) -> Floats:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)
