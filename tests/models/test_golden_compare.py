"""The comparison itself: it must see errors where there are some."""

from __future__ import annotations

import numpy as np
import pytest

from tests.golden.compare import GoldenLogits, compare_logits, load_greedy, load_logits


def _made(positions: int = 6, vocab: int = 50) -> tuple[np.ndarray, GoldenLogits]:
    logits = np.random.RandomState(0).standard_normal((positions, vocab)).astype(np.float32) * 3
    ids = np.argsort(-logits, axis=1)[:, :32].astype(np.int32)
    golden = GoldenLogits(
        chunk=positions,
        tokens=np.concatenate([[0], ids[:-1, 3]]).astype(np.int32),
        ids=ids,
        values=np.take_along_axis(logits, ids, axis=1),
        logsumexp=np.log(np.exp(logits.astype(np.float64)).sum(axis=1)).astype(np.float32),
    )
    return logits, golden


def test_the_same_logits_agree() -> None:
    logits, golden = _made()
    report = compare_logits(logits, golden)
    assert report.positions == 6
    assert report.relative_error == 0
    assert report.top1_agreement == 1
    assert report.perplexity_ratio == pytest.approx(0, abs=1e-6)


def test_errors_are_measured() -> None:
    logits, golden = _made()
    report = compare_logits(logits * np.float32(1.01), golden)
    assert report.relative_error == pytest.approx(0.01, rel=1e-4)
    worse = logits.copy()
    worse[2, golden.ids[2, 1]] += 100
    report = compare_logits(worse, golden)
    assert report.top1_agreement == pytest.approx(5 / 6)
    assert report.worst_position > 1
    assert report.perplexity_ratio > 0.1


def test_the_golden_files_are_whole() -> None:
    golden = load_logits()
    assert len(golden.tokens) == 1536
    assert golden.chunk == 512
    assert golden.ids.shape == golden.values.shape == (1536, 32)
    assert (np.diff(golden.values, axis=1) <= 0).all()
    assert (golden.logsumexp >= golden.values[:, 0]).all()
    assert [len(text.tokens) for text in load_greedy()] == [64, 64, 64]
