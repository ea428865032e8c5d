"""What a cluster unit must do, as tests that pytest collects from a subclass."""

from __future__ import annotations

import gc
import threading
from collections.abc import Sequence
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import pytest

from pi2rt.executors.reference.model import activate
from pi2rt.host.memory import rss_bytes
from pi2rt.runtime.cluster_unit import CLUSTER, ClusterUnit, ClusterWeights
from pi2rt.runtime.registry import check_cluster_unit
from pi2rt.runtime.step import Floats

DIM = 96
NEED_NEURONS, NEED_DIM = 32 * CLUSTER, 512
"""96 MiB of weights, which no allocator hides."""
NEED_SLACK = 24 << 20


class ClusterUnitConformance:
    """The suite::

        class TestMine(ClusterUnitConformance):
            def make_unit(self) -> ClusterUnit:
                return MyUnit()

    ``activations``: pairs (of gate, of up) that the unit can run; ``gated``: whether it takes blocks with a gate,
    without one, or both; ``tolerance``: relative error of an output row in float32.
    """

    activations: ClassVar[Sequence[tuple[str, str | None]]] = (
        ("relu", None), ("relu", "relu"), ("relu2", None), ("silu", None), ("gelu_tanh", None),
    )  # fmt: skip
    gated: ClassVar[Sequence[bool]] = (True, False)
    tolerance: float = 1e-4

    def make_unit(self) -> ClusterUnit:
        """A new unit."""
        raise NotImplementedError("return a new unit")

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Tests with an argument ``pair`` run for each of ``activations``, those with ``gated`` for each of those."""
        if "pair" in metafunc.fixturenames:
            metafunc.parametrize("pair", list(self.activations), ids=lambda pair: "-".join(map(str, pair)))
        if "gated" in metafunc.fixturenames:
            metafunc.parametrize("gated", list(self.gated), ids=lambda gated: "gate" if gated else "no gate")

    # -- what is given, and what is right

    def weights(
        self,
        neurons: int = CLUSTER,
        dim: int = DIM,
        *,
        pair: tuple[str, str | None] | None = None,
        gated: bool | None = None,
        seed: int = 0,
    ) -> ClusterWeights:
        """Random ones, of the first of ``activations`` and ``gated`` unless these say otherwise."""
        random = np.random.default_rng([seed, neurons, dim])
        gated = self.gated[0] if gated is None else gated
        activation, up_activation = self.activations[0] if pair is None else pair
        gate, up, down = (
            random.standard_normal((neurons, dim), np.float32) / np.float32(8) for _ in range(3)
        )
        numbers = tuple(range(1, 2 * -(-neurons // CLUSTER), 2))  # which are no neighbours
        return ClusterWeights(
            numbers, gate if gated else None, up, down, activation, up_activation if gated else None
        )

    def rows(self, count: int, dim: int = DIM, seed: int = 1) -> Floats:
        x: Floats = np.random.default_rng([seed, count, dim]).standard_normal((count, dim), np.float32)
        x.flags.writeable = False
        return x

    def expected(self, weights: ClusterWeights, x: Floats) -> npt.NDArray[np.float64]:
        wide = x.astype(np.float64)
        up = wide @ weights.up.astype(np.float64).T
        if weights.gate is None:
            hidden = _activated(weights.activation, up)
        else:
            hidden = _activated(weights.activation, wide @ weights.gate.astype(np.float64).T)
            hidden = hidden * _activated(weights.up_activation, up)
        found: npt.NDArray[np.float64] = hidden @ weights.down.astype(np.float64)
        return found

    def check(self, got: Floats, expected: npt.NDArray[np.float64], what: str) -> None:
        for row, (mine, right) in enumerate(zip(got, expected, strict=True)):
            assert np.isfinite(mine).all(), f"{what}: row {row} holds NaN or infinity"
            error = float(np.linalg.norm(mine - right) / max(float(np.linalg.norm(right)), 1e-30))
            assert error <= self.tolerance, (
                f"{what}: row {row} of {len(got)} has a relative error of {error:.2g}, allowed {self.tolerance:g}"
            )

    def product(self, weights: ClusterWeights, x: Floats) -> Floats:
        """By a unit of its own."""
        unit = self.make_unit()
        try:
            unit.load(0, weights)
            out = np.zeros(x.shape, np.float32)
            unit.multiply(0, x, out)
            return out
        finally:
            unit.close()

    # -- tests

    def test_it_keeps_to_the_protocol(self) -> None:
        check_cluster_unit("of the suite", self.make_unit)

    def test_each_activation(self, pair: tuple[str, str | None], gated: bool) -> None:
        weights, x = self.weights(pair=pair, gated=gated), self.rows(3)
        self.check(
            self.product(weights, x), self.expected(weights, x), f"{pair}, {'' if gated else 'no '}gate"
        )

    def test_any_number_of_rows(self) -> None:
        weights = self.weights()
        for count in (1, 2, 5, 64, 200):
            x = self.rows(count)
            self.check(self.product(weights, x), self.expected(weights, x), f"{count} rows")

    def test_any_number_of_neurons(self) -> None:
        """Several clusters, and a last one that is not full."""
        for neurons in (32, CLUSTER, CLUSTER + 96, 3 * CLUSTER):
            weights, x = self.weights(neurons), self.rows(2)
            self.check(self.product(weights, x), self.expected(weights, x), f"{neurons} neurons")

    def test_any_width(self) -> None:
        for dim in (32, 608, 1024):
            weights, x = self.weights(dim=dim), self.rows(2, dim)
            self.check(self.product(weights, x), self.expected(weights, x), f"a width of {dim}")

    def test_out_is_added_to(self) -> None:
        unit, weights, x = self.make_unit(), self.weights(), self.rows(2)
        try:
            unit.load(0, weights)
            out = np.full(x.shape, 3, np.float32)
            unit.multiply(0, x, out)
            self.check(out, self.expected(weights, x) + 3, "added to an output of 3")
        finally:
            unit.close()

    def test_only_its_rows_are_written(self) -> None:
        unit, weights, x = self.make_unit(), self.weights(), self.rows(2)
        try:
            unit.load(0, weights)
            memory = np.zeros((6, DIM), np.float32)
            unit.multiply(0, x, memory[2:4])
            assert not memory[:2].any(), "rows before out were written"
            assert not memory[4:].any(), "rows behind out were written"
            self.check(memory[2:4], self.expected(weights, x), "out in the middle of an array")
        finally:
            unit.close()

    def test_layers_are_kept_apart(self) -> None:
        unit, x = self.make_unit(), self.rows(2)
        layers = {3: self.weights(seed=3), 0: self.weights(2 * CLUSTER, seed=4), 17: self.weights(seed=5)}
        try:
            for layer, weights in layers.items():
                unit.load(layer, weights)
            for layer in (17, 3, 0, 3):
                out = np.zeros(x.shape, np.float32)
                unit.multiply(layer, x, out)
                self.check(out, self.expected(layers[layer], x), f"layer {layer} of {sorted(layers)}")
        finally:
            unit.close()

    def test_nothing_is_left_of_an_item(self) -> None:
        """Of the input before, a larger one, or a value that is not finite."""
        unit, weights, x = self.make_unit(), self.weights(), self.rows(2)
        try:
            unit.load(0, weights)
            for before in (self.rows(64, seed=2), np.full((2, DIM), np.nan, np.float32)):
                unit.multiply(0, before, np.zeros(before.shape, np.float32))
                out = np.zeros(x.shape, np.float32)
                unit.multiply(0, x, out)
                self.check(out, self.expected(weights, x), "after another item")
        finally:
            unit.close()

    def test_another_thread_multiplies(self) -> None:
        """Than the one that loaded."""
        unit, weights, x = self.make_unit(), self.weights(), self.rows(2)
        out, failures = np.zeros(x.shape, np.float32), []

        def work() -> None:
            try:
                unit.multiply(0, x, out)
                unit.close()
            except BaseException as error:
                failures.append(error)

        unit.load(0, weights)
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert not failures, f"multiply and close in another thread than load: {failures[0]!r}"
        self.check(out, self.expected(weights, x), "in another thread")

    def test_an_unknown_activation_is_refused(self) -> None:
        unit = self.make_unit()
        weights, refusal = self.weights(pair=("an activation of the future", None)), None
        try:
            unit.load(0, weights)
        except Exception as error:
            refusal = error
        finally:
            unit.close()
        assert refusal is not None, (
            "load took weights with an activation that nobody knows: its results would be wrong"
        )
        assert "an activation of the future" in str(refusal), f"{refusal!r} does not name the activation"

    def test_need_is_what_it_holds(self) -> None:
        unit = self.make_unit()
        try:
            weights = self.weights(NEED_NEURONS, NEED_DIM)
            need = unit.need(NEED_NEURONS, NEED_DIM, weights.gate is not None)
            assert isinstance(need, int), f"need is {need!r}, and must be a number of bytes"
            assert need >= 0, f"need is {need} bytes"
            arrays = [each for each in (weights.gate, weights.up, weights.down) if each is not None]
            given = sum(each.nbytes for each in arrays)
            gc.collect()
            before = rss_bytes() - given  # what it keeps of them is its own
            unit.load(0, weights)
            x = self.rows(1, NEED_DIM)
            unit.multiply(0, x, np.zeros(x.shape, np.float32))
            del weights, arrays
            gc.collect()
            held = rss_bytes() - before
            assert held <= need + NEED_SLACK, (
                f"need says {need >> 20} MiB for {NEED_NEURONS} neurons of {NEED_DIM}, and {held >> 20} MiB are held"
            )
        finally:
            unit.close()

    def test_closed_twice(self) -> None:
        unit = self.make_unit()
        unit.load(0, self.weights())
        unit.close()
        unit.close()
        self.make_unit().close()


def _activated(kind: str | None, x: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    known: Any = kind
    return x if kind is None else activate(known, x)  # type: ignore[arg-type, return-value]  # float64 stays float64
