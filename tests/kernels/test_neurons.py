"""Products with single neurons: the bits of the dense products, on every instruction set."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt.cython_kernels.kernels import native
from pi2rt.formats import neuron_bundles, quants
from pi2rt.formats.neuron_bundles import Matrix
from tests.kernels.variants import KERNELS, SCALAR, Floats, assert_same_bits
from tests.kernels.weights import Bytes, random_rows

seeds = st.integers(0, 2**32 - 1)
types = st.sampled_from(neuron_bundles.TYPES)
quick = settings(max_examples=60, deadline=None)
ODD = st.sampled_from([None, 0, 0x7F, 0x80, 0xFF])


def aligned(size: int) -> tuple[native.Memory, Bytes]:
    """Zeroed bytes that begin at a page, as those of a cache do; the kernels prefetch behind them."""
    memory = native.Memory(size + 4096)
    return memory, memory.view()[:size]


def activations(rng: np.random.Generator, n: int, spread: int) -> Floats:
    """Of magnitudes around 10**spread; some zeros, and one that is far larger than its neighbours."""
    x = rng.standard_normal(n) * 10.0**spread
    x[rng.random(n) < 0.2] = 0
    x[rng.integers(n)] *= 1000
    return x.astype(np.float32)


def dense(type_name: str, raw: Bytes, x: Floats, wide: bool) -> Floats:
    """The whole matrix (rows, k) times x, by the kernels for row blocks."""
    memory = native.Memory(native.matrix_bytes(type_name, len(raw), len(x)))
    assert native.repack(type_name, raw.reshape(-1), len(raw), len(x), memory.address) is None
    out = SCALAR.gemm(type_name, memory.address, len(raw), len(x), x[None], wide=wide)[0]
    memory.close()
    return out


@given(seed=seeds, type_name=types, blocks=st.integers(1, 40), count=st.integers(1, 40), wide=st.booleans(),
       spread=st.integers(-30, 30), odd=ODD)  # fmt: skip
@quick
def test_rows_are_the_dense_product_bit_for_bit(
    seed: int, type_name: str, blocks: int, count: int, wide: bool, spread: int, odd: int | None
) -> None:
    rng = np.random.default_rng(seed)
    k = 32 * blocks
    raw = random_rows(rng, type_name, 64, k, quants=odd)
    layout = neuron_bundles.arrange(
        "b", Matrix("up", type_name, (64, k)), Matrix("down", "Q4_0", (k, 64))
    ).layout
    memory, pages = aligned(-(-64 // layout[0]) * layout[1])
    scale_memory, scales = aligned(64 * native.up_scales(type_name, k))
    assert native.bundle_up(type_name, raw.reshape(-1), 64, k, layout, pages, scales) is None
    x = activations(rng, k, spread)
    chosen = sorted(rng.choice(64, count, replace=False).tolist())
    expected = dense(type_name, raw, x, wide)[chosen]
    for name, kernels in KERNELS.items():
        assert_same_bits(
            kernels.neuron_rows(type_name, pages, scales, layout, chosen, x, wide=wide), expected, name
        )
    memory.close()
    scale_memory.close()


@given(seed=seeds, type_name=types, rows=st.integers(1, 400), firing=st.floats(0, 1), wide=st.booleans(),
       spread=st.integers(-30, 30), odd=ODD)  # fmt: skip
@quick
def test_columns_are_the_dense_product_bit_for_bit(
    seed: int, type_name: str, rows: int, firing: float, wide: bool, spread: int, odd: int | None
) -> None:
    rng = np.random.default_rng(seed)
    raw = random_rows(rng, type_name, rows, 32, quants=odd)
    up = Matrix("up", "Q4_0", (32, 32 * int(rng.integers(1, 30))))
    layout = neuron_bundles.arrange("b", up, Matrix("down", type_name, (rows, 32))).layout
    memory, pages = aligned(-(-32 // layout[0]) * layout[1])
    scale_memory, scales = aligned(native.down_scales(type_name, rows))
    assert native.bundle_down(type_name, raw.reshape(-1), rows, 32, 0, 32, layout, pages, scales) is None
    h = activations(rng, 32, spread)
    h[rng.random(32) >= firing] = 0
    expected = dense(type_name, raw, h, wide)
    for name, kernels in KERNELS.items():
        got = kernels.neuron_columns(type_name, pages, scales, layout, h, rows, wide=wide)
        assert_same_bits(got, expected, name)
    memory.close()
    scale_memory.close()


@pytest.mark.parametrize("type_name", neuron_bundles.TYPES)
def test_rows_are_close_to_float64(type_name: str) -> None:
    rng = np.random.default_rng(7)
    raw = random_rows(rng, type_name, 32, 1088)
    layout = neuron_bundles.arrange(
        "b", Matrix("up", type_name, (32, 1088)), Matrix("down", "Q4_0", (1088, 32))
    ).layout
    memory, pages = aligned(-(-32 // layout[0]) * layout[1])
    scale_memory, scales = aligned(32 * native.up_scales(type_name, 1088))
    native.bundle_up(type_name, raw.reshape(-1), 32, 1088, layout, pages, scales)
    x = rng.standard_normal(1088).astype(np.float32)
    weights: npt.NDArray[np.float64] = quants.dequantize(type_name, raw.reshape(-1), (32, 1088)).astype(
        np.float64
    )
    for kernels in KERNELS.values():
        got = kernels.neuron_rows(type_name, pages, scales, layout, list(range(32)), x, wide=True)
        np.testing.assert_allclose(got, weights @ x, rtol=0, atol=2e-4 * np.abs(weights @ x).max())
    memory.close()
    scale_memory.close()
