from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, get_type_hints

import numpy as np
import pytest

from pi2rt._errors import RequestError
from pi2rt.engine import SamplingParams
from pi2rt.engine.sampling_params import SamplingKeywords
from pi2rt.runtime.step import Sampling


def test_the_default_is_greedy_without_end() -> None:
    params = SamplingParams()
    assert (params.temperature, params.max_tokens, params.stop) == (0.0, None, ())
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
        ("seed", np.bool_(True)),
        ("seed", np.float64(1)),
        ("max_tokens", "5"),
        ("top_k", None),
        ("temperature", None),
        ("temperature", True),
        ("temperature", np.bool_(True)),
        ("temperature", "0.5"),
        ("temperature", np.array([0.5, 0.5])),
        ("temperature", 10**400),
        ("ignore_eos", 1),
        ("logit_bias", {True: 1.0}),
        ("logit_bias", {1: "2"}),
        ("stop", ("",)),
        ("stop", ""),
        ("stop", 5),
        ("stop", b"x"),
        ("stop", [None]),
        ("stop_token_ids", 5),
        ("stop_token_ids", "5"),
        ("stop_token_ids", [1.0]),
        ("stop_token_ids", [True]),
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


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        ("end", ("end",)),
        (["a", "b"], ("a", "b")),
        (("a",), ("a",)),
        (iter("ab"), ("a", "b")),
        (None, ()),
        ([], ()),
    ],
)
def test_stop_of_all_kinds(given: Any, kept: tuple[str, ...]) -> None:
    assert SamplingParams(stop=given).stop == kept


@pytest.mark.parametrize(
    "given", [[3, 4], (3, 4), np.array([3, 4]), iter([3, np.int32(4)]), dict.fromkeys([3, 4])]
)
def test_stop_token_ids_of_all_kinds(given: Any) -> None:
    assert SamplingParams(stop_token_ids=given).stop_token_ids == (3, 4)
    assert SamplingParams(stop_token_ids=None).stop_token_ids == ()


def test_fields_hold_plain_values() -> None:
    params = SamplingParams(
        max_tokens=np.int64(5),
        temperature=np.float32(0.5),
        top_k=np.uint8(3),
        top_p=1,
        min_p=np.float16(0.25),
        logit_bias={np.int32(3): np.float64(1.5), 4: -math.inf},
        seed=np.uint64(7),
        logprobs=np.int8(1),
        ignore_eos=np.bool_(True),  # type: ignore[arg-type]
    )
    values = [getattr(params, each.name) for each in fields(params)]
    assert {type(value) for value in values} == {int, float, bool, tuple, dict}
    assert (params.max_tokens, params.temperature, params.top_k, params.min_p) == (5, 0.5, 3, 0.25)
    assert [(type(k), type(v)) for k, v in params.logit_bias.items()] == [(int, float)] * 2
    assert params.sampling() == SamplingParams.of(params, {}).sampling()


def test_given_parameters_and_changes() -> None:
    params = SamplingParams(top_k=3, stop="x")
    assert SamplingParams.of(params, {}) is params
    assert SamplingParams.of(None, {"top_k": 5}) == SamplingParams(top_k=5)
    assert SamplingParams.of(params, {"stop": None}) == SamplingParams(top_k=3)
    with pytest.raises(
        RequestError, match=r"^params={'top_k': 5}: SamplingParams are needed; single parameters are"
    ):
        SamplingParams.of({"top_k": 5}, {})  # type: ignore[arg-type]


def test_stop_may_be_one_string() -> None:
    assert SamplingParams(stop="end").stop == ("end",)
    assert SamplingParams(stop=("a", "b")).stop == ("a", "b")


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
