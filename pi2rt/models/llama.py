"""Llama and what shares its shape: Llama 2 and 3, Mistral, SmolLM, TinyLlama, Yi, and the ReLU models made of
them.

GGUF files call all of them ``llama``, and so they call Mixtral (``mixtral.py``); they have the rows of q and k
permuted for interleaved rotation. Attention and feed-forward biases are used where the file has them. ``hidden_act``
selects the ReLU kinds (``decoder.py``).
"""

from __future__ import annotations

from collections.abc import Sequence

from pi2rt.formats.model_file import ModelFile
from pi2rt.models import decoder
from pi2rt.models.checkpoint import Checkpoint
from pi2rt.models.description import Layer, ModelDescription
from pi2rt.models.mixtral import mixtral_model
from pi2rt.models.rope import read_rope

_LLAMA = {"max_position_embeddings": 2048, "rms_norm_eps": 1e-6}
_MISTRAL = {
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-6,
    "num_key_value_heads": 8,
    "sliding_window": 4096,
}


def describe_llama(file: ModelFile, context: int | None) -> ModelDescription:
    """Touvron et al., 2023. Transformers never applies a window to ``model_type: llama``, whatever config.json says
    (its modeling_llama.py, 5.x, makes a full causal mask); GGUF files call Mistral ``llama``, and theirs counts."""
    c = Checkpoint(file, defaults=_LLAMA, context=context)
    if c.optional_number("expert_count", None) is not None:
        return mixtral_model(c)
    windows = c.windows() if c.gguf else (None,) * c.n_layers
    return _describe(c, decoder.activation_name(c), windows)


def describe_mistral(file: ModelFile, context: int | None) -> ModelDescription:
    """Jiang et al., 2023: Llama with a sliding window on every layer, where config.json gives one."""
    c = Checkpoint(file, defaults=_MISTRAL, context=context)
    return _describe(c, decoder.activation_name(c), c.windows())


def describe_bamboo(file: ModelFile, context: int | None) -> ModelDescription:
    """SJTU IPADS, 2024: Mistral with ``relu(gate) * relu(up)``, though its config.json says ``"relu"``."""
    c = Checkpoint(file, defaults=_MISTRAL | {"sliding_window": None}, context=context)
    return _describe(c, "drelu", c.windows())


def _describe(c: Checkpoint, activation: str, windows: Sequence[int | None]) -> ModelDescription:
    rope = read_rope(c, "interleaved" if c.gguf else "halves")
    return decoder.model(
        c,
        (
            Layer((decoder.attention(c, i, rope, window=window), decoder.feed_forward(c, i, activation)))
            for i, window in enumerate(windows)
        ),
    )
