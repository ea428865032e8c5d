"""The law of decode: the least time that a step can take, of what it used and what the device gives.

A step computes with weights, which pass through memory once, and of models larger than memory it reads some of
them from flash first: whole matrices in order, at the bandwidth of large reads, and single neurons, at so many
reads per second. Reading and computing may overlap, so the longer of the two is the bound. ``efficiency`` of a
measurement is bound over measured."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeAlias

from pi2rt.cython_kernels.flash.reader import measure
from pi2rt.runtime.executor_statistics import StepUse
from pi2rt.runtime.flash_reads import FlashReads

Backend: TypeAlias = Literal["auto", "uring", "preadv"]

STREAM_READ_BYTES, STREAM_DEPTH = FlashReads().stream_bytes, FlashReads().stream_depth


@dataclass(frozen=True, slots=True)
class DecodeUse:
    """What decode steps took, each: means, and of what varies the 99th percentile. Bytes and pages as in
    ``StepUse`` and ``NeuronUse``; zeros where no neurons are read one by one. ``needed_reads``: reads of neurons
    without the share that was foreseen in vain."""

    steps: int
    weight_bytes: float
    streamed_bytes: float
    misses_mean: float
    misses_p99: float
    missed_bytes_mean: float
    missed_bytes_p99: float
    miss_share: float
    reads_mean: float
    reads_p99: float
    read_bytes_mean: float
    needed_reads: float
    read_through_mean: float = 0.0
    read_through_bytes_mean: float = 0.0

    @classmethod
    def of(cls, steps: Sequence[StepUse]) -> Self:
        """Raises ValueError where there are none."""
        if not steps:
            raise ValueError("a mean over no steps")
        neurons = [step.neurons for step in steps if step.neurons is not None]
        misses = [use.missed for use in neurons] or [0]
        missed_bytes = [use.missed_bytes for use in neurons] or [0]
        reads = [use.reads for use in neurons] or [0]
        read_bytes = sum(use.read_bytes for use in neurons)
        wanted = read_bytes - sum(use.read_through_bytes for use in neurons)
        needed = min(1.0, sum(missed_bytes) / wanted) if wanted > 0 else 0.0
        return cls(
            len(steps),
            _mean([step.weight_bytes for step in steps]),
            _mean([step.streamed_bytes for step in steps]),
            _mean(misses),
            percentile(misses, 0.99),
            _mean(missed_bytes),
            percentile(missed_bytes, 0.99),
            sum(misses) / max(1, sum(use.asked for use in neurons)),
            _mean(reads),
            percentile(reads, 0.99),
            read_bytes / max(1, len(neurons)),
            _mean(reads) * needed,
            _mean([use.read_through for use in neurons] or [0]),
            _mean([use.read_through_bytes for use in neurons] or [0]),
        )


@dataclass(frozen=True, slots=True)
class Rates:
    """Of a device, per second. ``memory``: bytes; ``flash``: bytes of large reads in order, ``flash_reads``:
    reads of a page of neurons, both 0 where they were not measured."""

    memory: float
    flash: float = 0.0
    flash_reads: float = 0.0


def measure_flash(
    path: str | os.PathLike[str], use: DecodeUse, *, page_bytes: int, depth: int, io: Backend, seconds: float
) -> tuple[float, float]:
    """(``Rates.flash``, ``Rates.flash_reads``) of the device that a pack lies on, each only where decode used it.

    Blocks for ``seconds`` each. ``page_bytes``, ``depth``: of the reads of neurons.

    Raises:
        OSError: the pack cannot be read.
    """
    flash = reads = 0.0
    if use.streamed_bytes:
        flash = measure(os.fspath(path), STREAM_READ_BYTES, STREAM_DEPTH, seconds, io, "sequential")
    if use.reads_mean:
        reads = measure(os.fspath(path), page_bytes, depth, seconds, io) / page_bytes
    return flash, reads


def bound_s(use: DecodeUse, rates: Rates) -> float:
    """Seconds that a step takes at least."""
    flash = use.streamed_bytes / rates.flash if use.streamed_bytes else 0.0
    flash += use.needed_reads / rates.flash_reads if use.needed_reads else 0.0
    return max(use.weight_bytes / rates.memory, flash)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that at least this share of them does not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
