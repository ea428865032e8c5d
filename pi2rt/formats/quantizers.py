"""Block by block from float32 to the bytes of a tensor type; the callable face is ``quants.quantize``.

Each function takes float32 (blocks, elements of a block), returns uint8 (blocks, bytes of a block). The
arithmetic of F16 to Q8_0 is ggml's reference, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

Bytes = npt.NDArray[np.uint8]
Floats = npt.NDArray[np.float32]

_FOUR = np.uint8(4)


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


QUANTIZERS: Mapping[str, Callable[[Floats], Bytes]] = MappingProxyType(
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
"""By type name."""
