"""Executors that are wrong about copies of slots."""

from __future__ import annotations

from dataclasses import replace

from pi2rt.runtime.step import Skipped, StateCopy, Step, StepResult
from tests.testing.mutant import Mutant
from tests.testing.wrappers import Wrapper


class Copies(Wrapper):
    def change_copies(self, step: Step) -> tuple[StateCopy, ...]:
        """Those of slots."""
        return tuple(copy for copy in step.copies if copy.kind == "slot")

    def change_step(self, step: Step) -> Step:
        pages = tuple(copy for copy in step.copies if copy.kind == "page")
        return replace(step, copies=(*pages, *self.change_copies(step)))

    def copy(self, source: int, target: int) -> None:
        assert self.store is not None
        self.store.copy_slot(source, target)


class CopiesNoSlots(Copies):
    def change_copies(self, step: Step) -> tuple[StateCopy, ...]:
        return ()


class CopiesPagesAlone(Copies):
    """With the numbers of slots."""

    def change_copies(self, step: Step) -> tuple[StateCopy, ...]:
        return tuple(replace(copy, kind="page") for copy in super().change_copies(step))


class CopiesSlotsInReverse(Copies):
    def change_copies(self, step: Step) -> tuple[StateCopy, ...]:
        return super().change_copies(step)[::-1]


class CopiesAllAtOnce(Copies):
    """From what was there before the first copy: a target that is copied on comes last."""

    def change_copies(self, step: Step) -> tuple[StateCopy, ...]:
        copies = super().change_copies(step)
        sources = {copy.source for copy in copies}
        return tuple(sorted(copies, key=lambda copy: copy.target in sources))


class MovesSlots(Copies):
    """The source is given away."""

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        assert self.store is not None
        for copy in super().change_copies(step):
            for each in self.store.layout.fixed:
                self.store.array(copy.source, each)[...] = 0
        return result


class CopiesTheFirstArray(Copies):
    """Of each slot."""

    def copy_array(self, source: int, target: int) -> None:
        assert self.store is not None
        first = self.store.layout.fixed[0]
        self.store.array(target, first)[...] = self.store.array(source, first)

    def change_copies(self, step: Step) -> tuple[StateCopy, ...]:
        for copy in super().change_copies(step):
            self.copy_array(copy.source, copy.target)
        return ()


class CopiesSlotsAfterTheSlices(CopiesNoSlots):
    def change_result(self, step: Step, result: StepResult) -> StepResult:
        for copy in step.copies:
            if copy.kind == "slot":
                self.copy(copy.source, copy.target)
        return result


class KeepsSlotsInUse(Copies):
    """Nothing is copied into a slot that a slice of the step has."""

    def change_copies(self, step: Step) -> tuple[StateCopy, ...]:
        used = {piece.slot for piece in step.slices}
        return tuple(copy for copy in super().change_copies(step) if copy.target not in used)


class SkipsCopiesToo(Copies):
    """Of steps whose slices go on behind the end of their sequences."""

    def change_copies(self, step: Step) -> tuple[StateCopy, ...]:
        runs = any(len(piece.tokens) for piece in step.slices)
        return super().change_copies(step) if runs else ()


class CountsSkippedTokens(Copies):
    """The state of a sequence goes on behind its end."""

    def change_result(self, step: Step, result: StepResult) -> StepResult:
        assert self.store is not None
        for piece, each in zip(step.slices, result.sampled, strict=True):
            if isinstance(each, Skipped):
                self.store.array(piece.slot, self.store.layout.fixed[-1])[...] += 1
        return result


class ClearsSources(Copies):
    """Of copies in a step that was stopped, in place of their targets."""

    async def wait(self) -> StepResult:
        assert self.store is not None
        step = self.in_flight[0]
        result = await super().wait()
        if result.stopped:
            for copy in super().change_copies(step):
                for each in self.store.layout.fixed:
                    self.store.array(copy.source, each)[...] = 0
        return result


class UndoesTooMuch(Copies):
    """All copies since a step that was stopped."""

    def __init__(self) -> None:
        super().__init__()
        self.stopped = False

    def change_copies(self, step: Step) -> tuple[StateCopy, ...]:
        return () if self.stopped else super().change_copies(step)

    async def wait(self) -> StepResult:
        result = await super().wait()
        self.stopped |= result.stopped
        return result


_ORDER, _GOES_ON = "test_slots_are_copied_in_their_order", "test_a_slice_goes_on_from_a_copied_slot"
_BACK, _SKIPPED = "test_a_roll_back", "test_slots_are_copied_where_slices_are_skipped"
_STOPPED = "test_copies_of_a_step_that_is_stopped"

MUTANTS = [
    Mutant(CopiesNoSlots, _ORDER, "copies 0 to 1: slot 1 must have what slot 0 had, .*what slot 1 had"),
    Mutant(CopiesPagesAlone, _ORDER, "copies 0 to 1: slot 1 must have what slot 0 had"),
    Mutant(CopiesSlotsInReverse, _ORDER, "copies 0 to 1, 1 to 2: slot 2 must have what slot 0 had"),
    Mutant(CopiesAllAtOnce, _ORDER, "copies 0 to 1, 1 to 2: slot 2 must have what slot 0 had"),
    Mutant(MovesSlots, _ORDER, "copies 0 to 1: slot 0 must have what slot 0 had, .* what no slot had"),
    Mutant(
        CopiesTheFirstArray, _ORDER, "slot 1 must have what slot 0 had, but 3 of 3 numbers of its array 'to"
    ),
    Mutant(CopiesNoSlots, _GOES_ON, "slot 1 beside a copy of slot 0 to 2 and on to 1: logits of"),
    Mutant(CopiesSlotsAfterTheSlices, _GOES_ON, "slot 1 beside a copy of slot 0 to 2 and on to 1: logits of"),
    Mutant(KeepsSlotsInUse, _GOES_ON, "slot 1 beside a copy of slot 0 to 2 and on to 1: logits of"),
    Mutant(KeepsSlotsInUse, _BACK, "slot 0 after a roll-back: logits of"),
    Mutant(CopiesSlotsAfterTheSlices, _BACK, "slot 0 after a roll-back: logits of"),
    Mutant(SkipsCopiesToo, _SKIPPED, "in a step that is skipped: slot 1 must have what slot 0 had"),
    Mutant(CountsSkippedTokens, _SKIPPED, "in a step that is skipped: slot 0 must have what slot 0 had"),
    Mutant(ClearsSources, _STOPPED, "the source of copies in a step that was stopped and in the next one"),
    Mutant(UndoesTooMuch, _STOPPED, "copy 2 to 1, two steps after a step that was stopped"),
]
