"""Executors that are wrong about drafts."""

from __future__ import annotations

from dataclasses import replace

from pi2rt.runtime.step import Sampled, Slice, Step, StepResult, Verified
from tests.testing.mutant import Mutant
from tests.testing.wrappers import Wrapper


class Drafting(Wrapper):
    verifies_drafts = True

    def change_outcomes(self, piece: Slice, verified: Verified) -> Verified:
        return verified

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        sampled = tuple(
            self.change_outcomes(piece, each) if isinstance(each, Verified) else each
            for piece, each in zip(step.slices, result.sampled, strict=True)
        )
        return replace(result, sampled=sampled)


class VerifiesNone(Drafting):
    def change_outcomes(self, piece: Slice, verified: Verified) -> Verified:
        return Verified(verified.outcomes[:1])


class BelievesAll(Drafting):
    """Of wrong drafts too it goes on behind them."""

    def change_outcomes(self, piece: Slice, verified: Verified) -> Verified:
        found = len(verified.outcomes)
        believed = tuple(Sampled(int(token)) for token in piece.tokens[found + 1 :])
        return Verified((*verified.outcomes, *believed))


class KnowsNoEnds(Drafting):
    def change_step(self, step: Step) -> Step:
        return replace(step, binds=tuple(replace(bind, ends=frozenset()) for bind in step.binds))


class MixesUpSequences(Drafting):
    def change_result(self, step: Step, result: StepResult) -> StepResult:
        several = len(step.slices) > 1 and all(piece.drafts for piece in step.slices)
        return replace(result, sampled=result.sampled[::-1]) if several else result


class ForgetsTheTop(Drafting):
    def change_outcomes(self, piece: Slice, verified: Verified) -> Verified:
        outcomes = [
            replace(each, top=()) if isinstance(each, Sampled) else each for each in verified.outcomes
        ]
        return Verified(tuple(outcomes))


class SaysSampled(Drafting):
    """The last one alone."""

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        sampled = tuple(each.outcomes[-1] if isinstance(each, Verified) else each for each in result.sampled)
        return replace(result, sampled=sampled)


MUTANTS = [
    Mutant(VerifiesNone, "test_right_drafts", "9 drafts .*: the outcomes are"),
    Mutant(SaysSampled, "test_right_drafts", "a slice with 9 drafts brought Sampled"),
    Mutant(BelievesAll, "test_wrong_drafts", "9 drafts .*: the outcomes are"),
    Mutant(KnowsNoEnds, "test_an_end_among_drafts", "9 drafts .*: the outcomes are"),
    Mutant(MixesUpSequences, "test_drafts_of_several_sequences", "outcomes"),
    Mutant(ForgetsTheTop, "test_log_probabilities_of_drafts", "the top tokens are"),
]
