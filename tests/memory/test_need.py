from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pi2rt._errors import MemoryBudgetError
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.formats import open_model_file
from pi2rt.memory import MemoryNeed
from pi2rt.models import describe
from pi2rt.planner.pack.bundling import Bundling
from pi2rt.planner.pack.convert import convert
from pi2rt.runtime.executor import ExecutorOptions
from tests.support.running import opened
from tests.support.tiny_models import VOCAB_SIZE, TinyModel, write_gguf

MIB = 1 << 20


def need(path: Path, *, threads: int = 2, **changes: Any) -> MemoryNeed:
    given = {"slots": 8, "max_tokens": 512, "cores": (0,) * threads, "kv_type": "f16"} | changes
    options = ExecutorOptions(pages=1, context=256, **given)
    with open_model_file(path) as file:
        return CpuExecutor().need(file, describe(file), options)


def test_the_need_of_a_tiny_model(tmp_path: Path) -> None:
    model = TinyModel()
    path = write_gguf(tmp_path / "tiny.gguf", model, weight_type="F16")
    found = need(path)
    parameters = sum(values.size for values in model.weights().values())
    norms = sum(values.size for values in model.weights().values() if values.ndim == 1)
    assert found.weights == 2 * (parameters - norms) + 4 * norms
    assert found.page == 64 * 3 * 2 * 2 * 16 * 2  # positions, layers, k and v, heads, elements, bytes
    assert found.activations > 4 * (512 * model.dim + 8 * VOCAB_SIZE)
    assert need(path, exact_floats=True).weights == 4 * parameters
    assert need(path, kv_type="q8").page == 64 * 3 * 2 * 2 * (16 + 4)  # and a scale, float32
    assert need(path, exact_floats=True).page == 2 * found.page


def test_experts_count_as_weights_and_one_of_them_as_activations(tmp_path: Path) -> None:
    model = TinyModel("qwen2_moe", experts=8, experts_used=3)
    found = need(write_gguf(tmp_path / "tiny.gguf", model))
    assert found.weights == 4 * sum(values.size for values in model.weights().values())


@pytest.mark.parametrize(
    ("model", "bundles"),
    [
        (TinyModel(dim=512, hidden=2048, heads=8, kv_heads=2, head_dim=64), "off"),
        (TinyModel("qwen3", dim=256, hidden=1024, heads=4, kv_heads=1, head_dim=128), "off"),
        (TinyModel("qwen2_moe", dim=256, hidden=512, experts=8, experts_used=3), "off"),
        (TinyModel(dim=512, hidden=4096, heads=8, kv_heads=2, head_dim=64, config={"hidden_act": "drelu"}), "relu"),
        (TinyModel("mixtral", dim=256, hidden=1024, experts=4, config={"hidden_act": "relu"}), "relu"),
    ],
)  # fmt: skip
@pytest.mark.parametrize(("rows", "slots", "threads"), [(16, 1, 1), (128, 4, 2), (192, 8, 3)])
async def test_activations_are_what_the_processor_takes(
    tmp_path: Path, model: TinyModel, bundles: Bundling, rows: int, slots: int, threads: int
) -> None:
    """Never less than that: a budget holds by it. And little more, for what it takes weights have not."""
    path = tmp_path / "m.pi2"
    convert(write_gguf(tmp_path / "m.gguf", model, weight_type="Q8_0"), path, bundles=bundles)
    estimated = need(path, max_tokens=rows, slots=slots, threads=threads).activations
    given = {
        "slots": slots,
        "max_tokens": rows,
        "context": 256,
        "cores": (0,) * threads,
        "exact_floats": False,
    }
    async with opened(CpuExecutor(), path, **given) as executor:
        taken = executor.statistics().bytes["activations"]
    assert taken <= estimated <= 1.25 * taken + (1 << 20)


def test_pages_as_many_as_fit() -> None:
    small = MemoryNeed(weights=100 * MIB, page=MIB, activations=20 * MIB)
    assert small.pages(available=10_000 * MIB, needed=64, wanted=512) == 512
    assert small.pages(available=520 * MIB, needed=64, wanted=512) == 200  # half of what is left
    assert small.pages(available=184 * MIB, needed=64, wanted=512) == 64


def test_too_little_memory_says_by_how_much_and_what_for() -> None:
    small = MemoryNeed(weights=100 * MIB, page=MIB, activations=20 * MIB)
    with pytest.raises(
        MemoryBudgetError,
        match=r"needs 184\.0 MiB and 183\.0 MiB are available, 1\.0 MiB too few: weights 100\.0 MiB, "
        r"KV cache of one context 64\.0 MiB, activations 20\.0 MiB; take a smaller context",
    ):
        small.pages(available=183 * MIB, needed=64, wanted=512)
