"""CATS and CHESS as their papers define them."""

from __future__ import annotations

import numpy as np
import pytest

from pi2rt.planner.learn.thresholds import Activations, calibrate_block, cats, chess

RANDOM = np.random.default_rng(7)
FACTORS = [
    (
        RANDOM.standard_normal((tokens, 96)).astype(np.float32) * np.linspace(0.1, 2, 96, dtype=np.float32),
        RANDOM.standard_normal((tokens, 96)).astype(np.float32) * np.linspace(3, 0.2, 96, dtype=np.float32),
    )
    for tokens in (64, 64, 40)
]
"""(gate, up) of three texts. Neurons differ in both, so that the methods differ."""


def test_activations_are_summed_up() -> None:
    activations = Activations.of(iter(FACTORS))
    gates, ups = (np.concatenate(each) for each in zip(*FACTORS, strict=True))
    np.testing.assert_allclose(activations.up, np.abs(ups).mean(0), rtol=1e-5)
    np.testing.assert_array_equal(np.concatenate(activations.gates), np.abs(gates))
    np.testing.assert_allclose(
        activations.firing(np.array([0.5], np.float32)), (np.abs(gates) > 0.5).mean(0), rtol=1e-6
    )


@pytest.mark.parametrize("wanted", [0.1, 0.5, 0.9])
def test_cats_is_the_quantile_of_each_text_averaged(wanted: float) -> None:
    found = cats(Activations.of(iter(FACTORS)), wanted)
    expected = [np.quantile(np.abs(gate), wanted, method="inverted_cdf") for gate, _ in FACTORS]
    np.testing.assert_allclose(found, [np.mean(expected)], rtol=1e-6)


@pytest.mark.parametrize("wanted", [0.1, 0.5, 0.9])
def test_chess_weighs_gates_with_the_mean_of_up(wanted: float) -> None:
    found = chess(Activations.of(iter(FACTORS)), wanted)
    up = np.abs(np.concatenate([up for _, up in FACTORS])).mean(0)
    level = np.mean([np.quantile(np.abs(gate) * up, wanted, method="inverted_cdf") for gate, _ in FACTORS])
    np.testing.assert_allclose(found, level / up, rtol=1e-5)


@pytest.mark.parametrize("wanted", [0.1, 0.3, 0.5, 0.9])
def test_as_many_are_inactive_as_are_wanted(wanted: float) -> None:
    block = calibrate_block(3, "down", Activations.of(iter(FACTORS)), wanted)
    assert (block.layer, block.down, block.neurons) == (3, "down", 96)
    np.testing.assert_array_equal(block.firing(), np.ones(96))
    for method in ("cats", "chess"):
        assert abs(block.resting(method) - wanted) < 0.02
    assert len(block.thresholds["cats"].values) == 4
    assert np.ptp(block.vector("cats")) == 0
    assert np.ptp(block.vector("chess")) > 0


def test_chess_loses_less_than_cats() -> None:
    """By its own measure: the part of the sum of all |gate * up| that is left out."""
    activations = Activations.of(iter(FACTORS))
    gates, ups = (np.abs(np.concatenate(each)) for each in zip(*FACTORS, strict=True))
    lost = [np.sum((gates * ups)[gates <= each(activations, 0.5)]) for each in (cats, chess)]
    assert lost[1] < 0.8 * lost[0]


def test_without_gate_both_are_cats() -> None:
    activations = Activations.of((gate, None) for gate, _ in FACTORS)
    np.testing.assert_array_equal(chess(activations, 0.4), np.full(96, cats(activations, 0.4)[0]))


def test_neurons_that_are_inactive_anyway_need_no_threshold() -> None:
    """Nine of ten gates of this ReLU block are zero: half of them are inactive at a threshold of zero."""
    gate = np.where(RANDOM.random((50, 64)) < 0.9, 0, 1).astype(np.float32)
    block = calibrate_block(0, "down", Activations.of([(gate, gate)]), 0.5)
    assert not block.vector("cats").any()
    assert not block.vector("chess").any()
    assert block.firing().mean() == pytest.approx(gate.mean(), rel=1e-3)


def test_a_neuron_whose_up_is_always_zero_never_fires() -> None:
    gate, up = FACTORS[0][0].copy(), FACTORS[0][1].copy()
    up[:, 5] = 0
    found = chess(Activations.of([(gate, up)]), 0.5)
    assert np.isfinite(found).all()
    assert found[5] == np.finfo(np.float32).max
