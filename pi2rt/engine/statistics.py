"""What the engine has done and is doing."""

from __future__ import annotations

from dataclasses import dataclass

from pi2rt.memory import PagePoolStatistics, PrefixIndexStatistics


@dataclass(frozen=True, slots=True)
class EngineStatistics:
    """A snapshot. ``requests`` = finished + cancelled + failed + those waiting or running."""

    requests: int
    finished: int
    cancelled: int
    failed: int
    waiting: int
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
    pages: PagePoolStatistics
    prefixes: PrefixIndexStatistics
