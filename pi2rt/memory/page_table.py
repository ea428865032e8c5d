"""The pages of one sequence: where each of its positions lives in the KV cache."""

from __future__ import annotations

from array import array

import numpy as np
import numpy.typing as npt

from pi2rt._errors import InternalError
from pi2rt.memory.prefix_index import ROOT, PrefixIndex


class PageTable:
    """Position ``p`` lives in page ``self.pages[p // index.page_tokens]``.

    The table owns one reference to each of its pages. Where the index already had a page with the same
    tokens, the table also holds that one (``_chain``), so that who holds a page of a chain holds all pages
    before it.
    """

    __slots__ = ("_chain", "_index", "_page_tokens", "_parent", "_table", "committed", "count", "pages")

    def __init__(self, index: PrefixIndex, most_pages: int) -> None:
        self._index = index
        self._page_tokens = index.page_tokens
        self._table = np.empty(most_pages, np.int32)
        self._chain: list[int | None] = []  # per committed page: the index's page held beside our own
        self._parent = ROOT  # the last link of the chain so far
        self.committed = 0
        """Positions whose pages are in the index."""
        self.count = 0
        """Pages held."""
        self.pages: npt.NDArray[np.int32] = self._table[:0]
        """int32 (count,), a view; entries never change once they are there."""

    def match(self, tokens: array[int]) -> int:
        """Takes the indexed pages that hold the beginning of ``tokens``; gives the number of positions they
        cover. That is fewer than all: the last token is always computed again, since its logits are
        wanted."""
        if self.count:
            raise InternalError("a page table matches a prefix only while it is empty")
        size = self._page_tokens
        for start in range(0, len(tokens) - size, size):
            link = self._index.find(self._parent, tokens[start : start + size].tobytes())
            if link is None:
                break
            self._index.retain(link.page)
            self._table[self.count] = link.page
            self._chain.append(None)
            self._parent = link.serial
            self.count += 1
        self.pages = self._table[: self.count]
        self.committed = self.count * size
        return self.committed

    def missing(self, positions: int) -> int:
        """Pages to allocate before ``positions`` positions fit."""
        return max(0, -(-positions // self._page_tokens) - self.count)

    def extend(self, pages: int) -> None:
        """Appends freshly allocated pages."""
        end = self.count + pages
        self._table[self.count : end] = self._index.allocate(pages)
        self.count = end
        self.pages = self._table[:end]

    def commit(self, tokens: array[int], computed: int) -> None:
        """Offers the full pages among the first ``computed`` positions, which hold ``tokens``, to later
        sequences."""
        size = self._page_tokens
        for at in range(len(self._chain), computed // size):
            content = tokens[at * size : (at + 1) * size].tobytes()
            link = self._index.find(self._parent, content)
            if link is None:
                link = self._index.add(self._parent, content, int(self._table[at]))
                self._chain.append(None)
            else:  # another sequence was first
                self._index.retain(link.page)
                self._chain.append(link.page)
            self._parent = link.serial
        self.committed = len(self._chain) * size

    def abandon(self) -> None:
        """Never gives the pages back: an executor that cannot be stopped may still write to them."""
        self._clear()

    def release(self) -> None:
        """Gives every page back, the last one first. The table is empty afterwards and can be used again."""
        for at in range(self.count - 1, -1, -1):
            if at < len(self._chain) and (held := self._chain[at]) is not None:
                self._index.release(held)
            self._index.release(int(self._table[at]))
        self._clear()

    def _clear(self) -> None:
        self._chain.clear()
        self._parent = ROOT
        self.committed = self.count = 0
        # Steps still referring to the old table keep it; a new one is never written under them.
        self._table = np.empty(len(self._table), np.int32)
        self.pages = self._table[:0]
