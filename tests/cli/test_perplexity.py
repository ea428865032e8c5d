"""The method of ``pi2rt perplexity``, against a plain computation from logits."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
import trio

import pi2rt as library
from tests.cli.conftest import Run
from tests.support.tiny_models import BOS, TinyModel, write_gguf

TEXT = "The cat sat on the mat, and then it went to see what the others were doing. " * 8


def llama_cpp_perplexity(logits: npt.NDArray[np.float32], tokens: list[int]) -> tuple[float, int]:
    """As llama.cpp's tools/perplexity: of a chunk of n tokens, positions n/2 to n - 2 predict the next one.
    Returns the sum of negative log likelihoods and their number."""
    first, end = len(tokens) // 2, len(tokens) - 1
    wide = logits.astype(np.float64)
    log_sum = np.log(np.exp(wide - wide.max(1, keepdims=True)).sum(1)) + wide.max(1)
    nll = [log_sum[i] - wide[i, tokens[i + 1]] for i in range(first, end)]
    return float(sum(nll)), len(nll)


@pytest.mark.parametrize("adds_bos", [True, False])
@pytest.mark.parametrize("chunk", [32, 33])
def test_perplexity(tmp_path: Path, pi2rt: Run, adds_bos: bool, chunk: int) -> None:
    model = write_gguf(tmp_path / "m.gguf", TinyModel(), metadata={"tokenizer.ggml.add_bos_token": adds_bos})
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    done = pi2rt(
        "perplexity", str(model), str(text), "--chunk", str(chunk), "--json", "--executor", "reference"
    )
    assert (done.status, done.errors) == (0, "")
    found = json.loads(done.output)

    async def expected() -> tuple[float, int, int]:
        total, count, chunks = 0.0, 0, 0
        async with library.open_runtime(model, executor="reference", context=chunk) as runtime:
            ids = runtime.tokenizer.encode(TEXT)
            assert (ids[0] == BOS) == adds_bos
            for start in range(0, len(ids) - chunk + 1, chunk):
                tokens = ids[start : start + chunk]
                if adds_bos:
                    tokens[0] = BOS
                nll, scored = llama_cpp_perplexity(await runtime.logits(tokens), tokens)
                total, count, chunks = total + nll, count + scored, chunks + 1
        return total, count, chunks

    total, count, chunks = trio.run(expected)
    assert (found["tokens"], found["chunks"], found["chunk"]) == (count, chunks, chunk)
    assert found["perplexity"] == pytest.approx(np.exp(total / count), rel=1e-3)


def test_perplexity_for_people(model: str, tmp_path: Path, pi2rt: Run) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    done = pi2rt("perplexity", model, str(text), "--chunk", "64", "--executor", "reference")
    assert re.match(r"^perplexity [\d.]+ over \d+ tokens \(\d+ chunks of 64\)\n$", done.output)
