"""What was computed for one request is there for the next."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from pi2rt.engine import Timing
from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import Opened, continuation, numbers, opened


async def timing(o: Opened, prompt: list[int], max_tokens: int) -> Timing:
    chunks = await o.chunks(prompt, max_tokens=max_tokens)
    assert [chunk.token for chunk in chunks] == continuation(prompt, max_tokens)
    found = chunks[-1].timing
    assert found is not None
    return found


async def test_the_next_turn_starts_where_the_last_ended(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer) as o:
        first = numbers(200)
        assert (await timing(o, first, 70)).cached_tokens == 0
        second = [*first, *continuation(first, 70), *numbers(30, seed=1)]
        assert (
            await timing(o, second, 5)
        ).cached_tokens == 256  # 269 positions were computed, 4 pages are full
        assert o.engine.statistics().prefixes.hit_tokens == 256


async def test_at_least_one_token_is_computed(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer) as o:
        prompt = numbers(128)
        await timing(o, prompt, 1)
        assert (await timing(o, prompt, 1)).cached_tokens == 64
        assert (await timing(o, prompt[:65], 1)).cached_tokens == 64
        assert (await timing(o, prompt[:64], 1)).cached_tokens == 0


async def test_a_different_beginning_is_no_hit(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer) as o:
        prompt = numbers(200)
        await timing(o, prompt, 1)
        assert (await timing(o, [prompt[0] ^ 1, *prompt[1:]], 1)).cached_tokens == 0
        assert (await timing(o, prompt[64:], 1)).cached_tokens == 0


async def test_sharing_with_a_sequence_that_still_runs(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, seconds_per_step=0.01) as o:
        system = numbers(300)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(timing, o, [*system, 1], 300)
            await trio.sleep(0.1)
            held = o.engine.statistics().pages.held
            assert (await timing(o, [*system, 2], 5)).cached_tokens == 256
            assert o.engine.statistics().pages.peak_held == held + 1


async def test_the_same_prompt_twice_at_once(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    """Both compute it, one of them is kept."""
    async with opened(tokenizer, slots=2) as o:
        prompt = numbers(200)
        async with trio.open_nursery() as nursery:
            nursery.start_soon(timing, o, prompt, 100)
            nursery.start_soon(timing, o, prompt, 100)
        await o.idle()
        assert o.engine.statistics().pages.held == 4


async def test_old_prefixes_make_room(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, slots=1, context=512, pages=8) as o:
        kept, old = numbers(200), numbers(200, seed=1)
        await timing(o, old, 1)
        await timing(o, kept, 1)  # 3 full pages each
        assert (await timing(o, numbers(150, seed=2), 1)).cached_tokens == 0  # takes one from the old one
        assert o.engine.statistics().prefixes.evicted_pages == 1
        assert (await timing(o, kept, 1)).cached_tokens == 192
        assert (await timing(o, old, 1)).cached_tokens == 128


async def test_reading_leaves_the_index_alone(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer) as o:
        await o.engine.score(numbers(500))
        await o.idle()
        assert o.engine.statistics().pages.held == 0
