"""What failed once does not fail for ever: packs that are cut and made whole, devices that stall, and changes of the
budget meanwhile. Text is the same afterwards."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import time
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

import pi2rt
from pi2rt._errors import ExecutorError
from pi2rt.formats import open_model_file
from pi2rt.planner.pack.convert import convert
from pi2rt.planner.weights import all_neurons, least_neurons, with_records
from tests.support.faulty_disk import FaultyDisk
from tests.support.native_threads import settles_at
from tests.support.tiny_models import TinyModel, write_gguf

MODEL = TinyModel("llama", seed=1, dim=512, hidden=2048, layers=4, heads=8, kv_heads=2, head_dim=64)
LARGE = 1 << 30
DEADLINE = 1.0
KINDS = ("streamed", "neurons")


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("recovery")
    for kind, activation in zip(KINDS, ("silu", "drelu"), strict=True):
        model = replace(MODEL, config={"hidden_act": activation})
        convert(write_gguf(folder / f"{kind}.gguf", model, weight_type="Q4_0"), folder / f"{kind}.pi2")
    return {kind: folder / f"{kind}.pi2" for kind in KINDS}


@pytest.fixture(params=KINDS)
def pack(request: pytest.FixtureRequest, packs: dict[str, Path]) -> Path:
    return packs[request.param]


@pytest.fixture
def disk(pack: Path) -> Iterator[FaultyDisk]:
    with warnings.catch_warnings(), FaultyDisk(pack) as disk:
        warnings.simplefilter("ignore", RuntimeWarning)  # memory that a device may still write to
        yield disk
    for name in "pi2rt/io", "pi2rt/flash", "pi2rt/neurons":
        assert settles_at(name, 0)


async def budgets(runtime: pi2rt.Runtime, path: Path) -> tuple[int, int]:
    """The least that it can change to, and one in which everything stays."""
    with open_model_file(path) as file:
        if file.bundles:
            needed = with_records(file, all_neurons(file)) - with_records(file, least_neurons(file))
            return LARGE - needed, LARGE
    with pytest.raises(
        pi2rt.MemoryBudgetError, match="the least that a running model can change to is"
    ) as caught:
        await runtime.resize(1 << 20)
    return int(str(caught.value).rsplit(" is ", 1)[1].split()[0]) << 20, LARGE


def held(runtime: pi2rt.Runtime) -> int:
    """Bytes of what a budget decides."""
    memory = runtime.statistics().memory
    return memory["weights"] + memory.get("neurons", 0)


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 7 // 10)


def restore(path: Path, whole: Path) -> None:
    """The same file again, not another of that name."""
    path.write_bytes(whole.read_bytes())


async def text(runtime: pi2rt.Runtime, **more: Any) -> tuple[int, ...]:
    with trio.fail_after(30):
        return (await runtime.generate("Once", max_tokens=20, ignore_eos=True, **more)).tokens


async def test_a_pack_that_is_cut_fails_requests_until_it_is_whole(pack: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(pack, tmp_path / "m.pi2"))
    async with pi2rt.open_runtime(copy, context=256, memory=LARGE) as runtime:
        least, _ = await budgets(runtime, copy)
        await runtime.resize(least)
        expected = await text(runtime)
        for _ in range(2):
            cut(copy)
            for _ in range(2):
                with pytest.raises(ExecutorError, match=r"the file ends too early|ended at byte"):
                    await text(runtime)
            restore(copy, pack)
            assert await text(runtime) == expected


async def test_a_pack_that_another_took_the_name_of_is_still_read(pack: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copy(pack, tmp_path / "m.pi2"))
    async with pi2rt.open_runtime(copy, context=256, memory=LARGE) as runtime:
        least, most = await budgets(runtime, copy)
        await runtime.resize(least)
        expected = await text(runtime)
        (tmp_path / "other").write_bytes(b"x" * 4096)
        os.replace(tmp_path / "other", copy)
        assert await text(runtime) == expected
        await runtime.resize(most)
        assert await text(runtime) == expected


async def test_a_resize_whose_rebuild_fails_says_so_and_the_next_request_tries_again(
    packs: dict[str, Path], tmp_path: Path
) -> None:
    copy = Path(shutil.copy(packs["streamed"], tmp_path / "m.pi2"))
    async with pi2rt.open_runtime(copy, context=256, memory=LARGE) as runtime:
        least, most = await budgets(runtime, copy)
        whole, expected = held(runtime), await text(runtime)
        cut(copy)
        with pytest.raises(ExecutorError, match=r"broken: ModelFormatError.*the next request tries again"):
            await runtime.resize(least)
        restore(copy, packs["streamed"])
        assert await text(runtime) == expected
        assert held(runtime) < whole  # the new size holds
        await runtime.resize(most)
        assert held(runtime) == whole
        assert await text(runtime) == expected


async def test_a_device_that_stalls_fails_requests_until_it_answers(disk: FaultyDisk) -> None:
    async with pi2rt.open_runtime(disk.path, context=256, memory=LARGE, read_deadline=DEADLINE) as runtime:
        least, _ = await budgets(runtime, disk.path)
        await runtime.resize(least)
        expected = await text(runtime)
        disk.hang_wholly()
        for _ in range(2):
            with pytest.raises(ExecutorError, match="the device does not answer"):
                await text(runtime)
        disk.work()
        assert await text(runtime) == expected


@pytest.mark.parametrize("grows", [True, False])
async def test_a_resize_while_the_device_stalls_is_not_lost(disk: FaultyDisk, grows: bool) -> None:
    """It fails, or ends, in bounded time; the new size holds when the device answers again."""
    async with pi2rt.open_runtime(disk.path, context=256, memory=LARGE, read_deadline=DEADLINE) as runtime:
        least, most = await budgets(runtime, disk.path)
        middle = (least + most) // 2 if disk.path.name == "neurons" else least + (1 << 20)
        sizes = {}
        for size in (most, middle, least):
            await runtime.resize(size)
            sizes[size] = held(runtime)
        await runtime.resize(middle)
        expected = await text(runtime)
        new = most if grows else least

        async def fails() -> None:
            with pytest.raises(ExecutorError):
                await text(runtime)

        async def resize() -> None:
            with trio.fail_after(20), contextlib.suppress(ExecutorError):  # it may find the device well again
                await runtime.resize(new)

        disk.hang_wholly()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(fails)
            while not disk.hanging():  # noqa: ASYNC110  another process counts them
                await trio.sleep(0.001)
            nursery.start_soon(resize)
        disk.work()
        assert await text(runtime) == expected
        assert held(runtime) == sizes[new]


async def test_a_resize_while_the_executor_is_made_again_waits(disk: FaultyDisk) -> None:
    async with pi2rt.open_runtime(disk.path, context=256, memory=LARGE, read_deadline=2.0) as runtime:
        least, _ = await budgets(runtime, disk.path)
        await runtime.resize(least)
        small, expected = held(runtime), await text(runtime)
        disk.hang_wholly()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(runtime._actors[0].reopen, lambda: None)
            while runtime.statistics().actors[0].state != "rebuilding" or not disk.hanging():  # noqa: ASYNC110
                await trio.sleep(0.001)
            nursery.start_soon(runtime.resize, LARGE)
            nursery.start_soon(runtime.resize, LARGE - 1)
            await trio.testing.wait_all_tasks_blocked()
            disk.work()
        assert held(runtime) > small
        assert await text(runtime) == expected


async def test_a_failed_read_is_repaired_without_loading_weights(disk: FaultyDisk) -> None:
    """The requests of the step fail. Others go on from what is computed, and the executor is the same one."""
    loads: list[int] = []
    async with pi2rt.open_runtime(
        disk.path, context=256, memory=LARGE, on_load=lambda done, total: loads.append(done)
    ) as runtime:
        least, _ = await budgets(runtime, disk.path)
        await runtime.resize(least)
        expected = await text(runtime)
        actor = runtime._actors[0]
        executor, loaded = actor._executor, len(loads)
        for _ in range(2):
            disk.fail(errno.EIO)
            with pytest.raises(ExecutorError, match="Input/output error"):
                await text(runtime)
            disk.work()
            begin = time.perf_counter()
            assert await text(runtime) == expected
            print(f"{time.perf_counter() - begin:.3f} s from the error to the end of the next answer")
        assert actor._executor is executor
        assert actor.generation >= 2
        assert len(loads) == loaded


async def test_who_is_not_in_the_failed_step_goes_on_from_its_pages(disk: FaultyDisk) -> None:
    async with pi2rt.open_runtime(disk.path, context=256, memory=LARGE, max_sequences=2) as runtime:
        least, _ = await budgets(runtime, disk.path)
        await runtime.resize(least)
        prompt = list(range(5, 105))
        expected = (await runtime.generate(prompt, max_tokens=30, ignore_eos=True)).tokens
        got: list[int] = []
        # its consumer reads nothing, so that no step has a slice of it, until the other has failed
        params = pi2rt.SamplingParams(max_tokens=30, ignore_eos=True)
        async with runtime.stream(prompt, params) as stream:
            got.append((await anext(stream)).token)
            while runtime.statistics().engine.steps_in_flight:  # noqa: ASYNC110 - until all 30 tokens are there
                await trio.sleep(0.001)
            disk.fail(errno.EIO)
            with pytest.raises(ExecutorError):
                await text(runtime)
            disk.work()
            got += [chunk.token async for chunk in stream]
        assert tuple(got) == expected
        computed = runtime.statistics().engine.prefill_tokens
        assert (await runtime.generate(prompt, max_tokens=30, ignore_eos=True)).tokens == expected
        assert runtime.statistics().engine.prefill_tokens - computed < len(
            prompt
        )  # its pages are still known
