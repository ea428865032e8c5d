from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pi2rt.cython_kernels.flash.neuron_cache import NeuronCache
from pi2rt.cython_kernels.flash.stream import Stream
from pi2rt.cython_kernels.kernels.variants import Variant
from pi2rt.cython_kernels.plane.gang import Gang
from pi2rt.cython_kernels.plane.operations import Operations
from pi2rt.runtime.step import Bind, Step, StepResult
from pi2rt.runtime.token_mask import TokenMask

Nanoseconds: TypeAlias = npt.NDArray[np.int64]

MOST_IN_FLIGHT: int
CLUSTER: int

class Program(Operations):
    thread_ns: tuple[int, ...]
    in_flight: int
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
