"""Keys and values of one block in KV pages, as numpy arrays: what ``attention_template.h`` does in C.

In a page of 64 positions, the keys of a head are stored [position / 16][element][16] and its values
[position][element]. Under "q8", 64 float32 scales follow each of both.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from pi2rt.memory.state_layout import LANES, PagedLayout, StateLayout
from pi2rt.models.states import PAGE_TOKENS

Floats = npt.NDArray[np.float32]
Int32s = npt.NDArray[np.int32]

_GROUPS = PAGE_TOKENS // LANES
_DTYPES = {"f16": np.float16, "q8": np.int8, "f32": np.float32}
_LEAST_SCALE = np.float32(1e-37)  # of q8; below, values are zero


class BlockPages:
    """A view of the keys and values of one block in ``pages`` pages at the beginning of ``memory``: of the area that
    the block is in."""

    __slots__ = ("_head_dim", "_key_scales", "_keys", "_value_scales", "_values")

    def __init__(
        self, memory: npt.NDArray[np.uint8], layout: StateLayout, block: PagedLayout, pages: int
    ) -> None:
        self._head_dim = block.state.head_dim
        heads, d = block.state.kv_heads, block.padded
        dtype = np.dtype(_DTYPES[layout.kv_type])
        size = PAGE_TOKENS * d * dtype.itemsize
        stride = layout.window_page_bytes if block.windowed else layout.page_bytes
        whole = memory[: pages * stride].reshape(pages, stride)
        own = whole[:, block.offset : block.offset + heads * block.head_stride]
        halves = own.reshape(pages, heads, 2, block.v_offset)  # (pages, g, keys and values, bytes)

        def values(half: int) -> npt.NDArray[np.generic]:
            return halves[:, :, half, :size].view(dtype)

        self._keys = values(0).reshape(pages, heads, _GROUPS, d, LANES)
        self._values = values(1).reshape(pages, heads, PAGE_TOKENS, d)
        self._key_scales = self._value_scales = None
        if layout.kv_type == "q8":
            self._key_scales = halves[:, :, 0, size:].view(np.float32)  # (pages, g, 64)
            self._value_scales = halves[:, :, 1, size:].view(np.float32)

    def write(self, table: Int32s, start: int, keys: Floats, values: Floats) -> None:
        """Stores ``keys`` and ``values``, float32 (t, g, head_dim), at positions ``start`` on. ``table``: int32, the
        page table of the sequence."""
        positions = np.arange(start, start + len(keys))
        page, at = table[positions // PAGE_TOKENS], positions % PAGE_TOKENS
        d = self._head_dim
        stored: tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]] = keys, values
        if self._key_scales is not None and self._value_scales is not None:
            small_keys, self._key_scales[page, :, at] = _quantised(keys)
            small_values, self._value_scales[page, :, at] = _quantised(values)
            stored = small_keys, small_values
        self._keys[page, :, at // LANES, :d, at % LANES], self._values[page, :, at, :d] = stored

    def read(self, table: Int32s, count: int, first: int = 0) -> tuple[Floats, Floats]:
        """Keys and values of positions ``first`` to ``count - 1``, float32 (count - first, g, head_dim) each. Of a
        block with a window, those before it may be gone, and read as anything finite."""
        skipped = first // PAGE_TOKENS
        used = table[skipped : -(-count // PAGE_TOKENS)]
        d = self._head_dim
        count -= skipped * PAGE_TOKENS
        in_lanes = self._keys[used].transpose(0, 2, 4, 1, 3)  # (pages, groups, lanes, g, d)
        keys = in_lanes.reshape(-1, *in_lanes.shape[3:])[:count, :, :d].astype(np.float32)
        in_rows = self._values[used].transpose(0, 2, 1, 3)  # (pages, 64, g, d)
        values = in_rows.reshape(-1, *in_rows.shape[2:])[:count, :, :d].astype(np.float32)
        if self._key_scales is not None and self._value_scales is not None:
            keys *= _in_order(self._key_scales, used, count)
            values *= _in_order(self._value_scales, used, count)
        first -= skipped * PAGE_TOKENS
        return keys[first:], values[first:]


def _quantised(x: Floats) -> tuple[npt.NDArray[np.int8], Floats]:
    """int8 values of (t, g, d) and the scales (t, g): the largest magnitude of a head becomes 127."""
    scale = np.abs(x).max(axis=-1) / np.float32(127)
    inverse = np.where(scale > _LEAST_SCALE, np.float32(1) / np.maximum(scale, _LEAST_SCALE), np.float32(0))
    return np.rint(x * inverse[..., None]).astype(np.int8), scale


def _in_order(scales: Floats, used: Int32s, count: int) -> Floats:
    """(count, g, 1)"""
    ordered = scales[used].transpose(0, 2, 1)
    return ordered.reshape(-1, ordered.shape[2])[:count, :, None]
