"""Windowed bytes of KV pages: who holds them, how many there are at a time, and that they really go back."""

from __future__ import annotations

from array import array
from collections import deque

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pi2rt._errors import InternalError
from pi2rt.cython_kernels.kernels import native
from pi2rt.formats import open_model_file
from pi2rt.memory import (
    PAGE_TOKENS,
    PagePool,
    PageTable,
    PrefixIndex,
    StateLayout,
    StateStore,
    WindowPool,
    least_window_pages,
    widest_window,
    window_pages,
)
from pi2rt.models import ModelDescription, describe
from tests.support.resident import resident_bytes
from tests.support.tiny_models import TinyModel, write_gguf

PAGES, P, WINDOW = 26, 2, 5  # pages, positions in each
CONTEXT_PAGES = 10
SLOTS, ROWS = 3, 6  # sequences at once, rows in flight of all together
CAPACITY = least_window_pages(WINDOW, SLOTS, ROWS, CONTEXT_PAGES * P, P)


class Running:
    """A sequence: ``computed`` and ``submitted`` positions; ``flights``: ends of its slices in flight."""

    def __init__(self, table: PageTable, tokens: list[int], cached: int) -> None:
        self.table, self.tokens = table, tokens
        self.computed = self.submitted = cached
        self.flights: deque[int] = deque()
        self.leaving = False


class WindowMachine(RuleBasedStateMachine):
    """Sequences as the scheduler runs them, over the pool, the index and the tables. The windowed bytes of each page
    are kept as blocks would see them; what is given back is gone."""

    def __init__(self) -> None:
        super().__init__()
        self.windows = WindowPool(PAGES, CAPACITY, WINDOW, self.discard, P)
        self.pool = PagePool(PAGES, self.windows)
        self.index = PrefixIndex(self.pool, P)
        self.running: list[Running] = []
        self.bytes: dict[int, list[int]] = {}  # page -> all tokens from the beginning to the last in the page
        self.backed: set[int] = set()
        self.discarded = self.abandoned = self.lost = 0

    def discard(self, page: int) -> None:
        self.backed.remove(page)
        self.bytes.pop(page, None)
        self.discarded += 1

    @precondition(lambda self: len(self.running) < SLOTS)
    @rule(tokens=st.lists(st.integers(0, 1), min_size=1, max_size=CONTEXT_PAGES * P))
    def enter(self, tokens: list[int]) -> None:
        table = PageTable(self.index, CONTEXT_PAGES)
        cached = table.match(array("i", tokens))
        missing = table.missing(len(tokens))
        if not self.index.can_allocate(missing):
            table.release()
            return
        table.extend(missing)
        self.running.append(Running(table, tokens, cached))
        self.sees(self.running[-1], cached)

    def sees(self, each: Running, position: int) -> None:
        """The windowed bytes that a position sees are there, and are those of its tokens."""
        for at in range(max(0, position - WINDOW + 1), position):
            page = int(each.table.pages[at // P])
            assert self.windows.has(page), (
                f"position {position} sees {at} in page {page}, which has no memory"
            )
            assert self.bytes[page][: at + 1] == each.tokens[: at + 1]

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, SLOTS - 1), count=st.integers(1, ROWS))
    def submit(self, which: int, count: int) -> None:
        each = self.running[which % len(self.running)]
        in_flight = sum(one.submitted - one.computed for one in self.running)
        count = min(count, ROWS - in_flight, len(each.tokens) - each.submitted)
        if each.leaving or count < 1:
            return
        start, end = each.submitted, each.submitted + count
        if end > each.table.backed:
            before = self.windows.statistics().backed
            each.table.back(end)  # raises where none is left
            assert self.windows.statistics().backed >= before
        for at in range(start // P, -(-end // P)):
            page = int(each.table.pages[at])
            assert self.windows.has(page), f"page {page} is written without memory"
            assert [one for one in self.running if page in one.table.pages.tolist()] == [each]
            self.backed.add(page)
        for position in range(start, end):
            self.sees(each, position)
            self.bytes[int(each.table.pages[position // P])] = each.tokens[: position + 1]
        each.submitted = end
        each.flights.append(end)

    @precondition(lambda self: any(each.flights for each in self.running))
    @rule(which=st.integers(0, SLOTS - 1))
    def return_a_step(self, which: int) -> None:
        flying = [each for each in self.running if each.flights]
        each = flying[which % len(flying)]
        each.computed = each.flights.popleft()
        if each.computed >= each.table.due:
            each.table.pass_by(each.computed)
        if not each.leaving:
            each.table.commit(array("i", each.tokens), each.computed)
        elif not each.flights:
            self.release(each)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, SLOTS - 1))
    def leave(self, which: int) -> None:
        each = self.running[which % len(self.running)]
        each.leaving = True
        if not each.flights:
            self.release(each)

    def release(self, each: Running) -> None:
        self.running.remove(each)
        each.table.release()
        assert (each.table.backed, each.table.due) == (0, P + WINDOW - 1)

    @precondition(lambda self: self.running)
    @rule(which=st.integers(0, SLOTS - 1), token=st.integers(0, 1))
    def grow(self, which: int, token: int) -> None:
        each = self.running[which % len(self.running)]
        missing = each.table.missing(len(each.tokens) + 1)
        if len(each.tokens) < CONTEXT_PAGES * P and self.index.can_allocate(missing):
            each.table.extend(missing)
            each.tokens = [*each.tokens, token]

    @rule()
    def lose_the_executor(self) -> None:
        """It is closed: what was computed stays, and sequences go on from there."""
        for each in self.running.copy():
            each.flights.clear()
            if each.leaving:
                self.release(each)
            else:
                each.table.rewind(each.computed)
                each.submitted = each.computed

    @precondition(lambda self: self.running and not self.abandoned)
    @rule(which=st.integers(0, SLOTS - 1))
    def abandon(self, which: int) -> None:
        """It cannot be closed, and has a step of this sequence."""
        each = self.running.pop(which % len(self.running))
        self.abandoned += each.table.count
        each.table.abandon()
        assert each.table.count == 0
        each.table.release()

    @rule()
    def forget(self) -> None:
        self.index.clear()

    @invariant()
    def memory_is_bounded(self) -> None:
        found = self.windows.statistics()
        assert self.backed == {page for page in range(PAGES) if self.windows.has(page)}
        assert found.backed == len(self.backed)
        assert found.given_back == self.discarded
        assert found.backed <= CAPACITY + self.abandoned
        assert found.held <= CAPACITY + self.abandoned
        assert found.held <= found.backed <= found.peak_backed

    def teardown(self) -> None:
        for each in self.running.copy():
            self.release(each)
        self.index.clear()
        assert self.pool.held <= self.abandoned
        assert self.windows.statistics().held <= self.abandoned
        if not self.abandoned:
            assert (self.pool.held, self.windows.statistics().held) == (0, 0)


WindowMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=60, deadline=None)
TestWindows = WindowMachine.TestCase


@settings(max_examples=300, deadline=None)
@given(
    window=st.integers(1, 20),
    size=st.integers(1, 8),
    ranges=st.lists(st.tuples(st.integers(0, 60), st.integers(0, 30)), min_size=1, max_size=5),
)
def test_no_more_pages_are_held_than_the_law_says(
    window: int, size: int, ranges: list[tuple[int, int]]
) -> None:
    """``ranges``: of each sequence, positions computed and rows in flight."""
    held = 0
    for computed, rows in ranges:
        first = max(0, computed - window + 1) // size
        held += max(0, -(-(computed + rows) // size) - first)
    assert held <= least_window_pages(window, len(ranges), sum(rows for _, rows in ranges), 1000, size)


@pytest.mark.parametrize(
    ("window", "sequences", "rows"), [(512, 1, 384), (512, 8, 440), (1024, 3, 1), (70, 2, 300)]
)
def test_the_law_is_reached(window: int, sequences: int, rows: int) -> None:
    """By sequences each of which stands where it holds the most pages."""
    bound = least_window_pages(window, sequences, rows, 10_000)
    assert least_window_pages(window, sequences, rows, 64) == sequences
    one = [
        max(-(-(c + r) // PAGE_TOKENS) - (c - window + 1) // PAGE_TOKENS for c in range(2000, 2064))
        for r in range(rows + 1)
    ]  # pages of one sequence with r rows in flight
    most = one  # of all so far, with r rows together
    for _ in range(sequences - 1):
        most = [max(most[r - own] + one[own] for own in range(r + 1)) for r in range(rows + 1)]
    assert most[rows] == bound
    assert window_pages(window, sequences, rows, 10_000) == bound + sequences * -(-(window - 1) // 64)


def table_of(index: PrefixIndex, tokens: list[int], *, chunk: int = P) -> tuple[PageTable, int]:
    """A sequence that has computed all its tokens, and its hit."""
    table = PageTable(index, CONTEXT_PAGES)
    known = array("i", tokens)
    hit = table.match(known)
    table.extend(table.missing(len(tokens)))
    for end in range(hit + chunk, len(tokens) + chunk, chunk):
        table.back(min(end, len(tokens)))
        table.commit(known, min(end, len(tokens)))
        table.pass_by(min(end, len(tokens)))
    return table, hit


def made(capacity: int, pages: int = PAGES) -> tuple[WindowPool, PrefixIndex]:
    windows = WindowPool(pages, capacity, WINDOW, lambda page: None, P)
    return windows, PrefixIndex(PagePool(pages, windows), P)


def test_the_next_turn_begins_behind_the_last_whole_page() -> None:
    windows, index = made(4)
    turn = [1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 1, 0]
    table, _ = table_of(index, turn)
    assert windows.statistics().held == 2  # position 12 sees those from 8 on
    table.release()
    assert windows.statistics().held == 0
    again, hit = table_of(index, [*turn, 1, 1])
    assert hit == 12
    again.release()


def test_only_a_prefix_whose_windowed_bytes_are_there_is_found() -> None:
    """Some other sequence needs memory: of what nobody holds, that goes which was let go first."""
    windows, index = made(6)
    turn = list(range(12))
    table, _ = table_of(index, turn)
    held = table.pages.tolist()
    table.release()
    assert [windows.has(page) for page in held] == [True] * 6
    found: list[int] = []
    for gone in range(1, 6):
        windows.take(index.allocate(1)[0])
        assert [windows.has(page) for page in held].count(True) == 6 - gone
        for end in range(len(turn), 0, -P):
            again = PageTable(index, CONTEXT_PAGES)
            hit = again.match(array("i", [*turn[:end], 99]))
            for at in range(windows.first(hit), hit // P):
                assert windows.has(held[at])
            again.release()
            if end == len(turn):
                found.append(hit)
    assert found == [12, 10, 8, 6, 0]  # the shorter ones were asked for later; one page alone is not enough


def test_pages_computed_again_take_the_place_of_those_without_windowed_bytes() -> None:
    """Or no later turn would find its beginning."""
    _, index = made(4)
    turn = [1, 0, 1, 1, 0, 0, 1, 0]
    for number in range(2):
        table, hit = table_of(index, turn)
        assert hit == 0
        table.release()
        other, _ = table_of(index, [5 + number] * 14)  # takes all the memory there is
        other.release()
    table, hit = table_of(index, turn)
    assert hit == 0
    table.release()
    found, hit = table_of(index, [*turn, 3])
    assert hit == 8
    found.release()
    assert index.statistics().pages <= PAGES


def test_pages_that_are_free_go_first() -> None:
    """Their bytes are nobody's, while those of an indexed page may be wanted again."""
    windows, index = made(4)
    kept, _ = table_of(index, [1, 0, 1, 0])
    kept.release()  # two pages, in the index
    private = PageTable(index, CONTEXT_PAGES)
    private.extend(2)
    private.back(4)
    pages = private.pages.tolist()
    private.release()
    next_one = [page for page in range(PAGES) if not windows.has(page)][:1]
    windows.take(next_one[0])
    assert [windows.has(page) for page in pages].count(True) == 1
    assert table_of(index, [1, 0, 1, 0, 1])[1] == 4


def test_misuse_is_a_bug() -> None:
    windows = WindowPool(4, 2, WINDOW, lambda page: None, P)
    windows.take(0)
    windows.take(1)
    with pytest.raises(InternalError, match="all 2 KV pages"):
        windows.take(2)
    with pytest.raises(InternalError, match="page 1, which somebody holds"):
        windows.take(1)
    with pytest.raises(InternalError, match="page 3, which are not there"):
        windows.hold(3)
    with pytest.raises(InternalError, match="page 2, which nobody holds"):
        windows.let_go(2)
    with pytest.raises(InternalError, match="page 2, which nobody holds"):
        windows.abandon(2)
    for capacity, window in ((0, 1), (5, 1), (2, 0)):
        with pytest.raises(ValueError, match="is needed"):
            WindowPool(4, capacity, window, lambda page: None)


# -- the bytes


GEMMA = TinyModel("gemma3_text", seed=150, layers=7, context=1024, config={"sliding_window": 70})


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> ModelDescription:
    with open_model_file(write_gguf(tmp_path_factory.mktemp("windows") / "gemma.gguf", GEMMA)) as file:
        return describe(file)


def test_blocks_with_a_window_lie_in_an_area_of_their_own(gemma: ModelDescription) -> None:
    whole, split = StateLayout.of(gemma, "f16"), StateLayout.of(gemma, "f16", 1024)
    assert (whole.window_page_bytes, whole.window) == (0, None)
    each = whole.page_bytes // 7
    assert (split.page_bytes, split.window) == (each, 70)  # layer 5 sees all
    assert split.window_page_bytes == -(-6 * each // native.page_bytes()) * native.page_bytes()
    assert [place.windowed for place in split.paged] == [place.layer != 5 for place in split.paged]
    assert [place.offset for place in split.paged] == [0, each, 2 * each, 3 * each, 4 * each, 0, 5 * each]


@pytest.mark.parametrize("context", [None, 1, 69, 70])
def test_a_window_as_long_as_the_context_is_none(gemma: ModelDescription, context: int | None) -> None:
    assert StateLayout.of(gemma, "f16", context) == StateLayout.of(gemma, "f16")
    assert context is None or widest_window(gemma, context) is None
    assert widest_window(gemma, 71) == 70


def resident(store: StateStore) -> int:
    """Bytes of the windowed area that have memory."""
    assert store.window_memory is not None
    return resident_bytes(store.window_memory)


def test_memory_really_goes_back(gemma: ModelDescription) -> None:
    """And the next page's is taken in its place: never more than the plan says."""
    layout = StateLayout.of(gemma, "f16", 1024)
    with StateStore(layout, 16, window_pages=4) as store:
        windows = store.pool.windows
        assert windows is not None
        assert resident(store) == 0
        pages = store.pool.allocate(16)
        for number, page in enumerate(pages):
            windows.take(page)
            store.import_page(page, np.full(layout.page_bytes + layout.window_page_bytes, page, np.uint8))
            assert resident(store) == min(4, number + 1) * layout.window_page_bytes
            if number >= 3:
                windows.let_go(pages[number - 3])
        found = windows.statistics()
        assert (found.backed, found.held, found.peak_backed, found.given_back) == (4, 3, 4, 12)
        kept = store.export_page(pages[-1])
        assert (kept == pages[-1]).all()
        gone = store.export_page(pages[0])  # the blocks that see all positions keep theirs
        assert (gone[: layout.page_bytes] == pages[0]).all()
        assert not gone[layout.page_bytes :].any()
        assert store.nbytes == 16 * layout.page_bytes + 4 * layout.window_page_bytes
        del kept, gone
    assert store.window_memory is None


def test_a_page_is_copied_and_carried_in_both_areas(gemma: ModelDescription) -> None:
    layout = StateLayout.of(gemma, "q8", 1024)
    rng = np.random.default_rng(2)
    with StateStore(layout, 3) as store:
        data = rng.integers(0, 255, layout.page_bytes + layout.window_page_bytes).astype(np.uint8)
        store.import_page(1, data)
        store.copy_page(1, 2)
        np.testing.assert_array_equal(store.export_page(2), data)
        with pytest.raises(ValueError, match="bytes for a page of"):
            store.import_page(0, data[:-1])


def test_every_page_may_have_memory_where_nobody_says_otherwise(gemma: ModelDescription) -> None:
    layout = StateLayout.of(gemma, "f16", 1024)
    for given_pages in (None, 3, 5):
        with StateStore(layout, 3, window_pages=given_pages) as store:
            assert store.pool.windows is None
            assert store.nbytes == 3 * (layout.page_bytes + layout.window_page_bytes)
