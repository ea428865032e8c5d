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

__all__ = ["Activation", "Attention", "Block", "FeedForward", "Layer", "Linear", "ModelDescription", "Norm", "Rope"]
