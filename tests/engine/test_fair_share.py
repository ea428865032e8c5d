"""Deficit round robin: the bound that its module states, for any arrivals."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from pi2rt.engine.fair_share import QUANTUM, FairShare
from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import continuation, numbers, opened


def test_one_prompt_gets_all_the_room() -> None:
    assert FairShare().share(192, [(1, 3900)]) == {1: 192}
    assert FairShare().share(192, [(1, 100)]) == {1: 100}
    assert FairShare().share(0, [(1, 100)]) == {}
    assert FairShare().share(10, []) == {}


def test_short_prompts_get_theirs_and_the_long_one_the_rest() -> None:
    assert FairShare().share(192, [(1, 3900), *((key, 1) for key in range(2, 7))]) == {
        1: 187,
        **dict.fromkeys(range(2, 7), 1),
    }


def test_equal_prompts_get_whole_quanta() -> None:
    fair = FairShare()
    assert fair.share(64, [(1, 500), (2, 500), (3, 500)]) == {1: 32, 2: 16, 3: 16}
    assert fair.share(64, [(1, 500), (2, 500), (3, 500)]) == {1: 16, 2: 32, 3: 16}
    assert fair.share(64, [(1, 500), (2, 500), (3, 500)]) == {1: 16, 2: 16, 3: 32}


def test_more_prompts_than_quanta_take_turns() -> None:
    fair = FairShare()
    wanted = [(key, 100) for key in range(8)]
    assert sorted(fair.share(64, wanted)) == [0, 1, 2, 3]
    assert sorted(fair.share(64, wanted)) == [4, 5, 6, 7]


def test_who_comes_later_has_no_claim_to_what_was_given_before() -> None:
    fair = FairShare()
    for _ in range(10):
        fair.share(192, [(1, 5000)])
    assert fair.share(64, [(1, 5000), (2, 5000)]) == {1: 32, 2: 32}


def test_who_could_not_take_more_has_no_claim_to_it() -> None:
    """Slices that ask for logits are short."""
    fair = FairShare()
    for _ in range(10):
        assert fair.share(192, [(1, 5000), (2, 16)]) == {1: 176, 2: 16}
    assert fair.share(192, [(1, 5000), (2, 5000)]) == {1: 96, 2: 96}


def test_lanes_share_one_account() -> None:
    """A prompt that one lane has served comes later on the other."""
    fair = FairShare()
    assert fair.share(16, [(1, 100), (2, 100), (3, 100)]) == {1: 16}
    assert fair.share(16, [(1, 100), (2, 100)]) == {2: 16}
    assert fair.share(16, [(1, 100), (2, 100), (3, 100)]) == {3: 16}


@dataclass
class Place:
    """A slot and the prompts that occupy it one after another."""

    prompts: list[int] = field(default_factory=list)
    key: int = -1
    left: int = 0


@given(
    places=st.lists(st.lists(st.integers(1, 400), min_size=1, max_size=30), min_size=0, max_size=8),
    before=st.integers(0, 6),
    tokens=st.integers(1, 600),
    room=st.integers(1, 200),
)
@settings(max_examples=300, deadline=None)
def test_the_bound(places: list[list[int]], before: int, tokens: int, room: int) -> None:
    """A prompt of ``tokens`` tokens that joins after ``before`` steps, beside places that are filled again at once."""
    fair = FairShare()
    others = [Place(list(reversed(prompts))) for prompts in places]
    keys = iter(range(10**6))
    mine = -1
    left, steps = tokens, 0
    for step in range(10**6):
        for place in others:
            if not place.left and place.prompts:
                place.key, place.left = next(keys), place.prompts.pop()
        if step == before:
            mine = next(keys)
        wanted = [(place.key, place.left) for place in others if place.left]
        wanted += [(mine, left)] if mine >= 0 else []
        shares = fair.share(room, wanted)
        assert sum(shares.values()) == min(room, sum(count for _, count in wanted))  # nothing idles
        assert all(0 < shares[key] <= dict(wanted)[key] for key in shares)
        for place in others:
            place.left -= shares.get(place.key, 0)
            if not place.left:
                fair.forget(place.key)
        if mine >= 0:
            steps += 1
            left -= shares.get(mine, 0)
            if not left:
                break
    k = len(places)
    assert steps <= math.ceil((tokens + k * (tokens + 2 * QUANTUM)) / room)


@pytest.mark.parametrize("max_in_flight", [2, 8])
async def test_short_prompts_do_not_wait_for_a_long_one(
    tokenizer: Tokenizer, autojump_clock: MockClock, max_in_flight: int
) -> None:
    took: list[float] = []
    options = {"slots": 8, "context": 4096, "max_tokens": 192, "max_in_flight": max_in_flight}
    async with opened(tokenizer, seconds_per_token=0.001, **options) as o:
        # Short steps, of which many may wait behind each other, are no measure for those that come.
        await o.tokens(numbers(3, seed=99), 20)
        before = len(o.log.steps)
        long = numbers(3900)

        async def short(seed: int) -> None:
            prompt = numbers(1, seed=seed)
            began = trio.current_time()
            assert await o.tokens(prompt, 1) == continuation(prompt, 1)
            took.append(trio.current_time() - began)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(o.tokens, long, 1)
            await trio.sleep(0.001)
            for seed in range(5):
                nursery.start_soon(short, seed)
        assert len(took) == 5
        assert max(took) <= 3 * 0.192 + 1e-6  # two steps were in flight, and the one they are in
        assert max(o.log.prefill_tokens()) == 192
        assert sum(o.log.prefill_tokens()[before:]) == 3905
        assert len(o.log.steps) - before == -(-3905 // 192)  # not one more than one after the other


async def test_prompts_that_share_say_what_they_say_alone(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    """Eight prompts of all lengths beside one that decodes, more than the slots."""
    async with opened(tokenizer, slots=5, context=1024, max_tokens=192, seconds_per_token=0.001) as o:

        async def one(number: int) -> None:
            prompt = numbers([700, 1, 65, 300, 17, 128, 500, 3][number], seed=number)
            assert await o.tokens(prompt, 9) == continuation(prompt, 9)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(o.tokens, numbers(5, seed=99), 60)
            await trio.sleep(0.05)
            for number in range(8):
                nursery.start_soon(one, number)
        assert max(len(step.slices) for step in o.log.steps) == 5


async def test_what_one_computes_the_others_wait_for(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    """Requests with one long beginning at once: it is computed once, and others go on meanwhile."""
    async with opened(tokenizer, slots=8, context=2048, max_tokens=192, seconds_per_token=0.001) as o:
        system = numbers(1000)
        done: list[str] = []

        async def one(number: int) -> None:
            prompt = [*system, number, number + 1]
            assert await o.tokens(prompt, 2) == continuation(prompt, 2)
            done.append("shares")

        async def other() -> None:
            prompt = numbers(30, seed=1)
            assert await o.tokens(prompt, 2) == continuation(prompt, 2)
            done.append("other")

        async with trio.open_nursery() as nursery:
            for number in range(5):
                nursery.start_soon(one, number)
            await trio.testing.wait_all_tasks_blocked()
            nursery.start_soon(other)
        assert sum(o.log.prefill_tokens()) == 1002 + 4 * (1002 - 960) + 30
        assert done[0] == "other"


async def test_whom_the_others_wait_for_may_leave(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, slots=3, context=2048, max_tokens=192, seconds_per_token=0.001) as o:
        prompt = numbers(1500)
        with trio.CancelScope() as first:
            async with trio.open_nursery() as nursery:

                async def leaves() -> None:
                    await o.tokens(prompt, 5)

                async def waits() -> None:
                    with trio.CancelScope(shield=True):
                        assert await o.tokens([*prompt, 1], 3) == continuation([*prompt, 1], 3)

                nursery.start_soon(leaves)
                await trio.sleep(0.5)
                nursery.start_soon(waits)
                await trio.sleep(0.2)
                assert o.engine.statistics().waiting == 1
                first.cancel()
        assert o.engine.statistics().cancelled == 1
        assert o.engine.statistics().finished == 1


async def test_small_ones_pass_one_that_waits_for_pages_but_not_for_ever(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, slots=4, context=1024, pages=17, seconds_per_step=0.01) as o:
        order: list[str] = []

        async def one(name: str, prompt: list[int], count: int) -> None:
            assert await o.tokens(prompt, count) == continuation(prompt, count)
            order.append(name)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, "holds", numbers(700), 300)
            await trio.sleep(0.05)
            nursery.start_soon(one, "large", numbers(600, seed=1), 1)
            await trio.sleep(0.05)
            for number in range(20):
                nursery.start_soon(one, "small", numbers(5, seed=number + 2), 1)
        assert order[:8] == ["small"] * 8
        assert order[8] == "holds"
        assert sorted(order[9:]) == ["large"] + ["small"] * 12
