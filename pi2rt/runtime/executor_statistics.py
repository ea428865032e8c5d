"""What an executor tells of itself: snapshots, typed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pi2rt.runtime.step import NeuronUse

RECENT_STEPS = 1024
"""Of so many steps ``ExecutorStatistics`` tells what each took."""


@dataclass(frozen=True, slots=True)
class StepUse:
    """What a step took. ``tokens``: in it; ``busy_ns``: time from its begin to its end; the others as in
    ``StepResult``."""

    tokens: int
    busy_ns: int
    weight_bytes: int
    streamed_bytes: int
    neurons: NeuronUse | None


@dataclass(frozen=True, slots=True)
class ThreadStatistics:
    """A thread. ``actor``: whose unit it is, which is another than the executor's own for the threads of assistants, of
    flash and of a cluster unit; ``core``: where it is pinned, or -1; ``kernel_ns``: time inside kernels, of a reader
    with a read in flight; ``waiting_ns``: time inside steps without one. Units of work that it took from the cursors
    which the threads of a gang share: ``row_blocks`` of matrices, ``clusters`` of neurons, units of ``attention``."""

    actor: str
    core: int
    kernel_ns: int
    waiting_ns: int = 0
    row_blocks: int = 0
    clusters: int = 0
    attention: int = 0


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """A cache of pages that are read while steps run. ``page_bytes``: that one read takes at least; ``reads_at_once``:
    in flight, at most. Of pages: asked for while they were there (``hits``; ``early``: of these, read because they were
    foreseen, and asked for the first time) or not (``misses``), and given up for others (``evictions``). In two phases,
    read to their end because their neurons are active (``completed``). ``read_through``, ``read_through_bytes``: pages
    and bytes of gaps, which nobody asked for."""

    page_bytes: int
    reads_at_once: int
    hits: int = 0
    early: int = 0
    misses: int = 0
    evictions: int = 0
    completed: int = 0
    read_through: int = 0
    read_through_bytes: int = 0


@dataclass(frozen=True, slots=True)
class StreamStatistics:
    """Matrices that are read in every step. ``read_bytes``: of one read, at most; ``reads_at_once``; ``reads``: that
    have ended; ``reclaimable_bytes``: of activations and KV pages that are not needed now, and hold pieces."""

    read_bytes: int
    reads_at_once: int
    reads: int
    reclaimable_bytes: int


@dataclass(frozen=True, slots=True)
class FlashStatistics:
    """What is read from flash while steps run. ``io``: through what, and why; ``measured``: sizes and depths are chosen
    by a measured curve; ``page_reads``: reads into caches; ``bytes``: read, but for rows; ``busy_ns``: with a read in
    flight; ``stall_ns``: for which steps have waited; ``pinned_bytes``: of memory that reads need not pin one by one;
    ``row_reads``: of the embedding. ``neurons``, ``experts``, ``stream``: None where nothing of the kind is read.
    ``repairs``: how often readers were made anew."""

    io: str
    measured: bool
    page_reads: int
    bytes: int
    busy_ns: int
    stall_ns: int
    pinned_bytes: int
    row_reads: int
    repairs: int
    neurons: CacheStatistics | None = None
    experts: CacheStatistics | None = None
    stream: StreamStatistics | None = None


@dataclass(frozen=True, slots=True)
class ClusterUnitStatistics:
    """A cluster unit. ``items`` that it computed, their ``rows``; ``busy_ns``: of its thread; ``stall_ns``: for which
    steps have waited. ``lost``: why it computes no more, so that the executor computes its clusters; else None."""

    name: str
    items: int
    rows: int
    busy_ns: int
    stall_ns: int
    lost: str | None = None


@dataclass(frozen=True, slots=True)
class ExecutorStatistics:
    """A snapshot, consistent with the last step that was waited for. ``busy_ns``: time inside steps;
    ``kernel_ns``: of that, inside kernels; ``finished_ns``: when that step ended, so that between two
    snapshots ``kernel_ns`` over ``finished_ns`` is the share of time spent in kernels; ``bytes``: memory held
    by name (weights, kv, activations); ``threads``: those that compute, () where the executor has none of its
    own; ``recent``: what each of the last steps took, the oldest first, as far as the executor counts it; ``kernels``:
    the variant that runs; ``flash``: None where nothing is read while steps run; ``cluster_unit``: None without one."""

    steps: int = 0
    tokens: int = 0
    in_flight: int = 0
    busy_ns: int = 0
    kernel_ns: int = 0
    finished_ns: int = 0
    bytes: Mapping[str, int] = field(default_factory=dict)
    threads: tuple[ThreadStatistics, ...] = ()
    recent: tuple[StepUse, ...] = ()
    kernels: str | None = None
    flash: FlashStatistics | None = None
    cluster_unit: ClusterUnitStatistics | None = None
