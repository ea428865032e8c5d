"""What the CPU executor takes: weights as they are in the file, and buffers for activations.

The buffers are those of ``cython_kernels/plane/program.c``. A test holds this against what a program allocates.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

from pi2rt.formats import ModelFile
from pi2rt.host.topology import own_cores
from pi2rt.memory import MemoryNeed, StateLayout, weight_bytes
from pi2rt.memory.state_layout import KvType
from pi2rt.models import Attention, Block, FeedForward, MixtureOfExperts, ModelDescription
from pi2rt.runtime.executor import ExecutorOptions


@dataclass(slots=True)
class Widths:
    """The largest of any block. ``columns``: of what is computed of the stream together; ``attention``: of all heads'
    outputs; ``experts``, ``used``: of a mixture, the shared one among them."""

    columns: int = 0
    attention: int = 0
    heads: int = 0
    head_dim: int = 0
    experts: int = 0
    used: int = 0

    def widen(self, other: Widths) -> None:
        for field in fields(self):
            setattr(self, field.name, max(getattr(self, field.name), getattr(other, field.name)))


def _attention(block: Attention) -> Widths:
    return Widths(
        columns=(block.n_heads + 2 * block.n_kv_heads) * block.head_dim,
        attention=block.n_heads * block.head_dim,
        heads=block.n_heads,
        head_dim=block.head_dim,
    )


def _mixture(block: MixtureOfExperts) -> Widths:
    shared = block.shared is not None
    return Widths(experts=block.n_experts + shared, used=block.n_used + shared)


WIDTHS: dict[type[Block], Callable[[Any], Widths]] = {
    Attention: _attention,
    FeedForward: lambda block: Widths(),
    MixtureOfExperts: _mixture,
}
"""What each kind of block needs beside the neurons of its feed-forward blocks."""


def cpu_need(
    file: ModelFile, model: ModelDescription, options: ExecutorOptions, page_type: KvType
) -> MemoryNeed:
    """Reads none of the tensors. ``page_type``: of the KV pages."""
    threads = len(options.cores or own_cores()) + sum(len(cores) for _, cores in options.assistants)
    return MemoryNeed(
        weight_bytes(file, model, floats=options.exact_floats),
        StateLayout.of(model, page_type).page_bytes,
        _activations(file, model, options.max_tokens, options.slots, threads),
    )


def _activations(file: ModelFile, model: ModelDescription, rows: int, slots: int, threads: int) -> int:
    """Bytes for steps of so many tokens, and for what sampling knows of each sequence."""
    dim, vocab = model.dim, model.vocab_size
    most = Widths(columns=dim)
    blocks, hidden, sparse, whole_downs = 0, 0, False, [0]
    for layer in model.layers:
        for block in layer.blocks:
            blocks += 1
            most.widen(WIDTHS[type(block)](block))
            for each in block.feed_forwards():
                hidden = max(hidden, each.hidden)
                if each.down.weight in file.bundles:
                    sparse = True
                else:
                    whole_downs.append(each.hidden)
    attention, head_dim, prepared = most.attention, most.head_dim, max(most.attention, dim)
    each_row = 4 * (dim + most.columns + attention + hidden + prepared) + 8 * head_dim
    each_row += _quantized(prepared) + _quantized(attention, words_alone=True) + _quantized(hidden)
    each_row += 8 * (most.experts + most.used) + 8 * _RUNS * 4
    longest = max(prepared, *whole_downs)
    each_thread = _REPLICATED * (_quantized(longest) + 4 * longest)
    each_thread += _TILE + 64 * (4 * head_dim + 256 + 8 * (head_dim + 2)) + 8 * vocab
    if sparse:
        each_row += 2 * hidden + 4 * (dim + 128)
        each_thread += _REPLICATED * (_quantized(dim) + 8 * dim) + 4 * (dim + 512)
        each_thread += _REPLICATED * (6 * hidden + 4 * (dim + 128)) // threads + 24 * hidden // threads
    sequence = 4 * vocab + 4 * most.heads * (head_dim + 16) * max(4, model.context_length // 512 + 1)
    operations = 5 * blocks + 8 * blocks * most.experts
    runs = _RUNS * operations * (16 + 24 * threads)
    return rows * each_row + threads * each_thread + slots * sequence + runs + _LOGITS * 4 * vocab


_REPLICATED, _RUNS, _LOGITS = 4, 8, 32
_TILE = 2 * 32 * (256 + 16) * 4
"""As in ``cython_kernels/plane/program.h``: rows that every thread prepares by itself, steps in flight, rows of logits
at once, and bytes of the tiles of a thread."""


def _quantized(columns: int, *, words_alone: bool = False) -> int:
    """Bytes of a row of quantised activations: words, high and low bytes, and of each 32 a scale, a sum, halves."""
    return (2 if words_alone else 4) * columns + 12 * columns // 32 + 3 * 128
