"""The text side of one request: sampled tokens in, chunks out, and the decision that it is finished."""

from __future__ import annotations

from collections.abc import Set as AbstractSet

import trio

from pi2rt.engine.chunk import Chunk, FinishDetail, FinishReason, Timing
from pi2rt.engine.stop_finder import StopFinder
from pi2rt.engine.token_stream import TokenStream
from pi2rt.runtime.step import Sampled
from pi2rt.tokenizer import Detokenizer


class Writer:
    """Turns each sampled token into one chunk on ``stream``.

    Args:
        stops: finds the request's stop strings; None where it has none.
        end_tokens: the model's own, unless the request ignores them.
        stop_tokens: those of the request.
        prompt: tokens of it.
        max_tokens: to generate at most.
        queued: Trio's time when the request came.
    """

    __slots__ = (
        "_detokenizer", "_end_tokens", "_final", "_first", "_left", "_logprobs", "_now", "_paused", "_prompt",
        "_queued", "_requeued", "_started", "_stop_tokens", "_stops", "_stream", "cached", "generated",
    )  # fmt: skip

    def __init__(
        self,
        stream: TokenStream,
        detokenizer: Detokenizer,
        stops: StopFinder | None,
        end_tokens: AbstractSet[int],
        stop_tokens: AbstractSet[int],
        *,
        prompt: int,
        max_tokens: int,
        logprobs: bool,
        queued: float,
    ) -> None:
        self._stream = stream
        self._detokenizer = detokenizer
        self._stops = stops
        self._end_tokens, self._stop_tokens = end_tokens, stop_tokens
        self._prompt = prompt
        self._left = max_tokens
        self._logprobs = logprobs
        self._now = trio.lowlevel.current_clock().current_time  # timing() is asked for on other threads too
        self._queued = queued
        self._paused: float | None = None
        self._requeued = 0.0
        self._started: float | None = None
        self._first: float | None = None
        self._final: Timing | None = None
        self.cached = 0
        self.generated = 0

    @property
    def ends(self) -> frozenset[int]:
        """Tokens each of which is the last one."""
        return frozenset(self._end_tokens | self._stop_tokens)

    def start(self, cached: int) -> None:
        """The first step was submitted; ``cached`` prompt tokens need not be computed. A first step after a preemption
        is not a second start."""
        now = self._now()
        if self._started is None:
            self._started, self.cached = now, cached
        elif self._paused is not None:
            self._requeued += now - self._paused
        self._paused = None

    def pause(self) -> None:
        """Its sequence goes back to the queue."""
        if self._started is not None and self._paused is None:
            self._paused = self._now()

    def accept(self, sampled: Sampled) -> FinishDetail | None:
        """Puts one chunk; what made it the last one, or None."""
        token = sampled.token
        if self._first is None:
            self._first = self._now()
        self.generated += 1
        self._left -= 1
        detail: FinishDetail | None = None
        stop: str | int | None = None
        if token in self._end_tokens:
            detail = "end_token"
            text = self._detokenizer.flush()
        elif token in self._stop_tokens:
            detail, stop = "stop_token", token
            text = self._detokenizer.flush()
        else:
            text = self._detokenizer.push(token)
            if not self._left:
                detail = "length"
                text += self._detokenizer.flush()
        if self._stops is not None:
            if detail is None or detail == "length":
                text, found = self._stops.push(token, text)
                if found is None and detail is not None:
                    rest, found = self._stops.end("")
                    text += rest
            else:
                text, found = self._stops.end(text)
            if found is not None:
                detail, stop = "stop_string", found
        logprob, top = (sampled.logprob, sampled.top) if self._logprobs else (None, ())
        if detail is None:
            self._stream.put(Chunk(text, token, logprob, top))
        else:
            reason: FinishReason = "length" if detail == "length" else "stop"
            self._final = timing = self.timing()
            self._stream.put(Chunk(text, token, logprob, top, reason, timing, detail, stop))
        return detail

    def timing(self) -> Timing:
        """What the request has used so far. Safe from any thread."""
        if self._final is not None:
            return self._final
        now = self._now()
        started, first, paused = self._started, self._first, self._paused
        queue_s = (now if started is None else started) - self._queued
        prefill_s = 0.0 if started is None else (now if first is None else first) - started
        return Timing(
            prompt_tokens=self._prompt,
            cached_tokens=self.cached,
            generated_tokens=self.generated,
            queue_s=queue_s,
            ttft_s=queue_s + prefill_s,
            prefill_s=prefill_s,
            decode_s=0.0 if first is None else now - first,
            requeued_s=self._requeued + (0.0 if paused is None else now - paused),
        )
