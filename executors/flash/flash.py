"""The actor "flash" of a model: all that is read while steps run, what reads it, and how it is repaired alone.

Readers keep nothing (streamed pieces, rows of the embedding), caches do (neurons, pages of experts). Each reads with a
native thread and a queue of its own. After a failure readers are made anew and caches stay, so that no weights are
loaded again.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from functools import partial

import numpy as np

from pi2rt.cython_kernels.flash.neuron_cache import NeuronCache
from pi2rt.executors.flash.embedding_rows import EmbeddingRows
from pi2rt.executors.flash.late_reads import LateReads
from pi2rt.executors.flash.page_cache import PageCache
from pi2rt.executors.flash.read_trace import ReadTrace
from pi2rt.executors.flash.ring import Ring
from pi2rt.formats import ModelFile
from pi2rt.formats.placement import Placement
from pi2rt.models.stream_pieces import Piece
from pi2rt.runtime.executor import ExecutorOptions
from pi2rt.runtime.executor_statistics import (
    CacheStatistics,
    FlashStatistics,
    StreamStatistics,
    ThreadStatistics,
)

NAME = "flash"
"""Of the actor."""

TRACED_READS = 1 << 16
"""Reads of a cache between two steps whose times are kept for a trace."""

Close = Callable[[Callable[[], object]], Awaitable[None]]
"""Calls something that blocks, and returns when it has."""


class Flash:
    """Of one executor. ``open_readers`` once its caches are set, and whenever they were closed; ``close`` last.

    Attributes:
        ring: streamed pieces pass through it; None without any.
        rows: of the embedding, where these are read.
        neurons, experts: caches, which whoever knows their contents has made.
        repairs: how often readers were made anew.
    """

    def __init__(self, file: ModelFile, options: ExecutorOptions, pieces: Sequence[Piece]) -> None:
        self._file, self._options, self._pieces = file, options, pieces
        self.ring: Ring | None = None
        self.rows: EmbeddingRows | None = None
        self.neurons: PageCache | None = None
        self.experts: PageCache | None = None
        self.repairs = 0
        self._traced_reads = 0
        self._traces: list[tuple[NeuronCache, ReadTrace]] = []

    def late_reads(self) -> LateReads:
        """For opening what reads: a device may not answer."""
        return LateReads(self._file.path, self._options.read_deadline)

    async def open_readers(self) -> None:
        file, options = self._file, self._options
        reads, deadline = self.late_reads(), options.read_deadline
        for name in options.placed(Placement.BY_ROW):
            self.rows = await reads.run(
                "weights", partial(EmbeddingRows, file, name, deadline), EmbeddingRows.close
            )
        if options.placed(Placement.STREAMED):
            pieces, nbytes, io = self._pieces, options.ring_bytes, options.io
            self.ring = await reads.run(
                "weights", lambda: Ring(file, pieces, nbytes, io, deadline, options.reads), Ring.close
            )

    async def repair(self, close: Close) -> None:
        """Readers made anew, after a read that failed or a device that did not answer. No program uses them."""
        await self._close(self._take_readers(), close)
        await self.open_readers()
        self.repairs += 1

    async def close(self, close: Close) -> None:
        """Joins all threads that read, and frees the memory that they wrote to."""
        self.draw()  # what ended since the last step
        self._traces.clear()
        caches = (self.neurons, self.experts)
        self.neurons = self.experts = None
        await self._close((*self._take_readers(), *caches), close)

    def _take_readers(self) -> tuple[Ring | None, EmbeddingRows | None]:
        readers = (self.ring, self.rows)
        self.ring = self.rows = None
        return readers

    async def _close(self, what: Sequence[Ring | EmbeddingRows | PageCache | None], close: Close) -> None:
        for each in what:
            if each is not None:
                await close(each.close)

    # -- traces

    def trace(self, layers: Sequence[str], matrices: Sequence[str]) -> None:
        """Draws reads into the trace of the options. ``layers``: names of the blocks of neurons; ``matrices``: of
        experts."""
        trace = self._options.trace
        if trace is None:
            return
        if self.neurons is not None:
            self._traces.append((self.neurons.cache, ReadTrace(trace, NAME, layers)))
        if self.experts is not None:
            self._traces.append((self.experts.cache, ReadTrace(trace, NAME, matrices, "experts")))
        for cache, _ in self._traces:
            cache.trace(TRACED_READS)

    def draw(self) -> None:
        """What has been read since the last call."""
        for cache, drawn in self._traces:
            drawn.draw(*cache.take_reads())
        trace = self._options.trace
        if self.ring is None or trace is None:
            return
        begin, end = self.ring.stream.times()
        read = end > np.maximum(begin, self._traced_reads)
        if read.any():
            names = tuple(piece.matrix for piece, new in zip(self.ring.pieces, read, strict=True) if new)
            trace.extend_native(trace.track(NAME, "reads"), names, begin[read], end[read])
            self._traced_reads = int(end[read].max())

    # -- statistics

    def statistics(self, threads: int) -> FlashStatistics | None:
        """None where nothing is read. ``threads``: that compute, and may each wait for neurons."""
        sources = [each for each in (self.neurons, self.experts, self.ring) if each is not None]
        if not sources and self.rows is None:
            return None
        page_reads = nbytes = busy_ns = stall_ns = pinned = 0
        for cache in (self.neurons, self.experts):
            if cache is None:
                continue
            counters = cache.counters
            page_reads += counters.reads
            nbytes += counters.bytes
            busy_ns += counters.busy_ns
            pinned += cache.cache.pinned_bytes
            # for neurons any thread may wait, for an expert's matrix one does while the others meet it at a barrier
            stall_ns += counters.stall_ns // (threads if cache is self.neurons else 1)
        stream = None
        if self.ring is not None:
            read, reading_ns, waited_ns = self.ring.stream.counters
            nbytes, busy_ns, stall_ns = nbytes + read, busy_ns + reading_ns, stall_ns + waited_ns
            pinned += self.ring.stream.pinned_bytes
            stream = StreamStatistics(
                read_bytes=self.ring.reads.stream_bytes,
                reads_at_once=self.ring.reads.stream_depth,
                reads=self.ring.stream.reads,
                reclaimable_bytes=self.ring.stream.lent_bytes,
            )
        return FlashStatistics(
            io=sources[-1].io_reason if sources else "preadv: rows of an embedding are read by it",
            measured=self._options.reads.measured,
            page_reads=page_reads,
            bytes=nbytes,
            busy_ns=busy_ns,
            stall_ns=stall_ns,
            pinned_bytes=pinned,
            row_reads=0 if self.rows is None else self.rows.rows.reads,
            repairs=self.repairs,
            neurons=_cache(self.neurons),
            experts=_cache(self.experts),
            stream=stream,
        )

    def threads(self, statistics: FlashStatistics | None) -> tuple[ThreadStatistics, ...]:
        """Those that read, as one."""
        return () if statistics is None else (ThreadStatistics(NAME, -1, statistics.busy_ns),)


def _cache(cache: PageCache | None) -> CacheStatistics | None:
    if cache is None:
        return None
    c = cache.counters
    return CacheStatistics(
        page_bytes=cache.slot_bytes,
        reads_at_once=cache.depth,
        hits=c.hits,
        early=c.early,
        misses=c.misses,
        evictions=c.evictions,
        completed=c.completed,
        read_through=c.read_through,
        read_through_bytes=c.read_through_bytes,
    )
