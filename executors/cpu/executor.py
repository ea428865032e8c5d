"""The processor: a model's whole step runs as one native program on pinned threads of this executor's own.

The lead executor of a device holds the program; the cores of its assistants (another class of cores, an actor of their
own name in traces and statistics) are threads of the same gang and take rows from the same cursors, so that a layer is
shared without a hop through the control plane.
"""

from __future__ import annotations

import contextlib
import os
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import numpy as np
import trio

from pi2rt._errors import BusyError, ClosedError, InternalError, RequestError, UnsupportedModelError
from pi2rt.cython_kernels.kernels import native
from pi2rt.cython_kernels.plane.gang import Gang
from pi2rt.cython_kernels.plane.program import MOST_IN_FLIGHT, Program
from pi2rt.executors.cpu.blocks import BLOCKS
from pi2rt.executors.cpu.expert_pages import Clusters
from pi2rt.executors.cpu.need import cpu_need, layout_of
from pi2rt.executors.cpu.neurons import Neurons
from pi2rt.executors.cpu.predictors import LoadedPredictors
from pi2rt.executors.cpu.program_builder import ProgramBuilder
from pi2rt.executors.cpu.unit_clusters import UnitClusters
from pi2rt.executors.cpu.weights import Weights
from pi2rt.executors.flash.flash import Flash
from pi2rt.executors.flash.late_reads import LateReads
from pi2rt.formats import ModelFile
from pi2rt.formats.placement import Placement
from pi2rt.host.limits import explained, limits_explained
from pi2rt.host.topology import own_cores
from pi2rt.memory import KvType, MemoryNeed, StateStore
from pi2rt.models import ModelDescription
from pi2rt.models.block_check import check_blocks, kinds_of
from pi2rt.runtime.cluster_unit import ClusterUnitError, misplaced_clusters
from pi2rt.runtime.executor import ExecutorOptions, Progress
from pi2rt.runtime.executor_statistics import (
    RECENT_STEPS,
    ClusterUnitStatistics,
    ExecutorStatistics,
    StepUse,
    ThreadStatistics,
)
from pi2rt.runtime.step import Step, StepResult
from pi2rt.runtime.token_mask import TokenMask
from pi2rt.runtime.trace import Nanoseconds

SPIN_NS = 50_000
"""How long a thread spins at a barrier before it sleeps. A wake-up costs 50 to 100 us."""


class CpuExecutor:
    """See ``pi2rt.runtime.executor.StepExecutor``."""

    name = "cpu"
    reads_bundles = True
    streams_weights = True
    takes_cluster_units = True
    verifies_drafts = True
    takes_masks = True
    sparsities = ("exact", "thresholded", "predicted")
    max_in_flight = MOST_IN_FLIGHT

    def __init__(self) -> None:
        self._weights: Weights | None = None
        self._store: StateStore | None = None
        self._flash: Flash | None = None
        self._neurons: Neurons | None = None  # its caches, with what is in them
        self._predictors: LoadedPredictors | None = None
        self._clusters: Clusters | None = None
        self._unit: UnitClusters | None = None
        self._gang: Gang | None = None
        self._program: Program | None = None
        self._options: ExecutorOptions | None = None
        self._in_flight: deque[int] = deque()
        self._threads: list[tuple[str, int]] = []  # (actor, core) of each thread
        self._in_a_row = 0  # results taken without letting other tasks run
        self._steps = self._tokens = self._busy_ns = self._kernel_ns = self._finished_ns = 0
        self._tokens_of: deque[int] = deque()
        self._recent: deque[StepUse] = deque(maxlen=RECENT_STEPS)
        self._resizing = trio.Lock()
        self._file: ModelFile | None = None  # and the model, while it is open: to build the program again
        self._model: ModelDescription | None = None
        self._repairable = False  # the last step that failed did so because of a read, or of the cluster unit
        # Of one that failed: its clusters are computed here.
        self._lost_unit: ClusterUnitStatistics | None = None

    @property
    def block_kinds(self) -> frozenset[str]:
        return kinds_of(BLOCKS)

    def page_type(self, kv_type: KvType, exact_floats: bool) -> KvType:
        """float32 where exact floats were asked for: half precision would be their largest error."""
        return "f32" if exact_floats else kv_type

    def need(self, file: ModelFile, model: ModelDescription, options: ExecutorOptions) -> MemoryNeed:
        """See ``pi2rt.runtime.executor.Measured``."""
        check_blocks(file.path, model, self.block_kinds, self.name)
        kv_type = self.page_type(options.kv_type, options.exact_floats)
        return cpu_need(file, model, options, kv_type, len(_threads(options)))

    async def open(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None,
        progress: Progress,
    ) -> None:
        """Loads the weights with as many threads as will compute; ``progress`` counts bytes of the file."""
        if store is None:
            raise InternalError("the cpu executor borrows KV pages, and was given none")
        if options.exact_floats and file.bundles:
            raise UnsupportedModelError(
                file.path,
                "bundles",
                "are not read as exact floats; convert the model with --bundles off for that",
            )
        check_blocks(file.path, model, self.block_kinds, self.name)
        self._threads = _threads(options)
        self._options = options
        self._weights = Weights(file, layout_of(file, model, options))
        problem = misplaced_clusters(file, model, options.unit_clusters)
        if problem is not None:
            raise RequestError(f"{os.fspath(file.path)!r}: {problem}")
        self._file, self._model, self._store = file, model, store
        flash = self._flash = Flash(file, options, self._weights.pieces.pieces)
        reads = flash.late_reads()
        await self._load(file, model, options, progress, reads)
        await flash.open_readers()
        pinned = [core for _, core in self._threads]
        spin = SPIN_NS if len(set(pinned)) == len(pinned) else 0  # two on one core would spin for each other
        self._gang = Gang(pinned, spin_ns=spin)
        wanted = options.predictors
        self._predictors = await reads.run(
            "weights", lambda: LoadedPredictors(file, wanted), LoadedPredictors.close
        )
        await self._open_unit(reads)
        self._build()
        layers = () if self._neurons is None else self._neurons.layers
        flash.trace(layers, tuple(name.removesuffix(".weight") for name in options.placed(Placement.PAGED)))

    async def _open_unit(self, reads: LateReads) -> None:
        """The cluster unit, with its weights, and its thread."""
        file, model, options = self._file, self._model, self._options
        assert file is not None
        assert model is not None
        assert options is not None
        if options.cluster_unit is None:
            return
        made, deadline = options.cluster_unit(), options.read_deadline
        unit = self._unit = UnitClusters(
            options.unit_actor, made, options.unit_clusters, options.max_tokens, model.dim, deadline
        )
        for name in unit.clusters:
            await reads.run("clusters of a unit", partial(unit.load, file, model, name))
        with limits_explained():
            unit.start()

    def _build(self) -> None:
        """The program, of the weights, readers and caches that are there."""
        assert self._file is not None
        assert self._model is not None
        assert self._weights is not None
        assert self._options is not None
        assert self._gang is not None
        assert self._predictors is not None
        store, options, flash = self._store, self._options, self._flash
        assert store is not None
        assert flash is not None
        builder = ProgramBuilder(
            self._file,
            self._model,
            self._weights,
            options,
            self._gang,
            None if flash.ring is None else flash.ring.stream,
            None if flash.rows is None else flash.rows.rows,
            None if self._neurons is None else self._neurons.cached,
            None if self._clusters is None else self._clusters.cached,
            self._predictors.by_down,
            self._unit,
        )
        windowed = 0 if store.window_memory is None else store.window_memory.address
        self._program = builder.build(store.layout, store.page_memory.address, windowed)
        self._program.prepare()
        slots = store.slots if store.layout.slot_bytes else 0
        self._program.state(
            pages=store.page_memory.address,
            page_bytes=store.layout.page_bytes,
            windowed=windowed,
            window_page_bytes=store.layout.window_page_bytes,
            slots=store.slot_memory.address if slots else 0,
            n_slots=slots,
            slot_bytes=store.layout.slot_bytes,
        )
        if (
            flash.ring is not None
        ):  # of pages, only the whole area can be lent: the windowed one is always in use
            pages, page_bytes = store.page_memory, store.layout.page_bytes
            lent = flash.ring.borrow(self._program.rarely_used_bytes + pages.nbytes - page_bytes)
            self._program.lend(
                lent,
                kv=pages.address,
                kv_bytes=pages.nbytes,
                kv_page_bytes=page_bytes,
                kv_used=store.used_bytes,
            )

    async def repair(self) -> bool:
        """See ``pi2rt.runtime.executor.Repairable``. What is in memory stays: weights, cached neurons and experts."""
        program, flash = self._program, self._flash
        if not self._repairable or program is None or self._gang is None or flash is None:
            return False
        for step_id in self._in_flight:
            program.stop(step_id)
        while program.in_flight:  # each ends at its next barrier
            while not program.ready():
                await trio.lowlevel.wait_readable(self._gang.event_fd)
                with contextlib.suppress(BlockingIOError):
                    os.read(self._gang.event_fd, 8)
            with contextlib.suppress(Exception):  # lost, one way or the other
                program.result()
        self._in_flight.clear()
        self._tokens_of.clear()
        self._program = None
        program.detach()
        del program  # and its buffers, before those of the next
        unit = self._unit
        if unit is not None and not unit.works:
            self._lost_unit = replace(unit.statistics(), lost=unit.problem)
            self._unit = None
            await _closed(unit.close)
        await flash.repair(_closed)
        self._build()
        self._repairable = False
        return True

    async def _load(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        progress: Progress,
        reads: LateReads,
    ) -> None:
        """Weights, and as many neurons and clusters of experts as there is room for."""
        assert self._weights is not None
        assert self._flash is not None
        caches: list[Neurons | Clusters] = []
        io, deadline, at_once = options.io, options.read_deadline, options.reads
        if paged := options.placed(Placement.PAGED):
            nbytes = options.expert_bytes
            self._clusters = await reads.run(
                "weights",
                lambda: Clusters(file, paged, nbytes, io, deadline, at_once),
                Clusters.close,
            )
            self._flash.experts = self._clusters
            caches.append(self._clusters)
        if self._weights.scales:
            self._neurons = neurons = await reads.run(
                "weights",
                lambda: Neurons(
                    file, model, options.neuron_bytes, io, deadline, at_once, two_phase=options.two_phase
                ),
                Neurons.close,
            )
            self._flash.neurons = neurons
            caches.append(neurons)
        if not caches:
            await self._weights.load(progress, len(self._threads), deadline)
            return
        total, done = self._weights.file_bytes + sum(each.nbytes for each in caches), 0
        await self._weights.load(lambda read, _: progress(read, total), len(self._threads), deadline)
        done = self._weights.file_bytes

        def report(count: int) -> None:
            nonlocal done
            done += count
            trio.from_thread.check_cancelled()
            trio.from_thread.run_sync(progress, min(done, total), total)

        for each in caches:
            await trio.to_thread.run_sync(each.load, report)
        progress(total, total)  # each block's share of a cache is rounded down

    def submit(self, step: Step) -> None:
        if self._program is None or self._options is None:
            raise ClosedError("the cpu executor is not open")
        if len(self._in_flight) >= self.max_in_flight:
            raise BusyError(f"{len(self._in_flight)} steps are in flight already; wait for one")
        self._program.post(step, self._options.trace is not None)
        self._in_flight.append(step.id)
        self._tokens_of.append(step.tokens)

    async def wait(self) -> StepResult:
        if self._program is None or self._gang is None:
            raise ClosedError("the cpu executor is not open")
        event_fd = self._gang.event_fd
        # Results that are there already are taken in a row, for a pass of Trio's loop costs as much as handling one;
        # but steps that are always done early must not starve other tasks.
        self._in_a_row = self._in_a_row + 1 if self._program.ready() else 0
        if 0 < self._in_a_row < self.max_in_flight:
            await trio.lowlevel.checkpoint_if_cancelled()
        elif self._in_a_row:
            self._in_a_row = 0
            await trio.lowlevel.checkpoint()
        while not self._program.ready():
            try:
                await trio.lowlevel.wait_readable(event_fd)
            except trio.ClosedResourceError:
                raise ClosedError("the cpu executor was closed") from None
            with contextlib.suppress(
                BlockingIOError
            ):  # the event of a step that was ready before it was waited for
                os.read(event_fd, 8)
        self._in_flight.popleft()
        tokens = self._tokens_of.popleft()
        try:
            result, times = self._program.result()
        except ClusterUnitError as error:
            self._repairable = True
            assert self._unit is not None
            raise self._unit.lost(error) from self._unit.mailbox.failure
        except Exception:  # a step fails by what it could not read, and by nothing else
            self._repairable = True
            raise
        busy_ns = result.finished_ns - result.started_ns
        self._steps += 1
        self._tokens += tokens
        self._busy_ns += busy_ns
        self._kernel_ns += result.kernel_ns
        self._finished_ns = result.finished_ns
        self._recent.append(
            StepUse(tokens, busy_ns, result.weight_bytes, result.streamed_bytes, result.neurons)
        )
        if times is not None and not result.stopped:
            self._record(*times)
        return result

    def _record(self, starts: Nanoseconds, ends: Nanoseconds, waits: list[Nanoseconds]) -> None:
        assert self._options is not None
        assert self._options.trace is not None
        assert self._program is not None
        names = self._program.operations
        for thread, (actor, core) in enumerate(self._threads):
            track = self._options.trace.track(actor, f"core {core}")
            self._options.trace.extend_native(track, names, starts[thread], ends[thread])
            waited = waits[thread]
            index = np.zeros(len(waited), np.intp)
            self._options.trace.extend_native(track, ("wait",), waited[:, 0], waited[:, 1], index)
        if self._flash is not None:
            self._flash.draw()
        if self._unit is not None:
            track = self._options.trace.track(self._unit.actor, "clusters")
            while self._unit.times:
                layer, rows, begun, ended = self._unit.times.popleft()
                track.span(f"layer {layer} clusters", begun, ended, rows=rows)

    def stop(self, step_id: int) -> None:
        if self._program is not None:
            self._program.stop(step_id)

    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        """See ``pi2rt.runtime.executor.Masking``."""
        if self._program is not None:
            self._program.mask(step_id, slot, allowed)

    async def resize(self, neuron_bytes: int) -> None:
        """See ``pi2rt.runtime.executor.Resizable``."""
        neurons = self._neurons
        if neurons is None:
            raise RequestError("there are no neurons in a cache: their memory cannot be resized")
        # Not to be left half done: the thread would go on, and the memory might be freed under it.
        with trio.CancelScope(shield=True):
            async with self._resizing:  # in the order of the calls
                await trio.to_thread.run_sync(neurons.resize, neuron_bytes)
        await trio.to_thread.run_sync(neurons.refill, trio.from_thread.check_cancelled)

    async def aclose(self) -> None:
        gang, self._gang = self._gang, None
        if gang is not None:
            if self._program is not None:
                for step_id in self._in_flight:
                    self._program.stop(step_id)
            trio.lowlevel.notify_closing(gang.event_fd)  # whoever waits learns that it is over
            await _closed(gang.close)  # joins the threads: each stops at its next barrier
        self._program = None
        unit, self._unit = self._unit, None
        if unit is not None:
            await _closed(unit.close)
        self._in_flight.clear()
        if self._predictors is not None:
            self._predictors.close()
            self._predictors = None
        flash, self._flash = self._flash, None
        self._neurons = self._clusters = None
        if flash is not None:
            await flash.close(_closed)
        self._store = self._file = self._model = None
        if self._weights is not None:
            self._weights.close()
            self._weights = None
        await trio.lowlevel.checkpoint()

    def statistics(self) -> ExecutorStatistics:
        flash = None if self._flash is None else self._flash.statistics(len(self._threads))
        read = () if self._flash is None else self._flash.threads(flash)
        unit = None if self._unit is None else self._unit.statistics()
        helped: tuple[ThreadStatistics, ...] = ()
        if unit is not None:
            helped = (ThreadStatistics(unit.name, -1, unit.busy_ns, max(0, self._busy_ns - unit.busy_ns)),)
        elif self._lost_unit is not None:
            unit = self._lost_unit
        return ExecutorStatistics(
            steps=self._steps,
            tokens=self._tokens,
            in_flight=len(self._in_flight),
            busy_ns=self._busy_ns,
            kernel_ns=self._kernel_ns,
            finished_ns=self._finished_ns,
            bytes=self._held(),
            threads=(*self._thread_statistics(), *helped, *read),
            recent=tuple(self._recent),
            kernels=None if self._options is None else native.current(self._options.kernels),
            flash=flash,
            cluster_unit=unit,
        )

    def _held(self) -> dict[str, int]:
        """Bytes of memory by what they are for."""
        held: dict[str, int] = {}
        flash, ring = self._flash, None if self._flash is None else self._flash.ring
        if self._weights is not None and self._store is not None and self._program is not None:
            assert self._options is not None
            vectors = (*self._weights.vectors.values(), *self._options.thresholds.values())
            rows = 0 if flash is None or flash.rows is None else flash.rows.nbytes
            held = {
                "weights": self._weights.nbytes + sum(v.nbytes for v in vectors),
                "kv": self._store.nbytes,
                "activations": self._program.activation_bytes + rows,
            }
        for name, part in ("neurons", self._neurons), ("clusters", self._clusters), ("ring", ring):
            if part is not None:
                held[name] = part.nbytes
        if self._predictors is not None and self._predictors.by_down:
            held["predictors"] = self._predictors.nbytes
        if self._unit is not None:
            held["cluster_unit"] = self._unit.nbytes
        return held

    def _thread_statistics(self) -> Iterator[ThreadStatistics]:
        if self._program is None:
            yield from (ThreadStatistics(actor, core, 0) for actor, core in self._threads)
            return
        each = zip(self._threads, self._program.thread_ns, self._program.taken, strict=True)
        for (actor, core), busy_ns, taken in each:
            yield ThreadStatistics(actor, core, busy_ns, max(0, self._busy_ns - busy_ns), *taken)


def _threads(options: ExecutorOptions) -> list[tuple[str, int]]:
    """(actor, core) of each thread."""
    threads = [(options.actor, core) for core in options.cores or tuple(sorted(own_cores()))]
    return threads + [(actor, core) for actor, group in options.assistants for core in group]


async def _closed(close: Callable[[], object]) -> None:
    """Calls it in a worker thread; where no thread can be started, here, since what is not closed keeps its memory."""
    with trio.CancelScope(shield=True):
        try:
            await trio.to_thread.run_sync(close)
        except RuntimeError as error:
            if explained(error) is None:
                raise
            close()
