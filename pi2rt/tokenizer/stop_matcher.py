"""Finds stop strings in text that comes in parts."""

from __future__ import annotations

from collections.abc import Sequence

from pi2rt._errors import RequestError


class StopMatcher:
    """Lets text through up to the first stop string, and holds back what may be the beginning of one.

    The result does not depend on how the text is cut: the stop string that is complete first ends it, the
    longest of those that end at the same character. Knuth, Morris and Pratt, 1977; constant time per
    character and stop string.

    Args:
        stops: strings to stop at. With none, all text passes at once.

    Raises:
        RequestError: one of them is empty.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        if isinstance(stops, str) or not all(isinstance(stop, str) and stop for stop in stops):
            raise RequestError(f"stop is {stops!r}; it must be a list of strings that are not empty")
        self._stops = tuple(dict.fromkeys(sorted(stops, key=len, reverse=True)))
        self._fallbacks = tuple(map(_fallbacks, self._stops))
        self._matched = [0] * len(self._stops)  # how much of each stop string the text ends with
        self._held = ""
        self._stop: str | None = None

    def push(self, text: str) -> tuple[str, str | None]:
        """The text to show now, and the stop string found. After one is found nothing more is shown."""
        if self._stop is not None:
            return "", self._stop
        if not self._stops:
            return text, None
        for index, character in enumerate(text):
            for which, stop in enumerate(self._stops):
                fallbacks, matched = self._fallbacks[which], self._matched[which]
                while matched and stop[matched] != character:
                    matched = fallbacks[matched - 1]
                if stop[matched] == character:
                    matched += 1
                    if matched == len(stop):
                        self._stop = stop
                        seen = self._held + text[: index + 1]
                        self._held = ""
                        return seen[: len(seen) - len(stop)], stop
                self._matched[which] = matched
        seen = self._held + text
        shown = len(seen) - max(self._matched)
        self._held = seen[shown:]
        return seen[:shown], None

    def flush(self) -> str:
        """The text still held back, which the end of the text makes plain text."""
        held, self._held = self._held, ""
        self._matched = [0] * len(self._stops)
        return held


def _fallbacks(stop: str) -> list[int]:
    """For each prefix of a string, the length of its longest other prefix that it also ends with."""
    lengths = [0] * len(stop)
    length = 0
    for index in range(1, len(stop)):
        while length and stop[index] != stop[length]:
            length = lengths[length - 1]
        if stop[index] == stop[length]:
            length += 1
        lengths[index] = length
    return lengths
