"""Qwen2 and Qwen2.5: Llama's shape with biases on q, k and v, rotated by halves in both containers."""

from __future__ import annotations

from pi2rt.formats.model_file import ModelFile
from pi2rt.models import decoder
from pi2rt.models.checkpoint import Checkpoint
from pi2rt.models.description import Layer, ModelDescription
from pi2rt.models.rope import read_rope

_DEFAULTS = {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "max_window_layers": 28}


def describe_qwen2(file: ModelFile, context: int | None) -> ModelDescription:
    """Yang et al., 2024."""
    c = Checkpoint(file, defaults=_DEFAULTS, context=context)
    rope = read_rope(c, "halves")
    activation = decoder.activation_name(c)
    return decoder.model(
        c,
        (
            Layer(
                (
                    decoder.attention(c, i, rope, window=window, bias=True),
                    decoder.feed_forward(c, i, activation),
                )
            )
            for i, window in enumerate(qwen_windows(c))
        ),
    )


def qwen_windows(c: Checkpoint) -> tuple[int | None, ...]:
    """config.json names a window that counts only with ``use_sliding_window``, and then from
    ``max_window_layers`` on; GGUF files of this family have none."""
    if c.gguf or c.value(None, "use_sliding_window") is not True:
        return (None,) * c.n_layers
    return c.windows(first=c.integer(None, "max_window_layers", low=0))
