"""What each kind of block becomes in a program.

A new kind is a function like these, in a file of its own, and a line in ``BLOCKS``. They use public names of the
builder alone. The operations and their arguments are in ``cython_kernels/plane/operations.pyx``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pi2rt._errors import UnsupportedModelError
from pi2rt.models import Attention, Block, FeedForward, Linear, MixtureOfExperts

if TYPE_CHECKING:  # which goes through BLOCKS
    from pi2rt.executors.cpu.program_builder import ProgramBuilder


def attention(builder: ProgramBuilder, block: Attention, layer: int, number: int) -> None:
    p = builder.program
    group = block.n_heads // block.n_kv_heads
    if group > 128:
        raise UnsupportedModelError(
            builder.file.path,
            "attention",
            f"{group} query heads for each KV head; at most 128 are supported",
        )
    # The output is quantised where it is made, if its int8 blocks lie within one KV head's share of it.
    # Which blocks of a row are fine depends on all of it.
    mixed = builder.is_mixed(block.out)
    q8 = not mixed and not builder.is_float(block.out) and group * block.head_dim % 32 == 0
    p.linear(
        layer,
        builder.norm(block.norm),
        "x",
        "y",
        [builder.matrix(m) for m in (block.q, block.k, block.v)],
        mixed=builder.is_mixed(block.q, block.k, block.v),
    )
    p.attention(
        layer,
        n_heads=block.n_heads,
        n_kv_heads=block.n_kv_heads,
        head_dim=block.head_dim,
        window=block.window or 0,
        scale=block.scale,
        softcap=block.softcap or 0.0,
        rope=builder.rope(block.rope),
        q_norm=builder.norm(block.q_norm),
        k_norm=builder.norm(block.k_norm),
        **builder.keys_and_values(layer, number),
        q8_out=q8,
    )
    sink = "x" if block.post_norm is None else "y"
    p.linear(layer, None, "attention", sink, [builder.matrix(block.out)], q8_in=q8, mixed=mixed)
    builder.end_block(layer, block.post_norm)


def feed_forward(builder: ProgramBuilder, block: FeedForward, layer: int, number: int) -> None:
    builder.feed_forward(layer, block)
    builder.end_block(layer, block.post_norm)


def mixture(builder: ProgramBuilder, block: MixtureOfExperts, layer: int, number: int) -> None:
    p, shared = builder.program, block.shared_expert()
    routers = [builder.matrix(block.router)]
    if block.shared is not None:
        routers.append(builder.matrix(Linear(block.shared.router)))
    p.linear(layer, builder.norm(block.norm), "x", "y", routers)
    p.route(
        layer,
        n_experts=block.n_experts,
        n_used=block.n_used,
        normalized=block.normalized,
        shared=shared is not None,
    )
    for expert in range(block.n_experts):
        builder.feed_forward(layer, block.expert(expert), expert)
    if shared is not None:
        builder.feed_forward(layer, shared, block.n_experts)
    p.add(layer, builder.norm(block.post_norm))  # from y: where the experts' outputs were mixed


BLOCKS: dict[type[Block], Callable[[ProgramBuilder, Any, int, int], None]] = {
    Attention: attention,
    FeedForward: feed_forward,
    MixtureOfExperts: mixture,
}
"""What appends the operations of each kind of block: of the builder, the block, its layer and its number there."""
