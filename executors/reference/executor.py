"""The executor that says what is right: every block, slice and sampling option in plain numpy float32.

Weights are dequantised once and held as float32, keys and values are float32, sequences of a step run one
after the other on one thread. It is slow, and what other executors are measured against.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import deque
from dataclasses import dataclass, replace
from typing import TypeAlias

import numpy as np
import numpy.typing as npt
import trio

from pi2rt._errors import BusyError, ClosedError, InternalError, ModelFormatError, RequestError
from pi2rt.executors.reference.masks import LateMask, Masks
from pi2rt.executors.reference.model import BLOCKS, LOGIT_ROWS, Mark, ReferenceModel, StoppedError
from pi2rt.executors.reference.sampling import log_softmax, sample
from pi2rt.formats import ModelFile, TensorInfo
from pi2rt.formats.quants import check_scales, dequantize
from pi2rt.memory import KvType, MemoryNeed, StateLayout, StateStore, weight_bytes
from pi2rt.models import ModelDescription, Paged, iterate_tensors
from pi2rt.models.block_check import check_blocks, kinds_of
from pi2rt.models.states import PAGE_TOKENS
from pi2rt.runtime.executor import ExecutorOptions, Progress
from pi2rt.runtime.executor_statistics import ExecutorStatistics
from pi2rt.runtime.step import (
    Bind,
    Floats,
    Int32s,
    Outcome,
    Sampled,
    Skipped,
    Slice,
    Step,
    StepResult,
    Unusable,
    Verified,
)
from pi2rt.runtime.token_mask import TokenMask, mask_problem

_JOIN_SECONDS = 60.0  # a layer of a long prompt on a slow machine, with room to spare
_LIBRARIES = 48 << 20  # buffers of the BLAS that numpy uses, and the heap between arrays
_UNPACK_ROWS = 1024  # at once, because the interpreter waits meanwhile; whole row blocks


@dataclass(slots=True)
class _Slot:
    bind: Bind
    counts: Int32s  # (vocab_size,), how often each token was there
    last: int | None = None  # sampled last
    ended: bool = False


@dataclass(frozen=True, slots=True)
class _Outcome:
    step: Step
    result: StepResult | Exception
    marks: list[Mark] | None


@dataclass(frozen=True, slots=True)
class _Masked:
    """In place of an outcome: what is sampled when there is a mask."""

    logits: Floats  # (vocab_size,)


_Results: TypeAlias = tuple[Outcome | None, Floats | None, Floats | None]
"""Of a slice: outcome, scores, logits."""


class ReferenceExecutor:
    """See ``pi2rt.runtime.executor.StepExecutor``. It computes in float32, whatever ``exact_floats``, ``cores``,
    ``assistants`` and ``kernels`` say. Its KV pages are float32, unless it shares those of another executor."""

    name = "reference"
    max_in_flight = 2
    verifies_drafts = True
    takes_masks = True

    def __init__(self) -> None:
        self._model: ReferenceModel | None = None
        self._options: ExecutorOptions | None = None
        self._slots: dict[int, _Slot] = {}  # touched by the worker only
        self._work: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
        self._worker: threading.Thread | None = None
        self._in_flight: deque[int] = deque()  # ids of steps submitted and not waited for
        self._stopping: set[int] = set()
        self._masks = Masks()
        self._closed = False
        self._done_send: trio.MemorySendChannel[_Outcome] | None = None
        self._done: trio.MemoryReceiveChannel[_Outcome] | None = None
        self._statistics = ExecutorStatistics()

    # -- the protocol

    @property
    def block_kinds(self) -> frozenset[str]:
        return kinds_of(BLOCKS)

    def page_type(self, kv_type: KvType, exact_floats: bool) -> KvType:
        return "f32"

    def need(self, file: ModelFile, model: ModelDescription, options: ExecutorOptions) -> MemoryNeed:
        """Weights are float32. Beside them: the largest tensor as it is in the file, while it is dequantised; the rows
        of a step between blocks; keys and values of a context, and the scores of a head against them; logits."""
        check_blocks(file.path, model, self.block_kinds, self.name)
        rows, context = options.max_tokens, options.context
        widest = max((each.hidden for each in model.feed_forwards()), default=0)
        paged = [each.state for each in model.states() if isinstance(each.state, Paged)]
        keys = max((each.kv_heads * each.head_dim for each in paged), default=0)
        heads = 3 * max(widest, model.dim, keys)  # queries are seldom wider than that
        floats = (
            rows * (8 * model.dim + heads + 3 * context)
            + 6 * context * keys
            + 3 * LOGIT_ROWS * model.vocab_size
        )
        largest = max(file.tensors[name].nbytes for name, _ in iterate_tensors(model))
        layout = StateLayout.of(model, self.page_type(options.kv_type, options.exact_floats), context)
        return MemoryNeed(
            weight_bytes(file, model, floats=True),
            layout.page_bytes,
            4 * floats + largest + _LIBRARIES,
            layout.window_page_bytes,
        )

    async def open(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None,
        progress: Progress,
    ) -> None:
        """Dequantises all weights; ``progress`` counts bytes of the file.

        Raises:
            ModelFormatError: a tensor holds NaN or infinity.
            RequestError: weights are to be read in every step.
        """
        if store is None:
            raise InternalError("the reference executor borrows KV pages, and was given none")
        if options.placements:
            raise RequestError(
                "the reference executor keeps all weights in memory: give it more memory, or take executor='cpu'"
            )
        check_blocks(file.path, model, self.block_kinds, self.name)
        weights = await trio.to_thread.run_sync(_load, file, model, progress)
        self._model = ReferenceModel(model, weights, store)
        self._done_send, self._done = trio.open_memory_channel[_Outcome](self.max_in_flight)
        self._options = options
        self._statistics = ExecutorStatistics(
            bytes={"weights": sum(w.nbytes for w in weights.values()), "kv": store.nbytes}
        )
        self._worker = threading.Thread(
            target=self._serve,
            args=(trio.lowlevel.current_trio_token(),),
            name="pi2rt reference",
            daemon=True,
        )
        self._worker.start()

    def submit(self, step: Step) -> None:
        if self._closed or self._worker is None:
            raise ClosedError("the reference executor is not open")
        if len(self._in_flight) >= self.max_in_flight:
            raise BusyError(f"{len(self._in_flight)} steps are in flight already; wait for one")
        self._in_flight.append(step.id)
        if masked := {part.slot for part in step.slices if part.masked}:
            self._masks.add(step.id, masked)
        self._work.put(step)

    async def wait(self) -> StepResult:
        if self._done is None:
            raise ClosedError("the reference executor is not open")
        try:
            outcome = await self._done.receive()
        except (trio.ClosedResourceError, trio.EndOfChannel):
            raise ClosedError("the reference executor was closed") from None
        self._in_flight.popleft()
        self._masks.drop(outcome.step.id)
        self._stopping.discard(outcome.step.id)
        if isinstance(outcome.result, Exception):
            raise outcome.result
        self._account(outcome.step, outcome.result, outcome.marks)
        return outcome.result

    def stop(self, step_id: int) -> None:
        if step_id in self._in_flight:
            self._stopping.add(step_id)
            self._masks.wake()

    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        """See ``pi2rt.runtime.executor.Masking``."""
        if allowed is not None and self._model is not None:
            problem = mask_problem(allowed, self._model.model.vocab_size)
            if problem is not None:
                raise InternalError(f"step {step_id}, the mask of slot {slot}: {problem}")
        self._masks.give(step_id, slot, allowed)

    async def aclose(self) -> None:
        self._closed = True
        self._masks.wake()
        if self._done is not None and self._done_send is not None:
            self._done.close()
            self._done_send.close()
        if self._worker is not None:
            self._work.put(None)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(self._worker.join, _JOIN_SECONDS)
            self._worker = None
        self._model = None
        self._slots.clear()
        self._in_flight.clear()
        await trio.lowlevel.checkpoint()

    def statistics(self) -> ExecutorStatistics:
        return replace(self._statistics, in_flight=len(self._in_flight))

    def _account(self, step: Step, result: StepResult, marks: list[Mark] | None) -> None:
        s = self._statistics
        busy = result.finished_ns - result.started_ns
        self._statistics = replace(
            s,
            steps=s.steps + 1,
            tokens=s.tokens + step.tokens,
            busy_ns=s.busy_ns + busy,
            kernel_ns=s.kernel_ns + result.kernel_ns,
            finished_ns=result.finished_ns,
        )
        if marks is not None and self._options is not None and self._options.trace is not None:
            track = self._options.trace.track("reference", "worker")
            track.span(repr(step), result.started_ns, result.finished_ns)
            names, starts, ends = zip(*marks, strict=True) if marks else ((), (), ())
            self._options.trace.extend_native(
                track, names, np.array(starts, np.int64), np.array(ends, np.int64)
            )

    # -- the worker thread

    def _serve(self, trio_token: trio.lowlevel.TrioToken) -> None:
        while (step := self._work.get()) is not None and not self._closed:
            traced = self._options is not None and self._options.trace is not None
            marks: list[Mark] | None = [] if traced else None
            result: StepResult | Exception
            try:
                result = self._run(step, marks)
            except Exception as error:  # whatever it is, it belongs to the one who waits
                result = error
            try:
                trio_token.run_sync_soon(self._deliver, _Outcome(step, result, marks))
            except trio.RunFinishedError:
                return

    def _deliver(self, outcome: _Outcome) -> None:
        if not self._closed and self._done_send is not None:
            self._done_send.send_nowait(outcome)

    def _run(self, step: Step, marks: list[Mark] | None) -> StepResult:
        assert self._model is not None
        started = time.perf_counter_ns()
        for bind in step.binds:
            counts = np.bincount(bind.history, minlength=self._model.model.vocab_size).astype(np.int32)
            self._slots[bind.slot] = _Slot(bind, counts)
        for copy in step.copies:
            self._model.copy(copy)
        try:
            with np.errstate(over="ignore", invalid="ignore"):  # an outcome (Unusable), not a mistake
                results, waited = self._run_slices(self._model, step, marks)
        except StoppedError:
            finished = time.perf_counter_ns()
            return StepResult(step.id, stopped=True, started_ns=started, finished_ns=finished)
        finished = time.perf_counter_ns()
        computed = sum(not isinstance(sampled, Skipped) for sampled, _, _ in results)
        weight_bytes = sum(w.nbytes for w in self._model.weights.values()) * computed
        return StepResult(
            step.id,
            sampled=tuple(sampled for sampled, _, _ in results),
            scores=tuple(scores for _, scores, _ in results),
            logits=tuple(logits for _, _, logits in results),
            started_ns=started,
            finished_ns=finished,
            kernel_ns=finished - started - waited,
            weight_bytes=weight_bytes,
        )

    def _run_slices(
        self, model: ReferenceModel, step: Step, marks: list[Mark] | None
    ) -> tuple[list[_Results], int]:
        """Results of each slice, and nanoseconds of waiting: those without masks are finished first."""
        results: list[_Results] = []
        masked: dict[int, Floats] = {}  # logits of slices that a token is then sampled from
        for i, part in enumerate(step.slices):
            sampled, scores, logits = self._run_slice(model, step.id, part, marks)
            if isinstance(sampled, _Masked):
                masked[i], sampled = sampled.logits, None
            results.append((sampled, scores, logits))
        assert self._options is not None
        waited, deadline = 0, time.monotonic() + self._options.mask_deadline
        for i, last in masked.items():
            begin = time.perf_counter_ns()
            given = self._wait_for_mask(step, step.slices[i].slot, deadline)
            waited += time.perf_counter_ns() - begin
            results[i] = self._sample_masked(step.slices[i], last, given), *results[i][1:]
        return results, waited

    def _wait_for_mask(self, step: Step, slot: int, deadline: float) -> TokenMask | LateMask | None:
        def stopped() -> bool:
            return self._closed or step.id in self._stopping

        try:
            allowed = self._masks.wait(step.id, slot, deadline, stopped)
        except LateMask as late:
            return late
        if stopped():
            raise StoppedError
        return allowed

    def _sample_masked(
        self, part: Slice, logits: Floats, allowed: TokenMask | LateMask | None
    ) -> Sampled | Unusable:
        slot = self._slots[part.slot]
        if isinstance(allowed, LateMask):
            slot.last = 0  # what continues this is discarded
            return Unusable(("token_mask",))
        return _sample_after(slot, logits, part.start + part.count, allowed)

    def _run_slice(
        self, model: ReferenceModel, step_id: int, part: Slice, marks: list[Mark] | None
    ) -> tuple[Outcome | _Masked | None, Floats | None, Floats | None]:
        slot = self._slots.get(part.slot)
        if slot is None:
            raise ValueError(f"slot {part.slot} was never bound")
        if slot.ended and not len(part.tokens):
            return Skipped(), None, None
        tokens = part.tokens if len(part.tokens) else _last(part, slot)
        self._check(model, part, tokens)
        x = model.forward(
            tokens,
            part.start,
            part.pages,
            part.slot,
            should_stop=lambda: self._closed or step_id in self._stopping,
            marks=marks,
        )
        logits = model.logits(x) if part.logits else None
        scores = None if part.targets is None else _scores(model, x, part.targets)
        if not part.sample:
            return None, scores, logits
        if part.masked:
            return _Masked(model.logits(x[-1:])[0]), scores, logits
        outcomes: list[Sampled | Unusable] = []
        for at in range(part.count - 1 - part.drafts, part.count):
            outcome = _sample_after(slot, model.logits(x[at : at + 1])[0], part.start + at + 1)
            outcomes.append(outcome)
            right = at + 1 < part.count and isinstance(outcome, Sampled) and outcome.token == tokens[at + 1]
            if not right or slot.ended:
                break
        return Verified(tuple(outcomes)) if part.drafts else outcomes[0], scores, logits

    def _check(self, model: ReferenceModel, part: Slice, tokens: Int32s) -> None:
        assert self._options is not None
        end, vocab = part.start + part.count, model.model.vocab_size
        if not 0 <= part.drafts < part.count or (part.drafts and not part.sample):
            raise ValueError(f"{part.drafts} drafts of {part.count} tokens; sample={part.sample}")
        if part.masked and (part.drafts or not part.sample):
            raise ValueError(f"a mask for a slice with {part.drafts} drafts; sample={part.sample}")
        if part.start < 0 or end > self._options.context:
            raise ValueError(f"positions {part.start} to {end} outside a context of {self._options.context}")
        if tokens.min() < 0 or tokens.max() >= vocab:
            raise ValueError(f"token ids {tokens.min()} to {tokens.max()} outside a vocabulary of {vocab}")
        used = part.pages[: -(-end // PAGE_TOKENS)]
        if len(used) * PAGE_TOKENS < end:
            raise ValueError(f"{len(used)} pages for {end} positions")
        if used.min() < 0 or used.max() >= self._options.pages:
            raise ValueError(f"pages {used.min()} to {used.max()} outside a cache of {self._options.pages}")


def _sample_after(
    slot: _Slot, logits: Floats, position: int, allowed: TokenMask | None = None
) -> Sampled | Unusable:
    """The token at ``position``, which the slot then has as its last one."""
    sampled = sample(logits, slot.bind.sampling, slot.counts, position, allowed)
    if isinstance(sampled, Unusable):
        slot.last = 0  # what continues this is discarded
        return sampled
    slot.last = sampled.token
    slot.ended = slot.ended or slot.bind.ended(sampled.token, position)
    slot.counts[sampled.token] += 1
    return sampled


def _last(part: Slice, slot: _Slot) -> Int32s:
    if slot.last is None:
        raise ValueError(f"slot {part.slot} continues a token that was never sampled")
    return np.array([slot.last], np.int32)


def _scores(model: ReferenceModel, x: Floats, targets: Int32s) -> Floats:
    """Log probabilities of ``targets`` (t,) after each row of ``x`` (t, dim); 0 where a target is
    negative."""
    out = np.zeros(len(targets), np.float32)
    for i in np.flatnonzero(targets >= 0):
        out[i] = log_softmax(model.logits(x[i : i + 1])[0])[targets[i]]
    return out


def _load(file: ModelFile, model: ModelDescription, progress: Progress) -> dict[str, Floats]:
    """On a worker thread of Trio: dequantises every tensor the model names, and can be cancelled between
    them."""
    infos = [file.tensors[name] for name, _ in iterate_tensors(model)]
    total = sum(info.nbytes for info in infos)
    weights: dict[str, Floats] = {}
    done = 0
    for info in infos:
        trio.from_thread.check_cancelled()
        raw = file.read(info.name)
        if info.layout == "rows":
            problem = check_scales(info.type, raw)
            weights[info.name] = dequantize(info.type, raw, info.shape)
        else:
            weights[info.name] = _unpack(info, raw)
            problem = None if np.isfinite(weights[info.name]).all() else "holds NaN or infinity"
        if problem is not None:
            raise ModelFormatError(file.path, f"tensor {info.name}", problem)
        done += info.nbytes
        trio.from_thread.run_sync(progress, done, total)
    return weights


def _unpack(info: TensorInfo, raw: npt.NDArray[np.uint8]) -> Floats:
    """float32 values of a matrix in row blocks, of which only the native module knows the order."""
    from pi2rt.cython_kernels.kernels import native

    rows, columns = info.shape
    out = np.empty(info.shape, np.float32)
    for first in range(0, rows, _UNPACK_ROWS):
        count = min(_UNPACK_ROWS, rows - first)
        address = raw.ctypes.data + native.matrix_bytes(info.type, first, columns)
        out[first : first + count] = native.unpack(info.type, address, count, columns)
    return out
