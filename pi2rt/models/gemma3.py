"""Gemma 3, its language model: norms before and after each block, QK norm, GeGLU, and five layers with a
sliding window and an unscaled rotation of their own to each layer with full attention.

Hugging Face checkpoints hold norm weights less one. Where the two containers disagree, each is followed:
embeddings are scaled by ``sqrt(dim)``, which Transformers rounds to the type of the embedding and llama.cpp
does not; logits by ``query_pre_attn_scalar ** -0.5``, which GGUF files do not carry and llama.cpp infers from
the size of the model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from pi2rt.formats.model_file import ModelFile
from pi2rt.models import decoder
from pi2rt.models.checkpoint import MAX_LAYERS, Checkpoint
from pi2rt.models.description import Layer, ModelDescription
from pi2rt.models.rope import plain_rope, read_rope

_DEFAULTS = {
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_NAMES = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_LAYERS_OF_27B = 62  # the one size whose logits are not scaled by head_dim


def describe_gemma3(file: ModelFile, context: int | None) -> ModelDescription:
    """Gemma Team, 2025."""
    c = Checkpoint(file, defaults=_DEFAULTS, huggingface_names=_NAMES, norm_offset=1.0, context=context)
    everywhere = read_rope(c, "halves", base=1_000_000.0)
    nearby = plain_rope(c, c.head_dim, _local_base(c), "halves")
    scale = _logit_scale(c)
    period = c.value("attention.sliding_window_pattern", "sliding_window_pattern")
    if isinstance(period, int) and not isinstance(period, bool):
        period = c.integer("attention.sliding_window_pattern", "sliding_window_pattern", high=MAX_LAYERS)
    else:
        period = 6  # five local layers to one global; flags for each layer are read by windows()

    activation = decoder.activation_name(c, "hidden_activation", default="gelu_tanh")

    layers = (
        Layer(
            (
                decoder.attention(
                    c,
                    i,
                    everywhere if window is None else nearby,
                    scale=scale,
                    window=window,
                    qk_norm=True,
                    post_norm="post_attention_norm",
                ),
                decoder.feed_forward(c, i, activation, post_norm="post_ffw_norm"),
            )
        )
        for i, window in enumerate(c.windows(period=period))
    )
    return decoder.model(c, layers, tied=True, embedding_scale=_embedding_scale(c))


def _local_base(c: Checkpoint) -> float:
    nested = c.value(None, "rope_parameters")
    local = nested.get("sliding_attention") if isinstance(nested, Mapping) else None
    if isinstance(local, Mapping) and local.get("rope_theta") is not None:
        return c.check_number(
            None, "rope_parameters.sliding_attention.rope_theta", local["rope_theta"], low=1.0
        )
    return c.number("rope.freq_base_swa", "rope_local_base_freq", default=10_000.0, low=1.0)


def _logit_scale(c: Checkpoint) -> float:
    if not c.gguf:
        return 1 / math.sqrt(c.number(None, "query_pre_attn_scalar"))
    inferred = c.dim / c.n_heads if c.n_layers == _LAYERS_OF_27B else c.head_dim
    return c.number("attention.scale", None, default=1 / math.sqrt(inferred))


def _embedding_scale(c: Checkpoint) -> float:
    scale = math.sqrt(c.dim)
    embedding = c.file.tensors.get(c.tensor("token_embd"))
    if c.gguf or embedding is None or embedding.type not in ("F16", "BF16"):
        return scale
    if embedding.type == "F16":
        return float(np.float16(scale))
    bits = int(np.float32(scale).view(np.uint32))
    rounded = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000  # to the nearest, ties to even
    return float(np.array(rounded, np.uint32).view(np.float32))
