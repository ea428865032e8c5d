"""Windowed bytes of KV pages while sequences run: with the least memory for them, steps are those with all of it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from pi2rt._errors import ExecutorError, RequestError
from pi2rt.engine import SamplingParams
from pi2rt.engine.lane import rows_in_flight
from pi2rt.executors.simulated.executor import Faults
from pi2rt.memory import PAGE_TOKENS, StateLayout, least_window_pages
from pi2rt.runtime.step import Step
from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import continuation, numbers, opened
from tests.engine.test_prefix_reuse import timing

WINDOW = 70
FAST: dict[str, Any] = {"seconds_per_step": 0.0005, "max_in_flight": 8}


def least(slots: int, context: int, *lanes: tuple[int, int]) -> int:
    """``lanes``: of each, tokens of a step and steps in flight."""
    rows = sum(rows_in_flight(tokens, in_flight, slots) for tokens, in_flight in lanes)
    return least_window_pages(WINDOW, slots, rows, context)


def composed(steps: Sequence[Step]) -> list[list[tuple[int, int, int]]]:
    return [[(part.slot, part.start, part.count) for part in step.slices] for step in steps]


async def test_eight_sequences_at_full_depth_never_wait(
    tokenizer: Tokenizer, autojump_clock: MockClock, windowed: StateLayout
) -> None:
    """Prompts of many lengths: with the least memory the steps are, one by one, those with memory for every page."""
    needed = least(8, 1024, (64, 8))
    assert needed < 8 * 16 // 2
    runs: list[list[list[tuple[int, int, int]]]] = []
    for window_pages in (needed, None):
        async with (
            opened(
                tokenizer, slots=8, max_tokens=64, layout=windowed, window_pages=window_pages, **FAST
            ) as o,
            AsyncExitStack() as stack,
        ):
            prompts = [numbers(100 + 53 * (number % 11), seed=number) for number in range(16)]
            params = SamplingParams(max_tokens=250, ignore_eos=True)
            streams = [await stack.enter_async_context(o.engine.stream(each, params)) for each in prompts]
            for prompt, stream in zip(prompts, streams, strict=True):
                assert [chunk.token async for chunk in stream] == continuation(prompt, 250)
            await o.idle()
            if window_pages is not None:
                found = o.windows
                assert found.given_back > 50
                assert needed - 8 <= found.peak_held <= found.peak_backed == found.capacity == needed
            assert max(len(step.slices) for step in o.log.steps) == 8
            runs.append(composed(o.log.steps))
    assert runs[0] == runs[1]


async def test_requests_that_leave_do_not_make_others_wait(
    tokenizer: Tokenizer, autojump_clock: MockClock, windowed: StateLayout
) -> None:
    """Two lanes, and prompts that are cancelled while their steps are in flight: these hold what they did."""
    lane = {"seconds_per_step": 0.01, "max_tokens": 64, "least_tokens": 100}
    needed = least(4, 1024, (64, 8), (64, 2))
    async with opened(
        tokenizer,
        slots=4,
        max_tokens=64,
        layout=windowed,
        window_pages=needed,
        prefill=[lane],
        **FAST,
    ) as o:

        async def one(number: int) -> None:
            await trio.sleep(0.003 * number)
            prompt = numbers(50 + 61 * (number % 15), seed=number)
            with trio.move_on_after(0.05 if number % 2 else 100):
                assert await o.tokens(prompt, 60) == continuation(prompt, 60)

        async with trio.open_nursery() as nursery:
            for number in range(60):
                nursery.start_soon(one, number)
        await o.idle()
        assert o.engine.statistics().cancelled >= 5
        assert o.windows.given_back > 50
        assert o.windows.peak_held >= needed - 10


async def test_less_memory_than_steps_may_take_is_refused(
    tokenizer: Tokenizer, autojump_clock: MockClock, windowed: StateLayout
) -> None:
    needed = least(2, 1024, (64, 8))
    with pytest.RaisesGroup(
        pytest.RaisesExc(RequestError, match=f"window_pages={needed - 1}: fewer than the {needed} KV pages"),
        flatten_subgroups=True,
    ):
        async with opened(
            tokenizer, slots=2, max_tokens=64, layout=windowed, window_pages=needed - 1, max_in_flight=8
        ):
            pass


async def test_the_next_turn_of_a_chat_still_begins_where_the_last_ended(
    tokenizer: Tokenizer, autojump_clock: MockClock, windowed: StateLayout
) -> None:
    async with opened(
        tokenizer, slots=1, max_tokens=64, layout=windowed, window_pages=least(1, 1024, (64, 2))
    ) as o:
        turns = numbers(200)
        cached = 0
        for turn in range(4):
            found = await timing(o, turns, 70)
            assert found.cached_tokens == cached
            turns += [*continuation(turns, 70), *numbers(50, seed=turn)]
            cached = (len(turns) - 51) // PAGE_TOKENS * PAGE_TOKENS
        assert o.windows.given_back > 0


async def test_a_conversation_whose_window_others_took_is_computed_again_and_then_found(
    tokenizer: Tokenizer, autojump_clock: MockClock, windowed: StateLayout
) -> None:
    async with opened(
        tokenizer, slots=1, pages=64, max_tokens=64, layout=windowed, window_pages=least(1, 1024, (64, 2))
    ) as o:
        chat, other = numbers(300), numbers(700, seed=1)
        assert (await timing(o, chat, 1)).cached_tokens == 0
        await timing(o, other, 1)
        assert (await timing(o, [*chat, 1], 1)).cached_tokens == 0  # though its pages are in the index
        assert o.engine.statistics().prefixes.evicted_pages == 0
        assert (await timing(o, [*chat, 2], 1)).cached_tokens == 256


async def test_a_shared_beginning_is_waited_for_and_found(
    tokenizer: Tokenizer, autojump_clock: MockClock, windowed: StateLayout
) -> None:
    async with opened(
        tokenizer, slots=4, max_tokens=64, layout=windowed, window_pages=least(4, 1024, (64, 2)) + 8
    ) as o:
        system = numbers(320)
        found: list[int] = []

        async def one(number: int) -> None:
            found.append((await timing(o, [*system, *numbers(20, seed=number)], 80)).cached_tokens)

        async with trio.open_nursery() as nursery:
            for number in range(1, 4):
                nursery.start_soon(one, number)
        assert sorted(found) == [0, 320, 320]


async def test_a_preempted_sequence_is_computed_again(
    tokenizer: Tokenizer, autojump_clock: MockClock, windowed: StateLayout
) -> None:
    """Pages of the cache run out, not their windowed bytes."""
    needed = least(4, 1024, (64, 8))
    async with opened(
        tokenizer, slots=4, pages=20, max_tokens=64, layout=windowed, window_pages=needed, **FAST
    ) as o:

        async def one(seed: int) -> None:
            prompt = numbers(200, seed=seed)
            assert await o.tokens(prompt, 400) == continuation(prompt, 400)

        async with trio.open_nursery() as nursery:
            for seed in range(6):
                nursery.start_soon(one, seed)
        assert needed < 20
        assert o.engine.statistics().preemptions > 0
        assert o.windows.given_back > 0


async def test_reading_gives_windowed_bytes_back(
    tokenizer: Tokenizer, autojump_clock: MockClock, windowed: StateLayout
) -> None:
    async with opened(
        tokenizer, slots=2, max_tokens=64, layout=windowed, window_pages=least(2, 1024, (64, 2))
    ) as o:
        scores = await o.engine.score(numbers(900))
        logits = await o.engine.logits(numbers(500, seed=1))
        assert (len(scores), len(logits)) == (899, 500)
        assert o.windows.given_back > 0
        await o.idle()
        assert o.windows.held == 0


async def test_what_a_sequence_that_leaves_has_returned_is_let_go(
    tokenizer: Tokenizer, autojump_clock: MockClock, windowed: StateLayout
) -> None:
    """Or it would hold more than what it has in flight counts for, while others submit as much anew."""
    async with opened(
        tokenizer, slots=2, max_tokens=128, layout=windowed, window_pages=20, seconds_per_step=1.0
    ) as o:
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        leaves, stays = (o.engine.stream(numbers(900, seed=seed), params) for seed in range(2))
        async with stays:
            async with leaves:
                await trio.sleep(2.5)  # of both, 128 positions are computed and 128 in flight
                assert o.windows.held == 4 + 4
            await trio.sleep(1)  # a step has returned; another one has 128 positions of who stays
            assert o.engine.statistics().leaving == 1
            assert o.windows.held == 3 + 5
            assert [chunk.token async for chunk in stays] == continuation(numbers(900, seed=1), 1)


async def test_what_a_lost_step_was_to_write_is_let_go(
    tokenizer: Tokenizer, autojump_clock: MockClock, windowed: StateLayout
) -> None:
    """It is computed again, and perhaps less of it at once."""
    async with (
        opened(
            tokenizer,
            slots=3,
            max_tokens=128,
            layout=windowed,
            window_pages=20,
            seconds_per_step=1.0,
            seconds_to_open=5.0,
            faults=Faults(raise_in_wait=frozenset([2])),
        ) as o,
        trio.open_nursery() as nursery,
    ):

        async def fails() -> None:
            with pytest.raises(ExecutorError):
                await o.tokens(numbers(256), 1)

        async def goes_on(seed: int) -> None:
            assert await o.tokens(numbers(400, seed=seed), 1) == continuation(numbers(400, seed=seed), 1)

        nursery.start_soon(fails)
        await trio.sleep(0.5)
        nursery.start_soon(goes_on, 1)
        await trio.sleep(
            1
        )  # the first step has returned; the other one of the first sequence is in flight, and
        assert o.windows.held == 4 + 2  # behind it 128 rows of the second one
        nursery.start_soon(goes_on, 2)
        await trio.sleep(1)  # the next executor is being opened; 64 rows of each wait for it
        assert o.engine.statistics().failed == 1
        assert o.windows.held == 1 + 1


@pytest.mark.parametrize("lost_in", ["decode", "prefill"])
async def test_a_lost_executor_leaves_windowed_bytes_as_they_are(
    tokenizer: Tokenizer, autojump_clock: MockClock, windowed: StateLayout, lost_in: str
) -> None:
    """Who was not in the failed step goes on from what is computed, in the memory there is: what steps that were lost
    were to write is let go."""
    faults = Faults(raise_in_wait=frozenset((3, 8, 14)))
    lane = {"seconds_per_step": 0.03, "max_tokens": 128, "least_tokens": 100}
    needed = least(4, 1024, (64, 8), (128, 2))
    async with opened(
        tokenizer,
        slots=4,
        max_tokens=64,
        layout=windowed,
        window_pages=needed,
        prefill=[lane | ({"faults": faults} if lost_in == "prefill" else {})],
        **FAST,
        **({"faults": faults} if lost_in == "decode" else {}),
    ) as o:
        outcomes: list[str] = []

        async def one(number: int) -> None:
            prompt = numbers(90 + 61 * (number % 9), seed=number)
            try:
                assert await o.tokens(prompt, 60) == continuation(prompt, 60)
                outcomes.append("right")
            except ExecutorError:
                outcomes.append("failed")

        async with trio.open_nursery() as nursery:
            for number in range(24):
                nursery.start_soon(one, number)
        assert o.engine.statistics().rebuilds >= 2
        assert outcomes.count("right") >= 8
        assert o.windows.given_back > 0


async def test_what_an_executor_that_hangs_may_write_to_stays_its_own(
    tokenizer: Tokenizer, autojump_clock: MockClock, windowed: StateLayout
) -> None:
    """Its memory no longer counts, so that the others still do not wait."""
    faults = Faults(raise_in_wait=frozenset((2,)), hang_in_close=True)
    lane = {"seconds_per_step": 0.3, "max_tokens": 132, "least_tokens": 250, "faults": faults}
    needed = least(4, 1024, (64, 2), (132, 2))
    async with opened(
        tokenizer,
        slots=4,
        max_tokens=64,
        layout=windowed,
        window_pages=needed,
        prefill=[lane],
        abandoned=8,
    ) as o:
        prompt = numbers(500)
        with pytest.raises(ExecutorError):
            await o.tokens(prompt, 5)
        await o.idle()
        lost = o.windows.held
        assert lost == 7

        async def one(number: int) -> None:
            prompt = numbers(240 - number, seed=number)  # stays with the other lane
            assert await o.tokens(prompt, 300) == continuation(prompt, 300)

        async with trio.open_nursery() as nursery:
            for number in range(1, 13):
                nursery.start_soon(one, number)
        assert o.windows.given_back > 0
        assert o.windows.peak_held > needed
        assert o.windows.backed <= needed + lost
        await o.idle()
        assert o.windows.held == lost
