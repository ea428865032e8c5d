"""The consumer's end of a request: an async iterator of chunks that can be left at any time.

Not a Trio memory channel, because the engine has to know how far the consumer is behind (to pause its
sequence instead of waiting for it), and because this is on the path of every token: one wake-up of the
consumer and nothing else.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Self

import trio

from pi2rt._errors import BusyError, ClosedError
from pi2rt.engine.chunk import Chunk


class TokenStream:
    """``async with engine.stream(...) as chunks: async for chunk in chunks: ...``

    Leaving the ``async with`` block, for whatever reason, ends the request. At most ``capacity`` chunks
    wait here; a consumer that falls that far behind pauses its own sequence, and no other, until half of
    them are taken.
    """

    __slots__ = (
        "_chunks", "_closed", "_drained", "_ended", "_error", "_left", "_paused", "_reader", "capacity",
    )  # fmt: skip

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._chunks: deque[Chunk] = deque()
        self._reader: trio.lowlevel.Task | None = None  # waits for a chunk or the end
        self._paused = False
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        self._left: Callable[[], None] = _nothing
        self._drained: Callable[[], None] = _nothing

    def attach(self, left: Callable[[], None], drained: Callable[[], None]) -> None:
        """For the engine: what to call when the consumer leaves, and when a paused stream has room again."""
        self._left, self._drained = left, drained

    def put(self, chunk: Chunk) -> None:
        """For the engine; never waits. Ignored after the consumer has left."""
        if not self._closed:
            self._chunks.append(chunk)
            if self._reader is not None:
                self._wake()

    def end(self, error: BaseException | None = None) -> None:
        """For the engine: no more chunks. ``error`` is raised in the consumer, after the chunks that are
        still here."""
        if not self._ended:
            self._ended, self._error = True, error
            if self._reader is not None:
                self._wake()

    def pause(self, expected: int) -> bool:
        """Whether the sequence has to wait for its consumer, given ``expected`` chunks on their way."""
        waiting = len(self._chunks)
        if self._paused:
            self._paused = waiting > self.capacity // 2
        elif waiting:
            self._paused = waiting + expected >= self.capacity
        return self._paused

    def close(self) -> None:
        """Ends the request. Its memory is freed when the steps that it is part of have returned."""
        if not self._closed:
            self._closed = True
            self._chunks.clear()
            if self._reader is not None:
                self._wake()
            self._left()

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk.

        Raises:
            ExecutorError: the executor failed on this request.
            ClosedError: the stream was left, or the runtime closed.
            BusyError: another task is waiting for a chunk of this stream.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._reader is not None:
            raise BusyError("another task is waiting for a chunk of this stream")
        if self._chunks or self._ended or self._closed:
            await trio.lowlevel.cancel_shielded_checkpoint()
        else:
            self._reader = trio.lowlevel.current_task()
            await trio.lowlevel.wait_task_rescheduled(self._abort)
        if self._closed:
            raise ClosedError("this stream was left already")
        if not self._chunks:
            if self._error is not None:
                raise self._error from self._error.__cause__
            raise StopAsyncIteration
        chunk = self._chunks.popleft()
        if self._paused and len(self._chunks) <= self.capacity // 2:
            self._drained()
        return chunk

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _wake(self) -> None:
        reader, self._reader = self._reader, None
        assert reader is not None
        trio.lowlevel.reschedule(reader)

    def _abort(self, _: object) -> trio.lowlevel.Abort:
        self._reader = None
        return trio.lowlevel.Abort.SUCCEEDED


def _nothing() -> None: ...
