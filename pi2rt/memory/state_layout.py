"""Where the state of a sequence lies, and how many bytes it takes: the one law of these sizes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from pi2rt.cython_kernels.kernels.native import kv_half_bytes
from pi2rt.models import Fixed, FixedArray, ModelDescription, Paged

KvType: TypeAlias = Literal["f16", "q8", "f32"]
"""Of a key or value: half precision; int8 with a float32 scale for each position and head; float32."""

LANES = 16
"""Elements of a head are padded with zeros to a multiple of this, so that kernels read whole vectors."""

_ALIGNMENT = 64


@dataclass(frozen=True, slots=True)
class PagedLayout:
    """Where one block's keys and values lie inside a page; bytes.

    A page holds all blocks: ``offset`` of this one, ``head_stride`` from one KV head to the next, ``v_offset`` from a
    head's keys to its values (``cython_kernels/kernels/attention_template.h`` has the layout of both). ``padded``:
    elements of a head as they are stored.
    """

    layer: int
    block: int
    state: Paged
    padded: int
    offset: int
    head_stride: int
    v_offset: int


@dataclass(frozen=True, slots=True)
class FixedLayout:
    """Where one array of a block lies inside a slot: ``offset`` in bytes, a multiple of 64."""

    layer: int
    block: int
    array: FixedArray
    offset: int


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Of a model: what a KV page holds, and what a slot of fixed arrays holds. ``page_bytes``, ``slot_bytes``: 0 where
    there is nothing of that kind."""

    kv_type: KvType
    paged: tuple[PagedLayout, ...]
    page_bytes: int
    fixed: tuple[FixedLayout, ...]
    slot_bytes: int

    @classmethod
    def of(cls, model: ModelDescription, kv_type: KvType) -> StateLayout:
        paged: list[PagedLayout] = []
        fixed: list[FixedLayout] = []
        page = slot = 0
        for each in model.states():
            state = each.state
            if isinstance(state, Fixed):
                for array in state.arrays:
                    fixed.append(FixedLayout(each.layer, each.block, array, slot))
                    slot += -(-array.nbytes // _ALIGNMENT) * _ALIGNMENT
            else:
                padded = -(-state.head_dim // LANES) * LANES
                half = kv_half_bytes(kv_type, padded)
                paged.append(PagedLayout(each.layer, each.block, state, padded, page, 2 * half, half))
                page += state.kv_heads * 2 * half
        return cls(kv_type, tuple(paged), page, tuple(fixed), slot)
