"""Slices with drafts: what they bring is what single steps would have brought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from pi2rt.executors.reference.sampling import sample
from pi2rt.runtime.executor import StepExecutor
from pi2rt.runtime.step import Bind, Floats, Int32s, Sampled, Sampling, Slice, Step, Verified
from pi2rt.testing.harness import FOLLOW_ON, GREEDY, SEEDED, Harness, in_trio

_LENGTH, _DRAFTS = 70, 9
_PENALISED = replace(SEEDED, repetition_penalty=1.3, presence_penalty=0.5, frequency_penalty=0.2)
_SAMPLINGS = {"greedy": GREEDY, "seeded": SEEDED, "penalised": _PENALISED}


class Drafts(Harness):
    """For executors with an attribute ``verifies_drafts``, which is true; skipped for others. What is sampled is
    compared with the slice's own logits; where ``tolerance.repeat`` is 0, with single steps too."""

    def _takes_drafts(self) -> None:
        if not getattr(self.make_executor(), "verifies_drafts", False):
            pytest.skip("the executor has no attribute verifies_drafts, or it is false: no slice has drafts")

    async def verified(
        self,
        executor: StepExecutor,
        prompt: Int32s,
        drafts: Sequence[int],
        sampling: Sampling,
        *,
        slot: int = 0,
        ends: frozenset[int] = frozenset(),
    ) -> list[int]:
        """Tokens of the outcomes of a slice: the last token of ``prompt``, and ``drafts``."""
        bind = Bind(slot, sampling, prompt, ends)
        before = Slice(slot, 0, self.pages(slot), prompt[:-1])
        await self.run(executor, Step(1, (before,), (bind,)))
        piece = self.drafted(prompt, drafts, slot)
        (output,) = await self.run(executor, Step(2, (piece,)))
        tokens = self.tokens(output.sampled, len(drafts))
        self.check_own(tokens, output.rows, prompt, drafts, sampling, ends)
        return tokens

    def drafted(self, prompt: Int32s, drafts: Sequence[int], slot: int = 0) -> Slice:
        tokens = np.concatenate([prompt[-1:], np.array(drafts, np.int32)])
        start = len(prompt) - 1
        return Slice(slot, start, self.pages(slot), tokens, sample=True, drafts=len(drafts), logits=True)

    def tokens(self, sampled: object, drafts: int) -> list[int]:
        assert isinstance(sampled, Verified), (
            f"a slice with {drafts} drafts brought {sampled!r}, and no Verified"
        )
        assert 1 <= len(sampled.outcomes) <= drafts + 1, (
            f"{drafts} drafts brought {len(sampled.outcomes)} outcomes"
        )
        tokens = [each.token if isinstance(each, Sampled) else -1 for each in sampled.outcomes]
        assert -1 not in tokens, f"an outcome is {sampled.outcomes[tokens.index(-1)]!r}"
        return tokens

    def check_own(
        self,
        got: list[int],
        logits: Floats,
        prompt: Int32s,
        drafts: Sequence[int],
        sampling: Sampling,
        ends: frozenset[int] = frozenset(),
    ) -> None:
        """The outcomes are those of single steps with these logits (1 + drafts, vocab_size)."""
        counts = np.bincount(prompt, minlength=self.vocab_size).astype(np.int32)
        expected: list[int] = []
        for row, draft in zip(logits, (*drafts, None), strict=True):
            outcome = sample(row, sampling, counts, len(prompt) + len(expected))
            assert isinstance(outcome, Sampled), f"the executor's logits leave no token: {outcome!r}"
            expected.append(outcome.token)
            counts[outcome.token] += 1
            if outcome.token in ends or outcome.token != draft:
                break
        assert got == expected, (
            f"{len(drafts)} drafts {list(drafts)}: the outcomes are {got}, the executor's own logits give {expected}"
        )

    def check_tokens(self, got: list[int], expected: list[int], what: str) -> None:
        """Of an executor whose sums depend on the number of rows, another token may be top-1."""
        assert self.tolerance.repeat or got == expected, (
            f"{what}: the outcomes are {got}, single steps bring {expected}"
        )

    @in_trio
    async def test_right_drafts(self) -> None:
        self._takes_drafts()
        async with self.opened() as executor:
            prompt = self.prompt(_LENGTH)
            for name, sampling in _SAMPLINGS.items():
                (text,) = await self.generate(executor, prompt, _DRAFTS + 1, sampling=sampling)
                got = await self.verified(executor, prompt, text[:-1], sampling)
                self.check_tokens(got, text, f"{name}, {_DRAFTS} right drafts")

    @in_trio
    async def test_wrong_drafts(self) -> None:
        """They end it, and the sequence goes on as if they had never been there."""
        self._takes_drafts()
        async with self.opened() as executor:
            prompt = self.prompt(_LENGTH, salt=1)
            for name, sampling in _SAMPLINGS.items():
                (text,) = await self.generate(executor, prompt, _DRAFTS + 4, sampling=sampling)
                for right in (0, 1, 4, _DRAFTS - 1):
                    drafts = list(text[:_DRAFTS])
                    drafts[right] = (drafts[right] + 1) % self.vocab_size
                    got = await self.verified(executor, prompt, drafts, sampling)
                    what = f"{name}, {right} right drafts and a wrong one"
                    self.check_tokens(got, text[: right + 1], what)
                    for i in range(0 if self.tolerance.repeat else 3):
                        start = len(prompt) + right + i
                        piece = Slice(0, start, self.pages(0), FOLLOW_ON, sample=True)
                        (output,) = await self.run(executor, Step(10 + i, (piece,)))
                        got.append(output.token)
                    self.check_tokens(got, text[: right + 4], f"{what}, and three steps more")

    @in_trio
    async def test_an_end_among_drafts(self) -> None:
        self._takes_drafts()
        async with self.opened() as executor:
            prompt = self.prompt(_LENGTH, salt=2)
            (text,) = await self.generate(executor, prompt, _DRAFTS + 1, sampling=SEEDED)
            ends = frozenset({text[4]})
            got = await self.verified(executor, prompt, text[:-1], SEEDED, ends=ends)
            self.check_tokens(got, text[: text.index(text[4]) + 1], "a right draft that ends the sequence")

    @in_trio
    async def test_drafts_of_several_sequences(self) -> None:
        """In one step, more of them than an executor may compute logits of at once."""
        self._takes_drafts()
        async with self.opened() as executor:
            prompts = [self.prompt(_LENGTH, salt=3), self.prompt(40, salt=4), self.prompt(60, salt=5)]
            counts, texts = (50, 3, 20), []
            for slot, (prompt, count) in enumerate(zip(prompts, counts, strict=True)):
                texts += await self.generate(executor, prompt, count + 1, (slot,), SEEDED)
            binds = tuple(Bind(slot, SEEDED, prompt) for slot, prompt in enumerate(prompts))
            begin = tuple(Slice(slot, 0, self.pages(slot), each[:-1]) for slot, each in enumerate(prompts))
            await self.run(executor, Step(1, begin, binds))
            pieces = tuple(
                self.drafted(prompt, text[:-1], slot)
                for slot, (prompt, text) in enumerate(zip(prompts, texts, strict=True))
            )
            outputs = await self.run(executor, Step(2, pieces))
            for output, text, count, prompt in zip(outputs, texts, counts, prompts, strict=True):
                tokens = self.tokens(output.sampled, count)
                self.check_own(tokens, output.rows, prompt, text[:-1], SEEDED)
                self.check_tokens(tokens, text, f"{count} drafts beside others")

    @in_trio
    async def test_log_probabilities_of_drafts(self) -> None:
        self._takes_drafts()
        sampling = replace(SEEDED, logprobs=3)
        async with self.opened() as executor:
            prompt = self.prompt(_LENGTH, salt=6)
            (first,) = await self.run(executor, self.prefill(1, prompt, 0, sampling))
            singles = [first.sampled]
            for i in range(3):
                (output,) = await self.run(executor, self.following(2 + i, len(prompt) + i))
                singles.append(output.sampled)
            drafts = [each.token for each in singles[:-1] if isinstance(each, Sampled)]
            await self.run(
                executor,
                Step(8, (Slice(0, 0, self.pages(0), prompt[:-1]),), (Bind(0, sampling, prompt),)),
            )
            (output,) = await self.run(executor, Step(9, (self.drafted(prompt, drafts),)))
            got = self.tokens(output.sampled, len(drafts))
            self.check_own(got, output.rows, prompt, drafts, sampling)
            assert isinstance(output.sampled, Verified)
            if self.tolerance.repeat and len(got) < len(singles):
                return  # of near ties another token: nothing to compare with
            for each, expected in zip(output.sampled.outcomes, singles, strict=True):
                assert isinstance(each, Sampled)
                assert isinstance(expected, Sampled)
                values, right = dict(each.top), dict(expected.top)
                assert len(each.top) == 3, f"the top tokens are {each.top}, three were asked for"
                near = 1e-3 + 8 * self.tolerance.repeat
                assert all(
                    abs(values[token] - right[token]) < near for token in values.keys() & right.keys()
                ), f"the top tokens are {each.top}, of single steps {expected.top}"
                assert self.tolerance.repeat or list(values) == list(right), (
                    f"the top tokens are {each.top}, of single steps {expected.top}"
                )
                assert abs(each.logprob - expected.logprob) < near
