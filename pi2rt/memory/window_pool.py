"""Windowed bytes of KV pages: of blocks that look back a window of positions only.

All KV pages have a number from the start, but only some may have memory for these bytes at a time. Sequences hold those
that their next positions see. What nobody holds any more keeps its memory until another page needs it, so that a later
sequence can begin behind the same tokens: pages that are free go first, then what was let go first.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from pi2rt._errors import InternalError
from pi2rt.models.states import PAGE_TOKENS

NEVER = 1 << 62
"""A position that no sequence reaches."""


@dataclass(frozen=True, slots=True)
class WindowPoolStatistics:
    """KV pages with memory for their windowed bytes: ``capacity``, that may have it at a time; ``backed``, that have
    it; ``held``, by sequences that need it; ``peak_backed``, ``peak_held``, the most there ever were. ``given_back``:
    how often the bytes of a page went back to the system."""

    capacity: int
    backed: int
    held: int
    peak_backed: int
    peak_held: int
    given_back: int


class WindowPool:
    """Who holds the windowed bytes of which page.

    Args:
        pages: KV pages.
        capacity: pages that have memory for these bytes at a time, at most.
        window: positions that a block sees, the largest of any; at least 1.
        discard: gives the bytes of a page back to the system.
        page_tokens: positions in a page.
    """

    __slots__ = (
        "_backed", "_capacity", "_discard", "_given_back", "_has", "_held", "_holders", "_idle", "_lost",
        "_page_tokens", "_peak_backed", "_peak_held", "window",
    )  # fmt: skip

    def __init__(
        self,
        pages: int,
        capacity: int,
        window: int,
        discard: Callable[[int], None],
        page_tokens: int = PAGE_TOKENS,
    ) -> None:
        if not 1 <= capacity <= pages:
            raise ValueError(f"capacity={capacity}: 1 to {pages}, the number of pages, is needed")
        if window < 1:
            raise ValueError(f"window={window}: at least 1 position is needed")
        self.window = window
        self._capacity, self._discard, self._page_tokens = capacity, discard, page_tokens
        self._holders = [0] * pages
        self._has = bytearray(pages)
        self._idle: OrderedDict[int, None] = OrderedDict()  # backed and not held; the next to go first
        self._lost: set[int] = set()
        self._backed = self._held = self._peak_backed = self._peak_held = self._given_back = 0

    @property
    def capacity(self) -> int:
        """Without those that are lost."""
        return self._capacity

    def first(self, computed: int) -> int:
        """The first page that a sequence needs which goes on at position ``computed``: this position sees the ones from
        ``computed - window + 1`` on, and later positions later ones."""
        return max(0, computed - self.window + 1) // self._page_tokens

    def until(self, page: int) -> int:
        """``first`` of so many computed positions, and of more, lies behind the ``page``-th page of a sequence."""
        return (page + 1) * self._page_tokens + self.window - 1

    def has(self, page: int) -> bool:
        """Whether the windowed bytes of a page are there."""
        return bool(self._has[page])

    def take(self, page: int) -> None:
        """For who will write to a page, and shares it with nobody: memory for its windowed bytes."""
        if self._holders[page]:
            raise InternalError(f"took the windowed bytes of KV page {page}, which somebody holds")
        if self._has[page]:
            del self._idle[page]
        else:
            if self._backed - len(self._lost) >= self._capacity:
                self._give_back()
            self._has[page] = 1
            self._backed += 1
            self._peak_backed = max(self._peak_backed, self._backed)
        self._add_holder(page)

    def hold(self, page: int) -> None:
        """For who will read a page, whose windowed bytes are there."""
        if not self._has[page]:
            raise InternalError(f"held the windowed bytes of KV page {page}, which are not there")
        self._idle.pop(page, None)
        self._add_holder(page)

    def let_go(self, page: int) -> None:
        """One holder fewer."""
        if not self._holders[page]:
            raise InternalError(f"let go of the windowed bytes of KV page {page}, which nobody holds")
        self._holders[page] -= 1
        if not self._holders[page]:
            self._held -= 1
            self._idle[page] = None

    def forget(self, page: int) -> None:
        """A page is free: nobody will read its windowed bytes again, so that they are the first to go."""
        if page in self._idle:
            self._idle.move_to_end(page, last=False)

    def abandon(self, page: int) -> None:
        """What an executor that cannot be closed may still write to keeps its memory for good, and no longer counts: it
        exceeds the budget, as the executor's weights do."""
        if not self._holders[page]:
            raise InternalError(f"abandoned the windowed bytes of KV page {page}, which nobody holds")
        self._lost.add(page)

    def statistics(self) -> WindowPoolStatistics:
        return WindowPoolStatistics(
            self._capacity, self._backed, self._held, self._peak_backed, self._peak_held, self._given_back
        )

    def _add_holder(self, page: int) -> None:
        self._holders[page] += 1
        if self._holders[page] == 1:
            self._held += 1
            self._peak_held = max(self._peak_held, self._held)

    def _give_back(self) -> None:
        if not self._idle:
            raise InternalError(f"all {self._capacity} KV pages with windowed bytes are held")
        page, _ = self._idle.popitem(last=False)
        self._discard(page)
        self._has[page] = 0
        self._backed -= 1
        self._given_back += 1
