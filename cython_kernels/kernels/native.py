"""The modules of this folder under one name: the layout of weights, memory, and every kernel by itself."""

from pi2rt.cython_kernels.kernels.bundles import (
    bundle_down,
    bundle_up,
    down_quants,
    down_scales,
    unbundle_down,
    unbundle_up,
    up_quants,
    up_scales,
)
from pi2rt.cython_kernels.kernels.kernels import Kernels, exponential, read_bandwidth, rotations
from pi2rt.cython_kernels.kernels.layout import (
    ACTIVATIONS,
    KV_TYPES,
    TYPE_IDS,
    kv_half_bytes,
    matrix_bytes,
    repack,
    row_bytes,
    unpack,
)
from pi2rt.cython_kernels.kernels.memory import (
    Memory,
    fix_heap_thresholds,
    huge_page_bytes,
    page_bytes,
    trim_heap,
)
from pi2rt.cython_kernels.kernels.variants import Variant, current, variants

__all__ = [
    "ACTIVATIONS",
    "KV_TYPES",
    "TYPE_IDS",
    "Kernels",
    "Memory",
    "Variant",
    "bundle_down",
    "bundle_up",
    "current",
    "down_quants",
    "down_scales",
    "exponential",
    "fix_heap_thresholds",
    "huge_page_bytes",
    "kv_half_bytes",
    "matrix_bytes",
    "page_bytes",
    "read_bandwidth",
    "repack",
    "rotations",
    "row_bytes",
    "trim_heap",
    "unbundle_down",
    "unbundle_up",
    "unpack",
    "up_quants",
    "up_scales",
    "variants",
]
