"""What the engine has done and is doing."""

from __future__ import annotations

from dataclasses import dataclass

from pi2rt.engine.lane import LaneStatistics
from pi2rt.engine.queue import QueueStatistics
from pi2rt.memory import PagePoolStatistics, PrefixIndexStatistics, WindowPoolStatistics


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A snapshot. ``requests`` = finished + cancelled + failed + those in the queue or running; one whose prompt is
    still being tokenised is in the queue, but not yet among them."""

    requests: int
    finished: int
    cancelled: int
    failed: int
    waiting: int
    """Without a slot: those in ``queue``, and preempted ones."""
    prefilling: int
    decoding: int
    leaving: int
    """Sequences that have ended, or were preempted, with steps still in flight."""
    free_slots: int
    steps: int
    steps_in_flight: int
    prefill_tokens: int
    """Prompt tokens computed, those computed again included."""
    generated_tokens: int
    discarded_slices: int
    """Slices computed for nothing, because the step before had ended the sequence."""
    preemptions: int
    rebuilds: int
    queue: QueueStatistics
    pages: PagePoolStatistics
    prefixes: PrefixIndexStatistics
    windows: WindowPoolStatistics | None
    """None: no block looks back a window only, or all pages have memory for all blocks."""
    lanes: tuple[LaneStatistics, ...]
