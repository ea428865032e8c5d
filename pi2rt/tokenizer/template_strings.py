"""Operations on strings whose result can be far larger than what goes in, or that take far longer: measured
first. They keep the marks of trusted characters (``marked_text``)."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from jinja2 import Environment
from jinja2.exceptions import SecurityError
from jinja2.sandbox import SandboxedFormatter

from pi2rt._errors import TemplateError
from pi2rt.tokenizer import marked_text
from pi2rt.tokenizer.marked_text import MarkedText
from pi2rt.tokenizer.template_budget import MAX_ITEMS, Budget

MAX_WIDTH = 1000  # of padding, indents and numbers
MAX_FORMAT_CHARACTERS = 1 << 16  # of a format string
MAX_COMPARED = 1 << 28  # characters, in searches that may take length times length

_NUMBER = re.compile(r"\d+")
_LINE_ENDS = "\n\r\v\f\x1c\x1d\x1e\x85\u2028\u2029"

# what templates may call on strings; everything else of str is refused
_PLAIN_METHODS = frozenset(
    (
        "capitalize", "casefold", "count", "endswith", "find", "index", "isalnum", "isalpha", "isascii",
        "isdecimal", "isdigit", "islower", "isnumeric", "isspace", "istitle", "isupper", "lower", "partition",
        "removeprefix", "removesuffix", "startswith", "swapcase", "title", "upper",
    )
)  # fmt: skip


def text_of(budget: Budget, value: object) -> str:
    """``str(value)``, once it is known not to be too long."""
    if isinstance(value, str):
        return value
    if not isinstance(value, (int, float)):
        budget.weigh(value)
    return str(budget.charge(str(value)))


def concatenate(budget: Budget, parts: Iterable[object]) -> str:
    texts = [str(text_of(budget, part)) for part in parts]
    budget.check_characters(sum(map(len, texts)))
    return marked_text.join("", texts)


def join(budget: Budget, separator: str, items: Iterable[object]) -> str:
    texts = [text_of(budget, item) for item in budget.bounded(items)]
    budget.check_characters(sum(map(len, texts)) + len(separator) * max(len(texts) - 1, 0))
    return marked_text.join(separator, texts)


def replace(budget: Budget, text: str, old: str, new: str, count: int = -1) -> str:
    found = text.count(old) if count < 0 else min(text.count(old), count)
    budget.check_characters(len(text) + found * (len(new) - len(old)))
    return marked_text.replace(text, old, new, count)


def width(value: object) -> int:
    """A width, checked.

    Raises:
        TemplateError: it is not a number, or too large.
    """
    if not isinstance(value, int) or not -MAX_WIDTH <= value <= MAX_WIDTH:
        shown = value if isinstance(value, (int, float)) and abs(value) < 1e15 else type(value).__name__
        raise TemplateError(f"the chat template pads or indents by {shown}; {MAX_WIDTH} is the most allowed")
    return value


def percent(budget: Budget, template: str, arguments: object) -> str:
    """``template % arguments``, once the widths in it and the lengths of its arguments are known to be
    small."""
    if len(template) > MAX_FORMAT_CHARACTERS:
        raise TemplateError(f"the chat template formats by a string of {len(template)} characters")
    directives: list[tuple[int, int]] = []
    characters = end = len(template)
    at = template.find("%")
    while at >= 0:
        start = at
        at += 1
        if template.startswith("(", at):  # the name of a mapping's key; parentheses in it come in pairs
            depth = 1
            at += 1
            while at < end and depth:
                depth += {"(": 1, ")": -1}.get(template[at], 0)
                at += 1
        conversion = at
        while conversion < end and template[conversion] in "#0- +.*123456789":
            conversion += 1
        directive = template[at:conversion]
        if "*" in directive:
            raise TemplateError("the chat template formats with '*' for a width, which is refused")
        characters += sum(width(int(number[:9])) for number in _NUMBER.findall(directive))
        directives.append((start, min(conversion + 1, end)))
        at = template.find("%", conversion + 1)
    fields = len(directives)
    weight = budget.weigh(arguments)
    budget.check_characters(characters + weight * (fields if isinstance(arguments, Mapping) else 1))
    budget.tick(fields)
    text: str = template % arguments
    if not isinstance(template, MarkedText):
        return text
    return _as_marked(text, lambda: _percent_parts(template, directives, arguments))


def _percent_parts(
    template: MarkedText, directives: Iterable[tuple[int, int]], arguments: object
) -> Iterable[str]:
    """What ``template % arguments`` is made of."""
    by_name = isinstance(arguments, Mapping)
    values = iter(arguments if isinstance(arguments, tuple) else (arguments,))
    at = 0
    for start, end in directives:
        yield template.cut(at, start)
        at = end
        directive = str(template)[start:end]
        if directive == "%%":
            yield template.cut(start, start + 1)
        elif by_name:
            yield str.__mod__(directive, arguments)
        else:
            value = next(values, "")
            yield value if directive == "%s" and isinstance(value, str) else str.__mod__(directive, (value,))
    yield template.cut(at, len(template))


def _as_marked(text: str, make_parts: Callable[[], Iterable[str]]) -> str:
    """``text`` with the marks of its parts. Where they do not spell it, it counts as content: Python's own formatting
    decides what the text is, ours only where it comes from."""
    try:
        rebuilt = marked_text.join("", list(make_parts()))
    except (TypeError, ValueError, LookupError):
        return text
    return rebuilt if rebuilt == text else text


class _Formatter(SandboxedFormatter):
    """``parts``: of the result, in order; literal text has the marks of the format string if all of it has."""

    def __init__(self, environment: Environment, budget: Budget, literal: Callable[[str], str]) -> None:
        super().__init__(environment)
        self._budget, self._characters = budget, 0
        self._literal, self._depth = literal, 0
        self.parts: list[str] = []

    def parse(self, format_string: str) -> Iterator[tuple[str, str | None, str | None, str | None]]:
        self._depth += 1  # the specification of a field is a format string too, and no part of the result
        for piece in super().parse(format_string):
            if self._depth == 1:
                self.parts.append(self._literal(piece[0]))
            yield piece
        self._depth -= 1

    def format_field(self, value: Any, format_spec: str) -> Any:
        for number in _NUMBER.findall(format_spec):
            width(int(number[:9]))
        self._budget.tick()
        self._budget.weigh(value)
        text = super().format_field(value, format_spec)
        self._characters += len(text)
        self._budget.check_characters(self._characters)
        if self._depth == 1:
            self.parts.append(text)
        return text


def call_method(
    environment: Environment, budget: Budget, text: str, name: str, args: Any, kwargs: Any
) -> object:
    """Calls a method of a string.

    Raises:
        SecurityError: templates may not call it.
        TemplateError: its result would be too large.
    """
    if name in _PLAIN_METHODS:
        return getattr(text, name)(*args, **kwargs)
    method = _METHODS.get(name)
    if method is not None:
        return method(budget, text, *args, **kwargs)
    if name == "format":
        if len(text) > MAX_FORMAT_CHARACTERS:
            raise TemplateError(f"the chat template formats by a string of {len(text)} characters")
        literal = marked_text.trusted if marked_text.is_trusted(text) else str
        formatter = _Formatter(environment, budget, literal)
        result = formatter.vformat(text, args, kwargs)
        return _as_marked(result, lambda: formatter.parts)
    raise SecurityError(f"the method {name!r} of strings is refused")


def is_callable_method(name: str) -> bool:
    return name in _PLAIN_METHODS or name in _METHODS or name == "format"


def _split(budget: Budget, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    parts = text.split(sep, MAX_ITEMS if maxsplit < 0 else min(maxsplit, MAX_ITEMS))
    budget.check_items(len(parts))
    return parts


def _rsplit(budget: Budget, text: str, sep: str | None = None, maxsplit: int = -1) -> list[str]:
    _check_search(text, sep or "")
    parts = text.rsplit(sep, MAX_ITEMS if maxsplit < 0 else min(maxsplit, MAX_ITEMS))
    budget.check_items(len(parts))
    return parts


def _splitlines(budget: Budget, text: str, keepends: bool = False) -> list[str]:
    budget.check_items(count_lines(text))
    return text.splitlines(keepends)


def count_lines(text: str) -> int:
    """At least as many as ``text.splitlines()`` has."""
    return 1 + sum(map(text.count, _LINE_ENDS))


def _check_search(text: str, sought: str) -> None:
    """Searches from the end, and stripping, compare every character with every other in the worst case."""
    if len(text) * len(sought) > MAX_COMPARED:
        raise TemplateError(
            f"the chat template looks for {len(sought)} characters in {len(text)}, which may take too long"
        )


def _searching(name: str) -> Callable[..., object]:
    def method(budget: Budget, text: str, sought: str | None = None, *args: int) -> object:
        _check_search(text, sought or "")
        return getattr(text, name)(sought, *args)

    return method


def _padding(name: str) -> Callable[..., object]:
    def method(budget: Budget, text: str, size: int, *args: str) -> object:
        if size > len(text):
            width(size)
        return getattr(text, name)(size, *args)

    return method


_METHODS: Mapping[str, Callable[..., object]] = {
    "join": join,
    "replace": replace,
    "split": _split,
    "rsplit": _rsplit,
    "splitlines": _splitlines,
    **{name: _searching(name) for name in ("strip", "lstrip", "rstrip", "rfind", "rindex", "rpartition")},
    **{name: _padding(name) for name in ("center", "ljust", "rjust", "zfill")},
}
