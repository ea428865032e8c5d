"""The state of all sequences: pages of keys and values, and slots of fixed arrays.

The runtime owns these bytes and executors borrow them. So they outlive an executor that is lost, and executors of
several lanes work on the same ones.
"""

from __future__ import annotations

from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from pi2rt._errors import ClosedError
from pi2rt.cython_kernels.kernels.native import Memory
from pi2rt.memory.page_codec import BlockPages
from pi2rt.memory.page_pool import PagePool
from pi2rt.memory.state_layout import FixedLayout, StateLayout

Bytes = npt.NDArray[np.uint8]


class StateStore:
    """``pages`` pages and ``slots`` slots, as ``layout`` says. Memory that was never touched costs nothing.

    Attributes:
        pool: which pages are taken.
    """

    def __init__(self, layout: StateLayout, pages: int, slots: int = 0) -> None:
        self.layout, self.pages, self.slots = layout, pages, slots
        self.pool = PagePool(pages)
        self._pages: Memory | None = Memory(max(1, pages * layout.page_bytes))
        self._slots: Memory | None = None
        if layout.slot_bytes and slots:
            self._slots = Memory(slots * layout.slot_bytes)

    @property
    def nbytes(self) -> int:
        """Of all pages and slots, touched or not; 0 where it is closed."""
        return sum(each.nbytes for each in (self._pages, self._slots) if each is not None)

    @property
    def used_bytes(self) -> int:
        """From the first page's begin to the end of the last that was ever taken. What lies behind it can be reclaimed
        (``executors/flash/ring.py``)."""
        return (self.pool.highest + 1) * self.layout.page_bytes

    @property
    def page_memory(self) -> Memory:
        """Page p begins at byte ``p * layout.page_bytes``.

        Raises:
            ClosedError: the store is closed.
        """
        if self._pages is None:
            raise ClosedError("the state of the sequences is closed")
        return self._pages

    @property
    def slot_memory(self) -> Memory:
        """Slot s begins at byte ``s * layout.slot_bytes``.

        Raises:
            ClosedError: the model has no fixed arrays, or the store is closed.
        """
        if self._slots is None:
            raise ClosedError("the store has no slots of fixed arrays, or is closed")
        return self._slots

    def blocks(self) -> dict[tuple[int, int], BlockPages]:
        """The keys and values of each block as arrays, by (layer, block): for executors that compute with numpy."""
        view = self.page_memory.view()
        return {
            (each.layer, each.block): BlockPages(view, self.layout, each, self.pages)
            for each in self.layout.paged
        }

    def array(self, slot: int, fixed: FixedLayout) -> npt.NDArray[np.generic]:
        """One array of a slot, shaped as its description says; a view."""
        start = slot * self.layout.slot_bytes + fixed.offset
        array = fixed.array
        return self.slot_memory.view()[start : start + array.nbytes].view(array.dtype).reshape(array.shape)

    def export_page(self, page: int) -> Bytes:
        """A copy of the bytes of a page, for devices that do not see the memory of the host."""
        return self._page(page).copy()

    def import_page(self, page: int, data: Bytes) -> None:
        """Replaces the bytes of a page."""
        self._page(page)[:] = data

    def copy_page(self, source: int, target: int) -> None:
        self._page(target)[:] = self._page(source)

    def copy_slot(self, source: int, target: int) -> None:
        """Snapshot, fork and roll-back of fixed arrays."""
        for slot in (source, target):
            if not 0 <= slot < self.slots:
                raise IndexError(f"slot {slot} of {self.slots} with fixed arrays")
        view = self.slot_memory.view().reshape(self.slots, self.layout.slot_bytes)
        view[target] = view[source]

    def close(self) -> None:
        """Gives the memory back. Nobody may use it any more. Safe to call twice."""
        for memory in (self._pages, self._slots):
            if memory is not None:
                memory.close()
        self._pages = self._slots = None

    def abandon(self) -> None:
        """In place of ``close``, where an executor that could not be stopped may still write to it."""
        for memory in (self._pages, self._slots):
            if memory is not None:
                memory.abandon()
        self._pages = self._slots = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _page(self, page: int) -> Bytes:
        if not 0 <= page < self.pages:
            raise IndexError(f"page {page} of {self.pages}")
        size = self.layout.page_bytes
        whole: Bytes = self.page_memory.view()
        return whole[page * size : (page + 1) * size]
