"""What a request gives back: chunks while it runs, a completion at its end, and where its time went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length"]
"""``"stop"``: the model ended its text, or a stop string or stop token came. ``"length"``: ``max_tokens``
or the context is used up."""

FinishDetail: TypeAlias = Literal["end_token", "stop_string", "stop_token", "length"]
"""What ended a text. ``"end_token"``: the model's own end-of-text token; ``"stop_string"``, ``"stop_token"``: one of
``SamplingParams.stop`` or ``stop_token_ids``; ``"length"``: as the finish reason."""

TopLogprobs: TypeAlias = tuple[tuple[int, float], ...]
"""(token id, natural log probability), the most probable first."""


@dataclass(frozen=True, slots=True)
class Timing:
    """What a request used: tokens, and seconds of the runtime's clock.

    ``cached_tokens`` of the ``prompt_tokens`` were found in the prefix cache and not computed. ``queue_s``:
    from the request until its first step was submitted, tokenising included; ``prefill_s``: from there to its first
    token; ``ttft_s``: the sum of both; ``decode_s``: from the first token to the last. ``requeued_s``: of prefill_s and
    decode_s, what it spent in the queue again after it was preempted or its executor was lost. Rates are 0.0 where
    there was nothing to measure.

    A request that has not finished shows what it used so far; one that was cancelled or has failed, what it had used
    by then. Times that have not begun are 0.0.
    """

    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    queue_s: float = 0.0
    ttft_s: float = 0.0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    requeued_s: float = 0.0

    @property
    def prefill_tokens_per_s(self) -> float:
        """Prompt tokens computed per second of prefill."""
        return (self.prompt_tokens - self.cached_tokens) / self.prefill_s if self.prefill_s > 0 else 0.0

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens after the first per second of decode."""
        return (self.generated_tokens - 1) / self.decode_s if self.decode_s > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Chunk:
    """One generated token.

    ``text`` may be empty: bytes of a character still to come, a possible beginning of a stop string, an
    end-of-text token. The texts of all chunks together are the text of the completion. ``logprob`` is None
    and ``top_logprobs`` is () unless ``SamplingParams.logprobs`` asked for them. ``finish_reason``,
    ``finish_detail`` and ``timing`` are set on the last chunk; so is ``stop_reason``, the stop string or the id of the
    stop token, where one of them ended the text.
    """

    text: str
    token: int
    logprob: float | None = None
    top_logprobs: TopLogprobs = ()
    finish_reason: FinishReason | None = None
    timing: Timing | None = None
    finish_detail: FinishDetail | None = None
    stop_reason: str | int | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole of a request's text.

    ``tokens``: every token as it was sampled, the ending one included. ``logprobs`` and ``top_logprobs``
    are aligned with ``tokens``, and empty unless asked for. ``stop_reason``: the stop string or the id of the stop
    token that ended the text; None where something else did.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    finish_detail: FinishDetail
    timing: Timing
    stop_reason: str | int | None = None
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()

    @classmethod
    def of(cls, chunks: list[Chunk]) -> Completion:
        """Joins the chunks of one request, of which the last one says how it ended."""
        last = chunks[-1]
        assert last.finish_reason is not None
        assert last.finish_detail is not None
        assert last.timing is not None
        asked = last.logprob is not None
        return cls(
            text="".join(chunk.text for chunk in chunks),
            tokens=tuple(chunk.token for chunk in chunks),
            finish_reason=last.finish_reason,
            finish_detail=last.finish_detail,
            timing=last.timing,
            stop_reason=last.stop_reason,
            logprobs=tuple(chunk.logprob for chunk in chunks if chunk.logprob is not None),
            top_logprobs=tuple(chunk.top_logprobs for chunk in chunks) if asked else (),
        )
