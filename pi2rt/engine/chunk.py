"""What a request gives back: chunks while it runs, a completion at its end, and where its time went."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length"]
"""``"stop"``: the model ended its text, or a stop string or stop token came. ``"length"``: ``max_tokens``
or the context is used up."""

TopLogprobs: TypeAlias = tuple[tuple[int, float], ...]
"""(token id, natural log probability), the likeliest first."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a request's time went, in seconds of the runtime's clock.

    ``cached_tokens`` of the ``prompt_tokens`` were found in the prefix cache and not computed. ``queue_s``:
    from the request until its first step was submitted, tokenising included; ``prefill_s``: from there to its first
    token; ``ttft_s``: the sum of both; ``decode_s``: from the first token to the last. ``requeued_s``: of prefill_s and
    decode_s, what it spent in the queue again after it was preempted or its executor was lost. Rates are 0.0 where
    there was nothing to measure.
    """

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int
    queue_s: float
    ttft_s: float
    prefill_s: float
    decode_s: float
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
    and ``top_logprobs`` is () unless ``SamplingParams.logprobs`` asked for them. ``finish_reason`` and
    ``timing`` are set on the last chunk.
    """

    text: str
    token: int
    logprob: float | None = None
    top_logprobs: TopLogprobs = ()
    finish_reason: FinishReason | None = None
    timing: Timing | None = None


@dataclass(frozen=True, slots=True)
class Completion:
    """The whole of a request's text.

    ``tokens``: every token as it was sampled, the ending one included. ``logprobs`` and ``top_logprobs``
    are aligned with ``tokens``, and empty unless asked for.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    timing: Timing
    logprobs: tuple[float, ...] = ()
    top_logprobs: tuple[TopLogprobs, ...] = ()

    @classmethod
    def of(cls, chunks: list[Chunk]) -> Completion:
        """Joins the chunks of one request, of which the last one says how it ended."""
        last = chunks[-1]
        assert last.finish_reason is not None
        assert last.timing is not None
        asked = last.logprob is not None
        return cls(
            text="".join(chunk.text for chunk in chunks),
            tokens=tuple(chunk.token for chunk in chunks),
            finish_reason=last.finish_reason,
            timing=last.timing,
            logprobs=tuple(chunk.logprob for chunk in chunks if chunk.logprob is not None),
            top_logprobs=tuple(chunk.top_logprobs for chunk in chunks) if asked else (),
        )
