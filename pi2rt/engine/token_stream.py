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
from pi2rt.engine.chunk import Chunk, Timing
from pi2rt.host.owner import Owner

CLOSED = "this stream was closed"
BUSY = "another consumer is waiting for a chunk of this stream; give each request one consumer"


class TokenStream:
    """``async with engine.stream(...) as chunks: async for chunk in chunks: ...``

    Leaving the ``async with`` block, for whatever reason, ends the request. At most ``capacity`` chunks
    wait here; a consumer that falls that far behind pauses its own sequence, and no other, until half of
    them are taken.

    One task at a time takes chunks. A cancelled ``__anext__`` loses none: the next call goes on.
    """

    __slots__ = (
        "_chunks", "_closed", "_drained", "_ended", "_error", "_final", "_left", "_owner", "_paused", "_reader",
        "_reading", "_timing", "capacity",
    )  # fmt: skip

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._chunks: deque[Chunk] = deque()
        self._owner = Owner()
        self._reading = False  # a task is in __anext__
        self._reader: trio.lowlevel.Task | None = None  # and waits for a chunk or the end
        self._paused = False
        self._ended = False
        self._closed = False
        self._error: BaseException | None = None
        self._left: Callable[[], None] = _nothing
        self._drained: Callable[[], None] = _nothing
        self._timing: Callable[[], Timing] = Timing
        self._final: Timing | None = None  # once the request has ended

    def attach(
        self, left: Callable[[], None], drained: Callable[[], None], timing: Callable[[], Timing] = Timing
    ) -> None:
        """For the engine: what to call when the consumer leaves, and when a paused stream has space again; and what
        the request has used."""
        self._left, self._drained, self._timing = left, drained, timing

    @property
    def timing(self) -> Timing:
        """What the request has used so far, or had used when it ended, was cancelled or failed. Safe from any
        thread."""
        timing = (
            self._timing()
        )  # first: where another thread ends the request meanwhile, the final one is there
        return self._final or timing

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
            self._final, self._timing = self._final or self._timing(), Timing
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
        """Ends the request; whoever waits for a chunk gets ClosedError. Its memory is freed when the steps that it is
        part of have returned. Safe to call twice."""
        if self._closed or self._owner.elsewhere:
            return
        self._closed = True
        if self._chunks:
            self._chunks.clear()
            self._ended = False  # the consumer has not come to that end
        self.end(ClosedError(CLOSED))
        self._left()
        self._left = self._drained = _nothing  # or the request and its stream would keep each other

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Chunk:
        """The next chunk.

        Raises:
            ExecutorError: the executor failed on this request.
            ClosedError: the stream or the engine was closed, or this is a forked child.
            BusyError: another task is waiting for a chunk of this stream.
        """
        self._owner.check()
        await trio.lowlevel.checkpoint_if_cancelled()
        if self._reading:
            raise BusyError(BUSY)
        self._reading = True
        try:
            if self._chunks or self._ended:
                await trio.lowlevel.cancel_shielded_checkpoint()
            else:
                self._reader = trio.lowlevel.current_task()
                await trio.lowlevel.wait_task_rescheduled(self._abort)
        finally:
            self._reading = False
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
