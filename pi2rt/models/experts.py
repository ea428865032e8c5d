"""Mixtures of experts put together from a file's tensors.

Every expert has matrices of its own: Hugging Face checkpoints name them so, and of GGUF files, which stack them, the
reader takes the stacks apart (``pi2rt.formats.stacked_experts``).
"""

from __future__ import annotations

import numpy as np

from pi2rt._errors import ModelFormatError
from pi2rt.formats.model_file import printable
from pi2rt.formats.stacked_experts import MAX_EXPERTS
from pi2rt.models.blocks import MixtureOfExperts, SharedExpert
from pi2rt.models.checkpoint import Checkpoint
from pi2rt.models.decoder import ACTIVATIONS
from pi2rt.models.parts import Linear


def mixture(
    c: Checkpoint,
    layer: int,
    activation: str,
    *,
    count: int,
    hidden: int | None = None,
    normalized: bool = True,
    shared: SharedExpert | None = None,
) -> MixtureOfExperts:
    """A gated mixture without biases.

    Args:
        c: its ``huggingface_names`` name the router (``ffn_gate_inp``) and, with ``{}`` for the number of the expert,
            the matrices (``ffn_gate_exps``, ``ffn_up_exps``, ``ffn_down_exps``).
        layer: number of the layer.
        activation: a key of ``ACTIVATIONS``.
        count: of experts; see ``expert_count``.
        hidden: neurons of each expert; None: as many as ``c.hidden_of(layer)``.
        normalized: see ``MixtureOfExperts``.
        shared: the shared expert.

    Raises:
        ModelFormatError: more experts are used than there are, or the last one is not there.
        UnsupportedModelError: the router chooses in a way that pi2rt does not have.
    """
    _check_router(c)
    gate_activation, up_activation = ACTIVATIONS[activation]
    return MixtureOfExperts(
        norm=c.norm("ffn_norm", layer),
        router=c.linear("ffn_gate_inp", layer),
        gate=_linear(c, "ffn_gate", layer, count),
        up=_linear(c, "ffn_up", layer, count),
        down=_linear(c, "ffn_down", layer, count),
        hidden=c.hidden_of(layer) if hidden is None else hidden,
        n_experts=count,
        n_used=n_used(c, count),
        normalized=normalized,
        activation=gate_activation,
        up_activation=up_activation,
        shared=shared,
    )


def expert_count(c: Checkpoint, default: int) -> int:
    """``default``: where config.json does not say. Transformers calls the number either way, whatever the family."""
    local = c.value(None, "num_local_experts") is not None
    key = "num_local_experts" if local else "num_experts"
    return c.integer("expert_count", key, default=None if c.gguf else default, high=MAX_EXPERTS)


def n_used(c: Checkpoint, experts: int = MAX_EXPERTS) -> int:
    """How many of so many experts each token uses."""
    return c.integer("expert_used_count", "num_experts_per_tok", high=experts)


def shared_expert(c: Checkpoint, layer: int, hidden: int) -> SharedExpert:
    """``hidden``: its neurons."""
    router = c.tensor("ffn_gate_inp_shexp", layer)
    found = c.file.tensors.get(router)
    flat = c.gguf if found is None else len(found.shape) == 1
    return SharedExpert(
        gate=c.linear("ffn_gate_shexp", layer),
        up=c.linear("ffn_up_shexp", layer),
        down=c.linear("ffn_down_shexp", layer),
        hidden=hidden,
        router=router,
        router_shape=(c.dim,) if flat else (1, c.dim),
    )


def normalizes(c: Checkpoint, huggingface: str, default: bool) -> bool:
    """Whether the weights of the chosen experts sum to 1. ``default``: where the file does not say."""
    value = c.value("expert_weights_norm", huggingface)
    if value is None:
        return default
    if not isinstance(value, (bool, np.bool_)):
        problem = f"{printable(repr(value))} is neither true nor false"
        raise c.error("expert_weights_norm", huggingface, problem)
    return bool(value)


def _linear(c: Checkpoint, role: str, layer: int, experts: int) -> tuple[Linear, ...]:
    each = c.tensor(f"{role}.{{}}" if c.gguf else f"{role}_exps", layer)
    last = each.replace("{}", str(experts - 1))
    if last not in c.file.tensors:  # before as many names are made as a file may say there are
        raise ModelFormatError(c.file.path, f"tensor {last}", f"missing; {experts} experts expected")
    return tuple(Linear(each.replace("{}", str(expert))) for expert in range(experts))


def _check_router(c: Checkpoint) -> None:
    gating = c.integer("expert_gating_func", None, default=1, low=0)
    if gating > 1:  # 0 stands for whatever the architecture has
        raise c.unsupported(
            "expert_gating_func", None, f"gating function {gating} (anything but softmax, which is 1)"
        )
    scale = c.optional_number("expert_weights_scale", None)
    if scale not in (None, 1.0):
        raise c.unsupported("expert_weights_scale", None, f"scaling the experts' weights by {scale:g}")
