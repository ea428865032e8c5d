"""How well a model predicts a text, by the method of llama.cpp's tool ``llama-perplexity``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pi2rt.tokenizer import Tokenizer

if TYPE_CHECKING:
    from pi2rt.api.runtime import Runtime


@dataclass(frozen=True, slots=True)
class Perplexity:
    """exp of the mean negative log likelihood (natural) of ``tokens`` scored tokens in ``chunks`` chunks."""

    value: float
    tokens: int
    chunks: int


def cut(tokenizer: Tokenizer, ids: Sequence[int], size: int) -> list[list[int]]:
    """Chunks of ``size`` tokens; what is left over at the end is not used. Where the model begins texts with a BOS
    token, that takes the place of the first token of each."""
    bos = tokenizer.bos_id
    adds_bos = bos is not None and tokenizer.encode("")[:1] == [bos]
    chunks = [list(ids[start : start + size]) for start in range(0, len(ids) - size + 1, size)]
    for chunk in chunks:
        if adds_bos and bos is not None:
            chunk[0] = bos
    return chunks


async def perplexity(
    runtime: Runtime, chunks: Sequence[Sequence[int]], report: Callable[[int, float], None] | None = None
) -> Perplexity:
    """Evaluates each chunk (at least 4 tokens) on its own and scores the tokens of its second half.

    Args:
        runtime: of the model.
        chunks: token ids; at least one chunk.
        report: ``report(chunks done, perplexity so far)``.
    """
    total, scored = 0.0, 0
    for number, chunk in enumerate(chunks):
        logprobs = await runtime.score(chunk)  # of chunk[1:]
        second_half = logprobs[len(chunk) // 2 :]
        total -= math.fsum(second_half)
        scored += len(second_half)
        if report is not None:
            report(number + 1, math.exp(total / scored))
    return Perplexity(math.exp(total / scored), scored, len(chunks))
