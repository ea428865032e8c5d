from __future__ import annotations

import json
import re
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from pi2rt._errors import BusyError, ClosedError, ExecutorError, InternalError
from pi2rt.executors.simulated.executor import SimulatedFault
from pi2rt.runtime.actor import MAX_FAILURES, Actor, NotRebuilt
from pi2rt.runtime.executor import StepExecutor
from pi2rt.runtime.step import StepResult
from pi2rt.runtime.trace import Trace
from tests.runtime.actor_bench import Bench, faults, step

# ---------- work ----------


async def test_results_in_order(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench()
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        assert bench.actor.max_in_flight == 2
        await bench.actor.submit(step(7))
        await bench.actor.submit(step(3, 1))
        assert [(await bench.actor.result()).id, (await bench.actor.result()).id] == [7, 3]
        await bench.actor.aclose()
    assert bench.closed == bench.made


async def test_submit_waits_for_room(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench()
    times: list[float] = []

    async def submit_all() -> None:
        for number in range(5):
            await bench.actor.submit(step(number, number))
            times.append(trio.current_time())

    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        nursery.start_soon(submit_all)
        await trio.testing.wait_all_tasks_blocked()
        statistics = bench.actor.statistics()
        assert (statistics.in_flight, statistics.inbox.waiting_senders) == (2, 1)
        assert [(await bench.actor.result()).id for _ in range(5)] == list(range(5))
        await bench.actor.aclose()
    assert times == [0.0, 0.0, 1.0, 2.0, 3.0]


async def test_result_waits_for_a_step(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench()

    async def submit_late() -> None:
        await trio.sleep(10)
        await bench.actor.submit(step(1))

    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        nursery.start_soon(submit_late)
        assert (await bench.actor.result()).id == 1
        assert trio.current_time() == 11.0
        await bench.actor.aclose()


async def test_many_submitters_lose_nothing(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench({"max_in_flight": 3})

    async def submit(slot: int) -> None:
        for i in range(5):
            await bench.actor.submit(step(10 * slot + i, slot))

    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        for slot in range(4):
            nursery.start_soon(submit, slot)
        results = [(await bench.actor.result()).id for _ in range(20)]
        await bench.actor.aclose()
    assert sorted(results) == sorted(10 * slot + i for slot in range(4) for i in range(5))
    for slot in range(4):
        assert [number % 10 for number in results if number // 10 == slot] == list(range(5))


async def test_stop(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench(faults(hang={1}))
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        await bench.actor.submit(step(1))
        bench.actor.stop(5)
        bench.actor.stop(1)
        assert (await bench.actor.result()).stopped
        await bench.actor.aclose()


async def test_one_task_takes_results(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench()
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        nursery.start_soon(bench.actor.result)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(BusyError, match="another task is waiting for a result"):
            await bench.actor.result()
        await bench.actor.submit(step(1))
        await trio.sleep(5)
        await bench.actor.aclose()


async def test_statistics(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench(faults(raise_in_wait={2}))
    actor = bench.actor
    assert actor.statistics().state == "new"
    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        assert (actor.statistics().state, actor.statistics().busy) == ("ready", 0.0)
        await actor.submit(step(1))
        await actor.submit(step(2))
        inbox = actor.statistics().inbox
        assert (inbox.name, inbox.capacity, inbox.buffered, inbox.peak_buffered) == ("cpu.inbox", 2, 2, 2)
        await actor.result()
        with pytest.raises(ExecutorError):
            await actor.result()
        await trio.sleep(2)
        statistics = actor.statistics()
        await actor.aclose()
    assert statistics.name == "cpu"
    assert (statistics.submitted, statistics.completed, statistics.failed) == (2, 1, 1)
    assert (statistics.state, statistics.generation, statistics.in_flight) == ("ready", 1, 0)
    assert (statistics.inbox.sent, statistics.inbox.received) == (2, 2)
    assert statistics.busy == pytest.approx(2 / 4)
    assert statistics.executor.steps == 0  # of the new executor
    assert actor.statistics().state == "closed"
    assert actor.statistics().inbox.closed


async def test_trace(autojump_clock: trio.testing.MockClock, tmp_path: Path) -> None:
    trace = Trace()
    bench = Bench(faults(raise_in_wait={2}), trace=trace)
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        await bench.actor.submit(step(1))
        await bench.actor.result()
        await bench.actor.submit(step(2))
        with pytest.raises(ExecutorError):
            await bench.actor.result()
        await trio.sleep(1)
        await bench.actor.aclose()
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    seen = {event["name"]: event for event in events if event["ph"] in "Xi"}
    assert seen["step"]["args"] == {"id": 1, "tokens": 3, "sequences": 1}
    assert seen["step"]["dur"] == 1e6
    assert seen["failed"]["args"] == {"cause": "SimulatedFault: injected into wait for " + repr(step(2))}
    assert seen["rebuild"]["args"] == {"outcome": "ready"}


async def test_spans_of_a_trace_do_not_overlap(
    autojump_clock: trio.testing.MockClock, tmp_path: Path
) -> None:
    trace = Trace()
    bench = Bench(trace=trace)
    times = iter([(5_000, 9_000), (5_000, 12_000), (5_000, 11_000)])

    async def wait() -> StepResult:
        await trio.lowlevel.checkpoint()
        started, finished = (trace.origin_ns + ns for ns in next(times))
        return StepResult(1, started_ns=started, finished_ns=finished)

    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        bench.made[0].wait = wait  # type: ignore[method-assign]
        for _ in range(3):
            await bench.actor.submit(step(1))
            await bench.actor.result()
            bench.made[0]._queue.clear()
        await bench.actor.aclose()
    trace.write(tmp_path / "trace.json")
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    assert [(e["ts"], e["dur"]) for e in events if e["ph"] == "X"] == [(5.0, 4.0), (9.0, 3.0), (12.0, 0.0)]


# ---------- supervision ----------


async def test_open_fails_as_itself(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench(faults(raise_in_open=True))
    with pytest.RaisesGroup(SimulatedFault):
        async with trio.open_nursery() as nursery:
            await nursery.start(bench.actor.run)
    assert bench.closed == bench.made
    with pytest.raises(ClosedError):
        await bench.actor.submit(step(1))
    await bench.actor.aclose()


async def test_construction_fails_as_itself(autojump_clock: trio.testing.MockClock) -> None:
    def explode() -> StepExecutor:
        raise OSError("no such device")

    actor = Actor("npu", explode, Bench().open)
    with pytest.RaisesGroup(pytest.RaisesExc(OSError, match="no such device")):
        async with trio.open_nursery() as nursery:
            await nursery.start(actor.run)


async def test_open_fails_and_so_does_close(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench(faults(raise_in_open=True, hang_in_close=True))
    with pytest.RaisesGroup(SimulatedFault) as caught:
        async with trio.open_nursery() as nursery:
            await nursery.start(bench.actor.run)
    (error,) = caught.value.exceptions
    assert error.__notes__ == ["actor 'cpu' failed on aclose: executor 'simulated' did not stop within 5 s"]


async def test_failure_in_wait_fails_what_is_behind(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench({"max_in_flight": 3} | faults(raise_in_wait={2}))
    actor = bench.actor
    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        for number in 1, 2, 3:
            await actor.submit(step(number, number))
        assert (await actor.result()).id == 1
        with pytest.raises(
            ExecutorError, match=r"^actor 'cpu' failed on <Step 2: .*>: SimulatedFault: inj"
        ) as own:
            await actor.result()
        assert (own.value.actor, own.value.item.id) == ("cpu", 2)  # type: ignore[attr-defined]
        assert isinstance(own.value.__cause__, SimulatedFault)
        assert actor.generation == 1  # before anybody can act on the error
        with pytest.raises(
            ExecutorError, match=r"^actor 'cpu' failed on <Step 3: .*lost with its executor"
        ) as lost:
            await actor.result()
        assert lost.value.__cause__ is own.value.__cause__
        await actor.submit(step(4))
        assert (await actor.result()).id == 4
        assert (len(bench.made), bench.closed) == (2, bench.made[:1])
        await actor.aclose()
    assert bench.closed == bench.made


async def test_failure_in_submit(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench({"max_in_flight": 3} | faults(raise_in_submit={2}), {})
    actor = bench.actor
    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        await actor.submit(step(1))
        with pytest.raises(ExecutorError, match=r"<Step 2: .*>: submit: SimulatedFault: injected") as caught:
            await actor.submit(step(2))
        assert isinstance(caught.value.__cause__, SimulatedFault)
        assert actor.generation == 1
        with pytest.raises(ExecutorError, match=r"<Step 1: .*lost with its executor"):
            await actor.result()
        await actor.submit(step(2))
        assert (await actor.result()).id == 2
        await actor.aclose()


async def test_failure_in_submit_ends_a_wait(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench({"seconds_per_step": 1e9} | faults(raise_in_submit={2}), {})
    actor = bench.actor

    async def take() -> None:
        with pytest.raises(ExecutorError, match=r"<Step 1: .*lost with its executor"):
            await actor.result()
        assert (await actor.result()).id == 3

    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        await actor.submit(step(1))
        nursery.start_soon(take)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ExecutorError, match="<Step 2"):
            await actor.submit(step(2))
        await actor.submit(step(3))
        await trio.sleep(5)
        assert trio.current_time() == 5.0
        await actor.aclose()


async def test_failure_in_stop(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench()
    actor = bench.actor
    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        await actor.submit(step(1))
        bench.made[0].stop = lambda step_id: 1 // 0  # type: ignore[assignment, method-assign]
        actor.stop(1)
        with pytest.raises(ExecutorError, match=r"<Step 1: .*\(ZeroDivisionError"):
            await actor.result()
        await actor.submit(step(2))
        assert (await actor.result()).id == 2
        await actor.aclose()


async def test_step_that_waited_for_room_is_not_for_the_new_executor(
    autojump_clock: trio.testing.MockClock,
) -> None:
    bench = Bench({"max_in_flight": 1} | faults(raise_in_wait={1}))
    actor = bench.actor

    async def submit() -> None:
        with pytest.raises(ExecutorError, match=r"<Step 2: .*not submitted: meanwhile the executor failed"):
            await actor.submit(step(2))
        await actor.submit(step(3))

    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        await actor.submit(step(1))
        nursery.start_soon(submit)
        await trio.testing.wait_all_tasks_blocked()
        with pytest.raises(ExecutorError, match="<Step 1"):
            await actor.result()
        assert (await actor.result()).id == 3
        await actor.aclose()


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ({}, {"raise_in_open": True}, "SimulatedFault: injected into open"),
        ({"raise_in_close": True}, {}, "failed on aclose: SimulatedFault: injected into aclose"),
        ({"hang_in_close": True}, {}, "executor 'simulated' did not stop within 5 s"),
    ],
)
async def test_rebuild_fails(
    autojump_clock: trio.testing.MockClock, old: dict[str, Any], new: dict[str, Any], problem: str
) -> None:
    bench = Bench(faults(raise_in_wait={1}, **old), faults(**new))
    actor = bench.actor
    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        await actor.submit(step(1))
        await actor.submit(step(2))
        with pytest.raises(ExecutorError, match="<Step 1"):
            await actor.result()
        with pytest.raises(ExecutorError, match="<Step 2"):  # what was lost is told first
            await actor.result()
        match = f"the actor is broken: .*{re.escape(problem)}.*; the next request tries again"
        with pytest.raises(NotRebuilt, match=match) as caught:
            await actor.result()
        assert caught.value.__cause__ is not None
        assert actor.statistics().state == "broken"
        assert trio.current_time() == (6.0 if "hang_in_close" in old else 1.0)
        if new:
            with pytest.raises(NotRebuilt, match=match):
                await actor.submit(step(3))
        else:  # the old one is given up
            await actor.submit(step(3))
            assert (await actor.result()).id == 3
        await actor.aclose()
    assert bench.made[-1] in bench.closed


async def test_too_many_failures(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench(faults(raise_in_wait=range(100)))
    actor = bench.actor
    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        for number in range(6):
            await actor.submit(step(number))
            with pytest.raises(ExecutorError, match="injected"):
                await actor.result()
        match = r"broken.* 6 failures within 60 s; last: SimulatedFault.*; no attempt is made for 55 s"
        with pytest.raises(NotRebuilt, match=match):
            await actor.submit(step(7))
        with pytest.raises(NotRebuilt, match=match):
            await actor.reopen(lambda: pytest.fail("it is not made again"))
        assert bench.closed == bench.made
        assert len(bench.made) == 6
        await trio.sleep(54)
        with pytest.raises(NotRebuilt, match="no attempt is made for 1 s"):
            await actor.submit(step(7))
        await trio.sleep(1)
        await actor.submit(step(100))  # the first failure is 60 s old
        assert (await actor.result()).id == 100
        await actor.aclose()


async def test_after_a_failed_rebuild_the_next_step_tries_again(
    autojump_clock: trio.testing.MockClock,
) -> None:
    """Whoever waited meanwhile fails with the cause; nobody is told anything but once."""
    bad = {"seconds_to_open": 1.0} | faults(raise_in_open=True)
    bench = Bench(faults(raise_in_wait={1}), bad, bad, {})
    actor = bench.actor
    failed = []

    async def submit(number: int) -> None:
        with pytest.raises(NotRebuilt, match=r"SimulatedFault: injected into open.*tries again"):
            await actor.submit(step(number))
        failed.append(number)

    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        await actor.submit(step(1))
        with pytest.raises(ExecutorError, match="<Step 1"):
            await actor.result()
        for attempt in 1, 2:
            async with trio.open_nursery() as waiting:
                for number in range(3):
                    waiting.start_soon(submit, 10 * attempt + number)
            assert (len(bench.made), actor.statistics().state) == (attempt + 1, "broken")
        assert sorted(failed) == [10, 11, 12, 20, 21, 22]
        await actor.submit(step(2))
        assert (await actor.result()).id == 2
        assert trio.current_time() == 1.0 + 2 * 1.0 + 1.0
        assert actor.generation == 1  # of executors that were lost, and none of them held anything
        await actor.aclose()
    assert bench.closed == bench.made


async def test_attempts_are_failures_too(autojump_clock: trio.testing.MockClock) -> None:
    """A step that fails and the rebuild after it are one."""
    bench = Bench(faults(raise_in_wait={1}), faults(raise_in_open=True))
    actor = bench.actor
    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        await actor.submit(step(1))
        with pytest.raises(ExecutorError, match="<Step 1"):
            await actor.result()
        await trio.testing.wait_all_tasks_blocked()
        for number in range(MAX_FAILURES):
            assert len(bench.made) == 2 + number
            with pytest.raises(NotRebuilt, match="injected into open"):
                await actor.submit(step(2))
        for _ in range(3):
            with pytest.raises(NotRebuilt, match="no attempt is made for 60 s"):
                await actor.submit(step(2))
        assert len(bench.made) == 2 + MAX_FAILURES
        await actor.aclose()


@pytest.mark.parametrize("state", ["rebuilding", "broken"])
async def test_closing_what_cannot_be_made_again(autojump_clock: trio.testing.MockClock, state: str) -> None:
    bad = {"seconds_to_open": 10.0} | faults(raise_in_open=True)
    bench = Bench(faults(raise_in_wait={1}), bad)
    actor = bench.actor

    async def submit() -> None:
        with pytest.raises(ClosedError):
            await actor.submit(step(2))

    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        await actor.submit(step(1))
        with pytest.raises(ExecutorError, match="<Step 1"):
            await actor.result()
        if state == "broken":
            await trio.sleep(20)
        nursery.start_soon(submit)
        await trio.testing.wait_all_tasks_blocked()
        await actor.aclose()
    assert trio.current_time() == (21.0 if state == "broken" else 1.0)
    assert bench.closed == bench.made


async def test_failures_that_are_rare_are_forgiven(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench(faults(raise_in_wait=range(100)))
    actor = bench.actor
    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        for number in range(20):
            await actor.submit(step(number))
            with pytest.raises(ExecutorError, match="injected"):
                await actor.result()
            await trio.sleep(11)  # five in each minute
        assert actor.statistics().state == "ready"
        assert actor.generation == 20
        await actor.aclose()


@pytest.mark.parametrize("answer", [StepResult(99), None])
async def test_executor_that_answers_nonsense(
    autojump_clock: trio.testing.MockClock, answer: StepResult | None
) -> None:
    bench = Bench()
    actor = bench.actor

    async def wait() -> StepResult | None:
        await trio.lowlevel.checkpoint()
        return answer

    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        bench.made[0].wait = wait  # type: ignore[assignment, method-assign]
        await actor.submit(step(1))
        with pytest.raises(ExecutorError, match="executor 'simulated' gave") as caught:
            await actor.result()
        assert isinstance(caught.value.__cause__, InternalError)
        await actor.aclose()


async def test_wait_that_survives_aclose_ends_the_actor(autojump_clock: trio.testing.MockClock) -> None:
    """A plug-in that breaks the protocol so must not leave its user hanging."""
    bench = Bench(faults(raise_in_submit={2}))
    actor = bench.actor
    with pytest.RaisesGroup(
        pytest.RaisesExc(ExecutorError, match="wait of executor 'simulated', which closed, did not stop")
    ):
        async with trio.open_nursery() as nursery:
            await nursery.start(actor.run)
            bench.made[0].wait = trio.sleep_forever  # type: ignore[assignment, method-assign]
            await actor.submit(step(1))
            nursery.start_soon(actor.result)
            await trio.testing.wait_all_tasks_blocked()
            with pytest.raises(ExecutorError, match="<Step 2"):
                await actor.submit(step(2))


# ---------- closing ----------


async def test_aclose_frees_whoever_waits(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench(faults(hang={1}) | {"max_in_flight": 1})
    actor = bench.actor

    async def expect_closed(call: Callable[[], Awaitable[object]]) -> None:
        with pytest.raises(ClosedError, match=r"^actor 'cpu' is closed$"):
            await call()

    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        await actor.submit(step(1))
        nursery.start_soon(expect_closed, actor.result)
        nursery.start_soon(expect_closed, lambda: actor.submit(step(2)))
        await trio.testing.wait_all_tasks_blocked()
        await actor.aclose()
    await actor.aclose()
    await expect_closed(actor.result)
    await expect_closed(lambda: actor.submit(step(3)))
    actor.stop(1)
    assert trio.current_time() == 0.0


async def test_never_started(autojump_clock: trio.testing.MockClock) -> None:
    actor = Bench().actor
    for call in actor.result, lambda: actor.submit(step(1)):
        with pytest.raises(ClosedError, match="was not started"):
            await call()
    await actor.aclose()
    with pytest.raises(ClosedError, match="is closed"):
        await actor.result()


async def test_runs_once(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench()
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        with pytest.raises(InternalError, match="run called in state 'ready'"):
            await bench.actor.run()
        await bench.actor.aclose()


@pytest.mark.parametrize(
    ("fault", "seconds", "problem"),
    [("hang_in_close", 5.0, "did not stop within 5 s"), ("raise_in_close", 0.0, "SimulatedFault")],
)
async def test_executor_that_does_not_close(
    autojump_clock: trio.testing.MockClock, fault: str, seconds: float, problem: str
) -> None:
    bench = Bench(faults(**{fault: True}))
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        with pytest.raises(ExecutorError, match=f"^actor 'cpu' failed on aclose: .*{problem}"):
            await bench.actor.aclose()
        await bench.actor.aclose()  # told once
    assert trio.current_time() == seconds


async def test_executor_that_does_not_close_when_cancelled(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench(faults(hang_in_close=True))
    with pytest.RaisesGroup(pytest.RaisesExc(ExecutorError, match="did not stop within 5 s")):
        async with trio.open_nursery() as nursery:
            await nursery.start(bench.actor.run)
            nursery.cancel_scope.cancel()
    assert trio.current_time() == 5.0


async def test_closed_while_it_opens(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench({"seconds_to_open": 100.0})

    async def close() -> None:
        await trio.sleep(3)
        await bench.actor.aclose()

    async with trio.open_nursery() as nursery:
        nursery.start_soon(close)
        with pytest.RaisesGroup(pytest.RaisesExc(ClosedError, match="was closed while it opened")):
            async with trio.open_nursery() as inner:
                await inner.start(bench.actor.run)
    assert trio.current_time() == 3.0
    assert bench.closed == bench.made


async def test_closed_while_it_rebuilds(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench(faults(raise_in_wait={1}), {"seconds_to_open": 100.0})
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        await bench.actor.submit(step(1))
        with pytest.raises(ExecutorError):
            await bench.actor.result()
        await trio.sleep(1)
        assert bench.actor.statistics().state == "rebuilding"
        await bench.actor.aclose()
    assert trio.current_time() == 2.0
    assert bench.closed == bench.made


# ---------- cancellation ----------


async def test_cancelled_while_it_opens(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench({"seconds_to_open": 100.0})
    with trio.move_on_after(1):
        async with trio.open_nursery() as nursery:
            await nursery.start(bench.actor.run)
    assert trio.current_time() == 1.0
    assert bench.closed == bench.made
    assert bench.actor.statistics().state == "closed"


async def test_cancelled_while_it_works(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench()
    with trio.move_on_after(0.5):
        async with trio.open_nursery() as nursery:
            await nursery.start(bench.actor.run)
            await bench.actor.submit(step(1))
            await bench.actor.result()
    assert trio.current_time() == 0.5
    assert bench.closed == bench.made


async def test_cancelling_submit_submits_nothing(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench({"max_in_flight": 1})
    actor = bench.actor
    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        with trio.CancelScope() as scope:  # at the first checkpoint
            scope.cancel()
            await actor.submit(step(1))
        assert scope.cancelled_caught
        assert actor.statistics().submitted == 0
        await actor.submit(step(2))
        with trio.move_on_after(0.5) as scope:  # while it waits for room
            await actor.submit(step(3))
        assert scope.cancelled_caught
        assert (await actor.result()).id == 2
        await actor.submit(step(4))
        assert (await actor.result()).id == 4
        assert actor.statistics().submitted == 2
        await actor.aclose()


async def test_cancelling_one_submit_leaves_the_next_its_room(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench({"max_in_flight": 1})
    actor = bench.actor
    scope = trio.CancelScope()

    async def first() -> None:
        with scope:
            await actor.submit(step(2))

    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        await actor.submit(step(1))
        nursery.start_soon(first)
        await trio.testing.wait_all_tasks_blocked()
        nursery.start_soon(actor.submit, step(3))
        await trio.testing.wait_all_tasks_blocked()
        scope.cancel()
        assert [(await actor.result()).id, (await actor.result()).id] == [1, 3]
        await actor.aclose()


async def test_cancelling_result_loses_nothing(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench(faults(raise_in_wait={2}))
    actor = bench.actor
    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        with trio.move_on_after(1) as scope:  # while there is nothing
            await actor.result()
        assert scope.cancelled_caught
        for number in 1, 2:
            await actor.submit(step(number))
        with trio.CancelScope() as scope:  # at the first checkpoint
            scope.cancel()
            await actor.result()
        assert scope.cancelled_caught
        with trio.move_on_after(0.5) as scope:  # while the executor works
            await actor.result()
        assert scope.cancelled_caught
        assert (await actor.result()).id == 1
        await actor.submit(step(3))
        with pytest.raises(ExecutorError, match="<Step 2"):
            await actor.result()
        with trio.CancelScope() as scope:  # while a failure waits to be told
            scope.cancel()
            await actor.result()
        assert scope.cancelled_caught
        with pytest.raises(ExecutorError, match="<Step 3"):
            await actor.result()
        await actor.aclose()


async def test_cancelling_aclose_still_closes(autojump_clock: trio.testing.MockClock) -> None:
    bench = Bench()
    async with trio.open_nursery() as nursery:
        await nursery.start(bench.actor.run)
        with trio.CancelScope() as scope:
            scope.cancel()
            await bench.actor.aclose()
        assert scope.cancelled_caught
    assert bench.closed == bench.made
