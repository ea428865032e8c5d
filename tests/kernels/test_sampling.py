"""The native sampler picks what ``pi2rt.executors.reference.sampling`` says."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from pi2rt.cython_kernels.kernels import native
from pi2rt.cython_kernels.plane import sampler
from pi2rt.executors.reference import sampling as reference_sampling
from pi2rt.runtime.step import Floats, Int32s, Sampled, Sampling, Unusable
from pi2rt.runtime.token_mask import TokenMask, allows, masking
from tests.kernels.variants import KERNELS

seeds = st.integers(0, 2**64 - 1)
SLACK = 1e-5
"""Probability within which rounding may move the boundary between two tokens."""


@dataclass(frozen=True, slots=True)
class Case:
    logits: Floats = field(repr=False)
    sampling: Sampling
    counts: Int32s = field(repr=False)
    position: int
    allowed: TokenMask | None = field(repr=False)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    vocab = draw(st.one_of(st.integers(1, 40), st.integers(1000, 3000)))
    logits = (rng.standard_normal(vocab) * draw(st.sampled_from([0.1, 1.0, 4.0, 20.0]))).astype(np.float32)
    shape = draw(st.sampled_from(["plain", "ties", "forbidden", "peak", "flat"]))
    if shape == "ties":
        logits = np.round(logits)
    elif shape == "forbidden":
        logits[rng.random(vocab) < 0.7] = -np.inf
        logits[draw(st.integers(0, vocab - 1))] = 1.0
    elif shape == "peak":
        logits[draw(st.integers(0, vocab - 1))] += 30
    elif shape == "flat":
        logits[:] = 1.0
    some = st.tuples(st.integers(0, vocab - 1), st.floats(-20, 20, width=32))
    sampling = Sampling(
        temperature=draw(st.one_of(st.just(0.0), st.floats(0.0625, 8, width=32))),
        top_k=draw(st.one_of(st.just(0), st.integers(1, vocab + 5))),
        top_p=draw(st.one_of(st.just(1.0), st.floats(0.0625, 1, width=32))),
        min_p=draw(st.one_of(st.just(0.0), st.floats(0, 1, width=32))),
        repetition_penalty=draw(st.one_of(st.just(1.0), st.floats(0.5, 2, width=32))),
        presence_penalty=draw(st.one_of(st.just(0.0), st.floats(-2, 2, width=32))),
        frequency_penalty=draw(st.one_of(st.just(0.0), st.floats(-2, 2, width=32))),
        logit_bias=tuple(draw(st.lists(some, max_size=4))),
        seed=draw(seeds),
        logprobs=draw(st.sampled_from([-1, 0])),
    )
    counts = rng.integers(0, 4, vocab).astype(np.int32) if draw(st.booleans()) else np.zeros(vocab, np.int32)
    allowed = None
    if draw(st.booleans()):
        tokens = rng.random(vocab) < draw(st.sampled_from([0.0, 0.01, 0.5, 1.0]))
        finite = np.flatnonzero(np.isfinite(logits))
        tokens[rng.choice(finite)] = True
        allowed = masking(tokens)
        if vocab % 32:  # what stands behind the vocabulary means nothing
            allowed[-1] |= np.uint32(0xFFFFFFFF << vocab % 32 & 0xFFFFFFFF)
    return Case(logits, sampling, counts, draw(st.integers(0, 2**20)), allowed)


def acceptable(logits: Floats, sampling: Sampling, position: int) -> set[int]:
    """Tokens of the reference when each boundary is moved by what rounding may move it."""
    u = reference_sampling.uniform(sampling.seed, position)
    tokens = set()
    for du, dp, dm in itertools.product((-SLACK, 0, SLACK), repeat=3):
        moved = replace(
            sampling,
            top_p=min(1.0, sampling.top_p + dp) if sampling.top_p < 1 else 1.0,
            min_p=max(0.0, sampling.min_p * (1 + dm)),
        )
        tokens.add(reference_sampling._draw(logits, moved, min(max(u + du, 0.0), 1 - 1e-16)))
    return tokens


@given(case=cases(), variant=st.sampled_from(sorted(KERNELS)))
@settings(max_examples=400, deadline=None)
def test_the_same_token_as_the_reference(case: Case, variant: str) -> None:
    logits, sampling, counts, position = case.logits, case.sampling, case.counts, case.position
    allowed = case.allowed
    expected = reference_sampling.sample(logits, sampling, counts, position, allowed)
    token, logprob = sampler.sample(native.Variant(variant), logits, sampling, counts, position, allowed)
    changed = reference_sampling.penalised(logits, sampling, counts, allowed)
    assert isinstance(expected, Sampled)
    assert allowed is None or allows(allowed, len(logits))[token]
    assert isinstance(changed, np.ndarray)
    if token != expected.token:
        assert sampling.temperature > 0
        assert token in acceptable(changed, sampling, position), (token, expected.token)
    if sampling.logprobs < 0:
        assert math.isnan(logprob)
    else:
        exact = reference_sampling.log_softmax(changed)[token]
        assert abs(logprob - exact) <= 2e-5 + 2e-7 * (abs(float(changed[token])) + abs(exact))


@given(seed=seeds, position=st.integers(0, 2**31))
@example(seed=0, position=0)
@example(seed=2**64 - 1, position=2**31 - 1)
@settings(max_examples=100, deadline=None)
def test_the_same_random_number(seed: int, position: int) -> None:
    """1024 equal tokens in order of id: the token tells the first ten bits of the number."""
    sampling = Sampling(temperature=1.0, seed=seed)
    token, _ = sampler.sample(
        native.Variant(), np.zeros(1024, np.float32), sampling, np.zeros(1024, np.int32), position
    )
    assert abs(token - 1024 * reference_sampling.uniform(seed, position)) < 1 + SLACK * 1024


def test_frequencies_are_the_probabilities() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.125, 0.125], np.float32))
    seen, sampling, counts = np.zeros(4), Sampling(temperature=1.0, seed=7), np.zeros(4, np.int32)
    for position in range(4000):
        token, _ = sampler.sample(native.Variant(), logits, sampling, counts, position)
        seen[token] += 1
    np.testing.assert_allclose(seen / 4000, [0.5, 0.25, 0.125, 0.125], atol=0.03)


@given(data=st.data(), variant=st.sampled_from(sorted(KERNELS)))
@settings(max_examples=400, deadline=None)
def test_the_same_blame_as_the_reference(data: st.DataObject, variant: str) -> None:
    """Whatever the model and the parameters bring: both pick a token, or both blame the same."""
    extreme = st.sampled_from([0.0, -0.0, 1.0, -1.0, 30.0, 3e38, -3e38, 1e-45, -math.inf])
    broken = st.sampled_from([math.nan, math.inf])
    logits = np.array(
        data.draw(st.lists(st.one_of(extreme, st.floats(width=32), broken), min_size=1, max_size=40)),
        np.float32,
    )
    vocab = len(logits)
    biases = st.one_of(st.just(-math.inf), st.sampled_from([1e9, -1e9, 1.0, math.inf, math.nan]))
    sampling = Sampling(
        temperature=data.draw(st.sampled_from([0.0, 1e-38, 1e-3, 1.0, 100.0])),
        top_k=data.draw(st.sampled_from([0, 1, 3, 2**31 - 1])),
        top_p=data.draw(st.sampled_from([1.0, 0.5, 1e-38])),
        min_p=data.draw(st.sampled_from([0.0, 0.5, 1.0])),
        repetition_penalty=data.draw(st.sampled_from([1.0, 1e-38, 1e-30, 100.0, 0.5])),
        presence_penalty=data.draw(st.sampled_from([0.0, 100.0, -100.0])),
        frequency_penalty=data.draw(st.sampled_from([0.0, 100.0, -100.0])),
        logit_bias=tuple(data.draw(st.dictionaries(st.integers(0, vocab - 1), biases)).items()),
        logprobs=data.draw(st.sampled_from([-1, 0])),
    )
    counts = np.array(data.draw(st.lists(st.sampled_from([0, 1, 2**31 - 1]), min_size=vocab, max_size=vocab)))
    allowed = None
    if data.draw(st.booleans()):
        allowed = masking(np.array(data.draw(st.lists(st.booleans(), min_size=vocab, max_size=vocab))))
    expected = reference_sampling.sample(logits, sampling, counts.astype(np.int32), 3, allowed)
    token, _ = sampler.sample(native.Variant(variant), logits, sampling, counts, 3, allowed)
    if isinstance(expected, Unusable):
        assert token < 0
        assert sampler.unusable(token) == expected
    else:
        changed = reference_sampling.penalised(logits, sampling, counts, allowed)
        assert isinstance(changed, np.ndarray)
        assert 0 <= token < vocab
        assert changed[token] > -math.inf
        assert token == expected.token or sampling.temperature > 0


@pytest.mark.parametrize("junk", [np.nan, -np.inf, np.inf])
@pytest.mark.parametrize("where", [slice(None), slice(7, 8)])
def test_logits_of_the_model_that_are_no_numbers(junk: float, where: slice) -> None:
    logits = np.arange(10, dtype=np.float32)
    logits[where] = junk
    for sampling in Sampling(), Sampling(temperature=1.0, repetition_penalty=2.0, logit_bias=((1, 5.0),)):
        expected = reference_sampling.sample(logits, sampling, np.ones(10, np.int32), 3)
        token, _ = sampler.sample(native.Variant(), logits, sampling, np.ones(10, np.int32), 3)
        if where == slice(7, 8) and junk < 0:  # a model may forbid some
            assert isinstance(expected, Sampled)
            assert token >= 0
        else:
            assert expected == Unusable(()) == sampler.unusable(token)


@pytest.mark.parametrize(
    ("sampling", "blamed"),
    [
        (Sampling(repetition_penalty=1e-45), ("repetition_penalty",)),
        (Sampling(logit_bias=tuple((token, -math.inf) for token in range(10))), ("logit_bias",)),
        (  # the one token that is left becomes minus infinity
            Sampling(
                logit_bias=tuple((token, -math.inf) for token in range(1, 10)), repetition_penalty=100.0
            ),
            ("logit_bias", "repetition_penalty"),
        ),
        (Sampling(presence_penalty=math.inf), ("presence_penalty", "frequency_penalty")),
        (Sampling(frequency_penalty=-math.inf), ("presence_penalty", "frequency_penalty")),
    ],
)
def test_what_made_the_logits_unusable(sampling: Sampling, blamed: tuple[str, ...]) -> None:
    logits, counts = np.full(10, 20.0, np.float32), np.ones(10, np.int32)
    logits[0] = -3.4e38
    assert reference_sampling.sample(logits, sampling, counts, 3) == Unusable(blamed)
    token, _ = sampler.sample(native.Variant(), logits, sampling, counts, 3)
    assert sampler.unusable(token) == Unusable(blamed)


@pytest.mark.parametrize("temperature", [1e-3, 1e-6, 1e-30, 1e-38, 1e-45])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = np.array([1.0, 29.0, 30.0, 28.0, -5.0], np.float32)
    sampling = Sampling(temperature=temperature, seed=1)
    token, _ = sampler.sample(native.Variant(), logits, sampling, np.zeros(5, np.int32), 3)
    assert token == 2
    assert reference_sampling.sample(logits, sampling, np.zeros(5, np.int32), 3) == Sampled(2)
