"""Pages of KV cache: a fixed number of them, counted references.

A page is only a number here; its bytes are in the state store. Memory that was never touched costs nothing,
so the page freed last is handed out first: a single conversation touches as few pages as it has tokens.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from pi2rt._errors import InternalError
from pi2rt.memory.window_pool import WindowPool


@dataclass(frozen=True, slots=True)
class PagePoolStatistics:
    """``held``: pages with at least one reference; ``peak_held``: the most there ever were."""

    pages: int
    held: int
    peak_held: int


class PagePool:
    """``pages`` numbers, 0 to ``pages - 1``, each free or held by one or more owners. ``windows``: of their windowed
    bytes; None: they have none, or all of them have memory."""

    __slots__ = ("_free", "_peak", "_references", "highest", "windows")

    def __init__(self, pages: int, windows: WindowPool | None = None) -> None:
        if pages < 1:
            raise ValueError(f"pages={pages}: a page pool needs at least one page")
        self.windows = windows
        self._free = list(range(pages - 1, -1, -1))
        self._references = [0] * pages
        self._peak = 0
        self.highest = -1
        """The page of the largest number that was ever taken."""

    def __len__(self) -> int:
        return len(self._references)

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def held(self) -> int:
        return len(self._references) - len(self._free)

    def can_allocate(self, count: int) -> bool:
        return count <= len(self._free)

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` pages, each with one reference. Ask ``can_allocate`` first."""
        if count > len(self._free):
            raise InternalError(f"allocated {count} KV pages where only {len(self._free)} are free")
        taken = [self._free.pop() for _ in range(count)]
        for page in taken:
            self._references[page] = 1
        self._peak = max(self._peak, self.held)
        self.highest = max(self.highest, *taken) if taken else self.highest
        return taken

    def retain(self, page: int) -> int:
        """Adds a reference to a held page; gives the number there are now."""
        if not self._references[page]:
            raise InternalError(f"retained KV page {page}, which is free")
        self._references[page] += 1
        return self._references[page]

    def release(self, page: int) -> int:
        """Drops a reference; at zero the page is free. Gives the number left."""
        left = self._references[page] - 1
        if left < 0:
            raise InternalError(f"released KV page {page}, which is free")
        self._references[page] = left
        if not left:
            self._free.append(page)
            if self.windows is not None:
                self.windows.forget(page)
        return left

    def references(self, page: int) -> int:
        return self._references[page]

    def release_all(self, pages: Iterable[int]) -> None:
        for page in pages:
            self.release(page)

    def statistics(self) -> PagePoolStatistics:
        return PagePoolStatistics(len(self), self.held, self._peak)
