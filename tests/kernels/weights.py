"""Weights for kernel tests: any bytes a file may hold, as long as its scales are finite."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pi2rt.formats.quants import TYPES

Bytes = npt.NDArray[np.uint8]

TYPE_NAMES = tuple(TYPES)
FLOAT_TYPES = ("F32", "F16", "BF16")
QUANT_TYPES = tuple(name for name in TYPE_NAMES if name not in FLOAT_TYPES)


def random_rows(
    rng: np.random.Generator,
    type_name: str,
    rows: int,
    k: int,
    *,
    scale: float = 0.05,
    quants: int | None = None,
) -> Bytes:
    """Bytes (rows, bytes of a row) of a model file: scales (floats, of float types) normal with deviation
    ``scale``, every other byte random, or all ``quants``."""
    kind = TYPES[type_name]
    if type_name in FLOAT_TYPES:
        values = (rng.standard_normal((rows, k)) * scale).astype(np.float32)
        if type_name == "BF16":
            return np.ascontiguousarray((values.view(np.uint32) >> 16).astype("<u2")).view(np.uint8)
        return values.astype("<f4" if type_name == "F32" else "<f2").view(np.uint8)
    blocks = rng.integers(0, 256, (rows * (k // kind.block_elements), kind.block_bytes), dtype=np.uint8)
    if quants is not None:
        blocks[:] = quants
    count = 2 if kind.scale_format == "F16x2" else 1
    scales = (rng.standard_normal((len(blocks), count)) * scale).astype("<f2")
    blocks[:, kind.scales_at : kind.scales_at + 2 * count] = scales.view(np.uint8)
    return blocks.reshape(rows, k // kind.block_elements * kind.block_bytes)


_QUANT_BYTES = {
    "Q4_0": slice(2, None),
    "Q4_1": slice(4, None),
    "Q5_0": slice(2, None),
    "Q5_1": slice(4, None),
    "Q8_0": slice(2, None),
    "Q4_K": slice(16, None),
    "Q5_K": slice(16, None),
    "Q6_K": slice(0, 192),
}


def without_quants(type_name: str, raw: Bytes) -> Bytes:
    """The same rows with every quant 0: what remains of a value does not depend on its quant."""
    blocks = raw.reshape(-1, TYPES[type_name].block_bytes).copy()
    blocks[:, _QUANT_BYTES[type_name]] = 0
    return blocks.reshape(raw.shape)
