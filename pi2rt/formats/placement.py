"""Where each tensor of a model is while it runs: one tagged value, in plans and in what executors are told."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum


class Placement(Enum):
    """Where a tensor is while the model runs."""

    RESIDENT = "resident"
    STREAMED = "streamed"
    """Read in every step, in pieces, through the ring."""
    PAGED = "paged"
    """An expert's: read in pages when a router has chosen the expert, into a cache."""
    BY_ROW = "by row"
    """An embedding: the rows of a step's tokens are read."""
    NEURONS = "neurons"
    """In neuron bundles: read when a neuron is active, into a cache."""


def placed(placements: Mapping[str, Placement], where: Placement) -> tuple[str, ...]:
    """Names of the tensors that are there, in their order. Those that are not named are resident."""
    return tuple(name for name, each in placements.items() if each is where)
