"""Element-wise kernels and reductions: against numpy in float64, and between variants bit for bit."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt.cython_kernels.kernels import native
from tests.kernels.variants import EPSILON, KERNELS, OTHERS, SCALAR, Floats, assert_same_bits, misaligned

Doubles = npt.NDArray[np.float64]

seeds = st.integers(0, 2**32 - 1)
offsets = st.integers(0, 15)
lengths = st.one_of(st.integers(0, 70), st.integers(4000, 4200))
quick = settings(max_examples=50, deadline=None)
ULP = 2.0**-23
TINY = 1e-37
"""Absolute: exp ends at e^-87.3, and what is below the normal range is not worth more."""


def normal(seed: int, n: int, scale: float = 1.0) -> Floats:
    return (np.random.default_rng(seed).standard_normal(n) * scale).astype(np.float32)


def strange(seed: int, n: int) -> Floats:
    """Anything a float32 can be."""
    return np.random.default_rng(seed).integers(0, 2**32, n, dtype=np.uint32).view(np.float32)


def same_everywhere(run: Callable[[native.Kernels], npt.NDArray[np.float32]]) -> Floats:
    """What the scalar variant makes of it, after every other one made the same."""
    expected = run(SCALAR)
    for name, kernels in OTHERS.items():
        assert_same_bits(run(kernels), expected, name)
    return expected


def _rmsnorm(x: Floats, w: Floats, shift: float, eps: float, kernels: native.Kernels) -> Floats:
    return kernels.rmsnorm(x, w, shift, eps)


@given(
    seed=seeds, n=lengths, offset=offsets, scale=st.integers(-15, 15), eps=st.sampled_from([0.0, 1e-6, 1e-5])
)
@quick
def test_rmsnorm(seed: int, n: int, offset: int, scale: int, eps: float) -> None:
    x, w = normal(seed, n, 10.0**scale), normal(seed + 1, n)
    for shift in (0.0, 1.0):
        run = partial(_rmsnorm, misaligned(x, offset), misaligned(w, offset + 1), shift, eps)
        got = same_everywhere(run)
        if n == 0:
            continue
        wide = x.astype(np.float64)
        expected = wide / np.sqrt(np.mean(wide**2) + eps) * (w.astype(np.float64) + shift)
        # sixteen chains of n/16 roundings, a tree of four, and eight more; (w + shift) rounds too
        tolerance = (
            (n / 32 + 12) * EPSILON * np.abs(wide / np.sqrt(np.mean(wide**2) + eps)) * (np.abs(w) + shift)
        )
        assert (np.abs(got - expected) <= tolerance + TINY).all()


def test_rmsnorm_of_zeros_is_zeros() -> None:
    assert not same_everywhere(
        lambda k: k.rmsnorm(np.zeros(40, np.float32), np.ones(40, np.float32), 0, 1e-6)
    ).any()


@given(seed=seeds, n=lengths, offset=offsets, factor=st.floats(width=32, allow_nan=False))
@quick
def test_add_and_scale_round_once(seed: int, n: int, offset: int, factor: float) -> None:
    for make in (normal, strange):
        x, y = make(seed, n), make(seed + 1, n)
        with np.errstate(all="ignore"):
            total, scaled = y + x, x * np.float32(factor)
        for name, kernels in KERNELS.items():
            assert_same_bits(
                kernels.add(misaligned(x, offset), misaligned(y, offset // 2)), total, f"{name} add"
            )
            assert_same_bits(kernels.scale(misaligned(x, offset), factor), scaled, f"{name} scale")


def _gelu(x: Doubles) -> Doubles:
    return np.array([0.5 * v * math.erfc(-v / math.sqrt(2)) for v in x], np.float64)


def _gelu_tanh(x: Doubles) -> Doubles:
    result: Doubles = x / (1 + np.exp(-2 * math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return result


ACTIVATIONS: dict[str | None, tuple[Callable[[Doubles], Doubles], Callable[[Doubles], Doubles]]] = {
    # reference, and the error it may be computed with
    None: (lambda x: x, lambda x: 0 * x),
    "relu": (lambda x: np.maximum(x, 0), lambda x: 0 * x),
    "relu2": (lambda x: np.maximum(x, 0) ** 2, lambda x: EPSILON * x**2),
    # e^x to 2 ulp, two more roundings
    "silu": (lambda x: x / (1 + np.exp(-x)), lambda x: 4 * ULP * np.abs(x / (1 + np.exp(-x)))),
    # an error in the argument t of the exponential is |t| times as large in its value
    "gelu_tanh": (
        _gelu_tanh,
        lambda x: (6 + 4 * np.abs(x + 0.044715 * x**3)) * ULP * np.abs(_gelu_tanh(x)),
    ),
    "gelu": (_gelu, lambda x: 3 * ULP * np.abs(x)),  # 1 + erf cancels
}
assert set(ACTIVATIONS) == set(native.ACTIVATIONS)


def _activate(
    kind: str | None, up_kind: str | None, gate: Floats | None, up: Floats, kernels: native.Kernels
) -> Floats:
    return kernels.activate(kind, up_kind, gate, up)


@pytest.mark.parametrize("kind", ACTIVATIONS)
@given(seed=seeds, n=lengths, offset=offsets, scale=st.sampled_from([1e-20, 1e-3, 1.0, 4.0, 20.0]))
@quick
def test_activations(kind: str | None, seed: int, n: int, offset: int, scale: float) -> None:
    up = normal(seed, n, scale)
    reference, tolerance = ACTIVATIONS[kind]
    got = same_everywhere(lambda k: k.activate(kind, None, None, misaligned(up, offset)))
    with np.errstate(all="ignore"):
        expected, allowed = reference(up.astype(np.float64)), tolerance(up.astype(np.float64))
    assert (np.abs(got - expected) <= allowed + TINY * (1 + np.abs(up))).all()

    gate = normal(seed + 1, n, scale)
    for up_kind in (None, "relu", kind):
        one = same_everywhere(partial(_activate, up_kind, None, None, up))
        other = same_everywhere(partial(_activate, kind, None, None, gate))
        both = same_everywhere(
            partial(_activate, kind, up_kind, misaligned(gate, offset), misaligned(up, offset // 3))
        )
        assert_same_bits(both, other * one, "act(gate) * act(up)")


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_activations_end_where_they_should(kind: str | None) -> None:
    far = np.array([-1e30, -1e4, -200, -90, -87.4, -0.0, 0.0, 87.4, 90, 200, 1e4], np.float32)
    got = same_everywhere(lambda k: k.activate(kind, None, None, far))
    assert np.isfinite(got).all()
    if kind is not None:
        np.testing.assert_allclose(got[:5], 0, atol=1e-7)  # the exponential ends at e^88.4, 2.4e38
        square = 2 if kind == "relu2" else 1
        np.testing.assert_allclose(got[6:], far[6:] ** square, rtol=1e-6)


@given(
    seed=seeds,
    n=lengths,
    offset=offsets,
    cap=st.sampled_from([0.5, 20.0, 30.0, 50.0]),
    scale=st.integers(-3, 5),
)
@quick
def test_softcap(seed: int, n: int, offset: int, cap: float, scale: int) -> None:
    x = normal(seed, n, 10.0**scale)
    got = same_everywhere(lambda k: k.softcap(misaligned(x, offset), cap))
    expected = cap * np.tanh(x.astype(np.float64) / cap)
    assert (np.abs(got - expected) <= 4 * ULP * cap).all()  # 1 - 2/(e^2t + 1): absolute, near 0 too
    assert (np.abs(got) <= cap).all()


@given(
    seed=seeds, half=st.integers(0, 130), rest=st.integers(0, 20), offset=offsets, interleaved=st.booleans()
)
@quick
def test_rope(seed: int, half: int, rest: int, offset: int, interleaved: bool) -> None:
    x = normal(seed, 2 * half + rest)
    angle = normal(seed + 1, half, 3)
    c, s = np.cos(angle), np.sin(angle)
    got = same_everywhere(
        lambda k: k.rope(
            misaligned(x, offset), misaligned(c, offset + 1), misaligned(s, offset + 2), interleaved
        )
    )
    first = np.arange(half) * 2 if interleaved else np.arange(half)
    second = first + (1 if interleaved else half)
    a, b = x[first].astype(np.float64), x[second].astype(np.float64)
    tolerance = 2 * EPSILON * (np.abs(a) + np.abs(b))
    assert (np.abs(got[first] - (a * c - b * s)) <= tolerance).all()
    assert (np.abs(got[second] - (a * s + b * c)) <= tolerance).all()
    assert_same_bits(got[2 * half :], x[2 * half :], "what is not rotated")


@given(
    seed=seeds,
    n=st.one_of(st.integers(1, 70), st.integers(4000, 4200)),
    offset=offsets,
    values=st.sampled_from(["few", "normal", "strange", "nan", "-inf", "holes"]),
)
@quick
def test_argmax_is_the_first_of_the_largest_and_never_nan(
    seed: int, n: int, offset: int, values: str
) -> None:
    rng = np.random.default_rng(seed)
    some, less = rng.random(n) < 0.5, rng.random(n) < 0.3
    x = {
        "few": rng.integers(-2, 2, n).astype(np.float32),
        "normal": normal(seed, n),
        "strange": strange(seed, n),
        "nan": np.full(n, np.nan, np.float32),
        "-inf": np.where(less, np.nan, -np.inf).astype(np.float32),
        "holes": np.where(some, np.nan, rng.integers(0, 3, n)).astype(np.float32),
    }[values]
    numbers = np.flatnonzero(~np.isnan(x))
    expected = int(numbers[np.argmax(x[numbers])]) if len(numbers) else 0
    for name, kernels in KERNELS.items():
        assert kernels.argmax(misaligned(x, offset)) == expected, name


@given(
    seed=seeds,
    n=st.one_of(st.integers(1, 70), st.integers(4000, 9000)),
    offset=offsets,
    scale=st.sampled_from([1e-3, 1.0, 10.0, 1e4, 1e37]),
    holes=st.booleans(),
)
@quick
def test_logsumexp(seed: int, n: int, offset: int, scale: float, holes: bool) -> None:
    x = normal(seed, n, scale)
    if holes:  # tokens that a grammar forbids
        x[np.random.default_rng(seed).random(n) < 0.5] = -np.inf
        x[seed % n] = 1.0
    wide = x.astype(np.float64)
    expected = wide.max() + np.log(np.sum(np.exp(wide - wide.max())))
    results = {name: kernels.logsumexp(misaligned(x, offset)) for name, kernels in KERNELS.items()}
    assert len(set(results.values())) == 1, results
    # float sums of 4096 in sixteen chains, each value's exponential with an error of its argument's rounding
    assert abs(results["scalar"] - expected) <= 256 * EPSILON + ULP + 4e-16 * abs(expected)


def test_logsumexp_of_nothing_possible() -> None:
    for name, kernels in KERNELS.items():
        assert kernels.logsumexp(np.full(5, -np.inf, np.float32)) == -math.inf, name
