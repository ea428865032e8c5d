"""Neuron bundles of a pack: the up row and the down column of each neuron (its gate row too, where that is wanted) side
by side, in pages.

Sizes and places, for readers that have to check a file without the native module; the bytes are described in
``cython_kernels/kernels/bundles.h`` and ``docs/pack-format.md``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from pi2rt.formats.row_blocks import SECTOR

TYPES = ("Q4_0", "Q4_1", "Q8_0")
"""Types that up and down matrices in bundles may have."""

GROUP = 32
"""Values that share a scale; neurons come in whole groups."""


@dataclass(frozen=True, slots=True)
class NeuronBundles:
    """Where the neurons of one feed-forward block lie.

    Neuron i: page ``i // neurons_per_page``, byte ``i % neurons_per_page * neuron_bytes`` of it; first
    ``gate_bytes`` of gate quants, then ``up_bytes`` of up quants, then its down quants. ``gate``, ``up`` and
    ``down`` name the tensors. ``up`` is None where that matrix decides which neurons are active (a block without gate),
    and so is not in bundles; ``gate`` is None where the gates are not there, but a matrix by themselves. Scales are
    not here: they are the tensors' own bytes. ``order``: where bundles lie in another order than their neurons', for
    ``neuron_order.decode_order``; then i counts places.

    ``offset``: absolute, in the file, a multiple of ``SECTOR``; ``nbytes``: of all pages.
    """

    name: str
    up: str | None
    down: str
    offset: int
    nbytes: int
    neurons: int
    page_bytes: int
    neurons_per_page: int
    neuron_bytes: int
    up_bytes: int
    gate: str | None = None
    gate_bytes: int = 0
    order: bytes | None = None

    @property
    def pages(self) -> int:
        return self.nbytes // self.page_bytes

    @property
    def head_bytes(self) -> int:
        """What of a page has to be read for its gates: whole sectors; 0 where that is all of it, or there are none."""
        last = (self.neurons_per_page - 1) * self.neuron_bytes + self.gate_bytes
        head = _aligned(last, SECTOR) if self.gate is not None else 0
        return head if head < self.page_bytes else 0

    @property
    def layout(self) -> tuple[int, int, int, int]:
        """As the native functions take it: the last is where down begins."""
        return self.neurons_per_page, self.page_bytes, self.neuron_bytes, self.gate_bytes + self.up_bytes


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix that goes into bundles: ``shape`` is (neurons, columns) of gate and up, (rows, neurons) of down."""

    name: str
    type: str
    shape: tuple[int, int]


def arrange(
    name: str, up: Matrix | None, down: Matrix, offset: int = 0, *, gate: Matrix | None = None
) -> NeuronBundles:
    """Bundles of these matrices, of ``TYPES``, at ``offset``; everything else follows from types and shapes.

    Raises:
        ValueError: they cannot be in bundles together; the message says why.
    """
    neurons = down.shape[1]
    if neurons % GROUP:
        raise ValueError(f"{neurons} neurons are not a multiple of {GROUP}")
    if up is not None and up.shape[0] != neurons:
        raise ValueError(f"{up.name} has {up.shape[0]} neurons, {down.name} {neurons}")
    if gate is not None and (up is None or gate.shape != up.shape):
        raise ValueError(
            f"{gate.name} is {list(gate.shape)}, which is no gate of {up.name if up else 'no up'}"
        )
    up_bytes = up_quants(up.type, up.shape[1]) if up is not None else 0
    gate_bytes = up_quants(gate.type, gate.shape[1]) if gate is not None else 0
    neuron_bytes = gate_bytes + up_bytes + down_quants(down.type, down.shape[0])
    per_page = max(1, SECTOR // neuron_bytes)
    page_bytes = _aligned(per_page * neuron_bytes, SECTOR)
    return NeuronBundles(
        name=name,
        up=up.name if up is not None else None,
        down=down.name,
        offset=offset,
        nbytes=-(-neurons // per_page) * page_bytes,
        neurons=neurons,
        page_bytes=page_bytes,
        neurons_per_page=per_page,
        neuron_bytes=neuron_bytes,
        up_bytes=up_bytes,
        gate=gate.name if gate is not None else None,
        gate_bytes=gate_bytes,
    )


def step_neurons(bundles: NeuronBundles) -> int:
    """The least number of neurons that are whole pages and whole groups."""
    return math.lcm(bundles.neurons_per_page, GROUP)


def up_quants(type_name: str, columns: int) -> int:
    """Bytes of a neuron's up (or gate) quants."""
    return _aligned(columns, 512) // _values_per_byte(type_name)


def down_quants(type_name: str, rows: int) -> int:
    """Bytes of a neuron's down quants."""
    per_byte = _values_per_byte(type_name)
    return _aligned(rows, 64 * per_byte) // per_byte


def up_scales(type_name: str, columns: int) -> int:
    """Bytes of a neuron's up (or gate) scales."""
    return 2 * _scales(type_name) * _aligned(columns // GROUP, 16)


def down_scales(type_name: str, rows: int) -> int:
    """Bytes of the down scales of ``GROUP`` neurons."""
    return 2 * _scales(type_name) * _aligned(rows, 128)


def up_scales_bytes(up: Matrix) -> int:
    """Bytes of the scales of a whole up matrix: what its tensor takes in the file."""
    neurons, columns = up.shape
    return neurons * up_scales(up.type, columns)


def down_scales_bytes(down: Matrix) -> int:
    """As ``up_scales_bytes``, of a down matrix."""
    rows, neurons = down.shape
    return neurons // GROUP * down_scales(down.type, rows)


def _values_per_byte(type_name: str) -> int:
    return 1 if type_name == "Q8_0" else 2


def _scales(type_name: str) -> int:
    """Numbers that a group of values has."""
    return 2 if type_name == "Q4_1" else 1


def _aligned(size: int, to: int) -> int:
    return -(-size // to) * to
