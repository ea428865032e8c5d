"""A consumer that does not keep up pauses its own sequence and no other."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from pi2rt.engine import SamplingParams
from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import continuation, numbers, opened

MANY = SamplingParams(max_tokens=300, ignore_eos=True)


async def test_a_slow_consumer_pauses_only_itself(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, stream_buffer=10, seconds_per_step=0.01) as o:
        prompt = numbers(5)
        async with o.engine.stream(prompt, MANY) as slow:
            other = numbers(6, seed=1)
            assert await o.tokens(other, 200) == continuation(other, 200)
            await trio.sleep(10)
            assert (
                sum(o.log.decode_tokens()) == 199 + 9
            )  # ten chunks wait for the slow one, the first from prefill
            assert o.engine.statistics().steps_in_flight == 0
            assert [chunk.token async for chunk in slow] == continuation(prompt, 300)


async def test_it_goes_on_when_half_of_the_chunks_are_taken(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, stream_buffer=10) as o:
        async with o.engine.stream(numbers(5), MANY) as slow:
            await trio.testing.wait_all_tasks_blocked()
            assert len(o.log.steps) == 10
            for _ in range(4):
                await anext(slow)
            await trio.testing.wait_all_tasks_blocked()
            assert len(o.log.steps) == 10
            await anext(slow)
            await trio.testing.wait_all_tasks_blocked()
            assert len(o.log.steps) == 15


async def test_consumers_that_stopped_reading_do_not_keep_slots(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, slots=2, stream_buffer=10) as o:
        prompts = [numbers(5, seed=seed) for seed in range(2)]
        async with o.engine.stream(prompts[0], MANY) as first, o.engine.stream(prompts[1], MANY) as second:
            await trio.testing.wait_all_tasks_blocked()
            assert o.engine.statistics().free_slots == 0
            for seed in range(2, 5):
                prompt = numbers(5, seed=seed)
                assert await o.tokens(prompt, 100) == continuation(prompt, 100)
            assert o.engine.statistics().preemptions >= 1
            assert [chunk.token async for chunk in first] == continuation(prompts[0], 300)
            assert [chunk.token async for chunk in second] == continuation(prompts[1], 300)


async def test_consumers_that_stopped_reading_do_not_keep_pages(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, context=512, pages=8, stream_buffer=300) as o:
        prompt, other = numbers(64), numbers(400, seed=1)
        async with o.engine.stream(prompt, SamplingParams(max_tokens=400, ignore_eos=True)) as stalled:
            await trio.testing.wait_all_tasks_blocked()
            assert await o.tokens(other, 100) == continuation(other, 100)
            assert [chunk.token async for chunk in stalled] == continuation(prompt, 400)


async def test_a_prompt_that_needs_every_page_gets_those_of_all_who_stopped_reading(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    """Its margin is for those that still run then: none."""
    async with opened(tokenizer, slots=4, context=640, pages=10, stream_buffer=4) as o:
        params = SamplingParams(max_tokens=60, ignore_eos=True)
        prompts = [numbers(5, seed=seed) for seed in range(3)]
        async with (
            o.engine.stream(prompts[0], params) as a,
            o.engine.stream(prompts[1], params) as b,
            o.engine.stream(prompts[2], params) as c,
        ):
            await o.idle()
            large = numbers(630, seed=9)
            with trio.fail_after(100):
                assert await o.tokens(large, 10) == continuation(large, 10)
                for stream, prompt in zip((a, b, c), prompts, strict=True):
                    assert [chunk.token async for chunk in stream] == continuation(prompt, 60)


async def test_the_smallest_buffer(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, stream_buffer=1) as o:
        prompt = numbers(5)
        assert await o.tokens(prompt, 70) == continuation(prompt, 70)
