"""Two lanes: one computes prompts beside the one that decodes, into the same pages."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from pi2rt._errors import ExecutorError
from pi2rt.engine import SamplingParams
from pi2rt.executors.simulated.executor import Faults
from pi2rt.runtime.trace import Trace
from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import Opened, continuation, numbers, opened
from tests.support.trace_events import assert_no_overlap, events_of, spans

DECODE_S, CHUNK_S = 0.01, 0.3
SLOW = {"seconds_per_step": CHUNK_S, "max_tokens": 128, "least_tokens": 32}


async def test_a_prompt_is_handed_over(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, prefill=[SLOW]) as o:
        prompt = numbers(300)
        assert await o.tokens(prompt, 20) == continuation(prompt, 20)
        assert o.prefill[0].prefill_tokens() == [128, 128, 43]
        assert o.log.prefill_tokens()[0] == 1
        assert sum(o.log.prefill_tokens()) == 1
        decode, prefill = o.engine.statistics().lanes
        assert (decode.role, decode.prefill_tokens, decode.handed_over) == ("decode", 1, 0)
        assert (prefill.role, prefill.prefill_tokens, prefill.handed_over) == ("prefill", 299, 1)


async def test_a_short_prompt_and_one_that_is_known_stay(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, prefill=[SLOW]) as o:
        short, long = numbers(32), numbers(200, seed=1)
        assert await o.tokens(short, 5) == continuation(short, 5)
        assert not o.prefill[0].steps
        for _ in range(2):
            assert await o.tokens(long, 5) == continuation(long, 5)
        assert o.prefill[0].prefill_tokens() == [128, 71]
        assert sum(o.log.prefill_tokens()) == 32 + 1 + 200 % 64  # of the second time, what is no whole page


async def test_scores_stay(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, prefill=[SLOW]) as o:
        assert len(await o.engine.score(numbers(100))) == 99
        assert not o.prefill[0].steps


async def gaps(o: Opened, count: int) -> list[float]:
    """Between the tokens of one text, while another prompt is computed."""
    times: list[float] = []
    prompt, other = numbers(20), numbers(900, seed=1)
    async with trio.open_nursery() as nursery:

        async def long() -> None:
            assert await o.tokens(other, 3) == continuation(other, 3)

        async with o.engine.stream(prompt, SamplingParams(max_tokens=count, ignore_eos=True)) as chunks:
            async for _ in chunks:
                times.append(trio.current_time())
                if len(times) == 10:
                    nursery.start_soon(long)
    return [b - a for a, b in pairwise(times)]


async def test_a_slow_chunk_does_not_hold_up_decoding(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    """With one lane, each chunk of the same device is a gap of 0.3 s."""
    async with opened(tokenizer, seconds_per_step=DECODE_S, prefill=[SLOW | {"max_tokens": 512}]) as o:
        assert max(await gaps(o, 300)) <= 2 * DECODE_S
        assert len(o.prefill[0].steps) == 2
    slow = {"seconds_per_step": DECODE_S, "seconds_per_token": CHUNK_S / 512}
    async with opened(tokenizer, mixed_chunk=512, **slow) as o:
        assert max(await gaps(o, 50)) >= CHUNK_S


async def test_two_prompts_share_a_lane(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    """One rule of fairness: a short prompt behind a long one is done after its share of the steps."""
    async with opened(tokenizer, prefill=[SLOW]) as o, trio.open_nursery() as nursery:
        done: list[tuple[str, float]] = []

        async def ask(name: str, prompt: list[int]) -> None:
            assert await o.tokens(prompt, 2) == continuation(prompt, 2)
            done.append((name, trio.current_time()))

        nursery.start_soon(ask, "long", numbers(1000))
        await trio.sleep(CHUNK_S / 2)
        nursery.start_soon(ask, "short", numbers(65, seed=1))
        await trio.sleep(3.5 * CHUNK_S)
        assert [name for name, _ in done] == ["short"]


async def test_prompts_of_one_beginning_are_computed_once(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, prefill=[SLOW]) as o, trio.open_nursery() as nursery:
        common = numbers(256)

        async def ask(seed: int) -> None:
            prompt = common + numbers(40, seed=seed)
            assert await o.tokens(prompt, 4) == continuation(prompt, 4)

        for seed in range(1, 4):
            nursery.start_soon(ask, seed)
    assert sum(o.prefill[0].prefill_tokens()) == 295 + 2 * 39


@pytest.mark.parametrize("where", ["raise_in_wait", "raise_in_submit"])
async def test_a_lost_lane_loses_the_step_that_failed(
    tokenizer: Tokenizer, autojump_clock: MockClock, where: str
) -> None:
    """The other prompts go on, from what is computed; who decodes notices nothing."""
    faults: dict[str, Any] = {where: frozenset([5])}
    async with (
        opened(
            tokenizer,
            slots=6,
            seconds_per_step=DECODE_S,
            prefill=[SLOW | {"faults": Faults(**faults), "max_tokens": 16}],
        ) as o,
        trio.open_nursery() as nursery,
    ):
        outcomes: dict[int, str] = {}

        async def ask(seed: int, count: int) -> None:
            prompt = numbers(count, seed=seed)
            try:
                assert await o.tokens(prompt, 10) == continuation(prompt, 10)
            except ExecutorError as error:
                assert error.actor == "prefill 1"  # noqa: PT017 - which of the three it is, is checked below
                outcomes[seed] = "failed"
            else:
                outcomes[seed] = "whole"

        for seed in range(3):
            nursery.start_soon(ask, seed, 100)
        nursery.start_soon(ask, 3, 20)
    assert sorted(outcomes.values()) == ["failed", "whole", "whole", "whole"]
    assert outcomes[3] == "whole"
    decode, prefill = o.engine.statistics().lanes
    assert (decode.lost, prefill.lost) == (0, 1)


async def test_without_its_lane_a_prompt_goes_where_it_can(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    """A lane whose executor fails on every step: after six failures it gets no more prompts for a while."""
    async with opened(
        tokenizer, prefill=[SLOW | {"faults": Faults(raise_in_wait=frozenset(range(1000)))}]
    ) as o:
        outcomes = []
        for seed in range(24):
            prompt = numbers(300, seed=seed)
            try:
                assert await o.tokens(prompt, 3) == continuation(prompt, 3)
            except ExecutorError as error:
                outcomes.append(error.actor)
            else:
                outcomes.append("whole")
        assert outcomes.count("prefill 1") == 6
        assert outcomes[-10:] == ["whole"] * 10


async def test_pages_of_an_executor_that_does_not_stop_are_not_used_again(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    """It may write to them for ever. Others go on."""
    faults = Faults(raise_in_wait=frozenset([3]), hang_in_close=True)
    async with opened(tokenizer, prefill=[SLOW | {"faults": faults, "max_tokens": 64}], abandoned=5) as o:
        with pytest.raises(ExecutorError, match=r"^actor 'prefill 1'"):
            await o.tokens(numbers(300), 3)
        for seed in range(1, 30):
            prompt = numbers(300, seed=seed)
            assert await o.tokens(prompt, 3) == continuation(prompt, 3)


async def test_a_lost_decoder_leaves_the_other_lane_alone(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    """And what other sequences have in their pages: nothing is computed again."""
    async with (
        opened(
            tokenizer,
            seconds_per_step=DECODE_S,
            faults=Faults(raise_in_wait=frozenset([40])),
            prefill=[SLOW | {"max_tokens": 64}],
        ) as o,
        trio.open_nursery() as nursery,
    ):
        long, short = numbers(700), numbers(20, seed=1)

        async def prefills() -> None:
            assert await o.tokens(long, 5) == continuation(long, 5)

        async def decodes() -> None:
            with pytest.raises(ExecutorError, match=r"^actor 'simulated'"):
                await o.tokens(short, 400)

        nursery.start_soon(prefills)
        nursery.start_soon(decodes)
    assert sum(o.prefill[0].prefill_tokens()) == 699
    assert [lane.lost for lane in o.engine.statistics().lanes] == [1, 0]


async def test_who_waits_for_its_consumer_keeps_what_is_computed(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(
        tokenizer,
        stream_buffer=4,
        faults=Faults(raise_in_wait=frozenset([60])),
        prefill=[SLOW],
    ) as o:
        slow, fast = numbers(100), numbers(10, seed=1)
        params = SamplingParams(max_tokens=100, ignore_eos=True)
        async with o.engine.stream(slow, params) as chunks:
            got = [(await anext(chunks)).token for _ in range(2)]
            with pytest.raises(ExecutorError):
                await o.tokens(fast, 200)
            got += [chunk.token async for chunk in chunks]
        assert got == continuation(slow, 100)
        assert sum(o.prefill[0].prefill_tokens()) == 99


async def test_cancelled_in_the_prefill_lane(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, prefill=[SLOW]) as o:
        with trio.move_on_after(CHUNK_S * 1.5):
            await o.tokens(numbers(900), 3)
        assert o.engine.statistics().cancelled == 1
        prompt = numbers(900)
        assert await o.tokens(prompt, 3) == continuation(prompt, 3)


async def test_a_prompt_that_is_preempted_in_its_lane(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    """Pages for one context: the younger is computed again."""
    async with (
        opened(tokenizer, context=640, pages=10, slots=3, prefill=[SLOW]) as o,
        trio.open_nursery() as nursery,
    ):

        async def ask(seed: int, count: int, tokens: int) -> None:
            prompt = numbers(count, seed=seed)
            assert await o.tokens(prompt, tokens) == continuation(prompt, tokens)

        for seed, (count, tokens) in enumerate([(60, 400), (200, 200), (150, 300)]):
            nursery.start_soon(ask, seed, count, tokens)
    assert o.engine.statistics().preemptions


async def test_lanes_have_names_in_the_trace(
    tokenizer: Tokenizer, autojump_clock: MockClock, tmp_path: Path
) -> None:
    trace = Trace()
    async with opened(tokenizer, trace=trace, prefill=[SLOW]) as o:
        await o.tokens(numbers(300), 5)
    events = events_of(trace, tmp_path)
    tracks = [event for event in spans(events) if "slot" not in event["track"]]  # requests have spans within
    assert_no_overlap(tracks)
    assert {"steps", "steps of prefill 1", "prefill 1"} <= {event["track"] for event in tracks}
