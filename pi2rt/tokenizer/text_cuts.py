"""Cuts text where the split of every family of byte-level BPE has a border, so that parts can be encoded by themselves.

No expression of ``pre_tokenizers`` looks back, so what is matched depends on where a match begins and on what follows.
A part may end at a border that is there whatever follows, and the next part begins there.

``SureBorders`` knows two neighbours of which no match of any family has both, and before the second of which each
match begins anew: a letter or a digit, then a space or one of some punctuation marks. Neither side needs to see the
other: white space alone asks what follows it, and the first side does not end with white space. The first character is
one that has been a letter as long as there are expressions, so that different versions of Unicode agree, and no
normal form composes the second with what is before it.

``Split.last_final`` is for text without such places. An attempt to match reads at most three characters (a contraction,
a group of digits) beyond the match that it makes, except along a run of white space (``\\s*[\\r\\n]+`` goes back to the
last line end, ``\\s+(?!\\S)`` by one) or, where case matters, of letters and marks (``[upper]*[lower]+`` goes back
to the last letter that can be lower case). So a border is final if something follows that ends both kinds of runs, and
a few characters more.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Generator, Sequence

SLACK = 8

_LETTERS = (
    "A-Za-z\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u0391-\u03a1\u03a3-\u03c9\u0410-\u044f"
    "\u3041-\u3096\u30a1-\u30fa\u4e00-\u9fa5\uac00-\ud7a3"
)
_BORDER = rf"(?<=[{_LETTERS}0-9])[ ,.!?(\uff0c\u3002\u3001]"
_DIGITS = r"|(?<=[A-Za-z])[0-9]"

# characters that are composed with none before them in any normal form
_STARTERS = (
    "\\x00-\\x7f\u0410-\u044f\u3041-\u3096\u30a1-\u30fa\u3400-\u4db5\u4e00-\u9fa5\uac00-\ud7a3"
    "\U0001f300-\U0001f64f"
)
_starter = re.compile(f"[{_STARTERS}]")

# what \\s is in Oniguruma, which is less than in Python
_space = re.compile("[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]*")
_line_end = re.compile("[\r\n]")
_IN_LINES = "".join(filter(str.isspace, map(chr, range(0x3001)))).translate({10: None, 13: None})


class SureBorders:
    """Args:
    patterns: the expressions of a family of ``pre_tokenizers``.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        digits = any(r"\p{N}" in pattern for pattern in patterns)
        self._border = re.compile(_BORDER + (_DIGITS if digits else ""))

    def last(self, text: str, start: int, end: int) -> int:
        """The last sure border in ``text``, after ``start`` and at ``end`` at most; 0 if there is none."""
        for step in (16, 256, end - start):  # mostly it is near
            first = max(start + 1, end - step)
            found = [match.start() for match in self._border.finditer(text, first, min(len(text), end + 1))]
            if found:
                return found[-1]
        return 0

    def next(self, text: str, start: int, end: int) -> int:
        """The first sure border in ``text``, from ``start`` and before ``end``; 0 if there is none."""
        match = self._border.search(text, start, end)
        return match.start() if match else 0


class Split:
    """Args:
    patterns: the expressions of a family of ``pre_tokenizers``.
    split: where the pieces end that these make of a text.
    """

    def __init__(self, patterns: Sequence[str], split: Callable[[str], list[int]]) -> None:
        every = " ".join(patterns)
        self.ends = split
        self._cased = r"\p{Lu}" in every
        self._each_line_end = r"[\r\n]" in patterns
        self._last_line_end = r"\s*[\r\n]" in every
        self._line_ends_after = "\r\n/" if r"[\r\n/]*" in every else "\r\n" if r"[\r\n]*" in every else ""

    def last_final(self, borders: Sequence[int], text: str) -> int:
        """The last of the borders that stays one, whatever follows ``text``; 0 if none does."""
        end = min(len(text) - SLACK, len(text.rstrip(_IN_LINES if self._each_line_end else None)))
        if self._cased:
            end = min(end, _letters_start(text))
        return max((border for border in borders if border <= end), default=0)

    def word_end(self, text: str, start: int, size: int) -> Generator[list[int], None, int]:
        """Where a match ends that begins at ``start`` and covers ``size`` characters at least; 0 where only the whole
        of what it could match would tell.

        All expressions that match so much go on as long as characters are of their kinds, so one that begins in the
        middle of a match ends with it. White space with line ends is different: ``\\s*[\\r\\n]+`` ends with the last of
        a run, and ``[\\r\\n]*`` after other characters with the first ones.
        """
        while True:
            part = text[start : start + size]
            end = self.ends(part)[0]
            if end == len(part) < size:
                return len(text)
            if end < size - SLACK:
                if len(part) < size or self.last_final((end,), part):
                    return start + end
                size *= 2
            else:
                if (self._last_line_end or self._line_ends_after) and _line_end.search(part, 0, end):
                    head = part.rstrip(self._line_ends_after or "\r\n")
                    if self._last_line_end and _space.fullmatch(part):
                        return (yield from _last_line_end(text, start, size))
                    if end == len(part) and head and not head[-1].isspace() and self._line_ends_after:
                        return (yield from _run_end(text, start + len(head), size, self._line_ends_after))
                    return 0
                start += size // 2
            yield []


def starter(text: str, start: int, end: int) -> int:
    """The first character in ``text`` that no normal form composes with those before it; ``end`` if there is none."""
    match = _starter.search(text, start, end)
    return match.start() if match else end


def _last_line_end(text: str, start: int, size: int) -> Generator[list[int], None, int]:
    """After the last line end in the white space at ``start``, which has one."""
    found = start
    while True:
        match = _space.match(text, start, start + size)
        run = match.end() if match else start
        found = max(found, text.rfind("\n", start, run) + 1, text.rfind("\r", start, run) + 1)
        if run < start + size:
            return found
        start = run
        yield []


def _run_end(text: str, start: int, size: int, characters: str) -> Generator[list[int], None, int]:
    """Where these characters end that begin at ``start``."""
    while start < len(text):
        part = text[start : start + size]
        rest = len(part.lstrip(characters))
        start += len(part) - rest
        if rest:
            break
        yield []
    return start


def _letters_start(text: str) -> int:
    """Where letters and marks begin that go on to the end."""
    start = len(text)
    while start and _may_be_letter(text[start - 1]):
        start -= 1
    return start


def _may_be_letter(character: str) -> bool:
    """Of any version of Unicode: what has no category yet may get that of a letter."""
    return unicodedata.category(character) in _LETTER_KINDS


_LETTER_KINDS = frozenset(("Lu", "Ll", "Lt", "Lm", "Lo", "Mn", "Mc", "Me", "Cn", "Co"))
