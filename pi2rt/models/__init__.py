"""Model descriptions: one file per architecture."""

from pi2rt.models.description import (
    Activation,
    Attention,
    Block,
    ExpertLinear,
    FeedForward,
    Layer,
    Linear,
    MixtureOfExperts,
    ModelDescription,
    Norm,
    Rope,
    SharedExpert,
)
from pi2rt.models.load import ARCHITECTURES, describe
from pi2rt.models.tensors import block_tensors, iterate_tensors

__all__ = [
    "ARCHITECTURES",
    "Activation",
    "Attention",
    "Block",
    "ExpertLinear",
    "FeedForward",
    "Layer",
    "Linear",
    "MixtureOfExperts",
    "ModelDescription",
    "Norm",
    "Rope",
    "SharedExpert",
    "block_tensors",
    "describe",
    "iterate_tensors",
]
