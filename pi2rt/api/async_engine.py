"""The asyncio API: the same as ``open_runtime``, for services that run on asyncio.

The runtime has a thread of its own, where Trio runs; an event loop only ever waits for futures of its own.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, SupportsFloat, SupportsIndex, TypeVar, Unpack

from pi2rt import catalogue
from pi2rt._errors import BusyError, ClosedError
from pi2rt.api.jobs import End, Item, Pump, Report, reporter
from pi2rt.api.request_stream import RequestStream
from pi2rt.api.runtime import Prompt, Runtime, RuntimeStatistics
from pi2rt.api.runtime_thread import RuntimeThread, drain_seconds
from pi2rt.api.trio_thread import TrioThread
from pi2rt.catalogue.download import PullProgress
from pi2rt.engine import Chunk, Completion, SamplingParams
from pi2rt.engine.masker import MaskFunction
from pi2rt.engine.sampling_params import SamplingKeywords
from pi2rt.engine.token_stream import BUSY
from pi2rt.opening.model_info import ModelInfo
from pi2rt.opening.options import RuntimeKeywords, RuntimeOptions
from pi2rt.opening.pack_cache import ensure_pack
from pi2rt.runtime.executor import Progress as ProgressCallback
from pi2rt.runtime.step import Floats
from pi2rt.tokenizer import Tokenizer

T = TypeVar("T")


class AsyncEngine:
    """``async with AsyncEngine("smollm2") as engine: async for chunk in engine.stream("Why?"): ...``

    Progress callbacks run in the event loop of the task that waits for what they report.

    Args:
        model: as ``open_runtime``.
        options: as ``open_runtime``; see ``RuntimeOptions``.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Unpack[RuntimeKeywords]) -> None:
        RuntimeOptions(**options)  # a mistake shows here, not at the start
        self._model, self._options = model, options
        self._thread: RuntimeThread | None = None
        self._runtime: Runtime | None = None

    @classmethod
    def open(cls, model: str | os.PathLike[str], **options: Unpack[RuntimeKeywords]) -> Self:
        """``async with AsyncEngine.open("smollm2") as engine: ...``, the same as the constructor."""
        return cls(model, **options)

    @staticmethod
    async def pull(model: str, on_progress: PullProgress | None = None) -> Path:
        """As ``pi2rt.pull``: fetches a model unless it is here. Cancelling it leaves nothing behind."""
        return await _run(partial(catalogue.pull, model), on_progress)

    @staticmethod
    async def ensure_pack(model: str | os.PathLike[str], on_progress: PullProgress | None = None) -> Path:
        """As ``pi2rt.ensure_pack``: the pack of a model. Cancelling it leaves nothing behind."""
        return await _run(partial(ensure_pack, model), on_progress)

    async def start(self) -> Self:
        """Loads the model; cancelling it abandons the load. ``async with`` calls it.

        Raises: as ``open_runtime``.
        """
        if self._thread is not None:
            raise BusyError("this engine was started already; make another one")
        inbox = _Inbox(asyncio.get_running_loop())
        self._thread = RuntimeThread(self._model, self._options, inbox.deliver)
        self._finalizer = weakref.finalize(self, self._thread.abandon)
        try:
            self._runtime = await _wait(self._thread.ready, inbox)
        except BaseException:
            await self.aclose()
            self._thread = None  # which keeps the error, whose traceback has this frame
            raise
        return self

    async def aclose(self, *, drain: SupportsFloat = 0.0) -> None:
        """Ends all requests with ClosedError and frees the model. Safe to call twice. In a forked child it does
        nothing.

        Args:
            drain: seconds. For so long, requests that wait or run may finish, while new ones are refused; then they
                are ended. Cancelling this, or calling it again without ``drain``, ends them at once.

        Raises:
            RequestError: ``drain`` is no number of seconds.
            ExecutorError: the executor did not stop in time.
        """
        seconds = drain_seconds(drain)
        thread = self._thread
        if thread is None or thread.trio.owner.elsewhere:
            return
        thread.close(seconds)
        await _shielded(asyncio.get_running_loop().run_in_executor(None, thread.join), thread.close)
        self._finalizer.detach()
        thread.check_end()

    async def __aenter__(self) -> Self:
        return await self.start()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @property
    def tokenizer(self) -> Tokenizer:
        return self._started()[1].tokenizer

    @property
    def model(self) -> ModelInfo:
        return self._started()[1].model

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_prefill: ProgressCallback | None = None,
        token_mask: MaskFunction | None = None,
        **overrides: Unpack[SamplingKeywords],
    ) -> AsyncStream:
        """``async for chunk in engine.stream("Why?", max_tokens=50): ...``

        Arguments and errors as for ``Runtime.stream``; without a block, the first chunk enters. Leaving the loop,
        cancelling the task or dropping the iterator ends the request; ``async with engine.stream(...) as chunks`` says
        so explicitly.
        """
        thread, _ = self._started()
        return AsyncStream(
            self, thread, prompt, thread.chosen(params, overrides, token_mask), on_prefill, token_mask
        )

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_prefill: ProgressCallback | None = None,
        token_mask: MaskFunction | None = None,
        **overrides: Unpack[SamplingKeywords],
    ) -> Completion:
        """The whole text at once. Arguments and errors as for ``stream``."""
        if on_prefill is None:
            chosen = self._started()[0].chosen(params, overrides, token_mask)
            return await self._call(lambda runtime: runtime.generate(prompt, chosen, token_mask=token_mask))
        async with self.stream(
            prompt, params, on_prefill=on_prefill, token_mask=token_mask, **overrides
        ) as chunks:
            return Completion.of([chunk async for chunk in chunks])

    async def score(self, tokens: Iterable[SupportsIndex]) -> Floats:
        """As ``Runtime.score``."""
        return await self._call(lambda runtime: runtime.score(tokens))

    async def logits(self, tokens: Iterable[SupportsIndex]) -> Floats:
        """As ``Runtime.logits``."""
        return await self._call(lambda runtime: runtime.logits(tokens))

    async def resize(self, memory: int | str) -> None:
        """As ``Runtime.resize``."""
        await self._call(lambda runtime: runtime.resize(memory))

    def statistics(self) -> RuntimeStatistics:
        """As ``Runtime.statistics``. Holds the event loop for about 0.1 ms; from any thread."""
        return self._started()[0].ask(Runtime.statistics)

    def _started(self) -> tuple[RuntimeThread, Runtime]:
        if self._thread is None or self._runtime is None:
            raise ClosedError("this engine was not started: use 'async with', or await start()")
        return self._thread, self._runtime

    async def _call(self, function: Callable[[Runtime], Awaitable[T]]) -> T:
        call = self._started()[0].call(function)
        try:
            return await asyncio.wrap_future(call.future)
        except asyncio.CancelledError:
            call.cancel()
            raise


class AsyncStream(RequestStream):
    """The chunks of one request, for one consumer. It starts with the first chunk asked for, or on entering
    ``async with``.

    A cancelled ``__anext__`` (of ``asyncio.wait_for``, say) loses no chunk: the next call goes on. What ended the
    stream is raised again by every later call.
    """

    def __init__(
        self,
        engine: object,
        thread: RuntimeThread,
        prompt: Prompt,
        params: SamplingParams,
        on_prefill: ProgressCallback | None,
        token_mask: MaskFunction | None,
    ) -> None:
        self._inbox = inbox = _Inbox()
        super().__init__(
            engine, thread, Pump(thread.trio, prompt, params, inbox.deliver, on_prefill, token_mask)
        )

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk.

        Raises:
            StopAsyncIteration: the text is whole.
            BusyError: another task is waiting for a chunk of this stream.
            ClosedError: the stream or the engine was closed, also by another task, or this is a forked child.
            RequestError, ContextOverflowError, TemplateError: as on entering, where this is the first call.
            ExecutorError: the executor failed on this request.
        """
        try:
            chunk = await self._receive(entering=False)
        except asyncio.CancelledError:
            # A traceback that somebody keeps must not keep the request of an iterator that was dropped.
            del self
            raise
        if chunk is None:
            raise StopAsyncIteration
        return chunk

    async def __aenter__(self) -> Self:
        try:
            await self._receive(entering=True)
        except asyncio.CancelledError:
            self._leave()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the request; a task that waits for a chunk gets ClosedError. Does not wait."""
        if self._leave():
            self._inbox.put(End())  # wakes it

    def __del__(self) -> None:
        if hasattr(self, "_end"):  # its constructor has ended
            self._leave()

    async def _receive(self, *, entering: bool) -> Chunk | None:
        """The next chunk; None at the end, or once the request has entered where it is only ``entering``."""
        self._thread.trio.owner.check()
        self._inbox.loop = self._inbox.loop or asyncio.get_running_loop()
        try:
            self._begin()
            while self._end is None and not (entering and self._entered):
                chunk = self._accept(await self._inbox.take())
                if chunk is not None:
                    return chunk
        except BusyError:
            raise
        except Exception as error:
            self._leave(error)
            raise
        except asyncio.CancelledError:
            del self
            raise
        if self._end is not None and self._end.error is not None:
            raise self._end.error
        return None


class _Inbox:
    """What has arrived in an event loop. Holds no reference to a stream, which may be dropped at any
    time."""

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop
        self._items: deque[Item] = deque()
        self._reader: asyncio.Future[None] | None = None

    def deliver(self, item: Item) -> None:
        """On any thread. Raises RuntimeError where the loop is closed."""
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.put, item)

    async def take(self) -> Item:
        """Raises:
        BusyError: another task is in it.
        """
        if self._reader is not None:
            raise BusyError(BUSY)
        while not self._items:
            assert self.loop is not None
            self._reader = self.loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._items.popleft()

    def put(self, item: Item) -> None:
        self._items.append(item)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


async def _wait(future: Future[T], inbox: _Inbox) -> T:
    """The result of ``future``; makes the calls that are reported until then."""

    def done(_: object) -> None:
        try:
            inbox.deliver(End())
        except RuntimeError:  # the loop is closed
            return

    future.add_done_callback(done)
    while isinstance(event := await inbox.take(), Report):
        event.call()
    return future.result()


async def _run(
    function: Callable[[Callable[..., Any] | None], Awaitable[T]], callback: PullProgress | None
) -> T:
    """``function(callback)`` under Trio on a thread of its own, with the calls of ``callback`` in this event loop.
    Waits until the function has ended, also when this is cancelled."""
    loop = asyncio.get_running_loop()
    inbox = _Inbox(loop)
    work = TrioThread(lambda: function(None if callback is None else reporter(callback, inbox.deliver)))
    try:
        return await _wait(work.future, inbox)
    finally:
        work.cancel()
        await _shielded(loop.run_in_executor(None, work.join))


async def _shielded(future: asyncio.Future[Any], cancelled: Callable[[], object] = lambda: None) -> None:
    """Waits for ``future`` whatever happens, then lets a cancellation through. ``cancelled`` is called when one
    comes."""
    cancellation: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError as error:
            cancellation = error
            cancelled()
    if cancellation is not None:
        raise cancellation
    future.result()
