"""Which tokens of which sequences go into the next step.

Every running sequence that is past its prompt gets one token. What room is left is shared by the prompts that are being
computed: ``max_tokens`` of them where nothing decodes, ``mixed_chunk`` where something does, so that prompts cost the
others a little per step and never stall them.

Prompts share by deficit round robin in quanta of 16 tokens (``fair_share.py``, with the proof). With R tokens of room
in a step and at most k other prompts beside it, a prompt of n tokens that has a slot is complete after
ceil((n + k (n + 32)) / R) steps, whatever the others' lengths and whoever comes later: one of a single token behind a
prompt of thousands after the next step. Admission is in order of age, with three exceptions, each bounded:

- Where all slots are taken, a request waits for one to end. Nothing can be done about that; ``max_sequences`` is how
  many there are.
- A sequence that waits for pages may be overtaken by ``OVERTAKES`` smaller ones that find what they need.
- A prompt whose beginning another one is computing right now waits until that is in the prefix index, instead of
  computing it too. That takes no longer than its own share of the same tokens would.

Pages are taken as they are needed, not reserved for the longest text a request might become: most texts end
long before their limit, and reserving would leave most of the cache idle. When pages run out, a sequence
gives all of its pages back and is computed again later from the tokens it knows (mostly out of the prefix
index, if nobody took its pages): first one whose consumer has stopped reading, else the youngest. The
oldest is never asked while another can be, and the pool holds at least one whole context, so the oldest
always goes on: there is no deadlock.

Windowed bytes of pages (``memory/window_pool.py``) are taken when a slice is submitted that writes a page, and let go
when no position to come sees them. There are so many that nobody waits for them (``memory/window_law.py``).
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from pi2rt.engine.fair_share import FairShare
from pi2rt.engine.sequence import Sequence, SequenceState
from pi2rt.memory import PrefixIndex
from pi2rt.runtime.step import Int32s, Slice, Step

SAMPLED_LAST: Int32s = np.empty(0, np.int32)
"""``Slice.tokens`` of a decode slice: the token that the step before sampled."""

OVERTAKES = 8
"""Sequences that are admitted before an older one that waits for pages, at most."""

_by_age = attrgetter("id")


@dataclass(frozen=True, slots=True)
class PrefillRoute:
    """Which prompts go through a lane that computes prompts only: those with at least ``least_tokens`` to compute,
    while ``usable``. ``max_tokens``: in one step of it."""

    max_tokens: int
    least_tokens: int
    usable: Callable[[], bool]


@dataclass(slots=True)
class Flight:
    """A step and the sequence of each of its slices. ``begun``: those whose first slice it has, since they left the
    queue. ``prefills``: whether it computes more than the next token of each. ``masked``: whether a slice of it waits
    for a mask."""

    step: Step
    members: list[Sequence]
    begun: list[Sequence]
    prefills: bool
    masked: bool = False
    stopped: bool = False


class _Draft:
    """A step of a lane that is being composed. ``bound``: sequences whose slot the lane's executor does not know."""

    __slots__ = ("begun", "bound", "lane", "masked", "members", "slices")

    def __init__(self, lane: int) -> None:
        self.lane = lane
        self.masked = False
        self.slices: list[Slice] = []
        self.members: list[Sequence] = []
        self.begun: list[Sequence] = []
        self.bound: list[Sequence] = []


class Scheduler:
    """Holds the queue and the running sequences; hands out slots and pages.

    Args:
        slots: sequences that run at once.
        max_tokens: tokens in one step at most.
        mixed_chunk: prompt tokens in a step that also decodes, at most.
        released: told of each sequence whose slot and pages are about to become free.
        prefill: lanes 1, 2, ... that compute all tokens of a prompt but the last; lane 0 computes everything else.
        routed: told of each lane that a sequence was admitted to.
    """

    def __init__(
        self,
        index: PrefixIndex,
        slots: int,
        max_tokens: int,
        mixed_chunk: int,
        released: Callable[[Sequence], None] | None = None,
        prefill: tuple[PrefillRoute, ...] = (),
        routed: Callable[[int], None] | None = None,
    ) -> None:
        self._index = index
        self._slots = list(range(slots - 1, -1, -1))
        self._count = slots
        self._fair = FairShare()
        self._max_tokens = max_tokens
        self._mixed_chunk = mixed_chunk
        self._released = released
        self._prefill = prefill
        self._routed = routed
        self._steps = [0] * (1 + len(prefill))  # of each lane
        self.waiting: list[Sequence] = []  # oldest first, as is
        self.running: list[Sequence] = []
        self.preemptions = 0

    @property
    def free_slots(self) -> int:
        return len(self._slots)

    @property
    def open_slots(self) -> int:
        """Slots for requests that have had none yet: neither taken for longer than the steps in flight, nor wanted back
        by a preempted sequence."""
        taken = sum(s.live or s.again for s in self.running)
        return max(0, self._count - taken - self.preempted)

    @property
    def preempted(self) -> int:
        """Sequences that wait to be computed again."""
        return sum(not s.ticket.held for s in self.waiting)

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_by_age)

    def compose(self, lane: int = 0) -> Flight | None:
        """The next step of a lane, as if every step of it before had returned already; None where there is nothing to
        do."""
        flight = _Draft(lane)
        if lane:
            self._fill(self._prefill[lane - 1].max_tokens, flight)
        else:
            self._decode(flight)
        if not flight.slices:
            return None
        self._steps[lane] += 1
        step = Step(self._steps[lane], tuple(flight.slices), tuple(s.bind() for s in flight.bound))
        prefills = step.tokens > len(flight.slices)
        return Flight(step, flight.members, flight.begun, prefills, flight.masked)

    def _decode(self, flight: _Draft) -> None:
        """A token of each running sequence, and of prompts what there is room for."""
        slices, members = flight.slices, flight.members
        prefill = False
        for sequence in self.running.copy():
            if sequence.state is SequenceState.DECODE:
                if self._ready(sequence):
                    at = sequence.submitted
                    masked = sequence.masker is not None
                    flight.masked |= masked
                    slices.append(
                        Slice(sequence.slot, at, sequence.table.pages, SAMPLED_LAST, True, masked=masked)
                    )
                    members.append(sequence)
                    sequence.submitted = at + 1
                    sequence.expected += 1
                    sequence.in_flight += 1
            elif sequence.state is SequenceState.PREFILL:
                prefill = True
        if prefill or self.waiting:
            room = self._max_tokens if not slices else min(self._mixed_chunk, self._max_tokens - len(slices))
            self._fill(room, flight)

    def hand_over(self, sequence: Sequence) -> bool:
        """Whether a prompt has come to the end of a lane that computes prompts, so that lane 0 takes it over: it has
        returned from all steps, and what was computed is in the cache."""
        done = sequence.lane != 0 and not sequence.in_flight and not sequence.wanted
        if done:
            sequence.lane = 0
        return done

    def resume(self, sequence: Sequence) -> None:
        """The steps of a live sequence are lost with the executor of its lane, but not what was computed."""
        self._fair.forget(sequence.id)
        if sequence.masker is not None:
            sequence.masker.release()
        missing = sequence.table.missing(
            len(sequence.known)
        )  # the page of the token sampled last may not be there yet
        if not self._index.can_allocate(missing):
            self.leave(sequence, again=True)
            return
        sequence.table.extend(missing)
        sequence.table.rewind(sequence.computed)
        sequence.resume(self._route(sequence, sequence.computed))

    def _route(self, sequence: Sequence, cached: int) -> int:
        """The lane that goes on with a sequence of which ``cached`` positions are computed."""
        if sequence.reading is None:
            left = len(sequence.known) - 1 - cached
            for lane, route in enumerate(self._prefill, 1):
                if left >= route.least_tokens and route.usable():
                    return lane
        return 0

    def drop(self, sequence: Sequence) -> None:
        """A waiting sequence is no longer wanted."""
        self.waiting.remove(sequence)
        sequence.reset(SequenceState.GONE)

    def leave(self, sequence: Sequence, *, again: bool = False) -> None:
        """A running sequence ends, or (``again``) goes back to the queue, as soon as its steps have
        returned."""
        sequence.state = SequenceState.LEAVING
        sequence.again = again
        self._fair.forget(sequence.id)
        if again and sequence.writer is not None:
            sequence.writer.pause()
        if sequence.masker is not None:
            sequence.masker.release()
        if not sequence.in_flight:
            self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """The last step of a leaving sequence has returned: its slot and pages are free."""
        if self._released is not None:
            self._released(sequence)
        self.running.remove(sequence)
        self._slots.append(sequence.slot)
        sequence.table.release()
        if sequence.again:
            sequence.reset(SequenceState.WAITING)
            self.add(sequence)
        else:
            sequence.reset(SequenceState.GONE)

    def _ready(self, sequence: Sequence) -> bool:
        """Whether a decoding sequence can take part in this step."""
        if sequence.expected >= sequence.limit:
            return False  # its last token is being sampled
        masker = sequence.masker
        if masker is not None and masker.holds_up(sequence.expected) and self._has_neighbours(sequence):
            return False
        sequence.paused = sequence.stream.pause(sequence.in_flight)
        if sequence.paused:
            return False
        if sequence.submitted == sequence.table.count * self._index.page_tokens:
            if not self._make_room(1, sequence):
                return False
            sequence.table.extend(1)
        if sequence.submitted >= sequence.table.backed:
            sequence.table.back(sequence.submitted + 1)
        return True

    def _has_neighbours(self, sequence: Sequence) -> bool:
        return any(other.live and other is not sequence for other in self.running)

    def _fill(self, room: int, flight: _Draft) -> None:
        """Shares ``room`` tokens among the prompts of the lane."""
        if room <= 0:
            return
        if self.waiting:
            self._admit(flight.lane)
        wanted = {
            s.id: s.wanted
            for s in self.running
            if s.state is SequenceState.PREFILL and s.lane == flight.lane and s.wanted
        }
        shares = self._fair.share(room, list(wanted.items()))
        for sequence in self.running:
            if tokens := shares.get(sequence.id):
                self._chunk(sequence, tokens, flight)

    def _chunk(self, sequence: Sequence, count: int, flight: _Draft) -> None:
        """Appends a slice of the next ``count`` known tokens."""
        slices = flight.slices
        if sequence.bound != flight.lane:
            sequence.bound = flight.lane
            flight.bound.append(sequence)
        if not sequence.begun:
            sequence.begun = True
            flight.begun.append(sequence)
        start = sequence.submitted
        end = start + count
        if end > sequence.table.backed:
            sequence.table.back(end)
        reading = sequence.reading
        tokens = sequence.tokens(start, end)
        last = end == len(sequence.known)
        if reading is None:
            masked = last and sequence.masker is not None
            flight.masked |= masked
            slices.append(
                Slice(sequence.slot, start, sequence.table.pages, tokens, sample=last, masked=masked)
            )
            sequence.expected += last
        else:
            targets = reading.targets(tokens, None if last else sequence.known[end])
            logits = reading.kind == "logits"
            slices.append(
                Slice(sequence.slot, start, sequence.table.pages, tokens, targets=targets, logits=logits)
            )
        flight.members.append(sequence)
        sequence.submitted = end
        sequence.in_flight += 1
        if last:
            sequence.state = SequenceState.DECODE
            self._fair.forget(sequence.id)

    def _admit(self, lane: int) -> None:
        """Takes waiting sequences in, the oldest first, while there are slots, and pages for all that each knows and
        one more for each that runs already. ``lane``: that asks, and need not be told."""
        blocked: Sequence | None = None
        for sequence in self.waiting.copy():
            if sequence.stream.pause(0):
                continue  # its consumer is not reading
            if not self._slots:
                idle = self._idle()
                if idle is None or any(s.state is SequenceState.LEAVING for s in self.running):
                    return
                self._preempt(idle)
                if not self._slots:
                    return  # not before its steps have returned
            if self._follows(sequence):
                continue
            if not self._enter(sequence):
                blocked = blocked or sequence
            else:
                if sequence.lane != lane and self._routed is not None:
                    self._routed(sequence.lane)
                if blocked is not None:
                    blocked.overtaken += 1
            if blocked is not None and blocked.overtaken >= OVERTAKES:
                return

    def _enter(self, sequence: Sequence) -> bool:
        """Gives a waiting sequence a slot, if its pages are there."""
        state = self._index.available, len(self.running)
        if sequence.refused == state and self._idle() is None:
            return False
        cached = sequence.table.match(sequence.known) if sequence.reading is None else 0
        missing = sequence.table.missing(len(sequence.known))
        if not self._make_room(missing, None):
            sequence.table.release()
            sequence.refused = state
            return False
        sequence.table.extend(missing)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_by_age)
        sequence.enter(self._slots.pop(), cached, self._route(sequence, cached))
        if sequence.writer is not None and not sequence.writer.generated:
            self._index.count(sequence.prompt, cached)
        return True

    def _follows(self, sequence: Sequence) -> bool:
        """Whether a running sequence is computing pages that this one can use, and they are not in the index yet."""
        if sequence.reading is not None:
            return False
        if sequence.leader is None:
            for other in self.running:
                if other.live and other.reading is None:
                    common = self._common(sequence, other)
                    if common > other.table.committed:
                        sequence.leader = other, common
                        break
            else:
                return False
        leader, common = sequence.leader
        if leader.live and common > leader.table.committed:
            return True
        sequence.leader = None
        return False

    def _common(self, a: Sequence, b: Sequence) -> int:
        """Positions of whole pages that both begin with. The last token of either is not among them: the one's is
        computed in any case, the other's perhaps only when its consumer goes on reading."""
        size = self._index.page_tokens
        pages = (min(len(a.known), len(b.known)) - 1) // size
        if not pages or a.known[:size] != b.known[:size]:
            return 0
        same = a.tokens(0, pages * size) == b.tokens(0, pages * size)
        return int(same.argmin() if not same.all() else len(same)) // size * size

    def _make_room(self, pages: int, asker: Sequence | None) -> bool:
        """Whether ``pages`` can be allocated now, after preempting others where that helps. Where nobody that runs asks
        (``asker``), one more for each that does."""
        while not self._index.can_allocate(pages if asker is not None else pages + len(self.running)):
            if any(s.state is SequenceState.LEAVING for s in self.running):
                return False  # its pages come back with its steps
            victim = self._idle() or (self.running[-1] if asker is not None else None)
            if victim is None:
                return False
            self._preempt(victim)
            if victim is asker:
                return False
        return True

    def _idle(self) -> Sequence | None:
        """The youngest sequence that waits for its consumer. Not one with steps in flight: what they bring
        would be lost, and a sequence that is asked again and again would never get on."""
        return next((s for s in reversed(self.running) if s.paused and s.live and not s.in_flight), None)

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.leave(sequence, again=True)
