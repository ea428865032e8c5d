"""Another memory budget while text is made: the text stays, and the memory is given back."""

from __future__ import annotations

import os
import re
import resource
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import trio
import trio.testing

import pi2rt
from pi2rt._errors import MemoryBudgetError, RequestError
from pi2rt.cython_kernels.flash.neuron_cache import NeuronCache
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.executors.cpu.neurons import Neurons
from pi2rt.formats import open_model_file
from pi2rt.planner.pack.convert import convert
from pi2rt.planner.weights import all_neurons, least_neurons, with_records
from tests.support.tiny_models import TinyModel, write_gguf

MODEL = TinyModel(
    "llama", seed=1, dim=512, hidden=4096, layers=4, heads=8, kv_heads=2, head_dim=64, config={"hidden_act": "drelu"}
)  # fmt: skip
LARGE = 1 << 30


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resize")
    convert(write_gguf(folder / "m.gguf", MODEL, weight_type="Q4_0"), folder / "m.pi2")
    return folder / "m.pi2"


def sizes(path: Path) -> tuple[int, int]:
    """Bytes of the smallest neuron cache, and of one of all neurons."""
    with open_model_file(path) as file:
        return with_records(file, least_neurons(file)), with_records(file, all_neurons(file))


async def test_text_is_the_same_while_the_budget_changes_a_hundred_times(pack: Path) -> None:
    least, most = sizes(pack)
    async with pi2rt.open_runtime(pack, context=256, memory=LARGE) as runtime:
        expected = (await runtime.generate("Once", max_tokens=100, ignore_eos=True)).tokens
        done = trio.Event()

        async def change() -> None:
            random = np.random.default_rng(5)
            for _ in range(100):
                await runtime.resize(int(LARGE - most + random.integers(least, most)))
            done.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(change)
            rounds = 0
            while not done.is_set() or rounds == 0:
                assert (await runtime.generate("Once", max_tokens=100, ignore_eos=True)).tokens == expected
                rounds += 1
        assert runtime.statistics().actors[0].executor.flash.neurons.evictions > 0


async def test_memory_is_given_back_and_taken_again(pack: Path) -> None:
    least, most = sizes(pack)
    async with pi2rt.open_runtime(pack, context=256, memory=LARGE) as runtime:
        before = runtime.statistics().memory["neurons"]
        await runtime.resize(LARGE - most + least)
        assert runtime.statistics().memory["neurons"] <= least < before
        await runtime.generate("Once", max_tokens=5, ignore_eos=True)
        await runtime.resize(LARGE)
        assert runtime.statistics().memory["neurons"] == before


async def test_memory_for_reads_is_pinned_once_and_follows_the_size(pack: Path) -> None:
    least, most = sizes(pack)
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if os.geteuid() != 0 and soft < most:
        pytest.skip(f"this user may pin {soft} bytes of memory (RLIMIT_MEMLOCK), and the model needs {most}")

    if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) < (5, 19):
        pytest.skip(f"Linux {os.uname().release} cannot register memory in pieces (5.19)")

    def pinned(runtime: pi2rt.Runtime) -> object:
        return runtime.statistics().actors[0].executor.flash.pinned_bytes

    async with pi2rt.open_runtime(pack, context=256, memory=LARGE) as runtime:
        if not str(runtime.statistics().actors[0].executor.flash.io).startswith("io_uring"):
            pytest.skip("io_uring is not permitted here")
        assert pinned(runtime) == runtime.statistics().memory["neurons"]
        expected = (await runtime.generate("Once", max_tokens=20, ignore_eos=True)).tokens
        for budget in (least, (least + most) // 2, least, most):
            await runtime.resize(LARGE - most + budget)
            assert pinned(runtime) == runtime.statistics().memory["neurons"]
            assert (await runtime.generate("Once", max_tokens=20, ignore_eos=True)).tokens == expected
    async with pi2rt.open_runtime(pack, context=256, memory=LARGE, io="preadv") as runtime:
        assert pinned(runtime) == 0


def cache_of(runtime: pi2rt.Runtime) -> NeuronCache:
    executor = runtime._actors[0]._executor
    assert isinstance(executor, CpuExecutor)
    assert executor._neurons is not None
    return executor._neurons.cache


def used_slots(runtime: pi2rt.Runtime) -> tuple[int, int]:
    """(pages of neurons in the cache, pages that have room)"""
    return cache_of(runtime).slots_used, runtime.statistics().memory["neurons"] // 4096


def misses(runtime: pi2rt.Runtime) -> int:
    neurons = runtime.statistics().actors[0].executor.flash.neurons
    return neurons.misses + neurons.early


@pytest.mark.parametrize("io", ["auto", "preadv"])
async def test_growing_fills_what_is_new(pack: Path, io: Literal["auto", "preadv"]) -> None:
    """With what was used most of late: nothing is missing afterwards, though nobody asked for it."""
    least, most = sizes(pack)
    async with pi2rt.open_runtime(pack, context=256, memory=LARGE, io=io) as runtime:
        expected = (await runtime.generate("Once", max_tokens=30, ignore_eos=True)).tokens
        await runtime.resize(LARGE - most + least)
        assert (await runtime.generate("Once", max_tokens=30, ignore_eos=True)).tokens == expected
        assert misses(runtime) > 0
        await runtime.resize(LARGE)
        used, slots = used_slots(runtime)
        assert used == slots
        before = misses(runtime)
        assert (await runtime.generate("Once", max_tokens=30, ignore_eos=True)).tokens == expected
        assert misses(runtime) == before


async def test_what_was_used_most_comes_first(pack: Path) -> None:
    least, most = sizes(pack)
    async with pi2rt.open_runtime(pack, context=256, memory=LARGE) as runtime:
        await runtime.resize(LARGE - most + least)
        await runtime.generate("Once", max_tokens=30, ignore_eos=True)
        before = cache_of(runtime).absent()
        await runtime.resize(LARGE - most // 2)
        after = cache_of(runtime).absent()
        used, slots = used_slots(runtime)
        assert used == slots
        read, left = (before >= 0) & (after < 0), after >= 0
        assert read.sum() > 100
        assert left.sum() > 100
        assert len(np.unique(before[read | left])) > 10
        assert before[read].min() >= before[left].max()
        np.testing.assert_array_equal(before[left], after[left])


async def test_growing_while_text_is_made_and_shrinking_meanwhile(pack: Path) -> None:
    least, most = sizes(pack)
    async with pi2rt.open_runtime(pack, context=256, memory=LARGE) as runtime:
        await runtime.resize(LARGE - most + least)
        expected = (await runtime.generate("Once", max_tokens=60, ignore_eos=True)).tokens
        done = trio.Event()

        async def write() -> None:
            while not done.is_set():
                assert (await runtime.generate("Once", max_tokens=60, ignore_eos=True)).tokens == expected

        async with trio.open_nursery() as nursery:
            nursery.start_soon(write)
            for _ in range(10):
                async with (
                    trio.open_nursery() as resizes
                ):  # the last call counts, and ends filling for the others
                    resizes.start_soon(runtime.resize, LARGE)
                    await trio.testing.wait_all_tasks_blocked()
                    resizes.start_soon(runtime.resize, LARGE - most + least)
                assert runtime.statistics().memory["neurons"] <= least
            await runtime.resize(LARGE)
            used, slots = used_slots(runtime)
            assert used == slots
            done.set()
        assert (await runtime.generate("Once", max_tokens=60, ignore_eos=True)).tokens == expected


async def test_a_cancelled_growth_keeps_its_size(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pi2rt.executors.cpu.neurons.REFILL_PAGES", 1)
    refill, scope, pages = Neurons.refill, trio.CancelScope(), 0

    def refill_until_cancelled(neurons: Neurons, check: Callable[[], None]) -> None:
        def check_page() -> None:
            nonlocal pages
            pages += 1
            if pages == 3:
                trio.from_thread.run_sync(scope.cancel)
            check()

        refill(neurons, check_page)

    least, most = sizes(pack)
    async with pi2rt.open_runtime(pack, context=256, memory=LARGE) as runtime:
        _, all_slots = used_slots(runtime)
        await runtime.resize(LARGE - most + least)
        expected = (await runtime.generate("Once", max_tokens=10, ignore_eos=True)).tokens
        before, _ = used_slots(runtime)
        monkeypatch.setattr(Neurons, "refill", refill_until_cancelled)
        with scope:
            await runtime.resize(LARGE)
        assert scope.cancelled_caught
        used, slots = used_slots(runtime)
        assert before <= used < slots == all_slots
        assert (await runtime.generate("Once", max_tokens=10, ignore_eos=True)).tokens == expected
        await runtime.resize(LARGE - 4096)  # goes on where it was
        assert used_slots(runtime)[0] > used


async def test_closing_ends_a_growth(pack: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pi2rt.executors.cpu.neurons.REFILL_PAGES", 1)
    refill, growing, pages = Neurons.refill, trio.Event(), 0

    def refill_until_closed(neurons: Neurons, check: Callable[[], None]) -> None:
        def check_page() -> None:
            nonlocal pages
            pages += 1
            if pages == 3:
                trio.from_thread.run_sync(growing.set)
                while not neurons._closed:
                    time.sleep(0.001)
            check()

        refill(neurons, check_page)

    least, most = sizes(pack)
    async with trio.open_nursery() as nursery:
        async with pi2rt.open_runtime(pack, context=256, memory=LARGE) as runtime:
            await runtime.resize(LARGE - most + least)
            monkeypatch.setattr(Neurons, "refill", refill_until_closed)
            nursery.start_soon(runtime.resize, LARGE)
            await growing.wait()
            assert used_slots(runtime)[0] < used_slots(runtime)[1]
    assert pages == 3


async def test_reads_that_fail_while_growing_fail_no_step(pack: Path, tmp_path: Path) -> None:
    """What cannot be read then is read when it is asked for."""
    copy = Path(shutil.copy(pack, tmp_path / "m.pi2"))
    least, most = sizes(copy)
    async with pi2rt.open_runtime(copy, context=256, memory=LARGE) as runtime:
        await runtime.resize(LARGE - most + least)
        expected = (await runtime.generate("Once", max_tokens=10, ignore_eos=True)).tokens
        os.truncate(copy, 4096)
        await runtime.resize(LARGE)
        restore(copy, pack)
        assert (await runtime.generate("Once", max_tokens=10, ignore_eos=True)).tokens == expected


def restore(copy: Path, pack: Path) -> None:
    """The same file again, where it was cut."""
    copy.write_bytes(pack.read_bytes())


async def test_too_little_is_refused_and_changes_nothing(pack: Path) -> None:
    least, most = sizes(pack)
    async with pi2rt.open_runtime(pack, context=256, memory=LARGE) as runtime:
        with pytest.raises(
            MemoryBudgetError, match="is too small; the least that a running model can change to is"
        ):
            await runtime.resize(LARGE - most + least - 1)
        with pytest.raises(RequestError, match="'much' is not a size"):
            await runtime.resize("much")
        assert (await runtime.generate("Once", max_tokens=3, ignore_eos=True)).tokens
    async with pi2rt.open_runtime(pack, context=256) as runtime:
        with pytest.raises(RequestError, match="takes a memory budget, and weights as they are"):
            await runtime.resize("1G")


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("resize-dense")
    model = replace(MODEL, config={"hidden_act": "silu"})
    convert(write_gguf(folder / "m.gguf", model, weight_type="Q4_0"), folder / "m.pi2")
    return folder / "m.pi2"


def streamed_bytes(runtime: pi2rt.Runtime) -> int:
    """Of the last step."""
    recent = runtime.statistics().actors[0].executor.recent
    return recent[-1].streamed_bytes


async def least_of(runtime: pi2rt.Runtime) -> int:
    """Bytes of the smallest budget that it can change to."""
    with pytest.raises(MemoryBudgetError, match="the least that a running model can change to is") as caught:
        await runtime.resize(1 << 20)
    return int(str(caught.value).rsplit(" is ", 1)[1].split()[0]) << 20


async def test_weights_that_no_longer_fit_are_streamed_and_the_text_stays(dense: Path) -> None:
    """Of a model whose neurons do not rest: some weights are read in every step then, and none at the end."""
    async with pi2rt.open_runtime(dense, context=256, memory=LARGE) as runtime:
        expected = (await runtime.generate("Once", max_tokens=60, ignore_eos=True)).tokens
        held, least = runtime.statistics().memory["weights"], await least_of(runtime)
        assert streamed_bytes(runtime) == 0
        random, tokens = np.random.default_rng(6), []
        async with runtime.stream("Once", max_tokens=60, ignore_eos=True) as stream:
            async for chunk in stream:
                tokens.append(chunk.token)
                if len(tokens) % 6 == 0:
                    await runtime.resize(int(least + random.integers(0, held)))
        assert tuple(tokens) == expected
        await runtime.resize(least)
        assert (await runtime.generate("Once", max_tokens=60, ignore_eos=True)).tokens == expected
        assert streamed_bytes(runtime) > 0
        assert runtime.statistics().memory["weights"] < held
        await runtime.resize(LARGE)
        assert (await runtime.generate("Once", max_tokens=60, ignore_eos=True)).tokens == expected
        assert streamed_bytes(runtime) == 0
        assert runtime.statistics().memory["weights"] == held
        assert runtime.statistics().actors[0].failed == 0


async def test_requests_do_not_notice_that_weights_are_loaded_again(dense: Path) -> None:
    """Several at once, sampled, with resizes at the same time, of which one is cancelled."""
    async with pi2rt.open_runtime(dense, context=256, memory=LARGE, max_sequences=4) as runtime:
        least = await least_of(runtime)
        expected: dict[int, object] = {}
        got: dict[int, object] = {}

        async def ask(seed: int, into: dict[int, object]) -> None:
            one = await runtime.generate("Once", max_tokens=40, ignore_eos=True, temperature=1, seed=seed)
            into[seed] = one.tokens

        async with trio.open_nursery() as nursery:
            for seed in range(4):
                nursery.start_soon(ask, seed, expected)
        async with trio.open_nursery() as nursery:
            for seed in range(4):
                nursery.start_soon(ask, seed, got)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(runtime.resize, least)
            nursery.start_soon(runtime.resize, LARGE)
            with trio.CancelScope() as scope:
                scope.cancel()
                await runtime.resize(least)
        assert got == expected
        await runtime.resize(least)
        await ask(0, got)
        assert got == expected


async def test_the_same_weights_are_not_loaded_again(dense: Path) -> None:
    async with pi2rt.open_runtime(dense, context=256, memory=LARGE) as runtime:
        await runtime.resize(LARGE - (1 << 20))
        assert runtime.statistics().actors[0].generation == 0


@pytest.mark.parametrize(
    "option", [{"cache": "off"}, {"pipeline": "none"}, {"cache": "8M", "pipeline": "matrix"}]
)
async def test_options_that_would_do_nothing_are_refused(
    pack: Path, tmp_path: Path, option: dict[str, str]
) -> None:
    with pytest.raises(RequestError, match="takes a memory budget, and a pack with neuron bundles"):
        async with pi2rt.open_runtime(pack, context=256, **option):  # type: ignore[arg-type]
            pass
    async with pi2rt.open_runtime(pack, context=256, memory=LARGE, **option) as runtime:  # type: ignore[arg-type]
        assert (await runtime.generate("Once", max_tokens=3, ignore_eos=True)).tokens
