"""The synchronous API: a model for scripts and threads.

The runtime has a thread of its own, where Trio runs. Callers wait in C for what it sends, where Ctrl-C
reaches them.
"""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from types import TracebackType
from typing import Any, Self, SupportsFloat, SupportsIndex, TypeVar, Unpack

from pi2rt import catalogue
from pi2rt._errors import BusyError, ClosedError
from pi2rt.api.jobs import End, Item, Pump, Report, reporter
from pi2rt.api.request_stream import RequestStream
from pi2rt.api.runtime import Prompt, Runtime, RuntimeStatistics
from pi2rt.api.runtime_thread import RuntimeThread, drain_seconds, seconds
from pi2rt.api.trio_thread import TrioThread
from pi2rt.catalogue.download import PullProgress
from pi2rt.engine import Chunk, Completion, SamplingParams
from pi2rt.engine.masker import MaskFunction
from pi2rt.engine.sampling_params import SamplingKeywords
from pi2rt.engine.token_stream import BUSY
from pi2rt.opening.model_info import ModelInfo
from pi2rt.opening.options import RuntimeKeywords, RuntimeOptions
from pi2rt.opening.pack_cache import ensure_pack
from pi2rt.runtime.executor import Progress as ProgressCallback
from pi2rt.runtime.step import Floats
from pi2rt.tokenizer import Tokenizer

T = TypeVar("T")


class Engine:
    """``with pi2rt.Engine("smollm2") as engine: for chunk in engine.stream("Why?"): ...``

    The constructor loads the model. May be used from several threads at once. Progress callbacks run on the
    thread that waits for what they report.

    ``timeout``, where a method has it, is in seconds from its call (of a stream: from its start). The request is
    cancelled then, with TimeoutError.

    Args:
        model: as ``open_runtime``.
        options: as ``open_runtime``; see ``RuntimeOptions``.

    Raises: as ``open_runtime``.
    """

    def __init__(self, model: str | os.PathLike[str], **options: Unpack[RuntimeKeywords]) -> None:
        RuntimeOptions(**options)  # a mistake shows here, not on the other thread
        events: SimpleQueue[Report | End] = SimpleQueue()
        self._thread = RuntimeThread(model, options, events.put)
        self._finalizer = weakref.finalize(self, self._thread.abandon)
        try:
            self._runtime = _wait(self._thread.ready, events)
        except BaseException:  # Ctrl-C during the load too
            self.close()
            del self._thread  # which keeps the error, whose traceback has this frame
            raise

    @staticmethod
    def pull(model: str, on_progress: PullProgress | None = None) -> Path:
        """As ``pi2rt.pull``: fetches a model unless it is here. Ctrl-C leaves nothing behind."""
        return _run(partial(catalogue.pull, model), on_progress)

    @staticmethod
    def ensure_pack(model: str | os.PathLike[str], on_progress: PullProgress | None = None) -> Path:
        """As ``pi2rt.ensure_pack``: the pack of a model. Ctrl-C leaves nothing behind."""
        return _run(partial(ensure_pack, model), on_progress)

    def close(self, *, drain: SupportsFloat = 0.0) -> None:
        """Ends all requests with ClosedError and frees the model. Safe to call twice, and from any thread. In a forked
        child it does nothing.

        Args:
            drain: seconds. For so long, requests that wait or run may finish, while new ones are refused; then they
                are ended. Ctrl-C, or calling this again without ``drain``, ends them at once.

        Raises:
            RequestError: ``drain`` is no number of seconds.
            ExecutorError: the executor did not stop in time.
        """
        self._thread.close(drain_seconds(drain))
        try:
            self._thread.join()
        except BaseException:
            self._thread.close()
            raise
        self._finalizer.detach()
        self._thread.check_end()

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
        token_mask: MaskFunction | None = None,
        timeout: SupportsFloat | None = None,
        **overrides: Unpack[SamplingKeywords],
    ) -> Stream:
        """``for chunk in engine.stream("Why?", max_tokens=50): ...``

        Arguments and errors as for ``Runtime.stream``; without a block, the first chunk enters. Leaving the loop or
        dropping the iterator ends the request; ``with engine.stream(...) as chunks`` says so explicitly.

        Raises: also
            TimeoutError: (from iterating) the request has not ended within ``timeout`` seconds.
        """
        chosen = self._thread.chosen(params, overrides, token_mask)
        return Stream(self, self._thread, prompt, chosen, on_prefill, token_mask, seconds("timeout", timeout))

    def generate(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        on_prefill: ProgressCallback | None = None,
        token_mask: MaskFunction | None = None,
        timeout: SupportsFloat | None = None,
        **overrides: Unpack[SamplingKeywords],
    ) -> Completion:
        """The whole text at once. Arguments and errors as for ``stream``."""
        if on_prefill is None:
            chosen = self._thread.chosen(params, overrides, token_mask)
            return self._call(
                lambda runtime: runtime.generate(prompt, chosen, token_mask=token_mask), timeout
            )
        with self.stream(
            prompt, params, on_prefill=on_prefill, token_mask=token_mask, timeout=timeout, **overrides
        ) as chunks:
            return Completion.of(list(chunks))

    def score(self, tokens: Iterable[SupportsIndex], *, timeout: SupportsFloat | None = None) -> Floats:
        """As ``Runtime.score``."""
        return self._call(lambda runtime: runtime.score(tokens), timeout)

    def logits(self, tokens: Iterable[SupportsIndex], *, timeout: SupportsFloat | None = None) -> Floats:
        """As ``Runtime.logits``."""
        return self._call(lambda runtime: runtime.logits(tokens), timeout)

    def resize(self, memory: int | str, *, timeout: SupportsFloat | None = None) -> None:
        """As ``Runtime.resize``, which says what a timeout ends."""
        self._call(lambda runtime: runtime.resize(memory), timeout)

    def statistics(self) -> RuntimeStatistics:
        """As ``Runtime.statistics``. From any thread."""
        return self._thread.ask(Runtime.statistics)

    def _call(self, function: Callable[[Runtime], Awaitable[T]], timeout: SupportsFloat | None) -> T:
        call = self._thread.call(function, seconds("timeout", timeout))
        try:
            return call.future.result()
        except BaseException:  # Ctrl-C, or it has failed and does not mind
            call.cancel()
            raise


class Stream(RequestStream):
    """The chunks of one request, for one consumer. It starts with the first chunk asked for, or on entering ``with``.

    Ctrl-C while it waits ends the request. What ended it is raised again by every later call.
    """

    def __init__(
        self,
        engine: object,
        thread: RuntimeThread,
        prompt: Prompt,
        params: SamplingParams,
        on_prefill: ProgressCallback | None,
        token_mask: MaskFunction | None,
        timeout: float | None,
    ) -> None:
        self._items: SimpleQueue[Item] = SimpleQueue()
        self._reading = threading.Lock()
        pump = Pump(thread.trio, prompt, params, self._items.put, on_prefill, token_mask, timeout)
        super().__init__(engine, thread, pump)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Chunk:
        """The next chunk.

        Raises:
            StopIteration: the text is whole.
            BusyError: another thread is waiting for a chunk of this stream.
            ClosedError: the stream or the engine was closed, also by another thread, or this is a forked child.
            TimeoutError: its timeout is over.
            RequestError, ContextOverflowError, TemplateError: as on entering, where this is the first call.
            ExecutorError: the executor failed on this request.
        """
        chunk = self._receive(entering=False)
        if chunk is None:
            raise StopIteration
        return chunk

    def __enter__(self) -> Self:
        self._receive(entering=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the request; a thread that waits for a chunk gets ClosedError. Does not wait. From any thread."""
        if self._leave():
            self._items.put(End())  # wakes it

    def __del__(self) -> None:
        if hasattr(self, "_end"):  # its constructor has ended
            self._leave()

    def _receive(self, *, entering: bool) -> Chunk | None:
        """The next chunk; None at the end, or once the request has entered where it is only ``entering``."""
        self._thread.trio.owner.check()
        if not self._reading.acquire(blocking=False):
            raise BusyError(BUSY)
        try:
            self._begin()
            while self._end is None and not (entering and self._entered):
                chunk = self._accept(self._items.get())
                if chunk is not None:
                    return chunk
        except Exception as error:
            self._leave(error)
            raise
        except BaseException:  # Ctrl-C: what the queue has given may be lost
            self._leave(ClosedError("this stream was interrupted"))
            raise
        finally:
            self._reading.release()
        if self._end is not None and self._end.error is not None:
            raise self._end.error
        return None


def _wait(future: Future[T], events: SimpleQueue[Report | End]) -> T:
    """The result of ``future``; makes the calls that are reported until then."""
    future.add_done_callback(lambda _: events.put(End()))
    while isinstance(event := events.get(), Report):
        event.call()
    return future.result()


def _run(function: Callable[[Callable[..., Any] | None], Awaitable[T]], callback: PullProgress | None) -> T:
    """``function(callback)`` under Trio on a thread of its own, with the calls of ``callback`` on this one. Waits until
    the function has ended, also after Ctrl-C."""
    events: SimpleQueue[Report | End] = SimpleQueue()
    report = None if callback is None else reporter(callback, events.put)
    work = TrioThread(lambda: function(report))
    try:
        return _wait(work.future, events)
    finally:
        work.cancel()
        work.join()
