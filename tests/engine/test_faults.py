"""An executor that fails takes the requests of its step with it, and nobody else's."""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import MockClock

from pi2rt._errors import ExecutorError
from pi2rt.engine import SamplingParams
from pi2rt.executors.simulated.executor import Faults
from pi2rt.runtime.actor import FAILURE_WINDOW, MAX_FAILURES
from pi2rt.runtime.executor import StepExecutor
from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import Log, LoggingExecutor, continuation, numbers, opened


@pytest.mark.parametrize(
    "faults", [Faults(raise_in_wait=frozenset([4])), Faults(raise_in_submit=frozenset([4]))]
)
async def test_the_failed_step_names_actor_and_item(
    tokenizer: Tokenizer, autojump_clock: MockClock, faults: Faults
) -> None:
    async with opened(tokenizer, faults=faults) as o:
        prompt = numbers(100)
        with pytest.raises(
            ExecutorError, match=r"^actor 'simulated' failed on <Step 4: 1 tokens .*injected"
        ) as info:
            await o.tokens(prompt, 100)
        assert info.value.__cause__ is not None
        assert await o.tokens(prompt, 100) == continuation(prompt, 100)
        statistics = o.engine.statistics()
        assert (statistics.failed, statistics.finished, statistics.rebuilds) == (1, 1, 1)
        assert o.log.executors == 2


async def test_what_came_before_the_failure_is_there(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, faults=Faults(raise_in_wait=frozenset([4]))) as o:
        prompt = numbers(10)
        async with o.engine.stream(prompt) as chunks:
            got = [(await anext(chunks)).token for _ in range(3)]
            assert got == continuation(prompt, 3)
            for _ in range(2):
                with pytest.raises(ExecutorError):
                    await anext(chunks)


async def test_a_request_that_waits_notices_nothing(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, slots=1, faults=Faults(raise_in_wait=frozenset([5]))) as o:
        prompt = numbers(70)
        async with o.engine.stream(numbers(5, seed=1)) as fails, trio.open_nursery() as nursery:

            async def waits() -> None:
                assert await o.tokens(prompt, 60) == continuation(prompt, 60)

            nursery.start_soon(waits)
            with pytest.raises(ExecutorError):
                async for _ in fails:
                    pass


async def test_a_running_sequence_outside_the_failed_step_is_computed_again(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    """Its consumer was slow, so it was not in the step."""
    faults = Faults(raise_in_wait=frozenset([50]))
    async with opened(tokenizer, slots=2, stream_buffer=20, seconds_per_step=0.01, faults=faults) as o:
        prompt = numbers(100)
        async with o.engine.stream(prompt, SamplingParams(max_tokens=200, ignore_eos=True)) as stalled:
            with pytest.raises(ExecutorError):
                await o.tokens(numbers(30, seed=2), 100)
            assert [chunk.token async for chunk in stalled] == continuation(prompt, 200)
        assert o.engine.statistics().rebuilds == 1


async def test_the_prefix_index_forgets_what_the_executor_lost(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, faults=Faults(raise_in_wait=frozenset([4]))) as o:
        prompt = numbers(200)
        await o.tokens(prompt, 2)
        with pytest.raises(ExecutorError):
            await o.tokens(prompt, 10)
        chunks = await o.chunks(prompt, max_tokens=5)
        assert chunks[-1].timing is not None
        assert chunks[-1].timing.cached_tokens == 0


async def test_an_executor_that_cannot_be_rebuilt(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    def make(log: Log) -> StepExecutor:
        faults = Faults(raise_in_open=True) if log.executors else Faults(raise_in_wait=frozenset([2]))
        return LoggingExecutor(log, faults=faults)

    async with opened(tokenizer, make_executor=make) as o:
        with pytest.raises(ExecutorError, match="injected into wait"):
            await o.tokens(numbers(10), 10)
        for _ in range(3):
            with pytest.raises(ExecutorError, match=r"broken.*injected into open"):
                await o.tokens(numbers(10), 10)


async def test_requests_that_wait_for_a_rebuild_fail_with_it_and_later_ones_try_again(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    """Each once, at the same time and with the cause: not each after an attempt of its own."""

    def make(log: Log) -> StepExecutor:
        number = log.executors
        faults = Faults(raise_in_open=number in (1, 2), raise_in_wait=frozenset([] if number else [2]))
        return LoggingExecutor(
            log, faults=faults, seconds_to_open=10.0 if number else 0.0, seconds_per_step=0.01
        )

    async with opened(tokenizer, slots=2, make_executor=make) as o:
        ended: list[float] = []

        async def fails(number: int, match: str) -> None:
            with pytest.raises(ExecutorError, match=match):
                await o.tokens(numbers(10, seed=number), 10)
            ended.append(round(trio.current_time()))

        with pytest.raises(ExecutorError, match="injected into wait"):
            await o.tokens(numbers(10), 10)
        for attempt in 1, 2:
            async with trio.open_nursery() as nursery:
                for number in range(6):  # of which four wait for a slot
                    nursery.start_soon(
                        fails, number, "broken.*injected into open.*the next request tries again"
                    )
            assert (ended, o.log.executors) == ([10 * attempt] * 6, 1 + attempt)
            ended.clear()
        assert await o.tokens(numbers(10), 10) == continuation(numbers(10), 10)
        statistics = o.engine.statistics()
        assert (statistics.failed, statistics.finished, statistics.waiting) == (13, 1, 0)


async def test_beyond_the_limit_requests_fail_at_once_until_the_window_has_passed(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    broken = True

    def make(log: Log) -> StepExecutor:
        return LoggingExecutor(
            log, faults=Faults(raise_in_open=broken and log.executors > 0), seconds_per_step=1
        )

    async with opened(tokenizer, make_executor=make) as o:
        with pytest.raises(ExecutorError):
            await o.actor.reopen(lambda: None)
        for number in range(2 * MAX_FAILURES):
            with pytest.raises(ExecutorError, match="broken"):
                await o.tokens(numbers(10), 10)
            assert o.log.executors == min(3 + number, 1 + MAX_FAILURES + 1)  # the first, and six that failed
        broken = False
        with pytest.raises(ExecutorError, match="no attempt is made for"):
            await o.tokens(numbers(10), 10)
        await trio.sleep(FAILURE_WINDOW)
        assert await o.tokens(numbers(10), 10) == continuation(numbers(10), 10)


async def test_a_failure_while_all_of_the_step_has_left(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, seconds_per_step=1, faults=Faults(raise_in_wait=frozenset([2]))) as o:
        async with o.engine.stream(numbers(10)) as chunks:
            await anext(chunks)
        await o.idle()
        prompt = numbers(10, seed=1)
        assert await o.tokens(prompt, 10) == continuation(prompt, 10)
        statistics = o.engine.statistics()
        assert (statistics.failed, statistics.cancelled, statistics.finished) == (0, 1, 1)


@pytest.mark.parametrize("seed", range(6))
async def test_failures_at_any_moment(tokenizer: Tokenizer, autojump_clock: MockClock, seed: int) -> None:
    """Whoever does not get an error gets the right text."""
    print(f"seed {seed}")  # shown when it fails
    rng = random.Random(seed)
    failing = frozenset(rng.sample(range(1, 300), 4))  # five are too many for one minute
    split = rng.randint(0, 4)
    faults = Faults(
        raise_in_wait=frozenset(list(failing)[:split]), raise_in_submit=frozenset(list(failing)[split:])
    )
    outcomes = []
    async with opened(tokenizer, slots=3, context=512, pages=10, seconds_per_step=0.01, faults=faults) as o:

        async def one(number: int) -> None:
            prompt = numbers(rng.randint(1, 150), seed=number)
            count = rng.randint(1, 100)
            await trio.sleep(rng.random() * 3)
            try:
                with trio.move_on_after(rng.choice([0.3, 1000])) as scope:
                    assert await o.tokens(prompt, count) == continuation(prompt, count)
                outcomes.append("cancelled" if scope.cancelled_caught else "finished")
            except ExecutorError:
                outcomes.append("failed")

        async with trio.open_nursery() as nursery:
            for number in range(25):
                nursery.start_soon(one, number)
        await o.idle()
        assert outcomes.count("finished") > 0
        assert outcomes.count("failed") <= 4 * 3  # steps times slots
