"""Copies of slots: fixed arrays of sequences are replaced before the slices of a step, in order."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from pi2rt.formats import ModelFile
from pi2rt.memory import StateStore
from pi2rt.models import Fixed, ModelDescription
from pi2rt.models.states import PAGE_TOKENS
from pi2rt.runtime.executor import StepExecutor, make_store
from pi2rt.runtime.step import Bind, Floats, Int32s, Skipped, Slice, StateCopy, Step
from pi2rt.testing.harness import FOLLOW_ON, GREEDY, Harness, in_trio

Arrays = list[npt.NDArray[Any]]
"""All fixed arrays of a slot."""


def slot_copies(*pairs: tuple[int, int]) -> tuple[StateCopy, ...]:
    return tuple(StateCopy("slot", source, target) for source, target in pairs)


class SlotCopies(Harness):
    """For executors that run a block with fixed arrays (``pi2rt.models.Fixed``) and borrow the store; skipped for
    others. What a copy leaves behind is compared in the store, and what a slice makes of it by its logits."""

    def open_fixed_model(self) -> tuple[ModelFile, ModelDescription]:
        """A model with a block that keeps fixed arrays, opened anew: the first such one of ``models``."""
        for name in self.models:
            file, description = self.open_model(name)
            if any(isinstance(each.state, Fixed) for each in description.states()):
                return file, description
            file.close()
        pytest.skip("no block of models keeps fixed arrays, and open_fixed_model is not overridden")

    def make_fixed_store(self, executor: StepExecutor, description: ModelDescription) -> StateStore:
        """With a slot of arrays for each of the executor's."""
        store = make_store(executor, description, self.options)
        if store is None:
            pytest.skip("the executor has no method page_type: it keeps the arrays of its slots by itself")
        return store

    @asynccontextmanager
    async def opened_with_arrays(self) -> AsyncIterator[tuple[StepExecutor, StateStore]]:
        file, description = self.open_fixed_model()
        executor = self.make_executor()
        store = self.make_fixed_store(executor, description)
        async with self._opened(executor, file, description, self.options, store):
            yield executor, store

    def arrays(self, store: StateStore, slot: int) -> Arrays:
        """Copies of what is there."""
        return [store.array(slot, each).copy() for each in store.layout.fixed]

    def fill(self, store: StateStore, seed: int = 0) -> list[Arrays]:
        """Writes small numbers to all slots, others to each; returns them by slot."""
        random = np.random.RandomState(seed)
        for slot in range(store.slots):
            for each in store.layout.fixed:
                store.array(slot, each)[...] = random.randint(1, 100, each.array.shape).astype(
                    each.array.dtype
                )
        return [self.arrays(store, slot) for slot in range(store.slots)]

    def check_slot(
        self, store: StateStore, slot: int, filled: Sequence[Arrays], source: int, what: str
    ) -> None:
        """The slot has the bytes that ``source`` had when slots were ``filled``."""
        got = self.arrays(store, slot)
        for each, values, expected in zip(store.layout.fixed, got, filled[source], strict=True):
            wrong = np.count_nonzero(values != expected)
            had = [
                number
                for number, arrays in enumerate(filled)
                if all(np.array_equal(*pair) for pair in zip(got, arrays, strict=True))
            ]
            assert not wrong, (
                f"{what}: slot {slot} must have what slot {source} had, but {wrong} of {values.size} numbers of its "
                f"array {each.array.name!r} are others; it has "
                + (f"what slot {had[0]} had" if had else "what no slot had")
            )

    async def whole_text(self, executor: StepExecutor, text: Int32s, slot: int) -> Floats:
        """Its logits, alone in one step."""
        piece = Slice(slot, 0, self.pages(slot), text, logits=True)
        return (await self.run(executor, Step(4000, (piece,), (Bind(slot, GREEDY, text),))))[0].rows

    @in_trio
    async def test_slots_are_copied_in_their_order(self) -> None:
        """A chain, and a slot that is copied and then replaced. Sources and slots that no copy names stay."""
        async with self.opened_with_arrays() as (executor, store):
            prompt = self.prompt(5)
            for number, (pairs, sources) in enumerate(
                (
                    (((0, 1),), (0, 0, 2)),
                    (((0, 1), (1, 2)), (0, 0, 0)),
                    (((0, 2), (1, 0)), (1, 1, 0)),
                    (((0, 1), (2, 1), (1, 0)), (2, 2, 2)),
                    (((1, 1), (2, 0)), (2, 1, 2)),
                )
            ):
                filled = self.fill(store, number)
                piece = Slice(3, 0, self.pages(3), prompt)
                step = Step(number, (piece,), (Bind(3, GREEDY, prompt),), slot_copies(*pairs))
                await self.run(executor, step)
                for slot, source in enumerate(sources):
                    what = f"copies {', '.join(f'{a} to {b}' for a, b in pairs)}"
                    self.check_slot(store, slot, filled, source, what)

    @in_trio
    async def test_a_slice_goes_on_from_a_copied_slot(self) -> None:
        """A second sequence forks off, in the step in which the first one goes on and the second is bound. The copy
        takes two moves, in their order, by way of a slot that another sequence had."""
        async with self.opened_with_arrays() as (executor, _):
            at = PAGE_TOKENS + 6
            first = self.prompt(at + 14)
            other = np.concatenate((first[:at], self.prompt(9, salt=5)))
            whole = [await self.whole_text(executor, text, 3) for text in (first, other)]
            await self.whole_text(executor, self.prompt(20, salt=3), 1)
            begin = Slice(0, 0, self.pages(0), first[:at])
            await self.run(executor, Step(1, (begin,), (Bind(0, GREEDY, first),)))
            source, target = (int(self.pages(slot)[1]) for slot in (0, 1))
            table = np.array([self.pages(0)[0], target], np.int32)
            slices = (
                Slice(0, at, self.pages(0), first[at:], logits=True),
                Slice(1, at, table, other[at:-1], logits=True),
            )
            moves = (StateCopy("page", source, target), *slot_copies((0, 2), (2, 1)))
            outputs = await self.run(executor, Step(2, slices, (Bind(1, GREEDY, other),), moves))
            for piece, output, right in zip(slices, outputs, whole, strict=True):
                what = f"slot {piece.slot} beside a copy of slot 0 to 2 and on to 1"
                self.check_same(output.rows, right[at : at + piece.count], what, at)
            rest = Slice(1, len(other) - 1, table, other[-1:], logits=True)
            (output,) = await self.run(executor, Step(3, (rest,)))
            self.check_same(output.rows, whole[1][-1:], "in a copied slot, a step later", len(other) - 1)

    @in_trio
    async def test_a_roll_back(self) -> None:
        """A snapshot is taken in the step that goes on, and copied back in one that tries other tokens, twice."""
        async with self.opened_with_arrays() as (executor, _):
            at = 20
            prompt = self.prompt(at)
            tries = [np.concatenate((prompt, self.prompt(5, salt))) for salt in (4, 5, 6)]
            whole = [await self.whole_text(executor, text, 3) for text in tries]
            begin = Slice(0, 0, self.pages(0), prompt)
            await self.run(executor, Step(1, (begin,), (Bind(0, GREEDY, prompt),)))
            for number, (text, right) in enumerate(zip(tries, whole, strict=True)):
                piece = Slice(0, at, self.pages(0), text[at:], logits=True)
                moves = slot_copies((2, 0) if number else (0, 2))
                (output,) = await self.run(executor, Step(2 + number, (piece,), copies=moves))
                what = "after a roll-back" if number else "in the step that takes a snapshot"
                self.check_same(output.rows, right[at:], f"slot 0 {what}", at)

    @in_trio
    async def test_slots_are_copied_where_slices_are_skipped(self) -> None:
        """Of a sequence that has ended: its arrays stay those of the end, and can be copied."""
        async with self.opened_with_arrays() as (executor, store):
            prompt = self.prompt(9)
            self.fill(store)
            bind = Bind(0, GREEDY, prompt, limit=len(prompt) + 1)
            piece = Slice(0, 0, self.pages(0), prompt, sample=True)
            await self.run(executor, Step(1, (piece,), (bind,)))
            filled = [self.arrays(store, slot) for slot in range(store.slots)]
            behind = Slice(0, len(prompt), self.pages(0), FOLLOW_ON, sample=True)
            step = Step(2, (behind,), copies=slot_copies((1, 2), (0, 1)))
            (output,) = await self.run(executor, step)
            assert isinstance(output.sampled, Skipped), (
                f"behind the end of its sequence the result is {output.sampled}"
            )
            for slot, source in enumerate((0, 0, 1, 3)):
                what = "copies 1 to 2, 0 to 1 in a step that is skipped"
                self.check_slot(store, slot, filled, source, what)

    @in_trio
    async def test_copies_of_a_step_that_is_stopped(self) -> None:
        """Their targets are undefined, and nothing else: neither their sources, nor other slots, nor what the step
        after it copies."""
        async with self.opened_with_arrays() as (executor, store):
            long, short = self.prompt(self.options.max_tokens), self.prompt(5)
            ahead = executor.max_in_flight > 1
            for number in range(0, 3 * min(self.tries, 10), 3):
                filled = self.fill(store, number)
                piece = Slice(3, 0, self.pages(3), long)
                step = Step(number, (piece,), (Bind(3, GREEDY, long),), slot_copies((0, 1)))
                piece = Slice(3, 0, self.pages(3), short)
                after = Step(number + 1, (piece,), (Bind(3, GREEDY, short),), slot_copies((0, 2)))
                executor.submit(step)
                if ahead:
                    executor.submit(after)
                executor.stop(number)
                stopped = (await self.wait(executor, number)).stopped
                if not ahead:
                    executor.submit(after)
                result = await self.wait(executor, number + 1)
                assert not result.stopped, (
                    "a step ended early that came after a stopped one: nobody stopped it"
                )
                which = "a step that was stopped" if stopped else "a step that ended before stop came"
                self.check_slot(store, 0, filled, 0, f"the source of copies in {which} and in the next one")
                self.check_slot(store, 2, filled, 0, f"copy 0 to 2 after {which}")
                if not stopped:
                    self.check_slot(store, 1, filled, 0, f"copy 0 to 1 in {which}")
                filled = self.fill(store, number + 1)
                again = Step(number + 2, (piece,), (Bind(3, GREEDY, short),), slot_copies((2, 1)))
                await self.run(executor, again)
                self.check_slot(store, 1, filled, 2, f"copy 2 to 1, two steps after {which}")
