from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MOST_DEPTH: int
MOST_READ_THROUGH: int
PAGE: int
RECORD: np.dtype[np.void]

@dataclass(frozen=True, slots=True)
class Counters:
    hits: int = 0
    early: int = 0
    misses: int = 0
    completed: int = 0
    evictions: int = 0
    reads: int = 0
    bytes: int = 0
    busy_ns: int = 0
    stall_ns: int = 0
    read_through: int = 0
    read_through_bytes: int = 0

class NeuronCache:
    n_regions: int
    path: str
    deadline: float | None
    io_reason: str
    ended_at: int
    slots_used: int
    pinned_bytes: int
    counters: Counters
    def __init__(
        self,
        path: str,
        regions: Sequence[tuple[int, int, int]],
        memory: int,
        slots: int,
        slot_bytes: int,
        *,
        heads: Sequence[int] | None = None,
        name: str | None = None,
        io: str = "auto",
        depth: int = 64,
        deadline: float | None = None,
        read_through: int = 0,
    ) -> None: ...
    def trace(self, reads: int) -> None: ...
    def take_reads(self) -> tuple[npt.NDArray[np.void], int]: ...
    def resize(self, slots: int) -> bool: ...
    waiting: int
    def absent(self) -> npt.NDArray[np.float32]: ...
    def fetch(self, pages: npt.NDArray[np.int32]) -> bool: ...
    def fill(self, region: int, first: int, count: int) -> None: ...
    def close(self) -> int: ...
