"""Model descriptions: one file per architecture."""

from pi2rt.models.blocks import Attention, Block, FeedForward, MixtureOfExperts, Operation, SharedExpert
from pi2rt.models.description import Layer, ModelDescription
from pi2rt.models.load import ARCHITECTURES, describe
from pi2rt.models.parts import Activation, Linear, Norm, Rope
from pi2rt.models.states import BlockState, Fixed, FixedArray, Paged, State
from pi2rt.models.tensors import iterate_tensors

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
    "Operation",
    "Paged",
    "Rope",
    "SharedExpert",
    "State",
    "describe",
    "iterate_tensors",
]
