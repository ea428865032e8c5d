"""Executors that take steps, give results, stop and count wrongly."""

from __future__ import annotations

import time
from collections import deque
from dataclasses import replace

import numpy as np
import trio

from pi2rt.executors.simulated.executor import SimulatedExecutor
from pi2rt.runtime.executor_statistics import ExecutorStatistics
from pi2rt.runtime.step import Floats, Step, StepResult
from tests.testing.mutant import Mutant
from tests.testing.wrappers import Wrapper

_TOKEN_S = 1e-5


class NewestFirst(Wrapper):
    def __init__(self) -> None:
        super().__init__()
        self.ready: list[StepResult] = []

    async def wait(self) -> StepResult:
        while self.in_flight:
            self.ready.append(await super().wait())
        return self.ready.pop()


class TakesAnyNumber(Wrapper):
    def __init__(self) -> None:
        super().__init__()
        self.backlog: deque[Step] = deque()

    def submit(self, step: Step) -> None:
        if len(self.in_flight) == self.max_in_flight:
            self.backlog.append(step)
        else:
            super().submit(step)

    async def wait(self) -> StepResult:
        result = await super().wait()
        if self.backlog:
            super().submit(self.backlog.popleft())
        return result


class TakesOneLess(Wrapper):
    @property
    def max_in_flight(self) -> int:
        return self.inner.max_in_flight + 1


class ComputesInSubmit(SimulatedExecutor):
    """Its steps take no time of their own."""


class ComputesInWait(SimulatedExecutor):
    def __init__(self) -> None:
        super().__init__(seconds_per_token=_TOKEN_S)

    async def wait(self) -> StepResult:
        self.compute()
        return await super().wait()

    def compute(self) -> None:
        """Until the longest step is over."""
        time.sleep(1000 * _TOKEN_S)


class ForgetsAResult(Wrapper):
    """When the wait for it is cancelled."""

    forgotten = 0

    async def wait(self) -> StepResult:
        try:
            while self.forgotten:
                await super().wait()
                self.forgotten -= 1
            return await super().wait()
        except trio.Cancelled:
            self.forgotten = 1
            raise


class WaitIsNotCancelled(Wrapper):
    async def wait(self) -> StepResult:
        with trio.CancelScope(shield=True):
            return await super().wait()


class IgnoresStop(Wrapper):
    def stop(self, step_id: int) -> None:
        pass


class HidesThatItStopped(Wrapper):
    async def wait(self) -> StepResult:
        return replace(await super().wait(), stopped=False)


class StopsAll(Wrapper):
    def stop(self, step_id: int) -> None:
        for step in self.in_flight:
            super().stop(step.id)


class StopsTheNextToo(Wrapper):
    stopping = False

    def stop(self, step_id: int) -> None:
        super().stop(step_id)
        self.stopping = self.stopping or any(step.id == step_id for step in self.in_flight)

    def submit(self, step: Step) -> None:
        super().submit(step)
        if self.stopping:
            self.stopping = False
            super().stop(step.id)


class SkipsWhatWasStopped(Wrapper):
    """The same positions again, which were stopped once, are taken for done."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped: set[tuple[int, int]] = set()

    async def wait(self) -> StepResult:
        step = self.in_flight[0]
        result = await super().wait()
        if result.stopped:
            self.stopped |= {(piece.slot, piece.start) for piece in step.slices}
        return result

    def change_step(self, step: Step) -> Step:
        slices = tuple(
            replace(piece, tokens=np.zeros_like(piece.tokens))
            if (piece.slot, piece.start) in self.stopped
            else piece
            for piece in step.slices
        )
        return replace(step, slices=slices)


class CountsNothing(Wrapper):
    def statistics(self) -> ExecutorStatistics:
        return ExecutorStatistics(in_flight=super().statistics().in_flight)


class CountsNothingInFlight(Wrapper):
    def statistics(self) -> ExecutorStatistics:
        return replace(super().statistics(), in_flight=0)


class CountsSlicesAsTokens(Wrapper):
    def statistics(self) -> ExecutorStatistics:
        found = super().statistics()
        return replace(found, tokens=found.steps)


class TellsTheTimeOfDay(Wrapper):
    def change_result(self, step: Step, result: StepResult) -> StepResult:
        now = time.time_ns()
        took = result.finished_ns - result.started_ns
        return replace(result, started_ns=now - took, finished_ns=now)


class UsesMemoryOfResultsAgain(Wrapper):
    def __init__(self) -> None:
        super().__init__()
        self.buffers: dict[tuple[int, ...], Floats] = {}

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        return replace(
            result, logits=tuple(None if each is None else self.kept(each) for each in result.logits)
        )

    def kept(self, values: Floats) -> Floats:
        buffer = self.buffers.setdefault(values.shape, np.empty_like(values))
        buffer[:] = values
        return buffer


MUTANTS = [
    Mutant(NewestFirst, "test_results_come_in_order_of_submission", "results came as"),
    Mutant(
        CountsNothingInFlight,
        "test_results_come_in_order_of_submission",
        "2 steps were submitted, statistics say that 0 are in flight",
    ),
    Mutant(
        TakesAnyNumber, "test_one_step_too_many", "all there may be, must raise BusyError, but raised nothing"
    ),
    Mutant(
        TakesOneLess, "test_one_step_too_many", "step 3 of 3 that may be in flight was refused with BusyError"
    ),
    Mutant(ComputesInSubmit, "test_submit_does_not_compute", "had ended when submit returned"),
    Mutant(ComputesInWait, "test_other_tasks_run_while_a_step_does", "wait must not block"),
    Mutant(
        ForgetsAResult,
        "test_cancelling_wait_loses_nothing",
        "after it was cancelled, did not end",
        patience=3.0,
    ),
    Mutant(
        WaitIsNotCancelled,
        "test_cancelling_wait_loses_nothing",
        "wait in a cancelled scope must be cancelled",
    ),
    Mutant(IgnoresStop, "test_stop", "ran to its end though stop was called at once"),
    Mutant(HidesThatItStopped, "test_stop", "0 entries for 1 slices|ran to its end though"),
    Mutant(StopsAll, "test_stop_concerns_that_step_alone", "stop of a step ended the one before it"),
    Mutant(
        StopsTheNextToo,
        "test_stop_concerns_that_step_alone",
        "a step ended early that came after a stopped one",
    ),
    Mutant(SkipsWhatWasStopped, "test_a_stopped_step_can_be_run_again", "run again after it was stopped"),
    Mutant(
        CountsNothing,
        "test_times_and_statistics",
        r"\(steps, tokens, in_flight\) are \(0, 0, 0\) after 2 steps",
    ),
    Mutant(CountsSlicesAsTokens, "test_times_and_statistics", r"are \(2, 2, 0\) after 2 steps of 17 tokens"),
    Mutant(TellsTheTimeOfDay, "test_times_and_statistics", "of time.perf_counter_ns"),
    Mutant(UsesMemoryOfResultsAgain, "test_results_stay_as_they_are", "logits of an earlier result changed"),
]
