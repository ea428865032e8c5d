"""Model descriptions: one file per architecture."""

from pi2rt.models.description import (
    Activation,
    Attention,
    Block,
    FeedForward,
    Layer,
    Linear,
    ModelDescription,
    Norm,
    Rope,
)
from pi2rt.models.load import ARCHITECTURES, describe
from pi2rt.models.tensors import block_tensors, iterate_tensors

__all__ = [
    "ARCHITECTURES",
    "Activation",
    "Attention",
    "Block",
    "FeedForward",
    "Layer",
    "Linear",
    "ModelDescription",
    "Norm",
    "Rope",
    "block_tensors",
    "describe",
    "iterate_tensors",
]
