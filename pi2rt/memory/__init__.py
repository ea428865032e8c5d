"""What the runtime remembers between steps: pages of KV cache, who holds them, and what may be used again."""

from pi2rt.memory.need import KV_BYTES, MemoryNeed, estimate_need
from pi2rt.memory.page_pool import PagePool, PagePoolStatistics
from pi2rt.memory.page_table import PageTable
from pi2rt.memory.prefix_index import PrefixIndex, PrefixIndexStatistics
from pi2rt.memory.size import parse_size

__all__ = [
    "KV_BYTES",
    "MemoryNeed",
    "PagePool",
    "PagePoolStatistics",
    "PageTable",
    "PrefixIndex",
    "PrefixIndexStatistics",
    "estimate_need",
    "parse_size",
]
