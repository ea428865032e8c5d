"""Step k + 1 is submitted before the result of step k is known; what that computes for nothing is
discarded."""

from __future__ import annotations

import trio
from trio.testing import MockClock

from pi2rt.engine import SamplingParams
from pi2rt.executors.simulated.executor import scripted
from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import EOS, numbers, opened


async def test_two_steps_are_in_flight(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, seconds_per_step=1) as o:
        async with o.engine.stream(numbers(3)) as chunks:
            await anext(chunks)
            assert len(o.log.steps) == 3  # one has returned
            assert o.engine.statistics().steps_in_flight == 2


async def test_nothing_runs_ahead_of_max_tokens(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, seconds_per_step=1) as o:
        assert len(await o.tokens(numbers(3), 5)) == 5
        assert len(o.log.steps) == 5
        assert o.engine.statistics().discarded_slices == 0


async def test_a_step_ahead_of_the_end_is_stopped_and_discarded(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, seconds_per_step=1, next_token=scripted([5, 6, EOS])) as o:
        async with o.engine.stream(numbers(3)) as chunks:
            tokens = [chunk.token async for chunk in chunks]
        assert tokens == [5, 6, EOS]
        await o.idle()
        assert len(o.log.steps) == 4
        assert o.log.stops == [4]
        assert trio.current_time() < 3.5  # the fourth step did not run to its end
        assert o.engine.statistics().discarded_slices == 1


async def test_the_executor_knows_what_ends_a_text(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    """The model's end token, unless the request ignores it; the request's own; and how many tokens there may be."""
    async with opened(tokenizer) as o:
        await o.tokens(numbers(3), 5, ignore_eos=False, stop_token_ids=[9])
        await o.tokens(numbers(4), 2, stop_token_ids=[9])
        (first,), (second,) = (step.binds for step in o.log.steps if step.binds)
        assert EOS in first.ends
        assert {9} < first.ends
        assert second.ends == {9}
        assert (first.limit, second.limit) == (8, 6)


async def test_slot_and_pages_are_kept_until_the_step_ahead_returns(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    """Two sequences: the one that ends is in the step ahead, which runs on for the other."""
    ends = {3: 4, 5: 1000}  # by length of the prompt

    def next_token(context: object, generated: int, sampling: object) -> int:
        return EOS if generated >= ends[len(context) - generated] else 7  # type: ignore[arg-type]

    async with opened(tokenizer, slots=2, seconds_per_step=1, next_token=next_token) as o:
        async with o.engine.stream(numbers(5)) as other:
            await anext(other)
            async with o.engine.stream(numbers(3)) as chunks:
                assert [chunk.token async for chunk in chunks] == [7, 7, 7, 7, EOS]
            statistics = o.engine.statistics()
            assert (statistics.leaving, statistics.free_slots) == (1, 0)
            assert statistics.pages.held == 2
            await trio.sleep(1.5)
            statistics = o.engine.statistics()
            assert (statistics.leaving, statistics.free_slots) == (0, 1)
            assert statistics.pages.held == 1
            assert o.log.stops == []


async def test_time_to_first_token_and_rates(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, slots=1, seconds_per_token=0.01) as o:
        async with o.engine.stream(numbers(100), SamplingParams(max_tokens=11, ignore_eos=True)) as first:
            async with o.engine.stream(
                numbers(50, seed=1), SamplingParams(max_tokens=2, ignore_eos=True)
            ) as second:
                timing = [chunk.timing async for chunk in first][-1]
                assert timing is not None
                assert (timing.prompt_tokens, timing.cached_tokens, timing.generated_tokens) == (100, 0, 11)
                assert abs(timing.ttft_s - 1.0) < 1e-6
                assert timing.queue_s < 1e-6
                assert abs(timing.prefill_tokens_per_s - 100) < 1e-3
                assert abs(timing.decode_tokens_per_s - 100) < 1e-3
                timing = [chunk.timing async for chunk in second][-1]
                assert timing is not None
                assert abs(timing.queue_s - 1.1) < 1e-6
                assert abs(timing.prefill_s - 0.5) < 1e-6
                assert timing.ttft_s == timing.queue_s + timing.prefill_s
