"""Masks in a step of the processor: many of them, at any moment, give the bits of a bias that forbids the others."""

from __future__ import annotations

import math
import threading
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

import pi2rt
from pi2rt._errors import InternalError
from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.executors.reference.executor import ReferenceExecutor
from pi2rt.executors.simulated.executor import SimulatedExecutor
from pi2rt.runtime.executor import Masking, StepExecutor
from pi2rt.runtime.step import Bind, Int32s, Outcome, Sampled, Sampling, Slice, Step, StepResult, Unusable
from pi2rt.runtime.token_mask import TokenMask, allows, mask_words, masking
from tests.support.running import NOTHING, opened
from tests.support.tiny_models import VOCAB_SIZE, TinyModel, write_gguf

SLOTS = 40  # more than rows of logits at once
CONTEXT = 64
SEEDED = Sampling(temperature=1.5, seed=3)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("masks") / "tiny.gguf", TinyModel())


@asynccontextmanager
async def many(path: Path, executor: StepExecutor | None = None, **options: Any) -> AsyncIterator[Any]:
    made = executor or CpuExecutor()
    options = {"cores": (-1, -1), "max_tokens": 512, "mask_deadline": 1e5} | options
    async with opened(made, path, slots=SLOTS, context=CONTEXT, **options) as it:
        yield it


def prompt(slot: int) -> Int32s:
    return ((np.arange(5 + slot % 7) * 11 + slot) % VOCAB_SIZE).astype(np.int32)


def page(slot: int) -> Int32s:
    return np.array([slot], np.int32)


def some(slot: int) -> npt.NDArray[np.bool_]:
    return np.random.default_rng(slot).random(VOCAB_SIZE) < 0.2


def forbidding(slot: int) -> Sampling:
    bias = tuple((int(token), -math.inf) for token in np.flatnonzero(~some(slot)))
    return Sampling(temperature=SEEDED.temperature, seed=SEEDED.seed, logit_bias=bias, logprobs=2)


def begin(masked: Sequence[bool], *, biased: bool = False) -> Step:
    """A prompt in each slot. ``biased``: with a bias in place of the mask."""
    samplings = [
        forbidding(slot) if biased and wanted else Sampling(temperature=1.5, seed=3, logprobs=2)
        for slot, wanted in enumerate(masked)
    ]
    return Step(
        1,
        tuple(
            Slice(slot, 0, page(slot), prompt(slot), sample=True, masked=wanted and not biased)
            for slot, wanted in enumerate(masked)
        ),
        tuple(Bind(slot, each, prompt(slot)) for slot, each in enumerate(samplings)),
    )


async def run(executor: Any, step: Step) -> StepResult:
    executor.submit(step)
    result: StepResult = await executor.wait()
    return result


@pytest.mark.parametrize("cores", [(-1,), (-1, -1), (-1,) * 5], ids=len)
@pytest.mark.parametrize("wanted", ["all", "every third", "the first", "the last"])
async def test_as_many_masks_as_slots(tiny: Path, wanted: str, cores: tuple[int, ...]) -> None:
    """In any order, from another thread's point of view at any moment. The bits are those of a bias."""
    masked = [
        {"all": True, "every third": slot % 3 == 0, "the first": slot < 3, "the last": slot > 36}[wanted]
        for slot in range(SLOTS)
    ]
    async with many(tiny, cores=cores) as executor:
        expected = (await run(executor, begin(masked, biased=True))).sampled
        for trial in range(6):
            order = np.random.default_rng(trial).permutation(np.flatnonzero(masked)).tolist()
            executor.submit(begin(masked))
            for i, slot in enumerate(order):
                executor.mask(1, slot, masking(some(slot)))
                if trial % 2 and i % 4 == 0:
                    await trio.lowlevel.checkpoint()
            assert (await executor.wait()).sampled == expected


async def test_those_without_masks_do_not_wait_in_vain(tiny: Path) -> None:
    """Of forty, two never get theirs: the others are as they are alone, in whichever part of the rows they are."""
    masked = [True] * SLOTS
    async with many(tiny, mask_deadline=0.3) as executor:
        expected: list[Outcome | None] = [*(await run(executor, begin(masked, biased=True))).sampled]
        executor.submit(begin(masked))
        for slot in range(SLOTS):
            if slot not in (5, 37):
                executor.mask(1, slot, masking(some(slot)))
        result = await executor.wait()
        expected[5] = expected[37] = Unusable(("token_mask",))
        assert [*result.sampled] == expected
        took = result.finished_ns - result.started_ns
        assert took >= 0.3e9
        assert result.kernel_ns <= took - 0.29e9  # waiting is no kernel time


async def test_stopping_while_some_have_masks(tiny: Path) -> None:
    masked = [slot % 2 == 0 for slot in range(SLOTS)]
    async with many(tiny) as executor:
        expected = (await run(executor, begin(masked, biased=True))).sampled
        for given_ in (0, 1, 7, 19):
            executor.submit(begin(masked))
            for slot in range(0, 2 * given_, 2):
                executor.mask(1, slot, masking(some(slot)))
            executor.stop(1)
            with trio.fail_after(30):
                assert (await executor.wait()).stopped
        executor.submit(begin(masked))
        for slot in range(0, SLOTS, 2):
            executor.mask(1, slot, masking(some(slot)))
        assert (await executor.wait()).sampled == expected


async def test_steps_in_flight_wait_each_for_its_own(tiny: Path) -> None:
    """Eight ahead, of which the first has no mask yet; those behind have theirs."""
    async with many(tiny) as executor:
        only = [np.arange(VOCAB_SIZE) == token for token in range(20)]
        executor.submit(
            Step(1, (Slice(0, 0, page(0), prompt(0), sample=True, masked=True),), (Bind(0, SEEDED, NOTHING),))
        )
        for i in range(1, executor.max_in_flight):
            executor.submit(Step(1 + i, (Slice(0, 4 + i, page(0), NOTHING, sample=True, masked=True),)))
            executor.mask(1 + i, 0, masking(only[1 + i]))
        executor.mask(1, 0, masking(only[1]))
        got = [(await executor.wait()).sampled[0] for _ in range(executor.max_in_flight)]
        assert [each.token for each in got if isinstance(each, Sampled)] == list(range(1, 9))


async def test_results_are_told_while_unmasked_steps_run_ahead(tiny: Path) -> None:
    """Short steps are reported together; not those that a mask may follow from."""
    async with many(tiny) as executor:
        bind = Bind(0, SEEDED, NOTHING)
        for trial in range(20):
            executor.submit(Step(1, (Slice(0, 0, page(0), prompt(0)[:1], sample=True),), (bind,)))
            for i in range(2, 9):
                executor.submit(
                    Step(i, (Slice(0, i - 1, page(0), NOTHING, sample=True, masked=i == 2 + trial % 6),))
                )
            with trio.fail_after(30):
                for i in range(1, 9):
                    if i == 2 + trial % 6:
                        executor.mask(i, 0, None)
                    await executor.wait()


@pytest.mark.parametrize("make", [CpuExecutor, ReferenceExecutor])
async def test_drafts_and_masks_together_are_refused(tiny: Path, make: type[CpuExecutor]) -> None:
    piece = Slice(0, 0, page(0), prompt(0), sample=True, drafts=2, masked=True)
    nothing = Slice(0, 0, page(0), prompt(0), masked=True)
    for wrong in piece, nothing:
        async with many(tiny, make()) as executor:
            with pytest.raises(
                (InternalError, ValueError), match=r"^a mask for a slice with . drafts; sample="
            ):
                await run(executor, Step(1, (wrong,), (Bind(0, SEEDED, NOTHING),)))


async def test_buffers_of_masks_are_counted(tmp_path: Path) -> None:
    """A vocabulary of more words takes as many more bytes for each slot of each step in flight."""
    sizes = {}
    for slots in 1, 33:
        async with opened(CpuExecutor(), write_gguf(tmp_path / "a.gguf", TinyModel()), slots=slots) as it:
            sizes[slots] = it.statistics().bytes["activations"]
    each = 4 * mask_words(VOCAB_SIZE)
    assert sizes[33] - sizes[1] >= 32 * 8 * each


@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_mask_as_the_reference_has_it(tiny: Path, data: st.DataObject) -> None:
    """Of several slots, in steps that run ahead, with options of all kinds: the tokens and what is unusable."""
    draw = data.draw
    samplings = [
        Sampling(
            temperature=draw(st.sampled_from([0.0, 0.7, 3.0])),
            top_k=draw(st.sampled_from([0, 1, 3])),
            top_p=draw(st.sampled_from([1.0, 0.4])),
            repetition_penalty=draw(st.sampled_from([1.0, 1.5])),
            logit_bias=draw(st.sampled_from([(), ((5, 9.0), (6, -math.inf), (300, 20.0))])),
            seed=draw(st.integers(0, 2**64 - 1)),
        )
        for _ in range(3)
    ]
    words = st.integers(0, 2**32 - 1) | st.sampled_from([0, 1, 2**32 - 1])
    arrays = st.lists(words, min_size=10, max_size=10).map(lambda each: np.array(each, np.uint32))
    few = st.sets(st.integers(0, VOCAB_SIZE - 1), max_size=3).map(
        lambda ids: masking(np.isin(np.arange(VOCAB_SIZE), [*ids]))
    )
    masks: list[list[TokenMask | None]] = [
        [draw(st.none() | arrays | few) for _ in range(3)] for _ in range(5)
    ]

    async def texts(executor: StepExecutor) -> list[list[Outcome | None]]:
        async with many(tiny, executor, exact_floats=True) as it:
            assert isinstance(it, Masking)
            found = []
            for number, step_masks in enumerate(masks):
                slices = tuple(
                    Slice(
                        slot,
                        0 if not number else len(prompt(slot)) + number - 1,
                        page(slot),
                        NOTHING if number else prompt(slot),
                        sample=True,
                        masked=True,
                    )
                    for slot in range(3)
                )
                binds = tuple(Bind(slot, each, prompt(slot)) for slot, each in enumerate(samplings))
                it.submit(Step(number, slices, () if number else binds))
                for slot, mask in enumerate(step_masks):
                    it.mask(number, slot, mask)
                found.append([*(await it.wait()).sampled])
            return found

    async def both() -> tuple[list[list[Outcome | None]], list[list[Outcome | None]]]:
        return await texts(CpuExecutor()), await texts(ReferenceExecutor())

    got, right = trio.run(both)
    for slot in range(3):
        for number in range(5):
            a, b = got[number][slot], right[number][slot]
            if isinstance(b, Unusable):
                assert a == b
                break  # what continues it may be anything
            assert isinstance(a, Sampled)
            mask = masks[number][slot]
            assert mask is None or allows(mask, VOCAB_SIZE)[a.token]
            assert isinstance(b, Sampled)
            if a.token != b.token:
                assert samplings[slot].temperature > 0  # a boundary that rounding has moved
                break


EXECUTORS = [CpuExecutor, ReferenceExecutor, SimulatedExecutor]


@pytest.mark.parametrize("make", EXECUTORS)
@pytest.mark.parametrize("params", [{}, {"temperature": 1.0, "seed": 5}], ids=["greedy", "seeded"])
async def test_a_text_under_one_mask_is_that_of_a_bias(
    tiny: Path, make: type[CpuExecutor], params: dict[str, Any]
) -> None:
    """Beside neighbours whose texts stay; the functions run in threads of their own."""
    allowed = some(1)
    bias = {int(token): -math.inf for token in np.flatnonzero(~allowed)}
    options: dict[str, Any] = {"max_tokens": 40, "ignore_eos": True, **params}
    loop, calls = threading.current_thread(), [0]

    def function(generated: Sequence[int]) -> TokenMask:
        assert threading.current_thread() is not loop
        calls[0] += 1
        return masking(allowed)

    async with pi2rt.open_runtime(tiny, executor=make, context=256, mask_deadline=300) as runtime:
        right = await runtime.generate([5, 6, 7], logit_bias=bias, **options)
        alone = await runtime.generate([8, 9], **options)
        texts: dict[str, tuple[int, ...]] = {}

        async def one(name: str, prompt: list[int], mask: Any) -> None:
            texts[name] = (await runtime.generate(prompt, token_mask=mask, **options)).tokens

        async with trio.open_nursery() as nursery:
            nursery.start_soon(one, "masked", [5, 6, 7], function)
            nursery.start_soon(one, "neighbour", [8, 9], None)
        assert texts["neighbour"] == alone.tokens
        assert calls == [40]
        if make is SimulatedExecutor:  # which follows no bias
            assert all(allowed[token] for token in texts["masked"])
        else:
            assert texts["masked"] == right.tokens


@pytest.mark.parametrize("make", [CpuExecutor, ReferenceExecutor])
async def test_an_executor_that_is_opened_again_in_the_middle(tiny: Path, make: type[CpuExecutor]) -> None:
    """While it waits for a mask, and the function goes on."""
    async with pi2rt.open_runtime(tiny, executor=make, context=256, mask_deadline=300) as runtime:
        actor = runtime._actors[0]
        calls: list[int] = []
        reopen, reopened = threading.Event(), threading.Event()

        def function(generated: Sequence[int]) -> TokenMask:
            calls.append(len(generated))
            if len(generated) in (0, 7, 20):
                reopen.set()
                assert reopened.wait(60)
                reopened.clear()
            return masking(some(len(generated)))

        async def reopening() -> None:
            for _ in range(3):
                await trio.to_thread.run_sync(reopen.wait)
                reopen.clear()
                await actor.reopen(lambda: None)
                reopened.set()

        options: dict[str, Any] = {"max_tokens": 30, "ignore_eos": True, "temperature": 1.0, "seed": 1}
        async with trio.open_nursery() as nursery:
            nursery.start_soon(reopening)
            text = await runtime.generate([5, 6, 7], token_mask=function, **options)
        assert calls == list(range(30))
        assert runtime.statistics().engine.rebuilds == 3
        again = await runtime.generate([5, 6, 7], token_mask=lambda g: masking(some(len(g))), **options)
        assert again.tokens == text.tokens
