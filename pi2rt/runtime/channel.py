"""A named, bounded channel between tasks: Trio's memory channel, with counts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import trio
from trio.abc import ReceiveChannel, SendChannel

from pi2rt._errors import ClosedError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ChannelStatistics:
    """A snapshot. ``peak_buffered``: the most that ever lay there, to choose ``capacity`` from a real run;
    ``waiting_*``: tasks that wait for room or for an item."""

    name: str
    capacity: int
    sent: int = 0
    received: int = 0
    buffered: int = 0
    peak_buffered: int = 0
    waiting_senders: int = 0
    waiting_receivers: int = 0
    closed: bool = False


class _Shared:
    """What both ends count together."""

    __slots__ = ("capacity", "closed", "name", "peak", "received", "sent")

    def __init__(self, name: str, capacity: int) -> None:
        self.name, self.capacity = name, capacity
        self.sent = self.received = self.peak = 0
        self.closed = False

    def statistics(self, inner: trio.MemoryChannelStatistics) -> ChannelStatistics:
        return ChannelStatistics(
            name=self.name,
            capacity=self.capacity,
            sent=self.sent,
            received=self.received,
            buffered=inner.current_buffer_used,
            peak_buffered=self.peak,
            waiting_senders=inner.tasks_waiting_send,
            waiting_receivers=inner.tasks_waiting_receive,
            closed=self.closed,
        )


class Sender(SendChannel[T]):
    """The end that items go into. Made by ``open_channel``."""

    def __init__(self, inner: trio.MemorySendChannel[T], shared: _Shared) -> None:
        self._inner, self._shared = inner, shared

    async def send(self, value: T) -> None:
        """Waits for room.

        Raises:
            ClosedError: this end is closed.
            trio.BrokenResourceError: the other end is closed, so nobody will ever receive it.
        """
        try:
            await self._inner.send(value)
        except trio.ClosedResourceError:
            raise ClosedError(f"channel {self._shared.name!r}: the sending end is closed") from None
        self._count()

    def send_nowait(self, value: T) -> None:
        """Like ``send``, or trio.WouldBlock where there is no room."""
        try:
            self._inner.send_nowait(value)
        except trio.ClosedResourceError:
            raise ClosedError(f"channel {self._shared.name!r}: the sending end is closed") from None
        self._count()

    def close(self) -> None:
        """The receiver still gets what is buffered, then the end. Safe to call twice."""
        self._shared.closed = True
        self._inner.close()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def statistics(self) -> ChannelStatistics:
        """Counts of the whole channel, the same from either end."""
        return self._shared.statistics(self._inner.statistics())

    def _count(self) -> None:
        shared = self._shared
        shared.sent += 1
        shared.peak = max(shared.peak, self._inner.statistics().current_buffer_used)


class Receiver(ReceiveChannel[T]):
    """The end that items come out of, in the order they were sent. Made by ``open_channel``."""

    def __init__(self, inner: trio.MemoryReceiveChannel[T], shared: _Shared) -> None:
        self._inner, self._shared = inner, shared

    async def receive(self) -> T:
        """Waits for an item. ``async for`` does the same until the end.

        Raises:
            ClosedError: this end is closed.
            trio.EndOfChannel: the sending end is closed and nothing is left.
        """
        try:
            value = await self._inner.receive()
        except trio.ClosedResourceError:
            raise ClosedError(f"channel {self._shared.name!r}: the receiving end is closed") from None
        self._shared.received += 1
        return value

    def receive_nowait(self) -> T:
        """Like ``receive``, or trio.WouldBlock where there is no item."""
        try:
            value = self._inner.receive_nowait()
        except trio.ClosedResourceError:
            raise ClosedError(f"channel {self._shared.name!r}: the receiving end is closed") from None
        self._shared.received += 1
        return value

    def close(self) -> None:
        """Drops what is buffered. Safe to call twice."""
        self._shared.closed = True
        self._inner.close()

    async def aclose(self) -> None:
        self.close()
        await trio.lowlevel.checkpoint()

    def statistics(self) -> ChannelStatistics:
        """Counts of the whole channel, the same from either end."""
        return self._shared.statistics(self._inner.statistics())


class open_channel(tuple[Sender[T], Receiver[T]], Generic[T]):
    """``sender, receiver = open_channel[Step]("steps", 4)``.

    Written like a function, a class only so that it can be subscripted with the type of its items, as Trio's
    own ``open_memory_channel``. ``capacity`` 0 hands each item from task to task.
    """

    __slots__ = ()

    def __new__(cls, name: str, capacity: int) -> open_channel[T]:
        if capacity < 0:
            raise ValueError(f"channel {name!r}: capacity must not be negative, not {capacity}")
        shared = _Shared(name, capacity)
        send, receive = trio.open_memory_channel[T](capacity)
        return super().__new__(cls, (Sender(send, shared), Receiver(receive, shared)))
