"""How much memory a model will take, estimated before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pi2rt._errors import MemoryBudgetError
from pi2rt.formats import ModelFile
from pi2rt.memory.state_layout import KvType, StateLayout
from pi2rt.models import Attention, MixtureOfExperts, ModelDescription, feed_forwards
from pi2rt.models.tensors import iterate_tensors

MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes: ``weights`` as they lie in memory, ``page`` for one page of KV cache, ``activations`` for the
    largest step. What the interpreter and its libraries take is not part of it."""

    weights: int
    page: int
    activations: int

    def pages(self, available: int, needed: int, wanted: int) -> int:
        """How many pages to make: ``wanted``, or as many as fit into half of what ``available`` bytes leave
        (pages that nobody uses are never touched), but at least ``needed``.

        Raises:
            MemoryBudgetError: not even the needed ones fit.
        """
        total = self.weights + self.activations + needed * self.page
        if total > available:
            raise MemoryBudgetError(
                f"the model needs {_mib(total)} and {_mib(available)} are available, "
                f"{_mib(total - available)} too few: weights {_mib(self.weights)}, "
                f"KV cache of one context {_mib(needed * self.page)}, activations "
                f"{_mib(self.activations)}; take a smaller context, kv_type='q8' or a smaller model, or free "
                f"memory; a pack (pi2rt convert) may be larger than memory"
            )
        room = (available - self.weights - self.activations) // 2 // max(1, self.page)
        return max(needed, min(wanted, room))


def estimate_need(
    file: ModelFile,
    model: ModelDescription,
    *,
    max_tokens: int,
    slots: int,
    kv_type: KvType,
    exact_floats: bool,
    threads: int,
) -> MemoryNeed:
    """Estimates from shapes and the file's table of tensors; reads none of them.

    Args:
        max_tokens: tokens in the largest step.
        slots: sequences at once, each of which has its logits.
        kv_type: of the pages that the executor borrows.
        exact_floats: weights are float32, whatever the file has.
        threads: that compute.
    """
    names = {name: math.prod(shape) for name, shape in iterate_tensors(model)}
    weights = sum(4 * size if exact_floats else file.tensors[name].nbytes for name, size in names.items())
    if not exact_floats:
        weights += sum(bundles.nbytes for bundles in file.bundles.values())
    activations = _activations(file, model, max_tokens, slots, threads)
    return MemoryNeed(weights, StateLayout.of(model, kv_type).page_bytes, activations)


def _activations(file: ModelFile, model: ModelDescription, rows: int, slots: int, threads: int) -> int:
    """Bytes that the CPU executor takes for steps of so many tokens (``cython_kernels/plane/program.c``), and for what
    sampling knows of each sequence."""
    dim, vocab = model.dim, model.vocab_size
    columns = attention = hidden = heads = head_dim = experts = used = halves = blocks = 0
    sparse, whole_downs = False, [0]
    for layer in model.layers:
        for block in layer.blocks:
            blocks += 1
            if isinstance(block, Attention):
                heads, head_dim = max(heads, block.n_heads), max(head_dim, block.head_dim)
                attention = max(attention, block.n_heads * block.head_dim)
                columns = max(columns, (block.n_heads + 2 * block.n_kv_heads) * block.head_dim)
                halves = max(halves, block.head_dim)
            elif isinstance(block, MixtureOfExperts):
                experts = max(experts, block.n_experts + (block.shared is not None))
                used = max(used, block.n_used + (block.shared is not None))
            for each in feed_forwards(block):
                hidden = max(hidden, each.hidden)
                if each.down.weight in file.bundles:
                    sparse = True
                else:
                    whole_downs.append(each.hidden)
    columns, prepared = max(columns, dim), max(attention, dim)
    each_row = 4 * (dim + columns + attention + hidden + prepared) + 8 * halves
    each_row += _quantized(prepared) + _quantized(attention, words_alone=True) + _quantized(hidden)
    each_row += 8 * (experts + used) + 8 * _RUNS * 4
    longest = max(prepared, *whole_downs)
    each_thread = _REPLICATED * (_quantized(longest) + 4 * longest)
    each_thread += _TILE + 64 * (4 * head_dim + 256 + 8 * (head_dim + 2)) + 8 * vocab
    if sparse:
        each_row += 2 * hidden + 4 * (dim + 128)
        each_thread += _REPLICATED * (_quantized(dim) + 8 * dim) + 4 * (dim + 512)
        each_thread += _REPLICATED * (6 * hidden + 4 * (dim + 128)) // threads + 24 * hidden // threads
    sequence = 4 * vocab + 4 * heads * (head_dim + 16) * max(4, model.context_length // 512 + 1)
    operations = 5 * blocks + 8 * blocks * experts
    runs = _RUNS * operations * (16 + 24 * threads)
    return rows * each_row + threads * each_thread + slots * sequence + runs + _LOGITS * 4 * vocab


_REPLICATED, _RUNS, _LOGITS = 4, 8, 32
_TILE = 2 * 32 * (256 + 16) * 4
"""As in ``cython_kernels/plane/program.h``: rows that every thread prepares by itself, steps in flight, rows of logits
at once, and bytes of the tiles of a thread."""


def _quantized(columns: int, *, words_alone: bool = False) -> int:
    """Bytes of a row of quantised activations: words, high and low bytes, and of each 32 a scale, a sum, halves."""
    return (2 if words_alone else 4) * columns + 12 * columns // 32 + 3 * 128


def _mib(size: int) -> str:
    return f"{size / MiB:.1f} MiB"
