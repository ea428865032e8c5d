from __future__ import annotations

import re
import time
from typing import Any

import numpy as np
import pytest
import trio
import trio.testing

from pi2rt._errors import ClosedError, InternalError
from pi2rt.executors.simulated.executor import (
    Faults,
    SimulatedExecutor,
    SimulatedFault,
    hashed_token,
    scripted,
)
from pi2rt.formats import ModelFile
from pi2rt.models import ModelDescription
from pi2rt.runtime.executor import ExecutorOptions, StepExecutor
from pi2rt.runtime.step import Bind, Int32s, Sampling, Slice, Step
from pi2rt.testing import Flow, Lifecycle, Outputs, Sequences
from pi2rt.testing.harness import FOLLOW_ON, GREEDY, no_progress

from .stand_in import STAND_IN_MODEL, StandInFile

OPTIONS = ExecutorOptions(slots=3, pages=8, context=200, max_tokens=200)


class TestSimulated(Lifecycle, Flow, Sequences, Outputs):
    """Not ``Agreement``, for it computes no model, nor ``SamplingOptions``: of these it follows the seed alone."""

    models = ("stand-in",)

    def make_executor(self) -> StepExecutor:
        return SimulatedExecutor(seconds_per_step=2e-4, seconds_per_token=1e-5, seconds_to_open=1e-3)

    def open_model(self, name: str) -> tuple[ModelFile, ModelDescription]:
        return StandInFile(), STAND_IN_MODEL


class TestSimulatedOneAtATime(TestSimulated):
    def make_executor(self) -> StepExecutor:
        return SimulatedExecutor(max_in_flight=1, seconds_per_token=1e-5)


class TestSimulatedInstantly(Lifecycle, Sequences, Outputs):
    """Not ``Flow`` either: a step that takes no time cannot be stopped or overtaken."""

    models = ("stand-in",)

    def make_executor(self) -> StepExecutor:
        return SimulatedExecutor()

    def open_model(self, name: str) -> tuple[ModelFile, ModelDescription]:
        return StandInFile(), STAND_IN_MODEL


async def opened(**settings: Any) -> SimulatedExecutor:
    executor = SimulatedExecutor(**settings)
    await executor.open(StandInFile(), STAND_IN_MODEL, OPTIONS, None, no_progress)
    return executor


def ids(*values: int) -> Int32s:
    return np.array(values, np.int32)


def bind(slot: int, history: Int32s = FOLLOW_ON) -> Bind:
    return Bind(slot, GREEDY, history)


def count_up(length: int, first: int = 0) -> Int32s:
    return np.arange(first, first + length, dtype=np.int32)


async def do(executor: SimulatedExecutor, *slices: Slice, binds: tuple[Bind, ...] = ()) -> list[int | None]:
    executor.submit(Step(0, slices, binds))
    result = await executor.wait()
    return [None if sampled is None else sampled.token for sampled in result.sampled]


# -- time ----------


async def test_steps_take_their_time_one_after_another(autojump_clock: trio.testing.MockClock) -> None:
    executor = await opened(seconds_per_step=2.0, seconds_per_token=0.5, seconds_to_open=7.0)
    assert trio.current_time() == 7.0
    executor.submit(Step(1, (Slice(0, 0, ids(0), ids(1, 2), sample=True),), (bind(0),)))
    executor.submit(Step(2, (Slice(1, 0, ids(1), ids(1, 2, 3, 4)),), (bind(1),)))
    first = await executor.wait()
    assert trio.current_time() == 10.0
    executor.submit(Step(3, (Slice(1, 4, ids(1), ids(5)),)))  # does not move the one before
    second = await executor.wait()
    assert trio.current_time() == 14.0
    await executor.wait()
    assert trio.current_time() == 16.5
    assert first.finished_ns - first.started_ns == 3_000_000_000
    assert second.started_ns == first.finished_ns
    assert second.finished_ns - second.started_ns == 4_000_000_000
    assert executor.statistics().busy_ns == 9_500_000_000
    assert executor.statistics().tokens == 7


async def test_real_time_is_perf_counter() -> None:
    before = time.perf_counter_ns()
    executor = await opened()
    executor.submit(Step(1, (Slice(0, 0, ids(0), ids(1)),), (bind(0),)))
    result = await executor.wait()
    assert before - 1_000_000 < result.started_ns <= result.finished_ns < time.perf_counter_ns() + 1_000_000


async def test_stop_moves_later_steps_forward(autojump_clock: trio.testing.MockClock) -> None:
    executor = await opened(seconds_per_step=10.0)
    executor.submit(Step(1, (Slice(0, 0, ids(0), ids(1)),), (bind(0),)))
    executor.submit(Step(2, (Slice(1, 0, ids(1), ids(1)),), (bind(1),)))

    async def stop_at_four() -> None:
        await trio.sleep(4.0)
        executor.stop(1)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop_at_four)
        result = await executor.wait()
    assert (result.id, result.stopped, trio.current_time()) == (1, True, 4.0)
    result = await executor.wait()
    assert (result.id, result.stopped, trio.current_time()) == (2, False, 14.0)


async def test_hang_lasts_until_stop(autojump_clock: trio.testing.MockClock) -> None:
    executor = await opened(faults=Faults(hang=frozenset({1})))
    executor.submit(Step(1, (Slice(0, 0, ids(0), ids(1)),), (bind(0),)))
    with trio.move_on_after(1e6) as scope:
        await executor.wait()
    assert scope.cancelled_caught
    executor.stop(1)
    assert (await executor.wait()).stopped


async def test_aclose_ends_a_wait(autojump_clock: trio.testing.MockClock) -> None:
    executor = await opened(faults=Faults(hang=frozenset({1})))
    executor.submit(Step(1, (Slice(0, 0, ids(0), ids(1)),), (bind(0),)))

    async def wait() -> None:
        with pytest.raises(ClosedError, match="'simulated' is not open"):
            await executor.wait()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait)
        await trio.testing.wait_all_tasks_blocked()
        await executor.aclose()


# -- faults ----------


async def test_faults() -> None:
    executor = await opened(
        faults=Faults(raise_in_submit=frozenset({1}), raise_in_wait=frozenset({2}), raise_in_close=True)
    )
    with pytest.raises(SimulatedFault, match=r"^injected into submit of <Step 1: 1 tokens of 1 sequences>$"):
        executor.submit(Step(1, (Slice(0, 0, ids(0), ids(1)),), (bind(0),)))
    executor.submit(Step(2, (Slice(0, 0, ids(0), ids(1)),), (bind(0),)))
    executor.submit(Step(3, (Slice(1, 0, ids(1), ids(1)),), (bind(1),)))
    with pytest.raises(SimulatedFault, match="injected into wait for <Step 2"):
        await executor.wait()
    assert (await executor.wait()).id == 3  # the fault consumed its step, and only that
    with pytest.raises(SimulatedFault, match="aclose"):
        await executor.aclose()
    with pytest.raises(SimulatedFault, match="open"):
        await opened(faults=Faults(raise_in_open=True))


async def test_wait_for_nothing() -> None:
    executor = await opened()
    with pytest.raises(InternalError, match="without a step in flight"):
        await executor.wait()


@pytest.mark.parametrize(
    "settings", [{"max_in_flight": 0}, {"seconds_per_step": -1.0}, {"seconds_per_token": float("nan")}]
)
def test_bad_settings(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        SimulatedExecutor(**settings)


# -- text ----------


async def test_scripted() -> None:
    executor = await opened(next_token=scripted([5, 6, 7]))
    said = await do(executor, Slice(0, 0, ids(0), ids(1, 2), sample=True), binds=(bind(0),))
    for position in range(2, 5):
        said += await do(executor, Slice(0, position, ids(0), FOLLOW_ON, sample=True))
    assert said == [5, 6, 7, 7]
    with pytest.raises(ValueError, match="at least one"):
        scripted([])


def test_hashed_token_depends_on_context_and_seed() -> None:
    texts = {
        hashed_token(context, 0, sampling)
        for context in (ids(1, 2), ids(2, 1), ids(1, 2, 3))
        for sampling in (Sampling(), Sampling(temperature=1.0, seed=1), Sampling(temperature=1.0, seed=2))
    }
    assert len(texts) == 9
    assert hashed_token(ids(1), 0, Sampling(seed=1)) == hashed_token(ids(1), 0, Sampling(seed=2))


async def test_next_token_sees_the_context_through_the_pages() -> None:
    seen: list[list[int]] = []

    def spy(context: Int32s, generated: int, sampling: Sampling) -> int:
        seen.append(context.tolist())
        return 9

    executor = await opened(next_token=spy)
    await do(executor, Slice(0, 0, ids(3, 1), count_up(64)), binds=(bind(0),))
    await do(executor, Slice(0, 64, ids(3, 1), ids(400), sample=True))
    await do(executor, Slice(0, 65, ids(3, 1), FOLLOW_ON, sample=True))
    assert seen == [[*range(64), 400], [*range(64), 400, 9]]


# -- rules ----------


def far_slice(start: int, count: int, **more: Any) -> Slice:
    return Slice(0, start, count_up(4), count_up(count), **more)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (Step(1, (Slice(0, 0, ids(0), ids(1)),)), "slot 0, positions 0 to 0: the slot was never bound"),
        (Step(1, (), (bind(3),)), "bind of slot 3, but there are 3"),
        (Step(1, (), (bind(1), bind(1))), "two binds of one slot: [1, 1]"),
        (Step(1, (Slice(7, 0, ids(0), ids(1)),)), "there are 3 slots"),
        (Step(1, (far_slice(0, 1), far_slice(1, 1)), (bind(0),)), "two slices share a slot: [0, 0]"),
        (Step(1, (far_slice(150, 51),), (bind(0),)), "outside the context of 200 positions"),
        (Step(1, (far_slice(-1, 1),), (bind(0),)), "outside the context"),
        (Step(1, (far_slice(0, 201),), (bind(0),)), "more than 200 tokens in one step"),
        (Step(1, (Slice(0, 60, ids(0), count_up(5)),), (bind(0),)), "1 pages in the table, 2 needed"),
        (Step(1, (Slice(0, 0, ids(8), ids(1)),), (bind(0),)), "pages [8], but there are 8"),
        (Step(1, (Slice(0, 0, ids(-1), ids(1)),), (bind(0),)), "pages [-1]"),
        (Step(1, (Slice(0, 0, ids(2, 2), count_up(65)),), (bind(0),)), "a page stands twice"),
        (Step(1, (Slice(0, 0, np.array([0]), ids(1)),), (bind(0),)), "pages are int64 (1,), not int32"),
        (Step(1, (Slice(0, 0, ids(0), ids(512)),), (bind(0),)), "vocabulary of 512"),
        (Step(1, (Slice(0, 0, ids(0), ids(-1)),), (bind(0),)), "tokens from -1 to -1"),
        (Step(1, (far_slice(0, 2, targets=ids(1)),), (bind(0),)), "1 targets for 2 tokens"),
        (Step(1, (far_slice(0, 1, targets=ids(512)),), (bind(0),)), "target 512"),
        (Step(1, (far_slice(64, 1),), (bind(0),)), "reads position 0 in page 0, which nobody has written"),
        (Step(1, (Slice(0, 0, ids(0), FOLLOW_ON),), (bind(0),)), "but none was sampled"),
        (
            Step(1, (Slice(0, 0, ids(0), ids(1, 9)),), (bind(0, ids(1, 2, 3)),)),
            "token 9 at position 1, but the prompt given to Bind has 2 there",
        ),
        (
            Step(1, (Slice(0, 0, ids(5), ids(1)), Slice(1, 0, ids(5), ids(1))), (bind(0), bind(1))),
            "slots 0 and 1 both write page 5",
        ),
        (
            Step(1, (far_slice(0, 1), Slice(1, 64, ids(0, 5), ids(1))), (bind(0), bind(1))),
            "slot 1 reads page 0, which slot 0 writes",
        ),
    ],
)
async def test_broken_rules_of_one_step(step: Step, message: str) -> None:
    executor = await opened()
    with pytest.raises(InternalError, match=re.escape(message)):
        executor.submit(step)


async def test_positions_must_not_be_skipped() -> None:
    executor = await opened()
    await do(executor, Slice(0, 0, ids(0), ids(1, 2)), binds=(bind(0),))
    with pytest.raises(InternalError, match="positions 2 to 2 were never written"):
        await do(executor, Slice(0, 3, ids(0), ids(4)))


async def test_follow_on_needs_a_sample_right_before() -> None:
    executor = await opened()
    await do(executor, Slice(0, 0, ids(0), ids(1, 2), sample=True), binds=(bind(0),))
    with pytest.raises(InternalError, match="follows on a sampled token, but the last is for 2"):
        await do(executor, Slice(0, 1, ids(0), FOLLOW_ON))
    await do(executor, Slice(0, 2, ids(0), ids(7)))
    with pytest.raises(InternalError, match="but none was sampled"):
        await do(executor, Slice(0, 3, ids(0), FOLLOW_ON))


async def test_page_taken_from_a_living_sequence() -> None:
    executor = await opened()
    await do(executor, Slice(0, 0, ids(0), ids(1, 2)), binds=(bind(0),))
    await do(executor, Slice(1, 0, ids(0), ids(3)), binds=(bind(1),))
    with pytest.raises(InternalError, match="its page 0 was written by slot 1 since"):
        await do(executor, Slice(0, 2, ids(0), ids(4)))


async def test_shared_page_overwritten() -> None:
    executor = await opened()
    prompt = count_up(70)
    await do(executor, Slice(0, 0, ids(0, 1), prompt), binds=(bind(0, prompt),))
    await do(executor, Slice(1, 64, ids(0, 2), prompt[64:]), binds=(bind(1, prompt),))
    await do(executor, Slice(2, 0, ids(0), count_up(64, 100)), binds=(bind(2),))
    with pytest.raises(
        InternalError, match="page 0 holds token 100 at position 0, but the sequence has 0 there"
    ):
        await do(executor, Slice(1, 70, ids(0, 2), ids(5)))


async def test_page_of_a_finished_sequence_may_be_continued() -> None:
    executor = await opened()
    await do(executor, Slice(0, 0, ids(0), ids(1, 2, 3)), binds=(bind(0),))
    await do(executor, Slice(1, 2, ids(0), ids(8)), binds=(bind(1, ids(1, 2, 8)),))
    with pytest.raises(InternalError, match="reads position 3"):  # what slot 0 never wrote
        await do(executor, Slice(2, 4, ids(0), ids(1)), binds=(bind(2),))


async def test_wrong_prefix() -> None:
    executor = await opened()
    await do(executor, Slice(0, 0, ids(0), ids(1, 2, 3)), binds=(bind(0),))
    with pytest.raises(InternalError, match="holds token 3 at position 2, but the sequence has 4 there"):
        await do(executor, Slice(1, 3, ids(0), ids(9)), binds=(bind(1, ids(1, 2, 4, 9)),))


async def test_rewind_forgets_what_was_behind() -> None:
    executor = await opened()
    await do(executor, Slice(0, 0, ids(0), ids(1, 2, 3, 4)), binds=(bind(0),))
    await do(executor, Slice(0, 1, ids(0), ids(7)))
    with pytest.raises(InternalError, match="positions 2 to 2 were never written"):
        await do(executor, Slice(0, 3, ids(0), ids(4)))


async def test_what_a_stopped_step_wrote_is_undefined(autojump_clock: trio.testing.MockClock) -> None:
    executor = await opened(seconds_per_step=1.0, max_in_flight=3)
    await do(executor, Slice(0, 0, ids(0), ids(1, 2)), binds=(bind(0),))
    executor.submit(Step(1, (Slice(0, 2, ids(0), ids(3), sample=True),)))
    executor.submit(Step(2, (Slice(0, 3, ids(0), FOLLOW_ON, sample=True),)))
    executor.stop(1)
    assert (await executor.wait()).stopped
    assert not (await executor.wait()).stopped
    with pytest.raises(InternalError, match="positions 2 to 3 were never written"):
        await do(executor, Slice(0, 4, ids(0), ids(5)))
    with pytest.raises(InternalError, match="none was sampled"):
        await do(executor, Slice(0, 2, ids(0), FOLLOW_ON))
    await do(executor, Slice(0, 2, ids(0), ids(5)))


async def test_stop_spares_who_bound_the_slot_since(autojump_clock: trio.testing.MockClock) -> None:
    executor = await opened(seconds_per_step=1.0, max_in_flight=3)
    executor.submit(Step(1, (Slice(0, 0, ids(0), ids(1, 2)),), (bind(0),)))
    executor.submit(Step(2, (Slice(0, 0, ids(0), ids(8, 9)),), (bind(0),)))
    executor.stop(1)
    assert [(await executor.wait()).stopped for _ in range(2)] == [True, False]
    await do(executor, Slice(0, 2, ids(0), ids(5)))
