"""What the device can do, measured: the other side of every law in ``docs/performance.md``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import TypeAlias

from pi2rt._errors import MemoryBudgetError
from pi2rt.host.memory import available_memory
from pi2rt.planner.placement import UnitPlacement

ReadBandwidth: TypeAlias = Callable[[int, Sequence[int]], float]
"""``read_bandwidth(bytes, cores)``: bytes/s of as many threads as cores, on these cores, which read ``bytes``
together."""

BUFFER_BYTES = 256 << 20
"""More than the last-level cache of any device in sight, so that memory is what is measured."""


@dataclass(frozen=True, slots=True)
class DeviceProfile:
    """Bytes per second. ``read_bandwidth``: all actors together; ``read_bandwidth_by_actor``: each one alone;
    ``buffer_bytes``: what they read."""

    read_bandwidth: float
    read_bandwidth_by_actor: Mapping[str, float]
    buffer_bytes: int


def measure_device(
    placement: UnitPlacement,
    *,
    buffer_bytes: int = BUFFER_BYTES,
    repeat: int = 3,
    read_bandwidth: ReadBandwidth | None = None,
) -> DeviceProfile:
    """Measures how fast the placement's cores read memory, the median of ``repeat`` runs.

    Blocks for about a tenth of a second per actor and run: from Trio, call it in a thread.

    Args:
        placement: the cores.
        buffer_bytes: how much each run reads.
        repeat: runs.
        read_bandwidth: how to measure; None for the native kernel.

    Raises:
        MemoryBudgetError: the buffer does not fit into the memory there is.
    """
    if repeat < 1 or buffer_bytes < 1:
        raise ValueError(f"repeat={repeat}, buffer_bytes={buffer_bytes}: both must be at least 1")
    free = available_memory()
    if buffer_bytes > free:
        raise MemoryBudgetError(
            f"measuring memory bandwidth needs {buffer_bytes >> 20} MiB, and only {free >> 20} MiB are free"
        )
    measure = _native_read_bandwidth if read_bandwidth is None else read_bandwidth

    def of(cores: Sequence[int]) -> float:
        return median(measure(buffer_bytes, cores) for _ in range(repeat))

    together = of([core for actor in placement.actors for core in actor.cores])
    alone = {actor.name: of(actor.cores) for actor in placement.actors} if len(placement.actors) > 1 else {}
    return DeviceProfile(together, alone or {placement.lead.name: together}, buffer_bytes)


def _native_read_bandwidth(count: int, cores: Sequence[int]) -> float:
    from pi2rt.cython_kernels.kernels.native import read_bandwidth

    try:
        before = os.sched_getaffinity(0)  # of this thread; the reading threads inherit it
        os.sched_setaffinity(0, cores)
    except (AttributeError, OSError):  # not of this system, or refused by a sandbox
        return float(read_bandwidth(count, len(cores)))
    try:
        return float(read_bandwidth(count, len(cores)))
    finally:
        os.sched_setaffinity(0, before)
