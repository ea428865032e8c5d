"""From an open model file to its description, checked against the tensors that are really there."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import TypeAlias

from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.formats.model_file import ModelFile, check_type, printable
from pi2rt.models.checkpoint import layer_prefix
from pi2rt.models.description import ModelDescription
from pi2rt.models.gemma3 import describe_gemma3
from pi2rt.models.llama import describe_bamboo, describe_llama, describe_mistral
from pi2rt.models.mixtral import describe_mixtral
from pi2rt.models.qwen2 import describe_qwen2
from pi2rt.models.qwen2_moe import describe_qwen2_moe
from pi2rt.models.qwen3 import describe_qwen3
from pi2rt.models.qwen3_moe import describe_qwen3_moe
from pi2rt.models.tensors import iterate_tensors

Describe: TypeAlias = Callable[[ModelFile, int | None], ModelDescription]

ARCHITECTURES: Mapping[str, Describe] = MappingProxyType(
    {
        "llama": describe_llama,
        "mistral": describe_mistral,
        "bamboo": describe_bamboo,
        "mixtral": describe_mixtral,
        "qwen2": describe_qwen2,
        "qwen3": describe_qwen3,
        "qwen2moe": describe_qwen2_moe,
        "qwen2_moe": describe_qwen2_moe,
        "qwen3moe": describe_qwen3_moe,
        "qwen3_moe": describe_qwen3_moe,
        "gemma3": describe_gemma3,
        "gemma3_text": describe_gemma3,
    }
)
"""GGUF's ``general.architecture`` or config.json's ``model_type`` to the function that describes it."""

_UNUSED = (
    "rotary_emb.inv_freq",
    "attn_rot_embd.weight",
    "rope_freqs.weight",
)  # derived; some old files carry them


def describe(file: ModelFile, context: int | None = None) -> ModelDescription:
    """Describes the model in ``file``.

    Args:
        file: an open model file.
        context: positions per sequence that the model will be opened for; matters only to rotations that
            change with it (LongRoPE, dynamic NTK). None: all it was trained for.

    Raises:
        UnsupportedModelError: the architecture, or something in it, is not one pi2rt has.
        ModelFormatError: a hyperparameter is missing or not sane, or a tensor is missing or has the wrong
        shape.
    """
    describe_architecture = ARCHITECTURES.get(file.architecture)
    if describe_architecture is None:
        found, known = printable(repr(file.architecture)), ", ".join(sorted(ARCHITECTURES))
        raise UnsupportedModelError(
            file.path, "architecture", f"{found} is not supported; pi2rt runs {known}"
        )
    model = describe_architecture(file, context)
    _check_tensors(file, model)
    return model


def _check_tensors(file: ModelFile, model: ModelDescription) -> None:
    used = set()
    for name, shape in iterate_tensors(model):
        found = file.tensors.get(name)
        if found is None:
            raise ModelFormatError(file.path, f"tensor {name}", f"missing; shape {shape} expected")
        if found.shape != shape:
            raise ModelFormatError(file.path, f"tensor {name}", f"shape {found.shape}, {shape} expected")
        check_type(found)
        used.add(name)
    # A tensor of a layer that nothing reads means that the model computes something we do not.
    prefix = layer_prefix(file)
    for name in file.tensors:
        if name.startswith(prefix) and name not in used and not name.endswith(_UNUSED):
            raise UnsupportedModelError(
                file.path,
                f"tensor {printable(name)}",
                f"is not part of {file.architecture!r} as pi2rt knows it",
            )
