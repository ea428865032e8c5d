"""A runtime on a thread of its own, for callers that do not run Trio.

Work goes in through ``TrioToken.run_sync_soon``; what comes out is handed to a callback on the runtime's
thread, which passes it on in the caller's way (``loop.call_soon_threadsafe``, ``queue.SimpleQueue.put``).
"""

from __future__ import annotations

import math
import os
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import SupportsFloat, TypeVar

import trio

from pi2rt._errors import BusyError, ClosedError
from pi2rt.api.jobs import Call, Job, Report, reporter
from pi2rt.api.runtime import Runtime, open_runtime
from pi2rt.api.trio_thread import TrioThread
from pi2rt.engine import SamplingParams
from pi2rt.engine.masker import MaskFunction
from pi2rt.engine.sampling_params import SamplingKeywords, number
from pi2rt.engine.token_stream import CLOSED
from pi2rt.opening.options import RuntimeKeywords

T = TypeVar("T")

EXIT_SECONDS = 10.0
"""How long the interpreter waits at its exit for an engine that nobody closed."""

ANSWER_SECONDS = 5.0
"""How long ``ask`` waits. Nothing holds the runtime's loop for more than some 50 ms."""

LEAVING_TURNS = 3
"""Turns of the loop until a cancelled task has ended: it may take what has come for it, meets the cancellation at the
next checkpoint, and that takes two."""


class RuntimeThread:
    """Starts at once; ``ready`` is set when the model is open, or to the error that prevented it.

    Args:
        deliver: where ``on_load`` of the options is to be called, on the caller's side.
    """

    def __init__(
        self, model: str | os.PathLike[str], options: RuntimeKeywords, deliver: Callable[[Report], None]
    ) -> None:
        self._model, self._options = model, options
        on_load = options.get("on_load")
        if on_load is not None:
            self._options = {**options, "on_load": reporter(on_load, deliver)}
        self.ready: Future[Runtime] = Future()
        self.ready.set_running_or_notify_cancel()
        self._nursery: trio.Nursery | None = None  # while the runtime is open
        self._jobs: set[Job] = set()  # that have not ended
        self._opened = False
        self._closing = False  # takes no more jobs
        self._draining = False  # and lets those there are finish
        self.trio = TrioThread(self._main)
        self.trio.future.add_done_callback(self._ended)

    def check_open(self) -> None:
        """Raises:
        ClosedError: it is closed or closing, or belongs to another process.
        """
        self.trio.owner.check()
        if self.trio.future.done():
            raise ClosedError("the engine is closed")
        if self._closing:
            raise ClosedError("the engine is closing, and takes no more requests")

    def chosen(
        self,
        params: SamplingParams | None,
        overrides: SamplingKeywords,
        token_mask: MaskFunction | None = None,
    ) -> SamplingParams:
        """As ``Runtime.chosen``."""
        self.check_open()
        return self.ready.result().chosen(params, overrides, token_mask)

    def start(self, job: Job) -> None:
        """Runs a job in a task of its own.

        Raises:
            ClosedError: as ``check_open``.
        """
        self.check_open()

        def start() -> None:
            if self._nursery is None or self.trio.scope.cancel_called:  # its nursery may be closed already
                self._jobs.discard(job)
                job.refuse(ClosedError("the engine is closed"))
            else:
                self._nursery.start_soon(self._work, job)

        self._jobs.add(job)
        try:
            self.trio.call_soon(start)
        except ClosedError:
            self._jobs.discard(job)
            raise

    def call(self, function: Callable[[Runtime], Awaitable[T]], timeout: float | None = None) -> Call[T]:
        """Starts ``await function(runtime)``. Raises ClosedError as ``start``."""
        call = Call(self.trio, function, timeout)
        self.start(call)
        return call

    def ask(self, function: Callable[[Runtime], T]) -> T:
        """``function(runtime)``, called on the runtime's thread between two tasks; waits for it, which takes about
        0.1 ms. From any thread.

        Raises:
            ClosedError: the runtime is closed, or belongs to another process.
            BusyError: its thread has not answered for ``ANSWER_SECONDS``.
        """
        self.trio.owner.check()
        runtime = self.ready.result()
        if self.trio.current:
            return function(runtime)
        answer: Future[T] = Future()

        def run() -> None:
            try:
                answer.set_result(function(runtime))
            except BaseException as error:
                answer.set_exception(error)

        self.trio.call_soon(run)
        try:
            return answer.result(ANSWER_SECONDS)
        except TimeoutError:
            raise BusyError(
                f"the runtime's thread has not answered for {ANSWER_SECONDS:g} s; something else holds the "
                f"interpreter; ask again"
            ) from None

    def close(self, drain: float = 0.0) -> None:
        """Begins to close; ``join`` waits for the end. Safe to call twice, from any thread.

        Args:
            drain: seconds for requests that wait or run to finish. The shortest of several calls counts.
        """
        self._closing = True
        try:
            self.trio.call_soon(lambda: self._close(drain))
        except ClosedError:
            return

    def join(self, timeout: float | None = None) -> None:
        """Waits until the model is freed."""
        self.trio.join(timeout)

    def check_end(self) -> None:
        """After ``join``: raises what went wrong with the runtime at its end, if it had opened. Once.

        Raises:
            ExecutorError: the executor did not stop in time, or raised.
        """
        if not self.trio.owner.elsewhere and self._opened and self.trio.future.done():
            self._opened = False
            error = self.trio.future.exception()
            if error is not None and not isinstance(error, ClosedError):
                raise error

    def abandon(self) -> None:
        """For finalisers and the interpreter's exit: closes, and waits for a while."""
        self.close()
        self.join(EXIT_SECONDS)

    def _close(self, drain: float) -> None:
        scope = self.trio.scope
        if drain and self._jobs and self._nursery is not None:
            self._draining = True
            scope.deadline = min(scope.deadline, trio.current_time() + drain)
        else:
            scope.cancel()

    async def _main(self) -> None:
        async with open_runtime(self._model, **self._options) as runtime:
            try:
                async with trio.open_nursery() as self._nursery:
                    self._opened = True
                    self.ready.set_result(runtime)
                    await trio.sleep_forever()
            finally:
                self._nursery = None

    async def _work(self, job: Job) -> None:
        try:
            if any(
                other.cancelled for other in self._jobs.copy()
            ):  # this one may need the places that they hold
                for _ in range(LEAVING_TURNS):
                    await trio.lowlevel.cancel_shielded_checkpoint()
            if job.cancelled:
                job.refuse(ClosedError(CLOSED))
            else:
                await job.run(self.ready.result())
        finally:
            self._jobs.discard(job)
            if self._draining and not self._jobs:
                self.trio.scope.cancel()

    def _ended(self, future: Future[None]) -> None:
        """Nobody waits for what will not come."""
        error = future.exception()
        if not self.ready.done():
            closed = error is None or self.trio.scope.cancelled_caught
            self.ready.set_exception(
                ClosedError("the engine was closed while it opened") if closed or error is None else error
            )
        for job in self._jobs.copy():
            job.refuse(ClosedError("the engine was closed while this request ran"))


def seconds(name: str, value: SupportsFloat | None) -> float | None:
    """A time limit that a caller has given; None is no limit. Raises RequestError for what is none."""
    return None if value is None else number(name, value, 0, math.inf, open_low=True)


def drain_seconds(value: SupportsFloat) -> float:
    """As ``seconds``, for ``drain``; 0 does not wait."""
    return number("drain", value, 0, math.inf)
