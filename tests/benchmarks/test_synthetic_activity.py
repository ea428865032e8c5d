"""What synthetic models promise of the neurons that are active, in every layer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from synthetic_activity import activity, wandering_text
from synthetic_activity_law import COLDEST, HOTTEST, biases, firing_probabilities, hidden_energy
from synthetic_model import STAY, TOPICS, SyntheticModel
from synthetic_shape import FeedForwardActivation, Shape
from synthetic_tensors import topic_of

from pi2rt._errors import UnsupportedModelError

SHAPE = Shape(512, 1792, 4, 8, 2, 4096, "drelu")


@pytest.mark.parametrize("kind", ["drelu", "relu"])
def test_the_promised_statistics(kind: FeedForwardActivation) -> None:
    model = SyntheticModel("small", replace(SHAPE, activation=kind), seed=1)
    found = activity(model, wandering_text(SHAPE.vocab, 512))
    assert len(found.layers) == 4
    for layer in found.layers:
        assert layer.active == pytest.approx(0.1, abs=0.01)
        assert 0.23 < layer.share_of_80 < 0.31
        assert layer.hottest > 0.8
        assert layer.coldest < 0.005
        assert layer.rms == pytest.approx(1, abs=0.03)
        assert 0.38 < layer.overlap < 0.5
        assert 0.19 < layer.new < 0.28
    assert found.stay is not None
    assert found.stay > 0.9


def test_experts_are_not_measured() -> None:
    model = SyntheticModel("mixture", replace(SHAPE, layers=1, experts=2, experts_used=1))
    with pytest.raises(UnsupportedModelError, match="activity is measured of plain feed-forward blocks only"):
        activity(model, wandering_text(SHAPE.vocab, 8))


@pytest.mark.parametrize("share", [0.03, 0.25])
def test_another_activity(share: float) -> None:
    model = SyntheticModel("small", SHAPE, activity=share)
    for layer in activity(model, wandering_text(SHAPE.vocab, 256)).layers:
        assert layer.active == pytest.approx(share, rel=0.15)


def test_silu_has_no_bias() -> None:
    model = SyntheticModel("small", replace(SHAPE, activation="silu", layers=2))
    for layer in activity(model, wandering_text(SHAPE.vocab, 128)).layers:
        assert layer.active == pytest.approx(0.5, abs=0.02)
        assert layer.rms == pytest.approx(1, abs=0.03)


def test_tokens_of_a_topic_fire_similar_neurons() -> None:
    model = SyntheticModel("small", replace(SHAPE, layers=1))
    text = wandering_text(SHAPE.vocab, 512)
    mixed = np.random.RandomState(0).permutation(text)
    (near,), (far,) = activity(model, text).layers, activity(model, mixed).layers
    assert near.overlap > far.overlap + 0.06
    assert near.new < far.new - 0.05


def test_activity_stays_over_a_long_context() -> None:
    model = SyntheticModel("narrow", Shape(128, 448, 2, 4, 2, 2048, "drelu"))
    text = wandering_text(2048, 3000)
    (*_, last) = activity(model, text).layers
    assert last.active == pytest.approx(0.1, abs=0.02)
    assert last.rms == pytest.approx(1, abs=0.04)


def test_some_layers_only() -> None:
    model = SyntheticModel("small", SHAPE)
    text = wandering_text(SHAPE.vocab, 64)
    some, all_ = activity(model, text, 2), activity(model, text)
    assert some.layers == all_.layers[:2]
    assert some.stay is None


def test_wandering_text_stays_in_its_topic_for_a_while() -> None:
    topics = topic_of(wandering_text(32000, 4000).astype(np.int64), 32000, TOPICS)
    assert np.mean(topics[1:] == topics[:-1]) == pytest.approx(STAY, abs=0.01)
    assert len(np.unique(topics)) > 40


@pytest.mark.parametrize("mean", [0.005, 0.03, 0.1, 0.45])
def test_the_law_has_its_mean_and_its_ends(mean: float) -> None:
    law = firing_probabilities(4096, mean)
    assert law.mean() == pytest.approx(mean, rel=1e-6)
    assert (np.diff(law) <= 0).all()
    assert law[0] <= HOTTEST
    assert law[-1] == pytest.approx(COLDEST, rel=0.15)


def test_the_law_makes_80_percent_with_30_percent() -> None:
    law = firing_probabilities(4096, 0.1)
    assert np.mean(np.cumsum(law) < 0.8 * law.sum()) == pytest.approx(0.304, abs=0.002)
    assert law[:40].mean() > 0.85


@pytest.mark.parametrize("kind", ["silu", "relu", "drelu"])
def test_energy_is_that_of_a_sample(kind: FeedForwardActivation) -> None:
    bias = biases(firing_probabilities(64, 0.1))
    random = np.random.RandomState(0)
    gate, up = random.standard_normal((4000, 64)) + bias, random.standard_normal((4000, 64))
    gate = gate / (1 + np.exp(-gate)) if kind == "silu" else np.maximum(gate, 0)
    up = np.maximum(up, 0) if kind == "drelu" else up
    assert hidden_energy(kind, bias) == pytest.approx(np.mean(np.square(gate * up)), rel=0.03)
