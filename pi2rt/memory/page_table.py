"""The pages of one sequence: where each of its positions lives in the KV cache."""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

from pi2rt._errors import InternalError
from pi2rt.memory.prefix_index import ROOT, Link, PrefixIndex
from pi2rt.memory.window_pool import NEVER


class PageTable:
    """Position ``p`` lives in page ``self.pages[p // index.page_tokens]``.

    The table owns one reference to each of its pages. Where the index already had a page with the same
    tokens, the table also holds that one (``_chain``), so that who holds a page of a chain holds all pages
    before it.

    Where some blocks look back a window only, it also holds the windowed bytes of consecutive pages (``WindowPool``):
    of those that the next positions see, and of those that steps in flight write.
    """

    __slots__ = (
        "_chain", "_from", "_index", "_page_tokens", "_parent", "_table", "_to", "_windows", "backed", "committed",
        "count", "due", "pages",
    )  # fmt: skip

    def __init__(self, index: PrefixIndex, most_pages: int) -> None:
        self._index = index
        self._page_tokens = index.page_tokens
        self._table = np.empty(most_pages, np.int32)
        self._chain: list[int | None] = []  # per committed page: the index's page held beside our own
        self._parent = ROOT  # the last link of the chain so far
        self._windows = index.windows
        self._from = self._to = 0  # the pages whose windowed bytes are held
        self.backed = self.due = NEVER
        """Before positions from ``backed`` on are written, ``back`` is to be called; ``pass_by`` when ``due`` positions
        are computed. Neither, where there are no windowed bytes to take."""
        self._note_windows()
        self.committed = 0
        """Positions whose pages are in the index."""
        self.count = 0
        """Pages held."""
        self.pages: npt.NDArray[np.int32] = self._table[:0]
        """int32 (count,), a view; entries never change once they are there."""

    def match(self, tokens: array[int]) -> int:
        """Takes the indexed pages that hold the beginning of ``tokens``; gives the number of positions they
        cover. That is fewer than all: the last token is always computed again, since its logits are
        wanted. The windowed bytes that the next position sees are there, and are held too."""
        if self.count:
            raise InternalError("a page table matches a prefix only while it is empty")
        links = self._found(tokens)
        for link in links:
            self._index.retain(link.page)
            self._table[self.count] = link.page
            self._chain.append(None)
            self._parent = link.serial
            self.count += 1
        self.pages = self._table[: self.count]
        self.committed = self.count * self._page_tokens
        if self._windows is not None:
            self._from, self._to = self._windows.first(self.committed), self.count
            for link in links[self._from :]:
                self._windows.hold(link.page)
            self._note_windows()
        return self.committed

    def _found(self, tokens: array[int]) -> list[Link]:
        """The longest chain behind which a sequence with these tokens can go on; takes no reference."""
        size, windows = self._page_tokens, self._windows
        links: list[Link] = []
        parent, absent, longest = ROOT, -1, 0  # absent: the last page so far without its windowed bytes
        for start in range(0, len(tokens) - size, size):
            link = self._index.find(parent, tokens[start : start + size].tobytes())
            if link is None:
                break
            links.append(link)
            parent = link.serial
            if windows is not None and not windows.has(link.page):
                absent = len(links) - 1
            if windows is None or absent < windows.first(start + size):
                longest = len(links)
        return links[:longest]

    def missing(self, positions: int) -> int:
        """Pages to allocate before ``positions`` positions fit."""
        return max(0, -(-positions // self._page_tokens) - self.count)

    def extend(self, pages: int) -> None:
        """Appends freshly allocated pages."""
        end = self.count + pages
        self._table[self.count : end] = self._index.allocate(pages)
        self.count = end
        self.pages = self._table[:end]

    def back(self, positions: int) -> None:
        """Takes memory for windowed bytes, before a step is submitted that writes the first ``positions`` positions as
        far as they are not computed yet. Their pages are there."""
        if self._windows is None:
            return
        for at in range(self._to, -(-positions // self._page_tokens)):
            self._windows.take(int(self._table[at]))
            self._to = at + 1
        self._note_windows()

    def pass_by(self, computed: int) -> None:
        """Lets go of the windowed bytes that no position from ``computed`` on sees."""
        if self._windows is None:
            return
        for at in range(self._from, min(self._windows.first(computed), self._to)):
            self._windows.let_go(int(self._table[at]))
            self._from = at + 1
        self._note_windows()

    def rewind(self, computed: int) -> None:
        """Steps that were to write positions from ``computed`` on are lost: lets go of windowed bytes behind them."""
        if self._windows is None:
            return
        behind = max(self._from, -(-computed // self._page_tokens))
        for at in range(self._to - 1, behind - 1, -1):
            self._windows.let_go(int(self._table[at]))
            self._to = at
        self._note_windows()

    def _note_windows(self) -> None:
        if self._windows is not None:
            self.backed = self._to * self._page_tokens
            self.due = self._windows.until(self._from)

    def commit(self, tokens: array[int], computed: int) -> None:
        """Offers the full pages among the first ``computed`` positions, which hold ``tokens``, to later
        sequences."""
        size, windows = self._page_tokens, self._windows
        for at in range(len(self._chain), computed // size):
            content = tokens[at * size : (at + 1) * size].tobytes()
            link = self._index.find(self._parent, content)
            if link is None:
                link = self._index.add(self._parent, content, int(self._table[at]))
                self._chain.append(None)
            elif windows is not None and not windows.has(link.page) and windows.has(int(self._table[at])):
                link = self._index.replace(link, int(self._table[at]))
                self._chain.append(None)
            else:  # another sequence was first
                self._index.retain(link.page)
                self._chain.append(link.page)
            self._parent = link.serial
        self.committed = len(self._chain) * size

    def abandon(self) -> None:
        """Never gives the pages back: an executor that cannot be stopped may still write to them."""
        if self._windows is not None:
            for at in range(self._from, self._to):
                self._windows.abandon(int(self._table[at]))
        self._clear()

    def release(self) -> None:
        """Gives every page back, the last one first. The table is empty afterwards and can be used again."""
        if self._windows is not None:
            for at in range(self._to - 1, self._from - 1, -1):
                self._windows.let_go(int(self._table[at]))
        for at in range(self.count - 1, -1, -1):
            if at < len(self._chain) and (held := self._chain[at]) is not None:
                self._index.release(held)
            self._index.release(int(self._table[at]))
        self._clear()

    def _clear(self) -> None:
        self._chain.clear()
        self._parent = ROOT
        self.committed = self.count = self._from = self._to = 0
        self._note_windows()
        # Steps still referring to the old table keep it; a new one is never written under them.
        self._table = np.empty(len(self._table), np.int32)
        self.pages = self._table[:0]
