"""Predictors of a given rank: exact where the gate has that rank, and what they promise where it has not."""

from __future__ import annotations

import numpy as np
import pytest

from pi2rt.planner.learn.predictors import ask_for_all, default_rank, measure, train

RANDOM = np.random.default_rng(3)
DIM, NEURONS = 64, 192


def texts(count: int, tokens: int, decay: float) -> list[np.ndarray]:
    """Inputs whose directions matter less and less."""
    scale = (decay ** np.arange(DIM)).astype(np.float32)
    return [RANDOM.standard_normal((tokens, DIM)).astype(np.float32) * scale for _ in range(count)]


def gate(rank: int) -> np.ndarray:
    left, right = RANDOM.standard_normal((NEURONS, rank)), RANDOM.standard_normal((rank, DIM))
    return (left @ right / np.sqrt(rank * DIM)).astype(np.float32)


def test_a_gate_of_low_rank_is_predicted() -> None:
    weight, bias = gate(8), RANDOM.standard_normal(NEURONS).astype(np.float32) / 4
    inputs = texts(6, 128, 1.0)
    products = [x @ weight.T + bias for x in inputs]
    predictor = train(products[:4], weight, bias, 8, 0.98)
    assert (predictor.first.shape, predictor.second.shape) == ((8, DIM), (NEURONS, 8))
    assert (predictor.first.dtype, predictor.second.dtype) == (np.float16, np.float16)
    quality = measure(predictor, inputs[4:], products[4:])
    assert quality.recall > 0.995
    assert quality.precision > 0.99
    assert quality.asked == pytest.approx(np.mean(np.concatenate(products[4:]) > 0), abs=0.01)


@pytest.mark.parametrize("recall", [0.9, 0.98])
def test_recall_comes_before_precision(recall: float) -> None:
    """A gate of full rank whose neurons are active one time in six."""
    weight, bias = gate(DIM), np.full(NEURONS, -0.2, np.float32)
    inputs = texts(12, 128, 0.9)
    products = [x @ weight.T + bias for x in inputs]
    found = []
    for rank in (4, 16, 48):
        predictor = train(products[:8], weight, bias, rank, recall)
        found.append(measure(predictor, inputs[8:], products[8:]))
    for each in found:
        assert each.recall >= recall
        assert each.precision >= np.mean(np.concatenate(products[8:]) > 0)
    assert found[0].asked > found[1].asked > found[2].asked  # a larger rank asks for fewer in vain
    assert found[2].precision > 0.9


def test_the_same_text_gives_the_same_predictor() -> None:
    weight = gate(DIM)
    products = [x @ weight.T for x in texts(4, 64, 0.95)]
    first, again = (train(products, weight, None, 16, 0.98) for _ in range(2))
    np.testing.assert_array_equal(first.second, again.second)
    np.testing.assert_array_equal(first.bias, again.bias)


def test_neurons_that_never_fire_and_texts_that_are_short() -> None:
    weight = gate(DIM)
    weight[5] = 0
    products = [x @ weight.T - 100 for x in texts(2, 8, 1.0)]
    predictor = train(products, weight, np.full(NEURONS, -100, np.float32), 64, 0.98)
    assert np.isfinite(predictor.first).all()
    assert np.isfinite(predictor.second).all()
    assert np.isfinite(predictor.bias).all()
    quality = measure(predictor, texts(1, 8, 1.0), products[:1])
    assert (quality.recall, quality.asked) == (1, 0)


def test_of_what_is_not_known_everything_is_asked_for() -> None:
    inputs = texts(2, 8, 1.0)
    quality = measure(ask_for_all(NEURONS, DIM), inputs, [x @ gate(DIM).T for x in inputs])
    assert (quality.recall, quality.asked) == (1, 1)
    assert measure(ask_for_all(NEURONS, DIM), [], []).asked == 1


def test_half_precision_holds_large_weights() -> None:
    weight = gate(8) * 1e6
    inputs = texts(6, 128, 1.0)
    products = [x @ weight.T for x in inputs]
    quality = measure(train(products[:4], weight, None, 8, 0.98), inputs[4:], products[4:])
    assert quality.recall > 0.99


def test_the_default_rank() -> None:
    assert [default_rank(dim) for dim in (64, 576, 4096)] == [16, 48, 256]
