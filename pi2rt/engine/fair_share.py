"""Who gets how many of a step's prompt tokens: deficit round robin (Shreedhar and Varghese, 1995).

For each prompt the tokens that it was given are counted. Each next quantum goes to the one with the fewest, the
oldest among equals, until the step is full or nobody wants more. A prompt that joins starts at the largest count
there is, so it comes after those that wait already, and a stream of short prompts never starves a long one.

The bound. Counts of prompts that always want more differ by a quantum Q at most. So until a prompt of n tokens has
its last one, each place beside it, however many prompts occupy it one after another, is given at most n + 2 Q tokens.
With k places beside it and R tokens in a step, the prompt is done after ceil((n + k (n + 2 Q)) / R) steps. Tests hold
the class to that.

Nothing here knows of lanes: each asks with the room that it has and the prompts that it can take, and what one has
given counts in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

QUANTUM = 16
"""Tokens given at a time: two tiles of attention, which takes the rows of a slice in eights. The products of a step
take the rows of all its slices together, so that small slices cost them nothing."""


class FairShare:
    """Prompts are known by a key; of equal counts, the smaller key comes first."""

    __slots__ = ("_given", "_quantum")

    def __init__(self, quantum: int = QUANTUM) -> None:
        self._quantum = quantum
        self._given: dict[int, int] = {}

    def share(self, room: int, wanted: Sequence[tuple[int, int]]) -> dict[int, int]:
        """Divides ``room`` tokens.

        Args:
            wanted: (key, tokens that it can take now, at least 1) of each prompt.

        Returns:
            Tokens by key, without those that get none. All of ``room``, unless less is wanted.
        """
        last = max(self._given.values(), default=0)
        heap = [(self._given.setdefault(key, last), key) for key, _ in wanted]
        heapify(heap)
        left = dict(wanted)
        shares: dict[int, int] = {}
        while room > 0 and heap:
            given, key = heappop(heap)
            tokens = min(self._quantum, left[key], room)
            room -= tokens
            left[key] -= tokens
            shares[key] = shares.get(key, 0) + tokens
            self._given[key] = given + tokens
            if left[key]:
                heappush(heap, (given + tokens, key))
        # Who could not take more has no claim to it later: it would be given all at once.
        most = max((self._given[key] for key, _ in wanted), default=0)
        for key, tokens in left.items():
            if not tokens:
                self._given[key] = max(self._given[key], most - self._quantum)
        return shares

    def forget(self, key: int) -> None:
        """A prompt is complete, or has left. Unknown keys are ignored."""
        self._given.pop(key, None)
