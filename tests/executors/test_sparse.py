"""Neurons that are read when they fire: the same bits as the dense block, whatever the cache holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pi2rt.cython_kernels import native
from pi2rt.cython_kernels.program import CLUSTER
from pi2rt.executors.cpu import CpuExecutor
from pi2rt.formats import open_model_file
from pi2rt.planner.convert import convert
from pi2rt.runtime.executor import Executor
from pi2rt.runtime.step import Bind, Sampling, Slice, Step
from tests.support.running import NOTHING, all_logits, opened, page_table
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
    convert(source, folder / "dense.pi2", bundles=False)
    return folder / "sparse.pi2", folder / "dense.pi2"


async def one_by_one(executor: Executor, tokens: npt.NDArray[np.int32]) -> npt.NDArray[np.float32]:
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
@pytest.mark.parametrize("activations", ["int16", "int8"])
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
        assert executor.statistics().details["neuron_misses"] == 0


@pytest.mark.parametrize("pipeline", ["cluster", "matrix", "none"])
@pytest.mark.parametrize("io", ["auto", "preadv"])
@pytest.mark.parametrize("cores", [1, 2, 3])
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
            details = executor.statistics().details
        assert details["neuron_misses"] > 0
        assert details["flash_bytes"] > 0
