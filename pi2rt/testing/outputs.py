"""Logits, scores, log probabilities and unusable results agree with each other and with what was asked for."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pi2rt.executors.reference.sampling import log_softmax
from pi2rt.runtime.step import Bind, Floats, Int32s, Sampled, Sampling, Slice, Step, Unusable
from pi2rt.testing.harness import FOLLOW_ON, GREEDY, Harness, in_trio, shown


class Outputs(Harness):
    """``StepResult`` and ``Sampled``."""

    def check_scores(self, scores: Floats | None, logits: Floats, targets: Int32s, what: str) -> None:
        assert scores is not None
        skipped = targets < 0
        expected = log_softmax(logits)[np.arange(len(targets)), targets]
        error = np.abs(scores - expected)[~skipped]
        worst = int(np.flatnonzero(~skipped)[error.argmax()])
        assert error.max() <= self.tolerance.scores, (
            f"{what}: the score of target {worst}, token {targets[worst]}, is {scores[worst]}, but by the logits of "
            f"the same step its log probability after token {worst} of the slice is {expected[worst]:.5f}"
        )
        assert not scores[skipped].any(), (
            f"{what}: scores of negative targets must be 0, since they are skipped, not {scores[skipped].tolist()}"
        )

    @in_trio
    async def test_logits_and_sampled_token_agree(self) -> None:
        async with self.opened() as executor:
            for length in (1, 9, 70):
                (output,) = await self.run(executor, self.prefill(length, self.prompt(length), logits=True))
                likeliest = int(output.rows[-1].argmax())
                assert output.token == likeliest, (
                    f"greedy sampling picked token {output.token} after {length} tokens, the largest of the last "
                    f"logits is that of {likeliest}"
                )
                (plain,) = await self.run(executor, self.prefill(length, self.prompt(length)))
                what = f"after {length} tokens, without logits"
                prompt = self.prompt(length)
                await self.check_text(executor, prompt, GREEDY, [plain.token], [output.token], what)

    @in_trio
    async def test_scores(self) -> None:
        async with self.opened() as executor:
            prompt = self.prompt(80)
            targets = np.append(prompt[1:], -1).astype(np.int32)
            targets[[0, 3, 64]] = -1, -7, -1
            piece = Slice(0, 0, self.pages(0), prompt, targets=targets, logits=True)
            (output,) = await self.run(executor, Step(1, (piece,), (Bind(0, GREEDY, prompt),)))
            self.check_scores(output.scores, output.rows, targets, "with logits")
            alone = Slice(1, 0, self.pages(1), prompt, targets=targets)
            (scored,) = await self.run(executor, Step(2, (alone,), (Bind(1, GREEDY, prompt),)))
            self.check_scores(scored.scores, output.rows, targets, "without logits")

    @in_trio
    async def test_each_slice_gets_what_it_asked_for(self) -> None:
        """Aligned with the slices, whatever the others ask for."""
        async with self.opened() as executor:
            texts = [self.prompt(length, salt) for salt, length in enumerate((9, 5, 12))]
            targets = np.append(texts[2][1:], -1).astype(np.int32)
            slices = (
                Slice(2, 0, self.pages(2), texts[2], targets=targets),
                Slice(0, 0, self.pages(0), texts[0], sample=True),
                Slice(1, 0, self.pages(1), texts[1], logits=True),
            )
            binds = tuple(Bind(slot, GREEDY, text) for slot, text in enumerate(texts))
            scored, sampled, shown = await self.run(executor, Step(1, slices, binds))
            (right,) = await self.run(executor, self.prefill(2, texts[0], logits=True))
            await self.check_text(executor, texts[0], GREEDY, [sampled.token], [right.token], "slice 1 of 3")
            (right,) = await self.run(executor, self.prefill(3, texts[1], logits=True))
            self.check_same(shown.rows, right.rows, "slice 2 of 3")
            (right,) = await self.run(executor, self.prefill(4, texts[2], logits=True))
            self.check_scores(scored.scores, right.rows, targets, "slice 0 of 3")

    @in_trio
    async def test_logprobs(self) -> None:
        async with self.opened() as executor:
            prompt = self.prompt(9)
            silent = (await self.run(executor, self.prefill(1, prompt)))[0].sampled
            assert isinstance(silent, Sampled)
            assert math.isnan(silent.logprob), "logprob must be NaN where it was not asked for"
            assert silent.top == (), "top must be empty where it was not asked for"
            for number, (temperature, count) in enumerate(((0.0, 0), (0.0, 3), (2.0, 5))):
                for salt in range(4):
                    prompt = self.prompt(9, salt)
                    sampling = Sampling(temperature=temperature, seed=salt, logprobs=count)
                    step = self.prefill(10 * number + salt, prompt, sampling=sampling, logits=True)
                    (output,) = await self.run(executor, step)
                    self._check_logprobs(output.sampled, log_softmax(output.rows[-1]), count, sampling)

    def _check_logprobs(
        self, sampled: object, expected: npt.NDArray[np.float64], count: int, sampling: Sampling
    ) -> None:
        assert isinstance(sampled, Sampled)
        allowed = self.tolerance.scores
        right = expected[sampled.token]
        assert abs(sampled.logprob - right) <= allowed, (
            f"logprob {sampled.logprob} of token {sampled.token}, by the logits it is {right:.5f}; it is of the "
            f"distribution before the temperature ({shown(sampling)})"
        )
        assert len(sampled.top) == count, (
            f"{len(sampled.top)} entries in top, {count} log probabilities were asked for"
        )
        values = [value for _, value in sampled.top]
        assert values == sorted(values, reverse=True), f"top must begin with the most likely token: {values}"
        assert len({token for token, _ in sampled.top}) == count, (
            f"a token stands twice in top: {sampled.top}"
        )
        best = np.sort(expected)[::-1][:count]
        assert np.abs(best - values).max(initial=0.0) <= allowed, (
            f"top has {values}, the largest log probabilities are {best.round(5).tolist()}"
        )
        for token, value in sampled.top:
            assert abs(expected[token] - value) <= allowed, (
                f"top gives token {token} a log probability of {value}, by the logits it is {expected[token]:.5f}"
            )

    @pytest.mark.parametrize(
        ("blamed", "bias", "others"),
        [
            ("logit_bias", -math.inf, {}),
            ("logit_bias", -math.inf, {"temperature": 1.0, "top_k": 3, "min_p": 0.5, "logprobs": 2}),
            ("logit_bias", math.inf, {}),
            ("logit_bias", math.nan, {"temperature": 1.0}),
            ("repetition_penalty", 100.0, {"repetition_penalty": 1e-38}),  # 100 / 1e-38 is no float32
        ],
    )
    @in_trio
    async def test_logits_that_cannot_be_used_concern_one_slice(
        self, blamed: str, bias: float, others: dict[str, Any]
    ) -> None:
        """Neither the other slices of the step, nor what the slot is bound to next."""
        async with self.opened() as executor:
            prompt = self.prompt(9)
            (right,) = await self.generate(executor, prompt, 3)
            biased = range(self.vocab_size) if bias == -math.inf else prompt[:1].tolist()
            sampling = Sampling(logit_bias=tuple((token, bias) for token in biased), **others)
            of_slot = (GREEDY, sampling, GREEDY)
            slices = tuple(Slice(slot, 0, self.pages(slot), prompt, sample=True) for slot in range(3))
            binds = tuple(Bind(slot, each, prompt) for slot, each in enumerate(of_slot))
            follow = tuple(Slice(slot, 9, self.pages(slot), FOLLOW_ON, sample=True) for slot in range(3))
            outputs = await self.run(executor, Step(1, slices, binds))
            assert outputs[1].sampled == Unusable((blamed,)), (
                f"{blamed} leaves no token to pick, so the result must be {Unusable((blamed,))}, not "
                f"{outputs[1].sampled}"
            )
            then = await self.run(
                executor, Step(2, follow)
            )  # the engine is a step ahead when it learns of it
            for slot in (0, 2):
                both = (outputs[slot].sampled, then[slot].sampled)
                got = [each.token for each in both if isinstance(each, Sampled)]
                what = f"slot {slot}, beside an unusable slice"
                assert len(got) == 2, f"{what}: the results are {both[0]} and {both[1]}"
                await self.check_text(executor, prompt, GREEDY, got, right[:2], what)
            (again,) = await self.run(executor, self.prefill(3, prompt, 1))
            what = "the slot that was unusable, bound again"
            assert isinstance(again.sampled, Sampled), f"{what}: the result is {again.sampled}"
            await self.check_text(executor, prompt, GREEDY, [again.token], right[:1], what)
