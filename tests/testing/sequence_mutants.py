"""Executors that mix up chunks, batches, pages, slots and sequences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from pi2rt._errors import RequestError
from pi2rt.formats import ModelFile
from pi2rt.memory import StateStore
from pi2rt.models import ModelDescription
from pi2rt.models.states import PAGE_TOKENS
from pi2rt.runtime.executor import ExecutorOptions, Progress, make_store
from pi2rt.runtime.step import Floats, Int32s, Sampled, Sampling, Slice, Step, StepResult, Unusable
from pi2rt.testing.harness import GREEDY, SEEDED
from tests.testing.mutant import Mutant
from tests.testing.wrappers import Inexact, Resampling, Wrapper


def with_pages(piece: Slice, pages: Int32s) -> Slice:
    return replace(piece, pages=np.ascontiguousarray(pages, np.int32))


class NeverTheSameAgain(Resampling):
    """It begins to count anew in no sequence."""

    picked = 0

    def pick(
        self, logits: Floats, sampling: Sampling, counts: Int32s, position: int, place: int
    ) -> Sampled | Unusable:
        self.picked += 1
        return Sampled(int(np.argsort(-logits)[self.picked % 5]))


class SamplesByPlace(Resampling):
    """The random number depends on the slice's place in the step."""

    def pick(
        self, logits: Floats, sampling: Sampling, counts: Int32s, position: int, place: int
    ) -> Sampled | Unusable:
        return super().pick(logits, replace(sampling, seed=sampling.seed + place), counts, position, place)


class SamplesByStep(Resampling):
    """The random number depends on what was sampled before, for whatever sequence."""

    drawn = 0

    def pick(
        self, logits: Floats, sampling: Sampling, counts: Int32s, position: int, place: int
    ) -> Sampled | Unusable:
        self.drawn += 1
        return super().pick(logits, sampling, counts, self.drawn, place)


class SharesTheFirstLogits(Resampling):
    """All slices of a batch get the logits of the first."""

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        same = tuple(None if each is None else result.logits[0] for each in result.logits)
        single = all(piece.count == 1 for piece in step.slices)
        return super().change_result(step, replace(result, logits=same) if single else result)


class ShiftsLaterChunks(Wrapper):
    """Positions of a chunk that does not begin a sequence are one too many, as in a wrong argument of RoPE."""

    def change_step(self, step: Step) -> Step:
        slices = (
            replace(piece, start=piece.start + 1) if piece.start and piece.count > 1 else piece
            for piece in step.slices
        )
        return replace(step, slices=tuple(slices))


class RefusesMixedSteps(Wrapper):
    def change_step(self, step: Step) -> Step:
        if len({piece.count == 1 for piece in step.slices}) == 2:
            raise RequestError("prompts and single tokens do not go together")
        return step


class MixesUpMixedSteps(Wrapper):
    """The longest slice goes first, and results are not sorted back."""

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        order = sorted(range(len(step.slices)), key=lambda each: -step.slices[each].count)
        return replace(
            result,
            sampled=tuple(result.sampled[each] for each in order),
            scores=tuple(result.scores[each] for each in order),
            logits=tuple(result.logits[each] for each in order),
        )


class PagesAreContiguous(Wrapper):
    """It looks at the first entry of a page table alone."""

    def change_step(self, step: Step) -> Step:
        slices = (
            with_pages(piece, (piece.pages[0] + np.arange(len(piece.pages))) % 16) for piece in step.slices
        )
        return replace(step, slices=tuple(slices))


class SortsPages(Wrapper):
    def change_step(self, step: Step) -> Step:
        slices = (
            with_pages(piece, np.sort(piece.pages[: -(-(piece.start + piece.count) // PAGE_TOKENS)]))
            for piece in step.slices
        )
        return replace(step, slices=tuple(slices))


class OnePageForAll(Wrapper):
    def change_step(self, step: Step) -> Step:
        slices = (with_pages(piece, np.full_like(piece.pages, piece.pages[0])) for piece in step.slices)
        return replace(step, slices=tuple(slices))


class PagesBySlot(Wrapper):
    """It gives each slot pages of its own, whatever the table says, so that no prefix is shared."""

    def change_step(self, step: Step) -> Step:
        slices = (with_pages(piece, piece.slot * 4 + np.arange(4)) for piece in step.slices)
        return replace(step, slices=tuple(slices))


class Scribbles(Wrapper):
    """Destroys pages after a step."""

    def pages(self, piece: Slice) -> list[int]:
        raise NotImplementedError

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        assert self.store is not None
        for page in {page for piece in step.slices for page in self.pages(piece)}:
            self.store.import_page(page, np.zeros_like(self.store.export_page(page)))
        return result


class WritesSharedPages(Scribbles):
    """Those before a sequence's own."""

    def pages(self, piece: Slice) -> list[int]:
        first = piece.start // PAGE_TOKENS
        return [int(piece.pages[0])] if first and piece.sample and piece.count > 10 else []


class WritesTheNextPage(Scribbles):
    """The one behind the last of a sequence, in memory."""

    def pages(self, piece: Slice) -> list[int]:
        end = piece.start + piece.count
        last = int(piece.pages[-(-end // PAGE_TOKENS) - 1])
        return [last + 1] if end % PAGE_TOKENS == 0 and last + 1 < 16 else []


class GoesOnBehindTheEnd(Wrapper):
    def change_step(self, step: Step) -> Step:
        return replace(step, binds=tuple(replace(bind, ends=frozenset()) for bind in step.binds))


class KnowsNoLimit(Wrapper):
    def change_step(self, step: Step) -> Step:
        return replace(step, binds=tuple(replace(bind, limit=None) for bind in step.binds))


class EndsAllSlots(Resampling):
    """Of a step in which one sequence ends."""

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        changed = super().change_result(step, result)
        if self.ended:
            self.ended |= {piece.slot for piece in step.slices}
        return changed


class CopiesNothing(Wrapper):
    def change_step(self, step: Step) -> Step:
        return replace(step, copies=())


class CopiesInReverse(Wrapper):
    def change_step(self, step: Step) -> Step:
        return replace(step, copies=step.copies[::-1])


class CopiesAfterTheSlices(CopiesNothing):
    def change_result(self, step: Step, result: StepResult) -> StepResult:
        assert self.store is not None
        for copy in step.copies:
            self.store.copy_page(copy.source, copy.target)
        return result


class KeepsTheSlotsTokens(Wrapper):
    """A slot's first token is that of the sequence before, where that was longer."""

    def __init__(self) -> None:
        super().__init__()
        self.longest: dict[int, Int32s] = {}

    def change_step(self, step: Step) -> Step:
        slices = []
        for piece in step.slices:
            before = self.longest.get(piece.slot, piece.tokens)
            if len(piece.tokens) >= len(before):
                self.longest[piece.slot] = piece.tokens
            elif len(piece.tokens) and piece.start == 0:
                piece = replace(piece, tokens=np.append(before[:1], piece.tokens[1:]).astype(np.int32))
            slices.append(piece)
        return replace(step, slices=tuple(slices))


class BindsWhatRuns(Wrapper):
    """A bind whose slot has no slice in the same step is lost."""

    def change_step(self, step: Step) -> Step:
        slots = {piece.slot for piece in step.slices}
        return replace(step, binds=tuple(bind for bind in step.binds if bind.slot in slots))


class ContinuesWhatItHasSeen(Wrapper):
    """A slice without tokens continues the newest token that was waited for, not the one of the step before."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[int, int] = {}

    def change_step(self, step: Step) -> Step:
        slices = (
            piece
            if len(piece.tokens)
            else replace(piece, tokens=np.array([self.seen.get(piece.slot, 0)], np.int32))
            for piece in step.slices
        )
        return replace(step, slices=tuple(slices))

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        for piece, sampled in zip(step.slices, result.sampled, strict=True):
            if isinstance(sampled, Sampled):
                self.seen[piece.slot] = sampled.token
        return result


class ContinuesTheLastGivenToken(Resampling):
    def change_step(self, step: Step) -> Step:
        changed = super().change_step(step)
        for piece in step.slices:
            if len(piece.tokens):
                self.given = int(piece.tokens[-1])
        return changed

    def continued(self, piece: Slice) -> int:
        return self.given


class KeepsItsOwnState(Wrapper):
    """It says that it borrows KV pages, and uses others."""

    async def open(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None,
        progress: Progress,
    ) -> None:
        await super().open(file, model, options, make_store(self.inner, model, options), progress)


class BreaksAtSomePages(Wrapper):
    """A chunk that ends a few positions behind a page, as an error that shows in some steps alone."""

    def change_step(self, step: Step) -> Step:
        slices = (
            replace(piece, tokens=np.append(piece.tokens[:-1], np.int32(0)).astype(np.int32))
            if (piece.start + piece.count) % PAGE_TOKENS < 12 and len(piece.tokens) > 1 and piece.start
            else piece
            for piece in step.slices
        )
        return replace(step, slices=tuple(slices))


class ForgetsInAFullBatch(Wrapper):
    """With three slices, the last one of several tokens begins anew."""

    def change_step(self, step: Step) -> Step:
        if len(step.slices) < 3 or step.slices[2].count == 1 or not step.slices[2].start:
            return step
        *others, last = step.slices
        return replace(step, slices=(*others, replace(last, start=0)))


_GREEDY = {"sampling": GREEDY}
_SEEDED = {"sampling": SEEDED}
_SKIPPED = "test_slices_behind_the_end_are_skipped"

MUTANTS = [
    Mutant(
        NeverTheSameAgain,
        "test_same_again",
        "the same prompt again, in slot 2 of executor 0: tokens are",
        _GREEDY,
    ),
    Mutant(
        SamplesByStep,
        "test_same_again",
        "the same prompt again, in slot 2 of executor 0: tokens are",
        _SEEDED,
    ),
    Mutant(
        SamplesByPlace,
        "test_text_does_not_depend_on_the_batch",
        "slice 1 of 3 in a step: tokens are",
        _SEEDED,
    ),
    Mutant(SharesTheFirstLogits, "test_prompts_and_decoding_in_one_step", "tokens of slot"),
    Mutant(Inexact, "test_prefill_in_chunks", r"relative error 0\.01\d*, allowed 0\.0001"),
    Mutant(ShiftsLaterChunks, "test_prefill_in_chunks", "a prompt in chunks, cut at 1: logits of"),
    Mutant(
        RefusesMixedSteps,
        "test_prompts_and_decoding_in_one_step",
        "slices of 63 and 1 and 33 tokens, was refused with RequestError|slices of .* tokens, was refused",
    ),
    Mutant(
        MixesUpMixedSteps,
        "test_prompts_and_decoding_in_one_step",
        r"logits must be float32 \(\d+, 320\), but",
    ),
    Mutant(SortsPages, "test_pages_in_any_order", r"with the page table \[7, 6, 5, 4\]"),
    Mutant(PagesAreContiguous, "test_pages_of_others_are_left_alone", r"slot \d with the pages \["),
    Mutant(OnePageForAll, "test_prefill_in_chunks", "a prompt in chunks"),
    Mutant(PagesBySlot, "test_shared_prefix", "with a shared first page"),
    Mutant(WritesSharedPages, "test_shared_pages_are_only_read", "which must only be read"),
    Mutant(WritesTheNextPage, "test_pages_of_others_are_left_alone", r"slot \d with the pages \["),
    Mutant(
        GoesOnBehindTheEnd,
        _SKIPPED,
        "slot 1 goes on behind its end by Bind.ends: the result is",
        {"by": "ends"},
    ),
    Mutant(
        KnowsNoLimit, _SKIPPED, "slot 1 goes on behind its end by Bind.limit: the result is", {"by": "limit"}
    ),
    Mutant(
        EndsAllSlots,
        _SKIPPED,
        "a slot beside one whose sequence ended: the result is Skipped",
        {"by": "ends"},
    ),
    *(
        Mutant(each, "test_pages_are_copied_before_the_slices", r"slot 1 beside a copy of page \d+ to")
        for each in (CopiesNothing, CopiesInReverse, CopiesAfterTheSlices)
    ),
    Mutant(KeepsTheSlotsTokens, "test_slot_is_used_again", "in a slot that another sequence had meanwhile"),
    Mutant(BindsWhatRuns, "test_bound_before_its_first_slice", "step 2 failed with .*was never bound"),
    Mutant(ContinuesWhatItHasSeen, "test_running_ahead_says_the_same", "with 2 steps in flight: tokens are"),
    Mutant(
        ContinuesTheLastGivenToken,
        "test_token_given_or_remembered",
        "a slice without tokens, which continues",
    ),
    Mutant(KeepsItsOwnState, "test_state_outlives_the_executor", "continued by another executor"),
    Mutant(BreaksAtSomePages, "test_any_schedule", "of a random schedule"),
    Mutant(ForgetsInAFullBatch, "test_any_schedule", "of a random schedule"),
]
