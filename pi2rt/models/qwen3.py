"""Qwen3: norms on each head of q and k instead of Qwen2's biases, and heads wider than ``dim / n_heads``."""

from __future__ import annotations

from pi2rt.formats.model_file import ModelFile
from pi2rt.models import decoder
from pi2rt.models.checkpoint import Checkpoint
from pi2rt.models.description import Layer, ModelDescription
from pi2rt.models.qwen2 import qwen_windows
from pi2rt.models.rope import read_rope

_DEFAULTS = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "max_window_layers": 28, "head_dim": 128}


def describe_qwen3(file: ModelFile, context: int | None) -> ModelDescription:
    """Yang et al., 2025."""
    c = Checkpoint(file, defaults=_DEFAULTS, context=context)
    rope = read_rope(c, "halves")
    activation = decoder.activation_name(c)
    return decoder.model(
        c,
        (
            Layer(
                (
                    decoder.attention(c, i, rope, window=window, qk_norm=True),
                    decoder.feed_forward(c, i, activation),
                )
            )
            for i, window in enumerate(qwen_windows(c))
        ),
    )
