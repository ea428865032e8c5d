"""The tables of rotations, bit for bit: the same on every machine, with every C library and build of NumPy."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable
from decimal import Decimal, localcontext

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt.cython_kernels.kernels import native
from pi2rt.models import rope_scaling
from pi2rt.models.rope_scaling import Frequencies

POSITIONS = 32_768

TABLES: dict[str, Callable[[], tuple[Frequencies, float]]] = {
    "plain 64, 10,000": lambda: (rope_scaling.plain(64, 10_000.0), 1.0),
    "plain 128, 10,000": lambda: (rope_scaling.plain(128, 10_000.0), 1.0),
    "plain 64, 100,000": lambda: (rope_scaling.plain(64, 100_000.0), 1.0),
    "plain 128, 500,000": lambda: (rope_scaling.plain(128, 500_000.0), 1.0),
    "plain 256, 1,000,000": lambda: (rope_scaling.plain(256, 1_000_000.0), 1.0),
    "linear": lambda: (rope_scaling.linear(rope_scaling.plain(256, 1_000_000.0), 8.0), 1.0),
    "dynamic": lambda: (rope_scaling.dynamic_ntk(128, 10_000.0, 2.0, 4096, POSITIONS), 1.0),
    "llama3": lambda: (
        rope_scaling.llama3(rope_scaling.plain(128, 500_000.0), 8.0, 1.0, 4.0, 8192),
        1.0,
    ),
    "yarn": lambda: (
        rope_scaling.yarn(128, 1_000_000.0, 4.0, 32_768),
        rope_scaling.yarn_magnitude(4.0),
    ),
    "yarn, not truncated": lambda: (
        rope_scaling.yarn(64, 150_000.0, 32.0, 4096, truncate=False),
        rope_scaling.yarn_magnitude(32.0, 0.707, 0.9),
    ),
    "longrope": lambda: (
        rope_scaling.plain(96, 10_000.0) / np.arange(1.0, 49.0),
        rope_scaling.longrope_magnitude(32.0, 4096),
    ),
}
"""Of each kind that files ask for: inverse frequencies and magnitude."""

GOLDEN = {
    "plain 64, 10,000": "d8ec532f1504f17f342a2ba1b6ec98de",
    "plain 128, 10,000": "8162b986e46cf82657bf66142570a4f1",
    "plain 64, 100,000": "83139b1aafb41a8795a1ae5b7f2161c0",
    "plain 128, 500,000": "d462e26c71ad5364ad2d4d08c13e5233",
    "plain 256, 1,000,000": "8365567dd3813bd0c836d618ad927ce7",
    "linear": "b74c77a44dffe08de4347439ddb60fd5",
    "dynamic": "3d0109838ad41cf751db6d38245e116f",
    "llama3": "9eb985820f9c9a3871719cf259351d94",
    "yarn": "4b516fd4d9be9d7228ba1a9938ba3099",
    "yarn, not truncated": "cc625d5ee703dfe962805795b8de82bc",
    "longrope": "4a8fbd56460f51c40d4d6f1937c3169f",
}


def checksum(frequencies: Frequencies, magnitude: float) -> str:
    cosines, sines = native.rotations(frequencies, 0, POSITIONS, magnitude)
    digest = hashlib.sha256(np.array([magnitude], "<f8").tobytes())
    for table in frequencies.astype("<f8"), cosines.astype("<f4"), sines.astype("<f4"):
        digest.update(np.ascontiguousarray(table).data)
    return digest.hexdigest()[:32]


@pytest.mark.parametrize("name", TABLES)
def test_tables(name: str) -> None:
    assert checksum(*TABLES[name]()) == GOLDEN[name]


def near(x: npt.NDArray[np.float32], y: npt.NDArray[np.float64]) -> bool:
    """Within half a float's last place, and what the C library's own function is off by."""
    return bool((np.abs(x - y) <= np.spacing(np.abs(y).astype(np.float32)) * (0.5 + 1e-6)).all())


@settings(max_examples=200, deadline=None)
@given(
    first=st.integers(0, (1 << 24) - 8),
    frequencies=st.lists(st.floats(0, 8), min_size=1, max_size=20),
)
def test_rotations_are_cosines_and_sines(first: int, frequencies: list[float]) -> None:
    values = np.array(frequencies)
    angles = (first + np.arange(8))[:, None] * values
    cosines, sines = native.rotations(values, first, 8)
    assert near(cosines, np.cos(angles))
    assert near(sines, np.sin(angles))


@settings(max_examples=200, deadline=None)
@given(x=st.lists(st.floats(-745, 709), min_size=1, max_size=20))
def test_exponentials(x: list[float]) -> None:
    expected = np.exp(np.array(x))
    np.testing.assert_allclose(native.exponential(np.array(x)), expected, rtol=4e-16, atol=1e-323)


def test_exponentials_at_the_ends() -> None:
    ends = np.array([-np.inf, -746.0, 0.0, -0.0, 710.0, np.inf, np.nan])
    np.testing.assert_array_equal(native.exponential(ends), [0, 0, 1, 1, np.inf, np.inf, np.nan])


@settings(max_examples=100, deadline=None)
@given(base=st.floats(1, 1e12), exponent=st.floats(-1, 1))
def test_powers_are_rounded_once(base: float, exponent: float) -> None:
    with localcontext() as context:
        context.prec = 80
        exact = Decimal(base) ** Decimal(exponent)
    rounded = rope_scaling.power(base, exponent)
    assert rounded == float(exact)
    assert math.isclose(rounded, math.pow(base, exponent), rel_tol=1e-15)
