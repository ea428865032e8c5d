"""What a model is, without running it: hyperparameters and a list of layers.

A layer is a list of blocks (``blocks.py``). Executors read this description and nothing else, so an architecture is one
file that builds one of these (see ``llama.py``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from pi2rt.models.blocks import Block, FeedForward
from pi2rt.models.parts import Linear, Norm
from pi2rt.models.states import BlockState


@dataclass(frozen=True, slots=True)
class Layer:
    """Blocks in order; each one is ``x = x + post_norm(block(norm(x)))``."""

    blocks: tuple[Block, ...]


@dataclass(frozen=True, slots=True)
class ModelDescription:
    """A decoder-only language model. ``head.weight == embedding`` where the two are tied."""

    architecture: str
    name: str
    dim: int
    vocab_size: int
    context_length: int
    embedding: str  # tensor of shape (vocab_size, dim)
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Linear
    embedding_scale: float = 1.0
    logit_softcap: float | None = None

    def states(self) -> tuple[BlockState, ...]:
        """What the blocks keep of a sequence, in their order; those that keep nothing are left out."""
        return tuple(
            BlockState(i, j, state)
            for i, layer in enumerate(self.layers)
            for j, block in enumerate(layer.blocks)
            if (state := block.state()) is not None
        )

    def feed_forwards(self) -> Iterator[FeedForward]:
        """Every feed-forward block in order, the experts of mixtures among them."""
        for layer in self.layers:
            for block in layer.blocks:
                yield from block.feed_forwards()
