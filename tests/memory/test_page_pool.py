from __future__ import annotations

import pytest

from pi2rt._errors import InternalError
from pi2rt.memory import PagePool, PagePoolStatistics


def test_pages_come_and_go() -> None:
    pool = PagePool(4)
    pages = pool.allocate(3)
    assert sorted(pages) == [0, 1, 2]
    assert (pool.free, pool.held, len(pool)) == (1, 3, 4)
    pool.release_all(pages)
    assert pool.statistics() == PagePoolStatistics(pages=4, held=0, peak_held=3)


def test_the_page_freed_last_is_used_first() -> None:
    pool = PagePool(4)
    first, second = pool.allocate(2)
    pool.release(second)
    pool.release(first)
    assert pool.allocate(2) == [first, second]


def test_a_page_is_free_when_its_last_owner_lets_go() -> None:
    pool = PagePool(1)
    (page,) = pool.allocate(1)
    assert pool.retain(page) == 2
    assert pool.release(page) == 1
    assert not pool.can_allocate(1)
    assert pool.release(page) == 0
    assert pool.can_allocate(1)


def test_misuse_is_a_bug() -> None:
    pool = PagePool(1)
    with pytest.raises(InternalError, match="released KV page 0, which is free"):
        pool.release(0)
    with pytest.raises(InternalError, match="retained KV page 0, which is free"):
        pool.retain(0)
    with pytest.raises(InternalError, match="allocated 2 KV pages where only 1 are free"):
        pool.allocate(2)
    with pytest.raises(ValueError, match="at least one page"):
        PagePool(0)
