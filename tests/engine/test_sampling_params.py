from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, get_type_hints

import pytest

from pi2rt._errors import RequestError
from pi2rt.engine import SamplingParams
from pi2rt.engine.sampling_params import SamplingKeywords
from pi2rt.runtime.step import Sampling


def test_the_default_is_greedy_without_end() -> None:
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.stops) == (0.0, None, ())
    sampling = params.sampling()
    assert sampling == Sampling(seed=sampling.seed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("max_tokens", True),
        ("max_tokens", 1.5),
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", math.inf),
        ("temperature", "hot"),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", 1e-45),
        ("repetition_penalty", 1e-38),
        ("repetition_penalty", 1e-300),
        ("temperature", 1e-45),
        ("temperature", 5e-324),
        ("top_p", 1e-40),
        ("min_p", 1e-40),
        ("presence_penalty", 101),
        ("frequency_penalty", -101),
        ("seed", -1),
        ("seed", 1 << 63),
        ("logprobs", -1),
        ("logprobs", 65),
        ("stop", ("",)),
        ("stop", (1,)),
        ("stop", ("x",) * 65),
        ("stop_token_ids", (-1,)),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {1: math.nan}),
        ("logit_bias", {1: math.inf}),
        ("logit_bias", [1, 2]),
    ],
)
def test_values_out_of_range_name_field_value_and_range(name: str, value: Any) -> None:
    with pytest.raises(RequestError, match=rf"^{name}\b.* (needed|allowed)$"):
        SamplingParams(**{name: value})


def test_the_smallest_number_is_named_and_allowed() -> None:
    for name, zero in ("temperature", "0 or "), ("min_p", "0 or "), ("top_p", ""), ("repetition_penalty", ""):
        with pytest.raises(
            RequestError, match=rf"^{name}=1e-45: too small .*; {zero}at least 1\.1754944e-38 is needed$"
        ):
            SamplingParams(**{name: 1e-45})  # type: ignore[arg-type]
        SamplingParams(**{name: 1.1754944e-38})  # type: ignore[arg-type]
        SamplingParams(**{name: 2.0**-126})  # type: ignore[arg-type]


def test_a_range_is_named() -> None:
    with pytest.raises(RequestError, match=r"^top_p=0.0: a number above 0 and up to 1 is needed$"):
        SamplingParams(top_p=0.0)


@pytest.mark.parametrize(
    "keywords",
    [
        {"max_tokens": 1, "seed": 0, "logprobs": 0},
        {"top_p": 1, "min_p": 1, "temperature": 100, "repetition_penalty": 100},
        {"seed": (1 << 63) - 1, "logit_bias": {3: -math.inf, 4: 5}},
    ],
)
def test_limits_are_allowed(keywords: dict[str, Any]) -> None:
    SamplingParams(**keywords)


def test_stop_may_be_one_string() -> None:
    assert SamplingParams(stop="end").stops == ("end",)
    assert SamplingParams(stop=("a", "b")).stops == ("a", "b")


def test_what_executors_get() -> None:
    params = SamplingParams(temperature=1, top_k=5, logit_bias={3: -1}, seed=9, logprobs=2)
    assert params.sampling() == Sampling(
        temperature=1.0, top_k=5, logit_bias=((3, -1.0),), seed=9, logprobs=2
    )


def test_each_request_has_a_fresh_seed_unless_one_is_given() -> None:
    assert SamplingParams().sampling().seed != SamplingParams().sampling().seed
    assert SamplingParams(seed=4).sampling().seed == SamplingParams(seed=4).sampling().seed == 4


def test_the_keywords_are_the_fields() -> None:
    assert list(get_type_hints(SamplingKeywords)) == [field.name for field in fields(SamplingParams)]
