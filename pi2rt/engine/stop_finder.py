"""Finds the stop strings of a request in its text, and in the spelling of its control tokens."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from pi2rt.tokenizer import StopMatcher


class StopFinder:
    """A control token adds no text, but a stop string may be its spelling (``<|im_end|>``), or contain it. So the
    spelling is matched as if it were text, and left out of what is shown.

    Args:
        stops: strings to stop at.
        spelling: of a control token; "" for a token whose text is shown.
    """

    def __init__(self, stops: Sequence[str], spelling: Callable[[int], str]) -> None:
        self._matcher = StopMatcher(stops)
        self._spelling = spelling
        self._pushed = self._passed = 0  # characters into the matcher, and out of it
        self._hidden: deque[tuple[int, int]] = (
            deque()
        )  # spellings inside the matcher, as ranges of characters

    def push(self, token: int, text: str) -> tuple[str, str | None]:
        """The text to show now, and the stop string found. ``text``: what ``token`` adds."""
        shown, stop = self._push(text)
        if stop is None and (spelling := self._spelling(token)):
            self._hidden.append((self._pushed, self._pushed + len(spelling)))
            more, stop = self._push(spelling)
            shown += more
        return shown, stop

    def end(self, text: str) -> tuple[str, str | None]:
        """The last text: what is held back comes too."""
        shown, stop = self._push(text)
        return (shown if stop is not None else shown + self._visible(self._matcher.flush())), stop

    def _push(self, text: str) -> tuple[str, str | None]:
        self._pushed += len(text)
        shown, stop = self._matcher.push(text)
        return self._visible(shown), stop

    def _visible(self, shown: str) -> str:
        """``shown`` without spellings; it continues what was given before."""
        self._passed += len(shown)
        while self._hidden and self._hidden[0][0] < self._passed:
            first, last = self._hidden.popleft()
            if last > self._passed:  # the rest of it is still in the matcher
                self._hidden.appendleft((self._passed, last))
                last = self._passed
            shown = shown[: first - self._passed] + (
                shown[last - self._passed :] if last < self._passed else ""
            )
            # What follows keeps its distance to the end of ``shown``, so later ranges need no shift.
        return shown
