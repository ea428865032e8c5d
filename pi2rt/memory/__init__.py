"""What the runtime remembers between steps: the state of sequences, who holds its pages, and what may be used again."""

from pi2rt.memory.need import MemoryNeed, weight_bytes
from pi2rt.memory.page_codec import BlockPages
from pi2rt.memory.page_pool import PagePool, PagePoolStatistics
from pi2rt.memory.page_table import PageTable
from pi2rt.memory.prefix_index import PrefixIndex, PrefixIndexStatistics
from pi2rt.memory.size import parse_size
from pi2rt.memory.state_layout import FixedLayout, KvType, PagedLayout, StateLayout
from pi2rt.memory.state_store import StateStore
from pi2rt.models.states import PAGE_TOKENS

__all__ = [
    "PAGE_TOKENS",
    "BlockPages",
    "FixedLayout",
    "KvType",
    "MemoryNeed",
    "PagePool",
    "PagePoolStatistics",
    "PageTable",
    "PagedLayout",
    "PrefixIndex",
    "PrefixIndexStatistics",
    "StateLayout",
    "StateStore",
    "parse_size",
    "weight_bytes",
]
