"""Strings that know which of their characters the chat template wrote.

Only a control token that the template itself wrote is one; the same characters in a message are text. So the
template's literals are marked as trusted when it is compiled, and every operation on strings keeps the marks of the
characters it keeps. An operation that is not handled here returns a plain ``str``, and a plain ``str`` has no trusted
characters: what is forgotten counts as content, never the other way round.
"""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import SupportsIndex, TypeAlias

from pi2rt._errors import TemplateError

Runs: TypeAlias = tuple[tuple[int, int], ...]
"""(start, end) of ranges of characters: not empty, in order, neither overlapping nor touching."""

MAX_RUNS = 1 << 17  # of one string: a conversation of 40,000 messages

_Bounds: TypeAlias = "array[int]"
_ITEM = "I"  # of the arrays: 32 bits


class MarkedText(str):
    """A string with trusted characters, at least one; compares and hashes as the plain string does.

    Lives inside a rendering only. Made by ``trusted`` and the operations on it. ``bounds``: start and end of each run
    of trusted characters, ascending: a character is trusted if an odd number of bounds is at or before it.
    """

    __slots__ = ("bounds",)
    bounds: _Bounds

    def cut(self, start: int, end: int) -> str:
        """``self[start:end]`` for ``0 <= start <= end <= len(self)``."""
        if start == end:
            return ""
        text = str.__getitem__(self, slice(start, end))
        first = bisect_right(self.bounds, start)
        last = bisect_left(self.bounds, end, first)
        bounds = array(_ITEM, [0] if first % 2 else [])
        bounds.extend([bound - start for bound in self.bounds[first:last]])
        if last % 2:
            bounds.append(end - start)
        return _marked(text, bounds)

    def respelled(self, text: str) -> str:
        """``text``, which is this string in another case. No case of a character has no characters, so that equal
        lengths mean that each character stands where it stood."""
        return _marked(text, self.bounds) if len(text) == len(self) else text

    def __str__(self) -> str:
        return self  # Jinja calls str() on whatever it prints

    def __add__(self, other: str) -> str:
        if hasattr(other, "__html__") or not isinstance(other, str):
            return NotImplemented  # Markup escapes what it is added to
        return join("", (self, other))

    def __radd__(self, other: str) -> str:
        if hasattr(other, "__html__") or not isinstance(other, str):
            return NotImplemented
        return join("", (other, self))

    def __mul__(self, count: SupportsIndex) -> str:
        text = str.__mul__(self, count)
        if is_trusted(self):
            return trusted(text)
        times = len(text) // len(self)
        _check(times * len(self.bounds))
        return join("", (self,) * times)

    __rmul__ = __mul__

    def __getitem__(self, key: SupportsIndex | slice) -> str:
        size = len(self)
        if not isinstance(key, slice):
            str.__getitem__(self, key)  # raises IndexError
            at = key.__index__() % size
            return self.cut(at, at + 1)
        start, stop, step = key.indices(size)
        if step == 1:
            return self.cut(start, max(start, stop))
        text = str.__getitem__(self, key)
        if step != -1 or not text:
            return text
        bounds = _bounds(self.cut(stop + 1, start + 1))
        return _marked(text, array(_ITEM, [len(text) - bound for bound in reversed(bounds)]))

    def __iter__(self) -> Iterator[str]:
        at = 0
        for start, end in runs_of(self):
            yield from str.__getitem__(self, slice(at, start))
            yield from map(trusted, str.__getitem__(self, slice(start, end)))
            at = end
        yield from str.__getitem__(self, slice(at, len(self)))

    def join(self, items: Iterable[str], /) -> str:
        return join(self, tuple(items))

    def replace(self, old: str, new: str, count: SupportsIndex = -1, /) -> str:
        return replace(self, old, new, count.__index__())

    def split(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.split(self, sep, maxsplit), sep)

    def rsplit(self, sep: str | None = None, maxsplit: SupportsIndex = -1) -> list[str]:
        return self._located(str.rsplit(self, sep, maxsplit), sep)

    def splitlines(self, keepends: bool = False) -> list[str]:
        lines, at = [], 0
        for line, with_end in zip(str.splitlines(self, keepends), str.splitlines(self, True), strict=True):
            lines.append(self.cut(at, at + len(line)))
            at += len(with_end)
        return lines

    def partition(self, sep: str, /) -> tuple[str, str, str]:
        return self._parted(str.partition(self, sep))

    def rpartition(self, sep: str, /) -> tuple[str, str, str]:
        return self._parted(str.rpartition(self, sep))

    def strip(self, chars: str | None = None, /) -> str:
        start = len(self) - len(str.lstrip(self, chars))
        return self.cut(start, start + len(str.strip(self, chars)))

    def lstrip(self, chars: str | None = None, /) -> str:
        return self.cut(len(self) - len(str.lstrip(self, chars)), len(self))

    def rstrip(self, chars: str | None = None, /) -> str:
        return self.cut(0, len(str.rstrip(self, chars)))

    def removeprefix(self, prefix: str, /) -> str:
        return self.cut(len(self) - len(str.removeprefix(self, prefix)), len(self))

    def removesuffix(self, suffix: str, /) -> str:
        return self.cut(0, len(str.removesuffix(self, suffix)))

    def upper(self) -> str:
        return self.respelled(str.upper(self))

    def lower(self) -> str:
        return self.respelled(str.lower(self))

    def title(self) -> str:
        return self.respelled(str.title(self))

    def capitalize(self) -> str:
        return self.respelled(str.capitalize(self))

    def casefold(self) -> str:
        return self.respelled(str.casefold(self))

    def swapcase(self) -> str:
        return self.respelled(str.swapcase(self))

    def _located(self, parts: list[str], sep: str | None) -> list[str]:
        """Parts with the marks that they have here, in order; between two is ``sep``, or white space."""
        found, at = [], 0
        for part in parts:
            if sep is None:  # a part starts with the next character that is no white space
                at = self.find(part, at)
            found.append(self.cut(at, at + len(part)))
            at += len(part) + len(sep or "")
        return found

    def _parted(self, parts: tuple[str, str, str]) -> tuple[str, str, str]:
        one, two = len(parts[0]), len(parts[0]) + len(parts[1])
        return self.cut(0, one), self.cut(one, two), self.cut(two, len(self))


class RenderedChat(str):
    """The text of a conversation. ``trusted``: the ranges that the template wrote, where control tokens are control
    tokens. ``str(chat)``, and any part of it, is plain text without them."""

    __slots__ = ("trusted",)
    trusted: Runs

    @classmethod
    def of(cls, text: str) -> RenderedChat:
        chat = cls(text)
        chat.trusted = runs_of(text)
        return chat


def trusted(text: str) -> str:
    """Text that the template wrote, or is given as its own."""
    return _marked(text, array(_ITEM, (0, len(text)))) if text else ""


def runs_of(text: str) -> Runs:
    """The trusted ranges of any string."""
    bounds = _bounds(text)
    return tuple(zip(bounds[::2], bounds[1::2], strict=True))


def run_count(text: str) -> int:
    """How many trusted ranges a string has; each takes eight bytes."""
    return len(_bounds(text)) // 2


def is_trusted(text: str) -> bool:
    """Whether the template wrote all of it."""
    return not text or _bounds(text) == array(_ITEM, (0, len(text)))


def join(separator: str, parts: Sequence[str]) -> str:
    """``separator.join(parts)``, for strings of any kind."""
    if hasattr(separator, "__html__"):  # Markup escapes
        return separator.join(parts)
    text = str.join(separator, parts)
    between, gap = _bounds(separator), len(separator)
    bounds = array(_ITEM)
    at = 0
    for part in parts:
        if at and between:
            _append(bounds, between, at - gap)
        if isinstance(part, MarkedText):
            _append(bounds, part.bounds, at)
        at += len(part) + gap
    return _marked(text, bounds)


def replace(text: str, old: str, new: str, count: int = -1) -> str:
    """``text.replace(old, new, count)``, for strings of any kind."""
    if not isinstance(text, MarkedText) and (type(text) is not str or not isinstance(new, MarkedText)):
        return text.replace(old, new, count)  # Markup escapes
    if not old:
        return str.replace(text, old, new, count)
    found = str.count(text, old)
    _check(2 * (found if count < 0 else min(found, count)))
    return join(new, text.split(old, count))


def respelled(text: str, other: str) -> str:
    """``other``, which is ``text`` in another case, with its marks."""
    return text.respelled(other) if isinstance(text, MarkedText) else other


_NONE: _Bounds = array(_ITEM)


def _bounds(text: str) -> _Bounds:
    return text.bounds if isinstance(text, MarkedText) else _NONE


def _marked(text: str, bounds: _Bounds) -> str:
    """Text with these bounds; a plain string where there are none."""
    if not bounds:
        return text if type(text) is str else str.__str__(text)
    _check(len(bounds))
    result = MarkedText.__new__(MarkedText, text)
    result.bounds = bounds
    return result


def _append(bounds: _Bounds, more: _Bounds, offset: int) -> None:
    _check(len(bounds) + len(more))
    if not offset:
        bounds.extend(more)
    elif bounds and bounds[-1] == more[0] + offset:
        bounds.pop()
        bounds.extend([bound + offset for bound in more[1:]])
    else:
        bounds.extend([bound + offset for bound in more])


def _check(bounds: int) -> None:
    if bounds > 2 * MAX_RUNS:
        raise TemplateError(
            f"the chat template makes a string of over {MAX_RUNS} pieces, its own and those of messages by turns"
        )
