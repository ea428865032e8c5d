from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pi2rt._errors import MemoryBudgetError
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.formats import open_model_file
from pi2rt.memory import MemoryNeed
from pi2rt.models import describe
from pi2rt.opening.executor_plan import OF_PLAN
from pi2rt.planner.pack.bundling import Bundling
from pi2rt.planner.pack.convert import convert
from pi2rt.planner.weights import plan_streaming
from pi2rt.runtime.executor import ExecutorOptions
from pi2rt.runtime.trace import Trace
from tests.support.families import FAMILIES
from tests.support.running import opened
from tests.support.tiny_models import VOCAB_SIZE, TinyModel, write_gguf, write_huggingface

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


@dataclass(frozen=True)
class Case:
    """``floats``: its weights are bfloat16, else Q8_0; ``streamed``: all that a budget can leave no room for is read
    while steps run."""

    model: TinyModel
    bundles: Bundling = "off"
    streamed: bool = False
    floats: bool = False
    options: Mapping[str, object] = field(default_factory=dict)


WIDE = TinyModel(dim=512, hidden=2048, heads=8, kv_heads=2, head_dim=64)
SPARSE = TinyModel(dim=512, hidden=4096, heads=8, kv_heads=2, head_dim=64, config={"hidden_act": "drelu"})
EXPERTS = TinyModel("qwen2_moe", dim=256, hidden=512, experts=8, experts_used=3)

CASES = {
    **{name: Case(family.model, floats=True) for name, family in FAMILIES.items()},
    "wide": Case(WIDE),
    "wide, q8 pages": Case(WIDE, options={"kv_type": "q8"}),
    "wide, int8": Case(WIDE, options={"activations": "int8"}),
    "wide, exact": Case(WIDE, options={"exact_floats": True}),
    "wide, streamed": Case(WIDE, streamed=True),
    "sparse": Case(SPARSE, "relu"),
    "sparse, cached": Case(SPARSE, "relu", streamed=True),
    "sparse, traced": Case(SPARSE, "relu", options={"trace": Trace()}),
    "gates in bundles": Case(SPARSE, "gates"),
    "experts": Case(EXPERTS),
    "experts, paged": Case(EXPERTS, streamed=True),
    "experts, sparse": Case(
        TinyModel("mixtral", dim=256, hidden=1024, experts=4, config={"hidden_act": "relu"}), "relu"
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize(("rows", "slots", "threads"), [(16, 1, 1), (192, 8, 3)])
async def test_the_need_is_what_is_taken_to_the_byte(
    tmp_path: Path, case: Case, rows: int, slots: int, threads: int
) -> None:
    path = tmp_path / "m.pi2"
    if case.floats:
        source = write_huggingface(tmp_path / "m", case.model, dtype="BF16")
    else:
        source = write_gguf(tmp_path / "m.gguf", case.model, weight_type="Q8_0")
    convert(source, path, bundles=case.bundles)
    given: dict[str, Any] = {"slots": slots, "max_tokens": rows, "cores": (0,) * threads, **case.options}
    given.setdefault("exact_floats", False)
    with open_model_file(path) as file:
        model = describe(file)
        if case.streamed:
            plan = plan_streaming(file, model, 0)
            assert plan.placements or plan.neuron_bytes
            given |= {name: getattr(plan, name) for name in OF_PLAN}
        needed = CpuExecutor().need(file, model, ExecutorOptions(pages=4, context=256, **given))
    async with opened(CpuExecutor(), path, pages=4, context=256, **given) as executor:
        taken = dict(executor.statistics().bytes)
    assert taken.pop("activations") == needed.activations
    assert taken.pop("kv") == needed.kv(4, 4)
    assert sum(taken.values()) == needed.weights


def test_pages_as_many_as_fit() -> None:
    small = MemoryNeed(weights=100 * MIB, page=MIB, activations=20 * MIB)
    assert small.pages(available=10_000 * MIB, needed=64, wanted=512) == 512
    assert small.pages(available=520 * MIB, needed=64, wanted=512) == 200  # half of what is left
    assert small.pages(available=184 * MIB, needed=64, wanted=512) == 64


def test_windowed_bytes_count_for_the_pages_that_have_memory() -> None:
    small = MemoryNeed(weights=100 * MIB, page=MIB, activations=20 * MIB, window_page=4 * MIB)
    assert small.kv(3, 10) == 15 * MIB
    assert small.kv(20, 10) == 60 * MIB
    for available, pages in ((10_000, 512), (520, 160), (160, 4), (221, 10), (222, 11), (140, 2)):
        assert small.pages(available * MIB, needed=2, wanted=512, window_pages=10) == pages
        room = (available - 120) // 2 * MIB
        assert small.kv(pages, 10) <= max(room, small.kv(2, 10))
        assert pages == 512 or small.kv(pages + 1, 10) > room
    with pytest.raises(MemoryBudgetError, match=r"KV cache of one context 70\.0 MiB"):
        small.pages(available=189 * MIB, needed=30, wanted=512, window_pages=10)
    assert small.pages(available=190 * MIB, needed=30, wanted=512, window_pages=10) == 30
    every = MemoryNeed(weights=0, page=0, activations=0, window_page=MIB)  # each block has a window
    assert every.pages(available=40 * MIB, needed=2, wanted=512, window_pages=10) == 512
    assert every.pages(available=10 * MIB, needed=2, wanted=512, window_pages=10) == 5


def test_too_little_memory_says_by_how_much_and_what_for() -> None:
    small = MemoryNeed(weights=100 * MIB, page=MIB, activations=20 * MIB)
    with pytest.raises(
        MemoryBudgetError,
        match=r"needs 184\.0 MiB and 183\.0 MiB are available, 1\.0 MiB too few: weights 100\.0 MiB, "
        r"KV cache of one context 64\.0 MiB, activations 20\.0 MiB; take a smaller context",
    ):
        small.pages(available=183 * MIB, needed=64, wanted=512)
