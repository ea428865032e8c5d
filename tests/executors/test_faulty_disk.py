"""Weights on a disk that comes short or does not answer: nothing is computed on bytes that did not arrive, and whoever
waits can be stopped."""

from __future__ import annotations

import errno
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from pi2rt._errors import ExecutorError, RequestError
from pi2rt.cython_kernels.kernels import native
from pi2rt.cython_kernels.plane.program import CLUSTER
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.formats import open_model_file
from pi2rt.formats.placement import Placement
from pi2rt.models import describe
from pi2rt.models.stream_pieces import cut, matrices_in_order
from pi2rt.planner.pack.convert import convert
from pi2rt.runtime.actor import Actor
from pi2rt.runtime.executor import ExecutorOptions, StepExecutor
from pi2rt.runtime.flash_reads import FlashReads
from pi2rt.runtime.step import Bind, Sampling, Slice, Step
from tests.support.faulty_disk import FaultyDisk
from tests.support.native_threads import settles_at
from tests.support.running import NOTHING, all_logits, open_with_state, opened, page_table
from tests.support.tiny_models import TinyModel, write_gguf

DEADLINE = 0.2
TOKENS = np.arange(3, 40, dtype=np.int32)
SIZES: dict[str, Any] = {"dim": 256, "layers": 3, "heads": 4, "kv_heads": 2, "head_dim": 64}
MODELS = {
    "streamed": TinyModel("llama", seed=5, hidden=512, **SIZES),
    "neurons": TinyModel("llama", seed=6, hidden=1216, config={"hidden_act": "drelu"}, **SIZES),
}


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("packs")
    for name, model in MODELS.items():
        source = write_gguf(folder / f"{name}.gguf", model, weight_type="Q4_0", types={"token_embd": "Q8_0"})
        convert(source, folder / f"{name}.pi2")
    return {name: folder / f"{name}.pi2" for name in MODELS} | {"rows": folder / "streamed.pi2"}


@pytest.fixture(params=["streamed", "neurons", "rows"])
def way(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def source(packs: dict[str, Path], way: str) -> Path:
    return packs[way]


@pytest.fixture
def disk(source: Path) -> Iterator[FaultyDisk]:
    with FaultyDisk(source) as disk:
        yield disk
    for name in "pi2rt/io", "pi2rt/flash", "pi2rt/neurons":  # those that hung as well
        assert settles_at(name, 0)


READS = FlashReads(stream_bytes=16384)
"""So that a matrix has many pieces."""


def options(path: Path, way: str, **more: Any) -> dict[str, Any]:
    """As little in memory as can be."""
    given: dict[str, Any] = {"exact_floats": False}
    with open_model_file(path) as file:
        if way == "streamed":
            names = tuple(name for name, _ in matrices_in_order(describe(file)))
            ring = cut(file, describe(file), names, READS.stream_bytes).ring
            # One sequence, whose page table has the last page: so its cache has no reclaimable memory, and all is read.
            given |= {
                "placements": dict.fromkeys(names, Placement.STREAMED),
                "ring_bytes": ring,
                "reads": READS,
                "slots": 1,
            }
        elif way == "rows":
            given["placements"] = {"token_embd.weight": Placement.BY_ROW}
        else:
            bundles = list(file.bundles.values())
            cluster = max(-(-CLUSTER // each.neurons_per_page) + 1 for each in bundles)
            given["neuron_bytes"] = cluster * max(each.page_bytes for each in bundles)
    return given | more


async def resident(path: Path) -> np.ndarray[Any, Any]:
    async with opened(CpuExecutor(), path, exact_floats=False) as executor:
        return await all_logits(executor, TOKENS)


@pytest.mark.parametrize("io", ["auto", "preadv"])
async def test_reads_that_come_short_are_completed(disk: FaultyDisk, source: Path, way: str, io: str) -> None:
    expected = await resident(source)
    async with opened(CpuExecutor(), disk.path, **options(source, way, io=io)) as executor:
        disk.come_short()
        for _ in range(4):
            np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)
        why = (
            "asked for"
            if io == "preadv"
            else "reads of this file system cannot be told not to wait (EOPNOTSUPP)"
        )
        if way != "rows":  # which are read with preadv always
            assert executor.statistics().flash.io == f"preadv: {why}"


@pytest.mark.parametrize("way", ["streamed", "neurons"])
async def test_io_uring_is_refused_where_it_gives_wrong_bytes(
    disk: FaultyDisk, source: Path, way: str
) -> None:
    with pytest.raises(RequestError, match=rf"^{disk.path}: io='uring': .*; take io='preadv' or 'auto'"):
        async with opened(CpuExecutor(), disk.path, **options(source, way, io="uring")):
            pass


async def test_steps_that_wait_for_a_read_are_stopped(disk: FaultyDisk, source: Path, way: str) -> None:
    """At once, and not when the read ends; those after them get what they need, bit for bit."""
    expected = await resident(source)
    async with opened(CpuExecutor(), disk.path, **options(source, way)) as executor:
        for _ in range(3):
            np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)
            disk.hang()
            for number in range(4):  # a ring may hold what the first ones need
                part = Slice(0, 0, page_table(0), TOKENS, sample=True)
                executor.submit(Step(number, (part,), (Bind(0, Sampling(), NOTHING),)))
            while not disk.hanging():  # noqa: ASYNC110  another process counts them
                await trio.sleep(0.001)
            before = time.monotonic()
            for number in range(4):
                executor.stop(number)
            with trio.fail_after(5):
                results = [await executor.wait() for _ in range(4)]
            assert results[-1].stopped
            assert time.monotonic() - before < 0.5  # 10 ms, on a machine that has time
            disk.work()


async def fails(executor: StepExecutor) -> None:
    """Of a few steps: the first ones may need nothing new."""
    match = r"reading weights: no read has ended for 0.2 s; the device does not answer"
    with pytest.raises(OSError, match=match):  # noqa: PT012
        for _ in range(4):
            await all_logits(executor, TOKENS)


def resident_bytes(first: int, size: int) -> int:
    """Of these addresses, by what the system says of the mappings in them."""
    found, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if header := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            begin, end = int(header[1], 16), int(header[2], 16)
            inside = begin < first + size and end > first
        elif inside and line.startswith("Rss:"):
            found += int(line.split()[1]) * 1024
    return found


@pytest.fixture
def memories(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """(address, bytes, of these resident before) of all memory that was abandoned."""
    abandoned: list[tuple[int, int, int]] = []

    class Memory(native.Memory):
        def abandon(self) -> bool:
            abandoned.append((self.address, self.nbytes, resident_bytes(self.address, self.nbytes)))
            return super().abandon()

    monkeypatch.setattr(native, "Memory", Memory)
    return abandoned


@pytest.mark.parametrize("io", ["auto", "preadv"])
async def test_of_memory_that_may_be_written_to_only_that_stays(
    disk: FaultyDisk, source: Path, way: str, io: str, memories: list[tuple[int, int, int]]
) -> None:
    given = options(source, way, io=io, read_deadline=DEADLINE)
    if way == "streamed":  # more than what can be in flight
        given["ring_bytes"] *= 16
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        async with opened(CpuExecutor(), disk.path, **given) as executor:
            await all_logits(executor, TOKENS)
            disk.hang()
            await fails(executor)
            before = time.monotonic()
        assert time.monotonic() - before < 2
    [warning] = [str(each.message) for each in caught if each.category is RuntimeWarning]
    late = disk.hanging_bytes()
    assert late > 0
    assert warning == (
        f"{disk.path}: the device does not answer; {late} bytes that it may write to stay taken until it does"
    )
    assert len(memories) == (2 if way == "streamed" else 1)  # a ring, and reclaimable memory
    assert late <= sum(nbytes for _, nbytes, _ in memories)
    assert sum(resident for _, _, resident in memories) > 0
    assert all(resident_bytes(address, nbytes) == 0 for address, nbytes, _ in memories)
    disk.work()  # what hung is written now, and not to memory of anybody
    for name in "pi2rt/io", "pi2rt/flash", "pi2rt/neurons":
        assert settles_at(name, 0)
    assert all(resident_bytes(address, nbytes) == 0 for address, nbytes, _ in memories)


@pytest.mark.parametrize("wholly", [True, False])
async def test_opening_has_the_deadline_too(disk: FaultyDisk, source: Path, way: str, wholly: bool) -> None:
    """Where a read through the page cache hangs, as that of resident weights, and where only those past it do."""
    expected = await resident(source)
    given = options(source, way, read_deadline=DEADLINE)
    needed = ExecutorOptions(**{"slots": 1, "pages": 16, "context": 1024, "max_tokens": 64} | given)
    with open_model_file(disk.path) as file:
        for _ in range(2):
            (disk.hang_wholly if wholly else disk.hang)()
            executor = CpuExecutor()
            with trio.fail_after(5), warnings.catch_warnings():
                warnings.simplefilter(
                    "ignore", RuntimeWarning
                )  # of neurons' memory, where that was made already
                with pytest.raises(OSError, match=r"reading weights: no read has ended for 0.2 s") as caught:
                    await open_with_state(executor, file, needed)
                await executor.aclose()
            assert caught.value.errno == errno.ETIMEDOUT
            assert caught.value.filename == str(disk.path)
            disk.work()
    async with opened(CpuExecutor(), disk.path, **given) as executor:
        np.testing.assert_array_equal(await all_logits(executor, TOKENS), expected)


@pytest.mark.parametrize("way", ["streamed"])
@pytest.mark.parametrize("recovers", [True, False])
async def test_an_actor_whose_device_does_not_answer(
    disk: FaultyDisk, source: Path, way: str, recovers: bool
) -> None:
    """It makes its executor again where the device has come back, else it says why not; closing ends either way."""
    given = ExecutorOptions(
        **{"slots": 1, "pages": 16, "context": 1024, "max_tokens": 64}
        | options(source, way, read_deadline=DEADLINE)
    )
    step = Step(1, (Slice(0, 0, page_table(0), TOKENS, logits=True),), (Bind(0, Sampling(), NOTHING),))
    with open_model_file(disk.path) as file, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # of the ring

        async def open_executor(executor: StepExecutor) -> None:
            if recovers and disk.hanging():
                disk.work()
            await open_with_state(executor, file, given)

        actor = Actor("cpu", CpuExecutor, open_executor)
        with trio.fail_after(10):
            async with trio.open_nursery() as nursery:
                await nursery.start(actor.run)
                await actor.submit(step)
                expected = (await actor.result()).logits[0]
                disk.hang()
                with pytest.raises(ExecutorError, match="the device does not answer"):  # noqa: PT012
                    for _ in range(4):
                        await actor.submit(step)
                        await actor.result()
                if recovers:
                    await actor.submit(step)
                    np.testing.assert_array_equal((await actor.result()).logits[0], expected)
                else:
                    with pytest.raises(ExecutorError, match="the device does not answer"):
                        await actor.submit(step)
                    assert actor.statistics().state == "broken"
                await actor.aclose()
