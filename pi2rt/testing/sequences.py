"""What a sequence computes depends on its own tokens alone: not on chunks, batches, pages, slots or what was before.

Each test compares logits with those that the same executor gives for the same tokens alone in one step.
"""

from __future__ import annotations

import numpy as np
import pytest

from pi2rt.models.states import PAGE_TOKENS
from pi2rt.runtime.executor import Borrower, StepExecutor, make_store
from pi2rt.runtime.step import Bind, Floats, Int32s, Sampled, Sampling, Skipped, Slice, StateCopy, Step
from pi2rt.testing.harness import FOLLOW_ON, GREEDY, SEEDED, Harness, in_trio

_LENGTH = 150  # of a prompt: three pages, and a part of the last
_CUTS = ((1,), (64,), (63, 65, 128), (1, 64, 149), tuple(range(7, _LENGTH, 11)))


class Sequences(Harness):
    """``Slice``, ``Bind``, page tables and slots."""

    async def whole(
        self, executor: StepExecutor, tokens: Int32s, slot: int = 0, sampling: Sampling = GREEDY
    ) -> Floats:
        """Logits of a sequence alone in one step, with a sample after the last token."""
        step = self.prefill(900 + slot, tokens, slot, sampling, logits=True)
        return (await self.run(executor, step))[0].rows

    @pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
    @in_trio
    async def test_same_again(self, sampling: Sampling) -> None:
        """Opened anew, and in another slot."""
        texts: list[list[int]] = []
        for number in range(2):
            async with self.opened() as executor:
                prompt = self.prompt(9)
                for slot in (0, 2):
                    texts += await self.generate(executor, prompt, 6, (slot,), sampling)
                    what = f"the same prompt again, in slot {slot} of executor {number}"
                    await self.check_text(executor, prompt, sampling, texts[-1], texts[0], what)

    @pytest.mark.parametrize("sampling", [GREEDY, SEEDED])
    @in_trio
    async def test_text_does_not_depend_on_the_batch(self, sampling: Sampling) -> None:
        async with self.opened() as executor:
            prompt = self.prompt(9)
            (alone,) = await self.generate(executor, prompt, 12, (0,), sampling)
            together = await self.generate(executor, prompt, 12, (2, 0, 1), sampling)
            for place, text in enumerate(together):
                what = f"slice {place} of 3 in a step"
                await self.check_text(executor, prompt, sampling, text, alone, what)

    @in_trio
    async def test_prefill_in_chunks(self) -> None:
        async with self.opened() as executor:
            prompt = self.prompt(_LENGTH)
            whole = await self.whole(executor, prompt)
            for number, cuts in enumerate(_CUTS):
                slot = 1 + number % 3
                await self.whole(
                    executor, self.prompt(_LENGTH, salt=9), slot
                )  # other keys and values in its pages
                bind: tuple[Bind, ...] = (Bind(slot, GREEDY, prompt),)
                for start, end in zip((0, *cuts), (*cuts, _LENGTH), strict=True):
                    piece = Slice(slot, start, self.pages(slot), prompt[start:end], logits=True)
                    (output,) = await self.run(executor, Step(1 + end, (piece,), bind))
                    self.check_same(
                        output.rows, whole[start:end], f"a prompt in chunks, cut at {start}", start
                    )
                    bind = ()

    @in_trio
    async def test_prompts_and_decoding_in_one_step(self) -> None:
        """One sequence decodes while two prompts of other lengths come in, one of them in chunks."""
        async with self.opened() as executor:
            texts = [self.prompt(length, salt) for salt, length in enumerate((60, 130, 33))]
            whole = [await self.whole(executor, text, 3) for text in texts]
            first = Slice(0, 0, self.pages(0), texts[0][:50], logits=True)
            await self.run(executor, Step(1, (first,), (Bind(0, GREEDY, texts[0]),)))
            cuts = [0, 1, 64, 65, 129, 130]
            for i in range(5):
                start, end = cuts[i], cuts[i + 1]
                pieces = [
                    Slice(1, start, self.pages(1), texts[1][start:end], logits=True),
                    Slice(0, 50 + i, self.pages(0), texts[0][50 + i : 51 + i], logits=True),
                ]
                binds = [Bind(1, GREEDY, texts[1])] if i == 0 else []
                expected = [whole[1][start:end], whole[0][50 + i : 51 + i]]
                if i == 2:
                    pieces.insert(1, Slice(2, 0, self.pages(2), texts[2], logits=True))
                    binds.append(Bind(2, GREEDY, texts[2]))
                    expected.insert(1, whole[2])
                step = Step(10 + i, tuple(pieces), tuple(binds))
                outputs = await self.run(executor, step)
                for piece, output, right in zip(pieces, outputs, expected, strict=True):
                    self.check_same(
                        output.rows,
                        right,
                        f"{piece.count} tokens of slot {piece.slot} in {step}",
                        piece.start,
                    )

    @in_trio
    async def test_pages_in_any_order(self) -> None:
        async with self.opened() as executor:
            prompt = self.prompt(_LENGTH)
            whole = await self.whole(executor, prompt)
            for number, pages in enumerate((self.pages(1)[::-1], self.pages(1)[[2, 0, 3, 1]])):
                table = np.ascontiguousarray(pages)
                bind: tuple[Bind, ...] = (Bind(1, GREEDY, prompt),)
                for start, end in ((0, 100), (100, _LENGTH)):
                    piece = Slice(1, start, table, prompt[start:end], logits=True)
                    (output,) = await self.run(executor, Step(10 * number + start, (piece,), bind))
                    what = f"with the page table {table.tolist()}"
                    self.check_same(output.rows, whole[start:end], what, start)
                    bind = ()

    @in_trio
    async def test_shared_prefix(self) -> None:
        """A second sequence begins behind a page that the first one wrote."""
        async with self.opened() as executor:
            prompt = self.prompt(PAGE_TOKENS + 10)
            whole = await self.whole(executor, prompt)
            pages = np.array([self.pages(0)[0], self.pages(1)[0]], np.int32)
            rest = Slice(1, PAGE_TOKENS, pages, prompt[PAGE_TOKENS:], sample=True, logits=True)
            (shared,) = await self.run(executor, Step(2, (rest,), (Bind(1, GREEDY, prompt),)))
            self.check_same(shared.rows, whole[PAGE_TOKENS:], "with a shared first page", PAGE_TOKENS)

    @in_trio
    async def test_shared_pages_are_only_read(self) -> None:
        """The first sequence goes on after a second one has used its first page with other tokens behind it."""
        async with self.opened() as executor:
            prompt = self.prompt(PAGE_TOKENS + 20)
            whole = await self.whole(executor, prompt, 2)
            begin = Slice(0, 0, self.pages(0), prompt[:-10])
            await self.run(executor, Step(1, (begin,), (Bind(0, GREEDY, prompt),)))
            other = np.concatenate((prompt[:PAGE_TOKENS], self.prompt(30, salt=5)))
            pages = np.concatenate((self.pages(0)[:1], self.pages(1)[:1]))
            bind: tuple[Bind, ...] = (Bind(1, SEEDED, other),)
            for start, end in ((PAGE_TOKENS, PAGE_TOKENS + 25), (PAGE_TOKENS + 25, PAGE_TOKENS + 30)):
                piece = Slice(1, start, pages, other[start:end], sample=True)
                await self.run(executor, Step(10 + start, (piece,), bind))
                bind = ()
            rest = Slice(0, len(prompt) - 10, self.pages(0), prompt[-10:], logits=True)
            (output,) = await self.run(executor, Step(3, (rest,)))
            self.check_same(
                output.rows,
                whole[-10:],
                "after another sequence shared its first page, which must only be read",
                len(prompt) - 10,
            )

    @in_trio
    async def test_pages_are_copied_before_the_slices(self) -> None:
        """A second sequence forks off from the middle of a page, in the step in which the first one goes on. The copy
        takes two moves, in their order."""
        async with self.opened() as executor:
            first = self.prompt(PAGE_TOKENS + 20)
            other = np.concatenate((first[: PAGE_TOKENS + 6], self.prompt(9, salt=5)))
            whole = [await self.whole(executor, text, 3) for text in (first, other)]
            begin = Slice(0, 0, self.pages(0), first[: PAGE_TOKENS + 6])
            await self.run(executor, Step(1, (begin,), (Bind(0, GREEDY, first),)))
            source, between, target = (int(self.pages(slot)[1]) for slot in (0, 2, 1))
            moves = (StateCopy("page", source, between), StateCopy("page", between, target))
            table = np.array([self.pages(0)[0], target], np.int32)
            start = PAGE_TOKENS + 6
            slices = (
                Slice(0, start, self.pages(0), first[start:], logits=True),
                Slice(1, start, table, other[start:], logits=True),
            )
            step = Step(2, slices, (Bind(1, GREEDY, other),), moves)
            for piece, output, right in zip(slices, await self.run(executor, step), whole, strict=True):
                what = f"slot {piece.slot} beside a copy of page {source} to {between} and on to {target}"
                self.check_same(output.rows, right[start:], what, start)
            rest = Slice(1, len(other) - 1, table, other[-1:], logits=True)
            (output,) = await self.run(executor, Step(3, (rest,)))
            self.check_same(output.rows, whole[1][-1:], "on a copied page, a step later", len(other) - 1)

    @in_trio
    async def test_pages_of_others_are_left_alone(self) -> None:
        """Three sequences grow side by side on pages that lie between each other's."""
        async with self.opened() as executor:
            tables = [np.arange(slot, self.options.pages, 4, dtype=np.int32) for slot in range(3)]
            texts = [self.prompt(140, salt) for salt in range(3)]
            whole = [await self.whole(executor, text, 3) for text in texts]
            binds = tuple(Bind(slot, GREEDY, texts[slot]) for slot in range(3))
            for start, end in ((0, 63), (63, 64), (64, 65), (65, 127), (127, 130), (130, 140)):
                pieces = tuple(
                    Slice(slot, start, tables[slot], texts[slot][start:end], logits=True) for slot in range(3)
                )
                outputs = await self.run(executor, Step(end, pieces, binds))
                for slot, output in enumerate(outputs):
                    what = f"slot {slot} with the pages {tables[slot].tolist()}"
                    self.check_same(output.rows, whole[slot][start:end], what, start)
                binds = ()

    @in_trio
    async def test_slot_is_used_again(self) -> None:
        async with self.opened() as executor:
            first = await self.whole(executor, self.prompt(70))
            await self.generate(executor, self.prompt(120, salt=1), 3, sampling=SEEDED)
            again = await self.whole(executor, self.prompt(70))
            self.check_same(again, first, "in a slot that another sequence had meanwhile")

    @in_trio
    async def test_bound_before_its_first_slice(self) -> None:
        async with self.opened() as executor:
            prompt, other = self.prompt(30), self.prompt(20, salt=2)
            whole = await self.whole(executor, prompt, 2)
            piece = Slice(0, 0, self.pages(0), other)
            await self.run(executor, Step(1, (piece,), (Bind(0, GREEDY, other), Bind(1, GREEDY, prompt))))
            late = Slice(1, 0, self.pages(1), prompt, logits=True)
            (output,) = await self.run(executor, Step(2, (late,)))
            self.check_same(output.rows, whole, "in a slot bound by the step before")

    @in_trio
    async def test_running_ahead_says_the_same(self) -> None:
        """Steps that take their token from the one before, as many in flight as there may be."""
        async with self.opened() as executor:
            count = min(executor.max_in_flight, 8) + 2
            for sampling in (GREEDY, SEEDED):
                (expected,) = await self.generate(executor, self.prompt(9), count, sampling=sampling)
                steps = [self.prefill(1, self.prompt(9), 1, sampling)]
                steps += [self.following(2 + i, 9 + i, 1) for i in range(count - 1)]
                got: list[int] = []
                for number, step in enumerate(steps):
                    if number - len(got) == executor.max_in_flight:
                        (output,) = self.outputs(steps[len(got)], await self.wait(executor, 1 + len(got)))
                        got.append(output.token)
                    executor.submit(step)
                while len(got) < count:
                    (output,) = self.outputs(steps[len(got)], await self.wait(executor, 1 + len(got)))
                    got.append(output.token)
                what = f"with {executor.max_in_flight} steps in flight"
                await self.check_text(executor, self.prompt(9), sampling, got, expected, what)

    @pytest.mark.parametrize("by", ["ends", "limit"])
    @in_trio
    async def test_slices_behind_the_end_are_skipped(self, by: str) -> None:
        """Steps run ahead of the token that ends a sequence; others of the step go on, and the slot is bound again."""
        async with self.opened() as executor:
            prompt = self.prompt(9)
            (text,) = await self.generate(executor, prompt, 6, (3,))
            ends, limit = (
                (frozenset(text[2:3]), None) if by == "ends" else (frozenset[int](), len(prompt) + 3)
            )
            ending = Bind(1, GREEDY, prompt, ends, limit)
            slices = [Slice(slot, 0, self.pages(slot), prompt, sample=True) for slot in (0, 1)]
            over = False
            for number in range(6):
                step = Step(number, tuple(slices), (Bind(0, GREEDY, prompt), ending) if number == 0 else ())
                other, ended = await self.run(executor, step)
                what = "a slot beside one whose sequence ended"
                assert isinstance(other.sampled, Sampled), f"{what}: the result is {other.sampled}"
                if other.token != text[number]:
                    before = np.concatenate((prompt, np.array(text[:number], np.int32)))
                    await self.check_text(executor, before, GREEDY, [other.token], [text[number]], what)
                    break  # behind a near tie
                position = len(prompt) + number
                if over:
                    assert isinstance(ended.sampled, Skipped), (
                        f"slot 1 goes on behind its end by Bind.{by}: the result is {ended.sampled}, not {Skipped()}"
                    )
                else:
                    over = ending.ended(ended.token, position)
                slices = [Slice(slot, position, self.pages(slot), FOLLOW_ON, sample=True) for slot in (0, 1)]
            else:
                assert over, f"slot 1 never sampled token {text[2]}, which ends it, though slot 0 did"
            (again,) = await self.generate(executor, prompt, 6, (1,))
            await self.check_text(executor, prompt, GREEDY, again, text, "a slot that had ended, bound again")

    @in_trio
    async def test_token_given_or_remembered(self) -> None:
        """A slice without tokens continues the token sampled last, as if it had been given."""
        async with self.opened() as executor:
            for salt in range(4):
                prompt = self.prompt(9, salt)
                (first,) = await self.run(executor, self.prefill(1, prompt, 1, SEEDED))
                (remembered,) = await self.run(executor, self.following(2, 9, 1, logits=True))
                whole = await self.whole(executor, np.append(prompt, np.int32(first.token)), 0, SEEDED)
                what = f"a slice without tokens, which continues token {first.token}"
                self.check_same(remembered.rows, whole[-1:], what, 9)

    @in_trio
    async def test_state_outlives_the_executor(self) -> None:
        """Another executor continues a sequence on the same KV pages, where they are the runtime's."""
        async with self.opened() as executor:
            prompt = self.prompt(100)
            if not isinstance(executor, Borrower):
                pytest.skip("the executor keeps keys and values by itself, so they end with it")
            whole = await self.whole(executor, prompt)
        file, description = self.open_model(self.models[0])
        store = make_store(executor, description, self.options)
        pieces = (
            Slice(1, 0, self.pages(1), prompt[:70], logits=True),
            Slice(1, 70, self.pages(1), prompt[70:], logits=True),
        )
        for number, piece in enumerate(pieces):
            executor = self.make_executor()
            try:
                await self.open(executor, file, description, self.options, store=store)
                (output,) = await self.run(executor, Step(number, (piece,), (Bind(1, GREEDY, prompt),)))
            finally:
                await executor.aclose()
            right = whole[piece.start : piece.start + piece.count]
            what = "continued by another executor on the same KV pages"
            self.check_same(output.rows, right, what, piece.start)
        file.close()

    @in_trio
    async def test_any_schedule(self) -> None:
        """Steps drawn at random: sequences begin and end, chunks have any length, pages any order."""
        random = np.random.RandomState(5)
        async with self.opened() as executor:
            free = random.permutation(self.pages(3)[0]).tolist()  # slot 3 runs each text alone first
            texts: dict[int, Int32s] = {}
            whole: dict[int, Floats] = {}
            tables: dict[int, Int32s] = {}
            at: dict[int, int] = {}
            binds: list[Bind] = []
            for number in range(40):
                pieces: list[Slice] = []
                room = self.options.max_tokens
                for slot in map(int, random.permutation(3)):
                    if slot in at and at[slot] == len(texts[slot]):
                        free += tables.pop(slot).tolist()
                        del at[slot]
                    if slot not in at:
                        text = self.prompt(random.randint(1, 190), salt=random.randint(100))
                        texts[slot], whole[slot] = text, await self.whole(executor, text, 3)
                        taken = [free.pop(0) for _ in range(-(-len(text) // PAGE_TOKENS))]
                        tables[slot], at[slot] = np.array(taken, np.int32), 0
                        binds.append(Bind(slot, GREEDY, text))
                    most = min(room, len(texts[slot]) - at[slot])
                    if most and random.rand() < 0.8:
                        start = at[slot]
                        count = 1 if random.rand() < 0.4 else random.randint(1, most + 1)
                        tokens = texts[slot][start : start + count]
                        pieces.append(Slice(slot, start, tables[slot], tokens, logits=True))
                        at[slot] += count
                        room -= count
                if not pieces:
                    continue
                step = Step(number, tuple(pieces), tuple(binds))
                binds = []
                for piece, output in zip(pieces, await self.run(executor, step), strict=True):
                    right = whole[piece.slot][piece.start : piece.start + piece.count]
                    what = f"step {number} of a random schedule, slot {piece.slot}"
                    self.check_same(output.rows, right, what, piece.start)
