"""Which neuron clusters a cluster unit computes, and whether that pays: measured, with the block's own shapes."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from pi2rt._errors import RequestError
from pi2rt.cython_kernels.plane.cluster_unit import Mailbox
from pi2rt.formats import ModelFile
from pi2rt.formats.plan import Prediction
from pi2rt.models import FeedForward, ModelDescription
from pi2rt.planner.measure.crossover import neurons_seconds
from pi2rt.runtime.cluster_unit import (
    CLUSTER,
    ClusterUnit,
    ClusterUnitError,
    ClusterWeights,
    blocks_for_units,
    cluster_count,
)
from pi2rt.runtime.plugin_options import PluginOptions
from pi2rt.runtime.registry import load_cluster_unit

ROUNDS = 32
"""Items that are timed, after a quarter as many that are not."""
PATIENCE_S = 30.0
"""For an item that is timed."""


@dataclass(frozen=True, slots=True)
class UnitChoice:
    """``name``: of the unit; ``clusters``: that it computes, by the name of the block's down tensor, none where it does
    not pay; ``predictions``: what was measured."""

    name: str
    make: Callable[[], ClusterUnit]
    clusters: dict[str, list[int]] = field(default_factory=dict)
    predictions: tuple[Prediction, ...] = ()

    @property
    def options(self) -> dict[str, Any]:
        """Fields of ``ExecutorOptions``."""
        if not self.clusters:
            return {}
        clusters = {name: tuple(numbers) for name, numbers in self.clusters.items()}
        return {"cluster_unit": self.make, "unit_clusters": clusters}


def choose_clusters(
    file: ModelFile,
    model: ModelDescription,
    asked: str,
    threads: int,
    kernels: str | None,
    options: PluginOptions | None = None,
) -> UnitChoice:
    """The first clusters of each block. Blocks: it measures, for about a second.

    With all neurons active the processor takes ``c`` seconds for a cluster. A unit takes ``h`` for an item without any
    arithmetic, and ``u`` more for a cluster. It is given n of N clusters, the most with ``h + n u <= (N - n) c``: so it
    has answered before the processor is done, and what it computes costs nothing. Where few neurons are active, or wait
    for flash, the processor takes another time; the plan can be told a number instead.

    Args:
        asked: "NAME", or "NAME=N" with N clusters of each block, which asks for no measurement.
        threads: that compute beside the unit.
        kernels: name of their variant.
        options: of plug-ins.

    Raises:
        RequestError: no such unit or number, or the model has no block for it.
    """
    name, _, number = asked.partition("=")
    make = load_cluster_unit(name, options)
    able = blocks_for_units(file, model)
    if not able:
        raise RequestError(
            f"cluster unit {name!r}: {str(file.path)!r} has no block for it: that takes feed-forward blocks by "
            f"themselves, without biases of gate and up, whose neurons are in bundles ('pi2rt convert' writes those of "
            f"ReLU models)"
        )
    most = min(cluster_count(file.bundles[down]) for down in able)
    if number:
        if not number.isdecimal() or not 1 <= int(number) <= most:
            raise RequestError(
                f"--cluster-unit {asked}: the number of neuron clusters in each block is 1 to {most} here"
            )
        return UnitChoice(name, make, {down: list(range(int(number))) for down in able})
    down, (_, block) = next(iter(able.items()))
    hop, unit = _unit_seconds(name, make, block, model.dim)
    bundles = file.bundles[down]
    up_type = None if bundles.up is None else file.tensors[bundles.up].type
    down_type = file.tensors[bundles.down].type
    cpu = (
        neurons_seconds(up_type, down_type, model.dim, bundles, threads, kernels) * CLUSTER / bundles.neurons
    )
    clusters = {}
    for each in able:
        count = cluster_count(file.bundles[each])
        chosen = int((count * cpu - hop) / (unit + cpu))
        if chosen > 0:
            clusters[each] = list(range(min(chosen, count)))
    said = "chosen by these" if clusters else "too much to pay: no clusters are handed off"
    return UnitChoice(
        name,
        make,
        clusters,
        (
            Prediction("hand-off to the cluster unit and back", "seconds", hop, hop, f"measured; {said}"),
            Prediction("a neuron cluster on the cluster unit", "seconds", unit, unit, "measured, one row"),
            Prediction(
                "a neuron cluster on the processor",
                "seconds",
                cpu,
                cpu,
                f"measured, one row, all neurons active, {threads} threads",
            ),
        ),
    )


def _unit_seconds(
    name: str, make: Callable[[], ClusterUnit], block: FeedForward, dim: int
) -> tuple[float, float]:
    """(seconds of an item besides its arithmetic, and for a cluster): medians of one row, by items of one and of two
    clusters of random weights.

    Raises:
        RequestError: the unit fails, or takes longer than ``PATIENCE_S`` for an item.
    """
    random = np.random.default_rng(0)
    unit, mailbox = make(), Mailbox(1, dim, deadline=PATIENCE_S)
    seconds = np.empty((ROUNDS + ROUNDS // 4, 2))

    def work() -> None:
        try:
            mailbox.serve(unit.multiply)
        finally:
            unit.close()

    thread = threading.Thread(target=work, name=f"pi2rt/{name}", daemon=True)
    try:
        for layer, count in enumerate((1, 2)):
            shape = (count * CLUSTER, dim)
            up, down = (random.standard_normal(shape, np.float32) for _ in range(2))
            gate = None if block.gate is None else random.standard_normal(shape, np.float32)
            numbers = tuple(range(count))
            unit.load(layer, ClusterWeights(numbers, gate, up, down, block.activation, block.up_activation))
    except Exception as error:
        unit.close()
        raise RequestError(f"cluster unit {name!r} loads no weights: {_said(error)}") from error
    thread.start()
    try:
        for row in seconds:
            for layer in range(2):
                begin = time.perf_counter()
                mailbox.ask(layer, 1)
                mailbox.wait()
                row[layer] = time.perf_counter() - begin
    except ClusterUnitError as error:
        failure = mailbox.failure
        problem = f"no answer within {PATIENCE_S:g} s" if failure is None else _said(failure)
        raise RequestError(f"cluster unit {name!r} cannot be measured: {problem}") from (failure or error)
    finally:
        mailbox.close()
        thread.join(1.0)
    one, two = np.median(seconds[ROUNDS // 4 :], axis=0)
    cluster = max(two - one, 0.0)
    return float(max(one - cluster, 0.0)), float(cluster)


def _said(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
