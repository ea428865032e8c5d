"""Executors that are wrong about logits of the model itself that are NaN or infinite."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pi2rt.runtime.step import Floats, Outcome, Sampled, Slice, Step, StepResult, Unusable, Verified
from tests.testing.draft_mutants import Drafting
from tests.testing.mask_mutants import MaskWrapper
from tests.testing.mutant import Mutant
from tests.testing.output_mutants import (
    FailsTheStep,
    PicksATokenFromNoNumbers,
    SpoilsTheOthers,
    StaysUnusable,
)
from tests.testing.wrappers import Wrapper


class ChangesOutcomes(Wrapper):
    def change_outcome(self, piece: Slice, outcome: Outcome | None) -> Outcome | None:
        return outcome

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        changed = (self.change_outcome(*each) for each in zip(step.slices, result.sampled, strict=True))
        return replace(result, sampled=tuple(changed))


class BlamesAParameter(ChangesOutcomes):
    def change_outcome(self, piece: Slice, outcome: Outcome | None) -> Outcome | None:
        return Unusable(("logit_bias",)) if outcome == Unusable() else outcome


class SpoilsTheNextStep(Wrapper):
    """What was submitted before the unusable result was told is unusable too."""

    spoilt: frozenset[int] = frozenset()

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        spoilt = step.id in self.spoilt
        if Unusable() in result.sampled:
            self.spoilt = frozenset(each.id for each in self.in_flight)
        if not spoilt:
            return result
        return replace(result, sampled=tuple(each and Unusable() for each in result.sampled))


class PoisonsTheNeighbours(ChangesOutcomes):
    """Slots beside an unusable one get the first token of the vocabulary, from then on."""

    unusable: int | None = None

    def change_outcome(self, piece: Slice, outcome: Outcome | None) -> Outcome | None:
        if outcome == Unusable():
            self.unusable = piece.slot
        poisoned = self.unusable not in (None, piece.slot)
        return Sampled(0) if poisoned and isinstance(outcome, Sampled) else outcome


class ShowsNumbers(Wrapper):
    def shown(self, logits: Floats | None) -> Floats | None:
        return None if logits is None else np.nan_to_num(logits)

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        return replace(result, logits=tuple(map(self.shown, result.logits)))


class ShowsNanForAll(Wrapper):
    """Of a slice, one position of which has it."""

    def shown(self, logits: Floats | None) -> Floats | None:
        return logits if logits is None or np.isfinite(logits).all() else np.full_like(logits, np.nan)

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        return replace(result, logits=tuple(map(self.shown, result.logits)))


class ScoresNothing(Wrapper):
    """In a step in which a score is NaN."""

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        if not any(each is not None and np.isnan(each).any() for each in result.scores):
            return result
        scores = tuple(None if each is None else np.full_like(each, np.nan) for each in result.scores)
        return replace(result, scores=scores)


class FailsAStepWithoutTokens(Wrapper):
    def change_result(self, step: Step, result: StepResult) -> StepResult:
        if all(each == Unusable() for each in result.sampled):
            raise ValueError("no slice has a token")
        return result


class EndsBeforeNan(Drafting):
    """As if the first draft were wrong."""

    def change_outcomes(self, piece: Slice, verified: Verified) -> Verified:
        return Verified(tuple(each for each in verified.outcomes if each != Unusable()))


class SaysUnusableForDrafts(ChangesOutcomes):
    verifies_drafts = True

    def change_outcome(self, piece: Slice, outcome: Outcome | None) -> Outcome | None:
        return Unusable() if outcome == Verified((Unusable(),)) else outcome


class BlamesTheMask(MaskWrapper):
    def change_result(self, step: Step, result: StepResult) -> StepResult:
        sampled = (Unusable(("token_mask",)) if each == Unusable() else each for each in result.sampled)
        return replace(result, sampled=tuple(sampled))


_ONE, _OPTIONS = "test_the_models_own_nan_concerns_one_slice", {"options": {}}
_DECODED, _AROUND = "test_nan_among_decoded_sequences", "test_logits_and_scores_around_nan"
_DRAFTS = "test_nan_among_drafts"

MUTANTS = [
    Mutant(FailsTheStep, _ONE, "step 1 failed with .*logits are not numbers", _OPTIONS),
    Mutant(
        PicksATokenFromNoNumbers, _ONE, r"slot 1 of 3: .* must be Unusable.*, not Sampled\(token=0", _OPTIONS
    ),
    Mutant(
        BlamesAParameter, _ONE, r"must be Unusable\(parameters=\(\)\), not Unusable.*logit_bias", _OPTIONS
    ),
    Mutant(SpoilsTheOthers, _ONE, "must be Unusable|beside one whose logits are NaN", _OPTIONS),
    Mutant(SpoilsTheNextStep, _ONE, "slot 0, beside one whose logits are NaN: the result is Unus", _OPTIONS),
    Mutant(PoisonsTheNeighbours, _ONE, "slot 0, beside one whose logits are NaN: tokens are", _OPTIONS),
    Mutant(StaysUnusable, _ONE, "slot 1, whose logits were NaN, bound again: the result is Un", _OPTIONS),
    Mutant(
        PoisonsTheNeighbours, _DECODED, "slot [02], decoded beside one whose logits became NaN: tokens are"
    ),
    Mutant(ShowsNumbers, _AROUND, r"the logits of positions \[7, 8, 9, 10, 11\] could be sampled from"),
    Mutant(ShowsNanForAll, _AROUND, "before position 7, where logits are NaN: logits of 7 of 7"),
    Mutant(ScoresNothing, _AROUND, "scores beside logits that are NaN are"),
    Mutant(FailsAStepWithoutTokens, "test_a_step_of_nan_alone", "step 0 failed with .*no slice has a token"),
    Mutant(EndsBeforeNan, _DRAFTS, "the first draft is right, and logits after it are NaN"),
    Mutant(SaysUnusableForDrafts, _DRAFTS, r"must be Verified.*, not Unusable"),
    Mutant(BlamesTheMask, "test_nan_behind_a_mask", r"must be Unusable.*, not Unusable.*token_mask"),
]
