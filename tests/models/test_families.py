"""Every architecture and rotation against the logits of Transformers (``tests/golden/make_families.py``)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pi2rt.executors.reference.executor import ReferenceExecutor
from tests.support.families import FAMILIES
from tests.support.running import all_logits, opened
from tests.support.tiny_models import TinyModel, write_gguf, write_huggingface

GOLDEN = Path(__file__).parent.parent / "golden" / "families.npz"


def test_every_family_has_golden_logits() -> None:
    with np.load(GOLDEN) as golden:
        assert sorted(golden) == sorted(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
async def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    family = FAMILIES[name]
    write_huggingface(tmp_path, family.model)
    async with opened(ReferenceExecutor(), tmp_path, model_context=family.context) as executor:
        logits = await all_logits(executor, family.token_ids())
    with np.load(GOLDEN) as file:
        golden = file[name]
    error = np.linalg.norm(logits[family.positions] - golden) / np.linalg.norm(golden)
    assert error < 2e-5


@pytest.mark.parametrize(
    "model",
    [
        TinyModel("llama", seed=1),
        TinyModel(
            "llama", seed=2, config={"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}
        ),
        TinyModel("llama", seed=3, config={"hidden_act": "relu2"}),
        TinyModel("llama", seed=4, config={"hidden_act": "drelu"}),
        TinyModel("llama", seed=5, gated=False, config={"hidden_act": "relu"}),
        TinyModel("mistral", seed=6, config={"sliding_window": 8}),
        TinyModel("qwen2", seed=7),
        TinyModel("qwen3", seed=8, head_dim=32),
        TinyModel("gemma3_text", seed=9, layers=7),
        TinyModel("mixtral", seed=12),
        TinyModel("qwen2_moe", seed=13, experts=5, experts_used=3),
        TinyModel("qwen2_moe", seed=14, config={"norm_topk_prob": True}),
        TinyModel("qwen3_moe", seed=15, head_dim=32),
        TinyModel("qwen3_moe", seed=16, config={"norm_topk_prob": False}),
    ],
    ids=lambda model: f"{model.family}-{model.seed}",
)
async def test_a_gguf_file_gives_the_logits_of_its_huggingface_twin(model: TinyModel, tmp_path: Path) -> None:
    write_huggingface(tmp_path / "hf", model)
    write_gguf(tmp_path / "model.gguf", model)
    tokens = np.random.RandomState(0).randint(0, 318, 40).astype(np.int32)
    async with opened(ReferenceExecutor(), tmp_path / "hf") as executor:
        expected = await all_logits(executor, tokens)
    async with opened(ReferenceExecutor(), tmp_path / "model.gguf") as executor:
        logits = await all_logits(executor, tokens)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=2e-5)


async def test_gemma3_inside_a_checkpoint_of_text_and_vision(tmp_path: Path) -> None:
    """The language model lies under a prefix, its hyperparameters under ``text_config``."""
    import json

    from tests.support.tiny_models import write_safetensors

    model = TinyModel("gemma3_text", seed=10)
    write_huggingface(tmp_path / "text", model)
    both = write_huggingface(tmp_path / "both", model)
    config = {
        "model_type": "gemma3",
        "text_config": model.huggingface_config(),
        "vision_config": {"hidden_size": 8},
    }
    (both / "config.json").write_text(json.dumps(config))
    weights = {f"language_model.{name}": values for name, values in model.weights().items()}
    weights["vision_tower.embeddings.weight"] = np.zeros((3, 8), np.float32)
    write_safetensors(both / "model.safetensors", weights)
    tokens = np.arange(20, dtype=np.int32)
    async with opened(ReferenceExecutor(), tmp_path / "text") as executor:
        expected = await all_logits(executor, tokens)
    async with opened(ReferenceExecutor(), both) as executor:
        np.testing.assert_array_equal(await all_logits(executor, tokens), expected)


async def test_drelu_is_zero_where_either_half_is(tmp_path: Path) -> None:
    """Bamboo's config.json says relu, and means it for gate and up."""
    said = write_huggingface(tmp_path / "said", TinyModel("llama", seed=11, config={"hidden_act": "drelu"}))
    meant = write_huggingface(tmp_path / "meant", TinyModel("bamboo", seed=11, config={"hidden_act": "relu"}))
    plain = write_huggingface(tmp_path / "plain", TinyModel("llama", seed=11, config={"hidden_act": "relu"}))
    tokens = np.arange(10, dtype=np.int32)
    results = []
    for directory in (said, meant, plain):
        async with opened(ReferenceExecutor(), directory) as executor:
            results.append(await all_logits(executor, tokens))
    np.testing.assert_array_equal(results[0], results[1])
    assert np.abs(results[0] - results[2]).max() > 0.01


@pytest.mark.parametrize(
    "weight_type", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K"]
)
async def test_quantised_weights_stay_close(weight_type: str, tmp_path: Path) -> None:
    model = TinyModel("llama", seed=12, dim=256, hidden=512, layers=1, heads=4, head_dim=64)
    exact = write_gguf(tmp_path / "exact.gguf", model)
    coarse = write_gguf(
        tmp_path / "coarse.gguf", model, weight_type=weight_type, types={"token_embd": "Q8_0"}
    )
    tokens = np.arange(8, dtype=np.int32)
    async with opened(ReferenceExecutor(), exact) as executor:
        expected = await all_logits(executor, tokens)
    async with opened(ReferenceExecutor(), coarse) as executor:
        logits = await all_logits(executor, tokens)
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert error < {"4": 0.4, "5": 0.2, "6": 0.1}.get(weight_type[1], 0.02)
