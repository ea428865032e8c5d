"""An actor: a Trio task that owns one executor, with a bounded inbox and supervision.

A decode step of a small model takes 4 ms, of which the control plane may use 3 %. So steps do not travel to
the actor's task and back: ``submit`` and ``result`` call the executor from the caller's task, and the actor's
own task sleeps until something is wrong. What makes it an actor stays: one owner, an inbox with a bound (the
steps in flight), failures that do not spread, and a rebuild by the owner alone.

A failed executor is thrown away whole, and with it every KV page and all steps in flight: after a kernel or a
driver has raised, nothing it holds can be trusted. Where no other one can be made, the actor is "broken": whoever
waits for it fails, and the next ``submit``, ``resize`` or ``reopen`` tries again. Only after too many failures in
a short time are they refused at once, until the first of these is FAILURE_WINDOW old. So nothing fails for ever.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import trio

from pi2rt._errors import BusyError, ClosedError, ExecutorError, InternalError, RequestError
from pi2rt.runtime.channel import ChannelStatistics
from pi2rt.runtime.executor import Masking, Repairable, Resizable, StepExecutor
from pi2rt.runtime.executor_statistics import ExecutorStatistics
from pi2rt.runtime.step import Step, StepResult
from pi2rt.runtime.token_mask import TokenMask
from pi2rt.runtime.trace import Trace, Track

MAX_FAILURES = 5
"""An executor that fails more often than this within FAILURE_WINDOW is not made again before that is over."""

FAILURE_WINDOW = 60.0
"""Seconds."""

CLOSE_SECONDS = 5.0
"""How long an executor may take to stop."""

State: TypeAlias = Literal["new", "opening", "ready", "rebuilding", "broken", "closed"]


@dataclass(frozen=True, slots=True)
class ActorStatistics:
    """A snapshot.

    ``generation``: how often the executor was lost, or closed for another, and all KV contents with it.
    ``failed``: steps that ended in an error. ``in_flight``: steps accepted whose result was not taken.
    ``inbox``: the same as a channel.
    ``busy``: share of the time since the actor opened during which a step was in flight, 0 to 1.
    """

    name: str
    state: State
    generation: int
    submitted: int
    completed: int
    failed: int
    in_flight: int
    inbox: ChannelStatistics
    busy: float
    executor: ExecutorStatistics


class Reopened(ExecutorError):
    """A step was lost with an executor that was closed to be opened otherwise. Nothing has failed."""


class NotRebuilt(ExecutorError):
    """There is no executor: the last attempt to make one has failed, or it is too early for the next one."""


class Actor:
    """Owns one executor. ``await nursery.start(actor.run)`` opens it; then ``submit`` and ``result``.

    Any number of tasks may submit; one at a time takes results. Cancelling either loses nothing: a cancelled
    ``submit`` did not submit, a cancelled ``result`` left the result for the next call.

    Args:
        name: what errors, statistics and traces call it.
        make_executor: constructs an executor; called again for each rebuild.
        open_executor: opens it, with the model and options that the caller has bound.
        trace: where to record steps, on the track ("actors", name).
    """

    def __init__(
        self,
        name: str,
        make_executor: Callable[[], StepExecutor],
        open_executor: Callable[[StepExecutor], Awaitable[None]],
        trace: Trace | None = None,
    ) -> None:
        self.name = name
        self.track: Track | None = None if trace is None else trace.track("actors", name)
        self._make_executor, self._open_executor = make_executor, open_executor
        self._state: State = "new"
        self._generation = 0
        self._executor: StepExecutor | None = None
        self._capacity = 0  # the executor's max_in_flight
        self._takes_masks = False  # the executor does, or did
        self._in_flight: deque[Step] = deque()
        self._lost: deque[tuple[Step, Exception | None]] = deque()  # to be reported by result, in order
        self._cause: Exception | None = None  # why the actor is being rebuilt, or is broken
        self._failures: deque[float] = deque()  # Trio time of each
        self._counted = False  # the failure of which the present rebuild is the consequence is among them
        self._room = trio.lowlevel.ParkingLot()  # submit waits here
        self._news = trio.lowlevel.ParkingLot()  # result waits here while nothing is in flight
        self._left = trio.lowlevel.ParkingLot()  # the owner waits here for a task to leave executor.wait
        self._gone = trio.lowlevel.ParkingLot()  # tasks wait here until the executor that was lost is closed
        self._unclosed = False  # an executor that was lost is not closed yet
        self._taking = False  # a task is in result
        self._waiting = False  # and it is inside executor.wait
        self._attention = trio.Event()  # wakes the owner
        self._scope = trio.CancelScope()  # around the owner
        self._finished = trio.Event()
        self._close_error: Exception | None = None
        self._submitted = self._completed = self._failed = self._peak = 0
        self._traced_ns = 0  # end of the last span
        self._opened_at = self._busy_since = self._busy = 0.0

    @property
    def generation(self) -> int:
        """Goes up by one when the executor is lost, before anybody learns of it: KV contents written under an
        older generation are gone."""
        return self._generation

    @property
    def max_in_flight(self) -> int:
        """Steps that may be submitted without taking a result; 0 before the actor is open."""
        return self._capacity

    @property
    def usable(self) -> bool:
        """Whether a step has a chance: the executor is there, or was lost so seldom that the next ``submit`` may make
        another."""
        return self._state == "ready" or (self._state == "broken" and self._seconds_to_wait() <= 0)

    async def submit(self, step: Step) -> None:
        """Hands ``step`` to the executor, waiting while it has no room or is being rebuilt.

        Does not let other tasks run when there is room: the result has to be awaited anyway.

        Raises:
            ExecutorError: the executor refused the step, or failed while the step waited for room (the step
                was built for KV contents that are gone). No result will come for this step.
            NotRebuilt: there is no executor, and none could be made; the next ``submit`` tries again.
            ClosedError: the actor is closed or was never started.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        generation = self._generation
        if self._state == "broken":
            self._try_again(step)
        while self._state != "ready" or len(self._in_flight) >= self._capacity:
            self._check_usable(step)
            await self._room.park()
            if generation != self._generation and self._state != "closed":
                self._failed += self._cause is not None
                raise self._lost_with(
                    step, "not submitted: meanwhile the executor", self._cause
                ) from self._cause
        executor = self._executor
        assert executor is not None  # while ready
        try:
            executor.submit(step)
        except Exception as error:
            self._failed += 1
            self._lose_executor(error)
            raise ExecutorError(self.name, step, f"submit: {_say(error)}") from error
        if not self._in_flight:
            self._busy_since = trio.current_time()
        self._in_flight.append(step)
        self._submitted += 1
        self._peak = max(self._peak, len(self._in_flight))
        if self._news:
            self._news.unpark()

    async def result(self) -> StepResult:
        """The result of the oldest step; waits for one to be submitted where none is.

        Raises:
            ExecutorError: the executor failed on this step (the cause is chained), or on one before it; or
                the actor is broken.
            BusyError: another task is in ``result``.
            ClosedError: the actor is closed or was never started.
        """
        if self._taking:
            raise BusyError(f"actor {self.name!r}: another task is waiting for a result already")
        self._taking = True
        try:
            await trio.lowlevel.checkpoint_if_cancelled()
            while True:
                if self._lost and self._state != "closed":
                    step, cause = self._lost.popleft()
                    raise self._lost_with(step, "lost with its executor, which", cause) from cause
                if not self._in_flight:
                    if self._state != "ready":
                        self._check_usable("result")
                    await self._news.park()
                elif (result := await self._take()) is not None:
                    return result
        finally:
            self._taking = False

    def stop(self, step_id: int) -> None:
        """Asks a step in flight to end early; its result arrives as always. Unknown ids are ignored."""
        if self._executor is not None and self._state == "ready":
            try:
                self._executor.stop(step_id)
            except Exception as error:
                self._lose_executor(error)

    @property
    def takes_masks(self) -> bool:
        """Whether slices may wait for masks (``Masking``)."""
        return self._takes_masks

    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        """Gives a slice in flight the mask that it waits for. Unknown ids are ignored."""
        executor: object = self._executor
        if self._state == "ready" and isinstance(executor, Masking):
            try:
                executor.mask(step_id, slot, allowed)
            except Exception as error:
                self._lose_executor(error)

    @property
    def stuck(self) -> bool:
        """Whether an executor could not be stopped: it may still use what it was opened with."""
        return self._unclosed and self._state in ("broken", "closed")

    async def gone(self) -> bool:
        """Waits until the executor that was lost last is closed, so that it writes to no page any more. False where it
        could not be stopped: it may write for ever."""
        while self._unclosed and self._state == "rebuilding":
            await self._gone.park()
        return not self._unclosed

    async def resize(self, neuron_bytes: int, change: Callable[[], None]) -> None:
        """Another size of the executor's neuron cache, while steps run. Waits while the executor is being rebuilt;
        where it is lost meanwhile, the next one is opened with the new size.

        Args:
            neuron_bytes: see ``Resizable``.
            change: what ``open_executor`` does differently from now on; called before the executor is told, so that
                the next one has the new size whatever becomes of this one.

        Raises:
            RequestError: the executor cannot do it, and goes on as it was.
            NotRebuilt: as ``reopen``.
            ExecutorError: the executor failed on it. The next one has the new size.
            ClosedError: as ``submit``.
        """
        while self._state in ("opening", "rebuilding"):
            await self._room.park()
        if self._state != "ready":
            await self.reopen(change)
            return
        current = self._executor
        executor: object = current
        if not isinstance(executor, Resizable):
            raise RequestError(f"the executor of actor {self.name!r} cannot change its memory while it runs")
        change()
        try:
            await executor.resize(neuron_bytes)
        except RequestError:
            raise
        except Exception as error:
            if self._executor is current and self._state == "ready":
                self._lose_executor(error)
                raise ExecutorError(self.name, "resize", _say(error)) from error
            await self._rebuilt("resize")

    async def reopen(self, change: Callable[[], None]) -> None:
        """Closes the executor and opens another. Steps in flight are lost, as with an executor that fails, but by
        ``Reopened``. Cancelling this either does nothing, or ``change`` was called and the rest goes on.

        Args:
            change: what ``open_executor`` does differently from now on.

        Raises:
            NotRebuilt: the other cannot be opened; ``change`` holds for the next attempt, which the next ``submit``
                or ``reopen`` makes. Or it is too early for an attempt, and ``change`` was not called.
            ClosedError: as ``submit``.
        """
        while self._state in ("opening", "rebuilding"):
            await self._room.park()
        if self._state == "broken":
            self._try_again("reopen")
            change()
        else:
            self._check_usable("reopen")
            change()
            self._lose_executor(None)
        await self._rebuilt("reopen")

    async def aclose(self) -> None:
        """Closes the executor and ends the task. Waiting ``submit`` and ``result`` raise ClosedError.

        Raises:
            ExecutorError: the executor did not stop within 5 s, or raised.
        """
        if self._state == "new":
            self._state = "closed"
            self._finished.set()
        self._scope.cancel()
        await self._finished.wait()
        error, self._close_error = self._close_error, None
        if error is not None:
            raise error

    def statistics(self) -> ActorStatistics:
        busy, elapsed = self._busy, 0.0
        if self._state not in ("new", "opening"):
            now = trio.current_time()
            elapsed = now - self._opened_at
            if self._in_flight:
                busy += now - self._busy_since
        return ActorStatistics(
            name=self.name,
            state=self._state,
            generation=self._generation,
            submitted=self._submitted,
            completed=self._completed,
            failed=self._failed,
            in_flight=len(self._in_flight),
            inbox=ChannelStatistics(
                name=f"{self.name}.inbox",
                capacity=self._capacity,
                sent=self._submitted,
                received=self._submitted - len(self._in_flight) - len(self._lost),
                buffered=len(self._in_flight) + len(self._lost),
                peak_buffered=self._peak,
                waiting_senders=len(self._room),
                waiting_receivers=int(self._taking),
                closed=self._state == "closed",
            ),
            busy=busy / elapsed if elapsed > 0 else 0.0,
            executor=ExecutorStatistics() if self._executor is None else self._executor.statistics(),
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """The actor's task. Opens the executor, then supervises it until ``aclose`` or cancellation.

        Raises:
            ClosedError: closed before it was open.
            ExecutorError: the executor could not be closed (unless ``aclose`` reports it), or left a task
                hanging in ``result``.
            Exception: whatever constructing or opening the executor raised, as itself.
        """
        if self._state != "new":
            raise InternalError(f"actor {self.name!r}: run called in state {self._state!r}")
        self._state = "opening"
        opened = False
        try:
            with self._scope:
                await self._open()
                opened = True
                self._state, self._opened_at = "ready", trio.current_time()
                task_status.started()
                while True:
                    await self._attention.wait()
                    self._attention = trio.Event()
                    await self._rebuild()
        except ExecutorError as error:
            if not self._scope.cancel_called:
                raise
            self._close_error = error
        finally:
            await self._finish()
        if not opened:
            raise ClosedError(f"actor {self.name!r} was closed while it opened")

    async def _take(self) -> StepResult | None:
        """Awaits the oldest step. None: the executor was lost meanwhile, and the step with it."""
        executor = self._executor
        assert executor is not None  # while anything is in flight
        failure: Exception | None = None
        result: StepResult | None = None
        self._waiting = True
        try:
            result = await executor.wait()
        except Exception as error:
            failure = error
        finally:
            self._waiting = False
            if self._left:
                self._left.unpark_all()
        if executor is not self._executor or not self._in_flight:
            return None
        step = self._in_flight.popleft()
        if not self._in_flight:
            self._busy += trio.current_time() - self._busy_since
        if result is not None and result.id != step.id:
            failure = InternalError(
                f"executor {executor.name!r} gave the result of step {result.id} for {step}"
            )
        if failure is not None or result is None:
            cause = failure or InternalError(f"executor {executor.name!r} gave no result for {step}")
            self._failed += 1
            self._lose_executor(cause)
            raise ExecutorError(self.name, step, _say(cause)) from cause
        self._completed += 1
        if self._room:
            self._room.unpark()
        if self.track is not None:
            # An executor may count a step from its submission; on one track, spans must not overlap.
            start_ns = max(result.started_ns, self._traced_ns)
            self._traced_ns = max(result.finished_ns, start_ns)
            self.track.span(
                "stopped step" if result.stopped else "step",
                start_ns,
                self._traced_ns,
                id=step.id,
                tokens=step.tokens,
                sequences=len(step.slices),
            )
        return result

    def _lost_with(self, step: Step, what: str, cause: Exception | None) -> ExecutorError:
        """The error of a step whose executor is no more."""
        if cause is None:
            return Reopened(self.name, step, f"{what} was closed to be opened again")
        return ExecutorError(self.name, step, f"{what} failed ({_say(cause)})")

    async def _rebuilt(self, item: object) -> None:
        """Waits until the rebuild that goes on is over."""
        while self._state == "rebuilding":
            await self._room.park()
        self._check_usable(item)

    def _check_usable(self, item: object) -> None:
        """Raises where waiting would be in vain."""
        if self._state == "broken":
            seconds = self._seconds_to_wait()
            when = (
                f"no attempt is made for {math.ceil(seconds)} s"
                if seconds > 0
                else "the next request tries again"
            )
            raise NotRebuilt(
                self.name, item, f"the actor is broken: {_say(self._cause)}; {when}"
            ) from self._cause
        if self._state == "closed":
            raise ClosedError(f"actor {self.name!r} is closed")
        if self._state == "new":
            raise ClosedError(f"actor {self.name!r} was not started: await nursery.start(actor.run)")

    def _seconds_to_wait(self) -> float:
        """Until an executor may be made again."""
        now = trio.current_time()
        while self._failures and self._failures[0] <= now - FAILURE_WINDOW:
            self._failures.popleft()
        excess = len(self._failures) - MAX_FAILURES
        return self._failures[excess - 1] + FAILURE_WINDOW - now if excess > 0 else 0.0

    def _try_again(self, item: object) -> None:
        """Wakes the owner of a broken actor to rebuild it.

        Raises:
            NotRebuilt: it is too early.
        """
        if self._seconds_to_wait() > 0:
            self._check_usable(item)
        self._state, self._counted = "rebuilding", False
        self._attention.set()

    def _lose_executor(self, cause: Exception | None) -> None:
        """Gives up the executor and everything in flight, and wakes the owner to rebuild it. ``cause``: None where
        nothing failed."""
        if self._in_flight:
            self._busy += trio.current_time() - self._busy_since
        self._state, self._cause, self._counted = "rebuilding", cause, cause is not None
        self._generation += 1
        self._unclosed = True
        self._lost.extend((step, cause) for step in self._in_flight)
        if cause is not None:
            self._failed += len(self._in_flight)
            self._failures.append(trio.current_time())
            if self.track is not None:
                self.track.instant("failed", time.perf_counter_ns(), cause=_say(cause))
        self._in_flight.clear()
        self._attention.set()
        self._wake_all()

    async def _open(self) -> None:
        executor = self._make_executor()
        try:
            await self._open_executor(executor)
        except BaseException as error:
            try:
                await self._retire(executor)
            except ExecutorError as second:
                if not isinstance(error, Exception):
                    raise
                error.add_note(str(second))
            raise
        self._executor, self._capacity = executor, executor.max_in_flight
        self._takes_masks = getattr(executor, "takes_masks", False)

    async def _rebuild(self) -> None:
        old, self._executor = self._executor, None
        started_ns = time.perf_counter_ns()
        try:
            if old is not None and (self._seconds_to_wait() > 0 or not await self._repaired(old)):
                await self._retire(old)
                old = None
            self._unclosed = False
            self._gone.unpark_all()
            if self._seconds_to_wait() > 0:
                raise ExecutorError(
                    self.name,
                    "rebuild",
                    f"{len(self._failures)} failures within {FAILURE_WINDOW:g} s; last: {_say(self._cause)}",
                ) from self._cause
            if old is None:
                await self._open()
            else:
                self._executor = old
            self._state = "ready"
        except Exception as error:
            if not self._counted:
                self._failures.append(trio.current_time())
            self._state, self._cause = "broken", error
            if self._waiting:  # for ever: only the nursery can free that task now
                raise
        if self.track is not None:
            self.track.span("rebuild", started_ns, time.perf_counter_ns(), outcome=self._state)
        self._wake_all()

    async def _repaired(self, executor: StepExecutor) -> bool:
        """Whether the executor that failed can go on as it is. Not where a task still waits for a result of it, nor
        where it is only to be opened otherwise."""
        if self._cause is None or self._waiting or not isinstance(executor, Repairable):
            return False
        try:
            with trio.move_on_after(CLOSE_SECONDS, shield=True):
                return await executor.repair()
        except Exception as error:
            self._cause.add_note(f"and it could not be repaired: {_say(error)}")
        return False

    async def _retire(self, executor: StepExecutor) -> None:
        """Closes an executor whatever happens around, within CLOSE_SECONDS.

        Closing also ends a ``wait`` in progress; so the protocol has it, because a cancel scope around every
        wait would cost more than the rest of the actor.

        Raises:
            ExecutorError: it did not stop, or raised, or a task still hangs in its ``wait``.
        """
        what = f"executor {executor.name!r}"
        with trio.move_on_after(CLOSE_SECONDS, shield=True):
            try:
                await executor.aclose()
            except Exception as error:
                raise ExecutorError(self.name, "aclose", _say(error)) from error
            what = f"wait of {what}, which closed,"
            while self._waiting:
                await self._left.park()
            return
        raise ExecutorError(self.name, "aclose", f"{what} did not stop within {CLOSE_SECONDS:g} s")

    async def _finish(self) -> None:
        closing = self._scope.cancel_called
        self._state = "closed"
        executor, self._executor = self._executor, None
        self._cause = None  # its traceback holds what was open
        self._in_flight.clear()
        self._lost.clear()
        self._wake_all()
        try:
            if executor is not None:
                self._unclosed = True
                await self._retire(executor)
                self._unclosed = False
        except ExecutorError as error:
            if not closing or self._waiting:
                raise
            self._close_error = error
        finally:
            self._finished.set()

    def _wake_all(self) -> None:
        self._room.unpark_all()
        self._news.unpark_all()
        self._gone.unpark_all()


def _say(error: Exception | None) -> str:
    return "unknown" if error is None else f"{type(error).__name__}: {error}"
