"""One request on its way through the engine: its tokens, where they live, and how far it is."""

from __future__ import annotations

from array import array
from collections.abc import Callable
from enum import Enum, auto

import numpy as np

from pi2rt.engine.masker import Masker
from pi2rt.engine.queue import Ticket
from pi2rt.engine.reading import Reading
from pi2rt.engine.token_stream import TokenStream
from pi2rt.engine.writer import Writer
from pi2rt.memory import PageTable
from pi2rt.runtime.step import Bind, Int32s, Sampling

NO_LANE = -1


class SequenceState(Enum):
    """WAITING -> PREFILL -> DECODE -> LEAVING -> GONE; a preempted sequence goes from LEAVING back to
    WAITING."""

    WAITING = auto()
    """In the queue. Holds no slot and no page."""
    PREFILL = auto()
    """Holds a slot and pages for all tokens it knows; some of them are not submitted yet."""
    DECODE = auto()
    """All it knows is submitted; each further slice is one token, sampled by the slice before."""
    LEAVING = auto()
    """Finished, failed, cancelled or preempted, but steps with slices of it are in flight. What they bring
    is discarded."""
    GONE = auto()
    """Holds nothing."""


class Sequence:
    """Positions are counted four ways, each at most the next: ``computed`` (their steps have returned),
    ``submitted`` (their steps were submitted), ``expected`` (tokens known or being sampled in flight),
    ``limit`` (tokens there may ever be).
    """

    __slots__ = (
        "again", "begun", "bound", "computed", "expected", "first_ns", "id", "in_flight", "known", "lane", "last_ns",
        "leader", "limit", "masker", "on_prefill", "overtaken", "paused", "prompt", "reading", "refused", "sampling",
        "slot", "started_ns", "state", "stream", "submitted", "table", "ticket", "writer",
    )  # fmt: skip

    def __init__(
        self,
        id: int,  # noqa: A002
        prompt: array[int],
        limit: int,
        sampling: Sampling,
        stream: TokenStream,
        table: PageTable,
        output: Writer | Reading,
        ticket: Ticket,
        on_prefill: Callable[[int, int], None] | None = None,
        masker: Masker | None = None,
    ) -> None:
        self.id = id
        self.known = prompt
        self.prompt = len(prompt)
        self.limit = limit
        self.sampling = sampling
        self.stream = stream
        self.table = table
        self.writer = output if isinstance(output, Writer) else None
        self.reading = output if isinstance(output, Reading) else None
        self.ticket = ticket  # held until there is a slot
        self.on_prefill = on_prefill
        self.masker = masker
        self.state = SequenceState.WAITING
        self.slot = -1
        self.computed = self.submitted = 0
        self.expected = len(prompt)
        self.in_flight = 0  # steps
        self.paused = False
        self.again = False  # LEAVING, but to be computed again from its known tokens
        self.begun = False  # a step with tokens of it was submitted since it left the queue
        self.lane = 0  # whose steps its next slices go into; 0: the one that decodes
        self.bound = NO_LANE  # the lane whose executor knows its slot
        self.refused: tuple[int, int] | None = None  # pages available, sequences running, when it got none
        self.overtaken = 0  # admitted before it, while it waited for pages
        self.leader: tuple[Sequence, int] | None = None  # who computes so much of the same beginning
        self.started_ns = self.first_ns = self.last_ns = 0  # for the trace; 0: not yet

    @property
    def live(self) -> bool:
        return self.state is SequenceState.PREFILL or self.state is SequenceState.DECODE

    @property
    def wanted(self) -> int:
        """Known tokens that the next slice can take."""
        end = len(self.known) - (self.lane != 0)  # the lane that decodes computes the last one, and samples
        left = end - self.submitted
        return left if self.reading is None else min(left, self.reading.most_tokens)

    def bind(self) -> Bind:
        ends: frozenset[int] = frozenset() if self.writer is None else self.writer.ends
        return Bind(self.slot, self.sampling, self.tokens(0, len(self.known)), ends, self.limit)

    def tokens(self, start: int, end: int) -> Int32s:
        """int32 (end - start,), a copy."""
        return np.frombuffer(self.known[start:end], np.int32)

    def enter(self, slot: int, cached: int, lane: int) -> None:
        """Leaves the queue: ``cached`` positions are in the cache already."""
        self.ticket.release()
        self.slot, self.begun, self.bound, self.lane, self.paused = slot, False, NO_LANE, lane, False
        self.refused, self.overtaken, self.leader = None, 0, None
        self.computed = self.submitted = cached
        self.expected = len(self.known)
        self.state = SequenceState.PREFILL

    def resume(self, lane: int) -> None:
        """Its steps in flight are lost, but what was computed is in the cache: it goes on from there, in ``lane``."""
        self.bound, self.lane = NO_LANE, lane
        self.submitted = self.computed
        self.expected = len(self.known)
        self.state = SequenceState.PREFILL

    def reset(self, state: SequenceState) -> None:
        """Holds nothing any more: GONE, or WAITING to be computed again."""
        self.ticket.release()
        self.slot = -1
        self.computed = self.submitted = 0
        self.expected = len(self.known)
        self.again = False
        self.started_ns = self.first_ns = self.last_ns = 0
        self.state = state

    def stamp(self, started_ns: int, finished_ns: int, *, sampled: bool) -> None:
        """A step with a slice of it ran from ``started_ns`` to ``finished_ns``."""
        self.started_ns = self.started_ns or started_ns
        self.last_ns = finished_ns
        if sampled:
            self.first_ns = self.first_ns or finished_ns
