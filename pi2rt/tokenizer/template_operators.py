"""Arithmetic of chat templates: on numbers of ordinary size, strings and lists."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from pi2rt._errors import TemplateError
from pi2rt.tokenizer.template_budget import MAX_INTEGER_BITS, Budget
from pi2rt.tokenizer.template_strings import percent

_NUMBERS: dict[str, Callable[[Any, Any], Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
}
OPERATORS = frozenset((*_NUMBERS, "**"))


def apply(budget: Budget, symbol: str, left: Any, right: Any) -> Any:
    """``left symbol right``.

    Raises:
        TemplateError: the result would be too large.
        TypeError: there is no such operation on these.
    """
    if isinstance(left, (int, float)) and isinstance(right, (int, float)):
        return _power(left, right) if symbol == "**" else _NUMBERS[symbol](left, right)
    if symbol == "+":
        return add(budget, left, right)
    if symbol == "*":
        return _repeat(budget, left, right)
    if symbol == "%" and isinstance(left, str):
        return percent(budget, left, right)
    if isinstance(left, (str, bytes, list, tuple, dict)) or isinstance(
        right, (str, bytes, list, tuple, dict)
    ):
        raise TypeError(f"unsupported operands of {symbol}: {type(left).__name__} and {type(right).__name__}")
    return operator.pow(left, right) if symbol == "**" else _NUMBERS[symbol](left, right)


def add(budget: Budget, left: Any, right: Any) -> Any:
    if isinstance(left, str) and isinstance(right, str):
        budget.check_characters(len(left) + len(right))
    elif isinstance(left, (list, tuple)) and isinstance(right, (list, tuple)):
        budget.check_items(len(left) + len(right))
    return left + right


def _repeat(budget: Budget, left: Any, right: Any) -> Any:
    many, count = (right, left) if isinstance(left, int) else (left, right)
    if isinstance(many, (str, list, tuple)) and isinstance(count, int):
        check = budget.check_characters if isinstance(many, str) else budget.check_items
        check(len(many) * count)
    elif isinstance(many, (bytes, bytearray)):
        raise TypeError("bytes cannot be repeated")
    return left * right


def _power(left: float, right: float) -> Any:
    if isinstance(left, int) and isinstance(right, int) and left.bit_length() * right > MAX_INTEGER_BITS:
        raise TemplateError(f"the chat template makes an integer of over {MAX_INTEGER_BITS} bits")
    return left**right
