"""Predictors of which neurons are active: what one is, and how a calibration stores it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, TypeAlias

import msgspec
import numpy as np
import numpy.typing as npt

from pi2rt._errors import ModelFormatError
from pi2rt.formats.regular_file import RegularFile
from pi2rt.formats.row_blocks import matrix_bytes

Raw: TypeAlias = bytes | bytearray | memoryview

Extent: TypeAlias = tuple[int, int]
"""(offset, bytes)"""

_Share = Annotated[float, msgspec.Meta(ge=0, le=1)]


@dataclass(frozen=True, slots=True)
class Predictor:
    """Of a feed-forward block, which neurons may be active for an input x (dim,): those of which ``second @ (first @ x)
    + bias`` is positive. ``first``: float16 (rank, dim); ``second``: float16 (neurons, rank); ``bias``: float32
    (neurons,)."""

    first: npt.NDArray[np.float16]
    second: npt.NDArray[np.float16]
    bias: npt.NDArray[np.float32]

    @classmethod
    def of_bytes(cls, rank: int, dim: int, first: Raw, second: Raw, bias: Raw) -> Predictor:
        """From little-endian numbers, without copies where possible."""
        down, up = (np.frombuffer(raw, "<f2").astype(np.float16, copy=False) for raw in (first, second))
        floats = np.frombuffer(bias, "<f4").astype(np.float32, copy=False)
        return cls(down.reshape(rank, dim), up.reshape(-1, rank), floats)

    @property
    def arrays(self) -> tuple[npt.NDArray[np.floating], ...]:
        return self.first, self.second, self.bias


class PredictorRecord(msgspec.Struct, frozen=True):
    """A predictor in a calibration: ``first``, ``second`` and ``bias`` as ``Predictor`` has them, little endian. On
    held-out text: ``recall``, share of active neurons that it names; ``precision``, share of those named that are
    active; ``asked``, share of all neurons that it names."""

    rank: Annotated[int, msgspec.Meta(ge=1, le=1 << 16)]
    dim: Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
    first: memoryview
    second: memoryview
    bias: memoryview
    recall: _Share
    precision: _Share
    asked: _Share

    @classmethod
    def of(cls, predictor: Predictor, recall: float, precision: float, asked: float) -> PredictorRecord:
        rank, dim = predictor.first.shape
        types = "<f2", "<f2", "<f4"
        parts = zip(predictor.arrays, types, strict=True)
        first, second, bias = (memoryview(np.ascontiguousarray(each, kind).tobytes()) for each, kind in parts)
        return cls(rank, dim, first, second, bias, recall, precision, asked)

    @property
    def predictor(self) -> Predictor:
        return Predictor.of_bytes(self.rank, self.dim, self.first, self.second, self.bias)

    @property
    def nbytes(self) -> int:
        return len(self.first) + len(self.second) + len(self.bias)

    def extents(self, start: int) -> tuple[Extent, ...]:
        """Of one that was decoded from bytes which begin at ``start`` of a file, where ``first``, ``second`` and
        ``bias`` lie in that."""
        body = self.first.obj
        assert isinstance(body, bytes)  # that it was decoded from
        return tuple(
            (start + _address(part) - _address(body), part.nbytes)
            for part in (self.first, self.second, self.bias)
        )


class StoredPredictors(Mapping[str, Predictor]):
    """Predictors of a calibration by the name of the down tensor, each read from its file when it is asked for: an
    executor has them in a form of its own, and memory for both would be wasted.

    Args:
        path: of the calibration.
        records: as they were read from it just now.
        start: where in the file the bytes begin that they were decoded from.

    Raises:
        ModelFormatError: by access, where the file is another than it was.
        ModelNotFoundError: by access, where it is gone.
    """

    def __init__(self, path: Path, records: Mapping[str, PredictorRecord], start: int) -> None:
        self._path = path
        self._places = {name: (each.rank, each.dim, each.extents(start)) for name, each in records.items()}
        self._written = _written(path)
        sizes = [
            matrix_bytes("F16", rank, dim) + matrix_bytes("F16", bias // 4, rank) + bias
            for rank, dim, (_, _, (_, bias)) in self._places.values()
        ]
        self.nbytes = sum(sizes) + 2 * max(sizes)
        """What they take in an executor, and two more of them on their way there."""

    def __getitem__(self, name: str) -> Predictor:
        rank, dim, extents = self._places[name]
        file = RegularFile(self._path)
        try:
            if _written(self._path) != self._written:
                raise ModelFormatError(
                    self._path, "file", "has changed since it was opened; open the model again"
                )
            first, second, bias = (file.read(offset, size) for offset, size in extents)
        finally:
            file.close()
        return Predictor.of_bytes(rank, dim, first, second, bias)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _written(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _address(buffer: Raw) -> int:
    return int(np.frombuffer(buffer, np.uint8).ctypes.data)
