"""What a request asks of its text: how tokens are picked and when to end."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from operator import index
from typing import TYPE_CHECKING, Any, SupportsFloat, SupportsIndex, TypedDict, Unpack

import numpy as np

from pi2rt._errors import RequestError
from pi2rt.runtime.step import Sampling

MOST_STOPS = 64
MOST_LOGPROBS = 64
SMALLEST = 2.0**-126
"""The smallest normal float32. Logits are divided by numbers of that type, and what is smaller ends as 0 in it."""


class SamplingKeywords(TypedDict, total=False):
    """What the fields of ``SamplingParams`` accept, as keywords. Integers and numbers may be NumPy scalars."""

    max_tokens: SupportsIndex | None
    temperature: SupportsFloat
    top_k: SupportsIndex
    top_p: SupportsFloat
    min_p: SupportsFloat
    repetition_penalty: SupportsFloat
    presence_penalty: SupportsFloat
    frequency_penalty: SupportsFloat
    logit_bias: Mapping[Any, SupportsFloat] | None  # keys: SupportsIndex; a mapping is invariant in them
    seed: SupportsIndex | None
    stop: str | Iterable[str] | None
    stop_token_ids: Iterable[SupportsIndex] | None
    ignore_eos: bool
    logprobs: SupportsIndex | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the text of one request is made. The default is greedy: the top-1 token each time, the same text for the
    same prompt.

    Order: penalties and ``logit_bias`` change the logits; then temperature; then ``top_k``, ``top_p`` and
    ``min_p`` keep the more probable tokens; then one is drawn.

    Fields hold plain values (``int``, ``float``, tuples), whatever was passed: ``stop="x"`` is ``("x",)``,
    ``stop=None`` is ``()``, a NumPy scalar is the Python number.

    Values in their ranges may still leave no token to pick, such as a bias that forbids all of them. Then the request
    alone ends with RequestError, when that is found.

    Raises:
        RequestError: a value out of its range; the message names the field, the value and the range.
    """

    max_tokens: int | None = None
    """Tokens to generate at most, at least 1. None: until the context is full."""
    temperature: float = 0.0
    """0 is greedy; 1 is the model's own distribution; larger is flatter. At most 100; if not 0, at least 1.2e-38."""
    top_k: int = 0
    """Keep the k most probable tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of most probable tokens whose probabilities reach this, in (0, 1]. Holtzman et al.,
    2019."""
    min_p: float = 0.0
    """Keep tokens at least this probable relative to the most probable one, in [0, 1]. Nguyen et al., 2024."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens already there, from 1.2e-38 to 100. Keskar et
    al., 2019."""
    presence_penalty: float = 0.0
    """Subtracted once from the logit of every token already there, in [-100, 100]."""
    frequency_penalty: float = 0.0
    """Subtracted from a token's logit once for each time it is already there, in [-100, 100]."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids; finite, or minus infinity to forbid a token."""
    seed: int | None = None
    """For drawing, 0 to 2**63 - 1. None: a fresh one for each request."""
    stop: tuple[str, ...] = ()
    """Strings that end the text when they appear; they are not part of it. A control token adds no text, but ends it
    where a stop string is its spelling."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the text, beside the model's own; they add no text."""
    ignore_eos: bool = False
    """Do not end at the model's own end-of-text tokens."""
    logprobs: int | None = None
    """None: no log probabilities. n: of the chosen token and of the n most probable ones, 0 to 64."""

    if TYPE_CHECKING:  # what may be passed is more than what fields hold

        def __init__(self, **keywords: Unpack[SamplingKeywords]) -> None: ...

    def __post_init__(self) -> None:
        given = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name, (low, high) in _INTEGERS.items():
            if given[name] is not None or name == "top_k":
                given[name] = _integer(name, given[name], low, high)
        for name, (low, high) in _NUMBERS.items():
            given[name] = _logit_number(name, given[name], low, high)
        given["logit_bias"] = _biases(given["logit_bias"])
        given["stop"] = _stops(given["stop"])
        given["stop_token_ids"] = _token_ids("stop_token_ids", given["stop_token_ids"])
        if not isinstance(self.ignore_eos, bool | np.bool_):
            raise RequestError(f"ignore_eos={self.ignore_eos!r}: True or False is needed")
        given["ignore_eos"] = bool(self.ignore_eos)
        for name, value in given.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of(cls, params: SamplingParams | None, changes: SamplingKeywords) -> SamplingParams:
        """What ``stream`` and ``generate`` were given: ``params``, None for the default, with ``changes``.

        Raises:
            RequestError: ``params`` is something else, or a change is out of its range.
            TypeError: a change has no such name.
        """
        if params is None:
            return cls(**changes)
        if not isinstance(params, SamplingParams):
            raise RequestError(
                f"params={params!r}: SamplingParams are needed; single parameters are keywords, such as max_tokens=50"
            )
        changed: dict[str, Any] = {**changes}
        return replace(params, **changed) if changed else params

    def sampling(self) -> Sampling:
        """The part that executors read. Draws a seed where none was given, so call it once for each
        request."""
        return Sampling(
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=tuple(self.logit_bias.items()),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            logprobs=-1 if self.logprobs is None else self.logprobs,
        )


_INTEGERS = {
    "max_tokens": (1, 2**31 - 1),
    "top_k": (0, 2**31 - 1),
    "seed": (0, 2**63 - 1),
    "logprobs": (0, MOST_LOGPROBS),
}
_NUMBERS = {
    "temperature": (0, 100),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0, 100),
    "presence_penalty": (-100, 100),
    "frequency_penalty": (-100, 100),
}
_ABOVE = ("top_p", "repetition_penalty")  # whose low end is not allowed


def _integer(name: str, value: object, low: int, high: int) -> int:
    if not isinstance(value, bool | np.bool_):
        try:
            number = index(value)  # type: ignore[arg-type]  # the point of the call
        except TypeError:
            pass
        else:
            if low <= number <= high:
                return number
    raise RequestError(f"{name}={value!r}: an integer from {low} to {high} is needed")


def number(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> float:
    """``value`` as a float. Raises RequestError where it is none, or outside ``low`` to ``high``."""
    if isinstance(value, SupportsFloat) and not isinstance(value, bool | np.bool_):
        try:
            number = float(value)
        except (TypeError, ValueError, OverflowError):  # an array, an integer beyond all floats
            number = math.nan
        if low <= number <= high and not (open_low and number == low):  # also refuses NaN
            return number
    above = f"above {low:g} and up to" if open_low else f"from {low:g} to"
    raise RequestError(f"{name}={value!r}: a number {above} {high:g} is needed")


def _logit_number(name: str, value: object, low: float, high: float) -> float:
    """A number that logits, or probabilities of them, are computed with."""
    open_low = name in _ABOVE
    found = number(name, value, low, high, open_low=open_low)
    if low == 0 < found < SMALLEST:
        zero = "" if open_low else "0 or "
        raise RequestError(
            f"{name}={value!r}: too small for float32, in which logits are; {zero}at least {SMALLEST:.8g} is needed"
        )
    return found


def _biases(given: object) -> dict[int, float]:
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise RequestError(f"logit_bias={given!r}: a mapping of token id to number is needed")
    return {
        _integer("logit_bias: token id", token, 0, 2**31 - 1): (
            -math.inf if bias == -math.inf else number(f"logit_bias[{token}]", bias, -1e9, 1e9)
        )
        for token, bias in given.items()
    }


def _stops(given: object) -> tuple[str, ...]:
    stops: tuple[object, ...]
    if given is None:
        stops = ()
    elif isinstance(given, str) or not isinstance(given, Iterable):
        stops = (given,)
    else:
        stops = tuple(given)
    strings = tuple(stop for stop in stops if isinstance(stop, str) and stop)
    if len(strings) != len(stops) or len(stops) > MOST_STOPS:
        raise RequestError(f"stop={given!r}: at most {MOST_STOPS} strings, none of them empty, are allowed")
    return strings


def _token_ids(name: str, given: object) -> tuple[int, ...]:
    if given is None:
        return ()
    if not isinstance(given, Iterable) or isinstance(given, str | bytes):
        raise RequestError(f"{name}={given!r}: a list of token ids is needed")
    return tuple(_integer(f"{name}: token id", token, 0, 2**31 - 1) for token in given)
