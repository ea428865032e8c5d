"""An engine over a simulated executor, which holds every step against the rules of the KV cache; and the
check that nothing is left when it closes."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import trio
import trio.testing

from pi2rt._errors import InternalError
from pi2rt.engine import Chunk, Engine, EngineOptions, SamplingParams
from pi2rt.engine.lane import PrefillLane
from pi2rt.engine.masker import MaskFunction
from pi2rt.executors.simulated.cache import SimulatedPages
from pi2rt.executors.simulated.executor import SimulatedExecutor, hashed_token
from pi2rt.formats import ModelFile
from pi2rt.memory import StateLayout, StateStore, WindowPool, WindowPoolStatistics
from pi2rt.models import ModelDescription
from pi2rt.models.states import PAGE_TOKENS
from pi2rt.runtime.actor import Actor
from pi2rt.runtime.executor import ExecutorOptions, StepExecutor
from pi2rt.runtime.step import Sampling, Step
from pi2rt.runtime.trace import Trace
from pi2rt.tokenizer import Tokenizer
from tests.support.tiny_models import EOS, VOCAB_SIZE

LETTERS = VOCAB_SIZE - 64
"""Tokens below are ordinary ones."""


@dataclass
class Log:
    """What an executor was asked to do."""

    steps: list[Step] = field(default_factory=list)
    stops: list[int] = field(default_factory=list)
    executors: int = 0

    def prefill_tokens(self) -> list[int]:
        """Of each step."""
        return [sum(len(part.tokens) for part in step.slices) for step in self.steps]

    def decode_tokens(self) -> list[int]:
        return [sum(not len(part.tokens) for part in step.slices) for step in self.steps]


class LoggingExecutor(SimulatedExecutor):
    """``windows``: of the KV pages; each step must find the windowed bytes that it sees and writes."""

    def __init__(self, log: Log, windows: WindowPool | None = None, **options: Any) -> None:
        super().__init__(**options)
        self._log, self._windows = log, windows
        log.executors += 1

    def submit(self, step: Step) -> None:
        if self._windows is not None:
            for part in step.slices:
                first, end = self._windows.first(part.start), -(-(part.start + part.count) // PAGE_TOKENS)
                for page in part.pages[first:end].tolist():
                    if not self._windows.has(page):
                        raise InternalError(f"{step}: page {page} has no memory for windowed bytes")
        super().submit(step)
        self._log.steps.append(step)

    def stop(self, step_id: int) -> None:
        super().stop(step_id)
        self._log.stops.append(step_id)


@dataclass
class Opened:
    """``prefill``: what the executors of the lanes that compute prompts were asked to do."""

    engine: Engine
    actor: Actor
    log: Log
    prefill: list[Log] = field(default_factory=list)
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def windows(self) -> WindowPoolStatistics:
        found = self.engine.statistics().windows
        assert found is not None
        return found

    async def run(self) -> None:
        with self.scope:
            await self.engine.run()

    async def end(self) -> None:
        """Cancels the engine's task."""
        self.scope.cancel()
        await trio.testing.wait_all_tasks_blocked()

    async def tokens(self, prompt: Sequence[int], max_tokens: int, **params: Any) -> list[int]:
        return [chunk.token for chunk in await self.chunks(prompt, max_tokens=max_tokens, **params)]

    async def chunks(
        self, prompt: Sequence[int], *, token_mask: MaskFunction | None = None, **params: Any
    ) -> list[Chunk]:
        params.setdefault("ignore_eos", True)
        async with self.engine.stream(prompt, SamplingParams(**params), token_mask=token_mask) as stream:
            return [chunk async for chunk in stream]

    async def idle(self) -> None:
        """Waits until no step is in flight and no sequence is on its way out."""
        with trio.fail_after(100):
            while (s := self.engine.statistics()).steps_in_flight or s.leaving:  # noqa: ASYNC110 - simulated time
                await trio.sleep(0.001)


@asynccontextmanager
async def opened(
    tokenizer: Tokenizer,
    *,
    slots: int = 4,
    context: int = 1024,
    pages: int | None = None,
    max_tokens: int = 512,
    mixed_chunk: int = 64,
    stream_buffer: int = 1024,
    max_queue: int = 128,
    trace: Trace | None = None,
    make_executor: Callable[[Log], StepExecutor] | None = None,
    prefill: Sequence[dict[str, Any]] = (),
    abandoned: int = 0,
    mask_deadline: float = 10.0,
    layout: StateLayout | None = None,
    window_pages: int | None = None,
    **executor: Any,
) -> AsyncIterator[Opened]:
    """``executor``: keywords of SimulatedExecutor. ``prefill``: for each lane that computes prompts, such keywords, and
    its ``max_tokens`` and ``least_tokens``. On leaving, every slot and page must be free again,
    but for ``abandoned`` pages. ``layout``: of the state of sequences, where it has blocks with a window;
    ``window_pages``: that have memory for these at a time."""
    pages = slots * -(-context // PAGE_TOKENS) if pages is None else pages
    log = Log()
    most = max(max_tokens, *(keywords.get("max_tokens", 0) for keywords in prefill), 1)
    options = ExecutorOptions(
        slots=slots, pages=pages, context=context, max_tokens=most, mask_deadline=mask_deadline
    )
    store: StateStore | None = None
    if layout is not None:
        store = StateStore(layout, pages, slots, window_pages)
        executor["windows"] = store.pool.windows
    if prefill or store is not None:
        executor["pages"] = SimulatedPages(pages)
    model = cast("ModelDescription", SimpleNamespace(vocab_size=VOCAB_SIZE))  # it reads nothing else

    async def open_executor(made: StepExecutor) -> None:
        await made.open(cast("ModelFile", None), model, options, None, lambda done, total: None)

    actor = Actor(
        "simulated",
        (lambda: LoggingExecutor(log, **executor)) if make_executor is None else lambda: make_executor(log),
        open_executor,
        trace,
    )
    lanes: list[PrefillLane] = []
    logs = [Log() for _ in prefill]
    for number, (keywords, its_log) in enumerate(zip(prefill, logs, strict=True), 1):
        shared = {name: executor[name] for name in ("pages", "windows") if name in executor}
        lane = {"max_tokens": max_tokens, **shared} | keywords
        tokens, least = lane.pop("max_tokens"), lane.pop("least_tokens", 1)
        make = partial(LoggingExecutor, its_log, **lane)
        lanes.append(PrefillLane(Actor(f"prefill {number}", make, open_executor, trace), tokens, least))
    async with trio.open_nursery() as nursery:
        await nursery.start(actor.run)
        for each in lanes:
            await nursery.start(cast("Actor", each.actor).run)
        engine = Engine(
            actor,
            tokenizer,
            EngineOptions(
                vocab_size=VOCAB_SIZE,
                slots=slots,
                pages=pages,
                context=context,
                max_tokens=max_tokens,
                mixed_chunk=mixed_chunk,
                stream_buffer=stream_buffer,
                max_queue=max_queue,
                mask_deadline=mask_deadline,
            ),
            trace,
            prefill=tuple(lanes),
            store=store,
        )
        made = Opened(engine, actor, log, logs)
        nursery.start_soon(made.run)
        yield made
        if made.scope.cancel_called:
            for one in [actor, *(cast("Actor", lane.actor) for lane in lanes)]:
                await one.aclose()
            return
        await made.idle()
        statistics = engine.statistics()
        used = statistics.pages.held - statistics.prefixes.unused
        assert (used, statistics.free_slots) == (abandoned, slots)
        if store is not None and store.pool.windows is not None:
            assert (made.windows.held > 0) == (abandoned > 0)
            assert made.windows.peak_backed <= store.window_pages + abandoned
        engine.close()
        assert engine.statistics().pages.held == abandoned
        if store is not None:
            store.close()
        for one in [actor, *(cast("Actor", lane.actor) for lane in lanes)]:
            await one.aclose()


def continuation(prompt: Sequence[int], count: int) -> list[int]:
    """The first ``count`` greedy tokens after ``prompt``."""
    known = list(prompt)
    for generated in range(count):
        known.append(hashed_token(np.array(known, np.int32), generated, Sampling()) % VOCAB_SIZE)
    return known[len(prompt) :]


def numbers(count: int, seed: int = 0) -> list[int]:
    """A prompt of ``count`` ordinary tokens; different for each seed."""
    return np.random.default_rng(seed).integers(0, LETTERS, count).tolist()


__all__ = ["EOS", "Log", "LoggingExecutor", "Opened", "continuation", "numbers", "opened"]
