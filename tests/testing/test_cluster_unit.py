"""The suite for cluster units passes the right one, and fails wrong ones, each in the test that is there for it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pi2rt.runtime.cluster_unit import CLUSTER, ClusterUnit, ClusterWeights
from pi2rt.runtime.step import Floats
from pi2rt.testing import ClusterUnitConformance
from tests.support.numpy_unit import NumpyUnit


class TestNumpyUnit(ClusterUnitConformance):
    def make_unit(self) -> ClusterUnit:
        unit: ClusterUnit = NumpyUnit()
        return unit


class Wrong(NumpyUnit):  # type: ignore[misc]
    """Multiplies as ``hidden`` and ``write`` of a subclass say."""

    def taken(self, weights: ClusterWeights) -> ClusterWeights:
        return weights

    def write(self, layer: int, x: Floats, out: Floats, product: Floats) -> None:
        out += product

    def load(self, layer: int, weights: ClusterWeights) -> None:
        super().load(layer, self.taken(weights))

    def multiply(self, layer: int, x: Floats, out: Floats) -> None:
        product = np.zeros(x.shape, np.float32)
        super().multiply(layer, x, product)
        self.write(layer, x, out, product)


class NoName(Wrong):
    name = ""


class NoUpActivation(Wrong):
    def taken(self, weights: ClusterWeights) -> ClusterWeights:
        return replace(weights, up_activation=None)


class OneRow(Wrong):
    def write(self, layer: int, x: Floats, out: Floats, product: Floats) -> None:
        out[0] += product[0]


class FirstCluster(Wrong):
    def taken(self, weights: ClusterWeights) -> ClusterWeights:
        gate = None if weights.gate is None else weights.gate[:CLUSTER]
        return replace(weights, gate=gate, up=weights.up[:CLUSTER], down=weights.down[:CLUSTER])


class Padded(Wrong):
    """Works with whole clusters only."""

    def taken(self, weights: ClusterWeights) -> ClusterWeights:
        if len(weights.up) % CLUSTER:
            raise ValueError("not a multiple of 512 neurons")
        return weights


class WholeLines(Wrong):
    """Of 64 values, and forgets the rest."""

    def write(self, layer: int, x: Floats, out: Floats, product: Floats) -> None:
        whole = x.shape[1] // 64 * 64
        out[:, :whole] += product[:, :whole]


class Overwrites(Wrong):
    def write(self, layer: int, x: Floats, out: Floats, product: Floats) -> None:
        out[:] = product


class WritesAhead(Wrong):
    def write(self, layer: int, x: Floats, out: Floats, product: Floats) -> None:
        out += product
        if out.base is not None and out.base.shape[0] > len(out):
            out.base[-1] = 1


class OneLayer(Wrong):
    def load(self, layer: int, weights: ClusterWeights) -> None:
        super().load(0, weights)

    def multiply(self, layer: int, x: Floats, out: Floats) -> None:
        super().multiply(0, x, out)


class Remembers(Wrong):
    """A buffer of its own is never cleared."""

    def __init__(self) -> None:
        super().__init__()
        self.sums = np.zeros((256, 4096), np.float32)

    def write(self, layer: int, x: Floats, out: Floats, product: Floats) -> None:
        rows, dim = product.shape
        self.sums[:rows, :dim] += product
        out += self.sums[:rows, :dim]


class OneThread(Wrong):
    def load(self, layer: int, weights: ClusterWeights) -> None:
        self.thread = threading.get_ident()
        super().load(layer, weights)

    def write(self, layer: int, x: Floats, out: Floats, product: Floats) -> None:
        if threading.get_ident() != self.thread:
            raise RuntimeError("the context belongs to another thread")
        out += product


class AnyActivation(Wrong):
    def taken(self, weights: ClusterWeights) -> ClusterWeights:
        known = ("relu", "relu2", "silu", "gelu_tanh")
        return weights if weights.activation in known else replace(weights, activation="relu")


class NeedsNothing(Wrong):
    def need(self, neurons: int, dim: int, gated: bool) -> int:
        return 0


class NeedsFloats(Wrong):
    def need(self, neurons: int, dim: int, gated: bool) -> Any:
        return 1e9


class ClosedOnce(Wrong):
    closed = False

    def close(self) -> None:
        if self.closed:
            raise ValueError("closed already")
        self.closed = True


class Bfloat(Wrong):
    """Keeps 8 bits of each weight."""

    def taken(self, weights: ClusterWeights) -> ClusterWeights:
        def cut(values: Floats | None) -> Floats | None:
            return (
                None if values is None else (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)
            )

        gate, up, down = cut(weights.gate), cut(weights.up), cut(weights.down)
        return replace(weights, gate=gate, up=up, down=down)  # type: ignore[arg-type]


MUTANTS: list[tuple[Callable[[], ClusterUnit], str, dict[str, Any], str]] = [
    (NoName, "test_it_keeps_to_the_protocol", {}, "attribute 'name'"),
    (NoUpActivation, "test_each_activation", {"pair": ("relu", "relu"), "gated": True}, "has a relative error of"),
    (Bfloat, "test_each_activation", {"pair": ("relu", None), "gated": False}, "has a relative error of 0.00"),
    (OneRow, "test_any_number_of_rows", {}, "2 rows: row 1 of 2"),
    (FirstCluster, "test_any_number_of_neurons", {}, "608 neurons: row 0"),
    (WholeLines, "test_any_width", {}, "a width of 32: row 0"),
    (Overwrites, "test_out_is_added_to", {}, "added to an output of 3"),
    (WritesAhead, "test_only_its_rows_are_written", {}, "rows behind out were written"),
    (OneLayer, "test_layers_are_kept_apart", {}, r"layer 3 of \[0, 3, 17\]"),
    (Remembers, "test_nothing_is_left_of_an_item", {}, "after another item"),
    (OneThread, "test_another_thread_multiplies", {}, "the context belongs to another thread"),
    (AnyActivation, "test_an_unknown_activation_is_refused", {}, "that nobody knows"),
    (NeedsNothing, "test_need_is_what_it_holds", {}, "need says 0 MiB .* 96 MiB|need says 0 MiB"),
    (NeedsFloats, "test_need_is_what_it_holds", {}, "must be a number of bytes"),
]  # fmt: skip


class Suite(ClusterUnitConformance):
    make: Callable[[], ClusterUnit]

    def make_unit(self) -> ClusterUnit:
        return type(self).make()


Suite.__test__ = False  # type: ignore[attr-defined]  # pytest need not run it by itself


@pytest.mark.parametrize(("make", "test", "arguments", "says"), MUTANTS)
def test_the_suite_fails(
    make: Callable[[], ClusterUnit], test: str, arguments: dict[str, Any], says: str
) -> None:
    suite = type("Mutant", (Suite,), {"make": make})()
    with pytest.raises(Exception, match=says):
        getattr(suite, test)(**arguments)


@pytest.mark.parametrize(
    ("make", "test", "error"),
    [
        (Padded, "test_any_number_of_neurons", "not a multiple of 512 neurons"),
        (ClosedOnce, "test_closed_twice", "closed already"),
    ],
)
def test_what_a_unit_raises_is_shown(make: Callable[[], ClusterUnit], test: str, error: str) -> None:
    suite = type("Mutant", (Suite,), {"make": make})()
    with pytest.raises(ValueError, match=error):
        getattr(suite, test)()


def test_every_test_of_the_suite_fails_a_mutant() -> None:
    tests = {name for name in dir(ClusterUnitConformance) if name.startswith("test_")}
    assert tests == {mutant[1] for mutant in MUTANTS} | {"test_closed_twice"}
