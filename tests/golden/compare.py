"""Golden logits of the real model, and how far other logits are from them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).parent


@dataclass(frozen=True)
class GoldenLogits:
    """What Transformers computes for ``text.txt`` in float32, in chunks of ``chunk`` tokens that know nothing
    of each other.

    ``tokens``: int32 (positions,). ``ids``, ``values``: the likeliest tokens after each one and their logits,
    best first, (positions, 32). ``logsumexp``: over the whole vocabulary, (positions,).
    """

    chunk: int
    tokens: npt.NDArray[np.int32]
    ids: npt.NDArray[np.int32]
    values: npt.NDArray[np.float32]
    logsumexp: npt.NDArray[np.float32]

    def chunks(self) -> list[GoldenLogits]:
        return [self[i : i + self.chunk] for i in range(0, len(self.tokens), self.chunk)]

    def __getitem__(self, positions: slice) -> GoldenLogits:
        return GoldenLogits(
            self.chunk,
            self.tokens[positions],
            self.ids[positions],
            self.values[positions],
            self.logsumexp[positions],
        )


@dataclass(frozen=True)
class GoldenText:
    """Greedy continuation of a prompt."""

    prompt: str
    prompt_tokens: list[int]
    tokens: list[int]


@dataclass(frozen=True)
class Report:
    """``relative_error``: of the golden top logits, as a ratio of Euclidean norms over all positions;
    ``worst_position``: the largest such ratio of one position. ``top1_agreement``: share of positions with
    the same likeliest token. ``perplexity_ratio``: of the text, over that of the golden logits, minus 1, from
    the positions whose next token is among the golden top; tests the normalisation too."""

    positions: int
    relative_error: float
    worst_position: float
    top1_agreement: float
    perplexity_ratio: float


def load_logits() -> GoldenLogits:
    with np.load(HERE / "smollm2_logits.npz") as file:
        return GoldenLogits(
            int(file["chunk"]),
            file["tokens"].astype(np.int32),
            file["ids"].astype(np.int32),
            file["values"],
            file["logsumexp"],
        )


def load_greedy() -> list[GoldenText]:
    return [GoldenText(**entry) for entry in json.loads((HERE / "smollm2_greedy.json").read_text())]


def compare_logits(logits: npt.NDArray[np.float32], golden: GoldenLogits) -> Report:
    """``logits``: (positions, vocab_size), for the tokens of one chunk of ``golden`` or its beginning."""
    golden = golden[: len(logits)]
    difference = np.take_along_axis(logits, golden.ids, axis=1).astype(np.float64) - golden.values
    size = golden.values.astype(np.float64)
    by_position = np.linalg.norm(difference, axis=1) / np.linalg.norm(size, axis=1)

    largest = logits.max(axis=1).astype(np.float64)
    logsumexp = largest + np.log(np.exp(logits - largest[:, None]).sum(axis=1))
    hits = np.flatnonzero((golden.ids[:-1] == golden.tokens[1:, None]).any(axis=1))
    rank = (golden.ids[hits] == golden.tokens[hits + 1, None]).argmax(axis=1)
    ours = logits[hits, golden.tokens[hits + 1]] - logsumexp[hits]
    theirs = golden.values[hits, rank] - golden.logsumexp[hits]
    return Report(
        positions=len(logits),
        relative_error=float(np.linalg.norm(difference) / np.linalg.norm(size)),
        worst_position=float(by_position.max()),
        top1_agreement=float((logits.argmax(axis=1) == golden.ids[:, 0]).mean()),
        perplexity_ratio=float(np.exp(np.mean(theirs - ours)) - 1) if len(hits) else 0.0,
    )
