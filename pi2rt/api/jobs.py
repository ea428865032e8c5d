"""What runs on the runtime's thread for a caller on another one: single calls, and the streams of requests."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, TypeAlias, TypeVar

import trio

from pi2rt._errors import ClosedError
from pi2rt.api.runtime import Prompt, Runtime
from pi2rt.api.trio_thread import TrioThread
from pi2rt.engine import Chunk, SamplingParams, Timing, TokenStream
from pi2rt.engine.masker import MaskFunction
from pi2rt.engine.token_stream import CLOSED
from pi2rt.runtime.executor import Progress

T = TypeVar("T")

STREAM_BUFFER = 256
"""Chunks on their way to a consumer on another thread; then the runtime's own buffer fills."""


@dataclass(frozen=True, slots=True)
class Started:
    """The engine has the request: its prompt is valid."""


@dataclass(frozen=True, slots=True)
class Report:
    """A call of a progress callback, to be made on the consumer's side."""

    call: Callable[[], object]


@dataclass(frozen=True, slots=True)
class End:
    """Nothing comes after it. ``error``: what to raise, None for a good end."""

    error: BaseException | None = None


Item: TypeAlias = Started | Chunk | Report | End


class Job(ABC):
    """A task on the runtime's thread that another thread can cancel.

    Args:
        timeout: seconds from its start, after which it is cancelled with TimeoutError. None: no limit.
    """

    def __init__(self, thread: TrioThread[None], timeout: float | None = None) -> None:
        self._thread = thread
        self._timeout = timeout
        self._scope = trio.CancelScope(relative_deadline=math.inf if timeout is None else timeout)
        self.cancelled = False  # by its caller

    @abstractmethod
    async def run(self, runtime: Runtime) -> None:
        """Never raises an Exception, so that no job takes others with it."""

    @abstractmethod
    def refuse(self, error: BaseException) -> None:
        """It will not run, or has not come to its end."""

    def cancel(self) -> None:
        """From any thread, also from a finaliser. A job that is over does not mind."""
        self.cancelled = True
        try:
            self._thread.call_soon(self._scope.cancel)
        except ClosedError:
            return

    def _expired(self, what: str) -> TimeoutError | None:
        """The error, where the timeout has ended it."""
        if self._timeout is None or not self._scope.cancelled_caught or self.cancelled:
            return None
        return TimeoutError(f"timeout={self._timeout:g}: {what}")


class Call(Job, Generic[T]):
    """Its result goes to ``future``."""

    def __init__(
        self, thread: TrioThread[None], function: Callable[[Runtime], Awaitable[T]], timeout: float | None
    ) -> None:
        super().__init__(thread, timeout)
        self._function = function
        self.future: Future[T] = Future()

    async def run(self, runtime: Runtime) -> None:
        try:
            with self._scope:
                result = await self._function(runtime)
                self._settle(lambda: self.future.set_result(result))
            if expired := self._expired("the call took longer, and was cancelled"):
                self.refuse(expired)
        except Exception as error:
            self.refuse(error)
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
    RuntimeError when nobody is there any more. The first item is ``Started``, the last one always an ``End``.

    The consumer says ``took()`` for every chunk; while ``STREAM_BUFFER`` of them are on their way, none is
    sent.
    """

    def __init__(
        self,
        thread: TrioThread[None],
        prompt: Prompt,
        params: SamplingParams,
        deliver: Callable[[Item], None],
        on_prefill: Progress | None,
        token_mask: MaskFunction | None,
        timeout: float | None = None,
    ) -> None:
        super().__init__(thread, timeout)
        self._prompt, self._params = prompt, params
        self._deliver = deliver
        self._on_prefill = None if on_prefill is None else reporter(on_prefill, deliver)
        self._token_mask = token_mask
        self._stream: TokenStream | None = None
        self._sent = self._taken = 0
        self._waiting = False
        self._room = trio.Event()

    @property
    def timing(self) -> Timing:
        """What the request has used so far. From any thread."""
        stream = self._stream
        return Timing() if stream is None else stream.timing

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
            if self.cancelled:  # by its consumer, which has left
                end = End(ClosedError(CLOSED))
            elif expired := self._expired(
                f"the request took longer, and was cancelled after {self.timing.generated_tokens} tokens"
            ):
                end = End(expired)
        except Exception as error:
            end = End(error)
        finally:
            self.refuse(end.error)

    def refuse(self, error: BaseException | None) -> None:
        try:
            self._deliver(End(error))
        except RuntimeError:  # the consumer's event loop is closed
            return

    async def _send(self, runtime: Runtime) -> None:
        async with runtime.stream(
            self._prompt, self._params, on_prefill=self._on_prefill, token_mask=self._token_mask
        ) as chunks:
            self._stream = chunks
            self._deliver(Started())
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


def reporter(callback: Callable[..., object], deliver: Callable[[Report], None]) -> Callable[..., None]:
    """A callback for the runtime's thread: it sends its arguments to the consumer's side, where ``callback`` is
    called with them."""

    def report(*arguments: Any) -> None:
        deliver(Report(partial(callback, *arguments)))

    return report
