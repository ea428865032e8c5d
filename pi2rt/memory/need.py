"""How much memory a model will take, estimated before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pi2rt._errors import MemoryBudgetError
from pi2rt.formats import ModelFile
from pi2rt.models import Attention, FeedForward, MixtureOfExperts, ModelDescription
from pi2rt.models.tensors import iterate_tensors

KV_BYTES = {"f16": 2.0, "q8": 1.0 + 2 / 32}
"""Bytes of one element of the KV cache; q8 has a half-precision scale for 32 elements."""

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
    page_tokens: int,
    max_tokens: int,
    slots: int,
    kv_type: str,
    exact_floats: bool,
) -> MemoryNeed:
    """Estimates from shapes and the file's table of tensors; reads none of them.

    Args:
        page_tokens: positions in one page.
        max_tokens: tokens in the largest step.
        slots: sequences at once, each of which has its logits.
        kv_type: a key of ``KV_BYTES``.
        exact_floats: weights are float32, whatever the file has.
    """
    names = {name: math.prod(shape) for name, shape in iterate_tensors(model)}
    weights = sum(4 * size if exact_floats else file.tensors[name].nbytes for name, size in names.items())
    if not exact_floats:
        weights += sum(bundles.nbytes for bundles in file.bundles.values())
    row = widest = 0
    for layer in model.layers:
        for block in layer.blocks:
            if isinstance(block, Attention):
                row += 2 * block.n_kv_heads * block.head_dim
                widest = max(widest, (2 * block.n_heads + 2 * block.n_kv_heads) * block.head_dim)
            elif isinstance(block, MixtureOfExperts):
                # All tokens may choose the same expert: their inputs, its neurons and outputs; and who chose whom.
                neurons = max(block.hidden, 0 if block.shared is None else block.shared.hidden)
                widest = max(widest, 5 * neurons // 2 + 2 * model.dim + 2 * (block.n_experts + block.n_used))
            elif isinstance(block, FeedForward):
                sparse = block.down.weight in file.bundles  # lists of who fires, and sums of down
                widest = max(widest, 5 * block.hidden // 2 + sparse * (block.hidden // 2 + model.dim))
    activations = 4 * (max_tokens * (5 * model.dim + widest) + 2 * slots * model.vocab_size)
    return MemoryNeed(weights, math.ceil(row * page_tokens * KV_BYTES[kv_type]), activations)


def _mib(size: int) -> str:
    return f"{size / MiB:.1f} MiB"
