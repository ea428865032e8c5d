"""Mixtral: Mistral whose feed-forward blocks are mixtures of experts, whose weights sum to 1.

GGUF files call it ``llama``, with ``llama.expert_count``.
"""

from __future__ import annotations

from pi2rt.formats.model_file import ModelFile
from pi2rt.models import decoder, experts
from pi2rt.models.checkpoint import Checkpoint
from pi2rt.models.description import Layer, ModelDescription
from pi2rt.models.rope import read_rope

_DEFAULTS = {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "num_key_value_heads": 8,
    "num_experts_per_tok": 2,
}
_NAMES = {
    "ffn_gate_inp": "block_sparse_moe.gate",
    "ffn_gate_exps": "block_sparse_moe.experts.{}.w1",
    "ffn_up_exps": "block_sparse_moe.experts.{}.w3",
    "ffn_down_exps": "block_sparse_moe.experts.{}.w2",
}


def describe_mixtral(file: ModelFile, context: int | None) -> ModelDescription:
    """Jiang et al., 2024."""
    return mixtral_model(Checkpoint(file, defaults=_DEFAULTS, huggingface_names=_NAMES, context=context))


def mixtral_model(c: Checkpoint) -> ModelDescription:
    """Of a checkpoint of either container."""
    rope = read_rope(c, "interleaved") if c.gguf else read_rope(c, "halves", base=1_000_000.0)
    count = experts.expert_count(c, default=8)
    activation = decoder.activation_name(c)
    return decoder.model(
        c,
        (
            Layer(
                (
                    decoder.attention(c, i, rope, window=window),
                    experts.mixture(c, i, activation, count=count),
                )
            )
            for i, window in enumerate(c.windows())
        ),
    )
