"""Gates in the bundles: without a predictor the exact bits, with one what numpy computes of the neurons that it
names."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pi2rt._errors import RequestError
from pi2rt.cython_kernels.kernels import native
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.executors.reference.model import ReferenceModel
from pi2rt.formats import open_model_file
from pi2rt.formats.pack import PackFile
from pi2rt.formats.predictor import Predictor
from pi2rt.formats.quants import dequantize
from pi2rt.memory import StateLayout, StateStore
from pi2rt.models import FeedForward, describe
from pi2rt.models.tensors import iterate_tensors
from pi2rt.planner.learn.predictors import ask_for_all
from pi2rt.planner.pack.bundling import Bundling
from pi2rt.planner.pack.convert import convert, verify
from pi2rt.planner.weights import plan_streaming
from tests.executors.test_experts import READS, planned
from tests.executors.test_sparse import cache_sizes, one_by_one
from tests.support.running import all_logits, opened, stopped_steps_leave_nothing
from tests.support.tiny_models import TinyModel, write_gguf

Floats = npt.NDArray[np.float32]
TOKENS = np.arange(3, 60, dtype=np.int32)
RANK = 40

MODELS = {
    "drelu": (TinyModel("llama", seed=11, dim=256, hidden=1216, layers=2, heads=4, kv_heads=2, head_dim=64,
                        config={"hidden_act": "drelu"}), {}),
    "reglu": (TinyModel("gemma3_text", seed=12, dim=96, hidden=544, layers=3, heads=2, kv_heads=1, head_dim=64,
                        config={"hidden_activation": "relu"}), {"ffn_gate": "Q8_0", "ffn_down": "Q4_1"}),
    "experts": (TinyModel("mixtral", seed=15, dim=256, hidden=640, layers=2, heads=4, kv_heads=2, head_dim=64,
                          config={"hidden_act": "drelu"}), {}),
    "relu2 with biases": (TinyModel("llama", seed=13, dim=256, hidden=640, layers=2, heads=4, kv_heads=2, head_dim=64,
                                    config={"hidden_act": "relu2", "mlp_bias": True}), {"ffn_up": "Q4_1"}),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(MODELS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, types = MODELS[request.param]
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    metadata = {"gemma3.hidden_activation": "relu"} if model.family == "gemma3_text" else {}
    return write_gguf(path, model, weight_type="Q4_0", types=types, metadata=metadata)


@pytest.fixture(scope="module")
def packs(source: Path) -> tuple[Path, Path]:
    """With gates, up and down of a neuron together, and with none of them."""
    bundled, dense = source.with_name("gates.pi2"), source.with_name("off.pi2")
    convert(source, bundled, bundles="gates")
    convert(source, dense, bundles="off")
    return bundled, dense


class Predicted(ReferenceModel):
    """Makes up a predictor for each block it sees, whose bias lies for each neuron in the middle of the widest gap
    between the scores, so that a last bit decides nothing; and computes the neurons that it names."""

    found: dict[str, Predictor]

    def factors(self, block: FeedForward, x: Floats) -> tuple[Floats, Floats | None]:
        gate, up = super().factors(block, x)
        random = np.random.default_rng(len(self.found))
        first = (random.standard_normal((RANK, x.shape[1])) / 16).astype(np.float16)
        second = random.standard_normal((gate.shape[1], RANK)).astype(np.float16)
        y, _ = self.gate_product(block, x)
        scores = (y @ first.T.astype(np.float32)) @ second.T.astype(np.float32)
        if len(scores) < 8:  # of an expert that few tokens chose: all of it
            self.found[block.down.weight] = ask_for_all(gate.shape[1], x.shape[1])
            return gate, up
        order = np.sort(scores, axis=0)[len(scores) // 4 : -len(scores) // 4]
        widest = np.argmax(np.diff(order, axis=0), axis=0)
        bias = -np.take_along_axis(order, np.stack([widest, widest + 1]), axis=0).mean(0)
        self.found[block.down.weight] = Predictor(first, second, bias.astype(np.float32))
        return np.where(scores + bias > 0, gate, np.float32(0)), up


def reference(source: Path) -> tuple[Floats, dict[str, Predictor]]:
    """Logits of TOKENS, and the predictors they were computed with."""
    with open_model_file(source) as file:
        model = describe(file)
        weights = {
            name: dequantize(file.tensors[name].type, file.read(name), file.tensors[name].shape)
            for name, _ in iterate_tensors(model)
        }
    computed = Predicted(model, weights, StateStore(StateLayout.of(model, "f32"), 1))
    computed.found = {}
    return computed.logits(computed.forward(TOKENS, 0, np.zeros(1, np.int32))), computed.found


async def logits(path: Path, **options: object) -> Floats:
    async with opened(CpuExecutor(), path, exact_floats=False, **options) as executor:
        return await all_logits(executor, TOKENS)


def test_a_neuron_is_all_together(source: Path, packs: tuple[Path, Path]) -> None:
    with PackFile(packs[0]) as file, open_model_file(source) as original:
        assert len(file.bundles) == len(list(describe(original).feed_forwards()))
        for each in file.bundles.values():
            assert each.gate is not None
            assert each.up is not None
            pages = np.empty(each.nbytes, np.uint8)
            file.read_bundles_into(each, 0, pages.data)
            for name, at in ((each.gate, 0), (each.up, each.gate_bytes)):
                info = original.tensors[name]
                expected = dequantize(info.type, original.read(name), info.shape)
                assert file.tensors[name].layout == "neurons"
                found = native.unbundle_up(
                    info.type, pages, file.read(name), *info.shape, each.layout, at_byte=at
                )
                np.testing.assert_array_equal(found, expected)
            info = original.tensors[each.down]
            down = native.unbundle_down(info.type, pages, file.read(each.down), *info.shape, each.layout)
            np.testing.assert_array_equal(down, dequantize(info.type, original.read(each.down), info.shape))
    assert verify(packs[0]) == ()


@pytest.mark.parametrize("kernels", [name for name, runs, _ in native.variants() if runs])
async def test_without_a_predictor_nothing_is_lost(packs: tuple[Path, Path], kernels: str) -> None:
    expected = await logits(packs[1], kernels=kernels)
    np.testing.assert_array_equal(await logits(packs[0], kernels=kernels), expected)
    size, cluster, _ = cache_sizes(packs[0])
    given = {"exact_floats": False, "kernels": kernels, "neuron_bytes": cluster * size}
    async with opened(CpuExecutor(), packs[0], **given) as executor:
        np.testing.assert_array_equal(await one_by_one(executor, TOKENS), expected)


async def test_numpy_computes_the_same_on_every_instruction_set(
    source: Path, packs: tuple[Path, Path]
) -> None:
    expected, predictors = reference(source)
    exact = await logits(packs[1])
    found = [
        await logits(packs[0], predictors=predictors, kernels=name, activations="int16")
        for name, runs, _ in native.variants()
        if runs
    ]
    for each in found[1:]:
        np.testing.assert_array_equal(each, found[0])
    scale = np.abs(expected).max()
    assert np.abs(found[0] - expected).max() < 3e-3 * scale
    assert np.abs(exact - expected).max() > 3e-2 * scale


@pytest.mark.parametrize(("pipeline", "cores"), [("cluster", 1), ("cluster", 3), ("matrix", 2), ("none", 2)])
async def test_streamed_is_resident_bit_for_bit(
    source: Path, packs: tuple[Path, Path], pipeline: str, cores: int
) -> None:
    _, predictors = reference(source)
    size, cluster, pages = cache_sizes(packs[0])
    expected = await logits(packs[0], predictors=predictors)
    given = {
        "exact_floats": False,
        "cores": (0, 1, 0)[:cores],
        "pipeline": pipeline,
        "predictors": predictors,
    }
    for slots in (cluster, pages - 1):
        async with opened(CpuExecutor(), packs[0], **given, neuron_bytes=slots * size) as executor:
            np.testing.assert_array_equal(await one_by_one(executor, TOKENS), expected)
            np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)
            assert executor.statistics().flash.neurons.misses > 0
            assert executor.statistics().bytes["predictors"] > 0


WIDE = TinyModel("llama", seed=15, dim=1408, hidden=608, layers=2, heads=2, kv_heads=1, head_dim=64,
                 config={"hidden_act": "drelu"})  # fmt: skip
"""A neuron takes two sectors: its gate and most of its row of up are in the first."""


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Predictor]]:
    """A pack of it, and predictors."""
    source = write_gguf(tmp_path_factory.mktemp("wide") / "m.gguf", WIDE, weight_type="Q8_0")
    convert(source, source.with_name("gates.pi2"), bundles="gates")
    return source.with_name("gates.pi2"), reference(source)[1]


@pytest.mark.parametrize(
    ("pipeline", "io", "cores"),
    [("cluster", "auto", 1), ("cluster", "preadv", 3), ("matrix", "auto", 2), ("none", "auto", 2)],
)
async def test_two_phases_change_no_bit_and_read_less(
    wide: tuple[Path, dict[str, Predictor]], pipeline: str, io: str, cores: int
) -> None:
    path, predictors = wide
    size, cluster, pages = cache_sizes(path)
    assert size == 8192
    for given in (predictors, {}):
        expected = await logits(path, predictors=given)
        options = {"exact_floats": False, "predictors": given, "cores": (0, 1, 0)[:cores], "io": io}
        for slots in (cluster, pages - 1):
            read = []
            for two_phase in (False, True):
                more = {"neuron_bytes": slots * size, "pipeline": pipeline, "two_phase": two_phase}
                async with opened(CpuExecutor(), path, **options, **more) as executor:
                    loaded = executor.statistics().flash.bytes
                    np.testing.assert_array_equal(await one_by_one(executor, TOKENS), expected)
                    np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)
                    flash = executor.statistics().flash
                    read.append(flash.bytes - loaded)
                    assert (flash.neurons.completed > 0) is two_phase
            if slots == cluster:  # nothing stays long enough to be asked for again
                assert read[1] < 0.9 * read[0]


async def test_a_step_stopped_between_two_phases_leaves_nothing_behind(
    wide: tuple[Path, dict[str, Predictor]],
) -> None:
    path, predictors = wide
    size, cluster, _ = cache_sizes(path)
    given = {"exact_floats": False, "neuron_bytes": cluster * size, "two_phase": True}
    async with opened(CpuExecutor(), path, **given, predictors=predictors) as executor:
        expected = await all_logits(executor, TOKENS)
        await stopped_steps_leave_nothing(executor, TOKENS, expected, 40)


async def test_two_phases_are_refused_where_there_is_nothing_to_save(packs: tuple[Path, Path]) -> None:
    size, cluster, _ = cache_sizes(packs[0])
    with pytest.raises(RequestError, match="two_phase is for bundles with gates"):
        async with opened(
            CpuExecutor(), packs[0], exact_floats=False, two_phase=True, neuron_bytes=cluster * size
        ):
            pass


async def test_who_is_not_named_is_not_read(source: Path, packs: tuple[Path, Path]) -> None:
    """Predictors that name the upper half of the neurons, whatever the input."""
    _, predictors = reference(source)
    halves = {
        name: Predictor(
            np.zeros_like(each.first),
            each.second,
            np.where(np.arange(len(each.bias)) % 64 < 32, 1, -1).astype("f4"),
        )
        for name, each in predictors.items()
    }
    asked = []
    for given in ({}, halves):
        async with opened(CpuExecutor(), packs[0], exact_floats=False, predictors=given) as executor:
            await all_logits(executor, TOKENS)
            asked.append(executor.statistics().flash.neurons.hits)
    assert 0.4 * asked[0] < asked[1] < 0.7 * asked[0]


async def test_predictors_that_do_not_fit_are_refused(source: Path, packs: tuple[Path, Path]) -> None:
    _, predictors = reference(source)
    name, good = next(iter(predictors.items()))
    cases = [
        (packs[1], good, "are not in bundles: nothing to predict"),
        (packs[0], Predictor(good.first[:, 1:], good.second, good.bias), "a predictor of shapes"),
        (packs[0], Predictor(good.first, good.second[1:], good.bias), "a predictor of shapes"),
        (
            packs[0],
            Predictor(good.first * np.float16(np.inf), good.second, good.bias),
            "holds NaN or infinity",
        ),
    ]
    for path, predictor, message in cases:
        with pytest.raises(RequestError, match=message):
            async with opened(CpuExecutor(), path, exact_floats=False, predictors={name: predictor}):
                pass


EXPERTS = {
    "gates": TinyModel("mixtral", seed=2, dim=128, hidden=320, layers=2, heads=2, kv_heads=1, head_dim=64,
                       config={"hidden_act": "drelu"}),
    "all": TinyModel("qwen2_moe", seed=3, dim=128, expert_hidden=160, shared_hidden=320, layers=2, heads=2, kv_heads=1,
                     head_dim=64),
}  # fmt: skip


@pytest.mark.parametrize("bundles", EXPERTS)
async def test_experts_lose_nothing_either(tmp_path: Path, bundles: Bundling) -> None:
    """Experts with their gates in bundles, and SiLU experts in bundles, with all the memory and with the least."""
    source = write_gguf(tmp_path / "m.gguf", EXPERTS[bundles], weight_type="Q4_0")
    convert(source, tmp_path / "off.pi2", bundles="off")
    convert(source, tmp_path / "m.pi2", bundles=bundles)
    with open_model_file(tmp_path / "m.pi2") as file:
        assert len(file.bundles) == 2 * (4 if bundles == "gates" else 5)
        plan = plan_streaming(file, describe(file), 0, reads=READS)
    expected = await logits(tmp_path / "off.pi2")
    np.testing.assert_array_equal(await logits(tmp_path / "m.pi2"), expected)
    async with planned(tmp_path / "m.pi2", plan) as executor:
        np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)
        assert executor.statistics().flash.neurons.misses > 0
