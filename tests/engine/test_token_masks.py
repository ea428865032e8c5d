"""Masks of tokens: texts keep to them, steps run ahead all the same, and a slow or wrong one harms its request alone.

Functions run in simulated time (``simulated_threads``), but where a test says otherwise.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from pi2rt._errors import ClosedError, RequestError
from pi2rt.engine import masker
from pi2rt.executors.simulated.executor import SimulatedExecutor, hashed_token, scripted
from pi2rt.runtime.executor import StepExecutor
from pi2rt.runtime.step import Sampling
from pi2rt.runtime.token_mask import TokenMask, masking
from pi2rt.runtime.trace import Trace
from pi2rt.tokenizer import Tokenizer
from tests.engine.opened import EOS, Log, continuation, numbers, opened
from tests.support.tiny_models import VOCAB_SIZE
from tests.support.trace_events import assert_no_overlap, events_of, spans


def allowed_after(generated: Sequence[int], salt: int = 0) -> npt.NDArray[np.bool_]:
    """A fifth of the tokens, which depends on all that were generated."""
    key = sum((i + 1) * token for i, token in enumerate(generated)) + salt
    allowed: npt.NDArray[np.bool_] = np.arange(VOCAB_SIZE) * 7 // 3 % 5 == key % 5
    return allowed


def limited(prompt: Sequence[int], count: int, salt: int = 0) -> list[int]:
    """What a simulated executor generates under that mask: its own token, else the first that is allowed."""
    known = list(prompt)
    for generated in range(count):
        token = hashed_token(np.array(known, np.int32), generated, Sampling()) % VOCAB_SIZE
        allowed = allowed_after(known[len(prompt) :], salt)
        known.append(token if allowed[token] else int(allowed.argmax()))
    return known[len(prompt) :]


@dataclass
class Grammar:
    """``seconds``: of each call, a number or a function of how many tokens there are."""

    seconds: float | Callable[[int], float] = 0.0
    salt: int = 0
    calls: list[tuple[int, ...]] = field(default_factory=list)
    running: int = 0

    def __call__(self, generated: Sequence[int]) -> TokenMask | None:
        assert isinstance(generated, Sequence)
        self.calls.append(tuple(generated))
        return masking(allowed_after(generated, self.salt))

    def takes(self, count: int) -> float:
        return self.seconds if isinstance(self.seconds, int | float) else self.seconds(count)


@pytest.fixture
def simulated_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each call takes ``Grammar.takes`` on Trio's clock, behind which it is made; never two of one request at once."""

    async def in_simulated_time(call: Any, function: Any, generated: Any, *rest: Any, **options: Any) -> Any:
        async with options["limiter"]:
            if isinstance(function, Grammar):
                function.running += 1
                assert function.running == 1
                try:
                    await trio.sleep(function.takes(len(generated)))
                finally:
                    function.running -= 1
            else:
                await trio.lowlevel.checkpoint()
            return call(function, generated, *rest)

    monkeypatch.setattr(masker, "in_thread", in_simulated_time)


pytestmark = pytest.mark.usefixtures("simulated_threads")


@pytest.mark.parametrize("max_in_flight", [1, 2, 8])
async def test_a_text_keeps_to_its_masks(
    tokenizer: Tokenizer, autojump_clock: MockClock, max_in_flight: int
) -> None:
    """The function sees each beginning of the text once, in order."""
    grammar, prompt = Grammar(seconds=0.001), numbers(30)
    async with opened(tokenizer, max_in_flight=max_in_flight, seconds_per_step=0.004) as o:
        text = await o.tokens(prompt, 50, token_mask=grammar)
    assert text == limited(prompt, 50) != continuation(prompt, 50)
    assert grammar.calls == [tuple(text[:count]) for count in range(50)]


async def test_masks_are_made_while_the_model_computes(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    """Each takes as long as a step: no step waits for one."""
    async with opened(tokenizer, seconds_per_step=1) as o:
        assert await o.tokens(numbers(3), 10, token_mask=Grammar(seconds=0.99)) == limited(numbers(3), 10)
        assert trio.current_time() < 10.1


async def test_a_step_waits_for_what_is_left(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, seconds_per_step=1) as o:
        assert await o.tokens(numbers(3), 10, token_mask=Grammar(seconds=1.5)) == limited(numbers(3), 10)
        assert trio.current_time() == pytest.approx(15, abs=0.1)


async def test_steps_run_ahead_as_far_as_they_may(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, max_in_flight=8, seconds_per_step=0.001) as o:
        most = 0
        async with o.engine.stream(numbers(3), token_mask=Grammar(seconds=0.0005)) as chunks:
            text = []
            async for chunk in chunks:
                text.append(chunk.token)
                most = max(most, o.engine.statistics().steps_in_flight)
                if len(text) == 60:
                    break
        assert text == limited(numbers(3), 60)
        assert most >= 7


async def test_calls_are_in_the_trace(
    tokenizer: Tokenizer, autojump_clock: MockClock, tmp_path: Path
) -> None:
    trace = Trace()
    async with opened(tokenizer, seconds_per_step=0.01, trace=trace) as o:
        async with trio.open_nursery() as nursery:
            for i in range(2):
                nursery.start_soon(lambda i=i: o.tokens(numbers(5, seed=i), 6, token_mask=Grammar()))
    calls = spans(events_of(trace, tmp_path), "token mask")
    assert sorted(span["args"]["generated_tokens"] for span in calls) == [
        count for count in range(6) for _ in "ab"
    ]
    assert {span["track"] for span in calls} == {"request 1", "request 2"}
    for request in 1, 2:
        assert_no_overlap([span for span in calls if span["track"] == f"request {request}"])


async def test_masked_and_unmasked_texts_side_by_side(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    """All are what they are alone, whatever takes how long."""
    async with opened(tokenizer, slots=5, max_in_flight=8, seconds_per_step=0.002) as o:

        async def one(i: int) -> None:
            prompt = numbers(20 + 30 * i, seed=i)
            if i % 2:
                grammar = Grammar(seconds=lambda count: 0.001 * ((count * 7 + i) % 5) ** 2, salt=i)
                assert await o.tokens(prompt, 40, token_mask=grammar) == limited(prompt, 40, i)
            else:
                assert await o.tokens(prompt, 60) == continuation(prompt, 60)

        async with trio.open_nursery() as nursery:
            for i in range(10):
                nursery.start_soon(one, i)


async def test_a_mask_past_the_deadline_ends_its_request_alone(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, mask_deadline=3, seconds_per_step=1) as o:

        async def neighbour() -> None:
            assert await o.tokens(numbers(9, seed=1), 20) == continuation(numbers(9, seed=1), 20)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(neighbour)
            grammar = Grammar(seconds=lambda count: 0.0 if count < 2 else 100.0)
            with pytest.raises(
                RequestError, match=r"^token_mask gave no mask for position 5 within the mask_deadline of 3 s"
            ):
                await o.tokens(numbers(3), 10, token_mask=grammar)
            assert 5 < trio.current_time() < 7.1
        statistics = o.engine.statistics()
        assert (statistics.failed, statistics.finished, statistics.rebuilds) == (1, 1, 0)


async def test_a_slow_function_delays_its_neighbours_once(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    async with opened(tokenizer, mask_deadline=60, seconds_per_step=0.1) as o:
        times: list[float] = []

        async def neighbour() -> None:
            async with o.engine.stream(numbers(9, seed=1)) as chunks:
                async for _ in chunks:
                    times.append(trio.current_time())
                    if len(times) == 300:
                        return

        async with trio.open_nursery() as nursery:
            nursery.start_soon(neighbour)
            await trio.sleep(1)
            grammar = Grammar(seconds=5.0)
            assert await o.tokens(numbers(3), 6, token_mask=grammar) == limited(numbers(3), 6)
        gaps = np.diff(times)
        assert np.count_nonzero(gaps > 0.25) == 1
        assert gaps.max() < 5.2


@pytest.mark.parametrize("again", [False, True])
async def test_preempted_sequences_go_on(
    tokenizer: Tokenizer, autojump_clock: MockClock, again: bool
) -> None:
    """Pages run out, and those that are computed again ask for no mask twice."""
    grammars = [Grammar(seconds=0.004 if again else 0.05, salt=i) for i in range(4)]
    async with opened(tokenizer, slots=4, context=512, pages=10, seconds_per_step=0.01) as o:

        async def one(i: int) -> None:
            prompt = numbers(100, seed=i)
            assert await o.tokens(prompt, 200, token_mask=grammars[i]) == limited(prompt, 200, i)

        async with trio.open_nursery() as nursery:
            for i in range(4):
                nursery.start_soon(one, i)
                await trio.testing.wait_all_tasks_blocked()
        assert o.engine.statistics().preemptions > 0
    assert all(list(map(len, grammar.calls)) == list(range(200)) for grammar in grammars)


@pytest.mark.parametrize("seconds", [0.0, 0.7, 4.0])
async def test_an_executor_that_is_lost_in_the_middle(
    tokenizer: Tokenizer, autojump_clock: MockClock, seconds: float
) -> None:
    """Opened again while steps wait for masks, and run ahead of them."""
    grammar, prompt = Grammar(seconds=seconds), numbers(70)
    async with opened(tokenizer, max_in_flight=4, seconds_per_step=1) as o:
        texts: list[list[int]] = []

        async def one() -> None:
            texts.append(await o.tokens(prompt, 12, token_mask=grammar))

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one)
            for _ in range(3):
                await trio.sleep(3.3)
                await o.actor.reopen(lambda: None)
        assert texts == [limited(prompt, 12)]
        assert o.engine.statistics().rebuilds == 3
    assert [len(call) for call in grammar.calls] == list(range(12))


async def test_leaving_while_the_function_runs(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    """Its step does not wait on, for a neighbour is in it."""
    async with opened(tokenizer, mask_deadline=1000, seconds_per_step=1) as o:
        done: list[float] = []

        async def neighbour() -> None:
            assert await o.tokens(numbers(9, seed=1), 30) == continuation(numbers(9, seed=1), 30)
            done.append(trio.current_time())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(neighbour)
            with trio.move_on_after(10) as scope:
                await o.tokens(numbers(3), 20, token_mask=Grammar(seconds=lambda n: 500.0 * (n == 3)))
            assert scope.cancelled_caught
        assert done[0] < 40
        assert o.engine.statistics().cancelled == 1


async def test_closing_while_the_function_runs(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, mask_deadline=1000, seconds_per_step=1) as o:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def request() -> None:
                with pytest.raises(ClosedError, match="was closed while this request ran"):
                    await o.tokens(numbers(3), 20, token_mask=Grammar(seconds=500))

            await trio.sleep(10)
            o.engine.close()
        assert trio.current_time() < 12


async def test_a_stop_string_ends_what_runs_ahead(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    """The executor knows nothing of it, and steps ahead wait for masks that nobody makes."""
    async with opened(
        tokenizer, max_in_flight=8, seconds_per_step=0.001, next_token=scripted([5, 6, 7, 8, 9])
    ) as o:
        spelled = tokenizer.token_bytes(7).decode()
        chunks = await o.chunks(numbers(3), max_tokens=30, stop=[spelled], token_mask=lambda generated: None)
        assert chunks[-1].finish_detail == "stop_string"
        await o.idle()
        assert trio.current_time() < 1


async def test_an_end_token_ends_a_masked_text(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    """What runs ahead of it is skipped, and waits for no mask."""
    ends = np.zeros(VOCAB_SIZE, np.bool_)
    ends[EOS] = True
    async with opened(tokenizer, max_in_flight=8, seconds_per_step=0.001) as o:
        text = await o.tokens(
            numbers(3), 30, ignore_eos=False, token_mask=lambda g: masking(ends) if len(g) == 4 else None
        )
        assert (text[:4], text[4:]) == (continuation(numbers(3), 4), [EOS])
        await o.idle()
        assert trio.current_time() < 1


class Wrong(BaseException):
    pass


RAISED: list[type[BaseException]] = [ValueError, StopIteration, SystemExit, KeyboardInterrupt, Wrong]


@pytest.mark.parametrize("error", RAISED)
async def test_what_a_function_raises_ends_its_request_alone(
    tokenizer: Tokenizer, autojump_clock: MockClock, error: type[BaseException]
) -> None:
    def raises(generated: Sequence[int]) -> None:
        if len(generated) == 3:
            raise error("of mine")

    async with opened(tokenizer, seconds_per_step=0.01) as o:
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def neighbour() -> None:
                assert await o.tokens(numbers(9, seed=1), 20) == continuation(numbers(9, seed=1), 20)

            what = rf"^token_mask raised {error.__name__} after 3 tokens: of mine$"
            with pytest.raises(RequestError, match=what) as info:
                await o.tokens(numbers(3), 10, token_mask=raises)
            assert isinstance(info.value.__cause__, error)
        assert o.engine.statistics().failed == 1


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (np.zeros(10, np.int64), r"an array int64 \(10,\) in place of uint32 \(10,\)"),
        (np.zeros(9, np.uint32), r"an array uint32 \(9,\) in place of uint32 \(10,\)"),
        (np.zeros((1, 10), np.uint32), r"an array uint32 \(1, 10\) in place of uint32 \(10,\)"),
        ([1, 2, 3], r"list in place of an array uint32 \(10,\) or None"),
        (True, r"bool in place of an array uint32 \(10,\) or None"),
    ],
)
async def test_what_is_no_mask_ends_its_request(
    tokenizer: Tokenizer, autojump_clock: MockClock, wrong: Any, said: str
) -> None:
    async with opened(tokenizer) as o:
        with pytest.raises(RequestError, match=rf"^token_mask gave, after 0 tokens, {said}$"):
            await o.tokens(numbers(3), 10, token_mask=lambda generated: wrong)


async def test_a_mask_that_allows_nothing(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer) as o:
        with pytest.raises(
            RequestError, match=r"^token_mask: no token can be picked at position 3, because none"
        ):
            await o.tokens(numbers(3), 10, token_mask=lambda generated: np.zeros(10, np.uint32))
        bias = dict.fromkeys(range(5), -np.inf)
        few = masking(np.arange(VOCAB_SIZE) < 5)
        with pytest.raises(
            RequestError, match=r"^token_mask and logit_bias=\{0: -inf.*no token can be picked at"
        ):
            await o.tokens(numbers(3), 10, logit_bias=bias, token_mask=lambda generated: few)


class WithoutMasks(SimulatedExecutor):
    takes_masks = False


async def test_an_executor_without_masks_refuses_before_the_queue(
    tokenizer: Tokenizer, autojump_clock: MockClock
) -> None:
    def make(log: Log) -> StepExecutor:
        return WithoutMasks()

    async with opened(tokenizer, make_executor=make) as o:
        with pytest.raises(
            RequestError, match=r"^token_mask: the executor of actor 'simulated' takes no masks"
        ):
            o.engine.stream(numbers(3), token_mask=lambda generated: None)
        assert o.engine.statistics().requests == 0


async def test_what_cannot_be_called_is_refused(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer) as o:
        with pytest.raises(RequestError, match=r"^token_mask=7: a function of the tokens"):
            o.engine.stream(numbers(3), token_mask=7)  # type: ignore[arg-type]


async def test_prefill_lanes_know_nothing_of_masks(tokenizer: Tokenizer, autojump_clock: MockClock) -> None:
    async with opened(tokenizer, prefill=[{"max_tokens": 64}], seconds_per_step=0.01) as o:
        prompt = numbers(200)
        assert await o.tokens(prompt, 20, token_mask=Grammar(seconds=0.02)) == limited(prompt, 20)
        assert not any(piece.masked for step in o.prefill[0].steps for piece in step.slices)
        assert o.engine.statistics().lanes[1].handed_over == 1


@given(data=st.data())
@settings(max_examples=25, deadline=None)
def test_requests_of_every_kind(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Masks of any duration, cancelled, failing and late ones, executors that are lost, pages that run out."""
    draw = data.draw
    kinds = draw(
        st.lists(st.sampled_from(["plain", "masked", "leaves", "raises", "late"]), min_size=2, max_size=9)
    )
    durations = [draw(st.sampled_from([0.0, 0.001, 0.01, 0.3])) for _ in kinds]
    lost_at = draw(st.lists(st.floats(0.01, 0.5), max_size=2))
    shape = {
        "slots": draw(st.sampled_from([1, 2, 4])),
        "pages": draw(st.sampled_from([6, 9, 24])),
        "max_in_flight": draw(st.sampled_from([1, 2, 8])),
    }

    async def main() -> None:
        async with opened(tokenizer, context=384, seconds_per_step=0.005, mask_deadline=2.0, **shape) as o:

            async def one(i: int) -> None:
                prompt, kind = numbers(40 + 20 * i, seed=i), kinds[i]
                await trio.sleep(0.01 * i)
                if kind == "plain":
                    assert await o.tokens(prompt, 60) == continuation(prompt, 60)
                elif kind == "masked":
                    grammar = Grammar(durations[i], i)
                    assert await o.tokens(prompt, 30, token_mask=grammar) == limited(prompt, 30, i)
                    assert list(map(len, grammar.calls)) == list(range(30))
                elif kind == "leaves":
                    with trio.move_on_after(0.1 + durations[i]):
                        await o.tokens(prompt, 50, token_mask=Grammar(durations[i], i))
                elif kind == "raises":
                    wrong: Any = lambda g: None if len(g) < 5 else 1  # noqa: E731
                    with pytest.raises(RequestError, match="token_mask"):
                        await o.tokens(prompt, 9, token_mask=wrong)
                else:
                    with pytest.raises(RequestError, match="mask_deadline"):
                        await o.tokens(prompt, 9, token_mask=Grammar(lambda n: 1e4 if n == 4 else 0.0))

            with trio.fail_after(1e6):
                async with trio.open_nursery() as nursery:
                    for i in range(len(kinds)):
                        nursery.start_soon(one, i)
                    for seconds in lost_at:
                        await trio.sleep(seconds)
                        await o.actor.reopen(lambda: None)

    trio.run(main, clock=MockClock(autojump_threshold=0))


async def test_a_function_runs_in_a_worker_thread_and_never_twice(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In real time: also where a call was given up that has not returned."""
    monkeypatch.setattr(masker, "in_thread", trio.to_thread.run_sync)
    loop = threading.current_thread()
    entered, leave = threading.Event(), threading.Event()
    seen: list[object] = []

    def function(generated: Sequence[int]) -> TokenMask | None:
        assert threading.current_thread() is not loop
        seen.append(generated)
        if len(generated) == 5:
            entered.set()
            assert leave.wait(60)
        return masking(allowed_after(generated))

    async with opened(tokenizer) as o:
        with trio.CancelScope() as scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(lambda: o.tokens(numbers(3), 20, token_mask=function))
                await trio.to_thread.run_sync(entered.wait)
                scope.cancel()
        assert (await o.tokens(numbers(3, seed=1), 5)) == continuation(numbers(3, seed=1), 5)
        leave.set()
    text = limited(numbers(3), 5)
    assert [tuple(each) for each in seen] == [tuple(text[:count]) for count in range(6)]  # type: ignore[arg-type]
    last = seen[-1]
    assert isinstance(last, Sequence)
    assert (last[0], last[-1], last[1:3], len(last)) == (text[0], text[4], tuple(text[1:3]), 5)
    assert last == text
    assert hash(last) == hash(tuple(text))
    with pytest.raises(TypeError):
        last[0] = 1  # type: ignore[index]
    with pytest.raises(IndexError):
        last[5]
