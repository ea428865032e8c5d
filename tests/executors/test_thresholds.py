"""Neurons that are inactive below a threshold: numpy leaves out the same, however they are read the bits are the same,
and at zero nothing is lost."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from pi2rt.cython_kernels.kernels import native
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.executors.reference.model import ReferenceModel
from pi2rt.formats import open_model_file
from pi2rt.formats.quants import dequantize
from pi2rt.memory import StateLayout, StateStore
from pi2rt.models import FeedForward, describe
from pi2rt.models.tensors import iterate_tensors
from pi2rt.planner.pack.convert import convert
from tests.executors.test_sparse import cache_sizes, one_by_one
from tests.support.running import all_logits, opened
from tests.support.tiny_models import TinyModel, write_gguf

Floats = npt.NDArray[np.float32]
TOKENS = np.arange(3, 60, dtype=np.int32)

MODELS = {
    "silu": (TinyModel("llama", seed=1, dim=256, hidden=1216, layers=2, heads=4, kv_heads=2, head_dim=64,
                       config={"mlp_bias": True}), {}),
    "gelu": (TinyModel("gemma3_text", seed=2, dim=128, hidden=544, layers=3, heads=2, kv_heads=1, head_dim=64),
             {"ffn_up": "Q8_0", "ffn_down": "Q4_1"}),
    "drelu": (TinyModel("llama", seed=3, dim=256, hidden=640, layers=2, heads=4, kv_heads=2, head_dim=64,
                        config={"hidden_act": "drelu"}), {}),
    "silu without gate": (TinyModel("llama", seed=4, dim=256, hidden=1024, layers=2, heads=4, kv_heads=2, head_dim=64,
                                    gated=False), {"ffn_down": "Q8_0"}),
}  # fmt: skip


@pytest.fixture(scope="module", params=list(MODELS))
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    model, types = MODELS[request.param]
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    return write_gguf(path, model, weight_type="Q4_0", types=types)


@pytest.fixture(scope="module")
def packs(source: Path) -> tuple[Path, Path]:
    """With every block by neuron, and with none."""
    bundled, dense = source.with_name("all.pi2"), source.with_name("off.pi2")
    convert(source, bundled, bundles="all")
    convert(source, dense, bundles="off")
    return bundled, dense


class Thresholded(ReferenceModel):
    """Takes for each neuron the threshold in the middle of the widest gap between the magnitudes that it sees, so that
    a last bit decides nothing, and makes what is below inactive."""

    found: dict[str, Floats]

    def factors(self, block: FeedForward, x: Floats) -> tuple[Floats, Floats | None]:
        gate, up = super().factors(block, x)
        order = np.sort(np.abs(gate), axis=0)[len(gate) // 4 : -len(gate) // 4]
        widest = np.argmax(np.diff(order, axis=0), axis=0)
        both = np.take_along_axis(order, np.stack([widest, widest + 1]), axis=0)
        self.found[block.down.weight] = both.mean(0)
        return np.where(np.abs(gate) <= both.mean(0), np.float32(0), gate), up


def reference(source: Path) -> tuple[Floats, dict[str, Floats]]:
    """Logits of TOKENS, and the thresholds they were computed with."""
    with open_model_file(source) as file:
        model = describe(file)
        weights = {}
        for name, _ in iterate_tensors(model):
            info = file.tensors[name]
            weights[name] = dequantize(info.type, file.read(name), info.shape)
    computed = Thresholded(model, weights, StateStore(StateLayout.of(model, "f32"), 1))
    computed.found = {}
    return computed.logits(computed.forward(TOKENS, 0, np.zeros(1, np.int32))), computed.found


async def test_numpy_computes_the_same_on_every_instruction_set(
    source: Path, packs: tuple[Path, Path]
) -> None:
    expected, thresholds = reference(source)
    exact = await logits(packs[1])
    first = None
    for kernels in (name for name, runs, _ in native.variants() if runs):
        found = await logits(packs[0], thresholds=thresholds, kernels=kernels, activations="int16")
        first = found if first is None else first
        np.testing.assert_array_equal(found, first)
    assert first is not None
    scale = np.abs(expected).max()
    assert np.abs(first - expected).max() < 3e-3 * scale  # half-precision keys, int16 activations
    assert np.abs(exact - expected).max() > 3e-2 * scale  # it does matter


async def logits(path: Path, **options: object) -> Floats:
    async with opened(CpuExecutor(), path, exact_floats=False, **options) as executor:
        return await all_logits(executor, TOKENS)


@pytest.mark.parametrize("zero", [False, True])
async def test_without_thresholds_or_with_zeros_nothing_is_lost(packs: tuple[Path, Path], zero: bool) -> None:
    """Every neuron of SiLU and GELU is active then."""
    thresholds = {}
    with open_model_file(packs[0]) as file:
        assert len(file.bundles) >= 2
        if zero:
            thresholds = {name: np.zeros(each.neurons, np.float32) for name, each in file.bundles.items()}
    expected = await logits(packs[1])
    np.testing.assert_array_equal(await logits(packs[0], thresholds=thresholds), expected)
    async with opened(CpuExecutor(), packs[0], exact_floats=False, thresholds=thresholds) as executor:
        np.testing.assert_array_equal(await one_by_one(executor, TOKENS), expected)


@pytest.mark.parametrize(("pipeline", "cores"), [("cluster", 1), ("cluster", 3), ("matrix", 2), ("none", 2)])
async def test_streamed_is_resident_bit_for_bit(
    source: Path, packs: tuple[Path, Path], pipeline: str, cores: int
) -> None:
    _, thresholds = reference(source)
    size, cluster, pages = cache_sizes(packs[0])
    expected = await logits(packs[0], thresholds=thresholds)
    given = {
        "exact_floats": False,
        "thresholds": thresholds,
        "cores": (0, 1, 0)[:cores],
        "pipeline": pipeline,
    }
    for slots in (cluster, pages - 1):
        async with opened(CpuExecutor(), packs[0], **given, neuron_bytes=slots * size) as executor:
            np.testing.assert_array_equal(await one_by_one(executor, TOKENS), expected)
            np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)
            assert executor.statistics().flash.neurons.misses > 0


async def test_what_is_inactive_is_not_asked_for(packs: tuple[Path, Path]) -> None:
    """The upper half of each block's neurons, for good."""
    with open_model_file(packs[0]) as file:
        neurons = {name: each.neurons for name, each in file.bundles.items()}
    halves = {
        name: np.where(np.arange(count) < count // 2, 0, 1e30).astype(np.float32)
        for name, count in neurons.items()
    }
    asked = []
    for thresholds in ({}, halves):
        async with opened(CpuExecutor(), packs[0], exact_floats=False, thresholds=thresholds) as executor:
            await all_logits(executor, TOKENS)
            asked.append(executor.statistics().flash.neurons.hits)
    assert 0.4 * asked[0] < asked[1] < 0.6 * asked[0]
