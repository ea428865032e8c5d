"""Mixtures of experts on the cpu executor: the same bits wherever an expert's weights lie; the values are checked
against Transformers in test_cpu.py."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi2rt._errors import ModelFormatError
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.formats import ModelFile, open_model_file, row_blocks
from pi2rt.formats.placement import Placement
from pi2rt.models import ModelDescription, describe
from pi2rt.planner.pack.convert import convert, verify
from pi2rt.planner.weights import StreamingPlan, expert_operations, plan_streaming
from pi2rt.runtime.executor import ExecutorOptions, StepExecutor
from pi2rt.runtime.flash_reads import FlashReads
from pi2rt.runtime.trace import Trace
from pi2rt.testing import StepExecutorConformance, Tolerance
from tests.executors.test_sparse import one_by_one
from tests.support.running import all_logits, opened
from tests.support.tiny_models import TinyModel, write_gguf

TOKENS = np.arange(3, 40, dtype=np.int32)
SIZES: dict[str, Any] = {"dim": 256, "layers": 2, "heads": 4, "kv_heads": 2, "head_dim": 64}

MODELS = {
    "silu": (TinyModel("mixtral", seed=1, hidden=608, **SIZES), "Q4_K", {"ffn_down_exps": "Q4_1"}),
    "drelu": (TinyModel("mixtral", seed=2, hidden=1216, config={"hidden_act": "drelu"}, **SIZES), "Q4_0", {}),
    "shared": (TinyModel("qwen2_moe", seed=3, expert_hidden=160, shared_hidden=320, **SIZES), "Q8_0", {}),
    "reglu": (TinyModel("qwen3_moe", seed=4, expert_hidden=544, config={"hidden_act": "relu"}, **SIZES), "Q4_0",
              {"ffn_up_exps": "Q8_0"}),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(MODELS))
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A GGUF file, and its pack, which has the neurons of ReLU experts in bundles."""
    folder = tmp_path_factory.mktemp(request.param)
    model, weight_type, types = MODELS[request.param]
    source = write_gguf(folder / "m.gguf", model, weight_type=weight_type, types=types)
    convert(source, folder / "m.pi2")
    return source, folder / "m.pi2"


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a matrix has several."""
    monkeypatch.setattr(row_blocks, "PAGE_BYTES", 16 << 10)


READS = FlashReads(stream_bytes=16384)
"""So that a streamed matrix has many pieces."""


def least_plan(path: Path, more: int = 0) -> StreamingPlan:
    """With as little of the experts in memory as can be, and ``more`` bytes."""
    with open_model_file(path) as file:
        model = describe(file)
        least = plan_streaming(file, model, 0, reads=READS)
        plan = plan_streaming(file, model, least.nbytes + more, reads=READS)
    assert plan.placed(Placement.PAGED)
    return plan


def paged(path: Path) -> dict[str, Placement]:
    return dict.fromkeys(least_plan(path).placed(Placement.PAGED), Placement.PAGED)


@asynccontextmanager
async def planned(path: Path, plan: StreamingPlan, **options: Any) -> AsyncGenerator[CpuExecutor]:
    given = {
        "placements": plan.placements, "ring_bytes": plan.ring_bytes, "expert_bytes": plan.expert_bytes,
        "neuron_bytes": plan.neuron_bytes, "reads": READS,
    }  # fmt: skip
    executor = CpuExecutor()
    async with opened(executor, path, exact_floats=False, **given, **options):
        yield executor


def test_a_pack_is_whole_and_says_the_same(files: tuple[Path, Path]) -> None:
    assert verify(files[1]) == ()
    with open_model_file(files[0]) as source, open_model_file(files[1]) as pack:
        assert describe(pack) == describe(source)
        blocks = list(describe(pack).feed_forwards())
        relu = blocks[0].activation == "relu"
        assert set(pack.bundles) == ({block.down.weight for block in blocks} if relu else set())


@pytest.mark.parametrize("activations", ["int16", "mixed"])
async def test_packs_have_the_logits_of_their_source(files: tuple[Path, Path], activations: str) -> None:
    logits = []
    for path in files:
        async with opened(CpuExecutor(), path, exact_floats=False, activations=activations) as executor:
            logits += [await all_logits(executor, TOKENS), await one_by_one(executor, TOKENS)]
    for each in logits[1:]:
        np.testing.assert_array_equal(each, logits[0])


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize(("cores", "io"), [((0,), "auto"), ((0, 1), "preadv"), ((0, 1, 0), "auto")])
async def test_what_the_caches_hold_changes_no_bit(
    files: tuple[Path, Path], cores: tuple[int, ...], io: str
) -> None:
    async with opened(CpuExecutor(), files[1], exact_floats=False) as executor:
        expected = await all_logits(executor, TOKENS)
    for more in (0, 300_000):
        async with planned(files[1], least_plan(files[1], more), cores=cores, io=io) as executor:
            np.testing.assert_array_equal(await one_by_one(executor, TOKENS), expected)
            np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)
            experts = executor.statistics().flash.experts
            assert experts.early > 0
            assert experts.evictions > 0


@pytest.mark.usefixtures("small_pages")
def test_pages_cover_every_matrix_of_an_expert(files: tuple[Path, Path]) -> None:
    with open_model_file(files[1]) as file:
        model = describe(file)
        names = {info.name for infos in expert_operations(file, model) for info in infos}
        expected = {
            linear.weight
            for layer in model.layers
            for block in layer.blocks[1:]
            for each in map(block.expert, range(block.n_experts))  # type: ignore[union-attr]
            for linear in (each.gate, each.up, each.down)
            if linear is not None and file.tensors[linear.weight].layout == "blocks16"
        }
        assert names == expected
        for name in names:
            info = file.tensors[name]
            blocks = row_blocks.page_blocks(info.type, *info.shape)
            size = row_blocks.page_bytes(info.type, *info.shape)
            used = blocks * row_blocks.row_block_bytes(info.type, info.shape[1])
            assert size == used or blocks * row_blocks.ROWS >= info.shape[0]


@pytest.mark.usefixtures("small_pages")
async def test_a_file_that_shrinks_fails_the_step_and_no_other(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "m.pi2"
    whole = files[1].read_bytes()
    path.write_bytes(whole)
    plan = replace(least_plan(path), placements=paged(path), ring_bytes=0)  # experts alone are read
    async with planned(path, plan) as executor:
        expected = await one_by_one(executor, TOKENS)
        with path.open("r+b") as file:
            file.truncate(row_blocks.SECTOR * 20)
        with pytest.raises(
            ModelFormatError,
            match=f"reading weights: the file ends too early at byte {row_blocks.SECTOR * 20}: ",
        ):
            await one_by_one(executor, TOKENS)
        path.write_bytes(whole)
        np.testing.assert_array_equal(await one_by_one(executor, TOKENS), expected)


async def test_reads_of_experts_are_in_the_trace(
    files: tuple[Path, Path], small_pages: None, tmp_path: Path
) -> None:
    trace = Trace()
    plan = least_plan(files[1])
    async with planned(files[1], plan, trace=trace) as executor:
        before = executor.statistics().flash
        await one_by_one(executor, TOKENS)
        after = executor.statistics().flash
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    experts = [e for e in events if e["ph"] == "X" and e["name"].endswith(" experts")]
    neurons = [e for e in events if e["ph"] == "X" and e["name"].endswith(" neurons")]
    assert {e["name"].removesuffix(" experts") + ".weight" for e in experts} <= set(plan.placements)
    assert bool(neurons) is bool(plan.neuron_bytes)
    read = after.page_reads - before.page_reads
    assert 0 < read <= sum(e["args"]["reads"] for e in experts + neurons)
    assert {e["name"] for e in events if e["ph"] == "C"} >= {"reads of experts in flight"}


class TestExpertsInPages(StepExecutorConformance):
    """With as little memory for them as can be. The reference reads the file that the pack was made from."""

    models = ("experts",)
    tolerance = Tolerance(reference=0.06, within=0.98, top1=0.99)

    @pytest.fixture(autouse=True)
    def _model(self, tmp_path: Path, small_pages: None) -> None:
        model, weight_type, types = MODELS["reglu"]
        self.source = write_gguf(tmp_path / "m.gguf", model, weight_type=weight_type, types=types)
        self.path = tmp_path / "m.pi2"
        convert(self.source, self.path)
        plan = least_plan(self.path)
        self.options = ExecutorOptions(
            slots=4,
            pages=16,
            context=256,
            max_tokens=192,
            placements=paged(self.path),
            expert_bytes=plan.expert_bytes,
            neuron_bytes=plan.neuron_bytes,
        )

    def make_executor(self) -> StepExecutor:
        return CpuExecutor()

    def open_model(self, name: str) -> tuple[ModelFile, ModelDescription]:
        file = open_model_file(self.path)
        return file, describe(file)

    def open_reference_model(self, name: str) -> tuple[ModelFile, ModelDescription]:
        file = open_model_file(self.source)
        return file, describe(file)
