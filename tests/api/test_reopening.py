"""Opening and closing again and again, failing and cancelled attempts among them, changes nothing: what a budget
accepts, what the process holds, and what a closed engine keeps."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import trio

import pi2rt
from pi2rt._errors import ClosedError, MemoryBudgetError
from pi2rt.executors.simulated.executor import Faults, SimulatedExecutor
from pi2rt.planner.pack.convert import convert
from tests.support.real_model import smollm2
from tests.support.tiny_models import TinyModel, write_gguf

ROOT = Path(__file__).parent.parent.parent
MIB = 1 << 20


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("reopening")
    convert(write_gguf(folder / "m.gguf", TinyModel(context=1024), weight_type="Q4_0"), folder / "m.pi2")
    return folder / "m.pi2"


def apart(script: str, *arguments: object, **environment: str) -> list[list[str]]:
    """The words of each line that a script printed in a process of its own, which is measured."""
    start = f"import sys; sys.path.append({str(ROOT)!r})\n{script}"  # the checkout last: what is installed is tested
    done = subprocess.run(
        [sys.executable, "-P", "-c", start, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=1800,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [line.split() for line in done.stdout.splitlines()]


MEASURE = """
import gc, os, re, sys, threading
import trio, pi2rt
from pathlib import Path
from pi2rt.cython_kernels.kernels.native import trim_heap
from pi2rt.executors.simulated.executor import Faults, SimulatedExecutor

PACK, ROUNDS, CONTEXT, SMALL, ENOUGH = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
broken = Path(PACK).with_name("broken.pi2")
broken.write_bytes(Path(PACK).read_bytes()[:-4096])


def refused(**options):
    try:
        with pi2rt.Engine(PACK, context=CONTEXT, **options):
            raise AssertionError("it was opened")
    except pi2rt.MemoryBudgetError as error:
        return int(re.search(r"the least is (\\d+) MiB", str(error))[1])


def fails(kind, path=PACK, **options):
    try:
        with pi2rt.Engine(path, context=CONTEXT, **options):
            raise AssertionError("it was opened")
    except kind:
        return


async def cancelled():
    with trio.move_on_after(0.01):
        async with pi2rt.open_runtime(PACK, memory=ENOUGH, context=CONTEXT):
            await trio.sleep_forever()


def measure(round):
    least = refused(memory=SMALL)
    gc.collect()
    trim_heap()
    rss = int(re.search(r"VmRSS:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
    native = [each for each in os.listdir("/proc/self/task")
              if not Path(f"/proc/self/task/{each}/comm").read_text().startswith(("Trio", "python", "pi2rt\\n"))]
    print(round, least, rss, len(os.listdir("/proc/self/fd")), len(native), flush=True)


def unable():
    return SimulatedExecutor(faults=Faults(raise_in_open=True))


text = None
for round in range(ROUNDS):
    if round % 3 == 1:
        refused(memory="1M")
        fails(pi2rt.ModelFormatError, str(broken), memory=ENOUGH)
        fails(Exception, memory=ENOUGH, executor=unable)
        trio.run(cancelled)
    with pi2rt.Engine(PACK, memory=ENOUGH, context=CONTEXT) as engine:
        got = engine.generate("Hi", max_tokens=4, ignore_eos=True).text
    assert got == (text or got)
    text = got
    if round % 10 == 9:
        measure(round)
"""


def check(lines: list[list[str]], warm: int, rss_mib: int) -> None:
    """That nothing grows after the first ``warm`` of these measurements."""
    rounds = [list(map(int, line)) for line in lines]
    assert len(rounds) > warm
    _, leasts, rss, descriptors, threads = zip(*rounds, strict=True)
    assert max(leasts) - min(leasts) <= rss_mib, leasts
    assert max(rss[warm:]) - rss[warm - 1] <= rss_mib * 1024, rss
    assert len(set(descriptors[warm:])) == 1, descriptors
    assert set(threads) == {threads[0]}, threads


def test_forty_times(pack: Path) -> None:
    check(apart(MEASURE, pack, 40, 256, "40M", "400M"), 2, 3)


@pytest.mark.slow
def test_a_thousand_times(pack: Path) -> None:
    check(apart(MEASURE, pack, 1000, 256, "40M", "400M"), 3, 3)


@pytest.mark.slow
def test_a_real_model_sixty_times(tmp_path: Path) -> None:
    convert(smollm2(), tmp_path / "s.pi2")
    check(apart(MEASURE, tmp_path / "s.pi2", 60, 512, "115M", "300M"), 2, 3)


LEAST = """
import re, sys, pi2rt
for _ in range(int(sys.argv[2])):
    try:
        with pi2rt.Engine(sys.argv[1], memory=sys.argv[3], context=512) as engine:
            engine.generate("Hi", max_tokens=2, ignore_eos=True)
        print("accepted")
    except pi2rt.MemoryBudgetError as error:
        print(re.search(r"the least is (\\d+) MiB", str(error))[1])
"""


def test_what_was_accepted_once_is_accepted_again(tmp_path: Path) -> None:
    """With the very least of a fresh process, of a model whose tokenizer is large."""
    convert(smollm2(), tmp_path / "s.pi2")
    [[least]] = apart(LEAST, tmp_path / "s.pi2", 1, "115M")
    budget = f"{int(least) + 1}M"  # from one process to the next, resident pages differ
    assert apart(LEAST, tmp_path / "s.pi2", 15, budget) == [["accepted"]] * 15


async def test_a_closed_runtime_keeps_no_tokenizer(pack: Path) -> None:
    async with pi2rt.open_runtime(pack, context=256, memory="4G") as runtime:
        async with runtime.stream("Hi", max_tokens=2) as stream:
            chunks = [chunk async for chunk in stream]
        tokenizer = weakref.ref(runtime.tokenizer)
        assert chunks
    with pytest.raises(ClosedError, match="the engine is closed"):
        _ = runtime.tokenizer
    gc.collect()  # of Trio's own tasks
    assert tokenizer() is None
    assert stream is not None


def test_a_closed_engine_keeps_no_tokenizer(pack: Path) -> None:
    with pi2rt.Engine(pack, context=256) as engine:
        tokenizer = weakref.ref(engine.tokenizer)
    gc.collect()
    assert tokenizer() is None


async def test_a_failed_opening_leaves_nothing_to_the_garbage_collector(
    pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it had opened is freed with its error: no cycle holds it."""
    files: list[weakref.ref[Any]] = []

    def opened(path: Path, real: Any = pi2rt.opening.opening.open_model_file) -> Any:
        file = real(path)
        files.append(weakref.ref(file))
        return file

    monkeypatch.setattr("pi2rt.opening.opening.open_model_file", opened)

    def failing() -> SimulatedExecutor:
        return SimulatedExecutor(faults=Faults(raise_in_open=True))

    gc.collect()
    gc.disable()
    try:
        for options in ({"memory": "1M"}, {"memory": "40M"}, {"executor": failing}):
            with pytest.raises((MemoryBudgetError, Exception)):
                async with pi2rt.open_runtime(pack, context=256, **options):
                    pass
            await trio.lowlevel.checkpoint()
            assert [file() for file in files] == [None] * len(files), options
    finally:
        gc.enable()
    assert len(files) == 3
