"""The asyncio face: the same as ``open_runtime``, for services that run on asyncio.

The runtime has a thread of its own, where Trio runs; an event loop only ever waits for futures of its own.
"""

from __future__ import annotations

import asyncio
import os
import weakref
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from types import TracebackType
from typing import Any, Self, TypeVar, Unpack

from pi2rt import runtime_options
from pi2rt._errors import BusyError, ClosedError
from pi2rt._runtime_thread import Item, Progress, Pump, RuntimeThread
from pi2rt.engine import Chunk, Completion, SamplingParams
from pi2rt.engine.sampling_params import SamplingKeywords
from pi2rt.model_info import ModelInfo
from pi2rt.runtime.executor import Progress as ProgressCallback
from pi2rt.runtime.step import Floats
from pi2rt.tokenizer import Tokenizer
from pi2rt.trio_runtime import Prompt, Runtime, RuntimeStatistics

T = TypeVar("T")


class AsyncEngine:
    """``async with AsyncEngine("smollm2") as engine: async for chunk in engine.stream("Why?"): ...``

    Belongs to the event loop that started it. Progress callbacks run in that loop.

    Args:
        model: as ``open_runtime``.
        options: as ``open_runtime``; see ``RuntimeOptions``.
    """

    def __init__(
        self, model: str | os.PathLike[str], **options: Unpack[runtime_options.RuntimeKeywords]
    ) -> None:
        runtime_options.RuntimeOptions(**options)  # a mistake shows here, not at the start
        self._model, self._options = model, options
        self._thread: RuntimeThread | None = None
        self._runtime: Runtime | None = None

    @classmethod
    def open(cls, model: str | os.PathLike[str], **options: Unpack[runtime_options.RuntimeKeywords]) -> Self:
        """``async with AsyncEngine.open("smollm2") as engine: ...``, the same as the constructor."""
        return cls(model, **options)

    async def start(self) -> Self:
        """Loads the model; cancelling it abandons the load. ``async with`` calls it.

        Raises: as ``open_runtime``.
        """
        if self._thread is not None:
            raise BusyError("this engine was started already; make another one")
        loop = asyncio.get_running_loop()
        on_load = self._options.get("on_load")

        def report(progress: Progress) -> None:
            assert on_load is not None
            loop.call_soon_threadsafe(on_load, progress.done, progress.total)

        self._thread = RuntimeThread(self._model, self._options, None if on_load is None else report)
        self._finalizer = weakref.finalize(self, self._thread.abandon)
        try:
            self._runtime = await asyncio.wrap_future(self._thread.ready)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def aclose(self) -> None:
        """Ends all requests with ClosedError and frees the model. Safe to call twice."""
        if self._thread is not None:
            self._thread.close()
            await _shielded(asyncio.get_running_loop().run_in_executor(None, self._thread.join))

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
        **overrides: Unpack[SamplingKeywords],
    ) -> AsyncStream:
        """``async for chunk in engine.stream("Why?", max_tokens=50): ...``

        Arguments and errors as for ``Runtime.stream``. Leaving the loop, cancelling the task or dropping
        the iterator ends the request; ``async with engine.stream(...) as chunks`` says so in so many words.
        """
        thread, _ = self._started()
        params = replace(params or SamplingParams(), **overrides)
        return AsyncStream(self, thread, prompt, params, on_prefill)

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_prefill: ProgressCallback | None = None,
        **overrides: Unpack[SamplingKeywords],
    ) -> Completion:
        """The whole text at once. Arguments and errors as for ``stream``."""
        params = replace(params or SamplingParams(), **overrides)
        if on_prefill is None:
            return await self._call(lambda runtime: runtime.generate(prompt, params))
        async with self.stream(prompt, params, on_prefill=on_prefill) as chunks:
            return Completion.of([chunk async for chunk in chunks])

    async def score(self, tokens: Iterable[int]) -> Floats:
        """As ``Runtime.score``."""
        return await self._call(lambda runtime: runtime.score(tokens))

    async def logits(self, tokens: Iterable[int]) -> Floats:
        """As ``Runtime.logits``."""
        return await self._call(lambda runtime: runtime.logits(tokens))

    async def resize(self, memory: int | str) -> None:
        """As ``Runtime.resize``."""
        await self._call(lambda runtime: runtime.resize(memory))

    async def statistics(self) -> RuntimeStatistics:
        """As ``Runtime.statistics``."""

        async def ask(runtime: Runtime) -> RuntimeStatistics:
            return runtime.statistics()

        return await self._call(ask)

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


class AsyncStream:
    """The chunks of one request. It starts with the first chunk asked for, or on entering ``async with``."""

    def __init__(
        self,
        engine: object,
        thread: RuntimeThread,
        prompt: Prompt,
        params: SamplingParams,
        on_prefill: ProgressCallback | None,
    ) -> None:
        self._engine = engine  # which closes when nobody knows it any more
        self._thread, self._prompt, self._params = thread, prompt, params
        self._on_prefill = on_prefill
        self._inbox: _Inbox | None = None
        self._pump: Pump | None = None
        self._over = False

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        try:
            return await self._next()
        except BaseException:  # cancelled, failed or at its end
            await self.aclose()
            raise

    async def __aenter__(self) -> Self:
        self._start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Ends the request. Does not wait."""
        self._end()

    def __del__(self) -> None:
        # Breaking out of the loop drops the iterator: that ends the request too.
        self._end()

    def _start(self) -> tuple[Pump, _Inbox]:
        if self._pump is None or self._inbox is None:
            self._inbox = inbox = _Inbox(asyncio.get_running_loop())
            self._pump = Pump(
                self._thread,
                self._prompt,
                self._params,
                inbox.deliver,
                report_prefill=self._on_prefill is not None,
            )
            self._thread.start(self._pump)
        return self._pump, self._inbox

    async def _next(self) -> Chunk:
        if self._over:
            raise StopAsyncIteration
        pump, inbox = self._start()
        while True:
            item = await inbox.take()
            if isinstance(item, Chunk):
                pump.took()
                return item
            if isinstance(item, Progress):
                if self._on_prefill is not None:
                    self._on_prefill(item.done, item.total)
            elif item.error is None:
                raise StopAsyncIteration
            else:
                raise item.error

    def _end(self) -> None:
        if not self._over:
            self._over = True
            if self._pump is not None:
                self._pump.cancel()


class _Inbox:
    """What has arrived in an event loop. Holds no reference to the stream, which may be dropped at any
    time."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._items: deque[Item] = deque()
        self._reader: asyncio.Future[None] | None = None

    def deliver(self, item: Item) -> None:
        """On the runtime's thread. Raises RuntimeError where the loop is closed."""
        self._loop.call_soon_threadsafe(self._put, item)

    async def take(self) -> Item:
        while not self._items:
            if self._reader is not None:
                raise BusyError("another task is waiting for a chunk of this stream")
            self._reader = self._loop.create_future()
            try:
                await self._reader
            finally:
                self._reader = None
        return self._items.popleft()

    def _put(self, item: Item) -> None:
        self._items.append(item)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)


async def _shielded(future: asyncio.Future[Any]) -> None:
    """Waits for ``future`` whatever happens, then lets a cancellation through."""
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.shield(future)
        except asyncio.CancelledError as error:
            cancelled = error
    if cancelled is not None:
        raise cancelled
    future.result()
