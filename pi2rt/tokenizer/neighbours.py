"""Which characters are neighbours in some token: all others stay apart, whatever merges around them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

_SEARCHED = 4096  # characters at once


class Neighbours:
    """Args:
    pieces: the tokens that merging makes.
    """

    def __init__(self, pieces: Iterable[str]) -> None:
        joined = "\0\0".join(
            pieces
        )  # zeros make pairs of their own, which cost a needless chunk border at most
        # sorted; never empty
        self._pairs = np.unique(np.append(_pairs(joined), 0)) if joined else np.zeros(1, np.int64)

    def cuts(self, text: str) -> list[int]:
        """Ends of chunks that cannot merge with each other, 0 first."""
        return [0, *self.borders(text), len(text)]

    def borders(self, text: str) -> list[int]:
        """Between two characters that stay apart."""
        pairs = _pairs(text)
        at = np.searchsorted(self._pairs, pairs)
        apart = self._pairs[np.minimum(at, self._pairs.size - 1)] != pairs
        found: list[int] = (np.flatnonzero(apart) + 1).tolist()
        return found


class PairBorders:
    """Where a text can be cut whose words are not split before they are merged.

    Args:
        pieces: the tokens that merging makes.
        added: those that are found in text before. No border is in one, nor behind one, where text begins anew.
        space: what stands for a space in tokens; one character.
    """

    def __init__(self, pieces: Iterable[str], added: Iterable[str], space: str) -> None:
        found = [text.replace(" ", space) for text in added]
        self._neighbours = Neighbours([*pieces, *found])
        self._last = frozenset(text[-1] for text in found if text)
        self._space = space

    def last(self, text: str, start: int, end: int) -> int:
        """The last border in ``text``, after ``start`` and at ``end`` at most; 0 if there is none."""
        return start + (self._borders(text[start : end + 1]) or [-start])[-1]

    def next(self, text: str, start: int, end: int) -> int:
        """The first border in ``text``, from ``start`` (at least 1) and before ``end``; 0 if there is none."""
        for first in range(start - 1, end, _SEARCHED):
            borders = self._borders(text[first : min(end, first + _SEARCHED + 1)])
            if borders:
                return first + borders[0]
        return 0

    def _borders(self, text: str) -> list[int]:
        text = text.replace(" ", self._space)
        return [at for at in self._neighbours.borders(text) if text[at - 1] not in self._last]


def _pairs(text: str) -> npt.NDArray[np.int64]:
    """Every two neighbouring characters as one number; int64 (len(text) - 1,)."""
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    return codes[:-1] << 21 | codes[1:]
