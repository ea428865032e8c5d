"""How many of a block's neurons must be inactive so that computing the others one by one takes less time than whole
matrices.

A neuron by itself costs more than its part of a matrix: its row and its column are gathered from a page of their own,
and the products of 16 rows are not made side by side. Both ways are measured here with a block's own shapes and types.
"""

from __future__ import annotations

import threading
import time

import numpy as np
import numpy.typing as npt

from pi2rt.cython_kernels.kernels import native
from pi2rt.cython_kernels.kernels.block_work import BlockWork
from pi2rt.formats.neuron_bundles import NeuronBundles

EVERY = 2
"""Of so many neurons one is active in what is measured: near the crossovers there are. Far below, groups of 32 neurons
have fewer that are active, and each costs a little more."""

WEIGHTS_BYTES = 128 << 20
"""Weights that pass by in one measurement: more than caches keep, as a model's are."""

REPEATS = 24
"""Both ways in turn, and the median of what one takes over the other: what disturbs a machine disturbs both."""


def crossover(
    up_type: str | None,
    down_type: str,
    dim: int,
    bundles: NeuronBundles,
    threads: int,
    kernels: str | None = None,
) -> float:
    """The share of a block's active neurons above which whole matrices of up and down take less time, from memory.

    Args:
        up_type: of the matrix up; None where there is none in bundles.
        down_type: of the matrix down.
        dim: the model's width.
        bundles: how its neurons lie.
        threads: that compute at once, as a runtime's do.
        kernels: name of a variant; None for the best.
    """
    whole, neurons = (
        BlockWork(up_type, down_type, dim, bundles.neurons, bundles.layout, every, kernels)
        for every in (0, EVERY)
    )
    seconds = _seconds((whole, neurons), threads)
    return float(np.median(seconds[:, 0] / seconds[:, 1])) / EVERY


def neurons_seconds(
    up_type: str | None,
    down_type: str,
    dim: int,
    bundles: NeuronBundles,
    threads: int,
    kernels: str | None = None,
) -> float:
    """Seconds of up and down of one block by all threads together, one row, all neurons active. Arguments as
    ``crossover``."""
    work = BlockWork(up_type, down_type, dim, bundles.neurons, bundles.layout, 1, kernels)
    return float(np.median(_seconds((work,), threads)))


def _seconds(works: tuple[BlockWork, ...], threads: int) -> npt.NDArray[np.float64]:
    """Of one block's work each, by so many threads at once: (REPEATS, works)."""
    copies = [max(1, WEIGHTS_BYTES // threads // work.nbytes) for work in works]
    size = max(count * work.nbytes for count, work in zip(copies, works, strict=True))
    begin, end = threading.Barrier(threads + 1), threading.Barrier(threads + 1)
    memories = [native.Memory(size) for _ in range(threads)]

    def compute(memory: native.Memory) -> None:
        # 1/16 as float16 in every place of a scale, and bytes that are neither 0 nor 255 as quants
        memory.view().view(np.uint16)[:] = np.float16(1 / 16).view(np.uint16)
        for _ in range(REPEATS):
            for count, work in zip(copies, works, strict=True):
                begin.wait()
                work.compute(memory, count)
                end.wait()

    seconds = np.empty((REPEATS, len(works)))
    workers = [
        threading.Thread(target=compute, args=(memory,), name="pi2rt crossover") for memory in memories
    ]
    try:
        for each in workers:
            each.start()
        for row in seconds:
            for i, count in enumerate(copies):
                begin.wait()
                start = time.perf_counter()
                end.wait()
                row[i] = (time.perf_counter() - start) / count / threads
    finally:
        for each in workers:
            each.join()
        for memory in memories:
            memory.close()
    return seconds
