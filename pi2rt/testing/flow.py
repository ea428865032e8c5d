"""Steps go in without blocking, results come out in order, and can be stopped and given up waiting for."""

from __future__ import annotations

import time

import numpy as np
import trio

from pi2rt._errors import BusyError
from pi2rt.runtime.executor import StepExecutor
from pi2rt.runtime.step import Bind, Slice, Step, StepResult
from pi2rt.testing.harness import GREEDY, Harness, in_trio


class Flow(Harness):
    """``submit``, ``wait``, ``stop`` and ``statistics``."""

    def chain(self, executor: StepExecutor, first: int = 1) -> list[Step]:
        """As many steps as may be in flight and one more, all of one sequence: a prompt and what follows it."""
        follow = range(executor.max_in_flight)
        prompt = self.prompt(40)
        steps = [self.following(first + 1 + i, len(prompt) + i) for i in follow]
        return [self.prefill(first, prompt), *steps]

    @in_trio
    async def test_results_come_in_order_of_submission(self) -> None:
        async with self.opened() as executor:
            count = min(executor.max_in_flight, self.options.slots)
            for slot in range(count):
                executor.submit(self.prefill(100 - slot, self.prompt(40 - 9 * slot), slot))
            there = executor.statistics().in_flight
            assert there == count, f"{count} steps were submitted, statistics say that {there} are in flight"
            self.doing = "wait"
            ids = [(await executor.wait()).id for _ in range(count)]
            expected = [100 - slot for slot in range(count)]
            assert ids == expected, f"steps were submitted in the order {expected}, results came as {ids}"
            there = executor.statistics().in_flight
            assert there == 0, (
                f"all results were waited for, but statistics say that {there} steps are in flight"
            )

    @in_trio
    async def test_one_step_too_many(self) -> None:
        async with self.opened() as executor:
            *fitting, last = self.chain(executor)
            for number, step in enumerate(fitting, 1):
                try:
                    executor.submit(step)
                except BusyError as error:
                    raise AssertionError(
                        f"step {number} of {len(fitting)} that may be in flight was refused with {error!r}"
                    ) from error
            with self.raises(BusyError, f"submit with {len(fitting)} steps in flight, all there may be,"):
                executor.submit(last)
            await self.wait(executor, fitting[0].id)
            executor.submit(last)
            for step in (*fitting[1:], last):
                await self.wait(executor, step.id)

    @in_trio
    async def test_submit_does_not_compute(self) -> None:
        """A step that has ended when ``submit`` returns was computed by it. One that is done by another thread
        meanwhile is rare."""
        async with self.opened() as executor:
            for number in range(self.tries):
                executor.submit(self.prefill(number, self.prompt(self.options.max_tokens)))
                returned = time.perf_counter_ns()
                if (await self.wait(executor, number)).finished_ns > returned:
                    return
        raise AssertionError(
            f"each of {self.tries} long steps had ended when submit returned: it must not compute, which blocks others"
        )

    @in_trio
    async def test_other_tasks_run_while_a_step_does(self) -> None:
        enough = 16  # more than wait has checkpoints of its own before and after a step
        most = 0
        async with self.opened() as executor:
            for number in range(self.tries):
                turns = 0

                async def count_turns(scope: trio.CancelScope) -> None:
                    nonlocal turns
                    with scope:
                        while True:
                            await trio.lowlevel.checkpoint()
                            turns += 1

                scope = trio.CancelScope()
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(count_turns, scope)
                    executor.submit(self.prefill(number, self.prompt(self.options.max_tokens)))
                    self.doing = f"wait for step {number}"
                    await executor.wait()
                    scope.cancel()
                most = max(most, turns)
                if most >= enough:
                    return
        raise AssertionError(
            f"in {self.tries} tries another task had {most} turns at most during a long step: wait must not block"
        )

    @in_trio
    async def test_cancelling_wait_loses_nothing(self) -> None:
        """Cancelled before it begins, and while it waits, more or less far."""
        async with self.opened() as executor:
            long = self.prompt(self.options.max_tokens)
            (alone,) = await self.run(executor, self.prefill(1, long))
            for number in range(2, 12):
                step = self.prefill(number, long, 1)
                executor.submit(step)
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await executor.wait()
                assert scope.cancelled_caught, "wait in a cancelled scope must be cancelled"
                results: list[StepResult] = []
                await self._wait_a_little(executor, turns=number, results=results)
                self.doing = "wait, called again after it was cancelled,"
                result = results[0] if results else await executor.wait()
                assert result.id == number, (
                    f"step {number} was waited for in vain, then came the result of step {result.id}"
                )
                (output,) = self.outputs(step, result)
                what = "after cancelled waits"
                await self.check_text(executor, long, GREEDY, [output.token], [alone.token], what)

    async def _wait_a_little(self, executor: StepExecutor, turns: int, results: list[StepResult]) -> None:
        async def wait() -> None:
            results.append(await executor.wait())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            for _ in range(turns):
                await trio.lowlevel.checkpoint()
            nursery.cancel_scope.cancel()

    @in_trio
    async def test_stop(self) -> None:
        """It may be too late for one step, but not for each of many long ones."""
        async with self.opened() as executor:
            long = self.prompt(self.options.max_tokens)
            for number in range(self.tries):
                executor.submit(self.prefill(number, long))
                executor.stop(number)
                if (await self.wait(executor, number)).stopped:
                    return
        raise AssertionError(f"each of {self.tries} long steps ran to its end though stop was called at once")

    @in_trio
    async def test_stop_concerns_that_step_alone(self) -> None:
        """Neither the step before it nor the one after, and unknown ids are ignored."""
        async with self.opened() as executor:
            prompt = self.prompt(20)
            (right,) = await self.run(executor, self.prefill(1, prompt, 1, logits=True))
            for number in range(10, 10 + self.tries, 3):
                executor.stop(99_999)  # unknown
                executor.stop(number - 1)  # over
                before = self.prefill(number, prompt, 1, logits=True)
                stopped = self.prefill(number + 1, self.prompt(self.options.max_tokens))
                if executor.max_in_flight > 1:
                    executor.submit(before)
                    executor.submit(stopped)
                    executor.stop(number + 1)
                    result = await self.wait(executor, number)
                    assert not result.stopped, "stop of a step ended the one before it, which must run on"
                    self.check_same(
                        self.outputs(before, result)[0].rows, right.rows, "beside a step that was stopped"
                    )
                else:
                    executor.submit(stopped)
                    executor.stop(number + 1)
                await self.wait(executor, number + 1)
                executor.submit(self.prefill(number + 2, prompt, 1, logits=True))
                result = await self.wait(executor, number + 2)
                assert not result.stopped, (
                    "a step ended early that came after a stopped one: nobody stopped it"
                )
                (after,) = self.outputs(before, result)
                self.check_same(after.rows, right.rows, "after a step that was stopped")

    @in_trio
    async def test_a_stopped_step_can_be_run_again(self) -> None:
        async with self.opened() as executor:
            prompt = self.prompt(150)
            (right,) = await self.run(executor, self.prefill(1, prompt, logits=True))
            await self.run(executor, self.prefill(2, prompt[:70], 1))
            rest = Slice(1, 70, self.pages(1), prompt[70:], sample=True, logits=True)
            for number in range(3, 13):
                executor.submit(Step(number, (rest,), (Bind(1, GREEDY, prompt),)))
                executor.stop(number)
                await self.wait(executor, number)
            (again,) = await self.run(executor, Step(50, (rest,), (Bind(1, GREEDY, prompt),)))
            self.check_same(again.rows, right.rows[70:], "run again after it was stopped", 70)

    @in_trio
    async def test_times_and_statistics(self) -> None:
        async with self.opened() as executor:
            idle = executor.statistics()
            counted = (idle.steps, idle.tokens, idle.in_flight)
            assert counted == (0, 0, 0), (
                f"before the first step, (steps, tokens, in_flight) are {counted}, not 0"
            )
            busy = 0
            begin = time.perf_counter_ns()
            for number, length in ((1, 12), (2, 5)):
                executor.submit(self.prefill(number, self.prompt(length)))
                result = await self.wait(executor, number)
                end = time.perf_counter_ns() + _CLOCK_NS
                times = (result.started_ns, result.finished_ns)
                assert begin - _CLOCK_NS <= times[0] <= times[1] <= end, (
                    f"step {number} began and ended at {times}, but it was submitted and waited for between {begin} "
                    f"and {end} of time.perf_counter_ns"
                )
                took = times[1] - times[0]
                assert 0 <= result.kernel_ns <= took, (
                    f"{result.kernel_ns} ns in kernels of a step of {took} ns"
                )
                busy += took
            after = executor.statistics()
            counted = (after.steps, after.tokens, after.in_flight)
            assert counted == (2, 17, 0), (
                f"(steps, tokens, in_flight) are {counted} after 2 steps of 17 tokens"
            )
            assert after.busy_ns == busy, f"busy_ns is {after.busy_ns}, the two steps took {busy}"
            assert after.finished_ns == result.finished_ns, (
                "finished_ns is not when the last step ended that was waited for"
            )
            assert after.kernel_ns >= result.kernel_ns, "kernel_ns lacks the last step"
            wrong = {name: count for name, count in after.bytes.items() if count < 0}
            assert not wrong, f"bytes must not be negative: {wrong}"

    @in_trio
    async def test_results_stay_as_they_are(self) -> None:
        """Memory of a result is not used again for the next one."""
        async with self.opened() as executor:
            prompt = self.prompt(9)
            targets = np.append(prompt[1:], -1).astype(np.int32)
            first = Slice(0, 0, self.pages(0), prompt, logits=True, targets=targets)
            (output,) = await self.run(executor, Step(1, (first,), (Bind(0, GREEDY, prompt),)))
            assert output.scores is not None
            logits, scores = output.rows.copy(), output.scores.copy()
            other = self.prompt(9, salt=3)
            for number in range(2, 3 + executor.max_in_flight):
                second = Slice(1, 0, self.pages(1), other, logits=True, targets=targets)
                await self.run(executor, Step(number, (second,), (Bind(1, GREEDY, other),)))
            assert np.array_equal(output.rows, logits), (
                "logits of an earlier result changed with a later step"
            )
            assert np.array_equal(output.scores, scores), (
                "scores of an earlier result changed with a later step"
            )


_CLOCK_NS = 1_000_000  # executors that keep another clock convert its times
