"""Which tensors a description names, and of which shapes."""

from __future__ import annotations

from collections.abc import Iterator

from pi2rt.models.description import (
    Attention,
    Block,
    FeedForward,
    Linear,
    MixtureOfExperts,
    ModelDescription,
    Norm,
)

Shape = tuple[int, ...]


def iterate_tensors(model: ModelDescription) -> Iterator[tuple[str, Shape]]:
    """Name and shape (numpy's: rows first) of every tensor that an executor reads, in the order of their use;
    the head of a tied model is not named again."""
    yield model.embedding, (model.vocab_size, model.dim)
    for layer in model.layers:
        for block in layer.blocks:
            yield from block_tensors(block, model.dim)
    yield from _norm(model.final_norm, model.dim)
    if model.head.weight != model.embedding:
        yield from _linear(model.head, model.vocab_size, model.dim)


def block_tensors(block: Block, dim: int) -> Iterator[tuple[str, Shape]]:
    """As ``iterate_tensors``, for one block of a model of width ``dim``."""
    yield from _norm(block.norm, dim)
    if isinstance(block, Attention):
        heads, kv_heads = block.n_heads * block.head_dim, block.n_kv_heads * block.head_dim
        yield from _linear(block.q, heads, dim)
        yield from _linear(block.k, kv_heads, dim)
        yield from _linear(block.v, kv_heads, dim)
        yield from _norm(block.q_norm, block.head_dim)
        yield from _norm(block.k_norm, block.head_dim)
        yield from _linear(block.out, dim, heads)
    elif isinstance(block, FeedForward):
        yield from _linear(block.gate, block.hidden, dim)
        yield from _linear(block.up, block.hidden, dim)
        yield from _linear(block.down, dim, block.hidden)
    else:
        yield from _mixture(block, dim)
    yield from _norm(block.post_norm, dim)


def _mixture(block: MixtureOfExperts, dim: int) -> Iterator[tuple[str, Shape]]:
    yield from _linear(block.router, block.n_experts, dim)
    for expert in range(block.n_experts):
        gate = None if block.gate is None else block.gate[expert]
        yield from _linear(gate, block.hidden, dim)
        yield from _linear(block.up[expert], block.hidden, dim)
        yield from _linear(block.down[expert], dim, block.hidden)
    if block.shared is not None:
        yield block.shared.router, block.shared.router_shape
        yield from _linear(block.shared.gate, block.shared.hidden, dim)
        yield from _linear(block.shared.up, block.shared.hidden, dim)
        yield from _linear(block.shared.down, dim, block.shared.hidden)


def _linear(linear: Linear | None, outputs: int, inputs: int) -> Iterator[tuple[str, Shape]]:
    if linear is not None:
        yield linear.weight, (outputs, inputs)
        if linear.bias is not None:
            yield linear.bias, (outputs,)


def _norm(norm: Norm | None, dim: int) -> Iterator[tuple[str, Shape]]:
    if norm is not None:
        yield norm.weight, (dim,)
