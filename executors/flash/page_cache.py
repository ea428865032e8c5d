"""Pages of a pack in a cache that native threads read into, as one executor holds them."""

from __future__ import annotations

import os
from collections.abc import Sequence

from pi2rt.cython_kernels.flash.neuron_cache import Counters, NeuronCache
from pi2rt.cython_kernels.kernels import native
from pi2rt.executors.flash.late_reads import give_back
from pi2rt.formats import ModelFile


def cache_slots(regions: Sequence[tuple[int, int, int]], nbytes: int) -> tuple[int, int]:
    """How many pages a ``PageCache`` of these regions and this size holds, and bytes of each."""
    slot_bytes = max(size for _, size, _ in regions)
    pages = sum(-(-total // size) for _, size, total in regions)
    return min(pages, nbytes // slot_bytes) if nbytes else pages, slot_bytes


class PageCache:
    """All regions share the slots, so that those whose pages are used more get more of them.

    Args:
        file: a pack; stays open as long as this.
        regions: (offset, bytes of a page, bytes of all) of each.
        nbytes: memory for pages; 0 where all of them stay.
        io: "auto", "uring" or "preadv".
        deadline: seconds; see ``NeuronCache``.
        depth: reads in flight, at most.
        heads, read_through: see ``NeuronCache``.
    """

    def __init__(
        self,
        file: ModelFile,
        regions: Sequence[tuple[int, int, int]],
        nbytes: int,
        *,
        io: str,
        deadline: float | None,
        depth: int,
        heads: Sequence[int] | None = None,
        read_through: int = 0,
    ) -> None:
        self.region_pages = [-(-total // size) for _, size, total in regions]
        self.pages = sum(self.region_pages)
        self.slots, self.slot_bytes = cache_slots(regions, nbytes)
        self.depth = depth
        self._memory = native.Memory(self.pages * self.slot_bytes)  # resident where it is used
        try:
            self.cache = NeuronCache(
                file.held_path,
                regions,
                self._memory.address,
                self.slots,
                self.slot_bytes,
                heads=heads,
                name=os.fspath(file.path),
                io=io,
                depth=depth,
                deadline=deadline,
                read_through=read_through,
            )
        except BaseException:
            self._memory.close()
            raise

    @property
    def nbytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def io_reason(self) -> str:
        """How it reads, and why."""
        return str(self.cache.io_reason)

    @property
    def counters(self) -> Counters:
        return self.cache.counters

    def close(self) -> None:
        """Joins the reader, then frees the memory that it wrote to. Only after the threads that compute have ended."""
        give_back(self._memory, late=self.cache.close(), path=self.cache.path)
