"""The executor computes the model: its logits are those of the reference executor, for each kind of block."""

from __future__ import annotations

import numpy as np

from pi2rt.runtime.executor import Executor
from pi2rt.runtime.step import Bind, Floats, Int32s, Slice, Step
from pi2rt.testing.harness import GREEDY, Harness, in_trio

_LENGTH = 230  # four pages, and far behind a window of 70


class Agreement(Harness):
    """For each of ``models``."""

    async def in_chunks(self, executor: Executor, tokens: Int32s, cuts: tuple[int, ...]) -> Floats:
        rows = []
        binds: tuple[Bind, ...] = (Bind(0, GREEDY, tokens),)
        for start, end in zip((0, *cuts), (*cuts, len(tokens)), strict=True):
            piece = Slice(0, start, self.pages(0), tokens[start:end], logits=True)
            rows.append((await self.run(executor, Step(end, (piece,), binds)))[0].rows)
            binds = ()
        return np.concatenate(rows)

    @in_trio
    async def test_logits_of_a_prompt_are_those_of_the_reference(self, model: str) -> None:
        async with self.opened(model) as executor:
            tokens = self.prompt(_LENGTH)
            got = await self.in_chunks(executor, tokens, (170,))
        self.check_reference(got, await self.reference_logits(model, tokens), f"{model}, a prompt")

    @in_trio
    async def test_logits_of_single_tokens_are_those_of_the_reference(self, model: str) -> None:
        async with self.opened(model) as executor:
            tokens = self.prompt(150, salt=1)
            got = await self.in_chunks(executor, tokens, (60, *range(61, 80), 140, *range(141, 150)))
        self.check_reference(got, await self.reference_logits(model, tokens), f"{model}, tokens one by one")
