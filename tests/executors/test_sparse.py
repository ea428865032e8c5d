"""Neurons that are read when they are active: the same bits as the dense block, whatever the cache holds."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pi2rt._errors import ModelFormatError, UnsupportedModelError
from pi2rt.cython_kernels.kernels import native
from pi2rt.cython_kernels.plane.program import CLUSTER
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.formats import ModelFile, open_model_file
from pi2rt.formats.placement import Placement
from pi2rt.models import ModelDescription, describe
from pi2rt.models.stream_pieces import cut, matrices_in_order
from pi2rt.planner.pack.convert import convert
from pi2rt.runtime.executor import ExecutorOptions, StepExecutor
from pi2rt.runtime.flash_reads import FlashReads
from pi2rt.runtime.step import Bind, Sampling, Slice, Step
from pi2rt.testing import StepExecutorConformance, Tolerance
from tests.support.running import NOTHING, all_logits, opened, page_table, stopped_steps_leave_nothing
from tests.support.tiny_models import TinyModel, write_gguf

TOKENS = np.arange(3, 60, dtype=np.int32)

MODELS = {
    "drelu": (TinyModel("llama", seed=1, dim=256, hidden=1216, layers=2, heads=4, kv_heads=2, head_dim=64,
                        config={"hidden_act": "drelu"}), {}),
    "reglu": (TinyModel("llama", seed=2, dim=608, hidden=544, layers=3, heads=4, kv_heads=4, head_dim=32,
                        config={"hidden_act": "relu", "mlp_bias": True}), {"ffn_up": "Q8_0", "ffn_down": "Q4_1"}),
    "relu2": (TinyModel("llama", seed=3, dim=256, hidden=1024, layers=2, heads=4, kv_heads=2, head_dim=64,
                        gated=False, config={"hidden_act": "relu2", "mlp_bias": True}), {"ffn_down": "Q8_0"}),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(MODELS))
def packs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """With neuron bundles, and without."""
    folder = tmp_path_factory.mktemp(request.param)
    model, types = MODELS[request.param]
    source = write_gguf(folder / "m.gguf", model, weight_type="Q4_0", types=types)
    convert(source, folder / "sparse.pi2")
    convert(source, folder / "dense.pi2", bundles="off")
    return folder / "sparse.pi2", folder / "dense.pi2"


async def one_by_one(executor: StepExecutor, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
    """As ``all_logits``, in steps of a token each."""
    out = []
    for i, token in enumerate(tokens):
        part = Slice(0, i, page_table(0), np.array([token], np.int32), logits=True)
        executor.submit(Step(i, (part,), (Bind(0, Sampling(), NOTHING),) if i == 0 else ()))
        out.append((await executor.wait()).logits[0])
    return np.concatenate(out)


def cache_sizes(path: Path) -> tuple[int, int, int]:
    """(bytes of a slot, slots for the neurons of one cluster, slots for all)"""
    with open_model_file(path) as file:
        bundles = list(file.bundles.values())
    cluster = max(-(-CLUSTER // each.neurons_per_page) + 1 for each in bundles)
    return max(each.page_bytes for each in bundles), cluster, sum(each.pages for each in bundles)


@pytest.mark.parametrize("kernels", [name for name, runs, _ in native.variants() if runs])
@pytest.mark.parametrize("activations", ["int16", "mixed", "int8"])
async def test_sparse_blocks_are_the_dense_ones_bit_for_bit(
    packs: tuple[Path, Path], kernels: str, activations: str
) -> None:
    sparse, dense = packs
    given = {"kernels": kernels, "activations": activations, "exact_floats": False}
    async with opened(CpuExecutor(), dense, **given) as executor:
        expected = await all_logits(executor, TOKENS)
    async with opened(CpuExecutor(), sparse, **given) as executor:
        np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)
        np.testing.assert_array_equal(await one_by_one(executor, TOKENS), expected)
        assert executor.statistics().flash.neurons.misses == 0


@pytest.mark.parametrize(
    ("pipeline", "io", "cores"),
    [("cluster", "auto", 1), ("cluster", "auto", 2), ("cluster", "preadv", 3), ("matrix", "auto", 2),
     ("matrix", "preadv", 1), ("none", "auto", 2)],
)  # fmt: skip
async def test_what_the_cache_holds_changes_no_bit(
    packs: tuple[Path, Path], pipeline: str, io: str, cores: int
) -> None:
    sparse, dense = packs
    size, cluster, pages = cache_sizes(sparse)
    given = {"exact_floats": False, "cores": (0, 1, 0)[:cores]}
    async with opened(CpuExecutor(), dense, **given) as executor:
        expected = await all_logits(executor, TOKENS)
    for slots in (cluster, pages // 2, pages - 1):
        more = {"neuron_bytes": slots * size, "io": io, "pipeline": pipeline}
        async with opened(CpuExecutor(), sparse, **given, **more) as executor:
            np.testing.assert_array_equal(await one_by_one(executor, TOKENS), expected)
            np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)
            flash = executor.statistics().flash
        assert flash.neurons.misses > 0
        assert flash.bytes > 0


READS = FlashReads(stream_bytes=16384)
"""So that a matrix has many pieces."""


async def test_gates_and_attention_may_be_streamed_beside(packs: tuple[Path, Path]) -> None:
    size, cluster, _ = cache_sizes(packs[0])
    async with opened(CpuExecutor(), packs[0], exact_floats=False) as executor:
        expected = await all_logits(executor, TOKENS)
    with open_model_file(packs[0]) as file:
        model = describe(file)
        names = [name for name, _ in matrices_in_order(model) if file.tensors[name].layout == "blocks16"]
        ring = cut(file, model, names, READS.stream_bytes).ring
    given = {
        "exact_floats": False,
        "neuron_bytes": cluster * size,
        "placements": dict.fromkeys(names, Placement.STREAMED),
        "ring_bytes": ring,
        "reads": READS,
    }
    async with opened(CpuExecutor(), packs[0], **given) as executor:
        for _ in range(2):
            np.testing.assert_array_equal(await one_by_one(executor, TOKENS), expected)
            np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)


async def test_a_file_that_shrinks_fails_the_step_and_not_the_process(
    packs: tuple[Path, Path], tmp_path: Path
) -> None:
    path = tmp_path / "m.pi2"
    shutil.copy(packs[0], path)
    size, cluster, _ = cache_sizes(path)
    async with opened(CpuExecutor(), path, exact_floats=False, neuron_bytes=cluster * size) as executor:
        expected = await all_logits(executor, TOKENS)
        with open_model_file(path) as file:
            last = max(each.offset for each in file.bundles.values())
        os.truncate(path, last)
        for _ in range(3):
            with pytest.raises(
                ModelFormatError, match=f"reading weights: the file ends too early at byte {last}: "
            ):
                await all_logits(executor, TOKENS)
        whole = packs[0].read_bytes()
        path.write_bytes(whole)  # the same file again
        np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)


async def test_a_stopped_step_leaves_nothing_behind(packs: tuple[Path, Path]) -> None:
    size, cluster, _ = cache_sizes(packs[0])
    given = {"exact_floats": False, "neuron_bytes": cluster * size}
    async with opened(CpuExecutor(), packs[0], **given) as executor:
        expected = await all_logits(executor, TOKENS)
        await stopped_steps_leave_nothing(executor, TOKENS, expected, 40)


async def test_exact_floats_are_refused(packs: tuple[Path, Path]) -> None:
    with pytest.raises(UnsupportedModelError, match="--bundles off"):
        async with opened(CpuExecutor(), packs[0]):
            pass


class TestSparseCpu(StepExecutorConformance):
    """With the smallest cache there can be. The reference reads the same weights without bundles."""

    models = ("relu",)
    tolerance = Tolerance(reference=0.06)

    @pytest.fixture(autouse=True)
    def _model(self, packs: tuple[Path, Path]) -> None:
        self.path, self.dense = packs
        size, cluster, _ = cache_sizes(self.path)
        self.options = ExecutorOptions(
            slots=4, pages=16, context=256, max_tokens=192, neuron_bytes=cluster * size
        )

    def make_executor(self) -> StepExecutor:
        return CpuExecutor()

    def open_model(self, name: str) -> tuple[ModelFile, ModelDescription]:
        file = open_model_file(self.path)
        return file, describe(file)

    def open_reference_model(self, name: str) -> tuple[ModelFile, ModelDescription]:
        file = open_model_file(self.dense)
        return file, describe(file)


async def test_each_step_tells_what_it_took(packs: tuple[Path, Path]) -> None:
    """What steps say adds up to the counters, and to the neurons that were active."""
    size, _, pages = cache_sizes(packs[0])
    with open_model_file(packs[0]) as file:
        most = sum(each.pages * each.page_bytes for each in file.bundles.values())
        scales = sum(info.nbytes for info in file.tensors.values() if info.layout == "neurons")
    async with opened(CpuExecutor(), packs[0], exact_floats=False) as executor:
        await one_by_one(executor, TOKENS)
        (resident,) = {step.neurons.nbytes for step in executor.statistics().recent[-1:] if step.neurons}
        assert {step.neurons.missed for step in executor.statistics().recent if step.neurons} == {0}
    async with opened(
        CpuExecutor(), packs[0], exact_floats=False, neuron_bytes=(pages // 2) * size
    ) as executor:
        before = executor.statistics().flash
        await one_by_one(executor, TOKENS)
        after = executor.statistics()
        uses = [step.neurons for step in after.recent if step.neurons is not None]
        assert len(uses) == after.steps == len(TOKENS)
        cache = after.flash.neurons
        assert sum(use.asked for use in uses) == cache.hits + cache.misses
        assert sum(use.missed for use in uses) == cache.early + cache.misses
        assert sum(use.foreseen for use in uses) == cache.early
        assert 0 < sum(use.missed_bytes for use in uses) <= sum(use.asked for use in uses) * size
        read = after.flash.page_reads - before.page_reads
        assert 0 < sum(use.reads for use in uses) <= read
        assert uses[-1].nbytes == resident  # the same neurons are active, wherever they were
        assert all(0 < use.nbytes < most + scales for use in uses)
        assert {step.weight_bytes - step.neurons.nbytes for step in after.recent if step.neurons} == {
            after.recent[0].weight_bytes - uses[0].nbytes
        }
