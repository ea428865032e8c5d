"""Executors whose logits, scores, log probabilities and unusable results are wrong."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from pi2rt.executors.reference.sampling import log_softmax, penalised
from pi2rt.runtime.step import Floats, Int32s, Sampled, Sampling, Slice, Step, StepResult, Unusable
from tests.testing.mutant import Mutant
from tests.testing.wrappers import Resampling, Wrapper


class PicksTheLeastLikely(Resampling):
    def pick(
        self, logits: Floats, sampling: Sampling, counts: Int32s, position: int, place: int
    ) -> Sampled | Unusable:
        return Sampled(int(logits.argmin()))


class PicksOtherwiseWithoutLogits(Resampling):
    """Another way through the program, where only the last token's logits are computed."""

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        self.shown = step.slices[0].logits
        return super().change_result(step, result)

    def pick(
        self, logits: Floats, sampling: Sampling, counts: Int32s, position: int, place: int
    ) -> Sampled | Unusable:
        return super().pick(logits if self.shown else -logits, sampling, counts, position, place)


class ShowsTheLastLogitsOnly(Wrapper):
    def change_result(self, step: Step, result: StepResult) -> StepResult:
        return replace(result, logits=tuple(None if each is None else each[-1:] for each in result.logits))


class ShiftsTargets(Wrapper):
    """A target is scored where the next one belongs."""

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        shifted = tuple(None if each is None else np.roll(each, 1) for each in result.scores)
        return replace(result, scores=shifted)


class ScoresNegativeTargets(Wrapper):
    """As numpy does: from the end of the vocabulary."""

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        scores = []
        for piece, values in zip(step.slices, result.scores, strict=True):
            if values is not None and piece.targets is not None:
                values = np.where(piece.targets < 0, np.float32(-5.7), values)
            scores.append(values)
        return replace(result, scores=tuple(scores))


class ScoresLogits(Wrapper):
    """Not log probabilities."""

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        shifted = tuple(
            None if each is None else np.where(each != 0, each + 3, each) for each in result.scores
        )
        return replace(result, scores=shifted)


class ReversesOutputs(Wrapper):
    def change_result(self, step: Step, result: StepResult) -> StepResult:
        return replace(
            result, sampled=result.sampled[::-1], scores=result.scores[::-1], logits=result.logits[::-1]
        )


class SamplesAlways(Wrapper):
    """Also where nobody asked."""

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        return replace(result, sampled=tuple(Sampled(0) if each is None else each for each in result.sampled))


class ChangesSampled(Wrapper):
    def changed(self, sampled: Sampled) -> Sampled:
        raise NotImplementedError

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        changed = (self.changed(each) if isinstance(each, Sampled) else each for each in result.sampled)
        return replace(result, sampled=tuple(changed))


class TopUnsorted(ChangesSampled):
    def changed(self, sampled: Sampled) -> Sampled:
        return replace(sampled, top=sampled.top[::-1])


class TopOneShort(ChangesSampled):
    def changed(self, sampled: Sampled) -> Sampled:
        return replace(sampled, top=sampled.top[:-1])


class TopIsNotTheTop(ChangesSampled):
    """It lists tokens near the one that was sampled."""

    def changed(self, sampled: Sampled) -> Sampled:
        return replace(sampled, top=tuple((token + 1, value) for token, value in sampled.top))


class LogprobAlways(ChangesSampled):
    def changed(self, sampled: Sampled) -> Sampled:
        return replace(sampled, logprob=-1.0) if np.isnan(sampled.logprob) else sampled


class LogprobOfBase2(ChangesSampled):
    def changed(self, sampled: Sampled) -> Sampled:
        return replace(sampled, logprob=sampled.logprob / np.log(2))


class LogprobAfterTemperature(Resampling):
    def pick(
        self, logits: Floats, sampling: Sampling, counts: Int32s, position: int, place: int
    ) -> Sampled | Unusable:
        picked = super().pick(logits, sampling, counts, position, place)
        changed = penalised(logits, sampling, counts)
        if isinstance(picked, Unusable) or isinstance(changed, Unusable) or sampling.logprobs < 0:
            return picked
        logprobs = log_softmax(changed / np.float32(sampling.temperature or 1.0))
        return replace(picked, logprob=float(logprobs[picked.token]))


class PicksATokenFromNoNumbers(Wrapper):
    def change_result(self, step: Step, result: StepResult) -> StepResult:
        picked = (Sampled(0) if isinstance(each, Unusable) else each for each in result.sampled)
        return replace(result, sampled=tuple(picked))


class BlamesNothing(Wrapper):
    def change_result(self, step: Step, result: StepResult) -> StepResult:
        blank = (Unusable() if isinstance(each, Unusable) else each for each in result.sampled)
        return replace(result, sampled=tuple(blank))


class FailsTheStep(Wrapper):
    def change_result(self, step: Step, result: StepResult) -> StepResult:
        if any(isinstance(each, Unusable) for each in result.sampled):
            raise ValueError("logits are not numbers")
        return result


class SpoilsTheOthers(Wrapper):
    def change_result(self, step: Step, result: StepResult) -> StepResult:
        if any(isinstance(each, Unusable) for each in result.sampled):
            return replace(
                result, sampled=tuple(each and Unusable(("logit_bias",)) for each in result.sampled)
            )
        return result


class StaysUnusable(Resampling):
    """A slot that was, bound again or not."""

    def __init__(self) -> None:
        super().__init__()
        self.spoilt: set[int] = set()

    def continued(self, piece: Slice) -> int:
        return 0 if piece.slot in self.spoilt else super().continued(piece)

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        changed = super().change_result(step, result)
        sampled = []
        for piece, each in zip(step.slices, changed.sampled, strict=True):
            if isinstance(each, Unusable):
                self.spoilt.add(piece.slot)
            elif piece.slot in self.spoilt:
                each = Unusable()
            sampled.append(each)
        return replace(changed, sampled=tuple(sampled))


_UNUSABLE = "test_logits_that_cannot_be_used_concern_one_slice"
_FORBIDDEN: Mapping[str, Any] = {"blamed": "logit_bias", "bias": -np.inf, "others": {}}

MUTANTS = [
    Mutant(PicksTheLeastLikely, "test_logits_and_sampled_token_agree", "greedy sampling picked token"),
    Mutant(
        PicksOtherwiseWithoutLogits,
        "test_logits_and_sampled_token_agree",
        "after 1 tokens, without logits: tokens are",
    ),
    Mutant(
        ShowsTheLastLogitsOnly,
        "test_logits_and_sampled_token_agree",
        r"logits must be float32 \(9, 320\), but is float32 \(1, 320\)",
    ),
    Mutant(ShiftsTargets, "test_scores", r"with logits: the score of target \d+, token \d+, is"),
    Mutant(ScoresNegativeTargets, "test_scores", "scores of negative targets must be 0"),
    Mutant(ScoresLogits, "test_scores", "by the logits of the same step its log probability"),
    Mutant(ReversesOutputs, "test_each_slice_gets_what_it_asked_for", "was asked for|was not asked for"),
    Mutant(
        SamplesAlways,
        "test_each_slice_gets_what_it_asked_for",
        "sampled must be None, since it was not asked",
    ),
    Mutant(TopUnsorted, "test_logprobs", "top must begin with the most likely token"),
    Mutant(TopOneShort, "test_logprobs", "2 entries in top, 3 log probabilities were asked for"),
    Mutant(TopIsNotTheTop, "test_logprobs", r"top gives token \d+ a log probability of"),
    Mutant(LogprobAlways, "test_logprobs", "logprob must be NaN where it was not asked for"),
    Mutant(LogprobOfBase2, "test_logprobs", "by the logits it is"),
    Mutant(LogprobAfterTemperature, "test_logprobs", "the distribution before the temperature"),
    Mutant(PicksATokenFromNoNumbers, _UNUSABLE, "logit_bias leaves no token to pick", _FORBIDDEN),
    Mutant(BlamesNothing, _UNUSABLE, "must be Unusable", _FORBIDDEN),
    Mutant(FailsTheStep, _UNUSABLE, "step 1 failed with .*logits are not numbers", _FORBIDDEN),
    Mutant(
        SpoilsTheOthers, _UNUSABLE, "slot 0, beside an unusable slice: the results are Unusable", _FORBIDDEN
    ),
    Mutant(
        StaysUnusable,
        _UNUSABLE,
        "the slot that was unusable, bound again: the result is Unusable",
        _FORBIDDEN,
    ),
]
