"""The executor computes the model: its logits are those of the reference executor, for each kind of block."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from pi2rt._errors import UnsupportedModelError
from pi2rt.models import Block, Norm
from pi2rt.models.parts import Named
from pi2rt.runtime.executor import StepExecutor, make_store
from pi2rt.runtime.step import Bind, Floats, Int32s, Slice, Step
from pi2rt.testing.harness import GREEDY, Harness, in_trio, no_progress

_LENGTH = 230  # four pages, and far behind a window of 70


@dataclass(frozen=True, slots=True)
class _Unknown(Block):
    """A kind of block that no executor has."""

    kind: ClassVar[str] = "conformance-test"
    norm: Norm
    post_norm: Norm | None = None

    def own_tensors(self, dim: int) -> Named:
        yield from ()


class Agreement(Harness):
    """For each of ``models``."""

    async def in_chunks(self, executor: StepExecutor, tokens: Int32s, cuts: tuple[int, ...]) -> Floats:
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

    @in_trio
    async def test_an_unknown_kind_of_block_is_refused(self) -> None:
        """When the model is opened, and by its name: another answer would be a wrong one."""
        file, model = self.open_model(self.models[0])
        *layers, last = model.layers
        unknown = replace(last, blocks=(*last.blocks, _Unknown(last.blocks[0].norm)))
        model = replace(model, layers=(*layers, unknown))
        executor = self.make_executor()
        store = make_store(executor, model, self.options)
        refusal: Exception | None = None
        try:
            await executor.open(file, model, self.options, store, no_progress)
        except Exception as error:
            refusal = error
        finally:
            await executor.aclose()
            file.close()
        assert refusal is not None, (
            "a model with an unknown kind of block was opened: its answers would be wrong"
        )
        assert isinstance(refusal, UnsupportedModelError), (
            f"an unknown kind of block must raise UnsupportedModelError, not {refusal!r}"
        )
        assert _Unknown.kind in str(refusal), (
            f"the error does not name the block of kind {_Unknown.kind}: {refusal}"
        )
