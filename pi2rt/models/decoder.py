"""What all decoders here have in common: attention and feed-forward blocks put together from a file's
tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pi2rt._errors import ModelFormatError
from pi2rt.formats.model_file import printable
from pi2rt.models.blocks import Attention, FeedForward
from pi2rt.models.checkpoint import Checkpoint
from pi2rt.models.description import Layer, ModelDescription
from pi2rt.models.parts import Activation, Rope

ACTIVATIONS: dict[str, tuple[Activation, Activation | None]] = {
    "silu": ("silu", None),
    "swish": ("silu", None),
    "gelu": ("gelu", None),
    "gelu_pytorch_tanh": ("gelu_tanh", None),
    "gelu_tanh": ("gelu_tanh", None),
    "gelu_new": ("gelu_tanh", None),
    "gelu_fast": ("gelu_tanh", None),
    "relu": ("relu", None),  # ReGLU where there is a gate: ReluLLaMA
    "relu2": ("relu2", None),
    "drelu": ("relu", "relu"),  # relu(gate) * relu(up): TurboSparse
    "fatrelu": ("relu", None),  # ProSparse, MiniCPM-S; with a threshold of 0 only
}
"""``hidden_act`` (or ``hidden_activation``) of config.json, or ``{arch}.hidden_activation`` of a GGUF file,
to the activations of gate and up."""


def attention(
    c: Checkpoint,
    layer: int,
    rope: Rope,
    *,
    scale: float | None = None,
    window: int | None = None,
    bias: bool | None = None,
    qk_norm: bool = False,
    post_norm: str | None = None,
) -> Attention:
    """``scale``: of the logits, ``1 / sqrt(head_dim)`` if None. ``bias``: of q, k and v, None where it is up to
    the file. ``post_norm``: role of the norm on the block's output. Raises as ``Checkpoint.heads_of`` does."""
    heads, kv_heads = c.heads_of(layer)
    return Attention(
        norm=c.norm("attn_norm", layer),
        q=c.linear("attn_q", layer, bias=bias),
        k=c.linear("attn_k", layer, bias=bias),
        v=c.linear("attn_v", layer, bias=bias),
        out=c.linear("attn_output", layer, bias=None),
        n_heads=heads,
        n_kv_heads=kv_heads,
        head_dim=c.head_dim,
        scale=1 / math.sqrt(c.head_dim) if scale is None else scale,
        rope=rope,
        window=window,
        softcap=c.optional_number("attn_logit_softcapping", "attn_logit_softcapping"),
        q_norm=c.norm("attn_q_norm", layer) if qk_norm else None,
        k_norm=c.norm("attn_k_norm", layer) if qk_norm else None,
        post_norm=c.norm(post_norm, layer) if post_norm else None,
    )


def activation_name(c: Checkpoint, key: str = "hidden_act", default: str = "silu") -> str:
    """A key of ``ACTIVATIONS``. ``key``: where config.json names it."""
    name = c.text("hidden_activation", key) or default
    if name not in ACTIVATIONS:
        raise c.unsupported(
            "hidden_activation", key, f"activation {printable(repr(name))} (known: {', '.join(ACTIVATIONS)})"
        )
    if name == "fatrelu" and c.value(None, "hidden_act_param"):
        raise c.unsupported(None, "hidden_act_param", "a FATReLU threshold other than 0")
    return name


def feed_forward(
    c: Checkpoint,
    layer: int,
    activation: str,
    *,
    post_norm: str | None = None,
    gated: bool | None = None,
) -> FeedForward:
    """``activation``: a key of ``ACTIVATIONS``. ``gated``: None where it is up to the file: a model whose first layer
    has no gate tensor has the plain ``down(activation(up(x)))``. Raises as ``Checkpoint.hidden_of`` does."""
    gate_activation, up_activation = ACTIVATIONS[activation]
    if gated is None:
        gated = c.has("ffn_gate", 0) or up_activation is not None
    return FeedForward(
        norm=c.norm("ffn_norm", layer),
        gate=c.linear("ffn_gate", layer, bias=None) if gated else None,
        up=c.linear("ffn_up", layer, bias=None),
        down=c.linear("ffn_down", layer, bias=None),
        hidden=c.hidden_of(layer),
        activation=gate_activation,
        up_activation=up_activation,
        post_norm=c.norm(post_norm, layer) if post_norm else None,
    )


def model(
    c: Checkpoint, layers: Iterable[Layer], *, tied: bool = False, embedding_scale: float = 1.0
) -> ModelDescription:
    """``tied``: whether config.json means tied embeddings where it says nothing."""
    embedding = c.tensor("token_embd")
    name = c.file.metadata.get("general.name" if c.gguf else "_name_or_path")
    return ModelDescription(
        architecture=c.architecture,
        name=name if isinstance(name, str) and name else c.file.path.stem,
        dim=c.dim,
        vocab_size=_vocab_size(c, embedding),
        context_length=c.trained_context,
        embedding=embedding,
        layers=tuple(layers),
        final_norm=c.norm("output_norm"),
        head=c.head(tied=tied),
        embedding_scale=embedding_scale,
        logit_softcap=c.optional_number("final_logit_softcapping", "final_logit_softcapping"),
    )


def _vocab_size(c: Checkpoint, embedding: str) -> int:
    """The rows of the embedding. The key ``vocab_size`` is often stale (tokens were added, rows were padded), and
    nothing is computed with it."""
    found = c.file.tensors.get(embedding)
    if found is None or len(found.shape) != 2:
        raise ModelFormatError(
            c.file.path, f"tensor {embedding}", "missing, or no matrix: it embeds the tokens"
        )
    return found.shape[0]
