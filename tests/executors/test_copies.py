"""Copies of state that a step makes before its slices: forks of sequences, snapshots and roll-backs."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from pi2rt._errors import InternalError
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.executors.reference.executor import ReferenceExecutor
from pi2rt.executors.simulated.executor import SimulatedExecutor
from pi2rt.formats import open_model_file
from pi2rt.memory import FixedLayout, StateLayout, StateStore
from pi2rt.models import FixedArray, describe
from pi2rt.runtime.executor import ExecutorOptions, StepExecutor
from pi2rt.runtime.step import Bind, Int32s, Sampled, Sampling, Slice, StateCopy, Step, StepResult
from tests.support.running import NOTHING, no_progress
from tests.support.tiny_models import VOCAB_SIZE, TinyModel, write_gguf

OPTIONS = ExecutorOptions(slots=3, pages=8, context=256, max_tokens=256, cores=(-1, -1))
PROMPT: Int32s = (np.arange(100) * 7 % VOCAB_SIZE).astype(np.int32)  # ends within its second page
SEEDS = (3, 4)
TOKENS = 40  # into a third page

Make = Callable[[], StepExecutor]
EXECUTORS: list[Make] = [CpuExecutor, ReferenceExecutor, SimulatedExecutor]
WITH_STATE: list[Make] = [CpuExecutor, ReferenceExecutor]


MODELS = {
    "llama": TinyModel(),
    "gemma": TinyModel("gemma3_text", layers=4, config={"sliding_window": 70, "sliding_window_pattern": 3}),
}
"""The pages of the second have two areas."""


@pytest.fixture(scope="module", params=MODELS)
def tiny(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("copies") / "tiny.gguf", MODELS[request.param])


@dataclass(frozen=True)
class Opened:
    executor: StepExecutor
    store: StateStore

    async def run(self, step: Step) -> StepResult:
        self.executor.submit(step)
        return await self.executor.wait()


@asynccontextmanager
async def opened(make: Make, path: Path) -> AsyncIterator[Opened]:
    """With four slots of a fixed array whose size is no multiple of a cache line, beside the pages of the model."""
    executor = make()
    with open_model_file(path) as file:
        model = describe(file)
        layout = StateLayout.of(model, "f16", OPTIONS.context)
        array = FixedArray("state", (5, 7), "float32")
        layout = replace(layout, fixed=(FixedLayout(0, 0, array, 0),), slot_bytes=192)
        with StateStore(layout, OPTIONS.pages, 4) as store:
            try:
                await executor.open(file, model, OPTIONS, store, no_progress)
                yield Opened(executor, store)
            finally:
                await executor.aclose()


def sampling(seed: int) -> Sampling:
    return Sampling(temperature=1.5, seed=seed)


def table(*pages: int) -> Int32s:
    return np.array(pages, np.int32)


def token(result: StepResult, at: int = 0) -> int:
    sampled = result.sampled[at]
    assert isinstance(sampled, Sampled)
    return sampled.token


async def alone(it: Opened, seed: int) -> list[int]:
    """The whole prompt but its last token, then one token after the other."""
    pages = table(0, 1, 2)
    bind = Bind(0, sampling(seed), PROMPT)
    await it.run(Step(1, (Slice(0, 0, pages, PROMPT[:-1]),), (bind,)))
    text = [token(await it.run(Step(2, (Slice(0, 99, pages, PROMPT[-1:], sample=True),))))]
    for i in range(TOKENS - 1):
        result = await it.run(Step(3 + i, (Slice(0, 100 + i, pages, NOTHING, sample=True),)))
        text.append(token(result))
    return text


@pytest.mark.parametrize("make", EXECUTORS)
async def test_a_fork_goes_on_as_two_sequences_would(make: Make, tiny: Path) -> None:
    """The prompt is computed once. The fork shares its first page and copies the one that both go on to write; steps
    are submitted ahead of their results."""
    expected = []
    for seed in SEEDS:
        async with opened(make, tiny) as it:
            expected.append(await alone(it, seed))
    if make is not SimulatedExecutor:  # whose tokens do not depend on the seed
        assert expected[0] != expected[1]
    async with opened(make, tiny) as it:
        tables = table(6, 3, 2), table(6, 5, 1)
        binds = tuple(Bind(slot, sampling(seed), PROMPT) for slot, seed in enumerate(SEEDS))
        await it.run(Step(1, (Slice(0, 0, tables[0], PROMPT[:-1]),), binds[:1]))
        last = tuple(Slice(slot, 99, tables[slot], PROMPT[-1:], sample=True) for slot in range(2))
        it.executor.submit(Step(2, last, binds[1:], (StateCopy("page", 3, 5),)))
        texts: tuple[list[int], list[int]] = ([], [])
        for i in range(TOKENS):
            if i + 1 < TOKENS:
                parts = tuple(Slice(slot, 100 + i, tables[slot], NOTHING, sample=True) for slot in range(2))
                it.executor.submit(Step(3 + i, parts))
            result = await it.executor.wait()
            for slot, text in enumerate(texts):
                text.append(token(result, slot))
    assert list(texts) == expected


@pytest.mark.parametrize("make", WITH_STATE)
async def test_copies_are_made_in_their_order(make: Make, tiny: Path) -> None:
    """What was copied is copied on, and a page that was copied from can be replaced."""
    rng = np.random.default_rng(1)
    async with opened(make, tiny) as it:
        store = it.store
        pages = rng.integers(0, 255, (3, len(store.export_page(0)))).astype(np.uint8)
        for page, data in enumerate(pages):
            store.import_page(page, data)
        slots = rng.standard_normal((4, 5, 7)).astype(np.float32)
        fixed = store.layout.fixed[0]
        for slot, values in enumerate(slots):
            store.array(slot, fixed)[:] = values
        copies = (
            StateCopy("page", 0, 3),
            StateCopy("slot", 0, 1),
            StateCopy("page", 3, 4),
            StateCopy("page", 1, 0),
            StateCopy("slot", 1, 3),
            StateCopy("page", 2, 2),
            StateCopy("slot", 2, 0),
        )
        bind = Bind(0, Sampling(), NOTHING)
        await it.run(Step(1, (Slice(0, 0, table(7), PROMPT[:3]),), (bind,), copies))
        for page, source in enumerate((1, 1, 2, 0, 0)):
            np.testing.assert_array_equal(store.export_page(page), pages[source], err_msg=f"page {page}")
        for slot, source in enumerate((2, 0, 2, 0)):
            np.testing.assert_array_equal(store.array(slot, fixed), slots[source], err_msg=f"slot {slot}")


@pytest.mark.parametrize("make", EXECUTORS)
@pytest.mark.parametrize("copy", [StateCopy("page", 0, 8), StateCopy("page", -1, 0)])
async def test_pages_that_do_not_exist_are_refused(make: Make, copy: StateCopy, tiny: Path) -> None:
    await refused(make, copy, tiny)


@pytest.mark.parametrize("make", WITH_STATE)
@pytest.mark.parametrize("copy", [StateCopy("slot", 4, 0), StateCopy("slot", 0, -1)])
async def test_slots_that_do_not_exist_are_refused(make: Make, copy: StateCopy, tiny: Path) -> None:
    await refused(make, copy, tiny)


async def refused(make: Make, copy: StateCopy, path: Path) -> None:
    async with opened(make, path) as it:
        bind = Bind(0, Sampling(), NOTHING)
        count = OPTIONS.pages if copy.kind == "page" else it.store.slots
        with pytest.raises((InternalError, IndexError), match=rf"(of|are) {count}\b"):
            await it.run(Step(1, (Slice(0, 0, table(7), PROMPT[:3]),), (bind,), (copy,)))


async def test_a_stopped_step_takes_its_copies_with_it(tiny: Path) -> None:
    """The books of the simulated executor: of a page copied in a stopped step nothing may be read; of one that a later
    step copied, what was computed before."""
    async with opened(lambda: SimulatedExecutor(seconds_per_step=0.01, max_in_flight=3), tiny) as it:
        binds = tuple(Bind(slot, Sampling(), PROMPT) for slot in range(3))
        await it.run(Step(1, (Slice(0, 0, table(0, 1), PROMPT[:70]),), binds))
        it.executor.submit(
            Step(2, (Slice(0, 70, table(0, 1), PROMPT[70:80]),), copies=(StateCopy("page", 1, 2),))
        )
        it.executor.submit(
            Step(3, (Slice(1, 70, table(0, 3), PROMPT[70:71]),), copies=(StateCopy("page", 1, 3),))
        )
        it.executor.stop(2)
        assert (await it.executor.wait()).stopped
        assert not (await it.executor.wait()).stopped
        await it.run(Step(4, (Slice(1, 71, table(0, 3), PROMPT[71:72]),)))
        with pytest.raises(InternalError, match="nobody has written"):
            it.executor.submit(Step(5, (Slice(2, 70, table(0, 2), PROMPT[70:71]),)))
