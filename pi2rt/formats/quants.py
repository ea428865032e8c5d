"""Tensor types: their blocks, and the reference conversion to and from float32.

Layouts and arithmetic are ggml's (ggml-quants.c); ``dequantize`` gives the same bits as
``gguf.quants.dequantize``. This is the yardstick that kernels are measured against and the writer of test
models; nothing on the decode path calls it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_FOUR = np.uint8(4)
_CHUNK_ELEMENTS = 1 << 16  # what one pass converts: its temporaries stay in the cache, and small


@dataclass(frozen=True, slots=True)
class QuantType:
    """A tensor type: rows are whole blocks of ``block_elements`` values in ``block_bytes`` bytes.

    ``scales``: byte offsets, inside a block, of the floating point numbers in it; all of them have the
    width and format of ``scale_format`` ("F16", "BF16", "F32").
    """

    name: str
    ggml_id: int
    block_elements: int
    block_bytes: int
    scales: tuple[int, ...] = (0,)
    scale_format: str = "F16"

    def nbytes(self, elements: int) -> int:
        """Bytes of ``elements`` values. Raises ValueError where they are not whole blocks."""
        blocks, rest = divmod(elements, self.block_elements)
        if rest:
            raise ValueError(f"{elements} values are not whole blocks of {self.block_elements} ({self.name})")
        return blocks * self.block_bytes


TYPES: Mapping[str, QuantType] = MappingProxyType(
    {
        t.name: t
        for t in (
            QuantType("F32", 0, 1, 4, scale_format="F32"),
            QuantType("F16", 1, 1, 2),
            QuantType("BF16", 30, 1, 2, scale_format="BF16"),
            QuantType("Q4_0", 2, 32, 18),  # f16 d, 16 B of 4-bit
            QuantType("Q4_1", 3, 32, 20, (0, 2)),  # f16 d, f16 m, 16 B of 4-bit
            QuantType("Q5_0", 6, 32, 22),  # f16 d, 32 fifth bits, 16 B of 4-bit
            QuantType("Q5_1", 7, 32, 24, (0, 2)),  # f16 d, f16 m, 32 fifth bits, 16 B of 4-bit
            QuantType("Q8_0", 8, 32, 34),  # f16 d, 32 int8
            QuantType(
                "Q4_K", 12, 256, 144, (0, 2)
            ),  # f16 d, f16 dmin, 8 x 6-bit scale and min, 128 B of 4-bit
            QuantType("Q5_K", 13, 256, 176, (0, 2)),  # as Q4_K, with 256 fifth bits before the 4-bit part
            QuantType("Q6_K", 14, 256, 210, (208,)),  # 128 B of 4-bit, 64 B of 2-bit, 16 int8 scales, f16 d
        )
    }
)
"""The types pi2rt has, by name."""

BY_GGML_ID: Mapping[int, QuantType] = MappingProxyType({t.ggml_id: t for t in TYPES.values()})
"""The same, by the number that GGUF files carry."""

# fmt: off
GGML_NAMES: Mapping[int, str] = MappingProxyType({
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS",
    18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16",
    26: "I32", 27: "I64", 28: "F64", 29: "IQ1_M", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0",
    35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
} | {number: t.name for number, t in BY_GGML_ID.items()})
# fmt: on
"""Every type number ggml ever gave out, for error messages."""


def dequantize(type_name: str, raw: Bytes, shape: tuple[int, ...]) -> Floats:
    """The float32 values of a tensor's bytes.

    Args:
        type_name: a name in ``TYPES``.
        raw: uint8, any shape, C order, as many bytes as ``shape`` needs.
        shape: rows first, of the values.

    Returns:
        float32 array of ``shape``; a copy, never a view of ``raw``.

    Raises:
        ValueError: unknown type, a row that is not whole blocks, or a wrong number of bytes.
    """
    kind = _type(type_name)
    elements = math.prod(shape)
    if elements and shape and shape[-1] % kind.block_elements:
        raise ValueError(
            f"rows of {shape[-1]} values are not whole blocks of {kind.block_elements} ({type_name})"
        )
    if raw.dtype != np.uint8 or raw.size != kind.nbytes(elements):
        expected = f"{kind.nbytes(elements)} bytes of uint8"
        raise ValueError(f"{type_name} of shape {shape} is {expected}, not {raw.size} of {raw.dtype}")
    blocks = np.ascontiguousarray(raw).reshape(-1, kind.block_bytes)
    out = np.empty((len(blocks), kind.block_elements), np.float32)
    step = _CHUNK_ELEMENTS // kind.block_elements
    convert = _DEQUANTIZERS[type_name]
    with np.errstate(all="ignore"):  # NaN and infinite scales are carried over, as ggml does
        for i in range(0, len(blocks), step):
            out[i : i + step] = convert(blocks[i : i + step]).reshape(-1, kind.block_elements)
    return out.reshape(shape)


def quantize(type_name: str, values: Floats) -> Bytes:
    """The bytes of float32 ``values`` as a type; same bits as ``gguf.quants.quantize`` for the types that
    has.

    The K types take the plain route (range of each sub-block, rounding to nearest) without the search for
    better scales that llama.cpp's quantiser does: correct, a little coarser.

    Args:
        type_name: a name in ``TYPES``.
        values: float32 (..., columns), finite, columns a multiple of the type's block.

    Returns:
        uint8 (..., bytes of a row).

    Raises:
        ValueError: unknown type, wrong dtype, not whole blocks, or values that the type's scales cannot
    hold.
    """
    kind = _type(type_name)
    if values.dtype != np.float32 or values.ndim == 0 or values.shape[-1] % kind.block_elements:
        raise ValueError(
            f"{type_name} takes float32 rows of whole blocks of {kind.block_elements}, "
            f"not {values.dtype} of shape {values.shape}"
        )
    if not np.isfinite(values).all():
        raise ValueError(f"{type_name} cannot hold these values: they are not all finite")
    blocks = np.ascontiguousarray(values).reshape(-1, kind.block_elements)
    out = np.empty((len(blocks), kind.block_bytes), np.uint8)
    step = _CHUNK_ELEMENTS // kind.block_elements
    convert = _QUANTIZERS[type_name]
    with np.errstate(all="ignore"):  # what does not fit is found below
        for i in range(0, len(blocks), step):
            out[i : i + step] = convert(blocks[i : i + step])
    flat = out.reshape(-1)
    problem = check_scales(type_name, flat)
    if problem:
        raise ValueError(f"{type_name} cannot hold these values: {problem}")
    return flat.reshape(*values.shape[:-1], values.shape[-1] // kind.block_elements * kind.block_bytes)


def check_scales(type_name: str, raw: Bytes) -> str | None:
    """What is wrong with the floating point numbers in a tensor's bytes, or None: any NaN or infinity.

    Looks only at exponent bits of the block scales (all elements of F32, F16, BF16), so it costs about one
    pass over the tensor's cache lines.

    Args:
        type_name: a name in ``TYPES``.
        raw: uint8, C order, whole blocks.

    Returns:
        ``"scale of block 17 of 96 is nan"`` for the first such number, or None.
    """
    kind = _type(type_name)
    if raw.dtype != np.uint8 or raw.size % kind.block_bytes:
        raise ValueError(
            f"{type_name} is whole blocks of {kind.block_bytes} bytes of uint8, not {raw.size} of {raw.dtype}"
        )
    flat = np.ascontiguousarray(raw).reshape(-1)
    count = raw.size // kind.block_bytes
    code, exponent = _EXPONENTS[kind.scale_format]
    word = "scale" if kind.block_elements > 1 else "value"
    for offset in kind.scales if count else ():
        # A strided view: the scales lie block_bytes apart, on no particular alignment.
        view: npt.NDArray[Any] = np.ndarray((count,), code, flat.data, offset, (kind.block_bytes,))
        for i in range(0, count, _CHUNK_ELEMENTS):
            bad = (view[i : i + _CHUNK_ELEMENTS] & exponent) == exponent
            if bad.any():
                at = i + int(bad.argmax())
                bits = int(view[at])
                mantissa = bits & (int(exponent) & -int(exponent)) - 1
                sign = "-" if bits >> (8 * view.itemsize - 1) else ""
                shown = "nan" if mantissa else f"{sign}inf"
                place = (
                    f"{word} of block {at} of {count}"
                    if kind.block_elements > 1
                    else f"value {at} of {count}"
                )
                return f"{place} is {shown}"
    return None


_EXPONENTS: Mapping[str, tuple[str, np.unsignedinteger[Any]]] = MappingProxyType(
    {
        "F32": ("<u4", np.uint32(0x7F800000)),
        "F16": ("<u2", np.uint16(0x7C00)),
        "BF16": ("<u2", np.uint16(0x7F80)),
    }
)


def _type(name: str) -> QuantType:
    try:
        return TYPES[name]
    except KeyError:
        raise ValueError(f"unknown tensor type {name!r}; pi2rt has {', '.join(TYPES)}") from None


# Reading. Each takes uint8 (blocks, block_bytes) and returns float32, blocks * block_elements values.


def _f16(column: Bytes) -> Floats:
    """float16 in the last two bytes of (blocks, 2), as float32 (blocks, 1)."""
    return np.ascontiguousarray(column).view("<f2").astype(np.float32)


def _nibbles(packed: Bytes, group: int) -> Bytes:
    """4-bit values: of each run of ``group`` bytes first the low halves, then the high ones. (blocks, 2 *
    bytes)."""
    runs = packed.reshape(len(packed), -1, 1, group)
    return (np.concatenate((runs, runs >> _FOUR), axis=2) & np.uint8(15)).reshape(len(packed), -1)


def _fifth_bits(packed: Bytes) -> Bytes:
    """32 bits, little endian, as 0 or 16: (blocks, 32)."""
    return np.unpackbits(packed, axis=1, bitorder="little") << _FOUR


def _read_f32(b: Bytes) -> Floats:
    return b.view("<f4").astype(np.float32)


def _read_bf16(b: Bytes) -> Floats:
    return (b.view("<u2").astype(np.uint32) << 16).view(np.float32)


def _read_q4_0(b: Bytes) -> Floats:
    return _f16(b[:, :2]) * (_nibbles(b[:, 2:], 16).astype(np.float32) - 8)


def _read_q4_1(b: Bytes) -> Floats:
    return _f16(b[:, :2]) * _nibbles(b[:, 4:], 16).astype(np.float32) + _f16(b[:, 2:4])


def _read_q5_0(b: Bytes) -> Floats:
    return _f16(b[:, :2]) * ((_nibbles(b[:, 6:], 16) | _fifth_bits(b[:, 2:6])).astype(np.float32) - 16)


def _read_q5_1(b: Bytes) -> Floats:
    q = _nibbles(b[:, 8:], 16) | _fifth_bits(b[:, 4:8])
    return _f16(b[:, :2]) * q.astype(np.float32) + _f16(b[:, 2:4])


def _read_q8_0(b: Bytes) -> Floats:
    return b[:, 2:].view(np.int8).astype(np.float32) * _f16(b[:, :2])


def _k_scales(packed: Bytes) -> tuple[Bytes, Bytes]:
    """The eight 6-bit scales and eight 6-bit mins in 12 bytes: two uint8 (blocks, 8).

    Bytes 0-3 hold scales 0-3 in their low six bits, bytes 4-7 the mins 0-3; bytes 8-11 hold the low four
    bits of scales (low half) and mins (high half) 4-7, whose top two bits are the top two bits of bytes 0-3
    and 4-7.
    """
    low, mid, high = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate((low & 63, (high & 15) | (low >> 6 << 4)), axis=1)
    mins = np.concatenate((mid & 63, (high >> 4) | (mid >> 6 << 4)), axis=1)
    return scales, mins


def _read_k(b: Bytes, q: Bytes) -> Floats:
    scales, mins = _k_scales(b[:, 4:16])
    d = (_f16(b[:, :2]) * scales.astype(np.float32))[:, :, None]
    m = (_f16(b[:, 2:4]) * mins.astype(np.float32))[:, :, None]
    return d * q.reshape(len(b), 8, 32).astype(np.float32) - m


def _read_q4_k(b: Bytes) -> Floats:
    return _read_k(b, _nibbles(b[:, 16:], 32))


def _read_q5_k(b: Bytes) -> Floats:
    # Byte j of the fifth bits holds, in bit s, the one of value j of sub-block s.
    bits = np.unpackbits(b[:, 16:48, None], axis=2, bitorder="little").transpose(0, 2, 1).reshape(len(b), 256)
    return _read_k(b, _nibbles(b[:, 48:], 32) | bits << _FOUR)


def _read_q6_k(b: Bytes) -> Floats:
    low = _nibbles(b[:, :128], 64)
    runs = b[:, 128:192].reshape(len(b), 2, 1, 32)
    high = np.concatenate((runs, runs >> 2, runs >> 4, runs >> 6), axis=2).reshape(len(b), 256) & 3
    q = (low | high << 4).astype(np.float32) - 32
    d = _f16(b[:, 208:]) * b[:, 192:208].view(np.int8).astype(np.float32)
    return d[:, :, None] * q.reshape(len(b), 16, 16)


_DEQUANTIZERS: Mapping[str, Callable[[Bytes], Floats]] = MappingProxyType(
    {
        "F32": _read_f32,
        "F16": _f16,
        "BF16": _read_bf16,
        "Q4_0": _read_q4_0,
        "Q4_1": _read_q4_1,
        "Q5_0": _read_q5_0,
        "Q5_1": _read_q5_1,
        "Q8_0": _read_q8_0,
        "Q4_K": _read_q4_k,
        "Q5_K": _read_q5_k,
        "Q6_K": _read_q6_k,
    }
)


# Writing. Each takes float32 (blocks, block_elements) and returns uint8 (blocks, block_bytes).


def _write_f32(x: Floats) -> Bytes:
    return x.astype("<f4").view(np.uint8)


def _write_f16(x: Floats) -> Bytes:
    return x.astype("<f2").view(np.uint8)


def _write_bf16(x: Floats) -> Bytes:
    bits = x.view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype("<u2").view(np.uint8)  # nearest, ties to even


def _inverse(d: Floats) -> Floats:
    return np.where(d == 0, np.float32(0), 1 / d)


def _codes(x: Floats, top: int) -> Bytes:
    """Rounds what is known to be at least -0.5, and clips it to 0..top."""
    rounded: Floats = np.trunc(x + np.float32(0.5))
    return rounded.clip(0, top).astype(np.uint8)


def _pack_nibbles(q: Bytes, group: int) -> Bytes:
    """The inverse of ``_nibbles``; only the low four bits count."""
    runs = q.reshape(len(q), -1, 2, group)
    return (runs[:, :, 0] & np.uint8(15) | runs[:, :, 1] << _FOUR).reshape(len(q), -1)


def _write_symmetric(x: Floats, half: int) -> tuple[Bytes, Bytes]:
    """Scale and codes 0..2*half-1: the value of largest magnitude gets the code 0, so keeps its sign and
    size."""
    extreme = np.take_along_axis(x, np.abs(x).argmax(axis=1, keepdims=True), axis=1)
    d = extreme / np.float32(-half)
    q = np.trunc(x * _inverse(d) + np.float32(half + 0.5)).clip(0, 2 * half - 1).astype(np.uint8)
    return _write_f16(d), q


def _write_affine(x: Floats, top: int) -> tuple[Bytes, Bytes, Bytes]:
    low = x.min(axis=1, keepdims=True)
    d = (x.max(axis=1, keepdims=True) - low) / np.float32(top)
    return _write_f16(d), _write_f16(low), _codes((x - low) * _inverse(d), top)


def _pack_fifth_bits(q: Bytes) -> Bytes:
    return np.packbits(q >> 4, axis=1, bitorder="little")


def _write_q4_0(x: Floats) -> Bytes:
    d, q = _write_symmetric(x, 8)
    return np.concatenate((d, _pack_nibbles(q, 16)), axis=1)


def _write_q4_1(x: Floats) -> Bytes:
    d, m, q = _write_affine(x, 15)
    return np.concatenate((d, m, _pack_nibbles(q, 16)), axis=1)


def _write_q5_0(x: Floats) -> Bytes:
    d, q = _write_symmetric(x, 16)
    return np.concatenate((d, _pack_fifth_bits(q), _pack_nibbles(q, 16)), axis=1)


def _write_q5_1(x: Floats) -> Bytes:
    d, m, q = _write_affine(x, 31)
    return np.concatenate((d, m, _pack_fifth_bits(q), _pack_nibbles(q, 16)), axis=1)


def _write_q8_0(x: Floats) -> Bytes:
    d = np.abs(x).max(axis=1, keepdims=True) / np.float32(127)
    scaled = x * _inverse(d)
    magnitude = np.abs(scaled)
    whole = np.floor(magnitude)
    q = np.sign(scaled) * (whole + np.floor(2 * (magnitude - whole)))  # halves away from zero, as roundf
    return np.concatenate((_write_f16(d), q.astype(np.int8).view(np.uint8)), axis=1)


def _write_k(x: Floats, top: int) -> tuple[Bytes, Bytes]:
    """The 16 bytes of scales of a Q4_K or Q5_K block, and its codes 0..top, uint8 (blocks, 256)."""
    sub = x.reshape(len(x), 8, 32)
    low = np.minimum(sub.min(axis=2), 0)  # mins are stored as what is subtracted, so never negative
    wanted = (np.maximum(sub.max(axis=2), 0) - low) / np.float32(top)
    d16 = (wanted.max(axis=1, keepdims=True) / 63).astype("<f2")
    m16 = (-low.min(axis=1, keepdims=True) / 63).astype("<f2")
    d, m = d16.astype(np.float32), m16.astype(np.float32)
    scales = _codes(wanted * _inverse(d), 63)
    mins = _codes(-low * _inverse(m), 63)
    packed = np.concatenate(
        (
            scales[:, :4] | scales[:, 4:] >> 4 << 6,
            mins[:, :4] | mins[:, 4:] >> 4 << 6,
            scales[:, 4:] & 15 | mins[:, 4:] << 4,
        ),
        axis=1,
    )
    shifted = sub + (m * mins)[:, :, None]
    q = _codes(shifted * _inverse((d * scales).astype(np.float32))[:, :, None], top).reshape(len(x), 256)
    return np.concatenate((d16.view(np.uint8), m16.view(np.uint8), packed), axis=1), q


def _write_q4_k(x: Floats) -> Bytes:
    head, q = _write_k(x, 15)
    return np.concatenate((head, _pack_nibbles(q, 32)), axis=1)


def _write_q5_k(x: Floats) -> Bytes:
    head, q = _write_k(x, 31)
    bits = np.packbits(q.reshape(len(q), 8, 32) >> 4, axis=1, bitorder="little").reshape(len(q), 32)
    return np.concatenate((head, bits, _pack_nibbles(q, 32)), axis=1)


def _write_q6_k(x: Floats) -> Bytes:
    sub = x.reshape(len(x), 16, 16)
    extreme = np.take_along_axis(sub, np.abs(sub).argmax(axis=2, keepdims=True), axis=2)[:, :, 0]
    wanted = extreme / np.float32(-32)
    d16 = (np.abs(wanted).max(axis=1, keepdims=True) / 127).astype("<f2")
    d = d16.astype(np.float32)
    scales = np.rint(wanted * _inverse(d)).clip(-127, 127).astype(np.int8)
    step = _inverse((d * scales).astype(np.float32))[:, :, None]
    q = (np.rint(sub * step).clip(-32, 31) + 32).astype(np.uint8).reshape(len(x), 256)
    runs = (q >> 4).reshape(len(q), 2, 4, 32)
    high = runs[:, :, 0] | runs[:, :, 1] << 2 | runs[:, :, 2] << 4 | runs[:, :, 3] << 6
    parts = (_pack_nibbles(q, 64), high.reshape(len(q), 64), scales.view(np.uint8), d16.view(np.uint8))
    return np.concatenate(parts, axis=1)


_QUANTIZERS: Mapping[str, Callable[[Floats], Bytes]] = MappingProxyType(
    {
        "F32": _write_f32,
        "F16": _write_f16,
        "BF16": _write_bf16,
        "Q4_0": _write_q4_0,
        "Q4_1": _write_q4_1,
        "Q5_0": _write_q5_0,
        "Q5_1": _write_q5_1,
        "Q8_0": _write_q8_0,
        "Q4_K": _write_q4_k,
        "Q5_K": _write_q5_k,
        "Q6_K": _write_q6_k,
    }
)
