"""The bound on requests that wait: a place in the queue is taken before anything is done for a request."""

from __future__ import annotations

from dataclasses import dataclass
from types import TracebackType
from typing import Self

from pi2rt._errors import BusyError


@dataclass(frozen=True, slots=True)
class QueueStatistics:
    """``capacity``: requests that may wait while every slot is taken. ``waiting``: requests without a slot so far,
    those included whose prompt is still being tokenised; ``peak``: the most there ever were. ``refused``: with
    BusyError."""

    capacity: int
    waiting: int
    peak: int
    refused: int


class Ticket:
    """A place in the queue, held until the request has a slot, or has failed. ``since``: Trio's time.

    As a context manager it gives the place back on leaving the block, unless a request has taken the ticket over::

        with engine.reserve() as ticket:
            tokens = await tokenise(text)
            stream = engine.stream(tokens, ticket=ticket)
    """

    __slots__ = ("_held", "_queue", "_used", "since")

    def __init__(self, queue: Queue, since: float) -> None:
        self._queue = queue
        self._held, self._used = True, False
        self.since = since

    @property
    def held(self) -> bool:
        return self._held

    def use(self) -> None:
        """For the engine: a request takes the ticket over.

        Raises:
            BusyError: it was used or given back before; one is good for one request.
        """
        if self._used or not self._held:
            raise BusyError("this place in the queue was used or given back already; reserve another one")
        self._used = True

    def release(self) -> None:
        """Gives the place back. Safe to call twice."""
        if self._held:
            self._held = False
            self._queue.waiting -= 1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._used:
            self.release()


class Queue:
    """Counts tickets. Preempted sequences have none: they were admitted before.

    Args:
        capacity: requests that may wait while every slot is taken.
        slots: sequences that run at once, for messages.
    """

    __slots__ = ("_capacity", "_peak", "_refused", "_slots", "waiting")

    def __init__(self, capacity: int, slots: int) -> None:
        self._capacity, self._slots = capacity, slots
        self._peak = self._refused = 0
        self.waiting = 0
        """Tickets that are held."""

    def reserve(self, free: int, now: float) -> Ticket:
        """A place, where fewer than the capacity wait, beside those that the ``free`` slots will take at once.

        Raises:
            BusyError: the queue is full.
        """
        if self.waiting >= self._capacity + free:
            self._refused += 1
            raise BusyError(
                f"the queue is full: {self.waiting} requests wait for one of {self._slots} slots, and "
                f"max_queue={self._capacity} is the limit; try again when one has ended, or open the runtime with a "
                f"larger max_queue"
            )
        self.waiting += 1
        self._peak = max(self._peak, self.waiting)
        return Ticket(self, now)

    def statistics(self) -> QueueStatistics:
        return QueueStatistics(self._capacity, self.waiting, self._peak, self._refused)
