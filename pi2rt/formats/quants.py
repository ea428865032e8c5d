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

from pi2rt.formats.quantizers import QUANTIZERS

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_FOUR = np.uint8(4)
_CHUNK_ELEMENTS = 1 << 16  # what one pass converts: its temporaries stay in the cache, and small


@dataclass(frozen=True, slots=True)
class QuantType:
    """A tensor type: rows are whole blocks of ``block_elements`` values in ``block_bytes`` bytes.

    ``scales_at``: byte offset inside a block of the floating point numbers in it; ``scale_format``: "F16",
    "F16x2" (two side by side), "BF16" or "F32".
    """

    name: str
    ggml_id: int
    block_elements: int
    block_bytes: int
    scales_at: int = 0
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
            QuantType("Q4_0", 2, 32, 18),  # f16 d; 16 B of 4-bit
            QuantType("Q4_1", 3, 32, 20, scale_format="F16x2"),  # f16 d, f16 m; 16 B of 4-bit
            QuantType("Q5_0", 6, 32, 22),  # f16 d; 32 fifth bits; 16 B of 4-bit
            QuantType("Q5_1", 7, 32, 24, scale_format="F16x2"),  # f16 d, f16 m; 32 fifth bits; 16 B of 4-bit
            QuantType("Q8_0", 8, 32, 34),  # f16 d; 32 int8
            # f16 d, f16 dmin; 8 scales and 8 mins of 6 bits; (Q5_K: 256 fifth bits;) 128 B of 4-bit
            QuantType("Q4_K", 12, 256, 144, scale_format="F16x2"),
            QuantType("Q5_K", 13, 256, 176, scale_format="F16x2"),
            QuantType("Q6_K", 14, 256, 210, 208),  # 128 B of 4-bit; 64 B of 2-bit; 16 int8 scales; f16 d
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
    convert = QUANTIZERS[type_name]
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
    count = raw.size // kind.block_bytes
    if count == 0:
        return None
    blocks = np.ascontiguousarray(raw).reshape(count, kind.block_bytes)
    code, exponent, read = _SCALE_FORMATS[kind.scale_format]
    unsigned = np.dtype(code).type
    lowest, sign = unsigned(exponent & ~(exponent << 1)), unsigned(exponent << 1 & ~exponent)
    words: npt.NDArray[Any] = np.ndarray(count, code, blocks.data, kind.scales_at, kind.block_bytes)
    for start in range(0, count, _CHUNK_ELEMENTS):
        # Adding the lowest bit of an exponent carries into the sign exactly where all its bits are set.
        carried = words[start : start + _CHUNK_ELEMENTS] & unsigned(exponent)
        carried += lowest
        if np.bitwise_or.reduce(carried) & sign:
            at = start + int(((carried & sign) != 0).argmax())
            with np.errstate(all="ignore"):
                numbers = read(words[at : at + 1].copy().view(np.uint8)[None, :]).ravel()
            bad = numbers[~np.isfinite(numbers)][0]
            return f"{'scale of block' if kind.block_elements > 1 else 'value'} {at} of {count} is {bad}"
    return None


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


_SCALE_FORMATS: Mapping[str, tuple[str, int, Callable[[Bytes], Floats]]] = MappingProxyType(
    {
        "F32": ("<u4", 0x7F800000, _read_f32),
        "BF16": ("<u2", 0x7F80, _read_bf16),
        "F16": ("<u2", 0x7C00, _f16),
        "F16x2": ("<u4", 0x7C007C00, _f16),
    }
)
"""By ``QuantType.scale_format``: the word that holds the numbers, its exponent bits, how to read them."""

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
