"""A request can be left at any moment; what it held comes back and the next one runs."""

from __future__ import annotations

import random

import pytest
import trio
from trio.testing import MockClock

from pi2rt._errors import ClosedError
from pi2rt.engine import SamplingParams
from pi2rt.executors.simulated.executor import Faults
from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import continuation, numbers, opened


async def test_leaving_while_it_waits_for_a_slot(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, slots=1, seconds_per_step=1) as o:
        async with o.engine.stream(numbers(3)) as running:
            await anext(running)
            async with o.engine.stream(numbers(4)):
                assert o.engine.statistics().waiting == 1
            assert o.engine.statistics().waiting == 0
        assert o.engine.statistics().cancelled == 2


async def test_leaving_during_prefill_stops_the_step(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, context=2048, seconds_per_token=1) as o:
        with trio.move_on_after(100) as scope:
            async with o.engine.stream(numbers(2000)) as chunks:
                await anext(chunks)
        assert scope.cancelled_caught
        await o.idle()
        assert o.log.stops == [1, 2]
        assert trio.current_time() < 101  # of 512 seconds that the first chunk takes
        prompt = numbers(5, seed=1)
        assert await o.tokens(prompt, 3) == continuation(prompt, 3)


async def test_leaving_during_decode_stops_the_steps(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, seconds_per_step=10) as o:
        async with o.engine.stream(numbers(3)) as chunks:
            await anext(chunks)
            await anext(chunks)
        await o.idle()
        assert o.log.stops == [3, 4]
        assert trio.current_time() < 21


async def test_a_step_that_others_need_is_not_stopped(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, seconds_per_step=1) as o:
        prompt = numbers(3)
        async with trio.open_nursery() as nursery:

            async def stay() -> None:
                assert await o.tokens(prompt, 20) == continuation(prompt, 20)

            nursery.start_soon(stay)
            await trio.sleep(5.5)
            async with o.engine.stream(numbers(4)) as chunks:
                await anext(chunks)
        assert o.log.stops == []


async def test_a_hanging_step_is_stopped(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, faults=Faults(hang=frozenset([3]))) as o:
        with trio.move_on_after(5) as scope:
            await o.tokens(numbers(3), 10)
        assert scope.cancelled_caught
        prompt = numbers(5, seed=1)
        assert await o.tokens(prompt, 3) == continuation(prompt, 3)


async def test_a_stream_that_was_left_is_closed(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer) as o:
        async with o.engine.stream(numbers(3)) as chunks:
            await anext(chunks)
        with pytest.raises(ClosedError, match=r"^this stream was closed$"):
            await anext(chunks)
        chunks.close()  # twice is fine


async def test_leaving_from_the_progress_callback(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer) as o:
        chunks = o.engine.stream(numbers(100), on_prefill=lambda done, total: chunks.close())
        with pytest.raises(ClosedError, match=r"^this stream was closed$"):
            await anext(chunks)
        statistics = o.engine.statistics()
        assert (statistics.cancelled, statistics.finished, statistics.generated_tokens) == (1, 0, 0)


async def test_requests_of_an_engine_that_ends_early_fail(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    """Its task was cancelled, or has a bug: nobody waits for ever."""
    async with opened(tokenizer, seconds_per_step=1) as o:
        async with o.engine.stream(numbers(3)) as chunks:
            await anext(chunks)
            await o.end()
            with pytest.raises(ClosedError, match="while this request ran"):
                async for _ in chunks:
                    pass


async def test_closing_the_engine_fails_its_requests(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, slots=1, seconds_per_step=1) as o:
        async with o.engine.stream(numbers(3)) as running, o.engine.stream(numbers(4)) as waiting:
            await anext(running)
            o.engine.close()
            for stream in running, waiting:
                with pytest.raises(ClosedError, match="while this request ran"):
                    async for _ in stream:
                        pass
        with pytest.raises(ClosedError, match="the engine is closed"):
            o.engine.stream(numbers(3))
        await o.idle()


@pytest.mark.parametrize(
    "seed", [*range(8), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(8, 100))]
)
async def test_cancelling_at_any_moment(tokenizer: Tokenizer, autojump_clock: MockClock, seed: int) -> None:
    """Random requests over few pages, many of them left at a random moment, some with slow consumers. The
    executor holds every step against the rules of the cache; what is not left must say what it says
    alone."""
    print(f"seed {seed}")  # shown when it fails
    rng = random.Random(seed)
    shared = numbers(200, seed=999)
    finished = 0

    async with opened(
        tokenizer,
        slots=rng.randint(1, 4),
        context=512,
        pages=rng.randint(8, 16),
        max_tokens=rng.choice([64, 512]),
        mixed_chunk=rng.choice([1, 16, 64]),
        stream_buffer=rng.choice([1, 2, 8]),
        max_in_flight=rng.choice([1, 2, 3]),
        seconds_per_step=0.01,
        seconds_per_token=0.001,
    ) as o:

        async def one(number: int) -> None:
            nonlocal finished
            prompt = shared[: rng.choice([0, 64, 130, 200])] + numbers(rng.randint(1, 150), seed=number)
            count = rng.randint(1, 120)
            await trio.sleep(rng.random() * 3)
            deadline = rng.random() * 4 if rng.random() < 0.6 else 1000
            slow = rng.random() * 0.1 if rng.random() < 0.3 else 0
            expected = continuation(prompt, count)
            with trio.move_on_after(deadline) as scope:
                params = SamplingParams(max_tokens=count, ignore_eos=True)
                got = []
                async with o.engine.stream(prompt, params) as chunks:
                    async for chunk in chunks:
                        got.append(chunk.token)
                        await trio.sleep(slow)
                assert got == expected
                finished += 1
            if scope.cancelled_caught:
                assert got == expected[: len(got)]

        async with trio.open_nursery() as nursery:
            for number in range(30):
                nursery.start_soon(one, number)
        await o.idle()
        statistics = o.engine.statistics()
        assert statistics.finished >= finished > 0
        assert statistics.finished + statistics.cancelled == 30
