"""Matrix products and the quantisation of their inputs: against numpy, and between variants bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pi2rt.cython_kernels.kernels import native
from pi2rt.formats import quants
from tests.kernels.variants import EPSILON, KERNELS, OTHERS, SCALAR, Floats, assert_same_bits, misaligned
from tests.kernels.weights import FLOAT_TYPES, QUANT_TYPES, TYPE_NAMES, Bytes, random_rows, without_quants

Doubles = npt.NDArray[np.float64]

seeds = st.integers(0, 2**32 - 1)
quick = settings(max_examples=60, deadline=None)


@contextmanager
def row_blocks(type_name: str, raw: Bytes, k: int) -> Iterator[int]:
    memory = native.Memory(native.matrix_bytes(type_name, len(raw), k) or 64)
    assert native.repack(type_name, raw.reshape(-1), len(raw), k, memory.address) is None
    yield memory.address
    memory.close()


def floats(rng: np.random.Generator, n: int) -> Floats:
    """Finite, of every magnitude, zeros and denormals among them."""
    x = rng.standard_normal(n) * 10.0 ** rng.uniform(-44, 37, n)
    special = rng.choice(np.array([0.0, -0.0, 1e-45, -3e-39, 3.4e38, -3.4e38]), n)
    return np.where(rng.random(n) < 0.2, special, x).astype(np.float32)


@given(
    seed=seeds, blocks=st.integers(0, 5), wide=st.booleans(), offset=st.integers(0, 15), wild=st.booleans()
)
@quick
def test_quantised_activations_are_numpys_bit_for_bit(
    seed: int, blocks: int, wide: bool, offset: int, wild: bool
) -> None:
    rng = np.random.default_rng(seed)
    x = floats(rng, 32 * blocks) if wild else rng.standard_normal(32 * blocks).astype(np.float32)
    limit = np.float32(32767 if wide else 127)
    with np.errstate(all="ignore"):
        d = np.abs(x).reshape(-1, 32).max(axis=1, initial=0) / limit
        inverse = np.float32(1) / d
        usable = inverse <= np.float32(3e38)
        d, inverse = np.where(usable, d, np.float32(0)), np.where(usable, inverse, np.float32(0))
        q = np.rint(x.reshape(-1, 32) * inverse[:, None])
        s = d * q.sum(axis=1).astype(np.float32)
    assert np.abs(q).max(initial=0) <= limit
    for name, kernels in KERNELS.items():
        got = kernels.quantize(misaligned(x, offset), wide=wide)
        assert_same_bits(got[0], q.reshape(-1).astype(np.int16 if wide else np.int8), f"{name} q")
        assert_same_bits(got[1], d.astype(np.float32), f"{name} d")
        np.testing.assert_array_equal(got[2], s, f"{name} s")  # a sum of nothing but -0 may be +0
        if not wide:
            assert_same_bits(got[3], q.reshape(-1, 16).sum(axis=1).astype(np.int16), f"{name} h")


@pytest.mark.parametrize("wide", [False, True], ids=["int8", "int16"])
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_block_with_a_broken_number_becomes_zeros_times_nan(broken: float, wide: bool) -> None:
    """So that every product with it is NaN, and a broken model cannot go on as if nothing had happened."""
    for place in range(32):
        x = np.ones(96, np.float32)
        x[32 + place] = broken
        for name, kernels in KERNELS.items():
            q, d, s, _ = kernels.quantize(x, wide=wide)
            assert not q[32:64].any(), name
            assert np.isnan([d[1], s[1]]).all(), name
            assert np.isfinite(d[[0, 2]]).all(), name
            assert q[:32].all(), name


@st.composite
def shapes(draw: st.DrawFn, type_name: str) -> tuple[int, int, int]:
    """(n, rows, k)"""
    step = quants.TYPES[type_name].block_elements
    k = draw(st.integers(0, 70)) if step == 1 else step * draw(st.integers(0, 8 if step == 32 else 2))
    return draw(st.integers(0, 19)), draw(st.integers(1, 35)), k


@pytest.mark.parametrize("type_name", TYPE_NAMES)
def test_products_have_the_scalar_variants_bits_and_columns_stand_alone(type_name: str) -> None:
    @given(
        shape=shapes(type_name), seed=seeds, wide=st.booleans(), offset=st.integers(0, 15), wild=st.booleans()
    )
    @settings(max_examples=25, deadline=None)
    @example(shape=(9, 17, 256), seed=0, wide=True, offset=3, wild=False)
    @example(shape=(9, 17, 256), seed=0, wide=False, offset=1, wild=False)
    def check(shape: tuple[int, int, int], seed: int, wide: bool, offset: int, wild: bool) -> None:
        n, rows, k = shape
        rng = np.random.default_rng(seed)
        x = rng.standard_normal((n, k)).astype(np.float32)
        if wild:
            x = floats(rng, n * k).reshape(n, k) / np.float32(1e3)
        x = misaligned(x, offset)
        with row_blocks(type_name, random_rows(rng, type_name, rows, k), k) as address:
            expected = SCALAR.gemm(type_name, address, rows, k, x, wide=wide)
            assert expected.shape == (n, rows)
            for name, kernels in KERNELS.items():
                if name in OTHERS:
                    got = kernels.gemm(type_name, address, rows, k, x, wide=wide)
                    assert_same_bits(got, expected, name)
                if n > 1 and k:
                    c = seed % n
                    alone = kernels.gemm(type_name, address, rows, k, x[c : c + 1], wide=wide)
                    assert_same_bits(alone, expected[c : c + 1], f"{name}, column {c} by itself")

    check()


@pytest.mark.parametrize("wide", [False, True], ids=["int8", "int16"])
@pytest.mark.parametrize("type_name", QUANT_TYPES)
def test_several_row_blocks_at_once_have_the_bits_of_one_by_one(type_name: str, wide: bool) -> None:
    rng = np.random.default_rng(len(type_name) + wide)
    rows, k, most = 150, 256, 70  # ten row blocks, the last not full: panels, and blocks left over
    x = rng.standard_normal((most, k)).astype(np.float32)
    x[::7] = floats(rng, len(x[::7]) * k).reshape(-1, k) / np.float32(1e3)
    x[5, 40] = np.nan
    with row_blocks(type_name, random_rows(rng, type_name, rows, k), k) as address:
        expected = SCALAR.gemm(type_name, address, rows, k, x, wide=wide)
        for name, kernels in KERNELS.items():
            for n in range(1, most + 1):
                got = kernels.gemm(type_name, address, rows, k, x[:n], wide=wide, panels=True)
                assert_same_bits(got, expected[:n], f"{name}, {n} columns")


@pytest.mark.parametrize("type_name", QUANT_TYPES)
def test_mixed_activations_have_the_same_bits_in_panels_and_one_by_one(type_name: str) -> None:
    rng = np.random.default_rng(len(type_name))
    rows, k, most = 150, 512, 21
    x = rng.standard_normal((most, k)).astype(np.float32)
    x[:, 64:96] *= 30  # fine blocks that all rows have, and
    x[::5, 300] = 40  # some that only some rows of a tile have
    x[7] = floats(rng, k) / np.float32(1e3)
    x[5, 40] = np.nan
    x[6] *= np.float32(1e-36)
    with row_blocks(type_name, random_rows(rng, type_name, rows, k), k) as address:
        expected = SCALAR.gemm(type_name, address, rows, k, x, wide=True, mixed=True)
        for name, kernels in KERNELS.items():
            for n in range(1, most + 1):
                got = kernels.gemm(type_name, address, rows, k, x[:n], wide=True, mixed=True, panels=True)
                assert_same_bits(got, expected[:n], f"{name}, {n} columns")


@given(seed=seeds, blocks=st.integers(1, 40), outliers=st.floats(0, 1))
@settings(max_examples=60, deadline=None)
def test_mixed_activations_are_fine_where_they_are_largest(seed: int, blocks: int, outliers: float) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((blocks, 32)).astype(np.float32)
    x[rng.random(blocks) < outliers] *= np.float32(8)
    top = np.abs(x).max(1)
    fine = top.astype(np.float64) ** 2 > 1.25**2 * np.mean(top.astype(np.float64) ** 2)
    coarse_q, coarse_d, coarse_s, sums = SCALAR.quantize(x.reshape(-1))
    for name, kernels in KERNELS.items():
        q, d, s, h, high, low = kernels.quantize(x.reshape(-1), wide=True, mixed=True)
        for b in range(blocks):
            at = slice(32 * b, 32 * b + 32)
            if fine[b]:
                assert h[2 * b] == np.iinfo(np.int16).min, name
                assert_same_bits(256 * high[at].astype(np.int16) + low[at], q[at], name)
                assert np.abs(q[at]).max() == 127 * 256 + 127, name
                assert np.abs(q[at] * d[b] - x[b]).max() <= 0.51 * d[b], name
                assert s[b] == d[b] * np.float32(q[at].sum(dtype=np.int32)), name
            else:
                assert_same_bits(high[at], coarse_q[at], name)
                assert_same_bits(q[at], coarse_q[at].astype(np.int16) * np.int16(256), name)
                assert (d[b] * np.float32(256), s[b]) == (coarse_d[b], coarse_s[b]), name
                assert_same_bits(h[2 * b : 2 * b + 2], sums[2 * b : 2 * b + 2], name)


@pytest.mark.parametrize("wide", [False, True], ids=["int8", "int16"])
@pytest.mark.parametrize("type_name", QUANT_TYPES)
@given(
    seed=seeds,
    n=st.integers(1, 6),
    rows=st.integers(1, 20),
    blocks=st.integers(1, 3),
    scale=st.integers(-4, 2),
)
@settings(max_examples=15, deadline=None)
def test_quantised_products_are_the_exact_ones_but_for_rounding(
    type_name: str, wide: bool, seed: int, n: int, rows: int, blocks: int, scale: int
) -> None:
    rng = np.random.default_rng(seed)
    k = blocks * quants.TYPES[type_name].block_elements
    raw = random_rows(rng, type_name, rows, k, scale=10.0**scale)
    x = (rng.standard_normal((n, k)) * 10.0**-scale).astype(np.float32)
    q, d, _, _ = SCALAR.quantize(x.reshape(-1), wide=wide)
    inputs = (q.reshape(-1, 32).astype(np.float64) * d.astype(np.float64)[:, None]).reshape(n, k)
    weights = quants.dequantize(type_name, raw, (rows, k)).astype(np.float64)
    offsets = quants.dequantize(type_name, without_quants(type_name, raw), (rows, k)).astype(np.float64)
    exact = inputs @ weights.T
    # A value is scale*quant + offset. Each block of 32 adds both parts with one rounding, after at most four
    # in the parts (integer sum to float, its scale, the block's scale, float32 dequantisation above).
    parts = np.abs(inputs) @ (np.abs(weights) + 2 * np.abs(offsets)).T
    tolerance = (2 * (k // 32) + 4) * EPSILON * parts
    with row_blocks(type_name, raw, k) as address:
        for name, kernels in KERNELS.items():
            error = np.abs(kernels.gemm(type_name, address, rows, k, x, wide=wide) - exact)
            assert (error <= tolerance).all(), (name, (error / tolerance).max())


@pytest.mark.parametrize("type_name", FLOAT_TYPES)
@given(
    seed=seeds, n=st.integers(1, 6), rows=st.integers(1, 20), k=st.integers(1, 200), scale=st.integers(-7, 3)
)
@settings(max_examples=15, deadline=None)
def test_float_products_are_the_exact_ones_but_for_rounding(
    type_name: str, seed: int, n: int, rows: int, k: int, scale: int
) -> None:
    rng = np.random.default_rng(seed)
    raw = random_rows(rng, type_name, rows, k, scale=10.0**scale)
    x = rng.standard_normal((n, k)).astype(np.float32)
    weights = quants.dequantize(type_name, raw, (rows, k)).astype(np.float64)
    exact = x.astype(np.float64) @ weights.T
    tolerance = (
        (k / 2 + 2) * EPSILON * (np.abs(x).astype(np.float64) @ np.abs(weights).T)
    )  # two chains of fma
    with row_blocks(type_name, raw, k) as address:
        for name, kernels in KERNELS.items():
            error = np.abs(kernels.gemm(type_name, address, rows, k, x) - exact)
            assert (error <= tolerance).all(), name


@pytest.mark.parametrize("wide", [False, True], ids=["int8", "int16"])
@pytest.mark.parametrize("type_name", QUANT_TYPES)
@pytest.mark.parametrize("fill", [0x00, 0x7F, 0x80, 0xFF])
@pytest.mark.parametrize("signs", ["plus", "minus", "mixed"])
def test_no_integer_sum_overflows_at_the_extremes(type_name: str, wide: bool, fill: int, signs: str) -> None:
    rng = np.random.default_rng(fill)
    raw = random_rows(rng, type_name, 64, 256, quants=fill)
    one = {"plus": np.ones(256), "minus": -np.ones(256), "mixed": rng.choice([-1.0, 1.0], 256)}[signs]
    x = np.tile(one.astype(np.float32), (5, 1))  # every activation at its limit
    weights = quants.dequantize(type_name, raw, (64, 256)).astype(np.float64)
    offsets = quants.dequantize(type_name, without_quants(type_name, raw), (64, 256)).astype(np.float64)
    exact = x @ weights.T
    tolerance = 20 * EPSILON * (np.abs(weights) + 2 * np.abs(offsets)).sum(axis=1)
    with row_blocks(type_name, raw, 256) as address:
        expected = SCALAR.gemm(type_name, address, 64, 256, x, wide=wide)
        assert (np.abs(expected - exact) <= tolerance).all()
        for name, kernels in KERNELS.items():
            for panels in (False, True):
                got = kernels.gemm(type_name, address, 64, 256, x, wide=wide, panels=panels)
                assert_same_bits(got, expected, f"{name}, panels: {panels}")
