"""Neuron clusters that a cluster unit computes beside the gang: their weights, and the thread that calls the unit."""

from __future__ import annotations

import math
import threading
from collections import deque
from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from pi2rt._errors import RequestError
from pi2rt.cython_kernels.kernels import native
from pi2rt.cython_kernels.plane.cluster_unit import Mailbox
from pi2rt.executors.cpu.weights import bytes_in_file, to_floats
from pi2rt.formats import ModelFile, TensorInfo, neuron_bundles, neuron_order
from pi2rt.formats.neuron_bundles import NeuronBundles
from pi2rt.models import FeedForward, ModelDescription
from pi2rt.runtime.cluster_unit import (
    CLUSTER,
    ClusterUnit,
    ClusterUnitError,
    ClusterWeights,
    blocks_for_units,
)
from pi2rt.runtime.executor_statistics import ClusterUnitStatistics
from pi2rt.runtime.step import Floats

CLOSE_PATIENCE_S = 1.0
"""How long ``UnitClusters.close`` waits for a unit that computes. Its thread is left alone after that."""

TIMES = 4096
"""Items whose times are kept until a trace takes them."""


class UnitClusters:
    """A cluster unit with its clusters, and a thread of its own that waits for items. ``load`` for each block,
    then ``start``.

    Attributes:
        actor: its name in statistics and traces, and of its thread.
        unit: it.
        clusters: numbers of its clusters, by the name of the block's down tensor.
        mailbox: where items come from.
    """

    def __init__(
        self,
        actor: str,
        unit: ClusterUnit,
        clusters: Mapping[str, tuple[int, ...]],
        max_rows: int,
        dim: int,
        deadline: float | None,
    ) -> None:
        self.actor = actor
        self.unit, self.clusters = unit, {name: each for name, each in clusters.items() if each}
        self.mailbox = Mailbox(max_rows, dim, deadline=deadline)
        self.times: deque[tuple[int, int, int, int]] = deque(maxlen=TIMES)  # (layer, rows, begin, end)
        self._thread: threading.Thread | None = None
        self._late = False
        self._unit_bytes = 0
        self._using, self._closed = threading.Lock(), False  # the unit, before its thread runs

    @property
    def works(self) -> bool:
        return self.mailbox.failure is None and not self._late

    @property
    def problem(self) -> str:
        """Why it does not work."""
        if (failure := self.mailbox.failure) is not None:
            return f"{type(failure).__name__}: {failure}"
        return f"no answer within {self.mailbox.deadline:g} s"

    def lost(self, error: ClusterUnitError) -> ClusterUnitError:
        """The error of a step that failed with ``error``, which names the unit and what happened to it."""
        self._late = self.mailbox.failure is None
        return ClusterUnitError(
            f"cluster unit {self.actor!r} {error}: {self.problem}; the executor goes on without it"
        )

    def statistics(self) -> ClusterUnitStatistics:
        return ClusterUnitStatistics(self.actor, *self.mailbox.counters)

    @property
    def nbytes(self) -> int:
        """Of input and output, and what the unit says of itself."""
        return self.mailbox.x.nbytes + self.mailbox.out.nbytes + self._unit_bytes

    def load(self, file: ModelFile, model: ModelDescription, name: str) -> None:
        """Reads the weights of its clusters of one block, and gives them to the unit. Blocks.

        Raises:
            RequestError: the unit refused them.
        """
        layer, block = blocks_for_units(file, model)[name]
        weights = cluster_weights(file, block, self.clusters[name])
        neurons, dim = weights.up.shape
        with self._using:
            if self._closed:  # whoever waited for the read has given up
                return
            self._unit_bytes += self.unit.need(neurons, dim, weights.gate is not None)
            try:
                self.unit.load(layer, weights)
            except Exception as error:
                raise RequestError(
                    f"cluster unit {self.actor!r}: does not load clusters {list(weights.clusters)} of layer "
                    f"{layer}: {type(error).__name__}: {error}"
                ) from error

    def start(self) -> None:
        self._thread = threading.Thread(target=self._work, name=f"pi2rt/{self.actor}", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Joins the thread, and closes the unit. One that does not return within ``CLOSE_PATIENCE_S`` is left to its
        thread, which closes it. Nothing is handed off any more."""
        self.mailbox.close()
        thread, self._thread = self._thread, None
        if thread is not None:
            thread.join(CLOSE_PATIENCE_S)
            return
        with self._using:
            self._closed = True
            self.unit.close()

    def _work(self) -> None:
        try:
            self.mailbox.serve(self.unit.multiply, self.times)
        finally:
            self.unit.close()


def cluster_weights(file: ModelFile, block: FeedForward, numbers: tuple[int, ...]) -> ClusterWeights:
    """Those of some clusters of a block, dequantised. Reads no more than lies in the pages of these clusters."""
    bundles = file.bundles[block.down.weight]
    pieces = [_one_cluster(file, block, bundles, number) for number in numbers]
    gates, ups, downs = zip(*pieces, strict=True)
    return ClusterWeights(
        clusters=numbers,
        gate=None if block.gate is None else np.concatenate(gates),
        up=np.concatenate(ups),
        down=np.concatenate(downs),
        activation=block.activation,
        up_activation=block.up_activation,
    )


def _one_cluster(
    file: ModelFile, block: FeedForward, bundles: NeuronBundles, number: int
) -> tuple[Floats | None, Floats, Floats]:
    """gate, up and down, (neurons, dim) each."""
    first, end = number * CLUSTER, min((number + 1) * CLUSTER, bundles.neurons)
    # Whole pages, groups of scales and clusters.
    whole = math.lcm(neuron_bundles.step_neurons(bundles), CLUSTER)
    begin = first // whole * whole
    stop = min(-(-end // whole) * whole, bundles.neurons)
    page, last = begin // bundles.neurons_per_page, -(-stop // bundles.neurons_per_page)
    pages = np.empty((last - page) * bundles.page_bytes, np.uint8)
    file.read_bundles_into(bundles, page * bundles.page_bytes, pages.data)
    if bundles.order is not None:
        neuron_order.take_back(pages, bundles.layout, neuron_order.bundle_order(bundles)[begin:stop])
    count, mine = stop - begin, slice(first - begin, end - begin)

    def up_rows(name: str) -> Floats:
        info = file.tensors[name]
        if info.layout != "neurons":
            return _rows(file, info, first, end)
        each = neuron_bundles.up_scales(info.type, info.shape[1])
        scales = _part(file, info, begin * each, count * each)
        at = 0 if name == bundles.gate else bundles.gate_bytes
        found = native.unbundle_up(info.type, pages, scales, count, info.shape[1], bundles.layout, at_byte=at)
        return np.ascontiguousarray(found[mine])

    info = file.tensors[bundles.down]
    each = neuron_bundles.down_scales(info.type, info.shape[0])
    group = neuron_bundles.GROUP
    scales = _part(file, info, begin // group * each, -(-count // group) * each)
    down = native.unbundle_down(info.type, pages, scales, info.shape[0], count, bundles.layout)
    gate = None if block.gate is None else up_rows(block.gate.weight)
    return gate, up_rows(block.up.weight), np.ascontiguousarray(down.T[mine])


def _part(file: ModelFile, info: TensorInfo, start: int, count: int) -> npt.NDArray[np.uint8]:
    raw = np.empty(count, np.uint8)
    file.read_into(info, start, raw.data)
    return raw


def _rows(file: ModelFile, info: TensorInfo, first: int, end: int) -> Floats:
    """Rows of a matrix by itself; ``first`` is a multiple of 16."""
    memory = native.Memory(bytes_in_file(info, first, end))  # aligned as row blocks have to be
    try:
        raw = memory.view()
        file.read_into(info, bytes_in_file(info, 0, first), raw.data)
        return np.array(to_floats(info, raw, end - first), np.float32)
    finally:
        memory.close()
