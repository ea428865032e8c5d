"""The filters of chat templates: Jinja's own where what they make stays small, ours elsewhere.

Those that make markup or tables, or choose at random, are left out; no chat template needs them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from jinja2 import Environment
from jinja2.filters import FILTERS, make_attrgetter

from pi2rt._errors import TemplateError
from pi2rt.tokenizer import marked_text
from pi2rt.tokenizer import template_strings as strings
from pi2rt.tokenizer.template_budget import MAX_ITEMS, Budget
from pi2rt.tokenizer.template_operators import add

Filter = Callable[..., Any]

# Jinja's own, as they are: they return at most a few times what they get
_PLAIN = (
    "abs", "attr", "capitalize", "count", "d", "default", "e", "escape", "first", "float", "int", "items",
    "last", "length", "lower", "safe", "string", "upper",
)  # fmt: skip
_OF_TEXT = ("capitalize", "e", "escape", "lower", "safe", "string", "truncate", "upper")
# Jinja's own, over the items of a list, or over the characters of a string if it is not too long
_OVER_ITEMS = (
    "dictsort", "groupby", "map", "max", "min", "reject", "rejectattr", "reverse", "select", "selectattr",
    "sort", "unique",
)  # fmt: skip
# Jinja's own, with numbers that say how large the result is
_SIZED = {"batch": MAX_ITEMS, "slice": MAX_ITEMS, "round": 300, "truncate": MAX_ITEMS}


def checked_arguments(budget: Budget, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Checks what one of Jinja's own filters is about to be called with.

    Raises:
        TemplateError: its result would be too large.
    """
    value = args[0] if args else None
    if name in _OVER_ITEMS or name in ("batch", "slice"):
        if isinstance(value, str):
            budget.check_items(len(value))
    elif name in _OF_TEXT:
        budget.check_characters(budget.weigh(value))  # they begin by making a string of it
    limit = _SIZED.get(name)
    if limit is not None:
        for number in (*args[1:], *kwargs.values()):
            if isinstance(number, (int, float)) and not abs(number) <= limit:
                raise TemplateError(f"the chat template calls {name!r} with a number over {limit}")


def built_in_filters() -> dict[str, Filter]:
    """Filters of Jinja's that only need ``checked_arguments`` before."""
    return {name: FILTERS[name] for name in (*_PLAIN, *_OVER_ITEMS, *_SIZED)}


def own_filters() -> dict[str, Filter]:
    """Filters that take (environment, budget, value, ...)."""
    return {
        "center": _center,
        "format": _format,
        "indent": _indent,
        "join": _join,
        "list": _list,
        "replace": _replace,
        "sum": _sum,
        "title": _title,
        "tojson": _tojson,
        "trim": _trim,
    }


def _center(environment: Environment, budget: Budget, value: object, width: int = 80) -> str:
    text = strings.text_of(budget, value)
    return text.center(width if width <= len(text) else strings.width(width))


def _format(environment: Environment, budget: Budget, value: object, *args: Any, **kwargs: Any) -> str:
    if args and kwargs:
        raise TemplateError("the chat template formats with positional and named values at once")
    return strings.percent(budget, strings.text_of(budget, value), kwargs or args)


def _indent(
    environment: Environment,
    budget: Budget,
    value: object,
    width: int | str = 4,
    first: bool = False,
    blank: bool = False,
) -> str:
    text = str(strings.text_of(budget, value))
    length = len(width) if isinstance(width, str) else strings.width(width)
    lines = strings.count_lines(text) + 1
    budget.check_items(lines)
    budget.check_characters(len(text) + lines * (length + 1))
    indent = " " * width if isinstance(width, int) else width
    # a line end at the end of the text begins another line, which is blank
    start, *others = [text] if not text else (text + "\n").splitlines()
    others = [indent + line if line or blank else line for line in others]
    result = marked_text.join("\n", [start, *others])
    return indent + result if first else result


def _join(
    environment: Environment,
    budget: Budget,
    value: Iterable[Any],
    d: object = "",
    attribute: str | int | None = None,
) -> str:
    items: Iterable[Any] = budget.bounded(value)
    if attribute is not None:
        items = map(make_attrgetter(environment, attribute), items)
    return strings.join(budget, strings.text_of(budget, d), items)


def _list(environment: Environment, budget: Budget, value: Iterable[Any]) -> list[Any]:
    return budget.bounded(value)


def _replace(
    environment: Environment,
    budget: Budget,
    value: object,
    old: object,
    new: object,
    count: int | None = None,
) -> str:
    text, old_text, new_text = (strings.text_of(budget, part) for part in (value, old, new))
    return strings.replace(budget, text, old_text, new_text, -1 if count is None else count)


def _sum(
    environment: Environment,
    budget: Budget,
    value: Iterable[Any],
    attribute: str | int | None = None,
    start: Any = 0,
) -> Any:
    items: Iterable[Any] = budget.bounded(value)
    if attribute is not None:
        items = map(make_attrgetter(environment, attribute), items)
    for item in items:
        start = budget.charge(add(budget, start, item))
    return start


def _title(environment: Environment, budget: Budget, value: object) -> str:
    text = strings.text_of(budget, value)
    budget.check_items(len(text))  # it makes a list of the words
    return marked_text.respelled(text, str(FILTERS["title"](text)))


def _tojson(
    environment: Environment,
    budget: Budget,
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Any = None,
    sort_keys: bool = False,
) -> str:
    """As transformers has it: no escapes for HTML. The text is made in parts, for indents add up with
    depth."""
    budget.weigh(value)
    if indent is not None and (len(indent) if isinstance(indent, str) else indent) > 16:
        raise TemplateError("the chat template calls 'tojson' with an indent over 16")
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    parts, characters = [], 0
    for part in encoder.iterencode(value):
        parts.append(part)
        characters += len(part)
        budget.tick()
        budget.check_characters(characters)
    return "".join(parts)


def _trim(environment: Environment, budget: Budget, value: object, chars: str | None = None) -> object:
    return strings.call_method(environment, budget, strings.text_of(budget, value), "strip", (chars,), {})
