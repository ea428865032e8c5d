"""What a request asks of its text: how tokens are picked and when to end."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypedDict

from pi2rt._errors import RequestError
from pi2rt.runtime.step import Sampling

MOST_STOPS = 64
MOST_LOGPROBS = 64
SMALLEST = 2.0**-126
"""The smallest normal float32. Logits are divided by numbers of that type, and what is smaller ends as 0 in it."""


class SamplingKeywords(TypedDict, total=False):
    """The fields of ``SamplingParams`` as keywords."""

    max_tokens: int | None
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]
    seed: int | None
    stop: str | tuple[str, ...]
    stop_token_ids: tuple[int, ...]
    ignore_eos: bool
    logprobs: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How the text of one request is made. The default is greedy: the top-1 token each time, the same text for the
    same prompt.

    Order: penalties and ``logit_bias`` change the logits; then temperature; then ``top_k``, ``top_p`` and
    ``min_p`` keep the likelier tokens; then one is drawn.

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
    """Keep the k likeliest tokens; 0 keeps all."""
    top_p: float = 1.0
    """Keep the smallest set of likeliest tokens whose probabilities reach this, in (0, 1]. Holtzman et al.,
    2019."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the likeliest, in [0, 1]. Nguyen et al., 2024."""
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
    stop: str | tuple[str, ...] = ()
    """Strings that end the text when they appear; they are not part of it."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the text, beside the model's own; they add no text."""
    ignore_eos: bool = False
    """Do not end at the model's own end-of-text tokens."""
    logprobs: int | None = None
    """None: no log probabilities. n: of the chosen token and of the n likeliest, 0 to 64."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None:
            _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_float("temperature", self.temperature, 0, 100)
        _check_int("top_k", self.top_k, 0, 2**31 - 1)
        _check_float("top_p", self.top_p, 0, 1, open_low=True)
        _check_float("min_p", self.min_p, 0, 1)
        _check_float("repetition_penalty", self.repetition_penalty, 0, 100, open_low=True)
        _check_float("presence_penalty", self.presence_penalty, -100, 100)
        _check_float("frequency_penalty", self.frequency_penalty, -100, 100)
        if self.seed is not None:
            _check_int("seed", self.seed, 0, 2**63 - 1)
        if self.logprobs is not None:
            _check_int("logprobs", self.logprobs, 0, MOST_LOGPROBS)
        if not isinstance(self.logit_bias, Mapping):
            raise RequestError(f"logit_bias={self.logit_bias!r}: a mapping of token id to number is needed")
        for token, bias in self.logit_bias.items():
            _check_int("logit_bias: token id", token, 0, 2**31 - 1)
            if bias != -math.inf:
                _check_float(f"logit_bias[{token}]", bias, -1e9, 1e9)
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        if not all(isinstance(s, str) and s for s in stop) or len(stop) > MOST_STOPS:
            raise RequestError(
                f"stop={self.stop!r}: at most {MOST_STOPS} strings, none of them empty, are allowed"
            )
        object.__setattr__(self, "stop", stop)
        ids = tuple(self.stop_token_ids)
        for token in ids:
            _check_int("stop_token_ids: token id", token, 0, 2**31 - 1)
        object.__setattr__(self, "stop_token_ids", ids)

    @property
    def stops(self) -> tuple[str, ...]:
        """``stop`` as a tuple, whichever way it was given."""
        assert isinstance(self.stop, tuple)
        return self.stop

    def sampling(self) -> Sampling:
        """The part that executors read. Draws a seed where none was given, so call it once for each
        request."""
        return Sampling(
            temperature=float(self.temperature),
            top_k=self.top_k,
            top_p=float(self.top_p),
            min_p=float(self.min_p),
            repetition_penalty=float(self.repetition_penalty),
            presence_penalty=float(self.presence_penalty),
            frequency_penalty=float(self.frequency_penalty),
            logit_bias=tuple((int(token), float(bias)) for token, bias in self.logit_bias.items()),
            seed=secrets.randbits(63) if self.seed is None else self.seed,
            logprobs=-1 if self.logprobs is None else self.logprobs,
        )


def _check_int(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise RequestError(f"{name}={value!r}: an integer from {low} to {high} is needed")


def _check_float(name: str, value: object, low: float, high: float, *, open_low: bool = False) -> None:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not low <= value <= high  # also refuses NaN
        or (open_low and value == low)
    ):
        above = f"above {low:g} and up to" if open_low else f"from {low:g} to"
        raise RequestError(f"{name}={value!r}: a number {above} {high:g} is needed")
    if low == 0 < value < SMALLEST:
        zero = "" if open_low else "0 or "
        raise RequestError(
            f"{name}={value!r}: too small for float32, in which logits are; {zero}at least {SMALLEST:.8g} is needed"
        )
