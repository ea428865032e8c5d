"""The prefix index against a model of it: any order of requests, any sharing, any eviction."""

from __future__ import annotations

from array import array

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule

from pi2rt._errors import InternalError
from pi2rt.memory import PagePool, PageTable, PrefixIndex

PAGES = 12
PAGE_TOKENS = 2
CONTEXT_PAGES = 8


class Held:
    """A table and the tokens that it is for; ``computed`` of them are in the cache."""

    def __init__(self, table: PageTable, tokens: list[int], computed: int) -> None:
        self.table, self.tokens, self.computed = table, tokens, computed


class IndexMachine(RuleBasedStateMachine):
    """The pages' contents are kept as a KV cache would have them, so that a wrong hit shows."""

    tables = Bundle("tables")

    def __init__(self) -> None:
        super().__init__()
        self.pool = PagePool(PAGES)
        self.index = PrefixIndex(self.pool, PAGE_TOKENS)
        self.held: list[Held] = []
        self.contents: dict[int, list[int]] = {}  # page -> all tokens from the beginning to the page's end

    @rule(target=tables, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=CONTEXT_PAGES * PAGE_TOKENS))
    def open(self, tokens: list[int]) -> Held | None:
        table = PageTable(self.index, CONTEXT_PAGES)
        hit = table.match(array("i", tokens))
        assert hit % PAGE_TOKENS == 0
        assert hit < len(tokens)
        assert table.pages.tolist() == [int(page) for page in table.pages[: hit // PAGE_TOKENS]]
        for at, page in enumerate(table.pages.tolist()):
            assert self.contents[page] == tokens[: (at + 1) * PAGE_TOKENS]
        missing = table.missing(len(tokens))
        if not self.index.can_allocate(missing):
            table.release()
            return None
        table.extend(missing)
        held = Held(table, tokens, hit)
        self.held.append(held)
        return held

    @rule(held=tables, positions=st.integers(1, 2 * PAGE_TOKENS))
    def compute(self, held: Held | None, positions: int) -> None:
        if held is None or held not in self.held:
            return
        end = min(held.computed + positions, len(held.tokens))
        for at in range(held.computed // PAGE_TOKENS, -(-end // PAGE_TOKENS)):
            page = int(held.table.pages[at])
            owners = [other for other in self.held if page in other.table.pages.tolist()]
            assert owners == [held], "a shared page is written"
            self.contents[page] = held.tokens[: min(end, (at + 1) * PAGE_TOKENS)]
        held.computed = end
        held.table.commit(array("i", held.tokens), end)
        assert held.table.committed == end // PAGE_TOKENS * PAGE_TOKENS

    @rule(held=tables, token=st.integers(0, 1))
    def grow(self, held: Held | None, token: int) -> None:
        if held is None or held not in self.held or len(held.tokens) == CONTEXT_PAGES * PAGE_TOKENS:
            return
        missing = held.table.missing(len(held.tokens) + 1)
        if self.index.can_allocate(missing):
            held.table.extend(missing)
            held.tokens = [*held.tokens, token]

    @rule(held=consumes(tables))
    def close(self, held: Held | None) -> None:
        if held is not None and held in self.held:
            self.held.remove(held)
            held.table.release()

    @rule()
    def lose_the_cache(self) -> None:
        """As the engine does it: every sequence gives up its pages, then the index forgets."""
        for held in self.held:
            held.table.release()
        self.held.clear()
        self.index.clear()
        assert self.pool.held == 0

    @invariant()
    def every_page_is_accounted_for(self) -> None:
        used = {int(page) for held in self.held for page in held.table.pages}
        statistics = self.index.statistics()
        assert statistics.pages - statistics.unused <= PAGES
        assert self.pool.held >= len(used)
        assert self.index.available == self.pool.free + statistics.unused
        assert len(used) <= PAGES - self.index.available

    def teardown(self) -> None:
        for held in self.held:
            held.table.release()
        assert self.index.available == PAGES  # nothing is in use, so all can be evicted, in any order
        self.index.allocate(PAGES)
        assert self.index.statistics().pages == 0


IndexMachine.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestIndex = IndexMachine.TestCase


def tokens(*values: int) -> array[int]:
    return array("i", values)


def test_the_least_recently_used_goes_first_and_its_tail_before_its_head() -> None:
    pool = PagePool(4)
    index = PrefixIndex(pool, 2)

    def run(prompt: array[int]) -> int:
        table = PageTable(index, 4)
        hit = table.match(prompt)
        table.extend(table.missing(len(prompt)))
        table.commit(prompt, len(prompt))
        table.release()
        return hit

    old, new = tokens(1, 1, 1, 1), tokens(2, 2, 2, 2)
    run(old)
    run(new)
    index.release(index.allocate(1)[0])
    assert run(tokens(*new, 9)) == 4
    assert index.statistics().evicted_pages == 1
    assert run(tokens(*old, 9)) == 2


def test_a_page_computed_twice_is_kept_once() -> None:
    pool = PagePool(4)
    index = PrefixIndex(pool, 2)
    prompt = tokens(5, 6, 7)
    first, second = PageTable(index, 2), PageTable(index, 2)
    for table in first, second:
        assert table.match(prompt) == 0
        table.extend(2)
    first.commit(prompt, 3)
    second.commit(prompt, 3)
    assert index.statistics().pages == 1
    first.release()
    assert index.statistics().unused == 0  # the second table holds on to what its chain hangs on
    second.release()
    assert index.statistics().unused == 1
    assert pool.held == 1


def test_misuse_is_a_bug() -> None:
    index = PrefixIndex(PagePool(2), 2)
    table = PageTable(index, 2)
    table.extend(1)
    with pytest.raises(InternalError, match="only while it is empty"):
        table.match(tokens(1, 2, 3))
    with pytest.raises(InternalError, match="only 1 are available"):
        index.allocate(2)
    index.add(0, b"x", 0)
    with pytest.raises(InternalError, match="indexed already"):
        index.add(0, b"x", 1)
