"""Executors around the reference executor, right as they are, in which one thing is then made wrong."""

from __future__ import annotations

from collections import deque
from dataclasses import replace

import numpy as np

from pi2rt.executors.reference.executor import ReferenceExecutor
from pi2rt.executors.reference.sampling import sample
from pi2rt.formats import ModelFile
from pi2rt.memory import KvType, MemoryNeed, StateStore
from pi2rt.models import ModelDescription
from pi2rt.runtime.executor import ExecutorOptions, Progress
from pi2rt.runtime.executor_statistics import ExecutorStatistics
from pi2rt.runtime.step import (
    Bind,
    Floats,
    Int32s,
    Outcome,
    Sampled,
    Sampling,
    Skipped,
    Slice,
    Step,
    StepResult,
    Unusable,
)


class Wrapper:
    """Passes everything on. What goes in and comes out can be changed."""

    name = "wrapper"

    def __init__(self) -> None:
        self.inner = ReferenceExecutor()
        self.store: StateStore | None = None
        self.in_flight: deque[Step] = deque()

    @property
    def max_in_flight(self) -> int:
        return self.inner.max_in_flight

    def change_model(self, model: ModelDescription) -> ModelDescription:
        return model

    def change_step(self, step: Step) -> Step:
        return step

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        """``step``: as it was submitted. Not called for those that were stopped."""
        return result

    # -- the protocol

    def need(self, file: ModelFile, model: ModelDescription, options: ExecutorOptions) -> MemoryNeed:
        return self.inner.need(file, model, options)

    def page_type(self, kv_type: KvType, exact_floats: bool) -> KvType:
        return self.inner.page_type(kv_type, exact_floats)

    async def open(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None,
        progress: Progress,
    ) -> None:
        self.store = store
        await self.inner.open(file, self.change_model(model), options, store, progress)

    def submit(self, step: Step) -> None:
        self.inner.submit(self.change_step(step))
        self.in_flight.append(step)

    async def wait(self) -> StepResult:
        result = await self.inner.wait()
        step = self.in_flight.popleft()
        return result if result.stopped else self.change_result(step, result)

    def stop(self, step_id: int) -> None:
        self.inner.stop(step_id)

    async def aclose(self) -> None:
        await self.inner.aclose()

    def statistics(self) -> ExecutorStatistics:
        return self.inner.statistics()


class Resampling(Wrapper):
    """Samples by itself, from logits of the inner executor, one step at a time."""

    max_in_flight = 1

    def __init__(self) -> None:
        super().__init__()
        self.inner.max_in_flight = 1
        self.bound: dict[int, Sampling] = {}
        self.counts: dict[int, Int32s] = {}
        self.last: dict[int, int] = {}
        self.binds: dict[int, Bind] = {}
        self.ended: set[int] = set()  # slots whose sequence has
        self.vocab_size = 0

    def pick(
        self, logits: Floats, sampling: Sampling, counts: Int32s, position: int, place: int
    ) -> Sampled | Unusable:
        """``place``: of the slice in its step."""
        return sample(logits, sampling, counts, position)

    def count_history(self, slot: int, history: Int32s) -> Int32s:
        return np.bincount(history, minlength=self.vocab_size).astype(np.int32)

    def count(self, slot: int, token: int) -> None:
        self.counts[slot][token] += 1

    def continued(self, piece: Slice) -> int:
        """The token of a slice without tokens."""
        return self.last.get(piece.slot, 0)

    def bind(self, bind: Bind) -> None:
        self.bound[bind.slot] = bind.sampling
        self.counts[bind.slot] = self.count_history(bind.slot, bind.history)

    def change_model(self, model: ModelDescription) -> ModelDescription:
        self.vocab_size = model.vocab_size
        return model

    def change_step(self, step: Step) -> Step:
        self.binds |= {bind.slot: bind for bind in step.binds}
        self.ended -= {bind.slot for bind in step.binds}
        slices = tuple(
            replace(
                piece,
                tokens=piece.tokens if len(piece.tokens) else np.array([self.continued(piece)], np.int32),
                logits=piece.logits or piece.sample,
                sample=False,
            )
            for piece in step.slices
            if not self.skips(piece)
        )
        binds = tuple(replace(bind, sampling=Sampling()) for bind in step.binds)
        return replace(step, slices=slices, binds=binds)

    def skips(self, piece: Slice) -> bool:
        return piece.slot in self.ended and not len(piece.tokens)

    def with_skipped(self, step: Step, result: StepResult) -> StepResult:
        """The result of all slices of the step, from those that the inner executor ran."""
        scores, logits = iter(result.scores), iter(result.logits)
        return replace(
            result,
            scores=tuple(None if self.skips(piece) else next(scores) for piece in step.slices),
            logits=tuple(None if self.skips(piece) else next(logits) for piece in step.slices),
        )

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        result = self.with_skipped(step, result)
        for bind in step.binds:
            self.bind(bind)
        sampled: list[Outcome | None] = []
        for place, (piece, logits) in enumerate(zip(step.slices, result.logits, strict=True)):
            if self.skips(piece):
                sampled.append(Skipped())
                continue
            if not piece.sample:
                sampled.append(None)
                continue
            assert logits is not None
            slot = piece.slot
            position = piece.start + piece.count
            with np.errstate(all="ignore"):
                picked = self.pick(logits[-1], self.bound[slot], self.counts[slot], position, place)
            if isinstance(picked, Sampled):
                self.last[slot] = picked.token
                self.count(slot, picked.token)
                if self.binds[slot].ended(picked.token, position):
                    self.ended.add(slot)
            sampled.append(picked)
        kept = tuple(
            logits if piece.logits else None for piece, logits in zip(step.slices, result.logits, strict=True)
        )
        return replace(result, sampled=tuple(sampled), logits=kept)


class Inexact(Resampling):
    """Its logits have an error of a hundredth, another one in each step, as those of a unit that rounds in batches."""

    error = 0.01

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        random = np.random.RandomState(step.id)

        def noisy(values: Floats | None) -> Floats | None:
            if values is None:
                return None
            rms = np.sqrt(np.mean(np.square(values), axis=-1, keepdims=True))
            return values + np.float32(self.error) * rms * random.standard_normal(values.shape).astype(
                np.float32
            )

        return super().change_result(step, replace(result, logits=tuple(map(noisy, result.logits))))
