"""The Trio API: a model that is open, and the requests to it."""

from __future__ import annotations

import math
import os
from collections.abc import AsyncIterator, Iterable, Mapping, Sequence, Sized
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any, SupportsFloat, SupportsIndex, TypeAlias, TypeVar, Unpack

import trio

from pi2rt._errors import ClosedError, ExecutorError, RequestError
from pi2rt.engine import (
    Chunk,
    Completion,
    Engine,
    EngineStatistics,
    SamplingParams,
    TokenStream,
)
from pi2rt.engine.lane import PrefillLane
from pi2rt.engine.masker import MaskFunction
from pi2rt.engine.prompt_encoder import PromptEncoder
from pi2rt.engine.sampling_params import SamplingKeywords, number
from pi2rt.host.limits import limits_explained
from pi2rt.host.memory import peak_rss_bytes
from pi2rt.host.output_file import OutputFile
from pi2rt.host.owner import Owner
from pi2rt.opening.opening import Opening, load_tokenizer_trimmed
from pi2rt.opening.options import RuntimeKeywords, RuntimeOptions
from pi2rt.opening.own_memory import OWN
from pi2rt.runtime.actor import Actor, ActorStatistics
from pi2rt.runtime.assistant import assistant_statistics
from pi2rt.runtime.channel import ChannelStatistics
from pi2rt.runtime.executor import Progress
from pi2rt.runtime.graph import graph_of
from pi2rt.runtime.graph_statistics import EdgeStatistics, NodeStatistics, edge_statistics, node_statistics
from pi2rt.runtime.own_nursery import open_own_nursery
from pi2rt.runtime.step import Floats
from pi2rt.runtime.trace import Trace
from pi2rt.tokenizer import Tokenizer
from pi2rt.tokenizer.messages import shown

T = TypeVar("T")

Prompt: TypeAlias = str | Iterable[SupportsIndex] | Iterable[Mapping[str, Any]]
"""Text, token ids, or messages for the model's chat template: ``{"role": "user", "content": "..."}``, where ``content``
may also be a list of text parts as OpenAI has them, ``[{"type": "text", "text": "..."}]``.
A control token spelled out in text becomes that token: mind where your text comes from. In messages it stays text,
unless the model is opened with ``content_control_tokens``."""

CLOSE_SECONDS = 5.0
"""How long steps in flight may take to stop when a runtime is closed."""


@dataclass(frozen=True, slots=True)
class RuntimeStatistics:
    """A snapshot. ``actors``: of each lane the one that leads, then its assistants. ``memory``: bytes by what they are
    for, and ``peak_rss`` of the whole process. ``nodes``, ``edges``: the actor graph, with what each did and what went
    over each."""

    engine: EngineStatistics
    actors: tuple[ActorStatistics, ...]
    channels: tuple[ChannelStatistics, ...]
    memory: Mapping[str, int]
    nodes: tuple[NodeStatistics, ...]
    edges: tuple[EdgeStatistics, ...]


class Runtime:
    """An open model. Made by ``open_runtime``; all methods are for tasks of the same Trio run."""

    def __init__(
        self,
        engine: Engine,
        actors: Sequence[Actor],
        tokenizer: Tokenizer,
        opening: Opening,
    ) -> None:
        self._engine, self._actors, self._opening = engine, actors, opening
        self._content_control_tokens = opening.chosen.content_control_tokens
        self._prompts: PromptEncoder | None = PromptEncoder(tokenizer, engine.options.context)
        self.model = opening.info
        self.plan = opening.plan
        """What runs where, and what lies where."""
        self._graph = graph_of(opening.plan)
        self._owner = Owner()
        self._entering = 0  # requests whose prompts are being tokenised
        self._entered = trio.Event()  # set when one of them is with the engine, or has failed
        self._closing = False
        self._stopped = trio.Event()
        self._scope = trio.CancelScope()

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_prefill: Progress | None = None,
        token_mask: MaskFunction | None = None,
        **overrides: Unpack[SamplingKeywords],
    ) -> AbstractAsyncContextManager[TokenStream]:
        """``async with runtime.stream("Why?", max_tokens=50) as chunks: async for chunk in chunks: ...``

        Leaving the block, or cancelling it, ends the request within a layer of prefill or a step of decode.

        Args:
            prompt: text, token ids or messages.
            params: how to make the text; greedy by default.
            on_prefill: ``on_prefill(done, total)``, in prompt tokens.
            token_mask: ``token_mask(generated)`` says which tokens may come next, for texts that keep to a grammar. It
                is given the token ids generated so far (a read-only sequence of int), and returns uint32
                (ceil(vocabulary / 32),), whose bit i % 32 of word i // 32 allows token i; or None, which allows all.
                It is called in a worker thread, once for each token, while the model computes; never twice at once. A
                step waits for it for ``mask_deadline`` seconds.
            overrides: fields of ``SamplingParams`` to change in ``params``.

        Raises:
            RequestError: (from the call) a parameter is out of its range, or the executor takes no token masks; (from
                entering the block) the prompt is empty or not valid for this model; (from iterating) ``token_mask``
                raised, which is the cause, gave something else, took too long, or leaves no token.
            ContextOverflowError: (from entering) prompt and ``max_tokens`` together exceed the context.
            TemplateError: (from entering) the model's chat template fails on these messages.
            BusyError: (from entering) ``max_queue`` requests wait already.
            ExecutorError: (from iterating) the executor failed on this request; the runtime stays usable.
            ClosedError: the runtime is closed, or is closing, or was opened by another process.
        """
        return self._stream(prompt, self.chosen(params, overrides, token_mask), on_prefill, token_mask)

    @asynccontextmanager
    async def _stream(
        self,
        prompt: Prompt,
        params: SamplingParams,
        on_prefill: Progress | None,
        token_mask: MaskFunction | None,
    ) -> AsyncIterator[TokenStream]:
        self._check_open()
        self._entering += 1
        try:
            with self._engine.reserve() as ticket:
                tokens = await self._encode(prompt, params.max_tokens)
                stream = self._engine.stream(
                    tokens, params, on_prefill=on_prefill, token_mask=token_mask, ticket=ticket
                )
        finally:
            self._entering -= 1
            self._entered.set()
        async with stream as chunks:
            yield chunks

    async def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_prefill: Progress | None = None,
        token_mask: MaskFunction | None = None,
        **overrides: Unpack[SamplingKeywords],
    ) -> Completion:
        """The whole text at once. Arguments and errors as for ``stream``."""
        chunks: list[Chunk] = []
        async with self.stream(
            prompt, params, on_prefill=on_prefill, token_mask=token_mask, **overrides
        ) as stream:
            async for chunk in stream:
                chunks.append(chunk)  # noqa: PERF401 - not a comprehension: what came stays for the debugger
        return Completion.of(chunks)

    def chosen(
        self,
        params: SamplingParams | None,
        overrides: SamplingKeywords,
        token_mask: MaskFunction | None = None,
    ) -> SamplingParams:
        """The parameters of a request, checked as far as possible without its prompt. For the other APIs too: safe
        from any thread.

        Raises:
            RequestError, ClosedError: as ``stream`` when it is called.
        """
        self._check_open()
        chosen = SamplingParams.of(params, overrides)
        self._engine.check(chosen, token_mask)
        return chosen

    async def score(self, tokens: Iterable[SupportsIndex]) -> Floats:
        """The natural log probability of each token but the first, given those before it. float32 (n - 1,).

        Raises:
            RequestError, ContextOverflowError, BusyError, ExecutorError, ClosedError: as ``stream``.
        """
        self._check_open()
        return await self._engine.score(tokens)

    async def logits(self, tokens: Iterable[SupportsIndex]) -> Floats:
        """The logits of the token after each of ``tokens``. float32 (n, vocab_size). Errors as for
        ``score``."""
        self._check_open()
        return await self._engine.logits(tokens)

    async def resize(self, memory: int | str) -> None:
        """Another memory budget, also while requests run. Returns when memory is given up, or filled. No text changes.

        Where neurons are in a cache, it gives up what no longer fits, or grows and is filled with neurons that were
        used most of late; cancelled while it is filled, it keeps the new size. Of other models, the weights are loaded
        again, as many as have room now, and the others will be read in every step; requests wait for that, and their
        tokens are computed again. Cancelling this does not end it.

        Args:
            memory: what the whole process may take, in bytes or as "2G".

        Raises:
            RequestError: the model was opened without a budget, or with exact floats, or the executor cannot do it.
            MemoryBudgetError: too little for what must stay; the message says how much that is.
            ExecutorError, ClosedError: as ``stream``.
        """
        self._check_open()
        await self._opening.resize(self._actors[0], RuntimeOptions(memory=memory).memory_bytes)

    def statistics(self) -> RuntimeStatistics:
        """What is going on now; cheap enough to ask every second.

        Raises:
            ClosedError: the runtime is closed, or was opened by another process.
        """
        self._check_not_closed()
        leaders = [actor.statistics() for actor in self._actors]
        actors = [each for leader in leaders for each in (leader, *assistant_statistics(leader))]
        memory: dict[str, int] = {}
        for lane, leader in enumerate(leaders):
            for what, size in leader.executor.bytes.items():
                if not lane or what != "kv":  # which lanes share
                    memory[what] = memory.get(what, 0) + size
        memory["peak_rss"] = peak_rss_bytes()
        channels = tuple(leader.inbox for leader in leaders)
        engine = self._engine.statistics()
        handed_over = {lane.name: lane.handed_over for lane in engine.lanes}
        return RuntimeStatistics(
            engine,
            tuple(actors),
            channels,
            memory,
            node_statistics(self._graph, leaders, engine.requests),
            edge_statistics(self._graph, leaders, handed_over),
        )

    async def aclose(self, *, drain: SupportsFloat = 0.0) -> None:
        """Ends all requests with ClosedError and frees the model. Safe to call twice; leaving
        ``open_runtime`` calls it. In a forked child it does nothing.

        Args:
            drain: seconds. For so long, requests that wait or run may finish, while new ones are refused; then they
                are ended. Cancelling this, or calling it again without ``drain``, ends them at once.

        Raises:
            RequestError: ``drain`` is no number of seconds.
            ExecutorError: the executor did not stop in time.
        """
        if self._owner.elsewhere:
            return
        seconds = number("drain", drain, 0, math.inf)
        self._closing = True
        try:
            if seconds and not self._engine.closed:
                with trio.move_on_after(seconds):
                    await self._drained()
        finally:
            self._engine.close()
        with trio.move_on_after(CLOSE_SECONDS):
            await self._stopped.wait()
        self._scope.cancel()
        await self._stopped.wait()
        errors: list[ExecutorError] = []
        for actor in self._actors:
            try:
                await actor.aclose()
            except ExecutorError as error:
                errors.append(error)
        self._prompts = (
            None  # with the tokenizer, of up to 100 MB, which whoever keeps a closed runtime should not hold
        )
        if errors:
            for other in errors[1:]:
                errors[0].add_note(f"and {other}")
            raise errors[0]

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's.

        Raises:
            ClosedError: the runtime is closed. Who needs it longer keeps it.
        """
        return self._encoder.tokenizer

    @property
    def _encoder(self) -> PromptEncoder:
        if self._prompts is None:
            raise ClosedError("the engine is closed")
        return self._prompts

    @property
    def elsewhere(self) -> bool:
        """Whether this is a forked child of the process that opened the runtime."""
        return self._owner.elsewhere

    async def _drained(self) -> None:
        while self._entering:
            if self._entered.is_set():
                self._entered = trio.Event()
            await self._entered.wait()
        await self._engine.idle()

    def _check_open(self) -> None:
        self._check_not_closed()
        if self._closing:
            raise ClosedError("the engine is closing, and takes no more requests")

    def _check_not_closed(self) -> None:
        self._owner.check()
        if self._engine.closed:
            raise ClosedError("the engine is closed")

    async def _encode(self, prompt: Prompt, max_tokens: int | None) -> Iterable[Any]:
        """Token ids of any kind of prompt."""
        if isinstance(prompt, str):
            return await self._encoder.tokenise(prompt, max_tokens, add_special=True)
        if isinstance(prompt, Mapping):
            raise RequestError(
                "prompt: a mapping is given where a list of messages is needed; put the message into a list: "
                "[{'role': 'user', 'content': '...'}]"
            )
        if not isinstance(prompt, Iterable) or isinstance(prompt, bytes | bytearray):
            raise RequestError(f"prompt: text, token ids or messages are needed, not {type(prompt).__name__}")
        items = iter(prompt)
        parts: list[Any] = list(islice(items, self.model.context + 1))
        if all(hasattr(kind, "__index__") for kind in set(map(type, parts))):
            return prompt if isinstance(prompt, Sized) else iter(parts)  # the engine checks each token
        if not any(isinstance(part, Mapping) for part in parts):
            index, part = next((i, part) for i, part in enumerate(parts) if not hasattr(part, "__index__"))
            raise RequestError(
                f"prompt: item {index} is {shown(part)}; a list has token ids, which are integers, or messages such as "
                f"{{'role': 'user', 'content': '...'}}; text is given as one string"
            )
        parts += items
        template = await self._encoder.template()
        if template is None:
            raise RequestError(
                f"prompt: the model {self.model.name!r} has no chat template; pass text or token ids instead "
                f"of messages"
            )
        chat: str = await self._encoder.render(
            parts, max_tokens, lambda: template.render(parts, add_generation_prompt=True)
        )
        if self._content_control_tokens:
            chat = str(chat)  # forgets what the template wrote
        # Templates write the special tokens themselves, the one at the beginning too.
        return await self._encoder.tokenise(chat, max_tokens, add_special=False)

    async def _run(self, task_status: trio.TaskStatus[None]) -> None:
        """The engine's task."""
        task_status.started()
        try:
            with self._scope:
                await self._engine.run()
        finally:
            self._stopped.set()


@asynccontextmanager
async def open_runtime(
    model: str | os.PathLike[str], **options: Unpack[RuntimeKeywords]
) -> AsyncIterator[Runtime]:
    """Opens a model: ``async with pi2rt.open_runtime("smollm2") as runtime: ...``

    Args:
        model: a path, or a name that ``pi2rt models`` lists.
        options: see ``RuntimeOptions``.

    Raises:
        ModelNotFoundError: there is no such model, or it is not fetched yet.
        ModelFormatError: its file is malformed. UnsupportedModelError: it has something that pi2rt has not.
        MemoryBudgetError: it does not fit into the memory there is.
        RequestError: an option is out of its range.
    """
    chosen = RuntimeOptions(**options)
    traced_to = None if chosen.trace is None else OutputFile(chosen.trace)  # refused before the work begins
    trace = None if chosen.trace is None else Trace()
    opening = await Opening.of(model, options, trace=trace)
    owner = Owner()
    actors = opening.actors()
    try:
        async with open_own_nursery() as nursery:
            with limits_explained():
                tokenizer = await _load(nursery, actors, opening)
            lanes = zip(actors[1:], opening.plan.lanes[1:], strict=True)
            engine = Engine(
                actors[0],
                tokenizer,
                opening.engine_options(),
                trace,
                prefill=tuple(
                    PrefillLane(actor, lane.max_tokens, lane.least_tokens) for actor, lane in lanes
                ),
                store=opening.store,
            )
            runtime = Runtime(engine, actors, tokenizer, opening)
            await nursery.start(runtime._run)
            try:
                yield runtime
            finally:
                OWN.has_grown()
                if runtime.elsewhere:
                    nursery.cancel_scope.cancel()  # copies of the tasks; what they used stays with the parent
                else:
                    with trio.CancelScope(shield=True):
                        await runtime.aclose()
    finally:
        if not owner.elsewhere:
            opening.close(stuck=any(actor.stuck for actor in actors))
        if trace is not None and traced_to is not None and not owner.elsewhere:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(trace.write, traced_to)
                traced_to.close()


async def _load(nursery: trio.Nursery, actors: Sequence[Actor], opening: Opening) -> Tokenizer:
    """Opens the executors, as tasks of ``nursery``, and reads the tokenizer meanwhile, if it is not there yet."""
    loaded = [] if opening.tokenizer is None else [opening.tokenizer]
    opening.tokenizer = None  # it is the runtime's from now on

    async def read_tokenizer() -> None:
        loaded.append(await trio.to_thread.run_sync(load_tokenizer_trimmed, opening.file))

    async with open_own_nursery() as loading:
        if not loaded:
            loading.start_soon(read_tokenizer)
        for actor in actors:  # one after the other: the first one says what the state of sequences looks like
            await nursery.start(actor.run)
    return loaded[0]
