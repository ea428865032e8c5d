from collections.abc import Mapping, Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pi2rt.cython_kernels.flash.neuron_cache import NeuronCache
from pi2rt.cython_kernels.flash.rows import Rows
from pi2rt.cython_kernels.flash.stream import Stream
from pi2rt.cython_kernels.plane.cluster_unit import Mailbox
from pi2rt.runtime.step import Bind, Sampling, Step, StepResult, Unusable
from pi2rt.runtime.token_mask import TokenMask

Floats: TypeAlias = npt.NDArray[np.float32]
Nanoseconds: TypeAlias = npt.NDArray[np.int64]
Norm: TypeAlias = tuple[Floats, float, float]

MOST_IN_FLIGHT: int
CLUSTER: int
PIPELINES: Mapping[str, int]
Scales: TypeAlias = tuple[int, int, int]

class Gang:
    cores: tuple[int, ...]
    event_fd: int
    def __init__(self, cores: Sequence[int], *, spin_ns: int = 50_000) -> None: ...
    def close(self) -> None: ...

class Matrix:
    def __init__(
        self,
        type_id: int,
        rows: int,
        k: int,
        address: int,
        bias: Floats | None = None,
        *,
        piece: tuple[int, int] | None = None,
        region: int = -1,
        page_blocks: int = 0,
    ) -> None: ...

class Bundles:
    def __init__(
        self,
        region: int,
        up: Scales | None,
        down: Scales,
        *,
        down_plane: int,
        neurons: int,
        per_page: int,
        neuron_bytes: int,
        up_bytes: int,
        gate: Scales | None = None,
        gate_bytes: int = 0,
        gate_bias: Floats | None = None,
        up_bias: Floats | None = None,
        down_bias: Floats | None = None,
        thresholds: Floats | None = None,
        order: npt.NDArray[np.uint16] | None = None,
        elsewhere: npt.NDArray[np.uint8] | None = None,
    ) -> None: ...

class Program:
    weight_bytes: int
    activation_bytes: int
    rarely_used_bytes: int
    thread_ns: tuple[int, ...]
    operations: tuple[str, ...]
    in_flight: int
    def __init__(
        self,
        gang: Gang | int,
        kernels: int,
        *,
        dim: int,
        vocab: int,
        max_rows: int,
        max_slots: int,
        context: int,
        pages: int,
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
    def state(
        self,
        *,
        pages: int,
        page_bytes: int,
        windowed: int = 0,
        window_page_bytes: int = 0,
        slots: int = 0,
        n_slots: int = 0,
        slot_bytes: int = 0,
    ) -> None: ...
    @property
    def waited_for(self) -> int: ...
    def detach(self) -> None: ...
    @property
    def taken(self) -> tuple[tuple[int, int, int], ...]: ...
    def lend(self, nbytes: int, *, kv: int, kv_bytes: int, kv_page_bytes: int, kv_used: int) -> None: ...
    def bind(self, bind: Bind) -> None: ...
    def post(self, step: Step, trace: bool = False) -> None: ...
    def stop(self, step_id: int) -> None: ...
    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None: ...
    def ready(self) -> bool: ...
    def result(self) -> tuple[StepResult, tuple[Nanoseconds, Nanoseconds, list[Nanoseconds]] | None]: ...

def unusable(token: int) -> Unusable: ...
def sample(
    kernels: int,
    logits: Floats,
    sampling: Sampling,
    counts: npt.NDArray[np.int32],
    position: int,
    allowed: TokenMask | None = None,
) -> tuple[int, float]: ...
