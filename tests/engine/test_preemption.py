"""Pages run out: somebody gives theirs back and is computed again, and nobody's text changes."""

from __future__ import annotations

import pytest
import trio
from trio.testing import MockClock

from pi2rt._errors import RequestError
from pi2rt.engine import EngineOptions
from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import continuation, numbers, opened


async def test_sequences_that_outgrow_the_pool_finish_all_the_same(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, slots=4, context=512, pages=10, seconds_per_step=0.01) as o:
        finished: list[int] = []

        async def one(i: int) -> None:
            prompt = numbers(100, seed=i)
            assert await o.tokens(prompt, 250) == continuation(prompt, 250)
            finished.append(i)

        async with trio.open_nursery() as nursery:
            for i in range(4):
                nursery.start_soon(one, i)
                await trio.testing.wait_all_tasks_blocked()
        assert o.engine.statistics().preemptions > 0
        assert finished[0] == 0  # the oldest never gives way


async def test_penalties_and_limits_survive_being_computed_again(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    """The bind of a sequence that is computed again carries all it has generated."""
    async with opened(tokenizer, slots=2, context=256, pages=4) as o:
        async with trio.open_nursery() as nursery:
            for i in range(2):
                nursery.start_soon(o.tokens, numbers(60, seed=i), 190)
        again = [bind for step in o.log.steps for bind in step.binds][2:]
        assert again
        for bind in again:
            prompt = next(
                numbers(60, seed=i) for i in range(2) if numbers(60, seed=i) == bind.history[:60].tolist()
            )
            assert bind.history.tolist() == prompt + continuation(prompt, len(bind.history) - 60)


async def test_a_context_that_fills_the_pool_to_the_last_token(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, slots=2, context=256, pages=4) as o:
        prompt = numbers(156)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(o.tokens, numbers(100, seed=1), 156)
            assert await o.tokens(prompt, 100) == continuation(prompt, 100)


async def test_a_prompt_that_does_not_fit_now_waits(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, slots=2, context=256, pages=4, seconds_per_step=0.01) as o:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(o.tokens, numbers(150), 30)
            await trio.sleep(0.05)
            nursery.start_soon(o.tokens, numbers(150, seed=1), 1)
            await trio.sleep(0.05)
            statistics = o.engine.statistics()
            assert (statistics.waiting, statistics.decoding, statistics.free_slots) == (1, 1, 1)
        assert o.engine.statistics().preemptions == 0


def test_a_pool_smaller_than_a_context_is_refused() -> None:
    with pytest.raises(RequestError, match=r"^pages=3: fewer than a context of 256 tokens needs, 4$"):
        EngineOptions(vocab_size=10, slots=1, pages=3, context=256)
    with pytest.raises(RequestError, match=r"^max_tokens=4: .* 5 sequences$"):
        EngineOptions(vocab_size=10, slots=5, pages=4, context=256, max_tokens=4)
    with pytest.raises(RequestError, match=r"^slots=0: at least 1 is needed$"):
        EngineOptions(vocab_size=10, slots=0, pages=4, context=256)
