"""Running an executor in tests: one sequence, one step."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from pi2rt.formats import ModelFile, open_model_file
from pi2rt.models import ModelDescription, describe
from pi2rt.models.states import PAGE_TOKENS
from pi2rt.runtime.executor import ExecutorOptions, Progress, StepExecutor, make_store
from pi2rt.runtime.step import Bind, Sampling, Slice, Step

NOTHING = np.array([], np.int32)


def no_progress(done: int, total: int) -> None: ...


@asynccontextmanager
async def opened(
    executor: StepExecutor,
    path: Path,
    *,
    slots: int = 4,
    context: int = 1024,
    model_context: int | None = None,
    pages: int | None = None,
    **options: Any,
) -> AsyncIterator[StepExecutor]:
    """The executor with the model at ``path``, closed at the end. ``model_context``: what the model is
    described for; see ``describe``. ``options``: of ``ExecutorOptions``; floats are exact unless they say
    otherwise."""
    pages = slots * -(-context // PAGE_TOKENS) if pages is None else pages
    given = ExecutorOptions(
        **{"slots": slots, "pages": pages, "context": context, "max_tokens": context, "exact_floats": True}
        | options
    )
    with open_model_file(path) as file:
        try:
            await open_with_state(executor, file, given, model=describe(file, model_context))
            yield executor
        finally:
            await executor.aclose()


async def open_with_state(
    executor: StepExecutor,
    file: ModelFile,
    options: ExecutorOptions,
    progress: Progress = no_progress,
    *,
    model: ModelDescription | None = None,
) -> None:
    """Opens an executor with state of its own to borrow."""
    model = model or describe(file)
    await executor.open(file, model, options, make_store(executor, model, options), progress)


def page_table(slot: int, context: int = 1024) -> npt.NDArray[np.int32]:
    """Pages of its own for a slot, in an order that is not the plain one."""
    count = -(-context // PAGE_TOKENS)
    return np.arange(slot * count, (slot + 1) * count, dtype=np.int32)[::-1].copy()


async def all_logits(
    executor: StepExecutor, tokens: npt.NDArray[np.int32], context: int = 1024
) -> npt.NDArray[np.float32]:
    """Logits (tokens, vocab_size) of one fresh sequence, in one step."""
    part = Slice(0, 0, page_table(0, context), tokens, logits=True)
    executor.submit(Step(0, (part,), (Bind(0, Sampling(), NOTHING),)))
    logits = (await executor.wait()).logits[0]
    assert logits is not None
    return logits


async def greedy(
    executor: StepExecutor,
    prompt: npt.NDArray[np.int32],
    count: int,
    *,
    sampling: Sampling | None = None,
    slot: int = 0,
    context: int = 1024,
) -> list[int]:
    """``count`` tokens after ``prompt``; the steps run ahead as the engine's do."""
    pages = page_table(slot, context)
    bind = Bind(slot, sampling or Sampling(), prompt)
    executor.submit(Step(0, (Slice(slot, 0, pages, prompt, sample=True),), (bind,)))
    out: list[int] = []
    for i in range(count):
        if i + 1 < count:
            start = len(prompt) + i
            executor.submit(Step(i + 1, (Slice(slot, start, pages, NOTHING, sample=True),)))
        sampled = (await executor.wait()).sampled[0]
        assert sampled is not None
        out.append(sampled.token)
    return out


async def stopped_steps_leave_nothing(
    executor: StepExecutor, tokens: npt.NDArray[np.int32], expected: npt.NDArray[np.float32], count: int
) -> None:
    """Stops a prefill of ``tokens`` ``count`` times, wherever it is then; after some the logits are ``expected``."""
    for number in range(count):
        bind = (Bind(1, Sampling(), NOTHING),)
        executor.submit(Step(1000 + number, (Slice(1, 0, page_table(1), tokens, sample=True),), bind))
        executor.stop(1000 + number)
        await executor.wait()
        if number % 5 == 0:
            np.testing.assert_array_equal(await all_logits(executor, tokens), expected)
