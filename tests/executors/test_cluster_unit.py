"""Neuron clusters on a cluster unit: results near the exact ones, and a unit that fails costs a step, no more."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from pi2rt._errors import RequestError
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.executors.cpu.unit_clusters import cluster_weights
from pi2rt.formats import open_model_file
from pi2rt.models import describe
from pi2rt.planner.pack.convert import convert
from pi2rt.runtime.cluster_unit import (
    CLUSTER,
    ClusterUnitError,
    ClusterWeights,
    blocks_for_units,
    cluster_count,
    unit_bytes,
)
from pi2rt.runtime.executor import StepExecutor
from pi2rt.runtime.step import Bind, Floats, Sampling, Slice, Step
from pi2rt.runtime.trace import Trace
from pi2rt.testing import StepExecutorConformance, Tolerance
from tests.executors.test_sparse import one_by_one
from tests.support.numpy_unit import NumpyUnit
from tests.support.running import NOTHING, all_logits, opened, page_table
from tests.support.tiny_models import TinyModel, write_gguf

TOKENS = np.arange(3, 60, dtype=np.int32)

MODELS = {
    "drelu": (TinyModel("llama", seed=1, dim=256, hidden=1216, layers=2, heads=4, kv_heads=2, head_dim=64,
                        config={"hidden_act": "drelu"}), {}, "on"),
    "gates": (TinyModel("llama", seed=2, dim=608, hidden=1568, layers=3, heads=4, kv_heads=4, head_dim=32,
                        config={"hidden_act": "relu"}),
              {"ffn_gate": "Q8_0", "ffn_up": "Q8_0", "ffn_down": "Q4_1"}, "gates"),
    "relu2": (TinyModel("llama", seed=3, dim=256, hidden=1024, layers=2, heads=4, kv_heads=2, head_dim=64,
                        gated=False, config={"hidden_act": "relu2"}), {"ffn_down": "Q8_0"}, "on"),
}  # fmt: skip
"""Model, types of its matrices, and what its bundles hold. Pages hold 1 to 7 neurons."""

Clusters = Mapping[str, tuple[int, ...]]


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> Mapping[str, Path]:
    folder = tmp_path_factory.mktemp("packs")
    for name, (model, types, bundles) in MODELS.items():
        source = write_gguf(folder / f"{name}.gguf", model, weight_type="Q4_0", types=types)
        convert(source, folder / f"{name}.pi2", bundles=bundles)
    return {name: folder / f"{name}.pi2" for name in MODELS}


@pytest.fixture(params=list(MODELS))
def pack(request: pytest.FixtureRequest, packs: Mapping[str, Path]) -> Path:
    return packs[request.param]


def clusters_of(path: Path, choose: Callable[[int], tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    with open_model_file(path) as file:
        model = describe(file)
        return {name: choose(cluster_count(file.bundles[name])) for name in blocks_for_units(file, model)}


def helped(path: Path, choose: Callable[[int], tuple[int, ...]], unit: Callable[[], Any]) -> dict[str, Any]:
    return {
        "exact_floats": False,
        "cluster_unit": unit,
        "unit_actor": "numpy",
        "unit_clusters": clusters_of(path, choose),
    }


def error_of(got: Floats, expected: Floats) -> float:
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


CHOICES = {
    "the first": lambda count: (0,),
    "the last": lambda count: (count - 1,),
    "all but one": lambda count: tuple(i for i in range(count) if i != 1),
    "all": lambda count: tuple(range(count)),
}


@pytest.mark.parametrize("choice", CHOICES)
async def test_results_are_near_those_without_it(pack: Path, choice: str) -> None:
    """Its floats are more exact than the integers that activations become on the processor."""
    async with opened(CpuExecutor(), pack, exact_floats=False, activations="int16") as executor:
        expected = await all_logits(executor, TOKENS)
    options = helped(pack, CHOICES[choice], NumpyUnit) | {"activations": "int16"}
    async with opened(CpuExecutor(), pack, **options) as executor:
        chunk = await all_logits(executor, TOKENS)
        single = await one_by_one(executor, TOKENS[:20])
        unit = executor.statistics().cluster_unit
    assert 0 < error_of(chunk, expected) < 0.01
    assert error_of(single, expected[:20]) < 0.01
    layers = len(options["unit_clusters"])
    assert unit is not None
    assert (unit.items, unit.rows) == (layers * 21, layers * (len(TOKENS) + 20))


async def test_its_clusters_are_not_read_nor_computed_by_the_processor(packs: Mapping[str, Path]) -> None:
    path = packs["drelu"]
    async with opened(CpuExecutor(), path, exact_floats=False) as executor:
        await all_logits(executor, TOKENS)
        alone = executor.statistics()
    async with opened(CpuExecutor(), path, **helped(path, CHOICES["all"], NumpyUnit)) as executor:
        await all_logits(executor, TOKENS)
        beside = executor.statistics()
    assert alone.flash.neurons.hits
    assert beside.flash.neurons.hits == beside.flash.neurons.misses == 0
    unit = [each for each in beside.threads if each.actor == "numpy"]
    assert len(unit) == 1
    assert unit[0].kernel_ns > 0


def test_the_weights_are_the_dense_ones(pack: Path) -> None:
    """Of every cluster, read by itself."""
    with open_model_file(pack) as file:
        model = describe(file)
        for name, (_, block) in blocks_for_units(file, model).items():
            count = cluster_count(file.bundles[name])
            whole = cluster_weights(file, block, tuple(range(count)))
            assert whole.up.shape == whole.down.shape == (file.bundles[name].neurons, model.dim)
            for number in range(count):
                part = cluster_weights(file, block, (number,))
                mine = slice(number * CLUSTER, (number + 1) * CLUSTER)
                np.testing.assert_array_equal(part.up, whole.up[mine])
                np.testing.assert_array_equal(part.down, whole.down[mine])
                if whole.gate is not None:
                    np.testing.assert_array_equal(part.gate, whole.gate[mine])


class TestHelpedCpu(StepExecutorConformance):
    """The whole suite, with two of three clusters on the unit."""

    models = ("drelu",)
    tolerance = Tolerance(reference=0.06, repeat=0.02)  # a unit's sums depend on the number of rows

    @pytest.fixture(autouse=True)
    def _model(self, packs: Mapping[str, Path]) -> None:
        self.path = packs["drelu"]
        self.options = self.options.__class__(
            slots=4, pages=16, context=256, max_tokens=192, **helped(self.path, CHOICES["all but one"], NumpyUnit)
        )  # fmt: skip

    def make_executor(self) -> StepExecutor:
        return CpuExecutor()

    def open_model(self, name: str) -> tuple[Any, Any]:
        file = open_model_file(self.path)
        return file, describe(file)

    def open_reference_model(self, name: str) -> tuple[Any, Any]:
        file = open_model_file(self.path.with_suffix(".gguf"))
        return file, describe(file)


class Failing(NumpyUnit):  # type: ignore[misc]
    """The third item fails."""

    closed = 0

    def __init__(self) -> None:
        super().__init__()
        self.left = 2

    def multiply(self, layer: int, x: Floats, out: Floats) -> None:
        if not self.left:
            raise OverflowError("too warm")
        self.left -= 1
        out += 1000  # what is lost must not be seen

    def close(self) -> None:
        super().close()
        type(self).closed += 1


async def test_a_unit_that_fails_costs_its_step_and_no_weights(packs: Mapping[str, Path]) -> None:
    path = packs["gates"]  # of three layers: the first step fails
    async with opened(CpuExecutor(), path, exact_floats=False) as executor:
        expected = await all_logits(executor, TOKENS)
    Failing.closed = 0
    async with opened(CpuExecutor(), path, **helped(path, CHOICES["all"], Failing)) as executor:
        said = r"^cluster unit 'numpy' failed: OverflowError: too warm; the executor goes on without it$"
        with pytest.raises(ClusterUnitError, match=said) as caught:
            await all_logits(executor, TOKENS)
        assert isinstance(caught.value.__cause__, OverflowError)
        assert await executor.repair()
        assert Failing.closed == 1
        np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)
        lost = executor.statistics().cluster_unit
        assert lost is not None
        assert (lost.lost, lost.items) == ("OverflowError: too warm", 3)


class Hanging(NumpyUnit):  # type: ignore[misc]
    begun: threading.Event
    go_on: threading.Event

    def multiply(self, layer: int, x: Floats, out: Floats) -> None:
        self.begun.set()
        assert self.go_on.wait(60)
        out += 1

    @classmethod
    def again(cls) -> None:
        cls.begun, cls.go_on = threading.Event(), threading.Event()


def unit_threads() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "pi2rt/numpy"]


async def test_a_unit_that_does_not_answer_is_left_alone(
    packs: Mapping[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = packs["relu2"]
    monkeypatch.setattr("pi2rt.executors.cpu.unit_clusters.CLOSE_PATIENCE_S", 0.05)
    Hanging.again()
    options = helped(path, CHOICES["the first"], Hanging) | {"read_deadline": 0.2}
    async with opened(CpuExecutor(), path, **options) as executor:
        with pytest.raises(ClusterUnitError, match=r"has not answered in time: no answer within 0\.2 s"):
            await all_logits(executor, TOKENS)
        assert await executor.repair()
        await all_logits(executor, TOKENS)
    (left,) = unit_threads()
    Hanging.go_on.set()  # what it writes to is still there
    await trio.to_thread.run_sync(left.join)


async def test_a_stopped_step_ends_though_the_unit_does_not(packs: Mapping[str, Path]) -> None:
    """The next step waits until the unit has let go of input and output."""
    path = packs["relu2"]
    Hanging.again()
    async with opened(CpuExecutor(), path, **helped(path, CHOICES["the first"], Hanging)) as executor:
        part = Slice(0, 0, page_table(0), TOKENS, logits=True)
        executor.submit(Step(7, (part,), (Bind(0, Sampling(), NOTHING),)))
        await trio.to_thread.run_sync(Hanging.begun.wait)
        executor.stop(7)
        assert (await executor.wait()).stopped
        Hanging.go_on.set()
        first = await all_logits(executor, TOKENS)
        np.testing.assert_array_equal(await all_logits(executor, TOKENS), first)
    assert not unit_threads()


async def test_several_sequences_and_a_trace(packs: Mapping[str, Path], tmp_path: Path) -> None:
    path, trace = packs["drelu"], Trace()
    async with opened(
        CpuExecutor(), path, **helped(path, CHOICES["the last"], NumpyUnit), trace=trace
    ) as executor:
        expected = [await all_logits(executor, TOKENS[:9]), await all_logits(executor, TOKENS[20:27])]
        parts = (
            Slice(0, 0, page_table(0), TOKENS[:9], logits=True),
            Slice(1, 0, page_table(1), TOKENS[20:27], logits=True),
        )
        binds = (Bind(0, Sampling(), NOTHING), Bind(1, Sampling(), NOTHING))
        executor.submit(Step(1, parts, binds))
        for got, one in zip((await executor.wait()).logits, expected, strict=True):
            assert got is not None
            assert error_of(got, one) < 0.02
    trace.write(tmp_path / "trace.json")
    text = (tmp_path / "trace.json").read_text()
    assert '"layer 1 clusters"' in text
    assert '"layer 0 hand off"' in text
    assert '"layer 0 join"' in text


class Refusing(NumpyUnit):  # type: ignore[misc]
    def load(self, layer: int, weights: ClusterWeights) -> None:
        raise ValueError("no memory")


async def test_what_cannot_be_is_refused(packs: Mapping[str, Path]) -> None:
    path = packs["drelu"]
    for clusters, problem in (
        ({"blk.0.attn_q.weight": (0,)}, "a cluster unit cannot have clusters of 'blk.0.attn_q.weight'"),
        ({"blk.0.ffn_down.weight": (3,)}, r"clusters \[3\] of 'blk.0.ffn_down.weight': ascending numbers from 0 to 2"),
        ({"blk.0.ffn_down.weight": (1, 0)}, r"clusters \[1, 0\] of"),
        ({"blk.0.ffn_down.weight": (0, 0)}, r"clusters \[0, 0\] of"),
    ):  # fmt: skip
        options = {"exact_floats": False, "cluster_unit": NumpyUnit, "unit_clusters": clusters}
        with pytest.raises(RequestError, match=problem):
            async with opened(CpuExecutor(), path, **options):
                pass
    with pytest.raises(
        RequestError,
        match=r"^cluster unit 'numpy': does not load clusters \[0\] of layer 0: ValueError: no memory$",
    ):
        async with opened(CpuExecutor(), path, **helped(path, CHOICES["the first"], Refusing)):
            pass


async def test_need_counts_it(packs: Mapping[str, Path]) -> None:
    path = packs["drelu"]
    options = helped(path, CHOICES["all"], NumpyUnit)
    async with opened(CpuExecutor(), path, max_tokens=32, **options) as executor:
        held = executor.statistics().bytes["cluster_unit"]
        with open_model_file(path) as file:
            model = describe(file)
            counted = unit_bytes(file, model, NumpyUnit(), options["unit_clusters"], 32)
    block = 3 * 1216 * 256 * 4
    assert held == 2 * block + 2 * 4 * 32 * 256  # two layers, and an item
    assert counted == held + 2 * block  # while one is loaded: its parts, and all of it
