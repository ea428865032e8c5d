"""The kernel variants of this build that this processor runs, and how their results are compared."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from pi2rt.cython_kernels.kernels import native

Floats = npt.NDArray[np.float32]

KERNELS = {name: native.Kernels(name) for name, runs, _ in native.variants() if runs}
SCALAR = KERNELS["scalar"]
OTHERS = {name: kernels for name, kernels in KERNELS.items() if name != "scalar"}

EPSILON = 2.0**-24
"""Largest relative error of one float32 rounding."""


def assert_same_bits(actual: npt.NDArray[Any], expected: npt.NDArray[Any], what: str) -> None:
    """Equal to the sign of zero; one NaN is as good as another (their bits depend on the processor)."""
    assert actual.shape == expected.shape, what
    assert actual.dtype == expected.dtype, what
    if actual.dtype.kind != "f":
        np.testing.assert_array_equal(actual, expected, what)
        return
    bits = np.dtype(f"u{actual.dtype.itemsize}")
    a, b = np.ascontiguousarray(actual).view(bits), np.ascontiguousarray(expected).view(bits)
    different = (a != b) & ~(np.isnan(actual) & np.isnan(expected))
    assert not different.any(), (
        f"{what}: {different.sum()} of {a.size} differ, first at {np.argwhere(different)[0]}: "
        f"{actual[different][0]!r} instead of {expected[different][0]!r}"
    )


def misaligned(x: npt.NDArray[Any], elements: int) -> npt.NDArray[Any]:
    """The same values, ``elements`` into a buffer of bytes 0xff, which are NaN where floats."""
    if x.ndim > 1 and x.size == 0:
        return x
    room = np.full((x.size + elements + 16) * x.itemsize, 0xFF, np.uint8).view(x.dtype)
    inside = room[elements : elements + x.size].reshape(x.shape)
    inside[...] = x
    return inside
