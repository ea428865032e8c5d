"""Requests of every kind at any moment: who is admitted and stays gets the right text, and nobody waits for ever."""

from __future__ import annotations

import random
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from pi2rt._errors import BusyError, ExecutorError, RequestError
from pi2rt.engine import SamplingParams
from pi2rt.engine.lane import rows_in_flight
from pi2rt.executors.simulated.executor import Faults
from pi2rt.memory import StateLayout, least_window_pages
from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import continuation, numbers, opened
from tests.support.tiny_models import VOCAB_SIZE


@pytest.mark.parametrize("lanes", [0, 1, 2])
@pytest.mark.parametrize("seed", range(12))
async def test_requests_of_every_kind(
    tokenizer: Tokenizer, autojump_clock: MockClock, seed: int, lanes: int
) -> None:
    await every_kind(tokenizer, seed, lanes)


@pytest.mark.parametrize("lanes", [0, 1, 2])
@pytest.mark.parametrize("seed", range(12))
async def test_requests_of_every_kind_of_a_model_with_windows(
    tokenizer: Tokenizer, autojump_clock: MockClock, windowed: StateLayout, seed: int, lanes: int
) -> None:
    """With the least memory for windowed bytes that there may be, and that nobody waits for."""
    await every_kind(tokenizer, seed, lanes, windowed)


async def every_kind(tokenizer: Tokenizer, seed: int, lanes: int, layout: StateLayout | None = None) -> None:
    """``lanes``: that compute prompts, and fail often."""
    print(f"seed {seed}")  # shown when it fails
    rng = random.Random(seed)
    shared = [numbers(400, seed=1000), numbers(130, seed=1001)]
    slots, max_queue = rng.choice([1, 2, 5, 8]), rng.choice([0, 3, 40])
    faults = Faults(
        raise_in_wait=frozenset(rng.sample(range(1, 400), 2)),
        no_numbers=frozenset((rng.randint(1, 400), rng.randrange(slots)) for _ in range(3)),
    )
    lane: dict[str, Any] = {
        "seconds_per_step": 0.03,
        "max_tokens": rng.choice([16, 100, 300]),
        "least_tokens": rng.choice([1, 50]),
        "faults": Faults(raise_in_wait=frozenset(rng.sample(range(1, 400), 40))),
    }
    outcomes: list[str] = []
    pages, max_tokens = rng.choice([10, 13, 10 * slots]), rng.choice([64, 192])
    mixed, buffer, in_flight = rng.choice([16, 64]), rng.choice([4, 1024]), rng.choice([1, 2, 8])
    window_pages = None
    if layout is not None and layout.window is not None:
        rows = rows_in_flight(max_tokens, in_flight, slots) + lanes * rows_in_flight(
            lane["max_tokens"], 2, slots
        )
        window_pages = least_window_pages(layout.window, slots, rows, 640)
    async with opened(
        tokenizer,
        prefill=[lane] * lanes,
        slots=slots,
        context=640,
        pages=pages,
        max_tokens=max_tokens,
        mixed_chunk=mixed,
        stream_buffer=buffer,
        max_queue=max_queue,
        max_in_flight=in_flight,
        layout=layout,
        window_pages=window_pages,
        seconds_per_step=0.002,
        seconds_per_token=0.0001,
        faults=faults,
    ) as o:

        async def one(number: int) -> None:
            beginning = rng.choice([[], [], shared[0], shared[1], shared[0][:200]])
            prompt = [*beginning, *numbers(rng.choice([1, 5, 70, 150]), seed=number)]
            count, kind = rng.randint(1, 60), rng.choice(["text", "text", "slow", "read", "bad", "leaves"])
            await trio.sleep(rng.random())
            try:
                if kind == "read":
                    assert (await o.engine.score(prompt)).shape == (len(prompt) - 1,)
                elif kind == "bad":
                    bias = dict.fromkeys(range(VOCAB_SIZE), float("-inf"))
                    with pytest.raises((RequestError, ExecutorError, BusyError)):
                        await o.tokens(prompt, count, logit_bias=bias)
                else:
                    params = SamplingParams(max_tokens=count, ignore_eos=True)
                    got: list[int] = []
                    with trio.move_on_after(rng.random() / 2 if kind == "leaves" else 1000):
                        async with o.engine.stream(prompt, params) as stream:
                            async for chunk in stream:
                                got.append(chunk.token)
                                if kind == "slow":
                                    await trio.sleep(0.05)
                    assert got == continuation(prompt, len(got))
                    assert kind == "leaves" or len(got) == count
                outcomes.append("right")
            except BusyError:
                outcomes.append("busy")
            except ExecutorError:
                outcomes.append("failed")

        with trio.fail_after(300):
            async with trio.open_nursery() as nursery:
                for number in range(40):
                    nursery.start_soon(one, number)
            await o.idle()
        statistics = o.engine.statistics()
        assert (statistics.waiting, statistics.queue.waiting, statistics.prefilling, statistics.decoding) == (
            0,
            0,
            0,
            0,
        )
        assert statistics.requests == statistics.finished + statistics.cancelled + statistics.failed
        assert statistics.queue.peak <= max_queue + slots
        assert outcomes.count("right") >= (10 if max_queue == 40 and not lanes else 1)
        assert outcomes.count("failed") <= (2 + 40 * lanes) * slots + 3
