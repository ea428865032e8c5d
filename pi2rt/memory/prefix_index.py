"""Which pages hold the KV cache of which tokens, so that a prompt whose beginning was seen before starts
there.

Full pages only, in chains: a page is found by (the page before it in the chain, its own token ids). The key
is the token ids themselves, not a digest of them, so a hit is exact and there is nothing to collide.

Why the order of eviction is a plain queue. Who holds a page of a chain holds every page before it too
(``PageTable`` keeps that rule, also where a sequence computed a page of its own that the index already
had), and lets go of the last one first. So pages enter the queue of the unused with the children before the
parent, and the oldest unused page never has a used child: evicting from the front never breaks a chain in
its middle.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from pi2rt._errors import InternalError
from pi2rt.memory.page_pool import PagePool
from pi2rt.memory.window_pool import WindowPool

ROOT = 0
"""The link that the first page of every chain hangs on."""


@dataclass(frozen=True, slots=True)
class PrefixIndexStatistics:
    """``pages``: indexed now; ``unused``: of these, held by nobody else and so free to evict;
    ``hit_tokens`` of ``asked_tokens`` prompt tokens were found."""

    pages: int
    unused: int
    asked_tokens: int
    hit_tokens: int
    evicted_pages: int


@dataclass(frozen=True, slots=True)
class Link:
    """An indexed page. ``serial`` is never used twice, so that a key can never mean an evicted parent."""

    serial: int
    page: int
    key: tuple[int, bytes]


class PrefixIndex:
    """Indexed pages of ``page_tokens`` positions each; the index holds one reference to each."""

    __slots__ = (
        "_asked", "_by_page", "_evicted", "_hit", "_links", "_pool", "_serial", "_unused", "page_tokens",
    )  # fmt: skip

    def __init__(self, pool: PagePool, page_tokens: int) -> None:
        self._pool = pool
        self.page_tokens = page_tokens
        self._links: dict[tuple[int, bytes], Link] = {}
        self._by_page: dict[int, Link] = {}
        self._unused: OrderedDict[int, Link] = OrderedDict()  # by page, least recently used first
        self._serial = ROOT
        self._asked = self._hit = self._evicted = 0

    @property
    def windows(self) -> WindowPool | None:
        """Of the pool."""
        return self._pool.windows

    @property
    def available(self) -> int:
        """Pages that ``allocate`` can give: the free ones and those it would evict."""
        return self._pool.free + len(self._unused)

    def can_allocate(self, count: int) -> bool:
        return count <= self._pool.free + len(self._unused)

    def allocate(self, count: int) -> list[int]:
        """Takes ``count`` pages, evicting the least recently used where the free ones do not suffice."""
        if not self.can_allocate(count):
            raise InternalError(f"allocated {count} KV pages where only {self.available} are available")
        while not self._pool.can_allocate(count):
            self._evict()
        return self._pool.allocate(count)

    def find(self, parent: int, tokens: bytes) -> Link | None:
        """The page after link ``parent`` that holds exactly ``tokens``; takes no reference."""
        return self._links.get((parent, tokens))

    def add(self, parent: int, tokens: bytes, page: int) -> Link:
        """Indexes ``page``, which the caller holds, under a key that is not there yet."""
        key = (parent, tokens)
        if key in self._links or page in self._by_page:
            raise InternalError(f"KV page {page} is indexed already")
        self._pool.retain(page)
        self._serial += 1
        link = Link(self._serial, page, key)
        self._links[key] = self._by_page[page] = link
        return link

    def replace(self, old: Link, page: int) -> Link:
        """Indexes ``page``, which the caller holds and which has the same content, in place of ``old.page``, whose
        windowed bytes are gone. Links behind it stay. Those who hold the old page go on with it; they hold the pages
        behind it, but not the new one, so that this one may be evicted before them. Then these are not found any more,
        and go when it is their turn."""
        if page in self._by_page:
            raise InternalError(f"KV page {page} is indexed already")
        self._pool.retain(page)
        link = Link(old.serial, page, old.key)
        self._links[old.key] = self._by_page[page] = link
        del self._by_page[old.page]
        self._unused.pop(old.page, None)
        self._pool.release(old.page)
        return link

    def retain(self, page: int) -> None:
        """One more owner of a page, indexed or not."""
        self._pool.retain(page)
        self._unused.pop(page, None)

    def release(self, page: int) -> None:
        """One owner fewer. An indexed page that nobody else holds joins the queue for eviction."""
        if self._pool.release(page) == 1 and (link := self._by_page.get(page)) is not None:
            self._unused[page] = link

    def count(self, asked_tokens: int, hit_tokens: int) -> None:
        self._asked += asked_tokens
        self._hit += hit_tokens

    def clear(self) -> None:
        """Forgets everything: the cache was lost, or is to be given back. Pages in use stay with their
        owners."""
        for page in self._by_page:
            self._pool.release(page)
        self._links.clear()
        self._by_page.clear()
        self._unused.clear()

    def statistics(self) -> PrefixIndexStatistics:
        return PrefixIndexStatistics(
            len(self._by_page), len(self._unused), self._asked, self._hit, self._evicted
        )

    def _evict(self) -> None:
        page, link = self._unused.popitem(last=False)
        del self._links[link.key]
        del self._by_page[page]
        self._pool.release(page)
        self._evicted += 1
