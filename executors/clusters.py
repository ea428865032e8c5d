"""Matrices of experts that do not all fit: in pages of a cache, read when a router has chosen an expert of theirs.

A page is a cluster of rows that lie together in the pack, about a megabyte, so that reading it takes the device's full
bandwidth. All experts of all layers share one cache, so that those that are chosen often stay.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

from pi2rt.cython_kernels import native
from pi2rt.cython_kernels.neuron_cache import PAGE, Counters, NeuronCache
from pi2rt.executors.late_reads import give_back
from pi2rt.formats import ModelFile
from pi2rt.formats.row_blocks import page_blocks, page_bytes

DEPTH = 8
"""Pages in flight; as many as a stream's pieces (``cython_kernels/stream.h``)."""


class Clusters:
    """The cache of these matrices.

    Args:
        file: a pack; stays open as long as this.
        names: of matrices that lie there in row blocks.
        nbytes: memory for their pages.
        io: "auto", "uring" or "preadv".
        deadline: seconds; see ``NeuronCache``.
    """

    def __init__(
        self, file: ModelFile, names: Sequence[str], nbytes: int, io: str, deadline: float | None
    ) -> None:
        infos = [file.tensors[name] for name in names]
        self.matrices = {
            info.name: (region, page_blocks(info.type, *info.shape)) for region, info in enumerate(infos)
        }
        """(region of the cache, row blocks of a page) of each."""
        regions = [
            (info.offset, page_bytes(info.type, *info.shape), -(-info.nbytes // PAGE) * PAGE)
            for info in infos
        ]
        self.slot_bytes = max(size for _, size, _ in regions)
        self._pages = [-(-total // size) for _, size, total in regions]
        self.slots = min(sum(self._pages), nbytes // self.slot_bytes)
        self._memory = native.Memory(sum(self._pages) * self.slot_bytes)  # resident where it is used
        try:
            self.cache = NeuronCache(
                file.held_path,
                regions,
                self._memory.address,
                self.slots,
                self.slot_bytes,
                name=os.fspath(file.path),
                io=io,
                depth=DEPTH,
                deadline=deadline,
            )
        except BaseException:
            self._memory.close()
            raise

    @property
    def nbytes(self) -> int:
        return self.slots * self.slot_bytes

    @property
    def counters(self) -> Counters:
        return self.cache.counters

    def load(self, report: Callable[[int], None]) -> None:
        """Fills the cache, with as much of each matrix. Blocks: for a worker thread. ``report`` is called with the
        bytes read since; what it raises ends the work.

        Raises:
            OSError: the file cannot be read.
        """
        total = sum(self._pages)
        for region, pages in enumerate(self._pages):
            share = pages * self.slots // total
            if share:
                self.cache.fill(region, 0, share)
                report(share * self.slot_bytes)

    def close(self) -> None:
        """Joins the reader, then frees the memory that it wrote to. Only after the threads that compute have ended."""
        give_back(self._memory, late=self.cache.close(), path=self.cache.path)
