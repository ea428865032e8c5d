"""Matrices of experts that do not all fit: in pages of a cache, read when a router has chosen an expert of theirs.

A page is a cluster of rows that lie together in the pack, about a megabyte, so that reading it takes the device's full
bandwidth. All experts of all layers share one cache, so that those that are chosen often stay.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from pi2rt.cython_kernels.flash.neuron_cache import PAGE, NeuronCache
from pi2rt.executors.flash.page_cache import PageCache
from pi2rt.formats import ModelFile
from pi2rt.formats.row_blocks import page_blocks, page_bytes
from pi2rt.runtime.flash_reads import FlashReads


@dataclass(frozen=True, slots=True)
class CachedExperts:
    """What a program needs to know of them. ``matrices``: (region of the cache, row blocks of a page) of each,
    by name; ``cache``: None, where the program is only measured."""

    matrices: Mapping[str, tuple[int, int]]
    cache: NeuronCache | None


def expert_regions(file: ModelFile, names: Sequence[str]) -> Mapping[str, tuple[int, int]]:
    """``CachedExperts.matrices`` of a pack."""
    infos = [file.tensors[name] for name in names]
    return {info.name: (region, page_blocks(info.type, *info.shape)) for region, info in enumerate(infos)}


def expert_places(file: ModelFile, names: Sequence[str]) -> list[tuple[int, int, int]]:
    """(offset, bytes of a page, bytes of all) of each."""
    infos = [file.tensors[name] for name in names]
    return [
        (info.offset, page_bytes(info.type, *info.shape), -(-info.nbytes // PAGE) * PAGE) for info in infos
    ]


class Clusters(PageCache):
    """The cache of these matrices.

    Args:
        file: a pack; stays open as long as this.
        names: of matrices that lie there in row blocks.
        nbytes: memory for their pages.
        io: "auto", "uring" or "preadv".
        deadline: seconds; see ``NeuronCache``.
        reads: how many at once.
    """

    def __init__(
        self,
        file: ModelFile,
        names: Sequence[str],
        nbytes: int,
        io: str,
        deadline: float | None,
        reads: FlashReads,
    ) -> None:
        super().__init__(
            file, expert_places(file, names), nbytes, io=io, deadline=deadline, depth=reads.cluster_depth
        )
        self.cached = CachedExperts(expert_regions(file, names), self.cache)

    def load(self, report: Callable[[int], None]) -> None:
        """Fills the cache, with as much of each matrix. Blocks: for a worker thread. ``report`` is called with the
        bytes read since; what it raises ends the work.

        Raises:
            OSError: the file cannot be read.
        """
        for region, pages in enumerate(self.region_pages):
            share = pages * self.slots // self.pages
            if share:
                self.cache.fill(region, 0, share)
                report(share * self.slot_bytes)
