"""A model whose own logits leave no token to pick, in one sequence of several: that one alone is told so."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pi2rt.executors.reference.sampling import log_softmax
from pi2rt.formats import ModelFile, open_model_file
from pi2rt.models import ModelDescription, describe
from pi2rt.runtime.executor import Masking, StepExecutor
from pi2rt.runtime.step import Bind, Int32s, Sampled, Sampling, Slice, Step, Unusable, Verified
from pi2rt.runtime.token_mask import allows, masking
from pi2rt.testing.harness import FOLLOW_ON, GREEDY, SEEDED, Harness, Output, in_trio
from pi2rt.testing.tiny_model import UNUSABLE_TOKEN
from pi2rt.testing.tiny_models import unusable_model_path

_LENGTH = 12
_OWN = Unusable(())
_OPTIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "top_k": 3, "top_p": 0.9, "min_p": 0.5, "logprobs": 2},
    "penalised": {
        "repetition_penalty": 1.3,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.2,
        "logit_bias": ((5, 3.0), (6, -float("inf"))),
    },
}


class UnusableLogits(Harness):
    """NaN and infinity behind ``UNUSABLE_TOKEN``. All weights are finite, and so is the state of each sequence."""

    def open_unusable_model(self) -> tuple[ModelFile, ModelDescription]:
        """The first of ``models``, in which logits are NaN and infinite where a sequence has ``UNUSABLE_TOKEN``, opened
        anew. Give one of your own where ``open_model`` gives your own: ``TinyModel(..., unusable=True)`` has weights.
        A product with zeros has to be exactly zero, as it is with quantised weights that have no offset."""
        if type(self).open_model is not Harness.open_model:
            pytest.skip(
                "open_model is overridden and open_unusable_model is not: there is no file with logits that are NaN"
            )
        file = open_model_file(unusable_model_path(self.folder, self.models[0]))
        return file, describe(file)

    @asynccontextmanager
    async def opened_unusable(self, **options: Any) -> AsyncIterator[StepExecutor]:
        file, description = self.open_unusable_model()
        executor = self.make_executor()
        async with self._opened(executor, file, description, replace(self.options, **options)):
            yield executor

    def usable(self, length: int = _LENGTH, salt: int = 0) -> Int32s:
        """A prompt without the token."""
        prompt = self.prompt(length, salt)
        prompt[prompt == UNUSABLE_TOKEN] = 4
        return prompt

    def unusable(self, at: int, length: int = _LENGTH, salt: int = 0) -> Int32s:
        """The same with the token at one position."""
        prompt = self.usable(length, salt)
        prompt[at] = UNUSABLE_TOKEN
        return prompt

    def check_unusable(self, output: Output, what: str) -> None:
        assert output.sampled == _OWN, (
            f"{what}: the model's own logits leave no token to pick, so the result must be {_OWN}, not "
            f"{output.sampled}"
        )

    def token_of(self, output: Output, what: str) -> int:
        assert isinstance(output.sampled, Sampled), f"{what}: the result is {output.sampled}"
        return output.sampled.token

    async def run_ahead(self, executor: StepExecutor, steps: Sequence[Step]) -> list[list[Output]]:
        """As many of them in flight as there may be."""
        outputs: list[list[Output]] = []
        submitted = 0
        for step in steps:
            while submitted < min(len(steps), len(outputs) + executor.max_in_flight):
                executor.submit(steps[submitted])
                submitted += 1
            outputs.append(self.outputs(step, await self.wait(executor, step.id)))
        return outputs

    def follow(self, number: int, start: int, slots: Sequence[int]) -> Step:
        return Step(
            number, tuple(Slice(slot, start, self.pages(slot), FOLLOW_ON, sample=True) for slot in slots)
        )

    @pytest.mark.parametrize("options", _OPTIONS.values(), ids=_OPTIONS)
    @in_trio
    async def test_the_models_own_nan_concerns_one_slice(self, options: dict[str, Any]) -> None:
        """Neither the other slices, nor the steps that run ahead, nor what the slot is bound to next; and no field of
        ``Sampling`` is to blame."""
        async with self.opened_unusable() as executor:
            prompt, wrong = self.usable(), self.unusable(5)
            samplings = (GREEDY, Sampling(seed=7, **options), SEEDED)
            right = {
                slot: (await self.generate(executor, prompt, 4, (slot,), samplings[slot]))[0]
                for slot in (0, 2)
            }
            texts = (prompt, wrong, prompt)
            slices = tuple(
                Slice(slot, 0, self.pages(slot), text, sample=True) for slot, text in enumerate(texts)
            )
            binds = tuple(Bind(slot, samplings[slot], text) for slot, text in enumerate(texts))
            again = replace(self.follow(3, _LENGTH + 1, (0, 2)), binds=(Bind(1, GREEDY, prompt),))
            again = replace(again, slices=(*again.slices, Slice(1, 0, self.pages(1), prompt, sample=True)))
            steps = [
                Step(1, slices, binds),
                self.follow(2, _LENGTH, (0, 1, 2)),  # what follows an unusable one may be anything
                again,
                self.follow(4, _LENGTH + 2, (0, 2)),
            ]
            first, second, third, fourth = await self.run_ahead(executor, steps)
            self.check_unusable(first[1], "slot 1 of 3")
            for slot, outputs in (
                (0, (first[0], second[0], third[0], fourth[0])),
                (2, (first[2], second[2], third[1], fourth[1])),
            ):
                what = f"slot {slot}, beside one whose logits are NaN"
                got = [self.token_of(each, what) for each in outputs]
                await self.check_text(executor, prompt, samplings[slot], got, right[slot], what)
            what = "slot 1, whose logits were NaN, bound again"
            text = [self.token_of(third[2], what)]
            for i in range(3):
                (output,) = await self.run(executor, self.following(5 + i, _LENGTH + i, 1))
                text.append(self.token_of(output, what))
            await self.check_text(executor, prompt, GREEDY, text, right[0], what)

    @in_trio
    async def test_nan_among_decoded_sequences(self) -> None:
        """One token makes it so, and from then on all of that sequence is. Others are decoded beside it."""
        async with self.opened_unusable() as executor:
            prompt = self.usable()
            (right,) = await self.generate(executor, prompt, 6)
            slots = (0, 1, 2)
            slices = tuple(Slice(slot, 0, self.pages(slot), prompt, sample=True) for slot in slots)
            outputs = await self.run(
                executor, Step(1, slices, tuple(Bind(slot, GREEDY, prompt) for slot in slots))
            )
            texts = {slot: [self.token_of(outputs[slot], f"slot {slot}")] for slot in (0, 2)}
            for number in range(2, 7):
                start = _LENGTH + number - 2
                step = self.follow(number, start, slots)
                token = UNUSABLE_TOKEN if number == 3 else int(prompt[number])
                forced = replace(step.slices[1], tokens=np.array([token], np.int32))
                step = replace(step, slices=(step.slices[0], forced, step.slices[2]))
                outputs = await self.run(executor, step)
                if number < 3:
                    self.token_of(outputs[1], "slot 1, before its logits are NaN")
                else:
                    self.check_unusable(outputs[1], f"slot 1, step {number}, NaN since step 3")
                for slot, text in texts.items():
                    text.append(self.token_of(outputs[slot], f"slot {slot}, step {number}, beside NaN"))
            for slot, text in texts.items():
                what = f"slot {slot}, decoded beside one whose logits became NaN"
                await self.check_text(executor, prompt, GREEDY, text, right, what)

    @in_trio
    async def test_logits_and_scores_around_nan(self) -> None:
        """Before it they are those without it, and where they are NaN nobody makes numbers of them."""
        async with self.opened_unusable() as executor:
            at, prompt = 7, self.usable()
            targets = np.append(prompt[1:], prompt[0]).astype(np.int32)
            slices = tuple(
                Slice(slot, 0, self.pages(slot), text, logits=True, targets=targets)
                for slot, text in enumerate((prompt, self.unusable(at)))
            )
            binds = tuple(Bind(slot, GREEDY, prompt) for slot in range(2))
            (right,) = await self.run(executor, Step(1, slices[:1], binds[:1]))
            beside, wrong = await self.run(executor, Step(2, slices, binds))
            self.check_same(beside.rows, right.rows, "beside a sequence whose logits are NaN")
            self.check_same(wrong.rows[:at], right.rows[:at], f"before position {at}, where logits are NaN")
            numbers = [
                position
                for position in range(at, _LENGTH)
                if np.all(wrong.rows[position] < np.inf) and np.any(np.isfinite(wrong.rows[position]))
            ]
            assert not numbers, (
                f"from position {at} on the model gives NaN and infinity, but the logits of positions {numbers} could "
                "be sampled from"
            )
            expected = log_softmax(right.rows)[np.arange(_LENGTH), targets]
            for output, count, what in ((beside, _LENGTH, "beside"), (wrong, at, "before")):
                assert output.scores is not None
                error = np.abs(output.scores[:count] - expected[:count])
                assert np.all(error <= self._score_error(right)), (
                    f"scores {what} logits that are NaN are {output.scores[:count].tolist()}, by logits of this "
                    f"executor {expected[:count].round(5).tolist()}"
                )

    def _score_error(self, right: Output) -> float:
        """Of scores of one step against logits of another."""
        rms = float(np.sqrt(np.mean(np.square(right.rows), axis=-1)).max())
        return self.tolerance.scores + 8 * self.tolerance.repeat * rms

    @in_trio
    async def test_a_step_of_nan_alone(self) -> None:
        """Of one slice and of three; in the next step they are as if nothing had been."""
        async with self.opened_unusable() as executor:
            prompt = self.usable()
            (right,) = await self.generate(executor, prompt, 1)
            for slots in ((0,), (0, 1, 2)):
                for number, text in enumerate((self.unusable(_LENGTH - 1), prompt)):
                    slices = tuple(Slice(slot, 0, self.pages(slot), text, sample=True) for slot in slots)
                    binds = tuple(Bind(slot, GREEDY, text) for slot in slots)
                    outputs = await self.run(executor, Step(number, slices, binds))
                    for slot, output in zip(slots, outputs, strict=True):
                        if number == 0:
                            self.check_unusable(output, f"slot {slot} of {len(slots)}, all of them NaN")
                            continue
                        what = f"slot {slot}, after a step of NaN alone"
                        got = [self.token_of(output, what)]
                        await self.check_text(executor, prompt, GREEDY, got, right, what)

    @in_trio
    async def test_nan_among_drafts(self) -> None:
        """The outcome after the draft that brings it is unusable, and those before it are not."""
        if not getattr(self.make_executor(), "verifies_drafts", False):
            pytest.skip("the executor has no attribute verifies_drafts, or it is false: no slice has drafts")
        async with self.opened_unusable() as executor:
            prompt = self.usable()
            (right,) = await self.generate(executor, prompt, 1)
            likely = Sampling(logit_bias=((UNUSABLE_TOKEN, 1e4),))
            drafts = {0: [4, 5, 6], 1: [UNUSABLE_TOKEN, 5, 6], 2: []}
            binds = tuple(Bind(slot, likely if slot == 1 else GREEDY, prompt) for slot in drafts)
            begin = tuple(Slice(slot, 0, self.pages(slot), prompt[:-1]) for slot in drafts)
            await self.run(executor, Step(1, begin, binds))
            start = _LENGTH - 1
            slices = tuple(
                Slice(
                    slot,
                    start,
                    self.pages(slot),
                    np.append(prompt[-1:], guesses).astype(np.int32),
                    sample=True,
                    drafts=len(guesses),
                    logits=True,
                )
                for slot, guesses in drafts.items()
            )
            beside, wrong, plain = await self.run(executor, Step(2, slices))
            expected = Verified((Sampled(UNUSABLE_TOKEN), _OWN))
            got = [each if isinstance(each, Unusable) else each.token for each in self._outcomes(wrong)]
            assert got == [UNUSABLE_TOKEN, _OWN], (
                f"the first draft is right, and logits after it are NaN, so the result must be {expected}, not "
                f"{wrong.sampled}"
            )
            outcomes = self._outcomes(beside)
            for i, outcome in enumerate(outcomes):
                what = f"outcome {i} of drafts beside drafts that bring NaN"
                assert isinstance(outcome, Sampled), f"{what} is {outcome}"
                counts = np.zeros(self.vocab_size, np.int32)
                self.check_token(outcome.token, beside.rows[i], GREEDY, counts, _LENGTH + i, what)
            what = "beside drafts that bring NaN"
            await self.check_text(executor, prompt, GREEDY, [self.token_of(plain, what)], right, what)
            piece = replace(slices[0], slot=1, pages=self.pages(1))
            await self.run(executor, Step(3, (replace(begin[1], tokens=self.unusable(2)[:-1]),), (binds[1],)))
            (output,) = await self.run(executor, Step(4, (piece,)))
            assert output.sampled == Verified((_OWN,)), (
                f"logits are NaN before the first draft, so the result must be {Verified((_OWN,))}, not "
                f"{output.sampled}"
            )

    def _outcomes(self, output: Output) -> tuple[Sampled | Unusable, ...]:
        assert isinstance(output.sampled, Verified), f"a slice with drafts brought {output.sampled}"
        return output.sampled.outcomes

    @in_trio
    async def test_nan_behind_a_mask(self) -> None:
        """The mask is not to blame, and slices with masks beside it get their tokens."""
        executor = self.make_executor()
        if not getattr(executor, "takes_masks", False):
            pytest.skip(
                "the executor has no attribute takes_masks, or it is false: no slice waits for a mask"
            )
        async with self.opened_unusable(mask_deadline=1e5) as executor:
            made: object = executor
            assert isinstance(made, Masking), "takes_masks is true, but there is no method mask"
            prompt = self.usable()
            mask = masking(np.arange(self.vocab_size) % 5 == 2)
            texts = (prompt, self.unusable(3), prompt)
            slices = tuple(
                Slice(slot, 0, self.pages(slot), text, sample=True, masked=True, logits=slot != 1)
                for slot, text in enumerate(texts)
            )
            binds = tuple(Bind(slot, GREEDY, text) for slot, text in enumerate(texts))
            for number, last in enumerate((self.unusable(3), prompt)):
                slices = (slices[0], replace(slices[1], tokens=last), slices[2])
                step = Step(number, slices, binds)
                executor.submit(step)
                for slot in range(3):
                    made.mask(number, slot, mask)
                outputs = self.outputs(step, await self.wait(executor, number))
                if number == 0:
                    self.check_unusable(outputs[1], "slot 1, with a mask that allows 64 tokens")
                else:
                    self.token_of(outputs[1], "slot 1, whose logits were NaN, bound again, with a mask")
                for slot in (0, 2):
                    what = f"slot {slot}, with a mask, beside one whose logits are NaN"
                    token = self.token_of(outputs[slot], what)
                    assert allows(mask, self.vocab_size)[token], (
                        f"{what}: the mask does not allow token {token}"
                    )
                    allowed = np.where(
                        allows(mask, self.vocab_size), outputs[slot].rows[-1], np.float32(-np.inf)
                    )
                    assert token == int(allowed.argmax()), (
                        f"{what}: token {token}, of what the mask allows {int(allowed.argmax())} has the largest logit"
                    )
