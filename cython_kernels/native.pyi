from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

Bytes: TypeAlias = npt.NDArray[np.uint8]
Floats: TypeAlias = npt.NDArray[np.float32]
BundleLayout: TypeAlias = tuple[int, int, int, int]

TYPE_IDS: Mapping[str, int]
KV_TYPES: Mapping[str, int]
ACTIVATIONS: Mapping[str | None, int]

def variants() -> tuple[tuple[str, bool, int], ...]: ...
def current(name: str | None = None) -> str: ...
def kernels_address(name: str | None = None) -> int: ...

class Memory:
    address: int
    nbytes: int
    def __init__(self, nbytes: int, *, huge_pages: bool = True) -> None: ...
    def view(self) -> npt.NDArray[np.uint8]: ...
    def discard(self, offset: int, size: int) -> None: ...
    def abandon(self) -> bool: ...
    def close(self) -> None: ...

def trim_heap() -> None: ...
def fix_heap_thresholds(nbytes: int) -> None: ...
def row_bytes(type_name: str, k: int) -> int: ...
def matrix_bytes(type_name: str, rows: int, k: int) -> int: ...
def kv_half_bytes(kv_type: str, head_dim: int) -> int: ...
def repack(type_name: str, source: npt.NDArray[np.uint8], rows: int, k: int, address: int) -> int | None: ...
def unpack(type_name: str, address: int, rows: int, k: int) -> Floats: ...
def up_quants(type_name: str, k: int) -> int: ...
def down_quants(type_name: str, rows: int) -> int: ...
def up_scales(type_name: str, k: int) -> int: ...
def down_scales(type_name: str, rows: int) -> int: ...
def bundle_up(
    type_name: str,
    source: Bytes,
    n: int,
    k: int,
    layout: BundleLayout,
    to: Bytes | None,
    scales: Bytes | None,
    *,
    at_byte: int = 0,
) -> int | None: ...
def bundle_down(
    type_name: str,
    source: Bytes,
    rows: int,
    hidden: int,
    first: int,
    count: int,
    layout: BundleLayout,
    to: Bytes | None,
    scales: Bytes | None,
) -> int | None: ...
def unbundle_up(
    type_name: str, pages: Bytes, scales: Bytes, n: int, k: int, layout: BundleLayout, *, at_byte: int = 0
) -> Floats: ...
def unbundle_down(
    type_name: str, pages: Bytes, scales: Bytes, rows: int, n: int, layout: BundleLayout
) -> Floats: ...
def read_bandwidth(nbytes: int, threads: int, repeats: int = 3, name: str | None = None) -> float: ...

class Kernels:
    name: str
    def __init__(self, name: str | None = None) -> None: ...
    def quantize(self, x: Floats, *, wide: bool = False, mixed: bool = False) -> tuple[Any, ...]: ...
    def neuron_rows(
        self,
        type_name: str,
        pages: Bytes,
        scales: Bytes,
        layout: BundleLayout,
        neurons: Sequence[int],
        x: Floats,
        *,
        wide: bool = False,
    ) -> Floats: ...
    def neuron_columns(
        self,
        type_name: str,
        pages: Bytes,
        scales: Bytes,
        layout: BundleLayout,
        h: Floats,
        rows: int,
        *,
        wide: bool = False,
    ) -> Floats: ...
    def gemm(
        self,
        type_name: str,
        address: int,
        rows: int,
        k: int,
        x: Floats,
        *,
        wide: bool = False,
        mixed: bool = False,
        panels: bool = False,
    ) -> Floats: ...
    def rmsnorm(self, x: Floats, w: Floats, offset: float, eps: float) -> Floats: ...
    def activate(
        self, activation: str | None, up_activation: str | None, gate: Floats | None, up: Floats
    ) -> Floats: ...
    def rope(self, x: Floats, cosine: Floats, sine: Floats, interleaved: bool) -> Floats: ...
    def add(self, x: Floats, y: Floats) -> Floats: ...
    def scale(self, x: Floats, a: float) -> Floats: ...
    def softcap(self, x: Floats, cap: float) -> Floats: ...
    def argmax(self, x: Floats) -> int: ...
    def logsumexp(self, x: Floats) -> float: ...
    def attention(
        self,
        keys: Floats,
        values: Floats,
        queries: Floats,
        lo: npt.NDArray[np.int32],
        hi: npt.NDArray[np.int32],
        *,
        kv_type: str = "f16",
        softcap: float = 0,
        splits: Sequence[tuple[int, int | None]] = ...,
    ) -> Floats: ...
