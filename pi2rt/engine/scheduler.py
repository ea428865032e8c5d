"""Which tokens of which sequences go into the next step.

Every running sequence that is past its prompt gets one token; what room is left is given to prompts, the
oldest first: ``max_tokens`` of them where nothing decodes, ``mixed_chunk`` where something does, so that a
long prompt costs the others a little per step and never stalls them.

Pages are taken as they are needed, not reserved for the longest text a request might become: most texts end
long before their limit, and reserving would leave most of the cache idle. When pages run out, a sequence
gives all of its pages back and is computed again later from the tokens it knows (mostly out of the prefix
index, if nobody took its pages): first one whose consumer has stopped reading, else the youngest. The
oldest is never asked while another can be, and the pool holds at least one whole context, so the oldest
always goes on: there is no deadlock.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from operator import attrgetter

import numpy as np

from pi2rt.engine.reading import LOGITS_CHUNK
from pi2rt.engine.sequence import Sequence, SequenceState
from pi2rt.memory import PrefixIndex
from pi2rt.runtime.step import Bind, Int32s, Slice, Step

SAMPLED_LAST: Int32s = np.empty(0, np.int32)
"""``Slice.tokens`` of a decode slice: the token that the step before sampled."""

_by_age = attrgetter("id")


@dataclass(slots=True)
class Flight:
    """A step and the sequence of each of its slices."""

    step: Step
    members: list[Sequence]
    stopped: bool = False


class Scheduler:
    """Holds the queue and the running sequences; hands out slots and pages.

    Args:
        slots: sequences that run at once.
        max_tokens: tokens in one step at most.
        mixed_chunk: prompt tokens in a step that also decodes, at most.
        released: told of each sequence whose slot and pages are about to become free.
    """

    def __init__(
        self,
        index: PrefixIndex,
        slots: int,
        max_tokens: int,
        mixed_chunk: int,
        released: Callable[[Sequence], None] | None = None,
    ) -> None:
        self._index = index
        self._slots = list(range(slots - 1, -1, -1))
        self._max_tokens = max_tokens
        self._mixed_chunk = mixed_chunk
        self._released = released
        self._steps = 0
        self._refused: tuple[int, int] | None = None
        self.waiting: list[Sequence] = []  # oldest first, as is
        self.running: list[Sequence] = []
        self.preemptions = 0

    @property
    def free_slots(self) -> int:
        return len(self._slots)

    def add(self, sequence: Sequence) -> None:
        insort(self.waiting, sequence, key=_by_age)

    def compose(self) -> Flight | None:
        """The next step, as if every step before it had returned already; None where there is nothing to
        do."""
        slices: list[Slice] = []
        members: list[Sequence] = []
        binds: list[Bind] = []
        prefill = False
        for sequence in self.running.copy():
            if sequence.state is SequenceState.DECODE:
                if self._ready(sequence):
                    at = sequence.submitted
                    slices.append(Slice(sequence.slot, at, sequence.table.pages, SAMPLED_LAST, True))
                    members.append(sequence)
                    sequence.submitted = at + 1
                    sequence.expected += 1
                    sequence.in_flight += 1
            elif sequence.state is SequenceState.PREFILL:
                prefill = True
        if prefill or self.waiting:
            room = self._max_tokens if not slices else min(self._mixed_chunk, self._max_tokens - len(slices))
            self._fill(room, slices, members, binds)
        if not slices:
            return None
        self._steps += 1
        return Flight(Step(self._steps, tuple(slices), tuple(binds)), members)

    def drop(self, sequence: Sequence) -> None:
        """A waiting sequence is no longer wanted."""
        self.waiting.remove(sequence)
        sequence.reset(SequenceState.GONE)

    def leave(self, sequence: Sequence, *, again: bool = False) -> None:
        """A running sequence ends, or (``again``) goes back to the queue, as soon as its steps have
        returned."""
        sequence.state = SequenceState.LEAVING
        sequence.again = again
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
        sequence.paused = sequence.stream.pause(sequence.in_flight)
        if sequence.paused:
            return False
        if sequence.submitted == sequence.table.count * self._index.page_tokens:
            if not self._make_room(1, sequence):
                return False
            sequence.table.extend(1)
        return True

    def _fill(self, room: int, slices: list[Slice], members: list[Sequence], binds: list[Bind]) -> None:
        """Gives ``room`` tokens to prompts: those begun first, then new ones."""
        for sequence in self.running:
            if room <= 0:
                return
            if sequence.state is SequenceState.PREFILL:
                room -= self._chunk(sequence, room, slices, members)
        while room > 0 and (admitted := self._admit()) is not None:
            binds.append(admitted.bind())
            room -= self._chunk(admitted, room, slices, members)

    def _chunk(self, sequence: Sequence, room: int, slices: list[Slice], members: list[Sequence]) -> int:
        """Appends a slice of at most ``room`` known tokens; gives their number."""
        start = sequence.submitted
        known = len(sequence.known)
        reading = sequence.reading
        if reading is not None and reading.kind == "logits":
            room = min(room, LOGITS_CHUNK)
        end = min(start + room, known)
        tokens = sequence.tokens(start, end)
        last = end == known
        if reading is None:
            slices.append(Slice(sequence.slot, start, sequence.table.pages, tokens, sample=last))
            sequence.expected += last
        else:
            targets = reading.targets(tokens, None if last else sequence.known[end])
            logits = reading.kind == "logits"
            slices.append(
                Slice(sequence.slot, start, sequence.table.pages, tokens, targets=targets, logits=logits)
            )
        members.append(sequence)
        sequence.submitted = end
        sequence.in_flight += 1
        if last:
            sequence.state = SequenceState.DECODE
        return end - start

    def _admit(self) -> Sequence | None:
        """Takes the oldest waiting sequence in, if there is a slot and there are pages for all it knows and
        one more for each that runs already. Younger ones never overtake it, except while its consumer is
        not reading."""
        sequence = next((s for s in self.waiting if not s.stream.pause(0)), None)
        if sequence is None:
            return None
        if not self._slots:
            idle = self._idle()
            if idle is None or any(s.state is SequenceState.LEAVING for s in self.running):
                return None
            self._preempt(idle)
            if not self._slots:
                return None  # not before its steps have returned
        margin = len(self.running)
        state = (sequence.id, self._index.available)
        if state == self._refused and self._idle() is None:
            return None
        cached = sequence.table.match(sequence.known) if sequence.reading is None else 0
        missing = sequence.table.missing(len(sequence.known))
        if not self._make_room(missing + margin, None):
            sequence.table.release()
            self._refused = state
            return None
        self._refused = None
        sequence.table.extend(missing)
        self.waiting.remove(sequence)
        insort(self.running, sequence, key=_by_age)
        sequence.enter(self._slots.pop(), cached)
        if sequence.writer is not None:
            if not sequence.writer.generated:
                self._index.count(sequence.prompt, cached)
            sequence.writer.start(cached)
        return sequence

    def _make_room(self, pages: int, asker: Sequence | None) -> bool:
        """Whether ``pages`` can be allocated now, after preempting others where that helps."""
        while not self._index.can_allocate(pages):
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
