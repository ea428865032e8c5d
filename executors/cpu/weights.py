"""A model's weights in the layout the kernels read, outside the interpreter's heap.

Rows are read from the file in pieces and put into row blocks at once, so that loading needs the weights' own memory and
a few megabytes, and no page of the file is mapped.
"""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

import numpy as np
import numpy.typing as npt

from pi2rt._errors import ModelFormatError
from pi2rt.cython_kernels.kernels import native
from pi2rt.executors.flash.late_reads import LateReads
from pi2rt.formats import ModelFile, TensorInfo
from pi2rt.formats.placement import Placement, placed
from pi2rt.formats.quants import dequantize
from pi2rt.models import ModelDescription, iterate_tensors
from pi2rt.models.stream_pieces import StreamPieces, cut
from pi2rt.runtime.executor import Progress
from pi2rt.runtime.own_nursery import open_own_nursery
from pi2rt.runtime.step import Floats

PIECE_BYTES = 4 << 20
"""Bytes of the file read at once."""

VECTORS_AT_ONCE = 16
"""Vectors that are read between two looks at the clock: they are small."""


@dataclass(frozen=True, slots=True)
class PackedMatrix:
    """``rows`` x ``columns`` values of ``type`` as row blocks at ``address``."""

    type: str
    rows: int
    columns: int
    address: int


class PlacedWeights(Protocol):
    """Where the weights of a model lie, by name. ``vectors``: float32; ``scales``: of matrices whose neurons a pack
    stores one by one, type and address; ``pieces``: of streamed matrices; ``dim``: of the model."""

    @property
    def vectors(self) -> Mapping[str, Floats]: ...
    @property
    def matrices(self) -> Mapping[str, PackedMatrix]: ...
    @property
    def scales(self) -> Mapping[str, tuple[str, int]]: ...
    @property
    def pieces(self) -> StreamPieces: ...
    @property
    def dim(self) -> int: ...


class WeightLayout:
    """How every tensor that a description names is kept: matrices as row blocks, vectors as float32. Reads none.

    ``exact_floats``: matrices become float32, dequantised as the format says. ``placements``: of those that are not
    loaded, and have address 0; what is streamed is read in ``pieces`` of ``piece_bytes``.

    Attributes:
        matrix_infos, scale_infos: in the order in which they lie in memory.
        vector_infos: which lie by themselves.
        nbytes: of matrices and scales.
    """

    def __init__(
        self,
        file: ModelFile,
        model: ModelDescription,
        *,
        exact_floats: bool,
        placements: Mapping[str, Placement] | None = None,
        piece_bytes: int = 1 << 20,
    ) -> None:
        self.exact_floats = exact_floats
        routers = _shared_routers(model)
        infos = [
            replace(info, shape=(1, model.dim)) if info.name in routers else info
            for info in (file.tensors[name] for name, _ in iterate_tensors(model))
        ]
        placements = placements or {}
        self.pieces = cut(file, model, frozenset(placed(placements, Placement.STREAMED)), piece_bytes)
        # Of neurons in bundles the scales are resident.
        absent = [name for name, where in placements.items() if where is not Placement.NEURONS]
        matrices = [info for info in infos if len(info.shape) == 2 and info.name not in absent]
        self.matrix_infos = [info for info in matrices if info.layout != "neurons"]
        self.scale_infos = [info for info in matrices if info.layout == "neurons"]
        self.vector_infos = [info for info in infos if len(info.shape) == 1]
        self.dim = model.dim
        self._elsewhere = [file.tensors[name] for name in absent]
        self.nbytes = self.place(0)[2]

    def type(self, info: TensorInfo) -> str:
        return "F32" if self.exact_floats else info.type

    @property
    def vector_bytes(self) -> int:
        return sum(4 * math.prod(info.shape) for info in self.vector_infos)

    def place(self, address: int) -> tuple[dict[str, PackedMatrix], dict[str, tuple[str, int]], int]:
        """Matrices and scales, where they lie in memory that begins at ``address``; and its end."""
        matrices: dict[str, PackedMatrix] = {}
        scales: dict[str, tuple[str, int]] = {}
        for info in self.matrix_infos:
            rows, columns = info.shape
            matrices[info.name] = PackedMatrix(self.type(info), rows, columns, address)
            address += native.matrix_bytes(self.type(info), rows, columns)
        for info in self.scale_infos:
            scales[info.name] = (info.type, address)
            address += -(-info.nbytes // 64) * 64
        for info in self._elsewhere:
            rows, columns = info.shape
            matrices[info.name] = PackedMatrix(info.type, rows, columns, 0)
        return matrices, scales, address


class Weights:
    """The weights of a model, loaded as ``layout`` says: see ``PlacedWeights``."""

    def __init__(self, file: ModelFile, layout: WeightLayout) -> None:
        self._file, self._layout = file, layout
        self.pieces, self.dim, self.nbytes = layout.pieces, layout.dim, layout.nbytes
        self.vectors: dict[str, Floats] = {}
        self._lock = threading.Lock()  # of these two
        self._loading, self._closed = 0, False  # calls that write to memory; of which some may never return
        self._memory = native.Memory(max(layout.nbytes, 1))
        self.matrices, self.scales, _ = layout.place(self._memory.address)

    @property
    def file_bytes(self) -> int:
        """What ``load`` reads."""
        return sum(info.nbytes for info in (*self._layout.matrix_infos, *self._layout.scale_infos))

    async def load(self, progress: Progress, workers: int, deadline: float | None = None) -> None:
        """Reads everything with ``workers`` threads. Cancellable between pieces.

        ``deadline``: seconds in which one piece at least must arrive.

        Raises:
            ModelFormatError: a scale or value is NaN or infinite, or the file has shrunk.
            OSError: the file cannot be read; ETIMEDOUT after the deadline.
        """
        pieces: deque[tuple[TensorInfo, int, int]] = deque()
        for info in self._layout.matrix_infos:
            step = max(16, PIECE_BYTES // max(1, info.nbytes // max(1, info.shape[0])) // 16 * 16)
            pieces.extend(
                (info, row, min(row + step, info.shape[0])) for row in range(0, info.shape[0], step)
            )
        pieces.extend((info, 0, info.shape[0]) for info in self._layout.scale_infos)
        total = self.file_bytes
        done = 0
        reads = LateReads(self._file.path, deadline, workers)

        async def work(call: Callable[[], None]) -> None:
            await reads.run("weights", lambda: self._write(call))

        async def worker() -> None:
            nonlocal done
            while pieces:
                batch: list[tuple[TensorInfo, int, int]] = []
                size = 0
                while pieces and size < PIECE_BYTES:  # small tensors share one hop to the thread
                    info, first, last = pieces.popleft()
                    batch.append((info, first, last))
                    size += bytes_in_file(info, first, last)
                await work(partial(self._load_pieces, batch))
                done += size
                progress(done, total)

        async with open_own_nursery() as nursery:  # every worker may find an error: the first tells enough
            for _ in range(workers):
                nursery.start_soon(worker)
            for first in range(0, len(self._layout.vector_infos), VECTORS_AT_ONCE):
                infos = self._layout.vector_infos[first : first + VECTORS_AT_ONCE]
                await work(partial(self._load_vectors, infos))
        native.trim_heap()

    def _write(self, call: Callable[[], None]) -> None:
        """``call`` in a worker thread, which may go on after ``close``: what it writes to stays until it has ended."""
        if not self._begin():
            return
        try:
            call()
        finally:
            self._end()

    def _begin(self) -> bool:
        with self._lock:
            self._loading += not self._closed
            return not self._closed

    def _end(self) -> None:
        with self._lock:
            self._loading -= 1
            if self._closed and not self._loading:
                self._memory.close()

    def _load_vectors(self, infos: Sequence[TensorInfo]) -> None:
        for info in infos:
            if self._closed:
                return
            raw = self._file.read(info.name)
            self.vectors[info.name] = np.ascontiguousarray(dequantize(info.type, raw, info.shape), np.float32)
            if not np.isfinite(self.vectors[info.name]).all():
                raise ModelFormatError(self._file.path, f"tensor {info.name}", "holds NaN or infinity")

    def _load_pieces(self, pieces: Sequence[tuple[TensorInfo, int, int]]) -> None:
        size = max(bytes_in_file(*piece) for piece in pieces)
        buffer = native.Memory(size)  # not of the heap, which would keep it
        try:
            self._load_into(buffer.view(), pieces)
        finally:
            buffer.close()

    def _load_into(
        self, buffer: npt.NDArray[np.uint8], pieces: Sequence[tuple[TensorInfo, int, int]]
    ) -> None:
        for info, first, last in pieces:
            if self._closed:
                return
            if info.layout == "neurons":
                self._load_scales(info)
                continue
            start, size = bytes_in_file(info, 0, first), bytes_in_file(info, first, last)
            packed = self.matrices[info.name]
            if info.layout == "blocks16" and not self._layout.exact_floats:
                at = packed.address - self._memory.address + start
                self._file.read_into(info, start, self._memory.view()[at : at + size].data)
                if self.pieces.pieces:  # memory is short
                    self._file.forget(info, start, size)
                continue
            raw = buffer[:size]
            self._file.read_into(info, start, raw.data)
            if self._layout.exact_floats:
                values = to_floats(info, raw, last - first)
                raw = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
            address = packed.address + native.matrix_bytes(packed.type, first, packed.columns)
            bad = native.repack(packed.type, raw, last - first, packed.columns, address)
            if bad is not None:
                raise ModelFormatError(
                    self._file.path,
                    f"tensor {info.name}",
                    f"row {first + bad} holds NaN or infinity in a scale or value",
                )

    def _load_scales(self, info: TensorInfo) -> None:
        at = self.scales[info.name][1] - self._memory.address
        self._file.read_into(info, 0, self._memory.view()[at : at + info.nbytes].data)
        self._file.forget(info, 0, info.nbytes)

    def close(self) -> None:
        """Gives the memory back; its addresses only once reads have ended that did not in time."""
        with self._lock:
            self._closed = True
            if self._loading:
                self._memory.discard(0, self._memory.nbytes)
            else:
                self._memory.close()
        self.matrices.clear()
        self.vectors.clear()


def to_floats(info: TensorInfo, raw: npt.NDArray[np.uint8], rows: int) -> Floats:
    """float32 (rows, columns) of that many rows of a matrix: their bytes as they stand in the file, uint8."""
    shape = (rows, info.shape[1])
    if info.layout == "rows":
        return dequantize(info.type, raw, shape)
    return native.unpack(info.type, raw.ctypes.data, *shape)


def _shared_routers(model: ModelDescription) -> set[str]:
    """Names of the vectors that are multiplied by, as matrices of one row."""
    blocks = (block for layer in model.layers for block in layer.blocks)
    return {name for block in blocks for name in block.vectors_multiplied_by()}


def bytes_in_file(info: TensorInfo, first: int, last: int) -> int:
    """Bytes that rows ``first`` (a multiple of 16) to ``last`` of a matrix take in its file."""
    if info.layout == "blocks16":
        return native.matrix_bytes(info.type, last - first, info.shape[1])
    if info.layout == "neurons":
        return info.nbytes  # scales are not cut
    return info.nbytes // info.shape[0] * (last - first)
