"""How much memory an executor will take for a model, said before anything is loaded."""

from __future__ import annotations

import math
from dataclasses import dataclass

from pi2rt._errors import MemoryBudgetError
from pi2rt.formats import ModelFile
from pi2rt.models import ModelDescription, iterate_tensors

MiB = 1 << 20


@dataclass(frozen=True, slots=True)
class MemoryNeed:
    """Bytes: ``weights`` as they lie in memory, ``page`` for one page of KV cache, ``activations`` for the
    largest step. ``window_page``: of a page, what blocks with a window keep beside ``page``, which has memory for some
    pages at a time only (``StateLayout.window_page_bytes``). What the interpreter and its libraries take is not part of
    it."""

    weights: int
    page: int
    activations: int
    window_page: int = 0

    def kv(self, pages: int, window_pages: int = 0) -> int:
        """Bytes of ``pages`` pages, of which ``window_pages``, at most, have memory for windowed bytes at a time."""
        return pages * self.page + min(pages, window_pages) * self.window_page

    def pages(self, available: int, needed: int, wanted: int, window_pages: int = 0) -> int:
        """How many pages to make: ``wanted``, or as many as fit into half of what ``available`` bytes leave
        (pages that nobody uses are never touched), but at least ``needed``. ``window_pages``: as for ``kv``.

        Raises:
            MemoryBudgetError: not even the needed ones fit.
        """
        kv = self.kv(needed, window_pages)
        total = self.weights + self.activations + kv
        if total > available:
            raise MemoryBudgetError(
                f"the model needs {_mib(total)} and {_mib(available)} are available, "
                f"{_mib(total - available)} too few: weights {_mib(self.weights)}, "
                f"KV cache of one context {_mib(kv)}, activations "
                f"{_mib(self.activations)}; take a smaller context, kv_type='q8' or a smaller model, or free "
                f"memory; a pack (pi2rt convert) may be larger than memory"
            )
        left = (available - self.weights - self.activations) // 2
        fit = left // max(1, self.page + self.window_page)
        if fit >= window_pages:  # further ones have no memory for windowed bytes of their own
            fit = (left - window_pages * self.window_page) // max(1, self.page)
        return max(needed, min(wanted, fit))


def weight_bytes(file: ModelFile, model: ModelDescription, *, floats: bool) -> int:
    """Of all tensors that are used, as they are in the file or (``floats``) as float32."""
    names = {name: math.prod(shape) for name, shape in iterate_tensors(model)}
    if floats:
        return sum(4 * size for size in names.values())
    stored = sum(file.tensors[name].nbytes for name in names)
    return stored + sum(bundles.nbytes for bundles in file.bundles.values())


def _mib(size: int) -> str:
    return f"{size / MiB:.1f} MiB"
