"""The consumer's end of a request: an async iterator of chunks that can be left at any time."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import TracebackType

import trio

from pi2rt._errors import ClosedError
from pi2rt.engine.chunk import Chunk


class TokenStream:
    """``async with engine.stream(...) as chunks: async for chunk in chunks: ...``

    Leaving the ``async with`` block, for whatever reason, ends the request. At most ``capacity`` chunks wait here; a
    consumer that falls that far behind pauses its own sequence, and no other, until half of them are taken.
    """

    __slots__ = ("_drained", "_error", "_left", "_paused", "_put", "_receive", "_send", "_taken", "capacity")

    def __init__(self, capacity: int) -> None:
        # The engine counts what it puts, so the channel itself needs no bound.
        self._send, self._receive = trio.open_memory_channel[Chunk](math.inf)
        self.capacity = capacity
        self._put = self._taken = 0
        self._paused = False
        self._error: BaseException | None = None
        self._left: Callable[[], None] = _nothing
        self._drained: Callable[[], None] = _nothing

    def attach(self, left: Callable[[], None], drained: Callable[[], None]) -> None:
        """For the engine: what to call when the consumer leaves, and when a paused stream has room again."""
        self._left, self._drained = left, drained

    def put(self, chunk: Chunk) -> None:
        self._put += 1
        self._send.send_nowait(chunk)

    def end(self, error: BaseException | None = None) -> None:
        """No more chunks. ``error`` is raised in the consumer, after the chunks that are still here."""
        if self._error is None:
            self._error = error
        self._send.close()

    def pause(self, expected: int) -> bool:
        """Whether the sequence has to wait for its consumer, given ``expected`` chunks on their way."""
        waiting = self._put - self._taken
        if self._paused:
            self._paused = waiting > self.capacity // 2
        else:
            self._paused = waiting + expected >= self.capacity
        return self._paused

    def close(self) -> None:
        """Ends the request. Its memory is freed when the steps that it is part of have returned."""
        self._left()
        self._send.close()
        self._receive.close()

    def __aiter__(self) -> TokenStream:
        return self

    async def __anext__(self) -> Chunk:
        try:
            chunk = await self._receive.receive()
        except trio.EndOfChannel:
            if self._error is not None:
                raise self._error from self._error.__cause__
            raise StopAsyncIteration from None
        except trio.ClosedResourceError:
            raise ClosedError("this stream was left already") from None
        self._taken += 1
        if self._paused and self._put - self._taken <= self.capacity // 2:
            self._drained()
        return chunk

    async def __aenter__(self) -> TokenStream:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _nothing() -> None: ...
