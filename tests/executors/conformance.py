"""What every executor must do, as tests. Plug-in authors use it like this::

    class TestMine(ExecutorConformance):
        def make_executor(self) -> Executor:
            return MyExecutor()

        def open_model(self) -> tuple[ModelFile, ModelDescription]:
            return open_the_model_that_mine_can_run()

Needs pytest-trio with ``trio_mode``. Real time passes, since an executor may have threads of its own; nothing
here sleeps. A model with at least 64 tokens in its vocabulary and 256 positions of context is enough.
"""

from __future__ import annotations

import math
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
import trio

from pi2rt._errors import BusyError, ClosedError
from pi2rt.formats import ModelFile
from pi2rt.models import ModelDescription
from pi2rt.models.states import PAGE_TOKENS
from pi2rt.runtime.executor import Executor, ExecutorOptions, Progress, make_store
from pi2rt.runtime.registry import check_executor
from pi2rt.runtime.step import Bind, Int32s, Sampled, Sampling, Slice, Step, StepResult, Unusable

GREEDY = Sampling()
SEEDED = Sampling(temperature=1.0, seed=7)
FOLLOW_ON = np.empty(0, np.int32)
PATIENCE = 60.0  # seconds; only a hang takes that long


def no_progress(done: int, total: int) -> None:
    pass


class ExecutorConformance:
    """Subclass it under a name that starts with "Test"."""

    options = ExecutorOptions(slots=4, pages=16, context=256, max_tokens=192)
    pages_of_slot = 4  # each slot has its own: slot 0 has pages 0 to 3
    tolerance = 1e-3  # between a score and the logits of the same step, absolute

    def make_executor(self) -> Executor:
        raise NotImplementedError("return a new executor")

    def open_model(self) -> tuple[ModelFile, ModelDescription]:
        raise NotImplementedError("return a small model and its description")

    # -- tools ----------

    async def open(
        self, executor: Executor, file: ModelFile, model: ModelDescription, progress: Progress = no_progress
    ) -> None:
        """With state of its own to borrow."""
        store = make_store(executor, model, self.options)
        await executor.open(file, model, self.options, store, progress)

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Executor]:
        file, model = self.open_model()
        self.vocab_size = model.vocab_size
        executor = self.make_executor()
        with trio.fail_after(PATIENCE):
            try:
                await self.open(executor, file, model)
                yield executor
            finally:
                with trio.CancelScope(shield=True):
                    await executor.aclose()
                file.close()

    def prompt(self, length: int, salt: int = 0) -> Int32s:
        """Some tokens, int32 (length,); other ones for another salt."""
        ids = (np.arange(length) * 7 + np.arange(length) ** 2 // 5 + 3 + 11 * salt) % self.vocab_size
        return ids.astype(np.int32)

    def pages(self, slot: int) -> Int32s:
        first = slot * self.pages_of_slot
        return np.arange(first, first + self.pages_of_slot, dtype=np.int32)

    def prefill(self, number: int, prompt: Int32s, slot: int = 0, sampling: Sampling = GREEDY) -> Step:
        """The whole prompt in one step, sampling the token after it."""
        return Step(
            number,
            (Slice(slot, 0, self.pages(slot), prompt, sample=True),),
            (Bind(slot, sampling, prompt),),
        )

    async def run(self, executor: Executor, step: Step) -> StepResult:
        executor.submit(step)
        result = await executor.wait()
        assert result.id == step.id
        assert not result.stopped
        assert len(result.sampled) == len(step.slices)
        return result

    async def generate(
        self,
        executor: Executor,
        prompt: Int32s,
        count: int,
        slots: Sequence[int] = (0,),
        sampling: Sampling = GREEDY,
    ) -> list[list[int]]:
        """``count`` tokens after the prompt in each of ``slots``, which are decoded together."""
        texts: list[list[int]] = []
        for slot in slots:
            result = await self.run(executor, self.prefill(1000 + slot, prompt, slot, sampling))
            texts.append([_token(result.sampled[0])])
        for i in range(count - 1):
            slices = tuple(
                Slice(slot, len(prompt) + i, self.pages(slot), FOLLOW_ON, sample=True) for slot in slots
            )
            result = await self.run(executor, Step(2000 + i, slices))
            for text, sampled in zip(texts, result.sampled, strict=True):
                text.append(_token(sampled))
        return texts

    # -- life ----------

    async def test_keeps_to_the_protocol(self) -> None:
        check_executor(type(self).__name__, self.make_executor)
        assert isinstance(self.make_executor(), Executor)

    async def test_open_reports_progress(self) -> None:
        file, model = self.open_model()
        executor = self.make_executor()
        seen: list[tuple[int, int]] = []
        with trio.fail_after(PATIENCE):
            await self.open(executor, file, model, lambda done, total: seen.append((done, total)))
            await executor.aclose()
        file.close()
        done = [d for d, _ in seen]
        assert done == sorted(done)
        assert seen[-1][0] == seen[-1][1] > 0
        assert len({total for _, total in seen}) == 1

    async def test_aclose_twice(self) -> None:
        async with self.opened() as executor:
            await executor.aclose()
            await executor.aclose()

    async def test_aclose_without_open(self) -> None:
        with trio.fail_after(PATIENCE):
            await self.make_executor().aclose()

    async def test_aclose_after_cancelled_open(self) -> None:
        file, model = self.open_model()
        executor = self.make_executor()
        with trio.CancelScope() as scope:
            scope.cancel()
            await self.open(executor, file, model)
        assert scope.cancelled_caught
        with trio.fail_after(PATIENCE):
            await executor.aclose()
        file.close()

    async def test_closed_is_closed(self) -> None:
        async with self.opened() as executor:
            step = self.prefill(1, self.prompt(3))
            await executor.aclose()
            with pytest.raises(ClosedError):
                executor.submit(step)
            with pytest.raises(ClosedError):
                await executor.wait()
            executor.stop(1)
            assert executor.statistics().in_flight == 0

    async def test_aclose_with_a_step_in_flight_ends_the_wait(self) -> None:
        async with self.opened() as executor:
            ended: list[str] = []

            async def wait() -> None:
                try:
                    result = await executor.wait()
                    ended.append(f"step {result.id}")
                except ClosedError:
                    ended.append("closed")

            executor.submit(self.prefill(1, self.prompt(150)))
            async with trio.open_nursery() as nursery:
                nursery.start_soon(wait)
                await trio.lowlevel.checkpoint()
                await executor.aclose()
            assert ended in (["closed"], ["step 1"])  # it may have been just in time

    # -- flow ----------

    async def test_results_come_in_order_of_submission(self) -> None:
        async with self.opened() as executor:
            slots = range(min(executor.max_in_flight, self.options.slots))
            for slot in slots:
                executor.submit(self.prefill(100 - slot, self.prompt(40 - 9 * slot), slot))
            assert executor.statistics().in_flight == len(slots)
            assert [(await executor.wait()).id for _ in slots] == [100 - slot for slot in slots]
            assert executor.statistics().in_flight == 0

    async def test_one_step_too_many(self) -> None:
        async with self.opened() as executor:
            full = executor.max_in_flight
            if full >= self.options.slots:
                pytest.skip("more steps in flight than slots to fill them with")
            for slot in range(full):
                executor.submit(self.prefill(slot, self.prompt(5), slot))
            with pytest.raises(BusyError):
                executor.submit(self.prefill(full, self.prompt(5), full))
            assert (await executor.wait()).id == 0
            executor.submit(self.prefill(full, self.prompt(5), full))
            assert [(await executor.wait()).id for _ in range(full)] == list(range(1, full + 1))

    async def test_cancelling_wait_loses_nothing(self) -> None:
        async with self.opened() as executor:
            alone = await self.run(executor, self.prefill(1, self.prompt(30)))
            executor.submit(self.prefill(2, self.prompt(30), 1))
            for _ in range(3):
                with trio.CancelScope() as scope:
                    scope.cancel()
                    await executor.wait()
                assert scope.cancelled_caught
            result = await executor.wait()
            assert result.id == 2
            assert _token(result.sampled[0]) == _token(alone.sampled[0])

    async def test_stop(self) -> None:
        async with self.opened() as executor:
            before = await self.generate(executor, self.prompt(20), 3, (1,))
            executor.stop(99)  # unknown
            executor.submit(self.prefill(1, self.prompt(190)))
            executor.stop(1)
            result = await executor.wait()
            assert result.id == 1
            assert result.stopped or len(result.sampled) == 1  # it may have been just too late
            executor.stop(1)  # over
            assert await self.generate(executor, self.prompt(20), 3, (1,)) == before

    async def test_times_and_statistics(self) -> None:
        async with self.opened() as executor:
            idle = executor.statistics()
            assert (idle.steps, idle.tokens, idle.in_flight) == (0, 0, 0)
            result = await self.run(executor, self.prefill(1, self.prompt(12)))
            assert 0 < result.started_ns <= result.finished_ns
            assert 0 <= result.kernel_ns <= result.finished_ns - result.started_ns
            after = executor.statistics()
            assert (after.steps, after.tokens, after.in_flight) == (1, 12, 0)
            assert after.busy_ns == result.finished_ns - result.started_ns
            assert (after.kernel_ns, after.finished_ns) == (result.kernel_ns, result.finished_ns)
            assert all(isinstance(name, str) and count >= 0 for name, count in after.bytes.items())

    # -- text ----------

    @pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
    async def test_same_again(self, sampling: Sampling) -> None:
        texts = []
        for _ in range(2):
            async with self.opened() as executor:
                texts.append(await self.generate(executor, self.prompt(9), 6, (0,), sampling))
                texts.append(await self.generate(executor, self.prompt(9), 6, (2,), sampling))
        assert texts == [texts[0]] * 4
        assert all(0 <= token < self.vocab_size for token in texts[0][0])

    @pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
    async def test_text_does_not_depend_on_the_batch(self, sampling: Sampling) -> None:
        async with self.opened() as executor:
            alone = await self.generate(executor, self.prompt(9), 6, (0,), sampling)
            together = await self.generate(executor, self.prompt(9), 6, (0, 1, 2), sampling)
        assert together == alone * 3

    async def test_running_ahead_says_the_same(self) -> None:
        """A step that takes its token from the one before, submitted before that is done."""
        async with self.opened() as executor:
            (expected,) = await self.generate(executor, self.prompt(9), 2)
            first = self.prefill(1, self.prompt(9), 1)
            second = Step(2, (Slice(1, 9, self.pages(1), FOLLOW_ON, sample=True),))
            if executor.max_in_flight == 1:
                results = [await self.run(executor, first), await self.run(executor, second)]
            else:
                executor.submit(first)
                executor.submit(second)
                results = [await executor.wait(), await executor.wait()]
            assert [_token(result.sampled[0]) for result in results] == expected

    async def test_token_given_or_remembered(self) -> None:
        async with self.opened() as executor:
            (expected,) = await self.generate(executor, self.prompt(9), 2)
            await self.run(executor, self.prefill(1, self.prompt(9), 1))
            given = np.array(expected[:1], np.int32)
            result = await self.run(executor, Step(2, (Slice(1, 9, self.pages(1), given, sample=True),)))
            assert _token(result.sampled[0]) == expected[1]

    async def test_prefill_in_chunks(self) -> None:
        async with self.opened() as executor:
            prompt = self.prompt(150)
            whole = await self.run(executor, self.prefill(1, prompt))
            bind = (Bind(1, GREEDY, prompt),)
            for number, (start, end) in enumerate(((0, 1), (1, 64), (64, 149), (149, 150))):
                piece = Slice(1, start, self.pages(1), prompt[start:end], sample=end == len(prompt))
                result = await self.run(executor, Step(2 + number, (piece,), bind))
                bind = ()
            assert _token(result.sampled[0]) == _token(whole.sampled[0])

    async def test_shared_prefix(self) -> None:
        async with self.opened() as executor:
            prompt = self.prompt(PAGE_TOKENS + 10)
            own = await self.run(executor, self.prefill(1, prompt))
            pages = np.array([self.pages(0)[0], self.pages(1)[0]], np.int32)
            rest = Slice(1, PAGE_TOKENS, pages, prompt[PAGE_TOKENS:], sample=True)
            shared = await self.run(executor, Step(2, (rest,), (Bind(1, GREEDY, prompt),)))
            assert _token(shared.sampled[0]) == _token(own.sampled[0])

    async def test_pages_in_any_order(self) -> None:
        async with self.opened() as executor:
            prompt = self.prompt(150)
            straight = await self.run(executor, self.prefill(1, prompt))
            pages = np.ascontiguousarray(self.pages(1)[::-1])
            piece = Slice(1, 0, pages, prompt, sample=True)
            shuffled = await self.run(executor, Step(2, (piece,), (Bind(1, GREEDY, prompt),)))
            assert _token(shuffled.sampled[0]) == _token(straight.sampled[0])

    async def test_slot_is_used_again(self) -> None:
        async with self.opened() as executor:
            first = await self.generate(executor, self.prompt(70), 3)
            await self.generate(executor, self.prompt(20, salt=1), 3, sampling=SEEDED)
            assert await self.generate(executor, self.prompt(70), 3) == first

    # -- numbers ----------

    async def test_logits_and_scores(self) -> None:
        async with self.opened() as executor:
            prompt = self.prompt(9)
            targets = np.append(prompt[1:], -1).astype(np.int32)
            piece = Slice(0, 0, self.pages(0), prompt, sample=True, targets=targets, logits=True)
            plain = Slice(1, 0, self.pages(1), prompt)
            binds = (Bind(0, GREEDY, prompt), Bind(1, GREEDY, prompt))
            result = await self.run(executor, Step(1, (piece, plain), binds))
            logits, scores = result.logits[0], result.scores[0]
            assert logits is not None
            assert scores is not None
            assert (logits.shape, logits.dtype) == ((len(prompt), self.vocab_size), np.float32)
            assert (scores.shape, scores.dtype) == (targets.shape, np.float32)
            assert int(logits[-1].argmax()) == _token(result.sampled[0])
            wide = logits.astype(np.float64)
            wide -= wide.max(axis=1, keepdims=True)
            logprobs = wide - np.log(np.exp(wide).sum(axis=1, keepdims=True))
            expected = logprobs[np.arange(len(prompt) - 1), prompt[1:]]
            np.testing.assert_allclose(scores[:-1], expected, atol=self.tolerance)
            assert (result.sampled[1], result.logits[1], result.scores[1]) == (None, None, None)

    @pytest.mark.parametrize(
        ("blamed", "bias", "others"),
        [
            ("logit_bias", -math.inf, {}),
            ("logit_bias", -math.inf, {"temperature": 1.0, "top_k": 3, "min_p": 0.5, "logprobs": 2}),
            ("repetition_penalty", 100.0, {"repetition_penalty": 1e-38}),  # 100 / 1e-38 is no float32
        ],
    )
    async def test_logits_that_cannot_be_used_concern_one_slice(
        self, blamed: str, bias: float, others: dict[str, Any]
    ) -> None:
        """Neither the other slices of the step, nor what the slot is bound to next."""
        async with self.opened() as executor:
            prompt = self.prompt(9)
            (right,) = await self.generate(executor, prompt, 3)
            biased = prompt[:1].tolist() if bias > 0 else range(self.vocab_size)
            sampling = Sampling(logit_bias=tuple((token, bias) for token in biased), **others)
            step = Step(
                1,
                (
                    Slice(0, 0, self.pages(0), prompt, sample=True),
                    Slice(1, 0, self.pages(1), prompt, sample=True),
                    Slice(2, 0, self.pages(2), prompt, sample=True),
                ),
                (
                    Bind(0, GREEDY, prompt),
                    Bind(1, sampling, prompt),
                    Bind(2, GREEDY, prompt),
                ),
            )
            after = Step(
                2, tuple(Slice(slot, 9, self.pages(slot), FOLLOW_ON, sample=True) for slot in (0, 1, 2))
            )
            result = await self.run(executor, step)
            assert result.sampled[1] == Unusable((blamed,))
            assert [_token(result.sampled[slot]) for slot in (0, 2)] == right[:1] * 2
            result = await self.run(executor, after)  # the engine is a step ahead when it learns of it
            assert [_token(result.sampled[slot]) for slot in (0, 2)] == right[1:2] * 2
            assert await self.generate(executor, prompt, 3, (1,)) == [right]

    async def test_logprobs(self) -> None:
        async with self.opened() as executor:
            prompt = self.prompt(9)
            silent = (await self.run(executor, self.prefill(1, prompt))).sampled[0]
            assert isinstance(silent, Sampled)
            assert math.isnan(silent.logprob)
            assert silent.top == ()
            for count in (0, 3):
                step = self.prefill(2 + count, prompt, sampling=Sampling(logprobs=count))
                sampled = (await self.run(executor, step)).sampled[0]
                assert isinstance(sampled, Sampled)
                assert sampled.logprob <= 0.0
                assert len(sampled.top) == count
                values = [value for _, value in sampled.top]
                assert values == sorted(values, reverse=True)
                if count:
                    assert sampled.top[0] == (sampled.token, pytest.approx(sampled.logprob, abs=1e-6))
                    assert len({token for token, _ in sampled.top}) == count


def _token(sampled: Sampled | Unusable | None) -> int:
    assert isinstance(sampled, Sampled)
    return sampled.token
