"""Executors that are opened and closed wrongly."""

from __future__ import annotations

import contextlib
import threading

import trio

from pi2rt._errors import BusyError, ClosedError
from pi2rt.formats import ModelFile
from pi2rt.memory import StateStore
from pi2rt.models import ModelDescription
from pi2rt.runtime.executor import ExecutorOptions, Progress
from pi2rt.runtime.executor_statistics import ExecutorStatistics
from pi2rt.runtime.step import Step, StepResult
from tests.testing.mutant import Mutant
from tests.testing.wrappers import Wrapper


class Nameless(Wrapper):
    name = ""


class ProgressGoesBack(Wrapper):
    async def open(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None,
        progress: Progress,
    ) -> None:
        await super().open(file, model, options, store, lambda done, total: progress(total - done, total))


class ProgressStopsHalfWay(Wrapper):
    async def open(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None,
        progress: Progress,
    ) -> None:
        await super().open(file, model, options, store, lambda done, total: progress(done // 2, total))


class NoProgress(Wrapper):
    async def open(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None,
        progress: Progress,
    ) -> None:
        await super().open(file, model, options, store, lambda done, total: None)


class OpenGoesOn(Wrapper):
    """When it is cancelled."""

    async def open(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None,
        progress: Progress,
    ) -> None:
        with trio.CancelScope(shield=True):
            await super().open(file, model, options, store, progress)


class ClosesOnce(Wrapper):
    closed = False

    async def aclose(self) -> None:
        if self.closed:
            raise ClosedError("closed already")
        self.closed = True
        await super().aclose()


class ClosesWhatIsOpenOnly(Wrapper):
    async def aclose(self) -> None:
        assert self.store is not None, "not open"
        await super().aclose()


class CloseWaitsForLoading(Wrapper):
    """Which was cancelled."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded = trio.Event()

    async def open(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None,
        progress: Progress,
    ) -> None:
        await super().open(file, model, options, store, progress)
        self.loaded.set()

    async def aclose(self) -> None:
        await self.loaded.wait()
        await super().aclose()


class TakesStepsWhenClosed(Wrapper):
    def submit(self, step: Step) -> None:
        with contextlib.suppress(ClosedError):
            super().submit(step)


class SaysBusyWhenClosed(Wrapper):
    def submit(self, step: Step) -> None:
        try:
            super().submit(step)
        except ClosedError:
            raise BusyError("no") from None


class WaitsForEverWhenClosed(Wrapper):
    async def wait(self) -> StepResult:
        try:
            return await super().wait()
        except ClosedError:
            await trio.sleep_forever()
            raise


class StepsStayInFlightWhenClosed(Wrapper):
    closed = False

    async def aclose(self) -> None:
        await super().aclose()
        self.closed = True

    def statistics(self) -> ExecutorStatistics:
        return ExecutorStatistics(in_flight=1) if self.closed else super().statistics()


class WaitIsCutOffByClosing(Wrapper):
    """With an error of its own."""

    async def wait(self) -> StepResult:
        try:
            return await super().wait()
        except ClosedError:
            raise RuntimeError("channel gone") from None


class LeavesAThread(Wrapper):
    async def open(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None,
        progress: Progress,
    ) -> None:
        await super().open(file, model, options, store, progress)
        forgotten = threading.Event()
        threading.Thread(target=forgotten.wait, args=(3,), name="forgotten worker", daemon=True).start()


class OpensOnce(Wrapper):
    """In a program, as a device that is never given back."""

    taken = False

    async def open(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None,
        progress: Progress,
    ) -> None:
        if OpensOnce.taken:
            raise RuntimeError("the device is taken")
        OpensOnce.taken = True
        await super().open(file, model, options, store, progress)


MUTANTS = [
    Mutant(Nameless, "test_keeps_to_the_protocol", "'name' must be a string that is not empty"),
    Mutant(ProgressGoesBack, "test_open_reports_progress", "progress went backwards"),
    Mutant(ProgressStopsHalfWay, "test_open_reports_progress", r"progress ended at \d+ of \d+"),
    Mutant(NoProgress, "test_open_reports_progress", "open never called progress"),
    Mutant(OpenGoesOn, "test_aclose_after_cancelled_open", "open in a cancelled scope must be cancelled"),
    Mutant(ClosesOnce, "test_aclose_twice", "aclose must be safe to call twice, but raised ClosedError"),
    Mutant(ClosesWhatIsOpenOnly, "test_aclose_without_open", "not open"),
    Mutant(
        CloseWaitsForLoading,
        "test_aclose_after_cancelled_open",
        "aclose after a cancelled open did not end",
        patience=1.0,
    ),
    Mutant(TakesStepsWhenClosed, "test_closed_is_closed", "submit after aclose must raise ClosedError"),
    Mutant(SaysBusyWhenClosed, "test_closed_is_closed", "must raise ClosedError, not BusyError"),
    Mutant(WaitsForEverWhenClosed, "test_closed_is_closed", "wait after aclose did not end", patience=1.0),
    Mutant(StepsStayInFlightWhenClosed, "test_closed_is_closed", "statistics say that 1 steps are in flight"),
    Mutant(
        WaitsForEverWhenClosed,
        "test_aclose_with_a_step_in_flight_ends_the_wait",
        "wait, while another task called aclose, did not end",
        patience=1.0,
        name="WaitsForEverDuringClose",
    ),
    Mutant(
        WaitIsCutOffByClosing,
        "test_aclose_with_a_step_in_flight_ends_the_wait",
        "a wait during aclose must raise ClosedError, not .*channel gone",
    ),
    Mutant(
        LeavesAThread,
        "test_aclose_leaves_no_thread",
        "threads of the executor are still there: forgotten worker",
        patience=4.0,
    ),
    Mutant(OpensOnce, "test_opens_again_after_aclose", "open failed with .*the device is taken"),
]
