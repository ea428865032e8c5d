from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pi2rt.cython_kernels.flash.neuron_cache import NeuronCache
from pi2rt.cython_kernels.flash.rows import Rows
from pi2rt.cython_kernels.flash.stream import Stream
from pi2rt.cython_kernels.kernels.variants import Variant
from pi2rt.cython_kernels.plane.cluster_unit import Mailbox
from pi2rt.cython_kernels.plane.gang import Gang
from pi2rt.cython_kernels.plane.matrices import Bundles, Matrix

Norm: TypeAlias = tuple[npt.NDArray[np.float32], float, float]

PIPELINES: Mapping[str, int]

class Operations:
    weight_bytes: int
    activation_bytes: int
    rarely_used_bytes: int
    operations: tuple[str, ...]
    def __init__(
        self,
        gang: Gang | int,
        kernels: Variant,
        *,
        dim: int,
        vocab: int,
        max_rows: int,
        max_slots: int,
        context: int,
        wide: bool = True,
        mixed: bool = False,
        embedding_scale: float = 1,
        logit_softcap: float = 0,
        stream: Stream | None = None,
        neurons: NeuronCache | None = None,
        clusters: NeuronCache | None = None,
        pipeline: str = "cluster",
        traced: bool = False,
        assisting: int = 0,
        mask_deadline: float = 10.0,
    ) -> None: ...
    def rope(self, frequencies: npt.NDArray[np.float64], interleaved: bool, magnitude: float) -> int: ...
    def embed(self, matrix: Matrix, *, rows: Rows | None = None) -> None: ...
    def linear(
        self,
        layer: int,
        norm: Norm | None,
        source: str,
        sink: str,
        matrices: Sequence[Matrix],
        *,
        q8_in: bool = False,
        mixed: bool = False,
        expert: int = -1,
    ) -> None: ...
    def ffn(
        self,
        layer: int,
        norm: Norm | None,
        up: Matrix,
        gate: Matrix | None,
        activation: int,
        up_activation: int,
        *,
        q8_out: bool,
        mixed: bool = False,
        expert: int = -1,
    ) -> None: ...
    def sparse_ffn(
        self,
        layer: int,
        norm: Norm | None,
        sink: str,
        decides: Matrix | None,
        bundles: Bundles,
        activation: int,
        up_activation: int,
        *,
        mixed: bool = False,
        mixed_down: bool = False,
        expert: int = -1,
    ) -> None: ...
    def hand_off(self, layer: int, norm: Norm | None, mailbox: Mailbox | None) -> None: ...
    def join(self, layer: int, sink: str, mailbox: Mailbox | None) -> None: ...
    def route(self, layer: int, *, n_experts: int, n_used: int, normalized: bool, shared: bool) -> None: ...
    def attention(
        self,
        layer: int,
        *,
        n_heads: int,
        n_kv_heads: int,
        head_dim: int,
        window: int,
        scale: float,
        softcap: float,
        rope: int,
        q_norm: Norm | None,
        k_norm: Norm | None,
        kv: int,
        page_stride: int,
        head_stride: int,
        v_offset: int,
        kv_type: int,
        q8_out: bool,
    ) -> None: ...
    def add(self, layer: int, norm: Norm | None) -> None: ...
    def head(self, norm: Norm | None, matrix: Matrix) -> None: ...
    def prepare(self) -> None: ...
