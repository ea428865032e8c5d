"""Which neurons are active together, and an order of bundles in which those lie together.

What is wanted is few reads for a token. Its reads are its pages less the neighbours among them, so side by side belong
those that are active for the same tokens: an order of the largest sum of co-activations of neighbours, a Hamiltonian
path of least length as in Ripple (arXiv:2410.19274). It is found greedily, from the most frequent neuron on, within
each cluster of neurons that are asked for together (``formats/neuron_order.py``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from pi2rt.formats.calibration import Floats, Reading, Readings
from pi2rt.formats.neuron_order import CLUSTER, Order, neurons_at

Fired: TypeAlias = npt.NDArray[np.bool_]
"""(tokens, neurons)."""


class CoActivation:
    """Counts, for each two neurons of a cluster, the tokens for which both are active. Takes 1 MiB for each cluster.

    Args:
        neurons: of the block.
    """

    def __init__(self, neurons: int) -> None:
        self._counts = [
            np.zeros((size, size), np.float32)
            for size in (min(CLUSTER, neurons - at) for at in range(0, neurons, CLUSTER))
        ]

    def add(self, fired: Fired) -> None:
        for number, counts in enumerate(self._counts):
            part = fired[:, number * CLUSTER : number * CLUSTER + len(counts)].astype(np.float32)
            counts += part.T @ part

    def frequency(self) -> Floats:
        """Tokens for which each neuron is active, float32 (neurons,)."""
        return np.concatenate([np.diagonal(counts) for counts in self._counts])

    def order(self, per_page: int) -> Order:
        """Behind those that are placed always the one that is most often active together with them: with the last one,
        or, where several share a page, with those of the page that is being filled.

        Args:
            per_page: neurons of a page.
        """
        return np.concatenate([_path(counts, per_page) for counts in self._counts])


def _path(counts: Floats, per_page: int) -> Order:
    """The order of one cluster. O(n²)."""
    order = np.empty(len(counts), np.uint16)
    free = np.zeros(len(counts), np.float32)  # -inf where the neuron is placed
    last = int(np.argmax(np.diagonal(counts)))
    together = counts[last].copy()
    for place in range(len(counts)):
        if place:
            last = int(np.argmax(together + free))
            together = counts[last].copy() if place % per_page == 0 else together + counts[last]
        order[place], free[last] = last, -np.inf
    return order


def reading(
    fired: Fired,
    order: Order,
    per_page: int,
    gap_pages: int,
    *,
    present: npt.NDArray[np.bool_] | None = None,
) -> Reading:
    """What it takes to read what is active, in means over the tokens.

    Args:
        fired: of text that the order was not made from.
        order: of the bundles.
        per_page: bundles of a page.
        gap_pages: that a read runs through.
        present: bool (pages,), those that are in memory; None: none is.
    """
    wanted = by_page(fired, order, per_page)
    if present is not None:
        wanted &= ~present
    tokens = len(fired)
    return Reading(
        int(np.count_nonzero(wanted)) / tokens, _runs(wanted, 0) / tokens, _runs(wanted, gap_pages) / tokens
    )


def by_page(fired: Fired, order: Order, per_page: int) -> Fired:
    """Whether any neuron of a page is active: bool (tokens, pages)."""
    tokens, neurons = fired.shape
    placed = np.zeros((tokens, -(-neurons // per_page) * per_page), np.bool_)
    placed[:, :neurons] = fired[:, neurons_at(order)]
    return np.asarray(placed.reshape(tokens, -1, per_page).any(axis=2))


def _runs(wanted: Fired, gap: int) -> int:
    """Runs of True in all rows; those with at most ``gap`` of False between them are one."""
    apart = np.pad(wanted, ((0, 0), (0, gap + 1)))  # no run goes on in the next row
    places = np.flatnonzero(apart)
    return int(len(places) and 1 + np.count_nonzero(np.diff(places) > gap + 1))


def find_order(
    used: Sequence[Fired], held_out: Fired, own: Order, per_page: int, gap_pages: int
) -> tuple[Order | None, Readings]:
    """The order of a block, None where it saves no reads on text that it was not made from, and what it is worth.

    Args:
        used: of each text, to find the order from.
        held_out: of another text.
        own: the order that there is.
        per_page: neurons of a page.
        gap_pages: that a read runs through.
    """
    found = CoActivation(len(own))
    for fired in used:
        found.add(fired)
    order = found.order(per_page)

    def measured(of: Order, half: bool) -> Reading:
        present = None
        if half:
            often = sum(by_page(fired, of, per_page).sum(axis=0) for fired in used)
            present = np.zeros(len(often), np.bool_)
            present[np.argsort(-often, kind="stable")[: len(often) // 2]] = True
        return reading(held_out, of, per_page, gap_pages, present=present)

    readings = Readings(*(measured(of, half) for half in (False, True) for of in (own, order)))
    fewer = (
        readings.ordered.reads < readings.own.reads or readings.ordered_half.reads < readings.own_half.reads
    )
    return (order if fewer else None), readings
