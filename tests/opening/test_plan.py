"""A plan says what a runtime does, and a runtime does what a plan says: for each place where weights may lie."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import trio

import pi2rt
from pi2rt._errors import MemoryBudgetError, RequestError
from pi2rt.formats.placement import Placement
from pi2rt.formats.plan import Plan, parse_plan, plan_text, read_plan, write_plan
from pi2rt.opening.opening import Opening
from pi2rt.opening.options import RuntimeKeywords
from pi2rt.opening.own_memory import OWN
from pi2rt.opening.plan_making import CHOICES
from pi2rt.planner.pack.convert import convert
from tests.support.numpy_unit import NumpyUnit
from tests.support.tiny_models import TinyModel, write_gguf

DENSE = TinyModel("llama", dim=512, hidden=2048, layers=8, heads=4, kv_heads=2, head_dim=64)
RELU = replace(DENSE, hidden=4096, config={"hidden_act": "drelu"})
EXPERTS = TinyModel("mixtral", dim=512, hidden=1024, layers=4, heads=4, kv_heads=2, head_dim=64)


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("plan")
    made = {}
    for name, model in (("dense", DENSE), ("relu", RELU), ("experts", EXPERTS)):
        source = write_gguf(folder / f"{name}.gguf", model, weight_type="Q4_0")
        convert(source, folder / f"{name}.pi2")
        made[name] = folder / f"{name}.pi2"
    return made


@pytest.fixture(autouse=True)
def own_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process takes by itself, which differs by pages from one opening to the next, and would decide what is
    streamed."""
    monkeypatch.setattr(OWN, "before_tokenizer", lambda description: 100 << 20)
    monkeypatch.setattr(OWN, "with_tokenizer", lambda description: 100 << 20)


KINDS = {
    "resident": ("dense", None, set()),
    "streamed": ("dense", 0.5, {Placement.STREAMED, Placement.BY_ROW}),
    "neurons": ("relu", 0.5, {Placement.NEURONS, Placement.BY_ROW}),
    "experts": ("experts", 0.5, {Placement.PAGED, Placement.BY_ROW}),
}


async def least_memory(pack: Path, share: float | None, context: int = 128) -> int | None:
    """A budget with room for this share of the weights."""
    if share is None:
        return None
    opening = await Opening.of(pack, {"context": context, "memory": 1 << 30})
    segments, nbytes = opening.plan.segments, opening.plan.model.nbytes
    opening.close()
    return segments.process + segments.kv + segments.activations + int(share * nbytes) + (2 << 20)


@pytest.mark.parametrize("kind", KINDS)
async def test_a_runtime_does_what_its_plan_says(packs: dict[str, Path], kind: str, tmp_path: Path) -> None:
    """Without a file, and with the file that ``plan`` writes: the same options of the executor, the same text."""
    name, share, places = KINDS[kind]
    options: RuntimeKeywords = {"context": 128, "memory": await least_memory(packs[name], share)}
    opening = await Opening.of(packs[name], options)
    plan = opening.plan
    assert set(plan.placements.values()) == places
    opening.close()
    write_plan(tmp_path / "plan.json", plan)
    assert read_plan(tmp_path / "plan.json") == plan
    again = await Opening.of(packs[name], {"plan": tmp_path / "plan.json"})
    assert again.plan == plan
    assert [asdict(each) for each in again.options] == [asdict(each) for each in opening.options]
    again.close()
    texts = []
    for given in (options, {"plan": tmp_path / "plan.json"}, {"plan": plan}, {"context": 128}):
        async with pi2rt.open_runtime(packs[name], **given) as runtime:  # type: ignore[arg-type]
            texts.append((await runtime.generate("Once", max_tokens=20, ignore_eos=True)).tokens)
    assert len(set(texts)) == 1


async def plan_of(path: Path, **options: Any) -> Plan:
    prefill, unit = options.pop("prefill", ()), options.pop("cluster_unit", None)
    opening = await Opening.of(path, options, prefill=prefill, cluster_unit=unit)  # type: ignore[arg-type]
    opening.close()
    return opening.plan


async def refused(path: Path, plan: Plan, **options: Any) -> str:
    with pytest.raises(RequestError) as caught:
        await Opening.of(path, {"plan": plan, **options})  # type: ignore[misc]
    return str(caught.value)


async def test_a_plan_of_another_model_is_refused_with_the_difference(packs: dict[str, Path]) -> None:
    plan = await plan_of(packs["dense"], context=128)
    message = await refused(packs["relu"], plan)
    assert "fingerprint: " in message
    assert f"nbytes: {plan.model.nbytes} in the plan, " in message
    assert "make another one with 'pi2rt plan'" in message


async def test_a_plan_of_another_machine_is_refused(packs: dict[str, Path]) -> None:
    plan = await plan_of(packs["dense"], context=128)
    units = [msgspec.structs.replace(plan.units[0], cores=[0, 4093, 4095])]
    message = await refused(packs["dense"], msgspec.structs.replace(plan, units=units))
    assert "cores of unit 'cpu': 4093, 4095 in the plan, not among those of this process" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"memory": "2G"}, "memory=2147483648 contradicts the plan, which has None"),
        ({"context": 64}, "context=64 contradicts the plan, which has 128"),
        ({"kv_type": "q8"}, "kv_type='q8' contradicts the plan, which has 'f16'"),
        ({"max_sequences": 3}, "max_sequences=3 contradicts the plan, which has 8"),
        ({"executor": "reference"}, "executor='reference' contradicts the plan, which has 'cpu'"),
        ({"activations": "int8"}, "activations='int8' contradicts the plan, which has 'mixed'"),
        ({"threads": 1}, "threads=1: the plan says which cores compute; leave it out"),
    ],
)
async def test_options_may_not_contradict_a_plan(
    packs: dict[str, Path], given: dict[str, Any], message: str
) -> None:
    assert await refused(packs["dense"], await plan_of(packs["dense"], context=128), **given) == message


async def test_options_may_repeat_a_plan(packs: dict[str, Path]) -> None:
    plan = await plan_of(packs["dense"], context=128, kv_type="q8", memory="1G")
    given: RuntimeKeywords = {
        "kv_type": "q8",
        "memory": 1 << 30,
        "threads": None,
        "max_queue": 3,
        "plan": plan,
    }
    opening = await Opening.of(packs["dense"], given)
    assert opening.engine_options().max_queue == 3
    opening.close()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda plan: {"placements": {**plan.placements, "nowhere": Placement.STREAMED}},
            "'nowhere' is not in the model",
        ),
        (
            lambda plan: {"placements": {**plan.placements, "output_norm.weight": Placement.STREAMED}},
            "'output_norm.weight' is streamed, which takes the layout 'blocks16'",
        ),
        (lambda plan: {"placements": {}}, "bytes for 0 streamed tensors, which take 0 at least"),
        (
            lambda plan: {"segments": msgspec.structs.replace(plan.segments, ring=4096)},
            "a ring of 4096 bytes for ",
        ),
        (
            lambda plan: {"segments": msgspec.structs.replace(plan.segments, experts=1 << 20)},
            "0 tensors are paged: all of the experts' matrices are, or none",
        ),
    ],
)
async def test_what_cannot_be_is_refused(
    packs: dict[str, Path], change: Callable[[Plan], dict[str, Any]], message: str
) -> None:
    """A plan from a stranger, or one that was edited."""
    plan = await plan_of(packs["dense"], context=128, memory=await least_memory(packs["dense"], 0.5))
    assert message in await refused(packs["dense"], msgspec.structs.replace(plan, **change(plan)))


async def test_a_plan_keeps_to_its_budget(packs: dict[str, Path]) -> None:
    memory = await least_memory(packs["dense"], 0.5)
    plan = await plan_of(packs["dense"], context=128, memory=memory)
    segments = msgspec.structs.replace(plan.segments, ring=plan.segments.ring + (1 << 30))
    with pytest.raises(
        MemoryBudgetError, match=r"^the plan takes \d+ MiB, more than its memory of \d+ MiB: resident"
    ):
        await Opening.of(packs["dense"], {"plan": msgspec.structs.replace(plan, segments=segments)})


async def test_another_placement_is_obeyed(packs: dict[str, Path]) -> None:
    """One more tensor streamed than the planner chose: more bytes are read in a step, and the text is the same."""
    memory = await least_memory(packs["dense"], 0.4)
    assert memory is not None
    plan = await plan_of(packs["dense"], context=128, memory=memory)
    moved = next(
        f"blk.{i}.attn_q.weight" for i in range(8) if f"blk.{i}.attn_q.weight" not in plan.placements
    )
    texts, read = [], []
    for placements in (plan.placements, {**plan.placements, moved: Placement.STREAMED}):
        forced = msgspec.structs.replace(plan, placements=placements)
        async with pi2rt.open_runtime(packs["dense"], plan=forced) as runtime:
            texts.append((await runtime.generate("Once", max_tokens=20, ignore_eos=True)).tokens)
            recent = runtime.statistics().actors[0].executor.recent
            read.append(min(use.streamed_bytes for use in recent))
    assert texts[0] == texts[1]
    assert read[1] > read[0]


PROMPT = list(range(3, 203))


@pytest.mark.parametrize("memory", [None, 0.2])
async def test_a_second_cpu_executor_computes_prompts(packs: dict[str, Path], memory: float | None) -> None:
    """The same bits as with one lane."""
    options: dict[str, Any] = {"context": 256, "memory": await least_memory(packs["dense"], memory, 256)}
    async with pi2rt.open_runtime(packs["dense"], **options) as runtime:
        expected = await runtime.generate(PROMPT, max_tokens=20, logprobs=5, ignore_eos=True)
    if memory is not None:
        options["memory"] += (await plan_of(packs["dense"], context=256, prefill=["cpu"])).segments.lanes
    plan = await plan_of(packs["dense"], prefill=["cpu"], **options)
    assert bool(plan.placed(Placement.STREAMED)) == (memory is not None)
    assert [lane.name for lane in plan.lanes] == ["cpu", "cpu prefill"]
    async with pi2rt.open_runtime(packs["dense"], plan=plan) as runtime:
        got: list[pi2rt.Completion] = []

        async def ask() -> None:
            got.append(await runtime.generate(PROMPT, max_tokens=20, logprobs=5, ignore_eos=True))

        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(ask)
        statistics = runtime.statistics()
        decode, prefill = statistics.engine.lanes
        assert prefill.prefill_tokens >= len(PROMPT) - 1
        assert decode.prefill_tokens < prefill.prefill_tokens
        assert [actor.name for actor in statistics.actors if actor.name != "flash"] == ["cpu", "cpu prefill"]
        assert [channel.name for channel in statistics.channels] == ["cpu.inbox", "cpu prefill.inbox"]
    for each in got:
        assert (each.tokens, each.logprobs, each.top_logprobs) == (
            expected.tokens,
            expected.logprobs,
            expected.top_logprobs,
        )


async def test_the_reference_executor_computes_prompts(packs: dict[str, Path], tmp_path: Path) -> None:
    """Of a file without bundles. Another executor computes otherwise: within a tolerance."""
    source = packs["dense"].with_suffix(".gguf")
    options: dict[str, Any] = {"context": 256, "activations": "int16"}
    async with pi2rt.open_runtime(source, **options) as runtime:
        expected = await runtime.generate(PROMPT, max_tokens=20, logprobs=0, ignore_eos=True)
    trace = tmp_path / "trace.json"
    plan = await plan_of(source, prefill=["reference"], **options)
    async with pi2rt.open_runtime(source, plan=plan, trace=trace) as runtime:
        got = await runtime.generate(PROMPT, max_tokens=20, logprobs=0, ignore_eos=True)
        assert runtime.statistics().engine.lanes[1].prefill_tokens == len(PROMPT) - 1
    np.testing.assert_allclose(got.logprobs[0], expected.logprobs[0], atol=0.05)
    assert '"steps of reference"' in trace.read_text()


async def test_a_lane_that_keeps_its_own_state_is_refused(packs: dict[str, Path]) -> None:
    plan = await plan_of(packs["dense"], prefill=["simulated"], context=128)
    with pytest.raises(
        RequestError, match=r"^the executor 'simulated' keeps the state of sequences by itself: it"
    ):
        async with pi2rt.open_runtime(packs["dense"], plan=plan):
            pass


async def test_all_choices_are_recorded(packs: dict[str, Path]) -> None:
    plan = await plan_of(packs["dense"], context=100, max_sequences=3, kv_type="q8", read_deadline=None)
    again = parse_plan(plan_text(plan).encode())
    assert again == plan
    assert set(CHOICES) | {"memory", "cache"} == set(plan.choices.__struct_fields__)
    assert (plan.choices.context, plan.choices.max_sequences, plan.choices.kv_type) == (100, 3, "q8")


async def test_a_prefill_lane_counts_in_the_budget(packs: dict[str, Path]) -> None:
    """It has weights of its own: what had room alone is streamed beside it, or refused."""
    process = (await plan_of(packs["dense"], context=128, memory="64G")).segments.process
    memory = process + (64 << 20)
    alone = await plan_of(packs["dense"], context=128, memory=memory)
    beside = await plan_of(packs["dense"], context=128, memory=memory, prefill=["cpu"])
    assert alone.segments.lanes == 0
    assert beside.segments.lanes > alone.segments.resident
    assert beside.segments.process == alone.segments.process
    least = alone.segments.process + beside.segments.lanes
    with pytest.raises(MemoryBudgetError, match="weights and activations of prefill lanes"):
        await plan_of(packs["dense"], context=128, memory=least, prefill=["cpu"])
    short = msgspec.structs.replace(beside, choices=msgspec.structs.replace(beside.choices, memory=least))
    with pytest.raises(MemoryBudgetError):
        await Opening.of(packs["dense"], {"plan": short})


@pytest.fixture
def numpy_unit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A distribution that plugs in the cluster unit of the examples."""
    info = tmp_path / "units-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: units\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[pi2rt.cluster_units]\nnumpy = tests.support.numpy_unit:NumpyUnit\n"
    )
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.usefixtures("numpy_unit")
async def test_a_forced_plan_with_a_cluster_unit(packs: dict[str, Path], tmp_path: Path) -> None:
    """Beside the processor's sparse blocks, streamed and within a budget: near the exact result."""
    memory = await least_memory(packs["relu"], 0.5)
    assert memory is not None
    options = {"context": 128, "memory": memory + (80 << 20)}
    plan = await plan_of(packs["relu"], cluster_unit="numpy=2", **options)
    assert plan.cluster_unit is not None
    assert plan.cluster_unit.clusters == {f"blk.{layer}.ffn_down.weight": [0, 1] for layer in range(8)}
    assert plan.segments.unit >= 8 * 2 * 512 * 3 * 512 * 4
    assert plan.segments.total <= options["memory"]
    write_plan(tmp_path / "plan.json", plan)
    trace = tmp_path / "trace.json"
    async with pi2rt.open_runtime(packs["relu"], context=128) as runtime:
        expected = await runtime.generate(PROMPT[:99], max_tokens=1, logprobs=5, ignore_eos=True)
    async with pi2rt.open_runtime(packs["relu"], plan=tmp_path / "plan.json", trace=trace) as runtime:
        got = await runtime.generate(PROMPT[:99], max_tokens=8, logprobs=5, ignore_eos=True)
        statistics = runtime.statistics()
    assert got.logprobs is not None
    assert expected.logprobs is not None
    np.testing.assert_allclose(got.logprobs[0], expected.logprobs[0], atol=0.05)
    (node,) = (node for node in statistics.nodes if node.name == "numpy")
    assert (node.kind, node.state, node.threads) == ("cluster unit", "ready", 1)
    assert node.units["items"] % 8 == 0
    assert node.busy_ns > 0
    edges = {edge.name: edge for edge in statistics.edges}
    assert edges["numpy.handoff"].passed == edges["numpy.join"].passed == node.units["items"] > 0
    assert '"layer 7 clusters"' in trace.read_text()


@pytest.mark.usefixtures("numpy_unit")
async def test_a_cluster_unit_that_is_lost_costs_one_request(
    packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    multiply, unplugged = NumpyUnit.multiply, False

    def breaks(self: NumpyUnit, layer: int, x: object, out: object) -> None:
        if unplugged:
            raise RuntimeError("unplugged")
        multiply(self, layer, x, out)

    monkeypatch.setattr(NumpyUnit, "multiply", breaks)
    plan = await plan_of(packs["relu"], context=128, cluster_unit="numpy=1")
    async with pi2rt.open_runtime(packs["relu"], context=128) as runtime:
        expected = await runtime.generate(PROMPT[:99], max_tokens=8, ignore_eos=True)
    async with pi2rt.open_runtime(packs["relu"], plan=plan) as runtime:
        await runtime.generate(PROMPT[99:], max_tokens=1)  # another one: its KV pages may be used again
        unplugged = True
        with pytest.raises(pi2rt.ExecutorError, match="cluster unit 'numpy' failed: RuntimeError: unplugged"):
            await runtime.generate(PROMPT[120:], max_tokens=1)
        again = await runtime.generate(PROMPT[:99], max_tokens=8, ignore_eos=True)
        (node,) = (node for node in runtime.statistics().nodes if node.kind == "cluster unit")
    assert again.tokens == expected.tokens
    assert node.state == "lost"


@pytest.mark.usefixtures("numpy_unit")
async def test_a_cluster_unit_is_priced(packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """By what is measured: one that takes no time gets clusters, one that takes long gets none, and says so."""
    price = "pi2rt.planner.cluster_units._unit_seconds"
    monkeypatch.setattr(price, lambda name, make, block, dim: (1e-9, 1e-9))
    plan = await plan_of(packs["relu"], context=128, cluster_unit="numpy")
    assert plan.cluster_unit is not None
    assert all(len(numbers) >= 7 for numbers in plan.cluster_unit.clusters.values())
    monkeypatch.setattr(price, lambda name, make, block, dim: (1.0, 1.0))
    plan = await plan_of(packs["relu"], context=128, cluster_unit="numpy")
    assert plan.cluster_unit is None
    assert plan.segments.unit == 0
    (hop,) = (each for each in plan.predictions if each.what == "hand-off to the cluster unit and back")
    assert hop.basis == "measured; too much to pay: no clusters are handed off"
    monkeypatch.undo()


@pytest.mark.usefixtures("numpy_unit")
async def test_a_price_is_measured(packs: dict[str, Path]) -> None:
    plan = await plan_of(packs["relu"], context=128, cluster_unit="numpy")
    priced = {each.what: each.low for each in plan.predictions if each.unit == "seconds"}
    assert len(priced) == 3
    assert all(value is not None and 0 <= value < 1 for value in priced.values())
    assert priced["a neuron cluster on the processor"]


@pytest.mark.usefixtures("numpy_unit")
async def test_cluster_units_that_cannot_be(packs: dict[str, Path]) -> None:
    for name, unit, problem in (
        ("dense", "numpy", "has no block for it: that takes feed-forward blocks by themselves"),
        ("relu", "numpy=9", "the number of neuron clusters in each block is 1 to 8 here"),
        ("relu", "numpy=x", "the number of neuron clusters in each block is 1 to 8 here"),
        ("relu", "nobody", "no cluster unit 'nobody'; available: numpy"),
    ):
        with pytest.raises(RequestError, match=problem):
            await plan_of(packs[name], context=128, cluster_unit=unit)
    with pytest.raises(RequestError, match="the executor 'reference' works with no cluster unit"):
        await plan_of(packs["relu"], context=128, cluster_unit="numpy=1", executor="reference")
    plan = await plan_of(packs["relu"], context=128, cluster_unit="numpy=1")
    assert plan.cluster_unit is not None
    for clusters, problem in (
        ({"blk.0.ffn_down.weight": [8]}, "ascending numbers from 0 to 7 are needed"),
        ({"blk.0.ffn_up.weight": [0]}, "a cluster unit cannot have clusters of 'blk.0.ffn_up.weight'"),
    ):
        unit = msgspec.structs.replace(plan.cluster_unit, clusters=clusters)
        assert problem in await refused(packs["relu"], msgspec.structs.replace(plan, cluster_unit=unit))
    least = await least_memory(packs["relu"], 0.0)
    with pytest.raises(MemoryBudgetError, match=r"weights and queue of a cluster unit \d+ MiB"):
        await plan_of(packs["relu"], context=128, cluster_unit="numpy=8", memory=least)


class Unpriced(NumpyUnit):  # type: ignore[misc]
    def load(self, layer: int, weights: object) -> None:
        raise ValueError("the device is gone")


class Unmeasured(NumpyUnit):  # type: ignore[misc]
    def multiply(self, layer: int, x: object, out: object) -> None:
        raise OverflowError("too warm")


@pytest.mark.usefixtures("numpy_unit")
async def test_a_unit_that_cannot_be_measured_is_named(
    packs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for unit, problem in (
        (Unpriced, "cluster unit 'numpy' loads no weights: ValueError: the device is gone"),
        (Unmeasured, "cluster unit 'numpy' cannot be measured: OverflowError: too warm"),
    ):
        monkeypatch.setattr(
            "pi2rt.planner.cluster_units.load_cluster_unit", lambda name, options, unit=unit: unit
        )
        with pytest.raises(RequestError, match=f"^{problem}$"):
            await plan_of(packs["relu"], context=128, cluster_unit="numpy")


@pytest.mark.usefixtures("numpy_unit")
async def test_a_cluster_unit_has_the_name_of_the_plan(packs: dict[str, Path]) -> None:
    """Whatever it calls itself."""
    plan = await plan_of(packs["relu"], context=128, cluster_unit="numpy=1")
    assert plan.cluster_unit is not None
    named = msgspec.structs.replace(plan.cluster_unit, name="dsp")
    async with pi2rt.open_runtime(
        packs["relu"], plan=msgspec.structs.replace(plan, cluster_unit=named)
    ) as runtime:
        await runtime.generate("Once", max_tokens=1)
        (node,) = (node for node in runtime.statistics().nodes if node.kind == "cluster unit")
    assert (node.name, node.threads) == ("dsp", 1)
    assert node.busy_ns > 0
