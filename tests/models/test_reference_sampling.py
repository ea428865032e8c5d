"""The sampling semantics: an executor that picks other tokens than this is wrong."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt.executors.reference.sampling import log_softmax, penalised, sample, splitmix64, uniform
from pi2rt.runtime.step import Sampling, Unusable

LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.25, 0.2], np.float32))  # likeliest first: 1, 3, 4, 2, 0
NONE_SEEN = np.zeros(5, np.int32)


def _picks(sampling: Sampling, draws: int = 400, logits: np.ndarray = LOGITS) -> list[int]:
    counts = np.zeros(len(logits), np.int32)
    return [sample(logits, sampling, counts, position).token for position in range(draws)]


def test_splitmix64_is_the_published_generator() -> None:
    state, outputs = 1234567, []
    for _ in range(3):
        outputs.append(splitmix64(state))
        state += 0x9E3779B97F4A7C15
    assert outputs == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    assert splitmix64(0) == 0xE220A8397B1DCDAF


def test_the_random_number_depends_on_seed_and_position() -> None:
    numbers = {uniform(seed, position) for seed in (0, 1, -1, 2**63) for position in range(100)}
    assert len(numbers) == 400
    assert all(0 <= u < 1 for u in numbers)
    assert uniform(-1, 7) == uniform(2**64 - 1, 7)
    assert np.mean([uniform(3, p) for p in range(4000)]) == pytest.approx(0.5, abs=0.02)


def test_greedy_takes_the_lowest_index_among_equals() -> None:
    assert sample(LOGITS, Sampling(), NONE_SEEN, 0).token == 1
    assert sample(np.array([1, 2, 2, 0], np.float32), Sampling(), np.zeros(4, np.int32), 0).token == 1


def test_draws_follow_the_distribution() -> None:
    picks = np.bincount(_picks(Sampling(temperature=1.0, seed=5), 6000), minlength=5) / 6000
    np.testing.assert_allclose(picks, np.exp(LOGITS), atol=0.025)
    warm = np.exp(LOGITS.astype(np.float64) / 2)
    picks = np.bincount(_picks(Sampling(temperature=2.0, seed=5), 6000), minlength=5) / 6000
    np.testing.assert_allclose(picks, warm / warm.sum(), atol=0.025)


def test_the_draw_walks_down_the_candidates() -> None:
    """Cumulative over descending probability: 1 up to 0.4, 3 up to 0.65, 4 up to 0.85, 2 up to 0.95, 0."""
    for position in range(200):
        u = uniform(9, position)
        expected = [1, 3, 4, 2, 0][sum(u >= edge for edge in (0.4, 0.65, 0.85, 0.95))]
        assert sample(LOGITS, Sampling(temperature=1.0, seed=9), NONE_SEEN, position).token == expected


@pytest.mark.parametrize(
    ("sampling", "allowed"),
    [
        (Sampling(temperature=1.0, top_k=1), {1}),
        (Sampling(temperature=1.0, top_k=2), {1, 3}),
        (Sampling(temperature=1.0, top_k=99), {0, 1, 2, 3, 4}),
        (Sampling(temperature=1.0, top_p=0.39), {1}),
        (Sampling(temperature=1.0, top_p=0.6), {1, 3}),
        (Sampling(temperature=1.0, top_p=0.66), {1, 3, 4}),
        (Sampling(temperature=1.0, top_p=0.0), {1}),
        (Sampling(temperature=1.0, top_k=2, top_p=0.61), {1}),  # 0.4 of the 0.65 that top-k left
        (Sampling(temperature=1.0, min_p=0.45), {1, 3, 4}),
        (Sampling(temperature=1.0, min_p=1.0), {1}),
        (Sampling(temperature=1.0, top_p=0.66, min_p=0.55), {1, 3}),
        (Sampling(temperature=1e-3), {1}),
        (Sampling(temperature=5e-324), {1}),
    ],
)
def test_candidates(sampling: Sampling, allowed: set[int]) -> None:
    assert set(_picks(sampling)) == allowed


def test_ties_at_the_edge_of_top_k_go_to_the_lower_index() -> None:
    assert set(_picks(Sampling(temperature=1.0, top_k=2), logits=np.zeros(5, np.float32))) == {0, 1}


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    logits, counts = np.array([2, -2, 2, 0], np.float32), np.array([1, 3, 0, 1], np.int32)
    np.testing.assert_array_equal(
        penalised(logits, Sampling(repetition_penalty=4.0), counts), [0.5, -8, 2, 0]
    )
    np.testing.assert_array_equal(logits, [2, -2, 2, 0])


def test_presence_and_frequency_penalties_subtract() -> None:
    logits, counts = np.array([2, -2, 2, 0], np.float32), np.array([1, 3, 0, 1], np.int32)
    sampling = Sampling(presence_penalty=1.0, frequency_penalty=0.5)
    np.testing.assert_array_equal(penalised(logits, sampling, counts), [0.5, -4.5, 2, -1.5])


def test_bias_comes_before_the_penalties() -> None:
    sampling = Sampling(logit_bias=((0, 4.0), (2, -math.inf)), repetition_penalty=2.0, presence_penalty=1.0)
    result = penalised(np.array([2, 1, 1], np.float32), sampling, np.array([1, 0, 0], np.int32))
    np.testing.assert_array_equal(result, [2, 1, -math.inf])


def test_log_probabilities_are_of_the_penalised_logits_at_any_temperature() -> None:
    counts = np.array([0, 1, 0, 0, 0], np.int32)
    sampling = Sampling(temperature=3.0, top_k=1, presence_penalty=2.0, logprobs=2)
    result = sample(LOGITS, sampling, counts, 4)
    expected = log_softmax(LOGITS - 2 * np.eye(5, dtype=np.float32)[1])
    assert result.token == 3
    assert result.logprob == pytest.approx(expected[3])
    assert [token for token, _ in result.top] == [3, 4]
    assert [p for _, p in result.top] == pytest.approx([expected[3], expected[4]])
    assert sample(LOGITS, Sampling(logprobs=0), NONE_SEEN, 0).top == ()
    assert math.isnan(sample(LOGITS, Sampling(), NONE_SEEN, 0).logprob)


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_not_numbers_are_unusable_and_no_parameter_is_to_blame(broken: float) -> None:
    logits = LOGITS.copy()
    logits[2] = broken
    assert penalised(logits, Sampling(temperature=1.0), NONE_SEEN) == Unusable()


@settings(max_examples=150, deadline=None)
@given(
    logits=st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=40),
    temperature=st.floats(1e-6, 100),
    top_k=st.integers(0, 50),
    top_p=st.floats(0, 1),
    min_p=st.floats(0, 1),
    seed=st.integers(-(2**63), 2**64 - 1),
    position=st.integers(0, 2**31 - 1),
)
def test_what_is_drawn_passed_every_filter(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float, seed: int, position: int
) -> None:
    values = np.array(logits, np.float32)
    sampling = Sampling(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, seed=seed)
    counts = np.zeros(len(values), np.int32)
    token = sample(values, sampling, counts, position).token
    assert sample(values, sampling, counts, position).token == token
    better = int(np.count_nonzero(values > values[token]) + np.count_nonzero(values[:token] == values[token]))
    assert top_k == 0 or better < top_k
    p = np.exp((values.astype(np.float64) - values.max()) / temperature)
    assert better == 0 or p[token] >= min_p
    kept = np.sort(p)[::-1][: top_k or None]
    assert better == 0 or kept[:better].sum() < top_p * kept.sum() * (1 + 1e-9) or top_p == 1
