"""Attention over pages: against numpy in float64, and between variants bit for bit."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pi2rt.cython_kernels.kernels import native
from tests.kernels.variants import KERNELS, OTHERS, SCALAR, Floats, assert_same_bits, misaligned

Doubles = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int32]

seeds = st.integers(0, 2**32 - 1)
KV_TYPES = tuple(native.KV_TYPES)


def as_cached(kv_type: str, x: Floats) -> Doubles:
    """What the cache keeps of keys or values (positions, head_dim)."""
    if kv_type == "f16":
        return x.astype(np.float16).astype(np.float64)
    if kv_type == "f32":
        return x.astype(np.float64)
    scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(all="ignore"):
        q = np.where(scale > 0, np.rint(x * (np.float32(1) / scale)), 0)
    result: Doubles = q.astype(np.float64) * scale.astype(np.float64)
    return result


def reference(
    kv_type: str, keys: Floats, values: Floats, queries: Floats, lo: Ints, hi: Ints, softcap: float
) -> Doubles:
    scores = queries.astype(np.float64) @ as_cached(kv_type, keys).T
    if softcap:
        scores = softcap * np.tanh(scores / softcap)
    position = np.arange(len(keys))
    visible = (position >= lo[:, None]) & (position < hi[:, None])
    scores = np.where(visible, scores, -np.inf)
    weights = np.exp(scores - scores.max(axis=1, keepdims=True))
    result: Doubles = weights / weights.sum(axis=1, keepdims=True) @ as_cached(kv_type, values)
    return result


@dataclass(frozen=True, slots=True)
class Problem:
    keys: Floats = field(repr=False)
    values: Floats = field(repr=False)
    queries: Floats = field(repr=False)
    lo: Ints = field(repr=False)
    hi: Ints = field(repr=False)
    splits: tuple[tuple[int, int], ...]
    offset: int

    def run(self, kernels: native.Kernels, **options: Any) -> Floats:
        keys, values, queries = (misaligned(x, self.offset) for x in (self.keys, self.values, self.queries))
        return kernels.attention(keys, values, queries, self.lo, self.hi, **options)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    rng = np.random.default_rng(draw(seeds))
    n = draw(st.one_of(st.integers(1, 20), st.integers(60, 70), st.integers(120, 200)))
    head_dim = 16 * draw(st.integers(1, 16))
    nq = draw(st.integers(1, 40))
    lo = rng.integers(0, n, nq).astype(np.int32) if draw(st.booleans()) else np.zeros(nq, np.int32)
    hi = np.minimum(lo + rng.integers(1, n + 1, nq), n).astype(np.int32)
    cuts = sorted({0, n, *draw(st.lists(st.integers(0, n), max_size=4))})
    scale = draw(st.sampled_from([0.01, 1.0, 3.0])) / head_dim**0.5
    return Problem(
        keys=rng.standard_normal((n, head_dim)).astype(np.float32),
        values=(rng.standard_normal((n, head_dim)) * 5).astype(np.float32),
        queries=(rng.standard_normal((nq, head_dim)) * scale).astype(np.float32),
        lo=lo,
        hi=hi,
        splits=tuple(itertools.pairwise(cuts)),
        offset=draw(st.integers(0, 15)),
    )


@pytest.mark.parametrize("softcap", [0.0, 15.0])
@pytest.mark.parametrize("kv_type", KV_TYPES)
@given(problem=problems())
@settings(max_examples=20, deadline=None)
def test_attention(kv_type: str, softcap: float, problem: Problem) -> None:
    """Also: the pages hold NaN where nothing was written, which must not leak into any result."""
    options: dict[str, Any] = {"kv_type": kv_type, "softcap": softcap}
    whole = problem.run(SCALAR, **options)
    parts = problem.run(SCALAR, **options, splits=problem.splits)
    for name, kernels in OTHERS.items():
        assert_same_bits(problem.run(kernels, **options), whole, name)
        again = problem.run(kernels, **options, splits=problem.splits)
        assert_same_bits(again, parts, f"{name} in {len(problem.splits)} parts")
    expected = reference(
        kv_type, problem.keys, problem.values, problem.queries, problem.lo, problem.hi, softcap
    )
    # Scores of at most ten or so, a sum of head_dim roundings: their error, times the values.
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-5 * np.abs(problem.values).max())
    np.testing.assert_allclose(parts, expected, rtol=0, atol=1e-5 * np.abs(problem.values).max())


@pytest.mark.parametrize("kv_type", KV_TYPES)
@given(problem=problems(), pick=seeds)
@settings(max_examples=15, deadline=None)
def test_a_query_stands_alone(kv_type: str, problem: Problem, pick: int) -> None:
    """A query's bits depend neither on the queries of its tile nor on how many there are."""
    i = pick % len(problem.queries)
    alone = replace(
        problem, queries=problem.queries[i : i + 1], lo=problem.lo[i : i + 1], hi=problem.hi[i : i + 1]
    )
    for name, kernels in KERNELS.items():
        together = problem.run(kernels, kv_type=kv_type, splits=problem.splits)
        by_itself = alone.run(kernels, kv_type=kv_type, splits=problem.splits)
        assert_same_bits(by_itself, together[i : i + 1], f"{name}, query {i}")


@pytest.mark.parametrize("kv_type", KV_TYPES)
@given(problem=problems(), junk=st.sampled_from([np.nan, np.inf, 6e4]))
@settings(max_examples=15, deadline=None)
def test_positions_outside_the_window_have_no_influence(kv_type: str, problem: Problem, junk: float) -> None:
    """Whatever stands there, be it NaN of a page's former owner."""
    first, last = int(problem.lo.min()), int(problem.hi.max())
    keys, values = problem.keys.copy(), problem.values.copy()
    for cached in (keys, values):
        cached[:first] = junk
        cached[last:] = junk
    dirty = replace(problem, keys=keys, values=values)
    for name, kernels in KERNELS.items():
        clean = problem.run(kernels, kv_type=kv_type, splits=((first, last),))
        assert_same_bits(dirty.run(kernels, kv_type=kv_type, splits=((first, last),)), clean, name)


@pytest.mark.parametrize("kv_type", KV_TYPES)
def test_one_visible_position_gives_its_value(kv_type: str) -> None:
    rng = np.random.default_rng(5)
    keys, values = rng.standard_normal((2, 130, 32)).astype(np.float32)
    lo = np.arange(130, dtype=np.int32)
    queries = rng.standard_normal((130, 32)).astype(np.float32)
    for name, kernels in KERNELS.items():
        got = kernels.attention(keys, values, queries, lo, lo + 1, kv_type=kv_type)
        np.testing.assert_allclose(got, as_cached(kv_type, values), rtol=1e-6, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kv_type", KV_TYPES)
@given(scale=st.sampled_from([1e3, 1e4]), seed=seeds)
@example(scale=1e4, seed=0)
@settings(max_examples=10, deadline=None)
def test_huge_scores_pick_the_largest(kv_type: str, scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys, values = rng.standard_normal((2, 90, 16)).astype(np.float32)
    queries = (keys[rng.integers(0, 90, 7)] * scale).astype(np.float32)
    hi = np.full(7, 90, np.int32)
    scores = queries.astype(np.float64) @ as_cached(kv_type, keys).T
    top = np.sort(scores, axis=1)
    clear = top[:, -1] - top[:, -2] > 200
    expected = as_cached(kv_type, values)[np.argmax(scores, axis=1)]
    for name, kernels in KERNELS.items():
        got = kernels.attention(keys, values, queries, np.zeros(7, np.int32), hi, kv_type=kv_type)
        assert np.isfinite(got).all(), name
        np.testing.assert_allclose(got[clear], expected[clear], rtol=1e-6, atol=1e-6, err_msg=name)
