"""The executor: steps go to a thread of its own, results come back to Trio in the order of the steps."""

import queue
import threading
import time
from collections import deque
from dataclasses import replace

import numpy as np
import trio

from numpy_executor.arithmetic import KINDS, Floats, Int32s, NumpyModel, Stopped, load, need, refuse
from pi2rt import BusyError, ClosedError, RequestError
from pi2rt.executors.reference.sampling import log_softmax, sample
from pi2rt.formats import ModelFile
from pi2rt.memory import KvType, MemoryNeed, StateStore
from pi2rt.models import ModelDescription
from pi2rt.runtime.executor import ExecutorOptions, Progress
from pi2rt.runtime.executor_statistics import ExecutorStatistics
from pi2rt.runtime.step import Bind, Outcome, Sampled, Skipped, Slice, Step, StepResult


class Slot:
    """What a sequence needs to sample: its options, how often each token was there, the token sampled last."""

    def __init__(self, bind: Bind, counts: Int32s) -> None:
        self.bind, self.counts = bind, counts
        self.last, self.ended = 0, False


class NumpyExecutor:
    """See ``pi2rt.runtime.executor.StepExecutor``. The constructor takes nothing and acquires nothing."""

    name = "numpy"
    max_in_flight = 2  # so that the next step is there when one ends
    block_kinds = KINDS  # models with others are refused before they are opened

    def __init__(self) -> None:
        self.model: NumpyModel | None = None
        self.slots: dict[int, Slot] = {}  # of the thread
        self.steps: queue.SimpleQueue[Step | None] = queue.SimpleQueue()
        self.thread: threading.Thread | None = None
        self.in_flight: deque[Step] = deque()
        self.stopping: set[int] = set()
        self.closed = False
        self.counted = ExecutorStatistics()

    def page_type(self, kv_type: KvType, exact_floats: bool) -> KvType:
        """Who has this method borrows pi2rt's KV pages; this is the type of their numbers."""
        return "f32"

    def need(self, file: ModelFile, model: ModelDescription, options: ExecutorOptions) -> MemoryNeed:
        """Who has this method can be given a memory budget."""
        refuse(file, model)
        return need(file, model, options.max_tokens, options.context)

    async def open(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None,
        progress: Progress,
    ) -> None:
        if options.placements:
            raise RequestError(
                "the numpy executor keeps all weights in memory: give it more, or take another"
            )
        refuse(file, model)
        assert store is not None  # for it borrows

        def report(done: int, total: int) -> None:
            trio.from_thread.check_cancelled()
            trio.from_thread.run_sync(progress, done, total)

        weights = await trio.to_thread.run_sync(load, file, model, report)
        self.model = NumpyModel(model, weights, store)
        held = {"weights": sum(each.nbytes for each in weights.values()), "kv": store.nbytes}
        self.counted = ExecutorStatistics(bytes=held)
        self.results_in, self.results = trio.open_memory_channel[StepResult | Exception](self.max_in_flight)
        self.thread = threading.Thread(
            target=self.work, args=(trio.lowlevel.current_trio_token(),), daemon=True
        )
        self.thread.start()

    def submit(self, step: Step) -> None:
        if self.closed or self.thread is None:
            raise ClosedError("the numpy executor is not open")
        if len(self.in_flight) == self.max_in_flight:
            raise BusyError(f"{self.max_in_flight} steps are in flight already; wait for one")
        self.in_flight.append(step)
        self.steps.put(step)

    async def wait(self) -> StepResult:
        if self.thread is None:
            raise ClosedError("the numpy executor is not open")
        try:
            result = await self.results.receive()  # cancelled, it leaves the result where it is
        except (trio.ClosedResourceError, trio.EndOfChannel):
            raise ClosedError("the numpy executor was closed") from None
        step = self.in_flight.popleft()
        self.stopping.discard(step.id)
        if isinstance(result, Exception):
            raise result
        before, took = self.counted, result.finished_ns - result.started_ns
        self.counted = replace(
            before,
            steps=before.steps + 1,
            tokens=before.tokens + step.tokens,
            busy_ns=before.busy_ns + took,
            kernel_ns=before.kernel_ns + result.kernel_ns,
            finished_ns=result.finished_ns,
        )
        return result

    def stop(self, step_id: int) -> None:
        if any(step.id == step_id for step in self.in_flight):
            self.stopping.add(step_id)

    async def aclose(self) -> None:
        self.closed = True
        thread, self.thread = self.thread, None
        if thread is not None:
            self.results.close()
            self.results_in.close()
            self.steps.put(None)
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(thread.join)
        self.model = None
        self.in_flight.clear()
        await trio.lowlevel.checkpoint()

    def statistics(self) -> ExecutorStatistics:
        return replace(self.counted, in_flight=len(self.in_flight))

    # -- in the thread

    def work(self, token: trio.lowlevel.TrioToken) -> None:
        while (step := self.steps.get()) is not None and not self.closed:
            try:
                result: StepResult | Exception = self.run(step)
            except Exception as error:  # it belongs to the one who waits
                result = error
            try:
                token.run_sync_soon(self.deliver, result)
            except trio.RunFinishedError:
                return

    def deliver(self, result: StepResult | Exception) -> None:
        if not self.closed:
            self.results_in.send_nowait(result)

    def run(self, step: Step) -> StepResult:
        started = time.perf_counter_ns()
        for bind in step.binds:
            counts = np.bincount(bind.history, minlength=self.model.model.vocab_size).astype(np.int32)
            self.slots[bind.slot] = Slot(bind, counts)
        for copy in step.copies:  # of pages: its models have no other state
            self.model.store.copy_page(copy.source, copy.target)
        try:
            with np.errstate(over="ignore", invalid="ignore"):
                outputs = [self.run_slice(step, piece) for piece in step.slices]
        except Stopped:
            finished = time.perf_counter_ns()
            return StepResult(step.id, stopped=True, started_ns=started, finished_ns=finished)
        finished = time.perf_counter_ns()
        return StepResult(
            step.id,
            sampled=tuple(sampled for sampled, _, _ in outputs),
            scores=tuple(scores for _, scores, _ in outputs),
            logits=tuple(logits for _, _, logits in outputs),
            started_ns=started,
            finished_ns=finished,
            kernel_ns=finished - started,
        )

    def run_slice(self, step: Step, piece: Slice) -> tuple[Outcome | None, Floats | None, Floats | None]:
        slot = self.slots[piece.slot]
        if slot.ended and not len(piece.tokens):
            return Skipped(), None, None
        tokens = piece.tokens if len(piece.tokens) else np.array([slot.last], np.int32)
        x = self.model.forward(
            tokens, piece.start, piece.pages, lambda: self.closed or step.id in self.stopping
        )
        logits = self.model.logits(x) if piece.logits else None
        scores = None
        if piece.targets is not None:
            scores = np.zeros(len(piece.targets), np.float32)
            for i in np.flatnonzero(piece.targets >= 0):
                scores[i] = log_softmax(self.model.logits(x[i : i + 1])[0])[piece.targets[i]]
        sampled = None
        if piece.sample:
            last = self.model.logits(x[-1:])[0]
            sampled = sample(last, slot.bind.sampling, slot.counts, piece.start + piece.count)
            if isinstance(sampled, Sampled):
                slot.last = sampled.token
                slot.ended = slot.ended or slot.bind.ended(sampled.token, piece.start + piece.count)
                slot.counts[sampled.token] += 1
        return sampled, scores, logits
