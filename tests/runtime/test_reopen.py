"""An executor that is closed to be opened otherwise: what was in flight is lost, and nothing has failed."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import trio
import trio.testing

from pi2rt._errors import ClosedError, ExecutorError, RequestError
from pi2rt.runtime.actor import MAX_FAILURES, NotRebuilt, Reopened
from pi2rt.runtime.executor import StepExecutor
from tests.runtime.actor_bench import Bench, Watched, faults, step


def nothing() -> None:
    """What changes."""


async def test_steps_in_flight_are_lost_and_none_has_failed(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench()
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        await bench.actor.submit(step(1))
        await bench.actor.submit(step(2))
        await bench.actor.reopen(nothing)
        for number in (1, 2):
            with pytest.raises(Reopened, match=f"<Step {number}:.*was closed to be opened again"):
                await bench.actor.result()
        statistics = bench.actor.statistics()
        assert (statistics.state, statistics.generation, statistics.failed) == ("ready", 1, 0)
        assert (len(bench.made), bench.closed) == (2, bench.made[:1])
        await bench.actor.submit(step(3))
        assert (await bench.actor.result()).id == 3
        await bench.actor.aclose()


async def test_whoever_waits_learns_of_it(autojump_clock: trio.testing.MockClock) -> None:
    """A task in ``result``, and one in ``submit`` whose step was for the executor before."""
    bench = Bench()
    lost = []

    async def take() -> None:
        with pytest.raises(Reopened):
            await bench.actor.result()
        lost.append("taken")

    async def submit() -> None:
        with pytest.raises(Reopened, match="not submitted"):
            await bench.actor.submit(step(3))
        lost.append("submitted")

    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        await bench.actor.submit(step(1))
        await bench.actor.submit(step(2))
        nursery.start_soon(take)
        nursery.start_soon(submit)
        await trio.testing.wait_all_tasks_blocked()
        await bench.actor.reopen(nothing)
        await trio.testing.wait_all_tasks_blocked()
        assert sorted(lost) == ["submitted", "taken"]
        assert bench.actor.statistics().failed == 0
        await bench.actor.aclose()


async def test_it_is_no_failure_however_often(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench()
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        async with trio.open_nursery() as several:
            for _ in range(2 * MAX_FAILURES):
                several.start_soon(bench.actor.reopen, nothing)
        assert bench.actor.generation == 2 * MAX_FAILURES
        assert bench.closed == bench.made[:-1]
        await bench.actor.submit(step(1))
        assert (await bench.actor.result()).id == 1
        await bench.actor.aclose()


async def test_cancelled_before_its_turn_it_changes_nothing(autojump_clock: trio.testing.MockClock) -> None:
    """Or else what is open would not be what the caller takes it for. Cancelled later, it goes on."""
    bench = Bench({}, {"seconds_to_open": 10.0})
    changed = []
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        with trio.move_on_after(4):
            await bench.actor.reopen(lambda: changed.append("first"))
        with trio.move_on_after(4):
            await bench.actor.reopen(lambda: changed.append("second"))
        assert changed == ["first"]
        await bench.actor.reopen(lambda: changed.append("third"))
        assert (changed, trio.current_time(), bench.actor.generation) == (["first", "third"], 20.0, 2)
        await bench.actor.aclose()


async def test_one_that_cannot_be_opened_is_tried_again(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench({}, faults(raise_in_open=True), faults(raise_in_open=True), {})
    changed = []
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        for number in range(2):
            with pytest.raises(NotRebuilt, match=r"broken.*injected into open.*the next request tries again"):
                await bench.actor.reopen(partial(changed.append, number))
        await bench.actor.reopen(partial(changed.append, 2))
        assert changed == [0, 1, 2]
        await bench.actor.submit(step(1))
        assert (await bench.actor.result()).id == 1
        await bench.actor.aclose()
    with pytest.raises(ClosedError):
        await bench.actor.reopen(nothing)


class Sized(Watched):
    """It has neurons, whose size changes as long as ``resize_s`` says. ``fault``: raised then."""

    resize_s = 0.0
    fault: Exception | None = None

    async def resize(self, neuron_bytes: int) -> None:
        await trio.sleep(self.resize_s)
        self._opened()
        if self.fault is not None:
            raise self.fault


class SizedBench(Bench):
    """What each executor was opened with is in ``opened``; ``size`` is what the next one is opened with."""

    def __init__(self, *settings: dict[str, Any]) -> None:
        super().__init__(*settings)
        self.size, self.opened = 0, []

    def make(self) -> StepExecutor:
        settings = self.settings[min(len(self.made), len(self.settings) - 1)]
        self.made.append(Sized(self, **{"seconds_per_step": 1.0} | settings))
        return self.made[-1]

    async def open(self, executor: StepExecutor) -> None:
        self.opened.append(self.size)
        await super().open(executor)

    async def resize(self, size: int) -> None:
        def change() -> None:
            self.size = size

        await self.actor.resize(size, change)

    async def lose(self) -> None:
        await self.actor.submit(step(1))
        with pytest.raises(ExecutorError, match="<Step 1"):
            await self.actor.result()


async def test_a_resize_waits_for_a_rebuild(autojump_clock: trio.testing.MockClock) -> None:
    bench = SizedBench(faults(raise_in_wait={1}), {"seconds_to_open": 10.0})
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        await bench.lose()
        await bench.resize(5)
        assert (trio.current_time(), bench.size, bench.opened) == (11.0, 5, [0, 0])
        await bench.actor.aclose()


async def test_a_resize_of_what_is_broken_makes_it_again_with_the_new_size(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench = SizedBench(faults(raise_in_wait={1}), faults(raise_in_open=True), faults(raise_in_open=True), {})
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        await bench.lose()
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(NotRebuilt, match=r"injected into open.*the next request tries again"):
            await bench.resize(5)
        await bench.actor.submit(step(2))
        assert (await bench.actor.result()).id == 2
        assert bench.opened == [0, 0, 5, 5]
        await bench.actor.aclose()


async def test_a_resize_that_is_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    """While it waits, it has changed nothing; later, the new size stays, also of the next executor."""
    bench = SizedBench(faults(raise_in_wait={1}), {"seconds_to_open": 10.0} | faults(raise_in_wait={1}))
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        await bench.lose()
        with trio.move_on_after(5) as scope:
            await bench.resize(5)
        assert (scope.cancelled_caught, bench.size) == (True, 0)
        await trio.sleep(10)
        bench.made[1].resize_s = 5.0  # type: ignore[attr-defined]
        with trio.move_on_after(1) as scope:
            await bench.resize(6)
        assert (scope.cancelled_caught, bench.size, bench.actor.generation) == (True, 6, 1)
        await bench.lose()
        await bench.actor.submit(step(2))
        assert bench.opened == [0, 0, 6]
        await bench.actor.aclose()


@pytest.mark.parametrize("recovers", [True, False])
async def test_an_executor_that_is_lost_during_a_resize(
    autojump_clock: trio.testing.MockClock, recovers: bool
) -> None:
    """The next one has the new size, and the resize ends with that; or it says that there is none."""
    last = {} if recovers else faults(raise_in_open=True)
    bench = SizedBench(faults(raise_in_wait={1}), last)
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        bench.made[0].resize_s = 5.0  # type: ignore[attr-defined]
        nursery.start_soon(bench.lose)
        if recovers:
            await bench.resize(5)
        else:
            with pytest.raises(NotRebuilt, match="injected into open"):
                await bench.resize(5)
        assert bench.opened == [0, 5]
        await bench.actor.aclose()


async def test_an_executor_that_fails_in_a_resize(autojump_clock: trio.testing.MockClock) -> None:
    bench = SizedBench()
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        bench.made[0].fault = OSError("out of pages")  # type: ignore[attr-defined]
        with pytest.raises(ExecutorError, match="failed on resize: OSError: out of pages"):
            await bench.resize(5)
        await bench.actor.submit(step(2))
        assert (await bench.actor.result()).id == 2
        assert bench.opened == [0, 5]
        await bench.actor.aclose()


async def test_a_resize_that_cannot_be(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench()
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        with pytest.raises(RequestError, match="cannot change its memory while it runs"):
            await bench.actor.resize(5, lambda: pytest.fail("nothing changes"))
        assert bench.actor.generation == 0
        await bench.actor.aclose()
    with pytest.raises(ClosedError):
        await bench.actor.resize(5, nothing)
    assert len(bench.made) == 1


async def test_closed_meanwhile(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench({}, {"seconds_to_open": 10.0})

    async def reopen() -> None:
        with pytest.raises(ClosedError):
            await bench.actor.reopen(nothing)

    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        nursery.start_soon(reopen)
        await trio.testing.wait_all_tasks_blocked()
        await bench.actor.aclose()
    assert bench.closed == bench.made
