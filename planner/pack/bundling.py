"""Which matrices ``convert`` stores by neuron, and how they come from the source's rows into bundles.

Of a layer's matrices one at a time is in memory, with its scales and a few megabytes of pages.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from pi2rt._errors import ModelFormatError
from pi2rt.cython_kernels.kernels import native
from pi2rt.formats import ModelFile, TensorInfo
from pi2rt.formats.neuron_bundles import (
    GROUP,
    TYPES,
    Matrix,
    NeuronBundles,
    arrange,
    down_scales_bytes,
    step_neurons,
    up_scales,
    up_scales_bytes,
)
from pi2rt.formats.neuron_order import CLUSTER, Order, bundle_order, decode_order, encode_order, put_in_order
from pi2rt.formats.pack_writer import PackWriter, Planned
from pi2rt.models import FeedForward, ModelDescription

Bundling: TypeAlias = Literal["relu", "gates", "all", "off"]
"""Which feed-forward blocks are stored by neuron: those of which a zero gate skips neurons without changing a bit of
the result; the same with their gates among it, for ``sparsity="predicted"``; all, for ``sparsity="thresholded"``; or
none. Without their modes "gates" and "all" are slower than the first."""

PIECE_BYTES = 4 << 20
"""Bytes of rows read at once, and of pages written at once."""


@dataclass(frozen=True, slots=True)
class Bundled:
    """A feed-forward block whose up (None where there is no gate) and down matrices are stored by neuron, and its gate,
    unless that is None, too. ``last``: the name of its layer's last matrix, behind which the pages lie. ``rests``:
    see the function of that name."""

    up: TensorInfo | None
    down: TensorInfo
    bundles: NeuronBundles
    last: str
    rests: bool
    gate: TensorInfo | None = None

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        return tuple(each for each in (self.gate, self.up, self.down) if each is not None)


def bundled_blocks(
    file: ModelFile,
    model: ModelDescription,
    bundling: Bundling = "relu",
    orders: Mapping[str, Order] | None = None,
) -> Iterator[Bundled]:
    """The blocks that are stored by neuron: of the activations that ``bundling`` says, those the type of whose matrices
    is among ``neuron_bundles.TYPES`` and whose neurons are whole groups. ``orders``: by the name of the down tensor, of
    those whose bundles are to lie in another order than their neurons'.

    Raises:
        ValueError: an order is none of its block's neurons.
    """
    for layer in model.layers if bundling != "off" else ():
        tensors = [each for block in layer.blocks for each in block.tensors(model.dim)]
        last = [name for name, shape in tensors if len(shape) == 2][-1:]
        for block in (each for mixed in layer.blocks for each in mixed.feed_forwards()):
            matrices = _matrices(file, block) if bundling == "all" or rests(block) else None
            if matrices is not None:
                up, down = matrices
                matrix = None if up is None else _matrix(up)
                gate = file.tensors[block.gate.weight] if bundling == "gates" and block.gate else None
                gate = None if gate is None or gate.type not in TYPES else gate
                bundles = arrange(
                    f"{down.name}.bundles",
                    matrix,
                    _matrix(down),
                    gate=None if gate is None else _matrix(gate),
                )
                if orders and down.name in orders:
                    raw = encode_order(orders[down.name])
                    try:
                        decode_order(raw, bundles.neurons)
                    except ValueError as error:
                        raise ValueError(f"the order of {down.name} {error}") from None
                    bundles = replace(bundles, order=raw)
                yield Bundled(up, down, bundles, last[0], rests(block), gate)


def rests(block: FeedForward) -> bool:
    """Whether neurons of a block are inactive without thresholds: a gate that is not positive makes them zero."""
    return block.activation in ("relu", "relu2")


def _matrices(file: ModelFile, block: FeedForward) -> tuple[TensorInfo | None, TensorInfo] | None:
    """Up and down of a block, if they can be in bundles."""
    up = file.tensors[block.up.weight] if block.gate is not None else None
    down = file.tensors[block.down.weight]
    if block.hidden % GROUP or any(each is not None and each.type not in TYPES for each in (up, down)):
        return None
    return up, down


def _matrix(info: TensorInfo) -> Matrix:
    return Matrix(info.name, info.type, (info.shape[0], info.shape[1]))


class BundleWriter:
    """Writes what of a pack is stored by neuron.

    Args:
        file: the source.
        writer: the pack, where everything is written when it is its turn.
        blocks: as ``bundled_blocks`` finds them.
        read: called after each piece with the bytes that were read of the source for the first time; may raise.
    """

    def __init__(
        self, file: ModelFile, writer: PackWriter, blocks: tuple[Bundled, ...], read: Callable[[int], None]
    ) -> None:
        self._file, self._writer, self._read = file, writer, read
        rows = ((info, each) for each in blocks for info in (each.gate, each.up))
        self._up = {info.name: each for info, each in rows if info is not None}
        self._down = {each.down.name: each for each in blocks}

    def write_scales(self, info: TensorInfo) -> bool:
        """The scales of a matrix, if it is stored by neuron.

        Raises:
            ModelFormatError: one is NaN or infinite.
        """
        if info.name in self._up:
            self._write_up_scales(info, self._up[info.name].bundles)
        elif info.name in self._down:
            self._write_down_scales(info, self._down[info.name].bundles)
        else:
            return False
        return True

    def _write_up_scales(self, info: TensorInfo, bundles: NeuronBundles) -> None:
        rows, columns = info.shape
        row_bytes, each = info.nbytes // rows, up_scales(info.type, columns)
        step = min(rows, max(1, PIECE_BYTES // row_bytes))
        source, scales = native.Memory(step * row_bytes), native.Memory(step * each)
        try:
            for first in range(0, rows, step):
                count = min(step, rows - first)
                raw, found = source.view()[: count * row_bytes], scales.view()[: count * each]
                self._file.read_into(info, first * row_bytes, raw.data)
                bad = native.bundle_up(info.type, raw, count, columns, bundles.layout, None, found)
                self._refuse(info, None if bad is None else first + bad)
                self._writer.write(info.name, found)
                self._read(raw.nbytes)
        finally:
            source.close()
            scales.close()

    def _write_down_scales(self, info: TensorInfo, bundles: NeuronBundles) -> None:
        rows, neurons = info.shape
        source, scales = native.Memory(info.nbytes), native.Memory(down_scales_bytes(_matrix(info)))
        try:
            self._read_whole(info, source, first_time=True)
            raw, found = source.view(), scales.view()
            bad = native.bundle_down(info.type, raw, rows, neurons, 0, neurons, bundles.layout, None, found)
            self._refuse(info, bad)
            self._writer.write(info.name, found)
        finally:
            source.close()
            scales.close()

    def write_pages(self, block: Bundled) -> None:
        """The quants of a block. Reads its matrices once more: down as a whole, for a neuron has a part of each row."""
        down, bundles = block.down, block.bundles
        behind = ((block.gate, 0), (block.up, bundles.gate_bytes))  # where in a neuron they begin
        parts = [(info, at) for info, at in behind if info is not None]
        rows, neurons = down.shape
        order = None if bundles.order is None else bundle_order(bundles)
        # places of whole clusters are filled from the neurons of these clusters
        step = step_neurons(bundles) if order is None else math.lcm(bundles.neurons_per_page, CLUSTER)
        step *= max(1, PIECE_BYTES // (step * bundles.neuron_bytes))
        step_pages = -(-min(step, neurons) // bundles.neurons_per_page)
        row_bytes = max((info.nbytes // neurons for info, _ in parts), default=0)
        matrix, pages = native.Memory(down.nbytes), native.Memory(step_pages * bundles.page_bytes)
        source = native.Memory(min(step, neurons) * row_bytes or 1)
        try:
            self._read_whole(down, matrix, first_time=False)
            raw_down = matrix.view()
            for first in range(0, neurons, step):
                count = min(step, neurons - first)
                to = pages.view()[: -(-count // bundles.neurons_per_page) * bundles.page_bytes]
                if count < step:
                    to[:] = 0  # behind the last neuron there are those of the piece before
                for info, at in parts:
                    each = info.nbytes // neurons
                    raw = source.view()[: count * each]
                    self._file.read_into(info, first * each, raw.data)
                    native.bundle_up(
                        info.type, raw, count, info.shape[1], bundles.layout, to, None, at_byte=at
                    )
                native.bundle_down(down.type, raw_down, rows, neurons, first, count, bundles.layout, to, None)
                if order is not None:
                    put_in_order(to, bundles.layout, order[first : first + count])
                self._writer.write(bundles.name, to)
                self._read(0)
        finally:
            for memory in (matrix, pages, source):
                memory.close()

    def _read_whole(self, info: TensorInfo, memory: native.Memory, *, first_time: bool) -> None:
        for start in range(0, info.nbytes, PIECE_BYTES):
            piece = memory.view()[start : min(start + PIECE_BYTES, info.nbytes)]
            self._file.read_into(info, start, piece.data)
            self._read(piece.nbytes if first_time else 0)

    def _refuse(self, info: TensorInfo, bad: int | None) -> None:
        if bad is not None:
            raise ModelFormatError(
                self._file.path, f"tensor {info.name}", f"row {bad} holds NaN or infinity in a scale or value"
            )


def planned_scales(info: TensorInfo, block: Bundled) -> Planned:
    """What of an up or down matrix of the block has its place among the tensors."""
    size = down_scales_bytes if info.name == block.down.name else up_scales_bytes
    return Planned(info.name, info.type, info.shape, "neurons", size(_matrix(info)))


def planned_pages(block: Bundled) -> Planned:
    return Planned(block.bundles.name, bundles=block.bundles)
