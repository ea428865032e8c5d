"""From a measured curve to what is read at once."""

from __future__ import annotations

from dataclasses import replace

from pi2rt.cython_kernels.flash.stream import MOST_DEPTH
from pi2rt.formats.row_blocks import SECTOR
from pi2rt.planner.measure.read_curve import ReadCurve
from pi2rt.runtime.flash_reads import FlashReads

STREAM_BUFFER = 32 << 20
"""Bytes in flight of a stream, at most: the ring that they go to holds the matrices that are computed, too."""

CLUSTER_BUFFER = 32 << 20
"""Bytes in flight of experts' pages, at most."""

ENOUGH = 0.97
"""Of the best rate there is: what deeper queues add beyond it is noise, and costs the thread that reaps."""


def choose_reads(curve: ReadCurve, neuron_bytes: int = SECTOR, expert_bytes: int = 1 << 20) -> FlashReads:
    """The least in flight that is as good as all, for each purpose.

    Args:
        curve: with sequential and random reads.
        neuron_bytes: of a page of neurons.
        expert_bytes: of a page of experts' rows.

    Raises:
        ValueError: the curve has no point for a purpose.
    """
    within = tuple(point for point in curve.points if point.depth <= MOST_DEPTH)
    stream = replace(curve, points=within).choose("sequential", buffer_bytes=STREAM_BUFFER)
    return FlashReads(
        stream.read_bytes,
        stream.depth,
        _least_depth(curve, neuron_bytes, None),
        _least_depth(curve, expert_bytes, CLUSTER_BUFFER),
        measured=True,
    )


def _least_depth(curve: ReadCurve, read_bytes: int, buffer_bytes: int | None) -> int:
    """Of random reads of this size."""
    depths = {point.depth for point in curve.points if point.pattern == "random"}
    possible = [each for each in sorted(depths) if buffer_bytes is None or each * read_bytes <= buffer_bytes]
    rates = {each: curve.bandwidth(read_bytes, each) for each in possible or sorted(depths)[:1]}
    enough = ENOUGH * max(rates.values(), default=0.0)
    if not rates:
        raise ValueError("random reads were not measured")
    return min(each for each, rate in rates.items() if rate >= enough)
