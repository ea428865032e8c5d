"""What is collected of tokens that are only read: their log probabilities, or the logits after each."""

from __future__ import annotations

from typing import Literal

import numpy as np

from pi2rt.runtime.step import Floats, Int32s, Slice, StepResult, Unusable

LOGITS_CHUNK = 64
"""Tokens in one slice that asks for logits: a vocabulary of 262144 makes 1 MiB of each."""


class Reading:
    """``scores``: for each token but the first, its natural log probability after those before it;
    ``logits``: for each token, the logits of the next."""

    __slots__ = ("_parts", "kind")

    def __init__(self, kind: Literal["scores", "logits"]) -> None:
        self.kind = kind
        self._parts: list[tuple[int, Floats]] = []

    @property
    def most_tokens(self) -> int:
        """In one slice."""
        return LOGITS_CHUNK if self.kind == "logits" else 1 << 31

    def targets(self, tokens: Int32s, following: int | None) -> Int32s | None:
        """What ``Slice.targets`` is for ``tokens``, after which comes ``following``."""
        if self.kind == "logits":
            return None
        return np.append(tokens[1:], np.int32(-1 if following is None else following)).astype(np.int32)

    def accept(self, slice_: Slice, result: StepResult, i: int) -> Unusable | None:
        """``slice_`` was number ``i`` of its step. One from the beginning again replaces what came after.

        Returns:
            Unusable, where a score is no number. Logits are given as they are.
        """
        part = result.scores[i] if self.kind == "scores" else result.logits[i]
        assert part is not None
        self._parts = [(start, old) for start, old in self._parts if start < slice_.start]
        self._parts.append((slice_.start, part))
        return Unusable() if self.kind == "scores" and np.isnan(part).any() else None

    def result(self) -> Floats:
        """scores: float32 (n - 1,); logits: float32 (n, vocab_size)."""
        whole = np.concatenate([part for _, part in self._parts]).astype(np.float32, copy=False)
        return whole[:-1] if self.kind == "scores" else whole
