"""What the runtime remembers between steps: the state of sequences, who holds its pages, and what may be used again."""

from pi2rt.memory.need import MemoryNeed, weight_bytes
from pi2rt.memory.page_codec import BlockPages
from pi2rt.memory.page_pool import PagePool, PagePoolStatistics
from pi2rt.memory.page_table import PageTable
from pi2rt.memory.prefix_index import PrefixIndex, PrefixIndexStatistics
from pi2rt.memory.size import parse_size
from pi2rt.memory.state_layout import FixedLayout, KvType, PagedLayout, StateLayout, widest_window
from pi2rt.memory.state_store import StateStore
from pi2rt.memory.window_law import least_window_pages, window_pages
from pi2rt.memory.window_pool import WindowPool, WindowPoolStatistics
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
    "WindowPool",
    "WindowPoolStatistics",
    "least_window_pages",
    "parse_size",
    "weight_bytes",
    "widest_window",
    "window_pages",
]
