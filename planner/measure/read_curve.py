"""How fast a file can be read, by size of the reads and by how many are in flight: measured, not assumed.

Flash gives little at small reads and shallow queues, and everything at large or deep ones; where the knee lies differs
from device to device. ``read_choice.py`` chooses from it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import exp, log
from typing import Literal, TypeAlias

import numpy as np

Pattern: TypeAlias = Literal["random", "sequential"]
Io: TypeAlias = Literal["auto", "uring", "preadv"]
Measure: TypeAlias = Callable[[int, int, float, Pattern], float]
"""``measure(read_bytes, depth, seconds, pattern)``: bytes/s."""

READ_BYTES = (4 << 10, 16 << 10, 64 << 10, 256 << 10, 1 << 20, 4 << 20)
DEPTHS = (1, 2, 4, 8, 16, 32, 64, 128)
PATTERNS: tuple[Pattern, ...] = ("random", "sequential")
LEAST_SEQUENTIAL = 64 << 10
"""Nobody who reads in order reads less at a time."""
BUFFER_BYTES = 32 << 20
"""All reads in flight together, at most: what an engine has to spare."""


@dataclass(frozen=True, slots=True)
class ReadPoint:
    """``depth`` reads of ``read_bytes`` in flight gave ``bytes_per_second``."""

    pattern: Pattern
    read_bytes: int
    depth: int
    bytes_per_second: float

    @property
    def buffer_bytes(self) -> int:
        return self.read_bytes * self.depth


@dataclass(frozen=True, slots=True)
class ReadCurve:
    """Of one file, on one device. msgspec encodes it to msgpack and back.

    ``io``: "uring" or "preadv"; ``direct``: past the page cache, with O_DIRECT; ``points``: at least one.
    """

    io: str
    direct: bool
    file_bytes: int
    points: tuple[ReadPoint, ...]

    def bandwidth(self, read_bytes: int, depth: int, pattern: Pattern = "random") -> float:
        """Bytes/s at a size and depth that need not have been measured: between points, straight lines on logarithmic
        scales; beyond them, the nearest.

        Raises:
            ValueError: the pattern was not measured, or a size or depth below 1.
        """
        if read_bytes < 1 or depth < 1:
            raise ValueError(f"read_bytes={read_bytes}, depth={depth}: both must be at least 1")
        by_size: dict[int, dict[int, float]] = {}
        for point in self._of(pattern):
            by_size.setdefault(point.read_bytes, {})[point.depth] = point.bytes_per_second
        return _between(read_bytes, {size: _between(depth, of) for size, of in by_size.items()})

    def choose(
        self, pattern: Pattern = "random", *, buffer_bytes: int = BUFFER_BYTES, share: float = 0.95
    ) -> ReadPoint:
        """The point with the least bytes in flight that gives ``share`` of the best bandwidth there is with at most
        ``buffer_bytes`` in flight; of several, the one with the larger reads, which cost less of a core.

        Raises:
            ValueError: no point of this pattern has so little in flight.
        """
        fitting = [point for point in self._of(pattern) if point.buffer_bytes <= buffer_bytes]
        if not fitting:
            raise ValueError(f"no {pattern} reads were measured with {buffer_bytes} bytes in flight or fewer")
        enough = share * max(point.bytes_per_second for point in fitting)
        return min(
            (point for point in fitting if point.bytes_per_second >= enough),
            key=lambda point: (point.buffer_bytes, -point.read_bytes),
        )

    def _of(self, pattern: Pattern) -> list[ReadPoint]:
        points = [point for point in self.points if point.pattern == pattern]
        if not points:
            raise ValueError(f"{pattern} reads were not measured")
        return points


def measure_read_curve(
    path: str | os.PathLike[str],
    seconds: float = 4.0,
    *,
    io: Io = "auto",
    read_bytes: Sequence[int] = READ_BYTES,
    depths: Sequence[int] = DEPTHS,
    patterns: Sequence[Pattern] = PATTERNS,
    buffer_bytes: int = BUFFER_BYTES,
    measure: Measure | None = None,
) -> ReadCurve:
    """Measures how fast a file is read, for about ``seconds``.

    Every point is measured twice, the second time in the opposite order, and is the mean of both: a device that slows
    down meanwhile does not favour the points that came first. Blocks: from Trio, call it in a thread.

    Args:
        path: the file that will be read later, or one on the same device that is larger than the device's own cache.
        seconds: for all points together.
        io: the backend.
        read_bytes: sizes, multiples of 4096. Those larger than the file are left out, and sequential ones below
            ``LEAST_SEQUENTIAL`` unless nothing else is left.
        depths: reads in flight.
        patterns: "random", "sequential".
        buffer_bytes: points with more in flight are left out.
        measure: how to measure; None for the native reader.

    Raises:
        ValueError: no point is left.
        OSError: the file cannot be read, or ``io="uring"`` is not permitted here.
    """
    from pi2rt.cython_kernels.flash import reader as flash

    if not seconds > 0:
        raise ValueError(f"seconds={seconds}: must be above 0")
    with flash.Reader(path, io, 1) as reader:
        statistics = reader.statistics()
    possible = [size for size in sorted(read_bytes) if size <= statistics.file_bytes]
    in_order = [size for size in possible if size >= LEAST_SEQUENTIAL] or possible[-1:]
    grid = [
        (pattern, size, depth)
        for pattern in patterns
        for size in (in_order if pattern == "sequential" else possible)
        for depth in depths
        if size * depth <= buffer_bytes
    ]
    if not grid:
        raise ValueError(
            f"{os.fspath(path)} has {statistics.file_bytes} bytes: no reads of {list(read_bytes)} bytes at depths"
            f" {list(depths)} fit into it and into {buffer_bytes} bytes"
        )

    def native(size: int, depth: int, duration: float, pattern: Pattern) -> float:
        return flash.measure(path, size, depth, duration, io, pattern)

    run = native if measure is None else measure
    each = seconds / (2 * len(grid))
    measured = dict.fromkeys(grid, 0.0)
    for order in (grid, grid[::-1]):
        for pattern, size, depth in order:
            measured[pattern, size, depth] += run(size, depth, each, pattern) / 2
    points = tuple(ReadPoint(*point, rate) for point, rate in measured.items())
    return ReadCurve(statistics.io, statistics.direct, statistics.file_bytes, points)


def _between(x: float, known: Mapping[int, float]) -> float:
    """Bandwidth at ``x`` from those that are known, at least one."""
    xs = sorted(known)
    return exp(float(np.interp(log(x), np.log(xs), np.log([max(known[at], 1.0) for at in xs]))))
