"""Continuous batching and chunked prefill."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import Opened, continuation, numbers, opened


async def test_one_sequence(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    prompt = numbers(10)
    async with opened(tokenizer) as o:
        assert await o.tokens(prompt, 150) == continuation(prompt, 150)
        assert len(o.log.steps) == 150


async def test_sequences_share_steps(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    prompts = [numbers(5 + i, seed=i) for i in range(4)]
    got: dict[int, list[int]] = {}

    async with opened(tokenizer, seconds_per_step=0.01) as o:

        async def one(i: int) -> None:
            got[i] = await o.tokens(prompts[i], 50 + i)

        async with trio.open_nursery() as nursery:
            for i in range(4):
                nursery.start_soon(one, i)
        # Trio starts the four in any order, so they may join in up to four steps.
        assert len(o.log.steps) <= 58
        assert o.log.decode_tokens().count(4) >= 45
    assert got == {i: continuation(prompts[i], 50 + i) for i in range(4)}


async def test_more_sequences_than_slots_run_in_order(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    finished: list[int] = []

    async with opened(tokenizer, slots=2, seconds_per_step=0.01) as o:

        async def one(i: int) -> None:
            prompt = numbers(7, seed=i)
            assert await o.tokens(prompt, 20) == continuation(prompt, 20)
            finished.append(i)

        async with trio.open_nursery() as nursery:
            for i in range(7):
                nursery.start_soon(one, i)
                await trio.testing.wait_all_tasks_blocked()
        assert max(o.log.decode_tokens()) == 2
    assert finished == list(range(7))


async def test_a_prompt_alone_goes_in_large_chunks(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, context=2048, max_tokens=512) as o:
        await o.tokens(numbers(1300), 1)
        assert o.log.prefill_tokens() == [512, 512, 276]


async def test_a_long_prompt_does_not_stall_decoding(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, context=2048, seconds_per_step=0.004, seconds_per_token=0.001) as o:
        gaps: list[float] = []

        async def decode() -> None:
            async with o.engine.stream(numbers(4)) as chunks:
                last = None
                async for _ in chunks:
                    now = trio.current_time()
                    if last is not None:
                        gaps.append(now - last)
                    last = now

        async with trio.open_nursery() as nursery:
            nursery.start_soon(decode)
            await trio.sleep(0.1)
            before = len(gaps)
            prompt = numbers(1500, seed=1)
            assert await o.tokens(prompt, 3) == continuation(prompt, 3)
            nursery.cancel_scope.cancel()
        mixed = [
            (p, d) for p, d in zip(o.log.prefill_tokens(), o.log.decode_tokens(), strict=True) if p and d
        ]
        assert len(mixed) >= 1500 // 64
        assert max(p for p, _ in mixed) == 64
        # 64 prompt tokens and one decoded token to a step, and no step without one
        assert max(gaps[before:]) < 0.004 + 0.001 * 65 + 1e-6


async def test_steps_never_exceed_their_size(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, slots=8, max_tokens=16, mixed_chunk=64) as o:

        async def one(i: int) -> None:
            prompt = numbers(40 + i, seed=i)
            assert await o.tokens(prompt, 10) == continuation(prompt, 10)

        async with trio.open_nursery() as nursery:
            for i in range(8):
                nursery.start_soon(one, i)
        assert max(step.tokens for step in o.log.steps) == 16


async def test_executor_without_a_second_step_in_flight(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, max_in_flight=1) as o:
        prompt = numbers(100)
        assert await o.tokens(prompt, 80) == continuation(prompt, 80)


async def test_sampled_text_depends_on_the_seed_alone(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async def text(o: Opened, seed: int | None) -> list[int]:
        return await o.tokens(numbers(9), 30, temperature=1.0, seed=seed)

    async with opened(tokenizer) as o:
        first = await text(o, 7)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(o.tokens, numbers(70, seed=1), 40)
            nursery.start_soon(o.tokens, numbers(70, seed=2), 40)
            assert await text(o, 7) == first
        assert await text(o, 8) != first
        assert await text(o, None) != await text(o, None)
