"""Where the state of a sequence lies, and how many bytes it takes: the one law of these sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from pi2rt.cython_kernels.kernels.native import kv_half_bytes, page_bytes
from pi2rt.models import Fixed, FixedArray, ModelDescription, Paged

KvType: TypeAlias = Literal["f16", "q8", "f32"]
"""Of a key or value: half precision; int8 with a float32 scale for each position and head; float32."""

LANES = 16
"""Elements of a head are padded with zeros to a multiple of this, so that kernels read whole vectors."""

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class PagedLayout:
    """Where one block's keys and values lie inside a page; bytes.

    A page holds all blocks, in two parts: ``windowed`` says in which part this one is. ``offset`` of it there,
    ``head_stride`` from one KV head to the next, ``v_offset`` from a head's keys to its values
    (``cython_kernels/kernels/attention_template.h`` has the layout of both). ``padded``: elements of a head as they are
    stored.
    """

    layer: int
    block: int
    state: Paged
    padded: int
    offset: int
    head_stride: int
    v_offset: int
    windowed: bool = False


@dataclass(frozen=True, slots=True)
class FixedLayout:
    """Where one array of a block lies inside a slot: ``offset`` in bytes, a multiple of 64."""

    layer: int
    block: int
    array: FixedArray
    offset: int


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Of a model: what a KV page holds, and what a slot of fixed arrays holds.

    The bytes of a page are in two areas: page p begins at ``p * page_bytes`` of the whole area, which has the blocks
    that see all positions, and at ``p * window_page_bytes`` of the windowed area, which has those that look back a
    window. ``window_page_bytes`` is a multiple of the system's pages, so that it can be given back. ``window``: the
    largest; None: no block is windowed. ``page_bytes``, ``window_page_bytes``, ``slot_bytes``: 0 where there is nothing
    of that kind.
    """

    kv_type: KvType
    paged: tuple[PagedLayout, ...]
    page_bytes: int
    fixed: tuple[FixedLayout, ...]
    slot_bytes: int
    window_page_bytes: int = 0
    window: int | None = None

    @classmethod
    def of(cls, model: ModelDescription, kv_type: KvType, context: int | None = None) -> StateLayout:
        """``context``: positions of a sequence, at most. Blocks with a smaller window are windowed. None: no block
        is."""
        window = None if context is None else widest_window(model, context)
        paged: list[PagedLayout] = []
        fixed: list[FixedLayout] = []
        page = windowed_page = slot = 0
        for each in model.states():
            state = each.state
            if isinstance(state, Fixed):
                for array in state.arrays:
                    fixed.append(FixedLayout(each.layer, each.block, array, slot))
                    slot += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
            else:
                padded = -(-state.head_dim // LANES) * LANES
                half = kv_half_bytes(kv_type, padded)
                windowed = window is not None and state.window is not None and state.window <= window
                offset = windowed_page if windowed else page
                paged.append(
                    PagedLayout(each.layer, each.block, state, padded, offset, 2 * half, half, windowed)
                )
                if windowed:
                    windowed_page += state.kv_heads * 2 * half
                else:
                    page += state.kv_heads * 2 * half
        windowed_page = -(-windowed_page // page_bytes()) * page_bytes()
        return cls(kv_type, tuple(paged), page, tuple(fixed), slot, windowed_page, window)


def widest_window(model: ModelDescription, context: int) -> int | None:
    """The largest window that is smaller than ``context``; None: no block has one."""
    windows = (each.state.window for each in model.states() if isinstance(each.state, Paged))
    return max((window for window in windows if window is not None and window < context), default=None)
