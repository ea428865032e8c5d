"""Cuts long text between tokens that stay, whatever text comes after: byte-pair encoding in bounded pieces.

An encoder here is greedy: of all neighbours that join to a token it joins those of the best rank, the leftmost of
equals, until none are left. Nothing else is known of its vocabulary. Three facts follow.

1. What no join crosses is independent: if x = u + v and the encoding of x has a border between u and v, it is the
   encoding of u, then the encoding of v. For the pair at the border was never the best, and the others do not see it.
2. So every run of consecutive tokens of an encoding is the encoding of its own text. And tokens t1 ... tn are the
   encoding of their text exactly if each two neighbours are that of theirs: before any border is crossed, both sides
   act as they do alone, and the first crossing would also happen in the text of those two tokens.
3. A text that goes on after position n has a border in (n - L, n], where L is the length of the longest token. If the
   encodings of all prefixes that end there share a border c, the encoding of the whole text has it too.

``safe_cut`` checks (3) with (2): the encoding of a prefix goes through c if the encoding of what lies between c and
the prefix's end begins with a token that is a neighbour of the one before c.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator
from typing import Protocol

_CHECKS_PER_STEP = 16


class GreedyEncoder(Protocol):
    """``longest``: characters of the longest token."""

    @property
    def longest(self) -> int: ...

    def ends(self, text: str) -> list[int]:
        """Where each token of the encoding of ``text`` ends; the last one at ``len(text)``."""
        ...

    def ids(self, text: str) -> list[int]: ...


def greedy_pieces(
    encoder: GreedyEncoder, text: Callable[[int, int], str], length: int, window: int
) -> Iterator[list[int]]:
    """The ids of a text, some at a time; empty lists where more work is to be done before the next ones.

    Args:
        text: ``text(start, end)``: a part of it.
        length: of all of it, in characters.
        window: characters to encode at once, about.
    """
    longest = encoder.longest
    least = max(window, 8 * longest)
    at, size = 0, least
    while length - at > size + longest:
        part = text(at, at + size)
        cut = yield from safe_cut(encoder, part)
        if cut:
            yield encoder.ids(part[:cut])
            at, size = at + cut, least
        else:
            size *= 2
    yield encoder.ids(text(at, length))


def safe_cut(encoder: GreedyEncoder, text: str) -> Generator[list[int], None, int]:
    """A border that every text beginning with ``text`` has, 0 if none was found. Yields after each part of the work."""
    ends = encoder.ends(text)
    longest = encoder.longest
    found = 0
    for target in (len(text) - 3 * longest, len(text) // 2):
        index = bisect_right(ends, target) - 1
        if index < 0:
            continue
        before, cut, after = ends[index - 1] if index else 0, ends[index], ends[index + 1]
        neighbours = {after}  # ends of tokens that stay beside the one before the cut
        found = cut
        for number, end in enumerate(range(max(len(text) - longest, cut) + 1, len(text))):
            if number % _CHECKS_PER_STEP == 0:
                yield []
            first = cut + encoder.ends(text[cut:end])[0]
            if first not in neighbours:
                if encoder.ends(text[before:first]) != [cut - before, first - before]:
                    found = 0
                    break
                neighbours.add(first)
        if found:
            break
    return found
