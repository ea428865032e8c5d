"""A runtime on a thread of its own, for callers that do not run Trio.

Work goes in through ``TrioToken.run_sync_soon``; what comes out is handed to a callback on the runtime's
thread, which passes it on in the caller's way (``loop.call_soon_threadsafe``, ``queue.SimpleQueue.put``).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from typing import Generic, TypeAlias, TypeVar

import trio

from pi2rt._errors import ClosedError
from pi2rt.engine import Chunk, SamplingParams
from pi2rt.runtime_options import RuntimeKeywords
from pi2rt.trio_runtime import Prompt, Runtime, open_runtime

T = TypeVar("T")

STREAM_BUFFER = 256
"""Chunks on their way to a consumer on another thread; then the runtime's own buffer fills."""


EXIT_SECONDS = 10.0
"""How long the interpreter waits at its exit for an engine that nobody closed."""


@dataclass(frozen=True, slots=True)
class Progress:
    """For a progress callback, which is called on the consumer's side."""

    done: int
    total: int


@dataclass(frozen=True, slots=True)
class End:
    """Nothing comes after it. ``error``: what to raise, None for a good end."""

    error: BaseException | None = None


Item: TypeAlias = Chunk | Progress | End


class RuntimeThread:
    """Starts at once; ``ready`` is set when the model is open, or to the error that prevented it."""

    def __init__(
        self,
        model: str | os.PathLike[str],
        options: RuntimeKeywords,
        on_load: Callable[[Progress], None] | None = None,
    ) -> None:
        self._model, self._options = model, options
        if on_load is not None:
            self._options = {**options, "on_load": lambda done, total: on_load(Progress(done, total))}
        self.ready: Future[Runtime] = Future()
        self.ready.set_running_or_notify_cancel()  # who stops waiting for it does not change it
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()  # around all
        self._jobs: trio.Nursery | None = None  # while the runtime is open
        self._began = threading.Event()
        # A daemon, so that an engine that nobody closed cannot keep the interpreter from exiting.
        self._thread = threading.Thread(target=self._run, name="pi2rt", daemon=True)
        self._thread.start()
        self._began.wait()

    def call_soon(self, function: Callable[[], object]) -> None:
        """Runs ``function`` on the runtime's thread, soon. From any thread, also from a finaliser.

        Raises:
            ClosedError: the runtime is closed.
        """
        assert self._token is not None
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            raise ClosedError("the engine is closed") from None

    def start(self, job: Job) -> None:
        """Runs a job in a task of its own."""

        def start() -> None:
            if self._jobs is None:
                job.refuse(ClosedError("the engine is closed"))
            else:
                self._jobs.start_soon(job.run, self.ready.result())

        self.call_soon(start)

    def call(self, function: Callable[[Runtime], Awaitable[T]]) -> Call[T]:
        """Starts ``await function(runtime)``."""
        call = Call(self, function)
        self.start(call)
        return call

    def close(self) -> None:
        """Begins to close; ``join`` waits for the end. Safe to call twice, from any thread."""
        try:
            self.call_soon(self._scope.cancel)
        except ClosedError:
            return

    def join(self, timeout: float | None = None) -> None:
        """Waits until the model is freed."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    def abandon(self) -> None:
        """For finalisers and the interpreter's exit: closes, and waits for a while."""
        self.close()
        self.join(EXIT_SECONDS)

    def _run(self) -> None:
        try:
            trio.run(self._main)
        except BaseException as error:
            self._fail(error)
        else:
            self._fail(ClosedError("the engine was closed while it opened"))
        finally:
            self._began.set()

    def _fail(self, error: BaseException) -> None:
        if not self.ready.done():
            self.ready.set_exception(error)

    async def _main(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self._began.set()
        with self._scope:
            async with open_runtime(self._model, **self._options) as runtime:
                try:
                    async with trio.open_nursery() as self._jobs:
                        self.ready.set_result(runtime)
                        await trio.sleep_forever()
                finally:
                    self._jobs = None


class Job:
    """A task on the runtime's thread that another thread can cancel."""

    def __init__(self, thread: RuntimeThread) -> None:
        self._thread = thread
        self._scope = trio.CancelScope()

    async def run(self, runtime: Runtime) -> None:
        """Never raises, so that no job takes others with it."""
        raise NotImplementedError

    def refuse(self, error: BaseException) -> None:
        """It will not run."""
        raise NotImplementedError

    def cancel(self) -> None:
        """From any thread, also from a finaliser. A job that is over does not mind."""
        try:
            self._thread.call_soon(self._scope.cancel)
        except ClosedError:
            return


class Call(Job, Generic[T]):
    """Its result goes to ``future``."""

    def __init__(self, thread: RuntimeThread, function: Callable[[Runtime], Awaitable[T]]) -> None:
        super().__init__(thread)
        self._function = function
        self.future: Future[T] = Future()

    async def run(self, runtime: Runtime) -> None:
        try:
            with self._scope:
                result = await self._function(runtime)
                self._settle(lambda: self.future.set_result(result))
        except Exception as error:
            failure = error
            self._settle(lambda: self.future.set_exception(failure))
        finally:
            self.refuse(ClosedError("the engine was closed while this request ran"))

    def refuse(self, error: BaseException) -> None:
        if not self.future.done():
            self._settle(lambda: self.future.set_exception(error))

    def _settle(self, set_it: Callable[[], None]) -> None:
        try:
            set_it()
        except InvalidStateError:  # the caller has cancelled the future
            return


class Pump(Job):
    """Sends the chunks of one request to ``deliver``, which is called on the runtime's thread and may raise
    RuntimeError when nobody is there any more. The last item is always an ``End``.

    The consumer says ``took()`` for every chunk; while ``STREAM_BUFFER`` of them are on their way, none is
    sent.
    """

    def __init__(
        self,
        thread: RuntimeThread,
        prompt: Prompt,
        params: SamplingParams,
        deliver: Callable[[Item], None],
        *,
        report_prefill: bool,
    ) -> None:
        super().__init__(thread)
        self._prompt, self._params = prompt, params
        self._deliver = deliver
        self._report_prefill = report_prefill
        self._sent = self._taken = 0
        self._waiting = False
        self._room = trio.Event()

    def took(self) -> None:
        """One chunk was taken. On the consumer's thread."""
        self._taken += 1
        # The pump sets _waiting before it looks at _taken for the last time, so one of the two sees it.
        if self._waiting and self._sent - self._taken <= STREAM_BUFFER // 2:
            self._waiting = False
            try:
                self._thread.call_soon(self._wake)
            except ClosedError:
                return

    async def run(self, runtime: Runtime) -> None:
        end = End(ClosedError("the engine was closed while this request ran"))
        try:
            with self._scope:
                await self._send(runtime)
                end = End()
        except Exception as error:
            end = End(error)
        finally:
            self._last(end)

    def refuse(self, error: BaseException) -> None:
        self._last(End(error))

    async def _send(self, runtime: Runtime) -> None:
        on_prefill = self._prefill if self._report_prefill else None
        async with runtime.stream(self._prompt, self._params, on_prefill=on_prefill) as chunks:
            async for chunk in chunks:
                self._sent += 1
                self._deliver(chunk)
                while self._full():
                    await self._room.wait()

    def _full(self) -> bool:
        if self._sent - self._taken < STREAM_BUFFER:
            return False
        self._room = trio.Event()
        self._waiting = True
        if self._sent - self._taken > STREAM_BUFFER // 2:
            return True
        self._waiting = False
        return False

    def _wake(self) -> None:
        self._room.set()

    def _prefill(self, done: int, total: int) -> None:
        self._deliver(Progress(done, total))

    def _last(self, end: End) -> None:
        try:
            self._deliver(end)
        except RuntimeError:  # the consumer's event loop is closed
            return
