"""Qwen3-MoE: Qwen3 with mixtures of small experts, none of them shared."""

from __future__ import annotations

from pi2rt.formats.model_file import ModelFile
from pi2rt.models import decoder, experts
from pi2rt.models.checkpoint import Checkpoint
from pi2rt.models.description import Layer, ModelDescription
from pi2rt.models.qwen2_moe import QWEN_EXPERT_NAMES, expert_hidden, mixed_layers, refuse_window
from pi2rt.models.rope import read_rope

_DEFAULTS = {
    "intermediate_size": 6144,
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 768,
    "num_experts_per_tok": 8,
}


def describe_qwen3_moe(file: ModelFile, context: int | None) -> ModelDescription:
    """Yang et al., 2025. GGUF files do not say that weights of the chosen experts sum to 1, but mean it."""
    c = Checkpoint(file, defaults=_DEFAULTS, huggingface_names=QWEN_EXPERT_NAMES, context=context)
    refuse_window(c)
    rope = read_rope(c, "halves")
    activation = decoder.activation_name(c)
    count = experts.expert_count(c, default=128)
    hidden = expert_hidden(c)
    normalized = experts.normalizes(c, "norm_topk_prob", default=c.gguf)
    return decoder.model(
        c,
        (
            Layer(
                (
                    decoder.attention(c, i, rope, qk_norm=True),
                    experts.mixture(c, i, activation, count=count, hidden=hidden, normalized=normalized)
                    if mixed
                    else decoder.feed_forward(c, i, activation, gated=True),
                )
            )
            for i, mixed in enumerate(mixed_layers(c))
        ),
    )
