import os
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias

Io: TypeAlias = Literal["auto", "uring", "preadv"]
Writable: TypeAlias = Any  # a buffer: collections.abc.Buffer is of Python 3.12

SECTOR: int
MOST_IN_FLIGHT: int
EOF: int

@dataclass(frozen=True, slots=True)
class Statistics:
    io: str
    io_reason: str
    direct: bool
    direct_reason: str
    depth: int
    threads: int
    file_bytes: int
    registered_bytes: int
    reads: int
    bytes: int
    errors: int
    retries: int
    short_reads: int
    latency_ns: int
    latencies: tuple[int, ...]
    @property
    def mean_latency_ns(self) -> float: ...

class Reader:
    def __init__(self, path: str | os.PathLike[str], io: Io = "auto", depth: int = 8) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...
    def submit(self, offset: int, into: Writable, tag: object = None) -> None: ...
    def reap(self, most: int = ..., timeout_ns: int = -1) -> list[tuple[Any, int, int]]: ...
    def wake(self) -> None: ...
    def register(self, memory: Writable) -> None: ...
    def read_many(self, reads: Sequence[tuple[int, int]], into: Writable) -> tuple[int, ...]: ...
    def read(self, offset: int, size: int) -> bytes: ...
    def statistics(self) -> Statistics: ...
    def close(self) -> None: ...

def measure(
    path: str | os.PathLike[str],
    read_bytes: int,
    depth: int = 8,
    seconds: float = 0.2,
    io: Io = "auto",
    pattern: Literal["random", "sequential"] = "random",
) -> float: ...
