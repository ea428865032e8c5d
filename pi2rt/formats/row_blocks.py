"""Sizes of the run-time layout of matrices, "blocks16": what ``native.matrix_bytes`` says, for readers that have to
check a file without the native module. The layout is described in ``cython_kernels/kernels/kernels.h`` and
``docs/pack-format.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

ROWS = 16
"""Rows in a block; a matrix is padded to whole blocks with rows of zeros."""

SECTOR = 4096
"""Of a file, in bytes: reads begin and end at multiples of it. It says nothing of the pages of memory, whose size is
the system's."""

PAGE_BYTES = 1 << 20
"""Of a page of a matrix, about: large enough for a device's full bandwidth, small enough for many of them."""

# Bytes of 16 rows: of scales and of quants, each per this many columns. Both parts are padded to 64 bytes.
_PARTS: Mapping[str, tuple[int, int, int]] = MappingProxyType(
    {
        "F32": (1, 0, 64),
        "F16": (1, 0, 32),
        "BF16": (1, 0, 32),
        "Q4_0": (32, 32, 256),
        "Q4_1": (32, 64, 256),
        "Q5_0": (32, 32, 320),
        "Q5_1": (32, 64, 320),
        "Q8_0": (32, 32, 512),
        "Q4_K": (256, 320, 8 * 256),
        "Q5_K": (256, 320, 8 * 320),
        "Q6_K": (256, 288, 8 * 384),
    }
)


def row_block_bytes(type_name: str, columns: int) -> int:
    """Bytes of 16 rows of ``columns`` values, a multiple of 64.

    Args:
        type_name: a name in ``pi2rt.formats.quants.TYPES``.
        columns: whole blocks of that type.
    """
    group, scales, quants = _PARTS[type_name]
    groups = columns // group
    return _to_64(groups * scales) + _to_64(groups * quants)


def matrix_bytes(type_name: str, rows: int, columns: int) -> int:
    """Bytes of a (rows, columns) matrix as row blocks."""
    return -(-rows // ROWS) * row_block_bytes(type_name, columns)


def page_blocks(type_name: str, rows: int, columns: int) -> int:
    """Row blocks of a page: a part of the matrix that can be read by itself. About ``PAGE_BYTES``, in whole sectors, or
    all of it."""
    block, blocks = row_block_bytes(type_name, columns), -(-rows // ROWS)
    step = SECTOR // math.gcd(block, SECTOR)
    return min(blocks, max(step, PAGE_BYTES // block // step * step))


def page_bytes(type_name: str, rows: int, columns: int) -> int:
    """Bytes of such a page, in whole sectors."""
    size = page_blocks(type_name, rows, columns) * row_block_bytes(type_name, columns)
    return -(-size // SECTOR) * SECTOR


def _to_64(size: int) -> int:
    return -(-size // 64) * 64
