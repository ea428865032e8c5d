"""The synchronous face: a model for scripts and threads.

The runtime has a thread of its own, where Trio runs. Callers wait in C for what it sends, where Ctrl-C
reaches them.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import replace
from queue import SimpleQueue
from types import TracebackType
from typing import Self, TypeVar, Unpack

from pi2rt._runtime_thread import Item, Progress, Pump, RuntimeThread
from pi2rt.engine import Chunk, Completion, SamplingParams
from pi2rt.engine.sampling_params import SamplingKeywords
from pi2rt.model_info import ModelInfo
from pi2rt.runtime.executor import Progress as ProgressCallback
from pi2rt.runtime.step import Floats
from pi2rt.runtime_options import RuntimeKeywords, RuntimeOptions
from pi2rt.tokenizer import Tokenizer
from pi2rt.trio_runtime import Prompt, Runtime, RuntimeStatistics

T = TypeVar("T")


class Engine:
    """``with pi2rt.Engine("smollm2") as engine: for chunk in engine.stream("Why?"): ...``

    The constructor loads the model. May be used from several threads at once. Progress callbacks run on the
    thread that waits for what they report.

    Args:
        model: as ``open_runtime``.
        options: as ``open_runtime``; see ``RuntimeOptions``.

    Raises: as ``open_runtime``.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Unpack[RuntimeKeywords]) -> None:
        on_load = RuntimeOptions(**options).on_load
        events: SimpleQueue[Progress | None] = SimpleQueue()
        self._thread = RuntimeThread(model, options, None if on_load is None else events.put)
        self._finalizer = weakref.finalize(self, self._thread.abandon)
        self._thread.ready.add_done_callback(lambda _: events.put(None))
        try:
            while (event := events.get()) is not None:
                assert on_load is not None
                on_load(event.done, event.total)
            self._runtime = self._thread.ready.result()
        except BaseException:  # Ctrl-C during the load too
            self.close()
            raise

    def close(self) -> None:
        """Ends all requests with ClosedError and frees the model. Safe to call twice."""
        self._thread.close()
        self._thread.join()
        self._finalizer.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def tokenizer(self) -> Tokenizer:
        return self._runtime.tokenizer

    @property
    def model(self) -> ModelInfo:
        return self._runtime.model

    def stream(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_prefill: ProgressCallback | None = None,
        **overrides: Unpack[SamplingKeywords],
    ) -> Stream:
        """``for chunk in engine.stream("Why?", max_tokens=50): ...``

        Arguments and errors as for ``Runtime.stream``. Leaving the loop or dropping the iterator ends the
        request; ``with engine.stream(...) as chunks`` says so in so many words.
        """
        return Stream(
            self, self._thread, prompt, replace(params or SamplingParams(), **overrides), on_prefill
        )

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_prefill: ProgressCallback | None = None,
        **overrides: Unpack[SamplingKeywords],
    ) -> Completion:
        """The whole text at once. Arguments and errors as for ``stream``."""
        params = replace(params or SamplingParams(), **overrides)
        if on_prefill is None:
            return self._call(lambda runtime: runtime.generate(prompt, params))
        with self.stream(prompt, params, on_prefill=on_prefill) as chunks:
            return Completion.of(list(chunks))

    def score(self, tokens: Iterable[int]) -> Floats:
        """As ``Runtime.score``."""
        return self._call(lambda runtime: runtime.score(tokens))

    def logits(self, tokens: Iterable[int]) -> Floats:
        """As ``Runtime.logits``."""
        return self._call(lambda runtime: runtime.logits(tokens))

    def resize(self, memory: int | str) -> None:
        """As ``Runtime.resize``."""
        self._call(lambda runtime: runtime.resize(memory))

    def statistics(self) -> RuntimeStatistics:
        """As ``Runtime.statistics``."""

        async def ask(runtime: Runtime) -> RuntimeStatistics:
            return runtime.statistics()

        return self._call(ask)

    def _call(self, function: Callable[[Runtime], Awaitable[T]]) -> T:
        call = self._thread.call(function)
        try:
            return call.future.result()
        except BaseException:  # Ctrl-C, or it has failed and does not mind
            call.cancel()
            raise


class Stream:
    """The chunks of one request, for one thread. It starts with the first chunk asked for."""

    def __init__(
        self,
        engine: object,
        thread: RuntimeThread,
        prompt: Prompt,
        params: SamplingParams,
        on_prefill: ProgressCallback | None,
    ) -> None:
        self._engine = engine  # which closes when nobody knows it any more
        self._thread, self._prompt, self._params = thread, prompt, params
        self._on_prefill = on_prefill
        self._items: SimpleQueue[Item] = SimpleQueue()
        self._pump: Pump | None = None
        self._over = False

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        try:
            return self._next()
        except BaseException:  # Ctrl-C, failed or at its end
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the request. Does not wait."""
        if not self._over:
            self._over = True
            if self._pump is not None:
                self._pump.cancel()

    def __del__(self) -> None:
        self.close()

    def _next(self) -> Chunk:
        if self._over:
            raise StopIteration
        pump = self._pump
        if pump is None:
            pump = self._pump = Pump(
                self._thread,
                self._prompt,
                self._params,
                self._items.put,
                report_prefill=self._on_prefill is not None,
            )
            self._thread.start(pump)
        while True:
            item = self._items.get()
            if isinstance(item, Chunk):
                pump.took()
                return item
            if isinstance(item, Progress):
                if self._on_prefill is not None:
                    self._on_prefill(item.done, item.total)
            elif item.error is None:
                raise StopIteration
            else:
                raise item.error
