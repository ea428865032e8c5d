"""The protocol of cluster units, which multiply some neuron clusters of a block while the executor computes the others.

A unit is arithmetic only. Its caller keeps the thread, the queue, cancellation and deadlines, and gives it the weights
as float32. Units are entry points of the group ``pi2rt.cluster_units``, and pass ``pi2rt.testing``'s
``ClusterUnitConformance``. Sums of a unit have another order than the processor's, so that its results are close to the
exact ones, not equal: a plan has a cluster unit only where somebody asked for it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from pi2rt._errors import Pi2rtError
from pi2rt.formats import ModelFile
from pi2rt.formats.neuron_bundles import NeuronBundles
from pi2rt.models import FeedForward, ModelDescription
from pi2rt.runtime.step import Floats

CLUSTER = 512
"""Neurons of a cluster; the last one of a block may have fewer."""


class ClusterUnitError(Pi2rtError):
    """A cluster unit failed, or did not answer in time. The executor goes on without it."""


@dataclass(frozen=True, slots=True)
class ClusterWeights:
    """Some clusters of a feed-forward block. ``clusters``: their numbers, ascending; of these n neurons, in this order,
    ``gate``, ``up`` and ``down`` are float32 (n, dim), C-contiguous: rows of gate and up, and columns of down.
    ``gate`` is None for a block without one.

    ``activation``, ``up_activation``: "silu", "gelu" (by erf), "gelu_tanh", "relu", "relu2" (its square) or None. A
    neuron's value is act(gate x) * up_act(up x); without gate it is act(up x).
    """

    clusters: tuple[int, ...]
    gate: Floats | None
    up: Floats
    down: Floats
    activation: str
    up_activation: str | None


@runtime_checkable
class ClusterUnit(Protocol):
    """Multiplies neuron clusters. Constructed without arguments, which acquires nothing. All calls come from one thread
    at a time: ``load`` for each layer, then ``multiply`` as often as steps run, then ``close``."""

    name: str

    def need(self, neurons: int, dim: int, gated: bool) -> int:
        """Bytes that it will hold for clusters with so many neurons together. Of float32 weights that it keeps as they
        are, ``(3 if gated else 2) * neurons * dim * 4``."""
        ...

    def load(self, layer: int, weights: ClusterWeights) -> None:
        """Takes the clusters of a layer. It may keep the arrays; nobody else does."""
        ...

    def multiply(self, layer: int, x: Floats, out: Floats) -> None:
        """``out += down^T (act(gate x) * up_act(up x))`` over the clusters of the layer. ``x``, ``out``: float32
        (rows, dim), C-contiguous; ``x`` is the block's normalised input, and cannot be written to. An exception loses
        the unit: the executor computes its clusters from then on."""
        ...

    def close(self) -> None:
        """Frees what it holds. Safe to call twice, and after a ``load`` that failed."""
        ...


def blocks_for_units(file: ModelFile, model: ModelDescription) -> Mapping[str, tuple[int, FeedForward]]:
    """Blocks whose clusters a unit may take, by the name of their down tensor: (layer, block). They are no expert's,
    their neurons are in bundles, and neither gate nor up has a bias."""
    found: dict[str, tuple[int, FeedForward]] = {}
    for layer, each in enumerate(model.layers):
        blocks = [block for block in each.blocks if isinstance(block, FeedForward)]
        if len(blocks) != 1 or blocks[0].down.weight not in file.bundles:
            continue
        block = blocks[0]
        if block.up.bias is None and (block.gate is None or block.gate.bias is None):
            found[block.down.weight] = (layer, block)
    return found


def cluster_count(bundles: NeuronBundles) -> int:
    return -(-bundles.neurons // CLUSTER)


def neurons_of(bundles: NeuronBundles, numbers: Sequence[int]) -> int:
    """How many neurons these clusters of a block have."""
    return sum(min(CLUSTER, bundles.neurons - number * CLUSTER) for number in numbers)


def misplaced_clusters(
    file: ModelFile, model: ModelDescription, clusters: Mapping[str, Sequence[int]]
) -> str | None:
    """Why a unit cannot have these clusters, by the name of the block's down tensor; None where it can."""
    able = blocks_for_units(file, model)
    for name, numbers in clusters.items():
        if name not in able:
            return (
                f"a cluster unit cannot have clusters of {name!r}: that takes a feed-forward block by itself, without "
                f"biases of gate and up, whose neurons are in bundles"
            )
        count = cluster_count(file.bundles[name])
        ascending = list(numbers) == sorted(set(numbers))
        if not ascending or (numbers and not 0 <= numbers[0] <= numbers[-1] < count):
            return f"clusters {list(numbers)} of {name!r}: ascending numbers from 0 to {count - 1} are needed"
    return None


def unit_bytes(
    file: ModelFile,
    model: ModelDescription,
    unit: ClusterUnit,
    clusters: Mapping[str, Sequence[int]],
    max_rows: int,
) -> int:
    """What a unit takes with these clusters: by itself, input and output of an item, and a block while it is loaded."""
    able = blocks_for_units(file, model)
    total, largest = 2 * 4 * max_rows * model.dim, 0
    for name, numbers in clusters.items():
        neurons, gated = neurons_of(file.bundles[name], numbers), able[name][1].gate is not None
        total += unit.need(neurons, model.dim, gated)
        largest = max(
            largest, 2 * 4 * (3 if gated else 2) * neurons * model.dim
        )  # the parts, and all of them
    return total + largest
