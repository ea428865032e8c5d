"""Synthetic models: their bytes, and what their values promise."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic_activity_law import biases, firing_probabilities
from synthetic_model import SPECIALS, SyntheticModel
from synthetic_noise import Noise
from synthetic_shape import Shape

from pi2rt.formats.quants import dequantize
from pi2rt.models import FeedForward, MixtureOfExperts, describe
from pi2rt.runtime.step import Floats

DENSE = Shape(128, 192, 2, 4, 2, 512, "drelu")
EXPERTS = replace(DENSE, experts=4, experts_used=2)
MODELS = {
    "dense": SyntheticModel("dense", DENSE),
    "experts": SyntheticModel("experts", EXPERTS),
    "silu": SyntheticModel("silu", replace(DENSE, activation="silu")),
}


def values(model: SyntheticModel, name: str) -> Floats:
    info = model.stacked[name]
    raw = np.empty(info.nbytes, np.uint8)
    model.read_into(info, 0, raw.data)
    return dequantize(info.type, raw, info.shape)


@pytest.mark.parametrize("kind", ["dense", "experts"])
@given(data=st.data())
def test_bytes_do_not_depend_on_the_cut(kind: str, data: st.DataObject) -> None:
    model = MODELS[kind]
    info = model.tensors[data.draw(st.sampled_from(sorted(model.tensors)))]
    start = data.draw(st.integers(0, info.nbytes))
    piece = bytearray(data.draw(st.integers(0, info.nbytes - start)))
    model.read_into(info, start, memoryview(piece))
    assert piece == model.read(info.name)[start : start + len(piece)].tobytes()


def test_a_piece_may_be_longer_than_what_is_made_at_once() -> None:
    wide = SyntheticModel("wide", replace(DENSE, dim=512, heads=8, kv_heads=8, hidden=2048, vocab=1024))
    for name in "blk.1.ffn_up.weight", "blk.1.ffn_gate.weight", "blk.1.ffn_down.weight", "output.weight":
        info = wide.tensors[name]
        row = info.nbytes // info.shape[0]
        rows = [bytearray(row) for _ in range(info.shape[0])]
        for i, each in enumerate(rows):
            wide.read_into(info, i * row, memoryview(each))
        assert b"".join(rows) == wide.read(name).tobytes()


def test_bytes_are_the_same_on_every_machine() -> None:
    """Measurements name a model by its shape and seed."""
    digest = hashlib.blake2b(digest_size=8)
    for kind in "dense", "experts":
        for name in MODELS[kind].tensors:
            digest.update(MODELS[kind].read(name).data)
    assert digest.hexdigest() == "e6c6b93aaf502089"


def test_seed_and_activity_make_another_model() -> None:
    assert (
        SyntheticModel("a", DENSE).read("blk.0.ffn_up.weight") == MODELS["dense"].read("blk.0.ffn_up.weight")
    ).all()
    other = SyntheticModel("b", DENSE, seed=1).read("blk.0.ffn_up.weight")
    assert (other == MODELS["dense"].read("blk.0.ffn_up.weight")).mean() < 0.2
    layers = [MODELS["dense"].read(f"blk.{i}.ffn_up.weight") for i in range(2)]
    assert (layers[0] == layers[1]).mean() < 0.2
    gates = [SyntheticModel("c", DENSE, activity=a).read("blk.0.ffn_gate.weight") for a in (0.1, 0.2)]
    assert (gates[0] != gates[1]).any()


def test_noise_goes_on_behind_the_end_of_its_tables() -> None:
    noise = Noise(3, "a tensor")
    whole = noise.bytes(0, 2_200_000)
    for start, count in (0, 1), (524_271, 17), (524_278, 1_000_003), (1_048_530, 100_001):
        assert (noise.bytes(start, count) == whole[start : start + count]).all()
    assert np.bincount(whole, minlength=256).std() < 150  # of a mean of 8594: uniform
    assert (
        whole[:1_000_000] == whole[1_048_556:2_048_556]
    ).mean() < 0.01  # one table has begun anew, the other not
    assert (whole == Noise(3, "another").bytes(0, len(whole))).mean() < 0.01


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_a_part_of_the_stream_is_constant_and_only_gates_read_it(kind: str) -> None:
    model = MODELS[kind]
    stacked = "_exps" if kind == "experts" else ""
    assert (values(model, "token_embd.weight")[:, :32] == 1).all()
    for i in range(2):
        for name in "attn_output", f"ffn_down{stacked}":
            written = values(model, f"blk.{i}.{name}.weight")
            assert (written[..., :32, :] == 0).all()
            assert (written[..., 32:, :] != 0).any(-1).all()
        for name in "attn_q", "attn_k", "attn_v", f"ffn_up{stacked}":
            read = values(model, f"blk.{i}.{name}.weight")
            assert (read[..., :32] == 0).all()
            assert (read[..., 32:] != 0).any(-1).all()
    gate = values(model, f"blk.1.ffn_gate{stacked}.weight")[..., :32]
    assert (gate == gate[..., :1]).all()
    bias = np.sort(gate.sum(-1) / model.expected_rms(1))
    assert np.broadcast_to(np.sort(biases(firing_probabilities(192, 0.1))), bias.shape) == pytest.approx(
        bias, rel=2e-3
    )


def test_experts_have_hot_neurons_of_their_own() -> None:
    gates = values(MODELS["experts"], "blk.0.ffn_gate_exps.weight")[:, :, 0]  # (experts, hidden)
    assert all((np.sort(gate) == np.sort(gates[0])).all() for gate in gates)
    correlations = np.asarray(np.corrcoef(gates))
    assert abs(correlations[np.triu_indices(4, 1)]).max() < 0.3


def test_values_are_symmetric_and_normalised() -> None:
    model = MODELS["dense"]
    up = values(model, "blk.0.ffn_up.weight")[:, 32:]
    assert abs(up.mean()) < 0.01 * up.std()
    embedding = values(model, "token_embd.weight")[:, 32:]
    assert np.square(embedding).mean() == pytest.approx(1, rel=0.05)
    normalised = embedding / model.expected_rms(0)
    assert (normalised @ up.T).std() == pytest.approx(1, rel=0.1)


def test_metadata_says_what_it_is() -> None:
    model = SyntheticModel("dense", DENSE, seed=7, activity=0.2)
    description = describe(model)
    assert description.name == "synthetic dense"
    assert model.metadata["synthetic.seed"] == 7
    assert model.metadata["synthetic.activity"] == pytest.approx(0.2)
    for layer in description.layers:
        block = layer.blocks[1]
        assert isinstance(block, FeedForward)
        assert (block.activation, block.up_activation) == ("relu", "relu")
    for layer in describe(MODELS["experts"]).layers:
        mixture = layer.blocks[1]
        assert isinstance(mixture, MixtureOfExperts)
        assert (mixture.n_experts, mixture.n_used) == (4, 2)
        assert (mixture.activation, mixture.up_activation) == ("relu", "relu")
    assert MODELS["experts"].stacked["blk.0.ffn_down_exps.weight"].shape == (4, 128, 192)
    assert "llama.hidden_activation" not in MODELS["silu"].metadata


def test_bytes_and_special_tokens_are_never_likely() -> None:
    model = MODELS["dense"]
    head = values(model, "output.weight")
    rms = model._rms(1 + 2 * model._growth)
    constant = head[:, :32].sum(-1) / rms
    assert constant[:SPECIALS] == pytest.approx(-30, rel=0.01)
    assert (constant[SPECIALS:] == 0).all()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dim": 100}, "dim 100 and hidden 192 must be multiples of 32"),
        ({"dim": 32}, "dim at least 64"),
        ({"hidden": 0}, "hidden 0"),
        ({"heads": 3}, "each of 3 heads"),
        ({"kv_heads": 3}, "4 heads cannot share 3"),
        ({"vocab": 259}, "a vocabulary of 259"),
        ({"experts": 2}, "0 of 2 experts"),
        ({"experts": 2, "experts_used": 3}, "3 of 2 experts"),
        ({"layers": 0}, "dim 128"),
    ],
)
def test_impossible_shapes_are_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        SyntheticModel("bad", replace(DENSE, **change))


def test_impossible_options_are_refused() -> None:
    with pytest.raises(ValueError, match=r"an activity of 0\.6 is not between 0\.005 and 0\.45"):
        SyntheticModel("bad", DENSE, activity=0.6)
    with pytest.raises(ValueError, match="seed -1"):
        SyntheticModel("bad", DENSE, seed=-1)
    info = MODELS["dense"].tensors["blk.0.attn_q.weight"]
    for start, count in (-1, 1), (info.nbytes - 1, 2):
        with pytest.raises(ValueError, match=r"not inside tensor 'blk\.0\.attn_q\.weight'"):
            MODELS["dense"].read_into(info, start, memoryview(bytearray(count)))
