"""Model descriptions: one file per architecture."""

from pi2rt.models.description import (
    Activation,
    Attention,
    Block,
    FeedForward,
    Layer,
    Linear,
    MixtureOfExperts,
    ModelDescription,
    Norm,
    Rope,
    SharedExpert,
    feed_forwards,
)
from pi2rt.models.load import ARCHITECTURES, describe
from pi2rt.models.states import BlockState, Fixed, FixedArray, Paged, State
from pi2rt.models.tensors import block_tensors, iterate_tensors

__all__ = [
    "ARCHITECTURES",
    "Activation",
    "Attention",
    "Block",
    "BlockState",
    "FeedForward",
    "Fixed",
    "FixedArray",
    "Layer",
    "Linear",
    "MixtureOfExperts",
    "ModelDescription",
    "Norm",
    "Paged",
    "Rope",
    "SharedExpert",
    "State",
    "block_tensors",
    "describe",
    "feed_forwards",
    "iterate_tensors",
]
