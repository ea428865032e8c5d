"""Slices that wait for a mask: what it allows is sampled, and nobody else is concerned."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import trio
import trio.testing

from pi2rt._errors import InternalError
from pi2rt.executors.reference.sampling import log_softmax
from pi2rt.runtime.executor import Masking, StepExecutor
from pi2rt.runtime.own_nursery import open_own_nursery
from pi2rt.runtime.step import Bind, Int32s, Sampled, Sampling, Skipped, Slice, Step, StepResult, Unusable
from pi2rt.runtime.token_mask import TokenMask, allows, masking
from pi2rt.testing.harness import FOLLOW_ON, GREEDY, SEEDED, Harness, Output, in_trio

_LENGTH = 12
_NEVER = 1e5
"""Seconds: a deadline that no test comes to."""

_NOTHING = Unusable(("token_mask",))


class Masks(Harness):
    """For executors with an attribute ``takes_masks``, which is true; skipped for others."""

    def _takes_masks(self) -> None:
        if not getattr(self.make_executor(), "takes_masks", False):
            pytest.skip(
                "the executor has no attribute takes_masks, or it is false: no slice waits for a mask"
            )

    def some(self, salt: int) -> npt.NDArray[np.bool_]:
        """A fifth of the tokens, others for another salt."""
        allowed: npt.NDArray[np.bool_] = np.arange(self.vocab_size) * 7 // 3 % 5 == salt % 5
        return allowed

    def only(self, *tokens: int) -> TokenMask:
        allowed = np.zeros(self.vocab_size, np.bool_)
        allowed[[token % self.vocab_size for token in tokens]] = True
        return masking(allowed)

    def give(self, executor: StepExecutor, step_id: int, masks: Mapping[int, TokenMask | None]) -> None:
        """By slot."""
        made: object = executor
        assert isinstance(made, Masking), "takes_masks is true, but there is no method mask"
        for slot, mask in masks.items():
            try:
                made.mask(step_id, slot, mask)
            except Exception as error:
                raise AssertionError(f"mask({step_id}, {slot}, ...) raised {error!r}") from error

    def submit(self, executor: StepExecutor, step: Step) -> None:
        try:
            executor.submit(step)
        except Exception as error:
            raise AssertionError(f"{step}, with masked slices, was refused with {error!r}") from error

    async def run_masked(
        self, executor: StepExecutor, step: Step, masks: Mapping[int, TokenMask | None]
    ) -> list[Output]:
        """With masks that are there before the step is waited for."""
        self.submit(executor, step)
        self.give(executor, step.id, masks)
        return self.outputs(step, await self.wait(executor, step.id))

    def masked(self, prompt: Int32s, slot: int = 0, *, logits: bool = False) -> Slice:
        return Slice(slot, 0, self.pages(slot), prompt, sample=True, masked=True, logits=logits)

    def next_masked(self, start: int, slot: int = 0, *, logits: bool = False) -> Slice:
        return Slice(slot, start, self.pages(slot), FOLLOW_ON, sample=True, masked=True, logits=logits)

    def check_masked(
        self, output: Output, mask: TokenMask, sampling: Sampling, counts: Int32s, position: int, what: str
    ) -> None:
        """The token is what ``sampling`` picks from these of the slice's own logits."""
        allowed = allows(mask, self.vocab_size)
        token = output.token
        assert allowed[token], (
            f"{what}: token {token} at position {position}, which the mask does not allow; it allows "
            f"{np.count_nonzero(allowed)} tokens"
        )
        forbidden = tuple((int(each), -math.inf) for each in np.flatnonzero(~allowed))
        limited = replace(sampling, logit_bias=(*forbidden, *sampling.logit_bias))
        self.check_token(token, output.rows[-1], limited, counts, position, f"{what}, by its mask")

    async def check_texts_by_masks(
        self, executor: StepExecutor, samplings: list[Sampling], what: str
    ) -> None:
        """A slot for each of them, with masks of their own in each step."""
        prompts = [self.prompt(_LENGTH + slot, slot) for slot in range(len(samplings))]
        counts = [np.bincount(each, minlength=self.vocab_size).astype(np.int32) for each in prompts]
        at = [len(prompt) for prompt in prompts]
        binds = tuple(Bind(slot, each, prompts[slot]) for slot, each in enumerate(samplings))
        slices = tuple(self.masked(prompt, slot, logits=True) for slot, prompt in enumerate(prompts))
        for number in range(6):
            masks = {slot: masking(self.some(number + slot)) for slot in range(len(samplings))}
            outputs = await self.run_masked(executor, Step(number, slices, binds), masks)
            for slot, output in enumerate(outputs):
                where = f"{what}, slot {slot}, step {number}"
                self.check_masked(output, masks[slot], samplings[slot], counts[slot], at[slot], where)
                counts[slot][output.token] += 1
            binds = ()
            slices = tuple(self.next_masked(start, slot, logits=True) for slot, start in enumerate(at))
            at = [position + 1 for position in at]

    @in_trio
    async def test_each_slice_has_a_mask_of_its_own(self) -> None:
        """In each step another one, given before the step runs."""
        self._takes_masks()
        async with self.opened(mask_deadline=_NEVER) as executor:
            samplings = [GREEDY, SEEDED, replace(SEEDED, seed=8), GREEDY]
            await self.check_texts_by_masks(executor, samplings, "masked")

    @in_trio
    async def test_options_apply_to_what_a_mask_allows(self) -> None:
        self._takes_masks()
        async with self.opened(mask_deadline=_NEVER) as executor:
            half = tuple((token, 3.0) for token in range(0, self.vocab_size, 2))
            samplings = [
                replace(SEEDED, top_k=2),
                replace(SEEDED, temperature=2.0, top_p=0.5, min_p=0.01),
                Sampling(logit_bias=half, frequency_penalty=2.0),
                replace(SEEDED, repetition_penalty=1.5, presence_penalty=1.0, logit_bias=half),
            ]
            await self.check_texts_by_masks(executor, samplings, "options and masks")

    @in_trio
    async def test_a_mask_that_comes_late(self) -> None:
        """While the step is waited for."""
        self._takes_masks()
        async with self.opened(mask_deadline=_NEVER) as executor:
            prompt = self.prompt(_LENGTH)
            counts = np.zeros(self.vocab_size, np.int32)
            for number in range(4):
                mask = masking(self.some(number))
                step = Step(number, (self.masked(prompt, logits=True),), (Bind(0, GREEDY, prompt),))
                self.submit(executor, step)
                results: list[StepResult] = []
                async with open_own_nursery() as nursery:
                    nursery.start_soon(self._wait_into, executor, number, results)
                    await trio.testing.wait_all_tasks_blocked()
                    early = bool(results)
                    self.give(executor, number, {0: mask})
                assert not early, "a step with a slice that is masked ended before there was a mask"
                (output,) = self.outputs(step, results[0])
                self.check_masked(output, mask, GREEDY, counts, _LENGTH, "a mask that came late")

    async def _wait_into(self, executor: StepExecutor, step_id: int, results: list[StepResult]) -> None:
        results.append(await self.wait(executor, step_id))

    @in_trio
    async def test_none_allows_all(self) -> None:
        self._takes_masks()
        async with self.opened(mask_deadline=_NEVER) as executor:
            prompt = self.prompt(_LENGTH)
            (right,) = await self.generate(executor, prompt, 2)
            step = Step(1, (self.masked(prompt),), (Bind(0, GREEDY, prompt),))
            outputs = await self.run_masked(executor, step, {0: None})
            outputs += await self.run_masked(executor, Step(2, (self.next_masked(_LENGTH),)), {0: None})
            assert all(isinstance(each.sampled, Sampled) for each in outputs), (
                f"a mask of None: the results are {[each.sampled for each in outputs]}"
            )
            got = [each.token for each in outputs]
            await self.check_text(executor, prompt, GREEDY, got, right, "a mask of None, which allows all")

    @in_trio
    async def test_neighbours_of_a_masked_slice(self) -> None:
        """Their texts are those without it."""
        self._takes_masks()
        async with self.opened(mask_deadline=_NEVER) as executor:
            prompt = self.prompt(_LENGTH)
            (right,) = await self.generate(executor, prompt, 6, sampling=SEEDED)
            slices = (
                Slice(0, 0, self.pages(0), prompt, sample=True),
                self.masked(prompt, 1, logits=True),
                Slice(2, 0, self.pages(2), prompt, sample=True),
            )
            binds = tuple(Bind(slot, SEEDED, prompt) for slot in range(3))
            counts = np.zeros(self.vocab_size, np.int32)
            texts: dict[int, list[int]] = {0: [], 2: []}
            for number in range(6):
                mask = masking(self.some(number))
                outputs = await self.run_masked(executor, Step(number, slices, binds), {1: mask})
                at = _LENGTH + number
                self.check_masked(outputs[1], mask, SEEDED, counts, at, "slice 1 of 3")
                for slot in texts:
                    texts[slot].append(outputs[slot].token)
                binds = ()
                slices = (
                    Slice(0, at, self.pages(0), FOLLOW_ON, sample=True),
                    self.next_masked(at, 1, logits=True),
                    Slice(2, at, self.pages(2), FOLLOW_ON, sample=True),
                )
            for slot, text in texts.items():
                what = f"slot {slot}, unmasked beside a masked slice"
                await self.check_text(executor, prompt, SEEDED, text, right, what)

    @in_trio
    async def test_targets_and_logits_are_not_masked(self) -> None:
        self._takes_masks()
        async with self.opened(mask_deadline=_NEVER) as executor:
            prompt = self.prompt(_LENGTH)
            targets = np.append(prompt[1:], prompt[0]).astype(np.int32)
            (plain,) = await self.run(executor, self.prefill(1, prompt, logits=True))
            piece = replace(self.masked(prompt, logits=True), targets=targets)
            step = Step(2, (piece,), (Bind(0, GREEDY, prompt),))
            mask = masking(self.some(1))
            (output,) = await self.run_masked(executor, step, {0: mask})
            self.check_same(output.rows, plain.rows, "logits of a masked slice")
            assert output.scores is not None
            right = log_softmax(output.rows)[np.arange(_LENGTH), targets]
            error = np.abs(output.scores - right).max()
            assert error <= self.tolerance.scores, (
                f"scores of a masked slice are {output.scores.tolist()}, by its logits, which no mask changes, "
                f"{right.round(5).tolist()}"
            )
            counts = np.zeros(self.vocab_size, np.int32)
            self.check_masked(output, mask, GREEDY, counts, _LENGTH, "with targets and logits")

    @in_trio
    async def test_log_probabilities_behind_a_mask(self) -> None:
        """They are of what it allows."""
        self._takes_masks()
        async with self.opened(mask_deadline=_NEVER) as executor:
            prompt = self.prompt(_LENGTH)
            for number, sampling in enumerate((replace(GREEDY, logprobs=3), replace(SEEDED, logprobs=2))):
                allowed = self.some(number)
                step = Step(number, (self.masked(prompt, logits=True),), (Bind(0, sampling, prompt),))
                (output,) = await self.run_masked(executor, step, {0: masking(allowed)})
                right = log_softmax(np.where(allowed, output.rows[-1], np.float32(-np.inf)))
                sampled = output.sampled
                assert isinstance(sampled, Sampled), f"the result is {sampled}"
                given = [(sampled.token, sampled.logprob), *sampled.top]
                assert all(abs(value - right[token]) <= self.tolerance.scores for token, value in given), (
                    f"log probabilities of (token, value) {given}, of what the mask allows they are "
                    f"{[round(float(right[token]), 5) for token, _ in given]}"
                )
                best = np.sort(right)[::-1][: sampling.logprobs]
                values = [value for _, value in sampled.top]
                assert np.abs(best - values).max() <= self.tolerance.scores, (
                    f"top has {values}, the largest of what the mask allows are {best.round(5).tolist()}"
                )

    @in_trio
    async def test_a_mask_that_allows_nothing_concerns_one_slice(self) -> None:
        """Alone, or together with a bias; neither the neighbours, nor what the slot is bound to next."""
        self._takes_masks()
        async with self.opened(mask_deadline=_NEVER) as executor:
            prompt = self.prompt(_LENGTH)
            (right,) = await self.generate(executor, prompt, 2)
            mask = self.only(5, 6)
            biased = Sampling(logit_bias=((5, -math.inf), (6, -math.inf)))
            both = Unusable(("token_mask", "logit_bias"))
            for number, (sampling, given, expected) in enumerate(
                ((GREEDY, self.only(), _NOTHING), (biased, mask, both))
            ):
                slices = (Slice(0, 0, self.pages(0), prompt, sample=True), self.masked(prompt, 1))
                binds = (Bind(0, GREEDY, prompt), Bind(1, sampling, prompt))
                first = await self.run_masked(executor, Step(10 * number, slices, binds), {1: given})
                assert first[1].sampled == expected, (
                    f"the mask leaves no token to pick, so the result must be {expected}, not {first[1].sampled}"
                )
                slices = (
                    Slice(0, _LENGTH, self.pages(0), FOLLOW_ON, sample=True),
                    self.next_masked(_LENGTH, 1),
                )
                then = await self.run_masked(executor, Step(10 * number + 1, slices), {1: None})
                got = [first[0].token, then[0].token]
                what = "beside a slice whose mask allows nothing"
                await self.check_text(executor, prompt, GREEDY, got, right, what)
                (again,) = await self.run(executor, self.prefill(10 * number + 2, prompt, 1))
                what = "the slot whose mask allowed nothing, bound again"
                await self.check_text(executor, prompt, GREEDY, [again.token], right[:1], what)

    @in_trio
    async def test_a_mask_that_never_comes(self) -> None:
        """Past ``mask_deadline`` that slice is unusable; the others are not concerned."""
        self._takes_masks()
        async with self.opened(mask_deadline=0.5) as executor:
            prompt = self.prompt(_LENGTH)
            (right,) = await self.generate(executor, prompt, 1)
            slices = (
                self.masked(prompt, 0),
                Slice(1, 0, self.pages(1), prompt, sample=True),
                self.masked(prompt, 2, logits=True),
            )
            binds = tuple(Bind(slot, GREEDY, prompt) for slot in range(3))
            mask = masking(self.some(2))
            outputs = await self.run_masked(executor, Step(1, slices, binds), {2: mask})
            assert outputs[0].sampled == _NOTHING, (
                f"a slice whose mask never came must be {_NOTHING}, not {outputs[0].sampled}"
            )
            what = "beside a slice whose mask never came"
            await self.check_text(executor, prompt, GREEDY, [outputs[1].token], right, what)
            counts = np.zeros(self.vocab_size, np.int32)
            self.check_masked(outputs[2], mask, GREEDY, counts, _LENGTH, what)

    @in_trio
    async def test_stop_ends_the_wait_for_a_mask(self) -> None:
        self._takes_masks()
        async with self.opened(mask_deadline=_NEVER) as executor:
            prompt = self.prompt(_LENGTH)
            (right,) = await self.generate(executor, prompt, 1)
            for number in range(4):
                self.submit(executor, Step(number, (self.masked(prompt),), (Bind(0, GREEDY, prompt),)))
                results: list[StepResult] = []
                self.doing = "a step that waits for a mask and was stopped"
                async with open_own_nursery() as nursery:
                    nursery.start_soon(self._wait_into, executor, number, results)
                    if number % 2:
                        await trio.testing.wait_all_tasks_blocked()
                    executor.stop(number)
                assert results[0].stopped, (
                    "a step that was stopped while it waited for a mask ended as if it had one"
                )
            (again,) = await self.run(executor, self.prefill(9, prompt))
            what = "after steps that were stopped while they waited"
            await self.check_text(executor, prompt, GREEDY, [again.token], right, what)

    @in_trio
    async def test_closing_ends_the_wait_for_a_mask(self) -> None:
        self._takes_masks()
        async with self.opened(mask_deadline=_NEVER) as executor:
            prompt = self.prompt(_LENGTH)
            self.submit(executor, Step(1, (self.masked(prompt),), (Bind(0, GREEDY, prompt),)))
            with trio.move_on_after(0):
                await executor.wait()
            self.doing = "aclose while a step waits for a mask"

    @in_trio
    async def test_masks_follow_from_the_tokens_before(self) -> None:
        """With as many steps in flight as there may be: a result is told while the next steps wait for their masks."""
        self._takes_masks()
        async with self.opened(mask_deadline=_NEVER) as executor:
            prompt = self.prompt(_LENGTH)
            count = executor.max_in_flight + 4
            self.submit(executor, Step(0, (self.masked(prompt),), (Bind(0, GREEDY, prompt),)))
            submitted, token = 1, 3
            for number in range(count):
                while submitted < min(count, number + executor.max_in_flight):
                    step = Step(submitted, (self.next_masked(_LENGTH + submitted - 1),))
                    self.submit(executor, step)
                    submitted += 1
                follows = (5 * token + 1) % self.vocab_size
                self.give(executor, number, {0: self.only(follows)})
                result = await self.wait(executor, number)
                (sampled,) = result.sampled
                assert sampled == Sampled(follows) or (
                    isinstance(sampled, Sampled) and sampled.token == follows
                ), f"step {number} of {count} ahead: the mask allows token {follows} alone, not {sampled}"
                token = follows

    @in_trio
    async def test_skipped_slices_wait_for_no_mask(self) -> None:
        self._takes_masks()
        async with self.opened(mask_deadline=_NEVER) as executor:
            if executor.max_in_flight < 2:
                return  # no step runs ahead of the end
            prompt = self.prompt(_LENGTH)
            bind = Bind(0, GREEDY, prompt, frozenset({4}))
            self.submit(executor, Step(1, (self.masked(prompt),), (bind,)))
            self.submit(executor, Step(2, (self.next_masked(_LENGTH),)))
            self.give(executor, 1, {0: self.only(4)})
            await self.wait(executor, 1)
            self.doing = "a step of which every slice is behind the end of its sequence"
            (sampled,) = (await self.wait(executor, 2)).sampled
            assert isinstance(sampled, Skipped), f"behind the end of its sequence the result is {sampled}"

    @in_trio
    async def test_masks_that_nobody_waits_for(self) -> None:
        """Those of other steps and slots, and a second one, are ignored."""
        self._takes_masks()
        async with self.opened(mask_deadline=_NEVER) as executor:
            prompt = self.prompt(_LENGTH)
            mask = self.only(7)
            self.give(executor, 77, {0: mask})
            slices = (self.masked(prompt), Slice(1, 0, self.pages(1), prompt, sample=True))
            binds = (Bind(0, GREEDY, prompt), Bind(1, GREEDY, prompt))
            (right,) = await self.generate(executor, prompt, 1, (1,))
            self.submit(executor, Step(1, slices, binds))
            self.give(executor, 1, {1: mask, 3: mask})
            self.give(executor, 2, {0: mask})
            self.give(executor, 1, {0: self.only(9)})
            self.give(executor, 1, {0: mask})
            outputs = self.outputs(Step(1, slices, binds), await self.wait(executor, 1))
            assert outputs[0].token == 9, (
                f"the first mask of a slice allows token 9 alone, but the token is {outputs[0].token}"
            )
            what = "a slice that is not masked, for whose slot a mask was given"
            await self.check_text(executor, prompt, GREEDY, [outputs[1].token], right, what)
            self.give(executor, 1, {0: mask})

    @in_trio
    async def test_what_is_no_mask(self) -> None:
        """An error of the caller, and the step can still be given one."""
        self._takes_masks()
        async with self.opened(mask_deadline=_NEVER) as executor:
            prompt = self.prompt(_LENGTH)
            self.submit(executor, Step(1, (self.masked(prompt),), (Bind(0, GREEDY, prompt),)))
            made: object = executor
            assert isinstance(made, Masking), "takes_masks is true, but there is no method mask"
            right = self.only(8)
            for wrong in (
                right[:-1],
                np.append(right, right),
                right.astype(np.uint8),
                right.astype(np.int64),
            ):
                with self.raises(InternalError, f"mask with {wrong.dtype} {wrong.shape}"):
                    made.mask(1, 0, wrong)  # type: ignore[arg-type]
            self.give(executor, 1, {0: right})
            (sampled,) = (await self.wait(executor, 1)).sampled
            assert isinstance(sampled, Sampled), f"the result is {sampled}"
            assert sampled.token == 8, f"the mask allows token 8 alone, not {sampled.token}"
