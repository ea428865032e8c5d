"""The reference conversions, against ggml's own in the gguf package."""

from __future__ import annotations

import gguf
import gguf.quants
import numpy as np
import pytest
from gguf import GGMLQuantizationType
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt.formats import quants
from pi2rt.formats.quants import BY_GGML_ID, GGML_NAMES, TYPES

ALL = list(TYPES)
WRITTEN_BY_GGUF = ["F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"]
K_TYPES = ["Q4_K", "Q5_K", "Q6_K"]


def random_bytes(name: str, shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*shape[:-1], TYPES[name].nbytes(shape[-1])), np.uint8)


def columns(name: str) -> int:
    return 3 * TYPES[name].block_elements


def test_types_are_ggmls() -> None:
    for name, kind in TYPES.items():
        number = GGMLQuantizationType[name]
        assert (kind.name, kind.ggml_id) == (name, number)
        assert (kind.block_elements, kind.block_bytes) == gguf.GGML_QUANT_SIZES[number]
        assert BY_GGML_ID[kind.ggml_id] is kind
    for number in GGMLQuantizationType:
        assert GGML_NAMES[number] == number.name


@pytest.mark.parametrize("name", ALL)
def test_dequantize_has_the_bits_of_gguf(name: str) -> None:
    """On random bytes, so also on NaN, infinite and denormal scales, and on more than one chunk."""
    shape = (401, 3 * max(256, TYPES[name].block_elements))
    raw = random_bytes(name, shape)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, GGMLQuantizationType[name])
    values = quants.dequantize(name, raw, shape)
    assert values.shape == shape
    assert values.dtype == np.float32
    np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(256,), (1, 256), (2, 3, 256)])
def test_dequantize_takes_any_shape(name: str, shape: tuple[int, ...]) -> None:
    raw = random_bytes(name, shape)
    with np.errstate(all="ignore"):
        expected = gguf.quants.dequantize(raw, GGMLQuantizationType[name]).reshape(shape)
    values = quants.dequantize(name, raw.reshape(-1), shape)
    assert values.shape == shape
    np.testing.assert_array_equal(values.view(np.uint32), expected.view(np.uint32))


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shape", [(0,), (0, 256), (3, 0)])
def test_nothing_converts_to_nothing(name: str, shape: tuple[int, ...]) -> None:
    empty = np.zeros(shape, np.float32)
    raw = quants.quantize(name, empty)
    assert raw.size == 0
    assert quants.dequantize(name, raw, shape).shape == shape


def test_dequantize_of_a_view_that_is_not_contiguous() -> None:
    raw = random_bytes("Q8_0", (4, 64))
    spread = np.zeros((8, 68), np.uint8)
    spread[::2] = raw
    np.testing.assert_array_equal(
        quants.dequantize("Q8_0", spread[::2], (4, 64)), quants.dequantize("Q8_0", raw, (4, 64))
    )


def test_dequantize_never_returns_a_view() -> None:
    raw = np.zeros(16, np.uint8)
    quants.dequantize("F32", raw, (4,))[:] = 1
    assert not raw.any()


@pytest.mark.parametrize(
    ("name", "count", "shape", "problem"),
    [
        ("Q2_K", 84, (256,), "unknown tensor type 'Q2_K'"),
        ("Q4_0", 18, (16, 2), "rows of 2 values are not whole blocks of 32"),
        ("Q4_0", 17, (32,), "is 18 bytes of uint8, not 17 of uint8"),
        ("Q4_0", 36, (32,), "is 18 bytes of uint8, not 36 of uint8"),
    ],
)
def test_dequantize_refuses(name: str, count: int, shape: tuple[int, ...], problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        quants.dequantize(name, np.zeros(count, np.uint8), shape)


def test_dequantize_takes_bytes_only() -> None:
    with pytest.raises(ValueError, match="is 4 bytes of uint8, not 4 of float32"):
        quants.dequantize("F32", np.zeros(4, np.float32), (1,))  # type: ignore[arg-type]


def weights(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """What weights look like, and blocks that are all zero, constant, of one sign, huge and denormal."""
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, width)) * rng.lognormal(size=(rows, 1))).astype(np.float32)
    x[0] = 0
    x[1] = 3
    x[2] = -np.abs(x[2])
    x[3] = np.abs(x[3])
    x[4] *= 1e3
    x[5] *= 1e-30
    return x


@pytest.mark.parametrize("name", WRITTEN_BY_GGUF)
def test_quantize_has_the_bits_of_gguf(name: str) -> None:
    x = weights(203, 768)
    with np.errstate(all="ignore"):
        expected = gguf.quants.quantize(x, GGMLQuantizationType[name]).view(np.uint8)
    np.testing.assert_array_equal(quants.quantize(name, x), expected)


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        *[("Q4_0", 0.10), ("Q4_1", 0.09), ("Q5_0", 0.05), ("Q5_1", 0.045), ("Q8_0", 0.007)],
        *[("Q4_K", 0.085), ("Q5_K", 0.045), ("Q6_K", 0.022), ("F16", 3e-4), ("BF16", 2e-3), ("F32", 0.0)],
    ],
)
def test_quantize_then_dequantize_comes_close(name: str, largest: float) -> None:
    """Relative error of normally distributed weights, by row, judged through the gguf package."""
    x = np.random.default_rng(1).standard_normal((64, 768)).astype(np.float32)
    raw = quants.quantize(name, x)
    assert raw.shape == (64, TYPES[name].nbytes(768))
    y = gguf.quants.dequantize(raw, GGMLQuantizationType[name])
    error = np.linalg.norm(y - x, axis=1) / np.linalg.norm(x, axis=1)
    assert error.max() <= largest


@pytest.mark.parametrize("name", K_TYPES)
def test_k_types_stay_within_a_step(name: str) -> None:
    """Zero stays zero, a constant is kept, and no value is off by more than two steps of its sub-block:
    half of one for its own rounding, the rest for the rounding of the sub-block's scale and min."""
    x = weights(64, 768)
    y = quants.dequantize(name, quants.quantize(name, x), x.shape)
    assert np.isfinite(y).all()
    assert not y[0].any()
    np.testing.assert_allclose(y[1], 3, rtol=0.02)
    block = np.abs(x).reshape(64, 3, 256).max(axis=2, keepdims=True)
    levels = {"Q4_K": 15, "Q5_K": 31, "Q6_K": 31}[name]
    # Scales are f16: what is smaller than their smallest becomes zero.
    bound = 2 * 2 * block / levels + 2.0**-24 * 63 * levels
    assert (np.abs(y - x).reshape(64, 3, 256) <= bound).all()


@given(
    name=st.sampled_from(ALL),
    exponent=st.integers(-60, 14),
    seed=st.integers(0, 2**32 - 1),
    spread=st.floats(0, 20),
)
@settings(max_examples=100, deadline=None, derandomize=True)
def test_round_trip_is_finite_and_bounded(name: str, exponent: int, seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    scales = 2.0**exponent * np.exp2(-spread * rng.random((2, 256)))
    x = (rng.standard_normal((2, 256)) * scales).astype(np.float32)
    y = quants.dequantize(name, quants.quantize(name, x), x.shape)
    assert np.isfinite(y).all()
    # A scale is f16: what is below its smallest number becomes zero.
    assert np.abs(y - x).max() <= 0.3 * np.abs(x).max() + 2.0**-24 * 63 * 31


@pytest.mark.parametrize("name", ALL)
def test_quantize_refuses_what_it_cannot_hold(name: str) -> None:
    width = columns(name)
    for bad in (np.nan, np.inf, -np.inf):
        x = np.ones((2, width), np.float32)
        x[1, -1] = bad
        with pytest.raises(ValueError, match="they are not all finite"):
            quants.quantize(name, x)
    with pytest.raises(ValueError, match="takes float32 rows"):
        quants.quantize(name, np.ones((2, width)))  # type: ignore[arg-type]
    if TYPES[name].block_elements > 1:
        with pytest.raises(ValueError, match="whole blocks"):
            quants.quantize(name, np.ones((2, width + 1), np.float32))
    if name not in ("F32", "BF16"):
        x = np.full((1, width), 1e38, np.float32)
        x[0, 0] = -3e38
        with pytest.raises(ValueError, match=r"cannot hold these values: (value|scale of block) 0"):
            quants.quantize(name, x)


@pytest.mark.parametrize("name", ALL)
def test_check_scales_passes_real_weights(name: str) -> None:
    assert quants.check_scales(name, quants.quantize(name, weights(300, 768))) is None
    assert quants.check_scales(name, np.zeros(0, np.uint8)) is None


# Where the floats lie in a block: written out here, so that the table in TYPES is checked against something.
AT_START = dict.fromkeys(["F32", "F16", "BF16", "Q4_0", "Q5_0", "Q8_0"], (0,))
SCALE_BYTES = AT_START | dict.fromkeys(["Q4_1", "Q5_1", "Q4_K", "Q5_K"], (0, 2)) | {"Q6_K": (208,)}
BAD = {"nan": np.nan, "inf": np.inf, "-inf": -np.inf}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("shown", BAD)
@pytest.mark.parametrize("at", [0, 1, 70_000, 70_100])
def test_check_scales_finds_every_bad_number(name: str, shown: str, at: int) -> None:
    count = 70_101  # more than one chunk
    for offset in SCALE_BYTES[name]:
        # 0x3B3B is finite in every format, and no byte next to the floats is zero.
        raw = np.full((count, TYPES[name].block_bytes), 0x3B, np.uint8)
        if name in ("F32", "BF16"):
            bits = np.array([BAD[shown]], np.float32).view(np.uint8)[-TYPES[name].block_bytes :]
        else:
            bits = np.array([BAD[shown]], np.float16).view(np.uint8)
        raw[at, offset : offset + len(bits)] = bits
        what = "value" if TYPES[name].block_elements == 1 else "scale of block"
        assert quants.check_scales(name, raw) == f"{what} {at} of {count} is {shown}"


@pytest.mark.parametrize("name", ALL)
def test_check_scales_agrees_with_dequantize(name: str) -> None:
    """Bytes that are not scales may be anything; only a float that is not finite may be complained of."""
    rng = np.random.default_rng(2)
    found = 0
    for _ in range(200):
        raw = rng.integers(0, 256, (4, TYPES[name].block_bytes), np.uint8)
        values = quants.dequantize(name, raw, (4, TYPES[name].block_elements))
        problem = quants.check_scales(name, raw)
        if not np.isfinite(values).all():
            assert problem is not None
            found += 1
        if problem is not None and TYPES[name].block_elements > 1:
            offsets = SCALE_BYTES[name]
            scales = np.stack([raw[:, o : o + 2].copy().view(np.float16)[:, 0] for o in offsets])
            assert not np.isfinite(scales).all()
    assert found


def test_check_scales_refuses_half_a_block() -> None:
    with pytest.raises(ValueError, match="whole blocks of 18 bytes"):
        quants.check_scales("Q4_0", np.zeros(19, np.uint8))
