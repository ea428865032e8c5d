"""The three APIs behind one: a line of the contract is written once, as an async function, and runs over each of them.

Over the synchronous API such a function never waits: its calls block, and ``run`` steps it to its end.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Self, TypeVar

import trio

import pi2rt
from pi2rt.executors.simulated.executor import SimulatedExecutor
from pi2rt.runtime.step import StepResult

T = TypeVar("T")
Line = Callable[[], Coroutine[Any, Any, T]]

LIMIT = 60  # seconds that a line may take, at most


class Gate:
    """What an executor waits at, until somebody opens it from any thread."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self._open = False
        self._token: trio.lowlevel.TrioToken | None = None
        self._event = trio.Event()

    async def passed(self) -> None:
        self._token = trio.lowlevel.current_trio_token()
        self.reached.set()
        if not self._open:
            await self._event.wait()

    def open(self) -> None:
        self._open = True
        if self._token is not None:
            self._token.run_sync_soon(self._event.set)


class GatedExecutor(SimulatedExecutor):
    """Gives no result of step ``at``, and of later ones, before the gate is open or the step is stopped."""

    def __init__(self, gate: Gate, at: int, **options: Any) -> None:
        super().__init__(**options)
        self._gate, self._at = gate, at

    async def wait(self) -> StepResult:
        if self._queue[0].step.id >= self._at:
            await self._gate.passed()
        return await super().wait()

    def stop(self, step_id: int) -> None:
        super().stop(step_id)
        self._gate.open()


class TrioApi:
    name = "trio"
    engine: type = pi2rt.Runtime

    def run(self, line: Line[T]) -> T:
        async def limited() -> T:
            with trio.fail_after(LIMIT):
                return await line()

        return trio.run(limited)

    def open(self, model: str | os.PathLike[str], **options: Any) -> Any:
        return pi2rt.open_runtime(model, **options)

    async def close(self, engine: Any, **keywords: Any) -> None:
        await engine.aclose(**keywords)

    async def close_stream(self, chunks: Any) -> None:
        chunks.close()

    async def turn(self) -> None:
        await trio.lowlevel.checkpoint()

    async def together(self, *lines: Line[Any]) -> list[Any]:
        """Results of all, errors among them."""
        results: list[Any] = [None] * len(lines)

        async def one(index: int) -> None:
            try:
                results[index] = await lines[index]()
            except Exception as error:
                results[index] = error

        async with trio.open_nursery() as nursery:
            for index in range(len(lines)):
                nursery.start_soon(one, index)
        return results

    async def cancelled(self, function: Callable[[Callable[[], None]], Awaitable[object]]) -> bool:
        """Whether ``function(cancel)``, which calls ``cancel()`` at some time, ended by that."""
        with trio.CancelScope() as scope:
            await function(scope.cancel)
        return scope.cancelled_caught

    async def pull(self, *arguments: Any) -> Path:
        return await pi2rt.pull(*arguments)

    async def ensure_pack(self, *arguments: Any) -> Path:
        return await pi2rt.ensure_pack(*arguments)


class AsyncioApi:
    name = "asyncio"
    engine: type = pi2rt.AsyncEngine

    def run(self, line: Line[T]) -> T:
        async def limited() -> T:
            return await asyncio.wait_for(line(), LIMIT)

        return asyncio.run(limited())

    def open(self, model: str | os.PathLike[str], **options: Any) -> Any:
        return pi2rt.AsyncEngine(model, **options)

    async def close(self, engine: Any, **keywords: Any) -> None:
        await engine.aclose(**keywords)

    async def close_stream(self, chunks: Any) -> None:
        await chunks.aclose()

    async def turn(self) -> None:
        await asyncio.sleep(0)

    async def together(self, *lines: Line[Any]) -> list[Any]:
        return await asyncio.gather(*(line() for line in lines), return_exceptions=True)

    async def cancelled(self, function: Callable[[Callable[[], None]], Awaitable[object]]) -> bool:
        task: asyncio.Task[object]

        async def body() -> object:
            return await function(cancel)

        def cancel() -> None:
            task.cancel()

        task = asyncio.create_task(body())
        await asyncio.wait([task])
        return task.cancelled()

    async def pull(self, *arguments: Any) -> Path:
        return await pi2rt.AsyncEngine.pull(*arguments)

    async def ensure_pack(self, *arguments: Any) -> Path:
        return await pi2rt.AsyncEngine.ensure_pack(*arguments)


class SyncStream:
    """A ``pi2rt.Stream`` for lines of the contract."""

    def __init__(self, stream: pi2rt.Stream) -> None:
        self.stream = stream

    @property
    def timing(self) -> pi2rt.Timing:
        return self.stream.timing

    async def __aenter__(self) -> Self:
        self.stream.__enter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        self.stream.__exit__(*error)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> pi2rt.Chunk:
        try:
            return next(self.stream)
        except StopIteration:
            raise StopAsyncIteration from None


class SyncEngine:
    """A ``pi2rt.Engine`` for lines of the contract."""

    def __init__(self, engine: pi2rt.Engine) -> None:
        self.engine = engine
        self.tokenizer, self.model, self.statistics = engine.tokenizer, engine.model, engine.statistics

    def stream(self, *arguments: Any, **keywords: Any) -> SyncStream:
        return SyncStream(self.engine.stream(*arguments, **keywords))

    async def generate(self, *arguments: Any, **keywords: Any) -> pi2rt.Completion:
        return self.engine.generate(*arguments, **keywords)

    async def score(self, *arguments: Any) -> Any:
        return self.engine.score(*arguments)

    async def logits(self, *arguments: Any) -> Any:
        return self.engine.logits(*arguments)

    async def resize(self, *arguments: Any) -> None:
        self.engine.resize(*arguments)


class SyncApi:
    name = "sync"
    engine: type = pi2rt.Engine

    def run(self, line: Line[T]) -> T:
        coroutine = line()
        try:
            coroutine.send(None)
        except StopIteration as end:
            value: T = end.value
            return value
        raise AssertionError("a synchronous call has waited")

    @asynccontextmanager
    async def open(self, model: str | os.PathLike[str], **options: Any) -> AsyncIterator[SyncEngine]:
        with pi2rt.Engine(model, **options) as engine:
            yield SyncEngine(engine)

    async def close(self, engine: SyncEngine, **keywords: Any) -> None:
        engine.engine.close(**keywords)

    async def close_stream(self, chunks: SyncStream) -> None:
        chunks.stream.close()

    async def turn(self) -> None:
        threading.Event().wait(0.001)  # other threads

    async def together(self, *lines: Line[Any]) -> list[Any]:
        results: list[Any] = [None] * len(lines)

        def one(index: int) -> None:
            try:
                results[index] = self.run(lines[index])
            except Exception as error:
                results[index] = error

        threads = [threading.Thread(target=one, args=(index,), daemon=True) for index in range(len(lines))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(LIMIT)
            assert not thread.is_alive()
        return results

    async def cancelled(self, function: Callable[[Callable[[], None]], Awaitable[object]]) -> bool:
        def interrupt() -> None:  # as Ctrl-C does
            raise KeyboardInterrupt

        try:
            await function(interrupt)
        except KeyboardInterrupt:
            return True
        return False

    async def pull(self, *arguments: Any) -> Path:
        return pi2rt.Engine.pull(*arguments)

    async def ensure_pack(self, *arguments: Any) -> Path:
        return pi2rt.Engine.ensure_pack(*arguments)


APIS = (TrioApi(), AsyncioApi(), SyncApi())


def parameters(method: Any) -> dict[str, Any]:
    """Of a method: (kind, default) by name."""
    return {
        name: (each.kind, each.default)
        for name, each in inspect.signature(method).parameters.items()
        if name != "self"
    }
