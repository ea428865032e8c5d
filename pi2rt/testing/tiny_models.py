"""The models of the conformance suite, by name: one of each kind of block that pi2rt describes.

Every one has at least four layers and 512 positions, so that what only shows in a later layer or behind a window of 70
positions shows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pi2rt.testing.tiny_model import TinyModel, write_huggingface

_WINDOW = 70  # more than a KV page

TINY_MODELS: Mapping[str, TinyModel] = MappingProxyType(
    {
        "llama": TinyModel("llama", seed=1, layers=4, context=512, contrast=True),
        "mistral": TinyModel(
            "mistral", seed=2, layers=4, context=512, contrast=True, config={"sliding_window": _WINDOW}
        ),
        "qwen2": TinyModel("qwen2", seed=3, layers=4, context=512, contrast=True),
        "qwen3": TinyModel("qwen3", seed=4, layers=4, context=512, contrast=True),
        "gemma3": TinyModel("gemma3_text", seed=5, layers=7, context=512, contrast=True),
        "mixtral": TinyModel("mixtral", seed=6, layers=4, context=512, contrast=True),
        "qwen2_moe": TinyModel("qwen2_moe", seed=7, layers=4, context=512, contrast=True),
    }
)
"""Llama: the plain blocks. Mistral: a window. Qwen2: biases. Qwen3: norms of heads. Gemma 3: windows in some layers, a
scale of the embedding, norms after blocks, GELU. Mixtral: experts. Qwen2-MoE: a shared expert too."""


_LARGE: dict[str, Any] = {"dim": 512, "hidden": 1536, "heads": 8, "kv_heads": 4, "head_dim": 64}


def tiny_model_path(folder: Path, name: str) -> Path:
    """The Hugging Face directory of one of ``TINY_MODELS`` in a folder, written where it is not there yet."""
    return _written(folder / name, TINY_MODELS[name])


def large_model_path(folder: Path, name: str) -> Path:
    """The same with wider layers: weights of about 50 MB."""
    return _written(folder / f"{name}-large", replace(TINY_MODELS[name], **_LARGE))


def unusable_model_path(folder: Path, name: str) -> Path:
    """The same with logits that are not finite where a sequence has ``UNUSABLE_TOKEN``."""
    return _written(folder / f"{name}-unusable", replace(TINY_MODELS[name], unusable=True))


def _written(directory: Path, model: TinyModel) -> Path:
    if not directory.is_dir():
        write_huggingface(directory, model)
    return directory
