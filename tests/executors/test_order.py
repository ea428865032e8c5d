"""Bundles in another order than their neurons': other places, the same bits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pi2rt.cython_kernels.plane import program
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.executors.cpu.layer_walk import walk
from pi2rt.formats import neuron_order, open_model_file
from pi2rt.formats.pack import PackFile
from pi2rt.models import describe
from pi2rt.planner.pack.bundling import Bundling
from pi2rt.planner.pack.convert import convert, verify
from pi2rt.planner.pack.findings import Findings
from pi2rt.runtime.flash_reads import FlashReads
from tests.executors import test_experts, test_predicted, test_sparse
from tests.executors.test_sparse import cache_sizes, one_by_one
from tests.support.running import all_logits, opened
from tests.support.tiny_models import TinyModel, write_gguf

TOKENS = np.arange(3, 60, dtype=np.int32)


def random_orders(path: Path, seed: int = 0) -> dict[str, neuron_order.Order]:
    """Of the bundles of a pack."""
    random = np.random.default_rng(seed)

    def order(neurons: int) -> neuron_order.Order:
        sizes = [min(neuron_order.CLUSTER, neurons - at) for at in range(0, neurons, neuron_order.CLUSTER)]
        return np.concatenate([random.permutation(size) for size in sizes]).astype(np.uint16)

    with open_model_file(path) as file:
        return {down: order(each.neurons) for down, each in file.bundles.items()}


def reordered(source: Path, bundles: Bundling = "relu") -> tuple[Path, Path]:
    """Packs with an order, and without."""
    plain, other = source.with_name("plain.pi2"), source.with_name("ordered.pi2")
    convert(source, plain, bundles=bundles)
    convert(source, other, bundles=bundles, calibration=Findings(random_orders(plain)))
    assert verify(other) == ()
    with PackFile(plain) as before, PackFile(other) as after:
        assert before.source_digest == after.source_digest
        assert all(each.order is None for each in before.bundles.values())
        assert all(each.order is not None for each in after.bundles.values())
    return other, plain


SPARSE = {name: (*each, "relu") for name, each in test_sparse.MODELS.items()}
GATES = {f"{name}, gates": (*each, "gates") for name, each in test_predicted.MODELS.items()}
WIDE = TinyModel("llama", seed=9, dim=4096, hidden=704, layers=1, heads=2, kv_heads=1, head_dim=64,
                 config={"hidden_act": "drelu"})  # fmt: skip
MODELS = SPARSE | GATES | {"a neuron a page": (WIDE, {}, "relu"), "two pages": (WIDE, {}, "gates")}


@pytest.fixture(scope="module", params=list(MODELS))
def packs(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    model, types, bundles = MODELS[request.param]
    path = tmp_path_factory.mktemp("model") / "m.gguf"
    metadata = {"gemma3.hidden_activation": "relu"} if model.family == "gemma3_text" else {}
    write_gguf(path, model, weight_type="Q4_0", types=types, metadata=metadata)
    return reordered(path, bundles)  # type: ignore[arg-type]


def test_clusters_are_those_of_the_kernels() -> None:
    assert program.CLUSTER == neuron_order.CLUSTER


async def test_no_bit_changes(packs: tuple[Path, Path]) -> None:
    ordered, plain = packs
    async with opened(CpuExecutor(), plain, exact_floats=False) as executor:
        expected = await all_logits(executor, TOKENS)
    async with opened(CpuExecutor(), ordered, exact_floats=False) as executor:
        np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)


@pytest.mark.parametrize(
    ("io", "cores", "gap", "pipeline"),
    [("auto", (0, 1), 0, "cluster"), ("preadv", (0,), 8192, "cluster"), ("auto", (0, 1, 0), 65536, "matrix")],
)
async def test_nor_with_the_smallest_cache(
    packs: tuple[Path, Path], io: str, cores: tuple[int, ...], gap: int, pipeline: str
) -> None:
    ordered, plain = packs
    size, cluster, pages = cache_sizes(plain)
    async with opened(CpuExecutor(), plain, exact_floats=False) as executor:
        expected = await all_logits(executor, TOKENS)
    given = {"exact_floats": False, "cores": cores, "io": io, "pipeline": pipeline}
    with open_model_file(ordered) as file:
        two_phase = not gap and any(each.head_bytes for each in file.bundles.values())
    for slots in {cluster, max(cluster, pages // 2)}:
        more = {"neuron_bytes": slots * size, "reads": FlashReads(neuron_gap=gap), "two_phase": two_phase}
        async with opened(CpuExecutor(), ordered, **given, **more) as executor:
            np.testing.assert_array_equal(await one_by_one(executor, TOKENS), expected)
            np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)


@pytest.mark.parametrize("name", ["drelu", "reglu"])
async def test_nor_of_experts(tmp_path: Path, name: str) -> None:
    model, weight_type, types = test_experts.MODELS[name]
    source = write_gguf(tmp_path / "m.gguf", model, weight_type=weight_type, types=types)
    ordered, plain = reordered(source)
    with PackFile(plain) as file:
        assert len(file.bundles) > len(describe(file).layers)
    async with opened(CpuExecutor(), plain, exact_floats=False) as executor:
        expected = await all_logits(executor, TOKENS)
    size, cluster, _ = cache_sizes(ordered)
    for reads in FlashReads(), FlashReads(neuron_gap=16384):
        given = {"exact_floats": False, "neuron_bytes": 2 * cluster * size, "reads": reads}
        async with opened(CpuExecutor(), ordered, **given) as executor:
            np.testing.assert_array_equal(await one_by_one(executor, TOKENS), expected)
            np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)


def test_whoever_wants_matrices_gets_them_in_the_neurons_order(packs: tuple[Path, Path]) -> None:
    found = []
    for path in packs:
        seen: list[np.ndarray[tuple[int, ...], np.dtype[np.float32]]] = []
        with open_model_file(path) as file:
            walk(
                file,
                describe(file),
                [TOKENS],
                lambda layer, block, weights, factors, seen=seen: seen.extend(
                    [*(each.gate for each in factors), weights[block.down.weight], weights[block.up.weight]]
                ),
                lambda done, total: None,
            )
        found.append(seen)
    for ordered, plain in zip(*found, strict=True):
        np.testing.assert_array_equal(ordered, plain)
