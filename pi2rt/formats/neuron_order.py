"""The order in which a pack's bundles lie, where that is not the neurons' own: side by side those that are active
together.

Only places change. A neuron keeps its number, and with it its scales, its thresholds and its turn in every sum, so an
order changes no bit of any result. A neuron stays among the ``CLUSTER`` neurons that are asked for together: only of
those can pages that lie side by side become one read, and a page serves two clusters at most, as without an order.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from pi2rt.formats.neuron_bundles import NeuronBundles

CLUSTER = 512
"""Neurons that are asked for together (``PI2_CLUSTER`` in ``cython_kernels/plane/sparse.h``)."""

Order: TypeAlias = npt.NDArray[np.uint16]
"""(neurons,): of each place the neuron that lies there, counted from the first of its cluster."""


def own_order(neurons: int) -> Order:
    """Every neuron at its own place."""
    return (np.arange(neurons) % CLUSTER).astype(np.uint16)


def bundle_order(bundles: NeuronBundles) -> Order:
    """Of a pack's bundles."""
    raw = bundles.order
    return own_order(bundles.neurons) if raw is None else decode_order(raw, bundles.neurons)


def encode_order(order: Order) -> bytes:
    """As files have it: u16, little endian."""
    return np.ascontiguousarray(order, "<u2").tobytes()


def decode_order(raw: bytes, neurons: int) -> Order:
    """The order in ``raw``, of a file that may be hostile.

    Raises:
        ValueError: it is none of so many neurons; the message says why.
    """
    if len(raw) != 2 * neurons:
        raise ValueError(f"has {len(raw)} bytes, not 2 for each of {neurons} neurons")
    order: Order = np.frombuffer(raw, "<u2").astype(np.uint16)
    whole = neurons // CLUSTER * CLUSTER
    for first, clusters in ((0, order[:whole].reshape(-1, CLUSTER)), (whole, order[None, whole:])):
        wrong = (np.sort(clusters, axis=1) != np.arange(clusters.shape[1])).any(axis=1)
        if wrong.any():
            at = first + CLUSTER * int(np.argmax(wrong))
            raise ValueError(
                f"does not have each of the neurons {at} to {min(at + CLUSTER, neurons) - 1} once in their cluster"
            )
    return order


def neurons_at(order: Order) -> npt.NDArray[np.int64]:
    """Of each place the number of the neuron, int64 (neurons,)."""
    places = np.arange(len(order))
    return places - places % CLUSTER + order


def put_in_order(pages: npt.NDArray[np.uint8], layout: tuple[int, int, int, int], order: Order) -> None:
    """Puts bundles that lie in their neurons' own order into this one, in place.

    Args:
        pages: uint8, whole pages, of which the first begins with the first neuron of a cluster.
        layout: ``NeuronBundles.layout``.
        order: of these neurons.
    """
    bundles = _bundles(pages, layout, len(order))
    _put(pages, layout, bundles[neurons_at(order)])


def take_back(pages: npt.NDArray[np.uint8], layout: tuple[int, int, int, int], order: Order) -> None:
    """The other way round: back into the neurons' own order."""
    bundles = _bundles(pages, layout, len(order))
    back = np.empty_like(bundles)
    back[neurons_at(order)] = bundles
    _put(pages, layout, back)


def _slots(pages: npt.NDArray[np.uint8], layout: tuple[int, int, int, int]) -> npt.NDArray[Any]:
    """(pages, neurons of a page, bytes of a neuron), a view."""
    per_page, page_bytes, neuron_bytes, _ = layout
    rows = pages.reshape(-1, page_bytes)[:, : per_page * neuron_bytes]
    return np.lib.stride_tricks.as_strided(
        rows, (len(rows), per_page, neuron_bytes), (page_bytes, neuron_bytes, 1)
    )


def _bundles(
    pages: npt.NDArray[np.uint8], layout: tuple[int, int, int, int], neurons: int
) -> npt.NDArray[np.uint8]:
    slots = _slots(pages, layout)
    return slots.reshape(-1, layout[2])[:neurons].copy()


def _put(
    pages: npt.NDArray[np.uint8], layout: tuple[int, int, int, int], bundles: npt.NDArray[np.uint8]
) -> None:
    slots, per_page = _slots(pages, layout), layout[0]
    whole = len(bundles) // per_page
    slots[:whole] = bundles[: whole * per_page].reshape(whole, per_page, -1)
    if rest := len(bundles) - whole * per_page:
        slots[whole, :rest] = bundles[whole * per_page :]
