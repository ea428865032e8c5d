"""The executor protocol: what drives one hardware unit. Built-in executors and plug-ins are found alike, by
entry point (group ``pi2rt.executors``), and pass the same conformance tests (``pi2rt.testing``).

An executor is owned by one actor and called from its Trio task only; it may use threads of its own
underneath.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

from pi2rt.formats import ModelFile
from pi2rt.formats.placement import Placement, placed
from pi2rt.formats.predictor import Predictor
from pi2rt.memory import KvType, MemoryNeed, StateLayout, StateStore
from pi2rt.models import ModelDescription
from pi2rt.runtime.cluster_unit import ClusterUnit
from pi2rt.runtime.executor_statistics import ExecutorStatistics
from pi2rt.runtime.flash_reads import FlashReads
from pi2rt.runtime.step import Floats, Step, StepResult
from pi2rt.runtime.token_mask import TokenMask
from pi2rt.runtime.trace import Trace

Progress: TypeAlias = Callable[[int, int], None]
"""``progress(done, total)``; for loading, in bytes."""


@dataclass(frozen=True, slots=True)
class ExecutorOptions:
    """What the runtime tells an executor when it opens a model.

    ``slots``: sequences at once; ``pages``: pages of KV cache; ``window_pages``: of these, those that have memory for
    the bytes of blocks with a window at a time; 0: all. ``context``: positions per sequence at most; ``max_tokens``:
    tokens in one step at most. ``cores``: core numbers to run on, in order; () leaves it to the executor. ``actor``:
    name of the actor that owns the executor. ``assistants``: (actor name, cores) of
    units that share each layer. ``kv_type``: "f16" or "q8". ``activations``: "int16", "mixed" or
    "int8", what activations become where they meet quantised weights; mixed is int8, but int16 for the largest
    blocks of 32. Both are faster in prefill than int16, and less exact.
    ``exact_floats``: dequantise weights to float32, quantise no activations, keep keys and values in float32
    (for tests; slow). ``kernels``: name of a kernel variant, None for the best.
    ``placements``: of each tensor that is not resident, by name, in the order of use. Streamed ones pass through a ring
    of ``ring_bytes``; expert pages have a cache of ``expert_bytes``, and neurons one of ``neuron_bytes``, where 0 means
    that all of them stay. ``io``: how they are read, "auto", "uring" or "preadv". An executor that cannot do what a
    placement says refuses with RequestError. ``read_deadline``: seconds; where none of the reads in flight ends for so
    long, the step fails. ``pipeline``: how far reading overlaps with computing: "cluster", "matrix" or "none".
    ``two_phase``: of neurons whose gates are in the bundles, the rest is read only once the gate has let it through.
    ``reads``: how much is read at once.
    ``thresholds``: of their feed-forward blocks, by the name of the down tensor, float32 (hidden,): a neuron
    is active only when the magnitude of its activated gate (without gate: of its activated up) is above. Empty: exact.
    The runtime gives them to executors whose ``sparsities`` name the mode. ``predictors``: of blocks whose gates are in
    the bundles, by the same name; only neurons that they name are read. Empty: all of such blocks are.
    ``cluster_unit``: makes a unit that computes ``unit_clusters`` beside the executor: numbers of neuron clusters, by
    the name of the block's down tensor. ``unit_actor``: the unit's name in statistics and traces. Only executors with
    an attribute ``takes_cluster_units``, which is true, are given one.
    ``mask_deadline``: seconds; where a slice has waited so long for its mask, it is ``Unusable``.
    """

    slots: int
    pages: int
    context: int
    max_tokens: int
    window_pages: int = 0
    cores: tuple[int, ...] = ()
    actor: str = "cpu"
    assistants: tuple[tuple[str, tuple[int, ...]], ...] = ()
    kv_type: KvType = "f16"
    activations: str = "mixed"
    exact_floats: bool = False
    kernels: str | None = None
    placements: Mapping[str, Placement] = field(default_factory=dict)
    ring_bytes: int = 0
    expert_bytes: int = 0
    neuron_bytes: int = 0
    io: str = "auto"
    read_deadline: float | None = None
    pipeline: str = "cluster"
    two_phase: bool = False
    reads: FlashReads = field(default_factory=FlashReads)
    thresholds: Mapping[str, Floats] = field(default_factory=dict)
    predictors: Mapping[str, Predictor] = field(default_factory=dict)
    cluster_unit: Callable[[], ClusterUnit] | None = None
    unit_actor: str = "cluster unit"
    unit_clusters: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    mask_deadline: float = 10.0
    trace: Trace | None = None

    def placed(self, where: Placement) -> tuple[str, ...]:
        """Names of the tensors that are there, in the order of use."""
        return placed(self.placements, where)


@runtime_checkable
class StepExecutor(Protocol):
    """Drives one hardware unit. The life of one: construct, ``open``, many ``submit``/``wait``, ``aclose``.

    ``max_in_flight``: how many steps may be submitted and not yet waited for; at least 1. Steps complete in
    the order of submission. An executor that has an attribute ``reads_bundles``, and it is true, knows matrices of the
    layout "neurons"; others are given no file that has any. One that has ``streams_weights``, and it is true, takes
    options that read weights in every step; others are given none. An attribute ``block_kinds`` names the kinds of
    blocks that it runs (``Block.kind``), and it is given no model that has others; None, or no such attribute: all.
    """

    name: str
    max_in_flight: int

    async def open(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None,
        progress: Progress,
    ) -> None:
        """Loads the model. Cancellable; after a cancellation ``aclose`` is still called. May run ``progress``
        from the Trio thread only. ``store``: whose KV pages it works on until ``aclose`` has returned, if it is a
        ``Borrower``; others are given None, and keep keys and values by themselves."""
        ...

    def submit(self, step: Step) -> None:
        """Starts a step, without blocking. Raises BusyError when ``max_in_flight`` are already there."""
        ...

    async def wait(self) -> StepResult:
        """The result of the oldest submitted step; raises what made it fail, which also consumes it.
        Cancelling ``wait`` loses nothing: call it again. Results that are there already may be given without
        letting other tasks run, ``max_in_flight`` of them in a row at most."""
        ...

    def stop(self, step_id: int) -> None:
        """Asks a submitted step to end early (within a layer). Its result arrives as always, with ``stopped``
        set if it did end early. Unknown ids are ignored: the step may just have finished."""
        ...

    async def aclose(self) -> None:
        """Stops everything, joins threads, frees memory. Bounded; safe to call twice and after a failed
        ``open``. A ``wait`` in progress in another task, and each ``submit`` or ``wait`` from then on, raises
        ClosedError."""
        ...

    def statistics(self) -> ExecutorStatistics: ...


@runtime_checkable
class Borrower(Protocol):
    """An executor that keeps the state of sequences in the runtime's memory. So it outlives the executor, and
    executors of several lanes work on the same sequences."""

    def page_type(self, kv_type: KvType, exact_floats: bool) -> KvType:
        """Type of the pages that it wants, where ``ExecutorOptions`` say that. It has to take those of another lane
        too."""
        ...


@runtime_checkable
class Measured(Protocol):
    """An executor that says what memory it takes. Without that, a memory budget is refused: it could not be kept."""

    def need(self, file: ModelFile, model: ModelDescription, options: ExecutorOptions) -> MemoryNeed:
        """Bytes that it will take at most, beside the pages that it borrows. Called before ``open``; acquires nothing.
        ``options``: of what is not planned yet, ``pages`` is 1, and all weights are resident."""
        ...


def make_store(
    executor: StepExecutor, model: ModelDescription, options: ExecutorOptions
) -> StateStore | None:
    """The state that the executor will borrow; None where it keeps that by itself."""
    if not isinstance(executor, Borrower):
        return None
    kv_type = executor.page_type(options.kv_type, options.exact_floats)
    layout = StateLayout.of(model, kv_type, options.context)
    return StateStore(layout, options.pages, options.slots, options.window_pages or None)


@runtime_checkable
class Repairable(Protocol):
    """An executor that can go on after some failures without loading weights again, such as reads that failed."""

    async def repair(self) -> bool:
        """Called when a step has failed and no task is in ``wait``. Ends all steps in flight, whose results are lost,
        and makes the executor as it is behind ``open``: no slot is bound. True: it can go on. False, or an error: it
        has to be closed. Bounded."""
        ...


@runtime_checkable
class Masking(Protocol):
    """An executor that takes masks of tokens while steps run (``Slice.masked``), where ``takes_masks`` is true. Such a
    slice waits for its mask with its logits computed, those without masks being finished first. Past
    ``ExecutorOptions.mask_deadline``, counted from the moment when nothing else is left to do, it is
    ``Unusable(("token_mask",))``, and no other slice is concerned. ``stop`` and ``aclose`` end the wait at once."""

    takes_masks: bool

    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        """Which tokens may be sampled by the slice of ``slot`` in a step in flight; None: all. Never blocks; the array
        is the caller's again when it returns. The first mask of a slice counts. Ignored where nothing waits for it:
        the step may just have finished, or the slice was skipped. Raises InternalError for an array of another shape
        or type."""
        ...


@runtime_checkable
class Resizable(Protocol):
    """An executor whose memory for neurons (``ExecutorOptions.neuron_bytes``) can change while steps run."""

    async def resize(self, neuron_bytes: int) -> None:
        """Gives up what no longer fits, and returns when its memory is free; or reads more, and returns when it is
        full. Cancelled while it reads, it keeps the new size and what was read. Results do not change. Raises
        RequestError where no neurons are in a cache, ClosedError where the executor was closed meanwhile."""
        ...
