"""The text side of one request: sampled tokens in, chunks out, and the decision that it is finished."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import trio

from pi2rt.engine.chunk import Chunk, FinishReason, Timing
from pi2rt.engine.token_stream import TokenStream
from pi2rt.runtime.step import Sampled
from pi2rt.tokenizer import Detokenizer, StopMatcher


class Writer:
    """Turns each sampled token into one chunk on ``stream``. ``queued``: Trio's time when the request came."""

    __slots__ = (
        "_detokenizer", "_end_tokens", "_first", "_left", "_logprobs", "_matcher", "_paused", "_prompt",
        "_queued", "_requeued", "_started", "_stream", "cached", "generated",
    )  # fmt: skip

    def __init__(
        self,
        stream: TokenStream,
        detokenizer: Detokenizer,
        matcher: StopMatcher | None,
        end_tokens: AbstractSet[int],
        *,
        prompt: int,
        max_tokens: int,
        logprobs: bool,
        queued: float,
    ) -> None:
        self._stream = stream
        self._detokenizer = detokenizer
        self._matcher = matcher
        self._end_tokens = end_tokens
        self._prompt = prompt
        self._left = max_tokens
        self._logprobs = logprobs
        self._queued = queued
        self._paused: float | None = None
        self._requeued = 0.0
        self._started: float | None = None
        self._first: float | None = None
        self.cached = 0
        self.generated = 0

    def start(self, cached: int) -> None:
        """The first step was submitted; ``cached`` prompt tokens need not be computed. A first step after a preemption
        is not a second start."""
        now = trio.current_time()
        if self._started is None:
            self._started, self.cached = now, cached
        elif self._paused is not None:
            self._requeued += now - self._paused
        self._paused = None

    def pause(self) -> None:
        """Its sequence goes back to the queue."""
        if self._started is not None and self._paused is None:
            self._paused = trio.current_time()

    def accept(self, sampled: Sampled) -> FinishReason | None:
        """Puts one chunk; the reason why it was the last one, or None."""
        token = sampled.token
        if self._first is None:
            self._first = trio.current_time()
        self.generated += 1
        self._left -= 1
        reason: FinishReason | None = None
        if token in self._end_tokens:
            reason = "stop"
            text = self._detokenizer.flush()
        else:
            text = self._detokenizer.push(token)
            if not self._left:
                reason = "length"
                text += self._detokenizer.flush()
        if self._matcher is not None:
            text, stop = self._matcher.push(text)
            if stop is not None:
                reason = "stop"
            elif reason is not None:
                text += self._matcher.flush()
        if reason is None and not self._logprobs:
            self._stream.put(Chunk(text, token))
            return None
        timing = self._timing() if reason is not None else None
        if self._logprobs:
            self._stream.put(Chunk(text, token, sampled.logprob, sampled.top, reason, timing))
        else:
            self._stream.put(Chunk(text, token, None, (), reason, timing))
        return reason

    def _timing(self) -> Timing:
        assert self._started is not None
        assert self._first is not None
        return Timing(
            prompt_tokens=self._prompt,
            cached_tokens=self.cached,
            generated_tokens=self.generated,
            queue_s=self._started - self._queued,
            ttft_s=self._first - self._queued,
            prefill_s=self._first - self._started,
            decode_s=trio.current_time() - self._first,
            requeued_s=self._requeued,
        )
