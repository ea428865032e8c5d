"""Options of executors and cluster units: keyword arguments of their constructors.

A plug-in declares an option by a keyword argument with a default: ``def __init__(self, device: str = "GPU")``. Its type
is that of the default: str, int, float or bool; ``key: str | None = None`` is a text that need not be given. Other
arguments are no options, and cannot be set from outside. A value that the constructor refuses raises ValueError there.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import partial
from typing import TypeAlias, TypeVar

from pi2rt._errors import RequestError

OptionValue: TypeAlias = str | int | float | bool | None
PluginOptions: TypeAlias = Mapping[str, Mapping[str, OptionValue]]
"""By the name of the plug-in and that of the option."""

T = TypeVar("T")

_TRUE, _FALSE = ("on", "true", "yes", "1"), ("off", "false", "no", "0")


def option_defaults(factory: Callable[..., object]) -> dict[str, OptionValue]:
    """The options that a class or function takes, with their defaults."""
    try:
        parameters = inspect.signature(factory).parameters.values()
    except (TypeError, ValueError):  # a compiled one that does not tell its signature
        return {}
    return {
        each.name: each.default
        for each in parameters
        if each.kind in (each.KEYWORD_ONLY, each.POSITIONAL_OR_KEYWORD)
        and (_is_text(each) or type(each.default) in (str, int, float, bool))
    }


def _is_text(parameter: inspect.Parameter) -> bool:
    """``key: str | None = None``"""
    return parameter.default is None and str(parameter.annotation) in ("str | None", "typing.Optional[str]")


def with_options(name: str, factory: Callable[..., T], given: Mapping[str, OptionValue]) -> Callable[..., T]:
    """The factory with these options. Texts become what the default is, so that they may come from a command line.

    Raises:
        RequestError: there is no such option, or the value is none of its type.
    """
    if not given:
        return factory
    known = option_defaults(factory)
    values = {}
    for key, value in given.items():
        if key not in known:
            raise RequestError(
                f"{name}.{key}: {name!r} has no such option; "
                + (f"there are: {', '.join(sorted(known))}" if known else "it has none")
            )
        values[key] = _typed(f"{name}.{key}", value, known[key])
    return partial(_make, name, factory, values)


def _make(name: str, factory: Callable[..., T], values: Mapping[str, OptionValue]) -> T:
    try:
        return factory(**values)
    except ValueError as error:
        raise RequestError(f"{name!r} does not take its options: {error}") from error


def _typed(what: str, value: OptionValue, default: OptionValue) -> OptionValue:
    kind = str if default is None else type(default)
    if value is None and default is None:
        return None
    try:
        if kind is bool and isinstance(value, str) and value.lower() in (*_TRUE, *_FALSE):
            return value.lower() in _TRUE
        if kind in (int, float) and isinstance(value, str):
            return kind(value)
    except ValueError:
        pass
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        needed = {str: "a text", int: "an integer", float: "a number", bool: "on or off"}[kind]
        raise RequestError(f"{what}={value!r}: {needed} is needed; the default is {default!r}")
    return value


def parse_options(given: list[str]) -> dict[str, dict[str, OptionValue]]:
    """Of a command line: texts "NAME.KEY=VALUE".

    Raises:
        RequestError: one is none, or is there twice.
    """
    found: dict[str, dict[str, OptionValue]] = {}
    for text in given:
        left, equals, value = text.partition("=")
        name, dot, key = left.rpartition(".")
        if not (equals and dot and name and key):
            raise RequestError(
                f"{text!r}: an option of an executor is NAME.KEY=VALUE, such as npu.device=GPU"
            )
        if key in found.setdefault(name, {}):
            raise RequestError(f"{name}.{key} is given twice")
        found[name][key] = value
    return found
