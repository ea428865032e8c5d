"""Which tensors a description names, and of which shapes."""

from __future__ import annotations

from pi2rt.models.description import ModelDescription
from pi2rt.models.parts import Named


def iterate_tensors(model: ModelDescription) -> Named:
    """Name and shape (numpy's: rows first) of every tensor that an executor reads, in the order of their use;
    the head of a tied model is not named again."""
    yield model.embedding, (model.vocab_size, model.dim)
    for layer in model.layers:
        for block in layer.blocks:
            yield from block.tensors(model.dim)
    yield from model.final_norm.tensors(model.dim)
    if model.head.weight != model.embedding:
        yield from model.head.tensors(model.vocab_size, model.dim)
