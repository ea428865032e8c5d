"""A model's forward pass over many texts at once, block by block, in plain numpy float32.

Where ``reference.py`` takes one text through all layers, this takes all texts through one block after another. So one
block's weights are in memory at a time, and one expert's of a mixture, whatever the size of the model, beside the
residual streams of all texts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.cython_kernels.kernels import native
from pi2rt.executors.cpu.weights import to_floats
from pi2rt.executors.reference.model import BLOCKS, Place, ReferenceModel
from pi2rt.formats import ModelFile, TensorInfo, neuron_order
from pi2rt.formats.quants import dequantize
from pi2rt.memory import StateLayout, StateStore
from pi2rt.models import Block, FeedForward, MixtureOfExperts, ModelDescription
from pi2rt.models.block_check import check_blocks, kinds_of
from pi2rt.models.states import PAGE_TOKENS
from pi2rt.runtime.step import Floats, Int32s

PIECE_ROWS = 1024
"""Rows of a matrix that are unpacked at once; whole row blocks."""


class Factors(NamedTuple):
    """Of a text what a block's hidden values are made of, float32 (tokens, hidden); of an expert's those of the tokens
    that chose it, of which there may be none. The activated ``gate`` and ``up`` after its own activation; or, without
    gate, the activated up as ``gate`` and None. ``product``: of a block with gate its input, (tokens, dim), and what
    the gate made of it, (tokens, hidden)."""

    gate: Floats
    up: Floats | None
    product: Callable[[], tuple[Floats, Floats]]


Observer = Callable[[int, FeedForward, Mapping[str, Floats], Iterator[Factors]], None]
"""``observe(layer, block, weights, factors)``: ``weights``: the block's, by name, as long as it is called; ``factors``:
those of each text, made as they are asked for, of which ``product`` may be called until the next ones are."""


def walk(
    file: ModelFile,
    model: ModelDescription,
    texts: Sequence[Int32s],
    observe: Observer,
    progress: Callable[[int, int], None],
) -> None:
    """Runs all layers over ``texts``, each by itself from position 0, and shows every feed-forward block and every
    expert to ``observe``. Blocks: for a worker thread.

    Args:
        file: the model's, with neuron bundles or without.
        model: what is in it.
        texts: token ids, int32 (tokens,).
        observe: is given an iterator that it must exhaust: what it yields is computed meanwhile.
        progress: ``progress(done, total)``, in blocks and experts; may raise, which ends the work.

    Raises:
        UnsupportedModelError: a block is of a kind that cannot be run, or whose neurons cannot be shown.
        ModelFormatError: a tensor holds NaN or infinity.
    """
    check_blocks(file.path, model, kinds_of(BLOCKS), "reference")
    for index, layer in enumerate(model.layers):
        for block in layer.blocks:
            _walk_of(file, index, block)  # before the work begins
    weights = _BlockWeights(file)
    longest = max(len(text) for text in texts)
    pages = np.arange(-(-longest // PAGE_TOKENS), dtype=np.int32)
    layout = StateLayout.of(model, "f32")
    streams = [weights.rows(model.embedding, text) * np.float32(model.embedding_scale) for text in texts]
    total = sum(_parts(block) for layer in model.layers for block in layer.blocks)
    done = 0
    for index, layer in enumerate(model.layers):
        for number, block in enumerate(layer.blocks):
            progress(done, total)
            with StateStore(layout, len(pages)) as store:  # of which only what this block uses is touched
                reference = ReferenceModel(model, weights, store)
                walk_block = _walk_of(file, index, block)
                for _ in walk_block(
                    reference, weights, block, Place(index, number, 0, pages), streams, observe
                ):
                    done += 1
                    progress(done, total)
    progress(done, total)


def _walk_of(file: ModelFile, layer: int, block: Block) -> Callable[..., Iterator[None]]:
    """Raises UnsupportedModelError for a block whose neurons would be passed over."""
    if (found := WALKS.get(type(block))) is not None:
        return found
    if next(block.feed_forwards(), None) is None:
        return _unobserved
    raise UnsupportedModelError(
        file.path,
        f"layer {layer}",
        f"has a block of the kind {block.kind!r}, whose neurons cannot be calibrated; those of "
        f"{' and '.join(sorted(map(repr, kinds_of(WALKS))))} can",
    )


def _parts(block: Block) -> int:
    """Steps of progress: experts, or one."""
    return max(1, sum(1 for _ in block.feed_forwards()))


def _unobserved(
    reference: ReferenceModel,
    weights: _BlockWeights,
    block: Block,
    place: Place,
    streams: list[Floats],
    observe: Observer,
) -> Iterator[None]:
    """A block without neurons."""
    weights.load(name for name, _ in block.tensors(reference.model.dim))
    for i, x in enumerate(streams):
        streams[i] = reference.behind(place.layer, place.number, x, place.start, place.table)
    yield


def _mixture(
    reference: ReferenceModel,
    weights: _BlockWeights,
    block: MixtureOfExperts,
    place: Place,
    streams: list[Floats],
    observe: Observer,
) -> Iterator[None]:
    """Expert after expert, in the order in which their outputs are added."""
    dim = reference.model.dim
    weights.load(_around(block))
    inputs = [reference.normalized(block, x) for x in streams]
    routes = [reference.route(block, x) for x in inputs]
    outputs = [np.zeros_like(x) for x in streams]

    def factors(expert: FeedForward, number: int) -> Iterator[Factors]:
        for x, (chosen, shares), out in zip(inputs, routes, outputs, strict=True):
            tokens, places = np.nonzero(chosen == number)
            mine = x[tokens]
            gate, up = reference.factors(expert, mine)
            yield Factors(gate, up, partial(reference.gate_product, expert, mine))
            y = reference.down(expert, gate if up is None else gate * up)
            out[tokens] += shares[tokens, places, None] * y

    for number, expert in enumerate(block.feed_forwards()):
        weights.load(name for name, _ in expert.tensors(dim))
        observe(place.layer, expert, weights, factors(expert, number))
        yield
    weights.load(_around(block))
    for i, x in enumerate(streams):
        streams[i] = reference.add(block, x, outputs[i])


def _around(block: MixtureOfExperts) -> Iterator[str]:
    """Tensors of a mixture that are none of an expert's matrices."""
    yield block.norm.weight
    yield block.router.weight
    if block.router.bias is not None:
        yield block.router.bias
    if block.shared is not None:
        yield block.shared.router
    if block.post_norm is not None:
        yield block.post_norm.weight


def _feed_forward(
    reference: ReferenceModel,
    weights: _BlockWeights,
    block: FeedForward,
    place: Place,
    streams: list[Floats],
    observe: Observer,
) -> Iterator[None]:
    weights.load(name for name, _ in block.tensors(reference.model.dim))

    def factors() -> Iterator[Factors]:
        for i, x in enumerate(streams):
            mine = reference.normalized(block, x)
            gate, up = reference.factors(block, mine)
            yield Factors(gate, up, partial(reference.gate_product, block, mine))
            streams[i] = reference.add(block, x, reference.down(block, gate if up is None else gate * up))

    observe(place.layer, block, weights, factors())
    yield


WALKS: dict[type[Block], Callable[..., Iterator[None]]] = {
    FeedForward: _feed_forward,
    MixtureOfExperts: _mixture,
}
"""How text goes through blocks whose neurons are observed. Those without neurons go through the reference executor."""


class _BlockWeights(Mapping[str, Floats]):
    """float32 values of one block's tensors at a time."""

    def __init__(self, file: ModelFile) -> None:
        self._file = file
        self._loaded: dict[str, Floats] = {}

    def load(self, names: Iterator[str]) -> None:
        """Instead of those of the block before."""
        self._loaded.clear()
        for name in names:
            self._loaded[name] = self._values(self._file.tensors[name])

    def __getitem__(self, name: str) -> Floats:
        return self._loaded[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._loaded)

    def __len__(self) -> int:
        return len(self._loaded)

    def rows(self, name: str, wanted: Int32s) -> Floats:
        """Rows of a matrix, (len(wanted), columns), without unpacking all of it at once."""
        info = self._file.tensors[name]
        out = np.empty((len(wanted), info.shape[1]), np.float32)
        for first in range(0, info.shape[0], PIECE_ROWS):
            inside = (wanted >= first) & (wanted < first + PIECE_ROWS)
            if inside.any():
                out[inside] = self._piece(info, first)[wanted[inside] - first]
        return out

    def _values(self, info: TensorInfo) -> Floats:
        if info.layout == "neurons":
            return self._check(info, self._from_bundles(info))
        if len(info.shape) == 1:
            raw = self._file.read(info.name)
            return self._check(info, dequantize(info.type, raw, info.shape))
        out = np.empty(info.shape, np.float32)
        for first in range(0, info.shape[0], PIECE_ROWS):
            out[first : first + PIECE_ROWS] = self._piece(info, first)
        return out

    def _piece(self, info: TensorInfo, first: int) -> Floats:
        """Rows of a matrix from ``first`` on, a multiple of PIECE_ROWS."""
        rows, columns = info.shape
        count = min(PIECE_ROWS, rows - first)
        if info.layout == "rows":
            each = info.nbytes // rows
            start, size = first * each, count * each
        else:
            start = native.matrix_bytes(info.type, first, columns)
            size = native.matrix_bytes(info.type, count, columns)
        memory = native.Memory(size)  # aligned as row blocks have to be
        try:
            raw = memory.view()
            self._file.read_into(info, start, raw.data)
            return self._check(info, np.array(to_floats(info, raw, count), np.float32))
        finally:
            memory.close()

    def _from_bundles(self, info: TensorInfo) -> Floats:
        names = {
            name: each for each in self._file.bundles.values() for name in (each.gate, each.up, each.down)
        }
        bundles = names[info.name]
        pages = np.empty(bundles.nbytes, np.uint8)
        self._file.read_bundles_into(bundles, 0, pages.data)
        if bundles.order is not None:
            neuron_order.take_back(pages, bundles.layout, neuron_order.bundle_order(bundles))
        scales = self._file.read(info.name)
        if info.name != bundles.down:
            at = 0 if info.name == bundles.gate else bundles.gate_bytes
            neurons, columns = info.shape
            return native.unbundle_up(info.type, pages, scales, neurons, columns, bundles.layout, at_byte=at)
        return native.unbundle_down(info.type, pages, scales, info.shape[0], bundles.neurons, bundles.layout)

    def _check(self, info: TensorInfo, values: npt.NDArray[np.float32]) -> Floats:
        if not np.isfinite(values).all():
            raise ModelFormatError(self._file.path, f"tensor {info.name}", "holds NaN or infinity")
        return values
