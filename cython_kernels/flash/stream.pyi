from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

SECTOR: int
MOST_DEPTH: int

class Stream:
    n: int
    path: str
    deadline: float | None
    io_reason: str
    ring_bytes: int
    lap_bytes: int
    ended_at: int
    pinned_bytes: int
    counters: tuple[int, int, int]
    reads: int
    def __init__(
        self,
        path: str,
        units: Sequence[tuple[int, int, int]],
        ring: int,
        ring_bytes: int,
        *,
        name: str | None = None,
        io: str = "auto",
        read_bytes: int = ...,
        depth: int = 8,
        deadline: float | None = None,
    ) -> None: ...
    def borrow(self, address: int, homes: Mapping[int, int]) -> None: ...
    @property
    def lent_bytes(self) -> int: ...
    def check(self, units: Sequence[int], at_once: int) -> None: ...
    def times(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]: ...
    def close(self) -> int: ...
