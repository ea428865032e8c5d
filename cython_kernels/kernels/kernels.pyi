from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from pi2rt.cython_kernels.kernels.bundles import BundleLayout, Bytes, Floats
from pi2rt.cython_kernels.kernels.variants import Variant

def rotations(
    frequencies: npt.NDArray[np.float64], first: int, count: int, magnitude: float = 1.0
) -> tuple[Floats, Floats]: ...
def exponential(x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]: ...
def read_bandwidth(nbytes: int, threads: int, repeats: int = 3, name: str | None = None) -> float: ...

class Kernels(Variant):
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
