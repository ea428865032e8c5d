"""An order is always one of the same neurons, saves reads where there is something to save, and says so where not."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from pi2rt.formats.neuron_order import CLUSTER, decode_order, encode_order, neurons_at, own_order
from pi2rt.planner.learn.coactivation import CoActivation, Fired, by_page, find_order, reading


@st.composite
def firings(draw: st.DrawFn) -> Fired:
    """Of any kind: none, all, or a few of up to three clusters."""
    neurons = draw(st.integers(1, 3 * CLUSTER // 32)) * 32
    tokens = draw(st.integers(1, 12))
    share = draw(st.sampled_from([0.0, 0.02, 0.5, 1.0]))
    random = np.random.default_rng(draw(st.integers(0, 1 << 16)))
    return np.asarray(random.random((tokens, neurons)) < share)


@given(firings(), st.integers(1, 12))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_it_is_a_permutation_of_each_cluster(fired: Fired, per_page: int) -> None:
    found = CoActivation(fired.shape[1])
    for part in np.array_split(fired, 2):
        found.add(part)
    np.testing.assert_array_equal(found.frequency(), fired.sum(axis=0))
    order = found.order(per_page)
    assert order.dtype == np.uint16
    np.testing.assert_array_equal(decode_order(encode_order(order), len(order)), order)
    np.testing.assert_array_equal(neurons_at(order) // CLUSTER, np.arange(len(order)) // CLUSTER)
    np.testing.assert_array_equal(np.sort(neurons_at(order)), np.arange(len(order)))


def counted(wanted: list[bool], gap: int) -> int:
    """Reads of a row of pages, one after another."""
    reads, since = 0, gap + 1
    for each in wanted:
        if each:
            reads += since > gap
            since = 0
        else:
            since += 1
    return reads


@given(
    arrays.arrays(np.bool_, arrays.array_shapes(min_dims=2, max_dims=2, max_side=40)),
    st.integers(1, 5),
    st.integers(0, 6),
    st.integers(0, 1 << 16),
)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_reads_are_counted(fired: Fired, per_page: int, gap: int, seed: int) -> None:
    tokens, neurons = fired.shape
    random = np.random.default_rng(seed)
    order = random.permutation(neurons).astype(np.uint16)
    present = random.random(-(-neurons // per_page)) < 0.3
    rows = [
        [
            any(row[neuron] for neuron in order[page * per_page : (page + 1) * per_page]) and not there
            for page, there in enumerate(present)
        ]
        for row in fired
    ]
    found = reading(fired, order, per_page, gap, present=present)
    assert found.pages == pytest.approx(sum(map(sum, rows)) / tokens)
    assert found.reads == pytest.approx(sum(counted(row, 0) for row in rows) / tokens)
    assert found.through == pytest.approx(sum(counted(row, gap) for row in rows) / tokens)
    np.testing.assert_array_equal(by_page(fired, order, per_page) & ~present, rows)


def planted(tokens: int, neurons: int = 1024, groups: int = 40) -> Fired:
    """Neurons of a group, which lie anywhere, are mostly active together."""
    random = np.random.default_rng(1)
    group = random.integers(0, groups, neurons)
    on = random.random((tokens, groups)) < 0.1
    fires = on[:, group] & (random.random((tokens, neurons)) < 0.8)
    return np.asarray(fires | (random.random((tokens, neurons)) < 0.02))


@pytest.mark.parametrize("per_page", [1, 2, 4])
def test_groups_are_found(per_page: int) -> None:
    fired = planted(1200)
    order, found = find_order(
        [fired[:400], fired[400:800]], fired[800:], own_order(1024), per_page, gap_pages=2
    )
    assert order is not None
    assert found.ordered.reads < 0.5 * found.own.reads
    assert found.ordered_half.reads < 0.7 * found.own_half.reads
    assert found.ordered.through < found.ordered.reads
    assert found.ordered_half.pages < found.ordered.pages
    if per_page == 1:
        assert found.ordered.pages == found.own.pages
    else:
        assert found.ordered.pages < 0.8 * found.own.pages


def test_nothing_is_gained_where_there_is_nothing() -> None:
    """All are active alike, and by chance: what was found of one text means nothing for another."""
    fired = np.random.default_rng(2).random((900, 640)) < 0.3
    order, found = find_order([fired[:600]], fired[600:], own_order(640), 1, 0)
    assert found.ordered.reads == pytest.approx(found.own.reads, rel=0.01)
    everything = np.ones((20, 640), np.bool_)
    order, found = find_order([everything], everything, own_order(640), 1, 0)
    assert order is None
    assert found.own.reads == found.ordered.reads == 1


def test_the_order_that_there_is_counts() -> None:
    fired = planted(600)
    order, found = find_order([fired[:400]], fired[400:], own_order(1024), 1, 0)
    assert order is not None
    again, same = find_order([fired[:400]], fired[400:], order, 1, 0)
    assert again is None
    assert same.own == same.ordered == found.ordered
