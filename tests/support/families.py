"""Tiny models that stand for everything an architecture file can be asked for, one by one. Their logits, as
Transformers computes them, are kept in ``tests/golden/families.npz`` (written by ``make_families.py``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from tests.support.tiny_models import VOCAB_SIZE, TinyModel

POSITIONS = (5, 31, 47)
"""Of which logits are kept; a case of fewer tokens keeps those that it has."""


@dataclass(frozen=True)
class Family:
    """``context``: what the runtime would open the model with; decides LongRoPE and dynamic NTK."""

    model: TinyModel
    tokens: int = 48
    context: int | None = None

    def token_ids(self) -> npt.NDArray[np.int32]:
        return (
            np.random.RandomState(self.model.seed + 1)
            .randint(0, VOCAB_SIZE - 2, self.tokens)
            .astype(np.int32)
        )

    @property
    def positions(self) -> list[int]:
        return [p for p in POSITIONS if p < self.tokens]


_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
_LONGROPE = {
    "rope_type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 10.0],
    "original_max_position_embeddings": 32,
}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(TinyModel(seed=100)),
    "llama-one-kv-head": Family(TinyModel(seed=101, kv_heads=1)),
    "llama-tied": Family(TinyModel(seed=102, config={"tie_word_embeddings": True})),
    "llama-biases": Family(TinyModel(seed=103, config={"attention_bias": True, "mlp_bias": True})),
    "llama-relu": Family(TinyModel(seed=104, config={"hidden_act": "relu"})),
    "llama-relu2": Family(TinyModel(seed=105, config={"hidden_act": "relu2"})),
    "llama-gelu": Family(TinyModel(seed=106, config={"hidden_act": "gelu"})),
    "llama-linear": Family(TinyModel(seed=110, config={"rope_scaling": {"type": "linear", "factor": 2.0}})),
    "llama-dynamic": Family(
        TinyModel(seed=111, context=32, config={"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
        context=48,
    ),
    "llama-dynamic-short": Family(
        TinyModel(seed=112, context=256, config={"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}),
    ),
    "llama-llama3": Family(TinyModel(seed=113, config={"rope_scaling": _LLAMA3})),
    "llama-yarn": Family(TinyModel(seed=114, config={"rope_scaling": _YARN})),
    "llama-yarn-options": Family(
        TinyModel(
            seed=115,
            config={
                "rope_scaling": _YARN
                | {"attention_factor": 1.3, "beta_fast": 8.0, "beta_slow": 2.0, "truncate": False}
            },
        )
    ),
    "llama-yarn-mscale": Family(
        TinyModel(seed=116, config={"rope_scaling": _YARN | {"mscale": 0.7, "mscale_all_dim": 0.4}})
    ),
    "llama-longrope-long": Family(TinyModel(seed=117, config={"rope_scaling": _LONGROPE})),
    "llama-longrope-short": Family(
        TinyModel(seed=118, config={"rope_scaling": _LONGROPE}), tokens=32, context=32
    ),
    "llama-rope-parameters": Family(
        TinyModel(
            seed=119, config={"rope_parameters": {"rope_theta": 500.0, "rope_type": "linear", "factor": 3.0}}
        )
    ),
    "mistral": Family(TinyModel("mistral", seed=120)),
    "mistral-window": Family(TinyModel("mistral", seed=121, config={"sliding_window": 8})),
    "qwen2": Family(TinyModel("qwen2", seed=130)),
    "qwen2-window": Family(
        TinyModel(
            "qwen2",
            seed=131,
            config={"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        )
    ),
    "qwen2-window-unused": Family(TinyModel("qwen2", seed=132, config={"sliding_window": 8})),
    "qwen3": Family(TinyModel("qwen3", seed=140, head_dim=32)),
    "qwen3-layer-types": Family(
        TinyModel(
            "qwen3",
            seed=141,
            config={
                "use_sliding_window": True,
                "sliding_window": 8,
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
            },
        )
    ),
    "mixtral": Family(TinyModel("mixtral", seed=160)),
    "mixtral-one-of-three": Family(TinyModel("mixtral", seed=161, experts=3, experts_used=1)),
    "mixtral-window": Family(TinyModel("mixtral", seed=162, config={"sliding_window": 8})),
    "mixtral-relu": Family(TinyModel("mixtral", seed=163, config={"hidden_act": "relu"})),
    "qwen2-moe": Family(TinyModel("qwen2_moe", seed=170, experts=6, experts_used=3)),
    "qwen2-moe-normalized": Family(TinyModel("qwen2_moe", seed=171, config={"norm_topk_prob": True})),
    "qwen2-moe-plain-layers": Family(
        TinyModel("qwen2_moe", seed=172, layers=4, config={"mlp_only_layers": [3], "decoder_sparse_step": 2})
    ),
    "qwen3-moe": Family(TinyModel("qwen3_moe", seed=180, head_dim=32, experts=8, experts_used=4)),
    "qwen3-moe-not-normalized": Family(TinyModel("qwen3_moe", seed=181, config={"norm_topk_prob": False})),
    "qwen3-moe-biases": Family(
        TinyModel("qwen3_moe", seed=182, config={"attention_bias": True, "mlp_only_layers": [0]})
    ),
    "gemma3": Family(TinyModel("gemma3_text", seed=150, layers=7)),
    "gemma3-linear-softcap": Family(
        TinyModel(
            "gemma3_text",
            seed=151,
            layers=6,
            config={
                "rope_scaling": {"rope_type": "linear", "factor": 8.0},
                "final_logit_softcapping": 2.0,
                "sliding_window_pattern": 3,
            },
        )
    ),
    "gemma3-rope-parameters": Family(
        TinyModel(
            "gemma3_text",
            seed=152,
            config={
                "layer_types": ["full_attention", "sliding_attention", "full_attention"],
                "rope_parameters": {
                    "full_attention": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 5000.0},
                    "sliding_attention": {"rope_type": "default", "rope_theta": 300.0},
                },
            },
        )
    ),
}
