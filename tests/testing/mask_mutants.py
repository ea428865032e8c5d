"""Executors that are wrong about masks."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import trio

from pi2rt._errors import InternalError
from pi2rt.executors.reference.sampling import log_softmax, sample
from pi2rt.formats import ModelFile
from pi2rt.memory import StateStore
from pi2rt.models import ModelDescription
from pi2rt.runtime.executor import ExecutorOptions, Progress
from pi2rt.runtime.step import Floats, Int32s, Sampled, Sampling, Slice, Step, StepResult, Unusable
from pi2rt.runtime.token_mask import TokenMask, allows, masking
from tests.testing.mutant import Mutant
from tests.testing.wrappers import Resampling, Wrapper


class MaskWrapper(Wrapper):
    takes_masks = True

    def __init__(self) -> None:
        super().__init__()
        self.vocab_size = 0

    def change_model(self, model: ModelDescription) -> ModelDescription:
        self.vocab_size = model.vocab_size
        return super().change_model(model)

    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        self.inner.mask(step_id, slot, allowed)


class IgnoresMasks(MaskWrapper):
    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        self.inner.mask(step_id, slot, None)


class DoesNotWait(MaskWrapper):
    """Samples from all tokens where there is no mask when it comes to that."""

    def submit(self, step: Step) -> None:
        super().submit(step)
        for piece in step.slices:
            if piece.masked:
                self.inner.mask(step.id, piece.slot, None)


class IgnoresLateMasks(MaskWrapper):
    waiting = False

    async def wait(self) -> StepResult:
        self.waiting = True
        try:
            return await super().wait()
        finally:
            self.waiting = False

    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        self.inner.mask(step_id, slot, None if self.waiting else allowed)


class TakesTheMaskOfAnotherSlot(MaskWrapper):
    """Of the first one that is given one in the step."""

    def __init__(self) -> None:
        super().__init__()
        self.first: dict[int, TokenMask | None] = {}

    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        self.inner.mask(step_id, slot, self.first.setdefault(step_id, allowed))


class TakesTheMaskOfTheStepBefore(MaskWrapper):
    def __init__(self) -> None:
        super().__init__()
        self.last: dict[int, TokenMask | None] = {}

    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        self.inner.mask(step_id, slot, self.last.get(slot, allowed))
        self.last[slot] = allowed


class TakesNoneForNothing(MaskWrapper):
    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        if allowed is None:
            allowed = masking(np.zeros(self.vocab_size, np.bool_))
        super().mask(step_id, slot, allowed)


class MasksNeighbours(MaskWrapper):
    """All slices of a step get the mask of one."""

    def change_step(self, step: Step) -> Step:
        if not any(piece.masked for piece in step.slices):
            return step
        return replace(step, slices=tuple(replace(piece, masked=piece.sample) for piece in step.slices))

    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        for step in self.in_flight:
            for piece in step.slices:
                if step.id == step_id and (piece.slot == slot or not piece.masked):
                    super().mask(step_id, piece.slot, allowed)


class Noted(MaskWrapper):
    """Knows the masks when a result comes."""

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[tuple[int, int], TokenMask | None] = {}

    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        self.masks.setdefault((step_id, slot), allowed)
        super().mask(step_id, slot, allowed)

    def hidden(self, logits: Floats, step: Step, piece: Slice) -> Floats:
        mask = self.masks.get((step.id, piece.slot))
        if mask is None:
            return logits
        return np.where(allows(mask, self.vocab_size), logits, np.float32(-np.inf))


class MasksLogits(Noted):
    def change_result(self, step: Step, result: StepResult) -> StepResult:
        logits = tuple(
            None if each is None else self.hidden(each, step, piece)
            for piece, each in zip(step.slices, result.logits, strict=True)
        )
        return replace(result, logits=logits)


class MasksTargets(Noted):
    """The mask is of what comes behind the slice, and not of the tokens in it."""

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        scores: list[Floats | None] = []
        for piece, each, logits in zip(step.slices, result.scores, result.logits, strict=True):
            if each is not None and logits is not None and piece.targets is not None:
                right = log_softmax(self.hidden(logits, step, piece))
                each = right[np.arange(piece.count), piece.targets].astype(np.float32)
            scores.append(each)
        return replace(result, scores=tuple(scores))


class TellsLogprobsOfAll(Noted):
    """As if there were no mask."""

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        sampled = list(result.sampled)
        for i, (each, logits) in enumerate(zip(result.sampled, result.logits, strict=True)):
            if isinstance(each, Sampled) and logits is not None and each.top:
                of_all = log_softmax(logits[-1])
                top = tuple((token, float(of_all[token])) for token, _ in each.top)
                sampled[i] = Sampled(each.token, float(of_all[each.token]), top)
        return replace(result, sampled=tuple(sampled))


class CutsBeforeTheMask(Resampling):
    """top_k counts tokens that the mask then takes away."""

    takes_masks = True

    def __init__(self) -> None:
        super().__init__()
        self.masks: dict[tuple[int, int], TokenMask | None] = {}
        self.step: Step | None = None

    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        self.masks[step_id, slot] = allowed

    def change_step(self, step: Step) -> Step:
        changed = super().change_step(step)
        return replace(changed, slices=tuple(replace(piece, masked=False) for piece in changed.slices))

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        self.step = step
        return super().change_result(step, result)

    def pick(
        self, logits: Floats, sampling: Sampling, counts: Int32s, position: int, place: int
    ) -> Sampled | Unusable:
        assert self.step is not None
        mask = self.masks.get((self.step.id, self.step.slices[place].slot))
        if mask is None:
            return sample(logits, sampling, counts, position)
        if sampling.top_k:
            logits = np.where(logits >= np.sort(logits)[-sampling.top_k], logits, np.float32(-np.inf))
        picked = sample(logits, sampling, counts, position, mask)
        if isinstance(picked, Unusable):
            return Sampled(int(np.flatnonzero(allows(mask, self.vocab_size))[0]))
        return picked


class PicksFromNothing(MaskWrapper):
    """A mask that allows nothing is one that was forgotten."""

    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        super().mask(step_id, slot, allowed if allowed is None or allowed.any() else None)


class BlamesTheModel(MaskWrapper):
    def change_result(self, step: Step, result: StepResult) -> StepResult:
        sampled = tuple(Unusable() if isinstance(each, Unusable) else each for each in result.sampled)
        return replace(result, sampled=sampled)


class WaitsForEver(MaskWrapper):
    async def open(
        self,
        file: ModelFile,
        model: ModelDescription,
        options: ExecutorOptions,
        store: StateStore | None,
        progress: Progress,
    ) -> None:
        await super().open(file, model, replace(options, mask_deadline=1e6), store, progress)


class GivesUpAll(MaskWrapper):
    """One slice without a mask is the end of all masked ones."""

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        if not any(each == Unusable(("token_mask",)) for each in result.sampled):
            return result
        lost = tuple(
            Unusable(("token_mask",)) if piece.masked else each
            for piece, each in zip(step.slices, result.sampled, strict=True)
        )
        return replace(result, sampled=lost)


class DoesNotStopWhileItWaits(MaskWrapper):
    def stop(self, step_id: int) -> None:
        if not any(step.id == step_id and any(p.masked for p in step.slices) for step in self.in_flight):
            super().stop(step_id)


class ClosesWhenMasksAreThere(MaskWrapper):
    async def aclose(self) -> None:
        if any(piece.masked for step in self.in_flight for piece in step.slices):
            await trio.sleep_forever()
        await super().aclose()


class TellsResultsTogether(MaskWrapper):
    """Of all steps in flight, so that what follows from the first comes too late for the second."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[StepResult] = []

    async def wait(self) -> StepResult:
        while not self.done or self.in_flight:
            self.done.append(await super().wait())
        return self.done.pop(0)


class WaitsBehindTheEnd(MaskWrapper):
    """Slices behind the end of their sequence wait too."""

    def change_step(self, step: Step) -> Step:
        return replace(step, binds=tuple(replace(bind, ends=frozenset()) for bind in step.binds))


class KnowsEveryStep(MaskWrapper):
    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        if not any(step.id == step_id for step in self.in_flight):
            raise InternalError(f"there is no step {step_id}")
        super().mask(step_id, slot, allowed)


class TakesTheLastMask(MaskWrapper):
    def __init__(self) -> None:
        super().__init__()
        self.kept: dict[tuple[int, int], TokenMask | None] = {}

    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        self.kept[step_id, slot] = allowed

    async def wait(self) -> StepResult:
        for (step_id, slot), allowed in self.kept.items():
            self.inner.mask(step_id, slot, allowed)
        self.kept.clear()
        return await super().wait()


class TakesAnything(MaskWrapper):
    def mask(self, step_id: int, slot: int, allowed: TokenMask | None) -> None:
        if allowed is not None:
            words = np.zeros(-(-self.vocab_size // 32), np.uint32)
            words[: len(allowed)] = allowed[: len(words)]
            allowed = words
        super().mask(step_id, slot, allowed)


OWN, LATE = "test_each_slice_has_a_mask_of_its_own", "test_a_mask_that_comes_late"
NOTHING = "test_a_mask_that_allows_nothing_concerns_one_slice"
UNMASKED, NOBODY = "test_targets_and_logits_are_not_masked", "test_masks_that_nobody_waits_for"

MUTANTS = [
    Mutant(IgnoresMasks, OWN, "which the mask does not allow"),
    Mutant(TakesTheMaskOfAnotherSlot, OWN, "slot 1, step 0: token .* which the mask does not allow"),
    Mutant(TakesTheMaskOfTheStepBefore, OWN, "slot 0, step 1: token .* which the mask does not allow"),
    Mutant(
        CutsBeforeTheMask, "test_options_apply_to_what_a_mask_allows", "options and masks, slot 0, .*picks"
    ),
    Mutant(DoesNotWait, LATE, "ended before there was a mask|which the mask does not allow"),
    Mutant(IgnoresLateMasks, LATE, "came late: token .* which the mask does not allow"),
    Mutant(TakesNoneForNothing, "test_none_allows_all", "a mask of None: the results are"),
    Mutant(
        MasksNeighbours, "test_neighbours_of_a_masked_slice", "unmasked beside a masked slice: tokens are"
    ),
    Mutant(MasksLogits, UNMASKED, "logits of a masked slice: logits of"),
    Mutant(MasksTargets, UNMASKED, "scores of a masked slice are"),
    Mutant(
        TellsLogprobsOfAll, "test_log_probabilities_behind_a_mask", r"log probabilities of \(token, value\)"
    ),
    Mutant(PicksFromNothing, NOTHING, "the mask leaves no token to pick, so the result must be"),
    Mutant(BlamesTheModel, NOTHING, r"must be Unusable\(parameters=\('token_mask',\)\), not Unusable"),
    Mutant(WaitsForEver, "test_a_mask_that_never_comes", "wait for step 1 did not end within", patience=2.0),
    Mutant(GivesUpAll, "test_a_mask_that_never_comes", "a token was asked for, the result has Unusable"),
    Mutant(DoesNotStopWhileItWaits, "test_stop_ends_the_wait_for_a_mask", "did not end within", patience=2.0),
    Mutant(
        ClosesWhenMasksAreThere,
        "test_closing_ends_the_wait_for_a_mask",
        "aclose .*did not end within",
        patience=2.0,
    ),
    Mutant(
        TellsResultsTogether,
        "test_masks_follow_from_the_tokens_before",
        "wait for step 0 did not end within",
        patience=2.0,
    ),
    Mutant(
        WaitsBehindTheEnd, "test_skipped_slices_wait_for_no_mask", "wait for step 2 did not end", patience=2.0
    ),
    Mutant(KnowsEveryStep, NOBODY, r"mask\(77, 0, ...\) raised"),
    Mutant(TakesTheLastMask, NOBODY, "allows token 9 alone, but the token is 7"),
    Mutant(TakesAnything, "test_what_is_no_mask", r"mask with uint32 \(\d+,\) must raise InternalError"),
]
