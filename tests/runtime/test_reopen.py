"""An executor that is closed to be opened otherwise: what was in flight is lost, and nothing has failed."""

from __future__ import annotations

import pytest
import trio
import trio.testing

from pi2rt._errors import ClosedError, ExecutorError
from pi2rt.runtime.actor import MAX_FAILURES, Reopened
from tests.runtime.actor_bench import Bench, faults, step


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


async def test_one_that_cannot_be_opened_breaks_the_actor(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench({}, faults(raise_in_open=True))
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        for _ in range(2):
            with pytest.raises(ExecutorError, match="broken"):
                await bench.actor.reopen(nothing)
        await bench.actor.aclose()
    with pytest.raises(ClosedError):
        await bench.actor.reopen(nothing)


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
