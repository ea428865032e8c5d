"""What a description says, and the files that are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.executors.reference.executor import ReferenceExecutor
from pi2rt.formats import open_model_file
from pi2rt.models import Attention, FeedForward, ModelDescription, describe, iterate_tensors
from tests.support.running import all_logits, opened
from tests.support.tiny_models import VOCAB_SIZE, TinyModel, write_gguf, write_huggingface, write_safetensors


def _gguf(tmp_path: Path, model: TinyModel | None = None, **metadata: Any) -> ModelDescription:
    keys = {key.replace("__", "."): value for key, value in metadata.items()}
    path = write_gguf(tmp_path / "model.gguf", model or TinyModel(), metadata=keys)
    with open_model_file(path) as file:
        return describe(file)


def _huggingface(
    tmp_path: Path, model: TinyModel | None = None, dtype: str = "F32", **config: Any
) -> ModelDescription:
    write_huggingface(tmp_path, model or TinyModel(), dtype=dtype)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    with open_model_file(tmp_path) as file:
        return describe(file)


def _attention(model: ModelDescription, layer: int = 0) -> Attention:
    block = model.layers[layer].blocks[0]
    assert isinstance(block, Attention)
    return block


def _feed_forward(model: ModelDescription, layer: int = 0) -> FeedForward:
    block = model.layers[layer].blocks[1]
    assert isinstance(block, FeedForward)
    return block


def test_llama_from_gguf(tmp_path: Path) -> None:
    model = _gguf(tmp_path)
    assert (model.architecture, model.name) == ("llama", "tiny llama")
    assert (model.dim, model.vocab_size, model.context_length, len(model.layers)) == (64, VOCAB_SIZE, 256, 3)
    assert (model.embedding, model.head.weight) == ("token_embd.weight", "output.weight")
    attention = _attention(model, 2)
    assert attention.q.weight == "blk.2.attn_q.weight"
    assert (attention.n_heads, attention.n_kv_heads, attention.head_dim) == (4, 2, 16)
    assert (attention.scale, attention.window, attention.softcap) == (0.25, None, None)
    assert attention.rope is not None
    assert attention.rope.style == "interleaved"
    assert _feed_forward(model).activation == "silu"


async def test_layers_may_differ_in_heads_and_neurons(tmp_path: Path) -> None:
    """The CPU executor computes what the reference executor does."""
    rng = np.random.default_rng(4)
    shapes = {
        "attn_k": (16, 64),
        "attn_v": (16, 64),
        "ffn_gate": (32, 64),
        "ffn_up": (32, 64),
        "ffn_down": (64, 32),
    }
    extra = {
        f"blk.1.{name}.weight": rng.standard_normal(shape).astype(np.float32) / 8
        for name, shape in shapes.items()
    }
    metadata = {"llama.attention.head_count_kv": [2, 1, 2], "llama.feed_forward_length": [96, 32, 96]}
    path = write_gguf(tmp_path / "model.gguf", TinyModel(), metadata=metadata, extra=extra)
    with open_model_file(path) as file:
        model = describe(file)
    assert [_attention(model, i).n_kv_heads for i in range(3)] == [2, 1, 2]
    assert [_feed_forward(model, i).hidden for i in range(3)] == [96, 32, 96]
    found = []
    for executor in (ReferenceExecutor(), CpuExecutor()):
        async with opened(executor, path) as each:
            found.append(await all_logits(each, np.arange(3, 90, dtype=np.int32)))
    np.testing.assert_allclose(found[1], found[0], atol=1e-4 * np.abs(found[0]).max())


def test_tied_heads_name_the_embedding_once(tmp_path: Path) -> None:
    model = _gguf(tmp_path, TinyModel(config={"tie_word_embeddings": True}))
    assert model.head.weight == model.embedding
    names = [name for name, _ in iterate_tensors(model)]
    assert len(names) == len(set(names))
    assert names.count(model.embedding) == 1


def test_iterate_tensors_names_every_tensor_of_the_file(tmp_path: Path) -> None:
    for family in ("llama", "qwen2", "qwen3", "gemma3_text", "mixtral", "qwen2_moe", "qwen3_moe"):
        path = write_gguf(
            tmp_path / f"{family}.gguf", TinyModel(family, config={"attention_bias": family == "llama"})
        )
        with open_model_file(path) as file:
            assert {name for name, _ in iterate_tensors(describe(file))} == set(file.tensors)


def test_gemma3(tmp_path: Path) -> None:
    model = _gguf(tmp_path, TinyModel("gemma3_text", layers=13))
    windows = [_attention(model, i).window for i in range(13)]
    assert windows == [8, 8, 8, 8, 8, None, 8, 8, 8, 8, 8, None, 8]
    assert model.embedding_scale == 8.0
    assert _attention(model).scale == pytest.approx(24**-0.5)
    assert _attention(model).norm.offset == 0
    block = _feed_forward(model)
    assert block.activation == "gelu_tanh"
    assert block.norm.weight == "blk.0.ffn_norm.weight"
    assert block.post_norm is not None
    assert block.post_norm.weight == "blk.0.post_ffw_norm.weight"


def test_gemma3_flags_for_each_layer(tmp_path: Path) -> None:
    keys = {"gemma3.attention.sliding_window_pattern": [False, True, False]}
    path = write_gguf(tmp_path / "model.gguf", TinyModel("gemma3_text"), metadata=keys)
    with open_model_file(path) as file:
        model = describe(file)
    assert [_attention(model, i).window for i in range(3)] == [None, 8, None]


def test_gemma3_scales_logits_by_size_where_the_file_says_nothing(tmp_path: Path) -> None:
    silent = {"gemma3__attention__scale": None}
    assert _attention(_gguf(tmp_path, TinyModel("gemma3_text"), **silent)).scale == 16**-0.5
    largest = TinyModel("gemma3_text", layers=62, dim=32, hidden=32, heads=2, kv_heads=1, head_dim=8)
    assert _attention(_gguf(tmp_path, largest, **silent)).scale == 16**-0.5  # dim / heads


@pytest.mark.parametrize(("dtype", "scale"), [("F32", 1152**0.5), ("F16", 33.9375), ("BF16", 34.0)])
def test_gemma3_rounds_the_embedding_scale_to_the_type_of_a_checkpoint(
    tmp_path: Path, dtype: str, scale: float
) -> None:
    model = TinyModel("gemma3_text", dim=1152, hidden=32, layers=1)
    assert _huggingface(tmp_path, model, dtype).embedding_scale == scale


@pytest.mark.parametrize(
    ("name", "activations"),
    [
        ("silu", ("silu", None)),
        ("gelu", ("gelu", None)),
        ("gelu_pytorch_tanh", ("gelu_tanh", None)),
        ("relu", ("relu", None)),
        ("relu2", ("relu2", None)),
        ("drelu", ("relu", "relu")),
        ("fatrelu", ("relu", None)),
    ],
)
def test_hidden_act_selects_the_activation(
    tmp_path: Path, name: str, activations: tuple[str, str | None]
) -> None:
    for model in (
        _huggingface(tmp_path / "hf", hidden_act=name),
        _gguf(tmp_path, llama__hidden_activation=name),
    ):
        block = _feed_forward(model)
        assert (block.activation, block.up_activation) == activations


def test_ungated_feed_forward(tmp_path: Path) -> None:
    block = _feed_forward(_gguf(tmp_path, TinyModel(gated=False, config={"hidden_act": "relu2"})))
    assert block.gate is None
    assert block.activation == "relu2"


def test_unknown_architecture_names_it_and_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedModelError, match=r"architecture: 'mamba9' is not supported; pi2rt runs bamboo, .*qwen3"
    ):
        _huggingface(tmp_path, model_type="mamba9")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("block_count", 0, "llama.block_count: 0 is not an integer between 1 and 1024"),
        ("block_count", 1 << 31, "llama.block_count: 2147483648 is not an integer"),
        ("block_count", None, "llama.block_count: missing"),
        ("block_count", "three", "llama.block_count: 'three' is not an integer"),
        ("block_count", 4, "tensor blk.3.attn_norm.weight: missing; shape .64,. expected"),
        ("block_count", 2, "tensor blk.2.*: is not part of 'llama'"),
        ("embedding_length", 128, r"tensor token_embd.weight: shape \(320, 64\), \(320, 128\) expected"),
        ("feed_forward_length", 100, r"tensor blk.0.ffn_gate.weight: shape \(96, 64\), \(100, 64\) expected"),
        (
            "feed_forward_length",
            [96, 96, 64],
            r"tensor blk.2.ffn_gate.weight: shape \(96, 64\), \(64, 64\) expected",
        ),
        ("feed_forward_length", [96, 0, 96], "layer 1 without a feed-forward block is not supported"),
        ("feed_forward_length", [96, 64], "has 2 values for 3 layers"),
        ("feed_forward_length", 0, "llama.feed_forward_length: 0 is not an integer between 1"),
        ("attention.head_count", 0, "llama.attention.head_count: 0 is not an integer between 1"),
        ("attention.head_count", None, "llama.attention.head_count: missing"),
        ("attention.head_count_kv", 0, "llama.attention.head_count_kv: 0 is not an integer between 1"),
        (
            "attention.head_count_kv",
            [0, 0, 0],
            "llama.attention.head_count_kv: 0 is not an integer between 1",
        ),
        ("attention.head_count_kv", [2, 0, 2], "layer 1 without attention is not supported"),
        (
            "attention.head_count_kv",
            [2, 2, 1],
            r"tensor blk.2.attn_k.weight: shape \(32, 64\), \(16, 64\) expected",
        ),
        ("attention.head_count", [4, 0, 4], "layer 1 without attention is not supported"),
        ("attention.head_count", 3, "3 query heads cannot share 2 key-value heads"),
        ("attention.head_count", True, "True is not an integer"),
        ("attention.key_length", 15, "attention.key_length: 15 is odd"),
        (
            "attention.key_length",
            1 << 20,
            "attention.key_length: 1048576 is not an integer between 1 and 16384",
        ),
        ("attention.value_length", 8, "values of 8 beside keys of 16 elements is not supported"),
        ("context_length", 0, "context_length: 0 is not an integer between 1"),
        (
            "attention.layer_norm_rms_epsilon",
            float("nan"),
            "layer_norm_rms_epsilon: nan is not a number above 0",
        ),
        ("attention.layer_norm_rms_epsilon", -1.0, "layer_norm_rms_epsilon: -1.0 is not a number above 0"),
        ("rope.freq_base", float("inf"), "rope.freq_base: inf is not a number"),
        ("hidden_activation", "mish", "activation 'mish' .known: silu, .* is not supported"),
    ],
)
def test_gguf_hyperparameters_that_make_no_sense(
    tmp_path: Path, key: str, value: object, message: str
) -> None:
    with pytest.raises(ModelFormatError, match=message) as caught:
        _gguf(tmp_path, **{f"llama.{key}": value})
    assert str(tmp_path / "model.gguf") in str(caught.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 10**30}, "config.json: num_hidden_layers: 1000.* is not an integer"),
        ({"num_hidden_layers": 2.5}, "config.json: num_hidden_layers: 2.5 is not an integer"),
        ({"hidden_size": [64]}, None),
        ({"hidden_size": {"a": 1}}, "config.json: hidden_size: {'a': 1} is not an integer"),
        ({"rms_norm_eps": 10**400}, "config.json: rms_norm_eps: 1000"),
        ({"hidden_act": "x" * 10_000}, "activation 'xxx"),
        ({"head_dim": 1110408}, "config.json: head_dim: 1110408 is not an integer between 1 and 16384"),
        (
            {"hidden_size": 1 << 22, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": None},
            "config.json: head_dim: 4194304 is not an integer between 1 and 16384",
        ),
        ({"hidden_act": ["silu"]}, r"hidden_act: \['silu'\] is not a name"),
        ({"hidden_act": "fatrelu", "hidden_act_param": 0.01}, "FATReLU threshold other than 0"),
        (
            {"num_attention_heads": 5, "num_key_value_heads": 5, "head_dim": None},
            "64 is not divisible by 5 heads",
        ),
    ],
)
def test_config_json_that_makes_no_sense(tmp_path: Path, config: dict[str, Any], message: str | None) -> None:
    with pytest.raises(ModelFormatError, match=message or "hidden_size") as caught:
        _huggingface(tmp_path, **config)
    assert len(str(caught.value)) < 600


def test_layer_types_must_be_known_and_as_many_as_layers(tmp_path: Path) -> None:
    window = {"sliding_window": 8, "use_sliding_window": True}
    with pytest.raises(ModelFormatError, match="layer_types: 2 entries for 3 layers"):
        _huggingface(tmp_path, TinyModel("qwen2"), layer_types=["full_attention"] * 2, **window)
    with pytest.raises(UnsupportedModelError, match="layer_types: 'chunked_attention' is not supported"):
        _huggingface(tmp_path, TinyModel("qwen2"), layer_types=["chunked_attention"] * 3, **window)


def test_missing_qwen2_bias(tmp_path: Path) -> None:
    write_huggingface(tmp_path, model := TinyModel("qwen2"))
    weights = model.weights()
    del weights["model.layers.1.self_attn.k_proj.bias"]
    write_safetensors(tmp_path / "model.safetensors", weights)
    message = r"tensor model.layers.1.self_attn.k_proj.bias: missing; shape \(32,\) expected"
    with open_model_file(tmp_path) as file, pytest.raises(ModelFormatError, match=message):
        describe(file)


@pytest.mark.parametrize("stale", [1, 321, 10**30])
def test_the_rows_of_the_embedding_decide_about_the_vocabulary(tmp_path: Path, stale: int) -> None:
    assert _huggingface(tmp_path, vocab_size=stale).vocab_size == 320
    if stale < 2**32:
        assert _gguf(tmp_path, llama__vocab_size=stale).vocab_size == 320


def test_a_window_in_the_config_of_a_llama_is_not_applied(tmp_path: Path) -> None:
    model = _huggingface(tmp_path, sliding_window=8, layer_types=["sliding_attention"] * 3)
    assert [_attention(model, layer).window for layer in range(3)] == [None] * 3
    assert _attention(_huggingface(tmp_path, TinyModel("mistral"), sliding_window=8)).window == 8


def test_a_byte_order_mark_before_config_json(tmp_path: Path) -> None:
    write_huggingface(tmp_path, TinyModel())
    path = tmp_path / "config.json"
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    with open_model_file(tmp_path) as file:
        assert len(describe(file).layers) == 3


def test_types_that_cannot_be_read_are_refused_where_the_model_needs_them(tmp_path: Path) -> None:
    write_huggingface(tmp_path, model := TinyModel())
    weights = model.weights()
    ids = np.arange(8)
    write_safetensors(tmp_path / "model.safetensors", {**weights, "model.position_ids": ids})
    with open_model_file(tmp_path) as file:
        assert file.tensors["model.position_ids"].type == "I64 of safetensors"
        assert len(describe(file).layers) == 3
    name = "model.layers.1.mlp.up_proj.weight"
    whole = weights | {name: np.zeros(weights[name].shape, np.int64)}
    write_safetensors(tmp_path / "model.safetensors", whole)
    with open_model_file(tmp_path) as file:
        with pytest.raises(
            UnsupportedModelError, match=rf"tensor {name}: type: is I64 of safetensors; pi2rt reads"
        ):
            describe(file)


def test_a_tensor_that_nothing_reads_is_refused(tmp_path: Path) -> None:
    """It would mean a model that computes something else."""
    extra = {"blk.1.ffn_gate_inp.weight": np.zeros((4, 64), np.float32)}
    path = write_gguf(tmp_path / "model.gguf", TinyModel(), extra=extra)
    with open_model_file(path) as file:
        with pytest.raises(UnsupportedModelError, match=r"tensor blk.1.ffn_gate_inp.weight: is not part of"):
            describe(file)


def test_rotation_tables_that_old_files_carry_are_not_minded(tmp_path: Path) -> None:
    write_huggingface(tmp_path, model := TinyModel())
    weights = model.weights()
    weights["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(8, np.float32)
    write_safetensors(tmp_path / "model.safetensors", weights)
    with open_model_file(tmp_path) as file:
        assert len(describe(file).layers) == 3
