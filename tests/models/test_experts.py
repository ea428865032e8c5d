"""Mixtures of experts: what their descriptions say, who is chosen, and the files that are refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.executors.reference.executor import ReferenceExecutor
from pi2rt.formats import open_model_file
from pi2rt.models import FeedForward, MixtureOfExperts, ModelDescription, describe, iterate_tensors
from pi2rt.models.stream_pieces import cut
from pi2rt.runtime.step import Bind, Sampling, Slice, Step
from tests.support.running import NOTHING, all_logits, opened, page_table
from tests.support.tiny_models import Floats, TinyModel, write_gguf, write_huggingface, write_safetensors

TOKENS = np.random.RandomState(5).randint(0, 318, 40).astype(np.int32)
ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"


async def _logits(path: Path) -> Floats:
    async with opened(ReferenceExecutor(), path) as executor:
        return await all_logits(executor, TOKENS)


def _described(path: Path) -> ModelDescription:
    with open_model_file(path) as file:
        return describe(file)


def _gguf(tmp_path: Path, model: TinyModel, **metadata: Any) -> ModelDescription:
    keys = {key.replace("__", "."): value for key, value in metadata.items()}
    return _described(write_gguf(tmp_path / "model.gguf", model, metadata=keys))


def _mixture(model: ModelDescription, layer: int = 0) -> MixtureOfExperts:
    block = model.layers[layer].blocks[1]
    assert isinstance(block, MixtureOfExperts)
    return block


def _with_weights(directory: Path, model: TinyModel, changed: dict[str, Floats]) -> Path:
    write_huggingface(directory, model)
    weights = model.weights()
    assert changed.keys() <= weights.keys()
    write_safetensors(directory / "model.safetensors", weights | changed)
    return directory


# -- descriptions


def test_mixtral_from_gguf(tmp_path: Path) -> None:
    model = _gguf(tmp_path, TinyModel("mixtral"))
    assert model.architecture == "llama"
    block = _mixture(model, 2)
    assert (block.n_experts, block.n_used, block.hidden, block.normalized) == (4, 2, 96, True)
    assert (block.activation, block.up_activation, block.shared) == ("silu", None, None)
    assert block.router.weight == "blk.2.ffn_gate_inp.weight"
    assert block.gate is not None
    assert block.gate[3].weight == "blk.2.ffn_gate.3.weight"
    assert block.down[0].weight == "blk.2.ffn_down.0.weight"


def test_mixtral_from_hugging_face(tmp_path: Path) -> None:
    block = _mixture(_described(write_huggingface(tmp_path, TinyModel("mixtral"))))
    assert block.router.weight == "model.layers.0.block_sparse_moe.gate.weight"
    assert block.gate is not None
    assert block.gate[1].weight == "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    assert block.up[1].weight == "model.layers.0.block_sparse_moe.experts.1.w3.weight"
    assert block.down[1].weight == "model.layers.0.block_sparse_moe.experts.1.w2.weight"


def test_dense_llama_files_that_count_no_experts(tmp_path: Path) -> None:
    model = _gguf(tmp_path, TinyModel(), llama__expert_count=0, llama__expert_used_count=0)
    assert isinstance(model.layers[0].blocks[1], FeedForward)


def test_activations_of_relu_mixtures(tmp_path: Path) -> None:
    block = _mixture(_gguf(tmp_path, TinyModel("mixtral", config={"hidden_act": "drelu"})))
    assert (block.activation, block.up_activation) == ("relu", "relu")


def test_qwen2_moe(tmp_path: Path) -> None:
    block = _mixture(_gguf(tmp_path, TinyModel("qwen2_moe")))
    assert (block.n_experts, block.n_used, block.hidden, block.normalized) == (4, 2, 32, False)
    assert block.shared is not None
    assert (block.shared.hidden, block.shared.router_shape) == (64, (64,))
    assert block.shared.router == "blk.0.ffn_gate_inp_shexp.weight"


def test_qwen2_moe_sizes_that_a_gguf_file_leaves_out(tmp_path: Path) -> None:
    """As llama.cpp takes them: a plain block's neurons, shared by the experts of a token."""
    model = TinyModel("qwen2_moe", hidden=96, expert_hidden=48, shared_hidden=96)
    silent = {"expert_feed_forward_length": None, "expert_shared_feed_forward_length": None}
    block = _mixture(_gguf(tmp_path, model, **{f"qwen2moe.{key}": value for key, value in silent.items()}))
    assert block.shared is not None
    assert (block.hidden, block.shared.hidden) == (48, 96)


def test_qwen3_moe_is_normalized_where_a_gguf_file_does_not_say_otherwise(tmp_path: Path) -> None:
    model = TinyModel("qwen3_moe")
    assert _mixture(_gguf(tmp_path, model)).normalized
    assert not _mixture(_gguf(tmp_path, model, qwen3moe__expert_weights_norm=False)).normalized
    assert not _mixture(_gguf(tmp_path, replace(model, config={"norm_topk_prob": False}))).normalized


def test_qwen3_moe_as_transformers_saves_it_again(tmp_path: Path) -> None:
    """``num_local_experts`` instead of ``num_experts``."""
    path = write_huggingface(tmp_path, TinyModel("qwen3_moe", experts=6)) / "config.json"
    config = json.loads(path.read_text())
    config["num_local_experts"] = config.pop("num_experts")
    path.write_text(json.dumps(config))
    assert _mixture(_described(tmp_path)).n_experts == 6


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
def test_tensors_and_operations_are_those_of_all_experts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """They are named without a block for each expert, of which a model may have thousands."""
    model = _gguf(tmp_path, TinyModel(family))
    block = _mixture(model)
    biased = replace(block, down=tuple(replace(each, bias=f"{each.weight}.bias") for each in block.down))
    experts = list(map(biased.expert, range(biased.n_experts)))
    shared = biased.shared_expert()
    tensors = [each for expert in experts for each in expert.own_tensors(model.dim)]
    tensors += () if shared is None else shared.own_tensors(model.dim)
    operations = [each for expert in experts for each in expert.operations()]

    def refuse(mixture: MixtureOfExperts, number: int) -> FeedForward:
        raise AssertionError(f"a block was made for expert {number}")

    monkeypatch.setattr(MixtureOfExperts, "expert", refuse)
    around = {biased.router.weight} | ({biased.shared.router} if biased.shared is not None else set())
    assert [each for each in biased.own_tensors(model.dim) if each[0] not in around] == tensors
    assert list(biased.routed_operations()) == operations
    assert len(list(iterate_tensors(model))) > 3 * block.n_experts * len(model.layers)
    with open_model_file(tmp_path / "model.gguf") as file:
        assert cut(file, model, (), 1 << 20).pieces == ()


def test_layers_without_experts(tmp_path: Path) -> None:
    config = {"mlp_only_layers": [3], "decoder_sparse_step": 2}
    model = _described(write_huggingface(tmp_path, TinyModel("qwen2_moe", layers=4, config=config)))
    kinds = [type(layer.blocks[1]) for layer in model.layers]
    assert kinds == [FeedForward, MixtureOfExperts, FeedForward, FeedForward]
    plain = model.layers[0].blocks[1]
    assert isinstance(plain, FeedForward)
    assert (plain.hidden, plain.gate is None) == (96, False)


# -- the same model in other files


async def test_the_first_mixtral_files_had_a_tensor_for_each_expert(tmp_path: Path) -> None:
    model = TinyModel("mixtral", seed=20)
    old = write_gguf(tmp_path / "old.gguf", model, stacked=False)
    block = _mixture(_described(old), 1)
    assert block.up[2].weight == "blk.1.ffn_up.2.weight"
    np.testing.assert_array_equal(await _logits(old), await _logits(write_gguf(tmp_path / "new.gguf", model)))


async def test_the_shared_experts_router_may_be_a_row(tmp_path: Path) -> None:
    model = TinyModel("qwen2_moe", seed=21)
    flat = write_gguf(tmp_path / "flat.gguf", model)
    name = "model.layers.{}.mlp.shared_expert_gate.weight"
    rows = {
        f"blk.{i}.ffn_gate_inp_shexp.weight": model.weights()[name.format(i)] for i in range(model.layers)
    }
    row = write_gguf(tmp_path / "row.gguf", model, extra=rows)
    shared = _mixture(_described(row)).shared
    assert shared is not None
    assert shared.router_shape == (1, 64)
    np.testing.assert_array_equal(await _logits(row), await _logits(flat))


@pytest.mark.parametrize("weight_type", ["F16", "Q8_0", "Q6_K"])
async def test_quantised_experts_stay_close(weight_type: str, tmp_path: Path) -> None:
    """The router is float32 always, as llama.cpp keeps it."""
    model = TinyModel("mixtral", seed=22, dim=256, hidden=256, layers=1, head_dim=64, experts_used=1)
    expected = await _logits(write_gguf(tmp_path / "exact.gguf", model))
    coarse = write_gguf(
        tmp_path / "coarse.gguf", model, types={f"ffn_{each}_exps": weight_type for each in ("gate", "up", "down")}
    )  # fmt: skip
    error = np.linalg.norm(await _logits(coarse) - expected) / np.linalg.norm(expected)
    assert 0 < error < {"Q6_K": 0.05}.get(weight_type, 0.01)


# -- who is chosen


@pytest.mark.parametrize("activation", ["silu", "drelu"])
async def test_of_equals_the_first_are_chosen(activation: str, tmp_path: Path) -> None:
    """With a router of zeros, two of four experts are the first two, each with half the weight: a plain block of twice
    the neurons."""
    config = {"hidden_act": activation}
    model = TinyModel("mixtral", seed=30, config=config)
    zeros = {ROUTER.format(i): np.zeros((4, 64), np.float32) for i in range(model.layers)}
    mixture = _with_weights(tmp_path / "mixture", model, zeros)
    weights = model.weights()
    same = {}
    for i in range(model.layers):
        experts = f"model.layers.{i}.block_sparse_moe.experts"
        gate, up, down = ([weights[f"{experts}.{e}.{w}.weight"] for e in (0, 1)] for w in ("w1", "w3", "w2"))
        same[f"model.layers.{i}.mlp.gate_proj.weight"] = np.concatenate(gate)
        same[f"model.layers.{i}.mlp.up_proj.weight"] = np.concatenate(up)
        same[f"model.layers.{i}.mlp.down_proj.weight"] = np.concatenate(down, axis=1) / 2
    plain = TinyModel("llama", hidden=2 * model.hidden, config=config)
    same |= {name: weights[name] for name in plain.weights() if name in weights}
    _with_weights(tmp_path / "plain", plain, same)
    np.testing.assert_allclose(await _logits(mixture), await _logits(tmp_path / "plain"), rtol=0, atol=2e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe"])
async def test_nothing_is_computed_of_an_expert_that_nobody_chooses(family: str, tmp_path: Path) -> None:
    """Its values would overflow, which is an error in a test, and 0 times infinity is NaN."""
    model = TinyModel(family, seed=31)
    weights = model.weights()
    changed = {name: np.zeros_like(values) for name, values in weights.items() if _is_router(name)}
    expected = await _logits(_with_weights(tmp_path / "before", model, changed))
    huge = {
        name: np.full_like(values, 3e38)
        for name, values in weights.items()
        if ".experts.2." in name or ".experts.3." in name
    }
    assert huge
    found = await _logits(_with_weights(tmp_path / "after", model, changed | huge))
    np.testing.assert_array_equal(found, expected)


def _is_router(name: str) -> bool:
    return name.endswith(("block_sparse_moe.gate.weight", "mlp.gate.weight"))


async def test_weights_of_all_experts_used(tmp_path: Path) -> None:
    """Then all that is left of normalising is nothing: softmax over all and over the chosen are the same."""
    model = TinyModel("qwen2_moe", seed=32, experts=3, experts_used=3)
    normalized = replace(model, config={"norm_topk_prob": True})
    before = await _logits(write_huggingface(tmp_path / "a", model))
    after = await _logits(write_huggingface(tmp_path / "b", normalized))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5)


async def test_large_router_logits_do_not_overflow(tmp_path: Path) -> None:
    model = TinyModel("qwen2_moe", seed=33)
    large = {
        name: values * np.float32(1e6)
        for name, values in model.weights().items()
        if _is_router(name) or name.endswith("shared_expert_gate.weight")
    }
    assert np.isfinite(await _logits(_with_weights(tmp_path, model, large))).all()


@pytest.mark.parametrize("family", ["mixtral", "qwen2_moe", "qwen3_moe"])
async def test_token_by_token_is_as_all_at_once(family: str, tmp_path: Path) -> None:
    path = write_gguf(tmp_path / "model.gguf", TinyModel(family, seed=34, experts=6, experts_used=3))
    expected = await _logits(path)
    async with opened(ReferenceExecutor(), path) as executor:
        for i, token in enumerate(TOKENS):
            part = Slice(0, i, page_table(0), np.array([token]), logits=True)
            executor.submit(Step(i, (part,), () if i else (Bind(0, Sampling(), NOTHING),)))
            logits = (await executor.wait()).logits[0]
            assert logits is not None
            np.testing.assert_allclose(logits[0], expected[i], rtol=0, atol=2e-5)


# -- files that are refused


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("expert_count", 1 << 31, "llama.expert_count: 2147483648 is not an integer between 1 and 4096"),
        ("expert_count", "many", "llama.expert_count: 'many' is not a number"),
        ("expert_count", True, "llama.expert_count: True is not a number"),
        ("expert_count", 3, r"tensor blk.0.ffn_gate_inp.weight: shape \(4, 64\), \(3, 64\) expected"),
        ("expert_count", None, "tensor blk.0.ffn_gate.weight|tensor blk.0.ffn_up.weight: missing"),
        ("expert_used_count", 0, "llama.expert_used_count: 0 is not an integer between 1 and 4"),
        ("expert_used_count", 5, "llama.expert_used_count: 5 is not an integer between 1 and 4"),
        ("expert_used_count", 1 << 31, "llama.expert_used_count: 2147483648 is not an integer between 1 and 4"),
        ("expert_used_count", None, "llama.expert_used_count: missing"),
        ("expert_used_count", [2, 2, 1], "expert_used_count: a different value for each layer is not supported"),
        ("feed_forward_length", 64, r"ffn_gate.0.weight: shape \(96, 64\), \(64, 64\) expected"),
        ("expert_gating_func", 2, "gating function 2 .anything but softmax, which is 1. is not supported"),
        ("expert_weights_scale", 2.5, "scaling the experts' weights by 2.5 is not supported"),
    ],
)  # fmt: skip
def test_gguf_hyperparameters_that_make_no_sense(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    with pytest.raises(ModelFormatError, match=message):
        _gguf(tmp_path, TinyModel("mixtral"), **{f"llama.{key}": value})


@pytest.mark.parametrize(
    ("family", "key", "value", "message"),
    [
        ("qwen2moe", "expert_count", None, "qwen2moe.expert_count: missing"),
        ("qwen2moe", "expert_count", 0, "qwen2moe.expert_count: 0 is not an integer between 1 and 4096"),
        ("qwen2moe", "expert_used_count", 4097, "qwen2moe.expert_used_count: 4097 is not an integer"),
        ("qwen2moe", "expert_used_count", 400, "expert_used_count: 400 is not an integer between 1 and 4"),
        ("qwen2moe", "expert_shared_feed_forward_length", 1 << 31, "2147483648 is not an integer between"),
        ("qwen2moe", "expert_shared_feed_forward_length", 32, r"ffn_gate_shexp.weight: shape \(64, 64\), \(32, 64\)"),
        ("qwen3moe", "expert_feed_forward_length", 1, r"ffn_gate.0.weight: shape \(32, 64\), \(1, 64\)"),
        ("qwen3moe", "expert_weights_norm", 1, "qwen3moe.expert_weights_norm: 1 is neither true nor false"),
    ],
)  # fmt: skip
def test_qwen_gguf_hyperparameters_that_make_no_sense(
    tmp_path: Path, family: str, key: str, value: object, message: str
) -> None:
    model = TinyModel({"qwen2moe": "qwen2_moe", "qwen3moe": "qwen3_moe"}[family])
    with pytest.raises(ModelFormatError, match=message):
        _gguf(tmp_path, model, **{f"{family}.{key}": value})


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("mixtral", {"num_local_experts": 0}, "num_local_experts: 0 is not an integer between 1 and 4096"),
        ("mixtral", {"num_local_experts": 10**30}, "num_local_experts: 10000.* is not an integer"),
        ("mixtral", {"num_local_experts": 4096}, r"experts.4095.w1.weight: missing; 4096 experts expected"),
        ("mixtral", {"num_local_experts": 3}, r"block_sparse_moe.gate.weight: shape \(4, 64\), \(3, 64\)"),
        ("mixtral", {"num_experts_per_tok": 5}, "num_experts_per_tok: 5 is not an integer between 1 and 4"),
        ("mixtral", {"num_experts_per_tok": 0}, "num_experts_per_tok: 0 is not an integer between 1 and 4"),
        ("mixtral", {"num_experts_per_tok": 1.5}, "num_experts_per_tok: 1.5 is not an integer"),
        ("qwen2_moe", {"num_experts": [4]}, "num_experts: a different value for each layer"),
        ("qwen2_moe", {"norm_topk_prob": "yes"}, "norm_topk_prob: 'yes' is neither true nor false"),
        ("qwen2_moe", {"mlp_only_layers": "all"}, "mlp_only_layers: 'all' is not a list of numbers of layers"),
        ("qwen2_moe", {"mlp_only_layers": [[0]]}, r"mlp_only_layers: \[\[0\]\] is not a list of numbers"),
        ("qwen2_moe", {"mlp_only_layers": [0]}, r"model.layers.0.mlp.gate_proj.weight: missing"),
        ("qwen2_moe", {"decoder_sparse_step": 0}, "decoder_sparse_step: 0 is not an integer"),
        ("qwen2_moe", {"moe_intermediate_size": -1}, "moe_intermediate_size: -1 is not an integer"),
        ("qwen3_moe", {"use_sliding_window": True}, "use_sliding_window: a sliding window in qwen3_moe is not"),
    ],
)  # fmt: skip
def test_config_json_that_makes_no_sense(
    tmp_path: Path, family: str, config: dict[str, Any], message: str
) -> None:
    write_huggingface(tmp_path, model := TinyModel(family))
    changed = model.huggingface_config() | config
    (tmp_path / "config.json").write_text(json.dumps(changed))
    with pytest.raises(ModelFormatError, match=message) as caught:
        _described(tmp_path)
    assert len(str(caught.value)) < 600


def test_an_expert_too_many(tmp_path: Path) -> None:
    extra = {"blk.1.ffn_up.4.weight": np.zeros((96, 64), np.float32)}
    path = write_gguf(tmp_path / "model.gguf", TinyModel("mixtral"), stacked=False, extra=extra)
    with pytest.raises(UnsupportedModelError, match=r"tensor blk.1.ffn_up.4.weight: is not part of 'llama'"):
        _described(path)


def test_an_expert_that_is_not_there(tmp_path: Path) -> None:
    write_huggingface(tmp_path, model := TinyModel("mixtral"))
    weights = model.weights()
    del weights["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    write_safetensors(tmp_path / "model.safetensors", weights)
    message = (
        r"tensor model.layers.1.block_sparse_moe.experts.2.w2.weight: missing; shape \(64, 96\) expected"
    )
    with pytest.raises(ModelFormatError, match=message):
        _described(tmp_path)
