"""A lane: the steps of one actor, submitted ahead of their results, which come back in order."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import Protocol

import trio

from pi2rt.engine.scheduler import Flight
from pi2rt.runtime.step import Step, StepResult
from pi2rt.runtime.token_mask import TokenMask

RUN_AHEAD_S = 0.03
"""Work that waits behind the step that runs: at least one step, so that the executor never idles, and of short
steps more, so that it can report several at once. What waits delays a new request, and is discarded when a
text ends."""


MOST_WITH_PROMPTS = 2
"""Steps in flight, at most, while one of them has prompt tokens."""


def rows_in_flight(max_tokens: int, in_flight: int, slots: int) -> int:
    """Rows that the steps of a lane carry at once, at most. ``max_tokens``: in one step of it; ``in_flight``: steps
    that its executor takes; ``slots``: sequences.

    ``Lane.may_run_ahead`` is why. A step without prompt tokens has a row of each sequence at most. One with prompt
    tokens is submitted behind another such one alone; or behind steps without, ``in_flight`` - 1 of them at most; and
    no step behind these. What returns takes its rows along.
    """
    return max_tokens + max(max_tokens * (min(in_flight, MOST_WITH_PROMPTS) - 1), (in_flight - 1) * slots)


class StepActor(Protocol):
    """What the engine needs of an actor (``pi2rt.runtime.actor.Actor``)."""

    @property
    def name(self) -> str: ...

    @property
    def generation(self) -> int: ...

    @property
    def max_in_flight(self) -> int: ...

    @property
    def usable(self) -> bool: ...

    @property
    def takes_masks(self) -> bool: ...

    async def submit(self, step: Step, /) -> None: ...

    async def result(self) -> StepResult: ...

    def stop(self, step_id: int, /) -> None: ...

    def mask(self, step_id: int, slot: int, allowed: TokenMask | None, /) -> None: ...

    async def gone(self) -> bool: ...


@dataclass(frozen=True, slots=True)
class PrefillLane:
    """An actor that computes prompts beside the one that decodes, into the same KV pages. ``max_tokens``: in one step
    of it. ``least_tokens``: a prompt with fewer to compute stays with the lane that decodes; at least 1."""

    actor: StepActor
    max_tokens: int
    least_tokens: int = 1


@dataclass(frozen=True, slots=True)
class LaneStatistics:
    """A snapshot. ``role``: "decode" also computes prompts; "prefill" computes all tokens of a prompt but the last.
    ``prefill_tokens``: computed by this lane, those computed again included. ``handed_over``: sequences that went on
    in the lane that decodes. ``lost``: executors."""

    name: str
    role: str
    steps: int
    steps_in_flight: int
    prefill_tokens: int
    handed_over: int
    lost: int


class Lane:
    """``number``: 0 decodes, and computes the prompts that no other lane takes."""

    __slots__ = (
        "actor", "depth", "flights", "generation", "handed_over", "lost", "number", "prefilled", "steps", "work",
    )  # fmt: skip

    def __init__(self, number: int, actor: StepActor) -> None:
        self.number = number
        self.actor = actor
        self.generation = actor.generation
        self.flights: deque[Flight] = deque()
        self.depth = 2  # steps in flight, at most, while none of them has prompt tokens
        self.work = trio.Event()
        self.steps = self.prefilled = self.handed_over = self.lost = 0

    def may_run_ahead(self) -> bool:
        """Whether another step may wait behind those in flight. How long one with prompt tokens takes, the time of the
        last step does not tell, so that a single step waits behind such a one."""
        prefills = any(flight.prefills for flight in self.flights)
        most = MOST_WITH_PROMPTS if prefills else self.depth
        return len(self.flights) < min(most, self.actor.max_in_flight)

    def returned(self, result: StepResult) -> None:
        """A step has returned: it tells how long steps take."""
        self.steps += 1
        step_s = (result.finished_ns - result.started_ns) / 1e9
        self.depth = 2 + int(RUN_AHEAD_S / max(step_s, 1e-4))

    async def until_work(self) -> None:
        """Waits for ``wake``."""
        self.work = trio.Event()
        await self.work.wait()

    def wake(self) -> None:
        """There may be something to compose again."""
        self.work.set()

    def statistics(self) -> LaneStatistics:
        return LaneStatistics(
            name=self.actor.name,
            role="prefill" if self.number else "decode",
            steps=self.steps,
            steps_in_flight=len(self.flights),
            prefill_tokens=self.prefilled,
            handed_over=self.handed_over,
            lost=self.lost,
        )
