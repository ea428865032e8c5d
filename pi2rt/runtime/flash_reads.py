"""How much is read from flash at once, by what for."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class FlashReads:
    """Reads in flight at most (``depth``), and bytes of one where they are not given by what is read. The defaults are
    those of the reference machine; the planner chooses others from a measured curve (``measured``).

    ``stream``: of matrices that are read in order, which are cut into pieces of ``stream_bytes``; there more in
    flight are faster, and more than 32 take more of the ring than they gain. ``neuron``: of pages
    of neurons; these are small, and the thread that reaps them shares its core with one that computes (there 64
    give 48,000 reads/s and 128 give 56,000); one read runs through gaps between them of ``neuron_gap`` bytes at most,
    whole pages of 4096. ``cluster``: of the experts' pages, of about a megabyte.
    """

    stream_bytes: int = 1 << 20
    stream_depth: int = 32
    neuron_depth: int = 128
    cluster_depth: int = 8
    neuron_gap: int = 0
    measured: bool = False
