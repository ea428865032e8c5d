"""What a queue between two tasks counts."""

from __future__ import annotations

from dataclasses import dataclass


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
