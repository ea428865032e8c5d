"""The state of sequences: sizes, pages as the kernels have them, and pages that outlive an executor."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from pi2rt._errors import ClosedError
from pi2rt.cython_kernels.kernels import native
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.executors.reference.executor import ReferenceExecutor
from pi2rt.formats import open_model_file
from pi2rt.memory import PAGE_TOKENS, KvType, StateLayout, StateStore
from pi2rt.models import Fixed, FixedArray, Layer, ModelDescription, Paged, State, describe
from pi2rt.runtime.executor import ExecutorOptions, StepExecutor
from pi2rt.runtime.step import Bind, Floats, Int32s, Sampling, Slice, Step
from tests.support.running import NOTHING, no_progress
from tests.support.tiny_models import VOCAB_SIZE, TinyModel, write_gguf

TYPES: list[KvType] = ["f16", "q8", "f32"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = TinyModel(heads=6, kv_heads=2, head_dim=24)  # whose heads are padded
    return write_gguf(tmp_path_factory.mktemp("state") / "tiny.gguf", model)


def described(path: Path) -> ModelDescription:
    with open_model_file(path) as file:
        return describe(file)


@dataclass(frozen=True)
class Recurrent:
    """A block with a convolution window and a state."""

    def state(self) -> State:
        return Fixed((FixedArray("window", (5, 3)), FixedArray("state", (5, 16), "float64")))


def test_the_states_of_a_model(tiny: Path) -> None:
    model = described(tiny)
    states = model.states()
    assert [(each.layer, each.block) for each in states] == [(i, 0) for i in range(len(model.layers))]
    assert {each.state for each in states} == {Paged(2, 24)}


@pytest.mark.parametrize("kv_type", TYPES)
def test_pages_are_as_large_as_the_kernels_make_them(tiny: Path, kv_type: KvType) -> None:
    layout = StateLayout.of(described(tiny), kv_type)
    half = native.kv_half_bytes(kv_type, 32)
    assert layout.page_bytes == len(layout.paged) * 2 * 2 * half
    assert [each.offset for each in layout.paged] == [i * 4 * half for i in range(len(layout.paged))]
    assert layout.slot_bytes == 0


def test_fixed_arrays_lie_in_slots_and_are_aligned(tiny: Path) -> None:
    model = described(tiny)
    layers = (*model.layers, Layer((Recurrent(), Recurrent())))  # type: ignore[arg-type]
    layout = StateLayout.of(replace(model, layers=layers), "f16")
    assert layout.page_bytes == StateLayout.of(model, "f16").page_bytes
    assert [each.offset for each in layout.fixed] == [0, 64, 704, 768]
    assert layout.slot_bytes == 2 * (64 + 640)
    with StateStore(layout, 1, 3) as store:
        arrays = [store.array(1, each) for each in layout.fixed]
        assert [array.shape for array in arrays] == [(5, 3), (5, 16)] * 2
        arrays[3][:] = 7
        store.copy_slot(1, 2)
        np.testing.assert_array_equal(store.array(2, layout.fixed[3]), 7)
        assert not store.array(0, layout.fixed[3]).any()
        assert not store.array(2, layout.fixed[2]).any()
        del arrays


def test_a_closed_store_has_nothing(tiny: Path) -> None:
    store = StateStore(StateLayout.of(described(tiny), "f16"), 4)
    assert store.nbytes == 4 * store.layout.page_bytes
    store.close()
    store.close()
    assert store.nbytes == 0
    with pytest.raises(ClosedError):
        _ = store.page_memory


@pytest.mark.parametrize("kv_type", TYPES)
def test_what_was_written_is_read(tiny: Path, kv_type: KvType) -> None:
    """Rounded to the type of the pages; another sequence's pages stay as they are."""
    rng = np.random.default_rng(1)
    with StateStore(StateLayout.of(described(tiny), kv_type), 6) as store:
        pages = store.blocks()[1, 0]
        table, other = np.array([4, 0, 5], np.int32), np.array([1, 3, 2], np.int32)
        keys, values = rng.standard_normal((2, 150, 2, 24)).astype(np.float32)
        for start, end in ((0, 1), (1, 60), (60, 130), (130, 150)):
            pages.write(table, start, keys[start:end], values[start:end])
        pages.write(other, 0, values, keys)
        for got, given in zip(pages.read(table, 150), (keys, values), strict=True):
            error = {"f32": 0.0, "f16": 2e-3, "q8": 2e-2}[kv_type]
            np.testing.assert_allclose(got, given, atol=error)
        assert pages.read(table, 65)[0].shape == (65, 2, 24)
        del pages


@pytest.mark.parametrize("kv_type", TYPES)
async def test_pages_that_one_executor_wrote_serve_another(tiny: Path, kv_type: KvType) -> None:
    """The CPU's first, then a second CPU executor's, then the reference's, and back: positions computed before are
    not computed again. On the CPU alone the bits are those of one executor."""
    options = ExecutorOptions(
        slots=1, pages=4, context=256, max_tokens=256, exact_floats=True, activations="int16"
    )
    tokens = (np.arange(200) * 7 % VOCAB_SIZE).astype(np.int32)
    table = np.array([2, 0, 3, 1], np.int32)
    tolerance = {"f32": 1e-4, "f16": 2e-2, "q8": 2e-1}[kv_type]

    async def part(executor: StepExecutor, store: StateStore, start: int, end: int) -> Floats:
        with open_model_file(tiny) as file:
            try:
                await executor.open(file, describe(file), options, store, no_progress)
                return await logits(executor, tokens[start:end], start, table)
            finally:
                await executor.aclose()

    layout = StateLayout.of(described(tiny), kv_type)
    with StateStore(layout, 4) as store:
        whole = await part(CpuExecutor(), store, 0, 200)
    with StateStore(layout, 4) as store:
        parts = [await part(CpuExecutor(), store, *each) for each in ((0, 70), (70, 190), (190, 200))]
        np.testing.assert_array_equal(np.concatenate(parts), whole)
    with StateStore(layout, 4) as store:
        first = await part(CpuExecutor(), store, 0, 70)
        second = await part(ReferenceExecutor(), store, 70, 150)
        third = await part(CpuExecutor(), store, 150, 200)
        scale = np.abs(whole).max()
        np.testing.assert_allclose(np.concatenate([first, second, third]), whole, atol=tolerance * scale)


async def logits(executor: StepExecutor, tokens: Int32s, start: int, table: Int32s) -> Floats:
    piece = Slice(0, start, table, tokens, logits=True)
    executor.submit(Step(1, (piece,), (Bind(0, Sampling(), NOTHING),)))
    found = (await executor.wait()).logits[0]
    assert found is not None
    return found


def test_pages_are_copied_and_carried(tiny: Path) -> None:
    layout = StateLayout.of(described(tiny), "f16")
    rng = np.random.default_rng(2)
    with StateStore(layout, 3) as store, StateStore(layout, 2) as device:
        data = rng.integers(0, 255, layout.page_bytes).astype(np.uint8)
        store.import_page(1, data)
        store.copy_page(1, 2)
        device.import_page(0, store.export_page(2))
        np.testing.assert_array_equal(device.export_page(0), data)
        assert not store.export_page(0).any()
        with pytest.raises(IndexError):
            store.export_page(3)


def test_what_lies_behind_the_last_page_taken_is_unused(tiny: Path) -> None:
    layout = StateLayout.of(described(tiny), "f16")
    with StateStore(layout, 5) as store:
        assert store.used_bytes == 0
        pages = store.pool.allocate(3)
        store.pool.release_all(pages)
        assert store.pool.allocate(1) == [pages[-1]]
        assert store.used_bytes == 3 * layout.page_bytes
    assert PAGE_TOKENS == 64
