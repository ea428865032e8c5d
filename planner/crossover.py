"""How many of a block's neurons must rest so that computing the others one by one takes less time than whole matrices.

A neuron by itself costs more than its part of a matrix: its row and its column are gathered from a page of their own,
and the products of 16 rows are not made side by side. Both ways are measured here with a block's own shapes and types.
"""

from __future__ import annotations

import threading
import time

import numpy as np

from pi2rt.cython_kernels import block_work, native
from pi2rt.formats.neuron_bundles import NeuronBundles

EVERY = 2
"""Of so many neurons one fires in what is measured: near the crossovers there are. Far below, groups of 32 neurons have
fewer that fire, and each costs a little more."""

WEIGHTS_BYTES = 128 << 20
"""Weights that pass by in one measurement: more than caches keep, as a model's are."""

REPEATS = 5


def crossover(
    up_type: str | None,
    down_type: str,
    dim: int,
    bundles: NeuronBundles,
    threads: int,
    kernels: str | None = None,
) -> float:
    """The share of a block's neurons that fire, above which whole matrices of up and down take less time, from memory.

    Args:
        up_type: of the matrix up; None where there is none in bundles.
        down_type: of the matrix down.
        dim: the model's width.
        bundles: how its neurons lie.
        threads: that compute at once, as a runtime's do.
        kernels: name of a variant; None for the best.
    """
    whole = _seconds(up_type, down_type, dim, bundles, 0, threads, kernels)
    return EVERY**-1 * whole / _seconds(up_type, down_type, dim, bundles, EVERY, threads, kernels)


def _seconds(
    up_type: str | None,
    down_type: str,
    dim: int,
    bundles: NeuronBundles,
    every: int,
    threads: int,
    kernels: str | None,
) -> float:
    """The least of some repetitions, for one block."""
    block = block_work.BlockWork(up_type, down_type, dim, bundles.neurons, bundles.layout, every, kernels)
    copies = max(1, WEIGHTS_BYTES // threads // block.nbytes)
    begin, end = threading.Barrier(threads + 1), threading.Barrier(threads + 1)
    memories = [native.Memory(copies * block.nbytes) for _ in range(threads)]

    def work(memory: native.Memory) -> None:
        # 1/16 as float16 in every place of a scale, and bytes that are neither 0 nor 255 as quants
        memory.view().view(np.uint16)[:] = np.float16(1 / 16).view(np.uint16)
        for _ in range(REPEATS):
            begin.wait()
            block.compute(memory, copies)
            end.wait()

    workers = [threading.Thread(target=work, args=(memory,), name="pi2rt crossover") for memory in memories]
    try:
        for each in workers:
            each.start()
        best = float("inf")
        for _ in range(REPEATS):
            begin.wait()
            start = time.perf_counter()
            end.wait()
            best = min(best, time.perf_counter() - start)
    finally:
        for each in workers:
            each.join()
        for memory in memories:
            memory.close()
    return best / copies / threads
