"""Slices behind the end of their sequence: steps that ran ahead leave its state as it was."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.formats.placement import Placement
from pi2rt.memory.state_store import Bytes
from pi2rt.planner.pack.convert import convert
from pi2rt.runtime.executor import StepExecutor
from pi2rt.runtime.step import Bind, Int32s, Outcome, Sampled, Sampling, Skipped, Slice, StateCopy, Step
from tests.executors.test_copies import EXECUTORS, WITH_STATE, Make, opened, table, token
from tests.executors.test_streaming import MODEL, READS, TYPES, every_matrix, ring_for
from tests.support.running import NOTHING
from tests.support.running import opened as opened_alone
from tests.support.tiny_models import VOCAB_SIZE, TinyModel, write_gguf

PROMPT: Int32s = (np.arange(60) * 5 % VOCAB_SIZE).astype(np.int32)
PAGES = table(0, 1, 2, 3)
COUNT = 12


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("ended") / "tiny.gguf", TinyModel())


def bound(slot: int = 0, seed: int = 5, **ends: object) -> Bind:
    return Bind(slot, Sampling(temperature=8.0, seed=seed), PROMPT, **ends)  # type: ignore[arg-type]


async def ahead(
    executor: StepExecutor, bind: Bind, count: int = COUNT, pages: Int32s = PAGES
) -> list[Outcome | None]:
    """What the prompt and ``count - 1`` steps behind it bring, submitted ahead of the results."""
    executor.submit(Step(1, (Slice(bind.slot, 0, pages, PROMPT, sample=True),), (bind,)))
    outcomes = []
    for i in range(count):
        if i + 1 < count:
            executor.submit(Step(2 + i, (Slice(bind.slot, 60 + i, pages, NOTHING, sample=True),)))
        outcomes.append((await executor.wait()).sampled[0])
    return outcomes


def tokens(outcomes: list[Outcome | None]) -> list[int]:
    return [each.token for each in outcomes if isinstance(each, Sampled)]


def end_of(text: list[int]) -> int:
    """The number of a token that is not there before, some way behind the first."""
    return next(i for i in range(3, len(text)) if text[i] not in text[:i])


@pytest.mark.parametrize("by", ["token", "limit"])
@pytest.mark.parametrize("make", EXECUTORS)
async def test_what_comes_behind_the_end_is_skipped(make: Make, by: str, tiny: Path) -> None:
    async with opened(make, tiny) as it:
        text = tokens(await ahead(it.executor, bound()))
        assert len(text) == COUNT
        last = end_of(text)
        ends = {"ends": frozenset({text[last], 299})} if by == "token" else {"limit": 60 + last + 1}
        outcomes = await ahead(it.executor, bound(**ends))
        assert tokens(outcomes) == text[: last + 1]
        assert outcomes[last + 1 :] == [Skipped()] * (COUNT - last - 1)
        assert tokens(await ahead(it.executor, bound())) == text  # the next bind begins anew


@pytest.mark.parametrize("make", WITH_STATE)
async def test_the_state_is_that_of_the_end(make: Make, tiny: Path) -> None:
    async with opened(make, tiny) as it:
        text = tokens(await ahead(it.executor, bound()))
    last = end_of(text)

    async def state(count: int, bind: Bind) -> list[Bytes]:
        async with opened(make, tiny) as it:
            await ahead(it.executor, bind, count)
            return [it.store.export_page(int(page)) for page in PAGES]

    exact, beyond = await state(last + 1, bound()), await state(COUNT, bound())
    skipped = await state(COUNT, bound(ends=frozenset({text[last]})))
    for page, expected in zip(skipped, exact, strict=True):
        np.testing.assert_array_equal(page, expected)
    assert any((a != b).any() for a, b in zip(exact, beyond, strict=True))


@pytest.mark.parametrize("make", EXECUTORS)
async def test_others_in_the_step_go_on(make: Make, tiny: Path) -> None:
    """Before and behind the slice that is skipped, with one token and with many; scores and logits stay with theirs."""
    chunk = PROMPT[:9]
    async with opened(make, tiny) as it:
        first, second, third = table(0, 1), table(2, 3), table(4, 5)
        alone = [tokens(await ahead(it.executor, bound(0, 8), 4, first))]
        bind = Bind(2, Sampling(), NOTHING)
        whole = await it.run(Step(90, (Slice(2, 0, third, chunk, targets=chunk, logits=True),), (bind,)))
        end = tokens(await ahead(it.executor, bound(1, 6), 1, second))[0]
        assert tokens(await ahead(it.executor, bound(0, 8), 1, first)) == alone[0][:1]
        ended = bound(1, 6, ends=frozenset({end}))
        await it.run(Step(91, (Slice(1, 0, second, PROMPT, sample=True),), (ended,)))
        text = alone[0][:1]
        for i in range(3):
            behind = (Slice(2, 0, third, chunk, targets=chunk, logits=True),) if i == 1 else ()
            parts = (
                Slice(1, 60 + i, second, NOTHING, sample=True, logits=True),
                Slice(0, 60 + i, first, NOTHING, sample=True),
                *behind,
            )
            result = await it.run(Step(92 + i, parts))
            assert result.sampled[0] == Skipped()
            assert result.logits[0] is None
            text.append(token(result, 1))
            if behind:
                for found, expected in (
                    (result.logits[2], whole.logits[0]),
                    (result.scores[2], whole.scores[0]),
                ):
                    assert found is not None
                    assert expected is not None
                    np.testing.assert_array_equal(found, expected)
        assert text == alone[0]


@pytest.mark.parametrize("make", EXECUTORS)
async def test_tokens_that_are_named_are_computed(make: Make, tiny: Path) -> None:
    async with opened(make, tiny) as it:
        text = tokens(await ahead(it.executor, bound(), 2))
        outcomes = await ahead(it.executor, bound(ends=frozenset({text[0]})), 2)
        assert outcomes[1] == Skipped()
        named = Slice(0, 60, PAGES, np.array(text[:1], np.int32), sample=True)
        assert token(await it.run(Step(9, (named,)))) == text[1]
        follow_on = Slice(0, 61, PAGES, NOTHING, sample=True)
        assert (await it.run(Step(10, (follow_on,)))).sampled == (Skipped(),)


async def test_steps_without_any_token_read_no_weights(tmp_path: Path) -> None:
    """Of a streamed model, whose next step finds the pieces that it expects."""
    path = tmp_path / "m.pi2"
    convert(write_gguf(tmp_path / "m.gguf", MODEL, weight_type="Q4_0", types=TYPES), path)
    names = every_matrix(path)
    given = {
        "placements": dict.fromkeys(names, Placement.STREAMED),
        "ring_bytes": ring_for(path, names),
        "reads": READS,
        "exact_floats": False,
    }
    async with opened_alone(CpuExecutor(), path, slots=1, context=256, **given) as executor:
        text = tokens(await ahead(executor, bound()))
        last = end_of(text)
        for _ in range(2):
            outcomes = await ahead(executor, bound(ends=frozenset({text[last]})))
            assert tokens(outcomes) == text[: last + 1]
            used = executor.statistics().recent[-1]
            assert (used.weight_bytes, used.streamed_bytes) == (0, 0)
            nothing = Slice(0, 60, PAGES, NOTHING, sample=True)
            executor.submit(Step(50, (nothing,), copies=(StateCopy("page", 0, 3),)))
            assert (await executor.wait()).sampled == (Skipped(),)
            assert tokens(await ahead(executor, bound())) == text
            assert executor.statistics().recent[-1].weight_bytes > 0
