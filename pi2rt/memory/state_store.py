"""The state of all sequences: pages of keys and values, and slots of fixed arrays.

The runtime owns these bytes and executors borrow them. So they outlive an executor that is lost, and executors of
several lanes work on the same ones.
"""

from __future__ import annotations

import contextlib
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from pi2rt._errors import ClosedError
from pi2rt.cython_kernels.kernels.native import Memory
from pi2rt.memory.page_codec import BlockPages
from pi2rt.memory.page_pool import PagePool
from pi2rt.memory.state_layout import FixedLayout, StateLayout
from pi2rt.memory.window_pool import WindowPool

Bytes = npt.NDArray[np.uint8]


class StateStore:
    """``pages`` pages and ``slots`` slots, as ``layout`` says. Memory that was never touched costs nothing.

    Args:
        window_pages: pages that have memory for their windowed bytes at a time; None: all may. It is for the engine,
            which takes them and lets them go (``pool.windows``): executors work on every page that they are told.

    Attributes:
        pool: which pages are taken.
    """

    def __init__(
        self, layout: StateLayout, pages: int, slots: int = 0, window_pages: int | None = None
    ) -> None:
        self.layout, self.pages, self.slots = layout, pages, slots
        self.window_pages = 0
        windows: WindowPool | None = None
        if layout.window is not None:
            self.window_pages = pages if window_pages is None else min(pages, window_pages)
            if self.window_pages < pages:
                windows = WindowPool(pages, self.window_pages, layout.window, self._discard)
        self.pool = PagePool(pages, windows)
        self._pages: Memory | None = Memory(max(1, pages * layout.page_bytes))
        self._windowed: Memory | None = None
        if (
            layout.window_page_bytes
        ):  # a huge page that is touched would take in pages that are to have no memory
            self._windowed = Memory(pages * layout.window_page_bytes, huge_pages=windows is None)
        self._slots: Memory | None = None
        if layout.slot_bytes and slots:
            self._slots = Memory(slots * layout.slot_bytes)

    @property
    def nbytes(self) -> int:
        """Of all pages and slots that have memory at a time, touched or not; 0 where it is closed."""
        if self._pages is None:
            return 0
        paged = self.pages * self.layout.page_bytes + self.window_pages * self.layout.window_page_bytes
        return paged + (0 if self._slots is None else self._slots.nbytes)

    @property
    def used_bytes(self) -> int:
        """Of the whole area: from the first page's begin to the end of the last that was ever taken. What lies behind
        it can be reclaimed (``executors/flash/ring.py``)."""
        return (self.pool.highest + 1) * self.layout.page_bytes

    @property
    def page_memory(self) -> Memory:
        """The whole area: page p begins at byte ``p * layout.page_bytes``.

        Raises:
            ClosedError: the store is closed.
        """
        if self._pages is None:
            raise ClosedError("the state of the sequences is closed")
        return self._pages

    @property
    def window_memory(self) -> Memory | None:
        """The windowed area: page p begins at byte ``p * layout.window_page_bytes``. None: the layout has none, or the
        store is closed."""
        return self._windowed

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
        whole = self.page_memory.view()
        windowed = None if self._windowed is None else self._windowed.view()
        return {
            (each.layer, each.block): BlockPages(
                windowed if each.windowed and windowed is not None else whole, self.layout, each, self.pages
            )
            for each in self.layout.paged
        }

    def array(self, slot: int, fixed: FixedLayout) -> npt.NDArray[np.generic]:
        """One array of a slot, shaped as its description says; a view."""
        start = slot * self.layout.slot_bytes + fixed.offset
        array = fixed.array
        return self.slot_memory.view()[start : start + array.nbytes].view(array.dtype).reshape(array.shape)

    def export_page(self, page: int) -> Bytes:
        """A copy of the bytes of a page, for devices that do not see the memory of the host: those of the whole area,
        then those of the windowed one."""
        return np.concatenate(self._page(page))

    def import_page(self, page: int, data: Bytes) -> None:
        """Replaces the bytes of a page; ``data``: as ``export_page`` gives them."""
        whole, windowed = self._page(page)
        if len(data) != len(whole) + len(windowed):
            raise ValueError(f"{len(data)} bytes for a page of {len(whole) + len(windowed)}")
        whole[:], windowed[:] = data[: len(whole)], data[len(whole) :]

    def copy_page(self, source: int, target: int) -> None:
        for old, new in zip(self._page(source), self._page(target), strict=True):
            new[:] = old

    def copy_slot(self, source: int, target: int) -> None:
        """Snapshot, fork and roll-back of fixed arrays."""
        for slot in (source, target):
            if not 0 <= slot < self.slots:
                raise IndexError(f"slot {slot} of {self.slots} with fixed arrays")
        view = self.slot_memory.view().reshape(self.slots, self.layout.slot_bytes)
        view[target] = view[source]

    def close(self) -> None:
        """Gives the memory back. Nobody may use it any more. Safe to call twice."""
        for memory in (self._pages, self._windowed, self._slots):
            if memory is not None:
                memory.close()
        self._pages = self._windowed = self._slots = None

    def abandon(self) -> None:
        """In place of ``close``, where an executor that could not be stopped may still write to it."""
        for memory in (self._pages, self._windowed, self._slots):
            if memory is not None:
                memory.abandon()
        self._pages = self._windowed = self._slots = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _page(self, page: int) -> tuple[Bytes, Bytes]:
        """Its bytes in the whole area, and in the windowed one; views."""
        if not 0 <= page < self.pages:
            raise IndexError(f"page {page} of {self.pages}")
        size, small = self.layout.page_bytes, self.layout.window_page_bytes
        whole: Bytes = self.page_memory.view()[page * size : (page + 1) * size]
        windowed: Bytes = np.empty(0, np.uint8)
        if self._windowed is not None:
            windowed = self._windowed.view()[page * small : (page + 1) * small]
        return whole, windowed

    def _discard(self, page: int) -> None:
        """Gives the windowed bytes of a page back to the system. Where it refuses, as for memory that a program has
        locked (mlockall), they stay resident, and nothing else changes."""
        if self._windowed is not None:
            size = self.layout.window_page_bytes
            with contextlib.suppress(OSError):
                self._windowed.discard(page * size, size)
