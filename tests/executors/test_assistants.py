"""Threads of assistants: what they do is done once, and nobody waits for them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.runtime.executor_statistics import ThreadStatistics
from tests.support.native_threads import settles_at, thread_ids
from tests.support.running import all_logits, greedy, opened
from tests.support.tiny_models import TinyModel, write_gguf

MODEL = TinyModel("qwen3", seed=5, dim=256, hidden=512, layers=3, heads=4, kv_heads=2, head_dim=32)
FREEZER = Path("/sys/fs/cgroup/freezer")
ASSISTED: dict[str, Any] = {"cores": (-1,), "assistants": (("little", (-1, -1)),), "actor": "big"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("assistants") / "model.gguf", MODEL, weight_type="Q4_0")


@contextmanager
def frozen(name: str, count: int) -> Iterator[None]:
    """The threads of that name get no core: a control group of the first version may hold single threads."""
    group = FREEZER / f"pi2rt.{os.getpid()}.{time.monotonic_ns()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"this system lets nobody freeze a thread: {error}")
    assert settles_at(name, count)
    tasks = thread_ids(name)
    try:
        for task in tasks:
            (group / "tasks").write_text(str(task))
        (group / "freezer.state").write_text("FROZEN")
        while (group / "freezer.state").read_text() != "FROZEN\n":
            os.sched_yield()
        yield
    finally:
        (group / "freezer.state").write_text("THAWED")
        for task in tasks:
            (FREEZER / "tasks").write_text(str(task))
        group.rmdir()


def row_blocks(threads: tuple[ThreadStatistics, ...]) -> int:
    return sum(thread.row_blocks for thread in threads)


def taken(threads: tuple[ThreadStatistics, ...]) -> tuple[int, int]:
    return row_blocks(threads), sum(thread.attention for thread in threads)


@pytest.mark.parametrize("tokens", [1, 3, 7, 40, 200])
async def test_every_part_is_counted_once_and_bits_are_the_same(model: Path, tokens: int) -> None:
    ids = np.arange(tokens, dtype=np.int32)
    async with opened(CpuExecutor(), model, cores=(-1,)) as executor:
        alone, expected = await all_logits(executor, ids), taken(executor.statistics().threads)
    async with opened(CpuExecutor(), model, **ASSISTED) as executor:
        together = await all_logits(executor, ids)
        threads = executor.statistics().threads
    assert np.array_equal(alone, together)
    assert taken(threads) == expected
    assert min(expected) > 0
    assert [thread.actor for thread in threads] == ["big", "little", "little"]


async def test_a_long_context_is_shared(model: Path) -> None:
    """Attention is cut along it; whoever finishes a row's last part merges them."""
    prompt = np.arange(700, dtype=np.int32) % 200
    async with opened(CpuExecutor(), model, cores=(-1,)) as executor:
        expected = await greedy(executor, prompt, 40), taken(executor.statistics().threads)
    async with opened(CpuExecutor(), model, **ASSISTED) as executor:
        found = await greedy(executor, prompt, 40), taken(executor.statistics().threads)
    assert found == expected


async def test_they_take_work(model: Path) -> None:
    """With two cores for three threads each of them gets one now and then."""
    async with opened(CpuExecutor(), model, **ASSISTED) as executor:
        for _ in range(1000):
            await all_logits(executor, np.arange(200, dtype=np.int32))
            little = executor.statistics().threads[1:]
            if row_blocks(little):
                break
    assert row_blocks(little) > 0
    assert all((thread.kernel_ns > 0) == (thread.row_blocks > 0) for thread in little)


async def test_steps_go_on_while_an_assistant_has_no_core(model: Path) -> None:
    prompt = np.arange(20, dtype=np.int32)
    async with opened(CpuExecutor(), model, cores=(-1,)) as executor:
        expected = await greedy(executor, prompt, 30)
    async with opened(CpuExecutor(), model, **ASSISTED) as executor:
        with frozen("pi2rt/1", 1), frozen("pi2rt/2", 1):
            assert await greedy(executor, prompt, 30) == expected
            assert executor.statistics().threads[1].row_blocks == 0
        assert await greedy(executor, prompt, 30) == expected
