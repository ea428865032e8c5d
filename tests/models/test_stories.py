"""A trained model, end to end through the reference executor."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pi2rt.executors.reference.executor import ReferenceExecutor
from pi2rt.formats import open_model_file
from tests.support.running import greedy, opened
from tests.support.stories260k import BOS, GOLDEN_TEXT, write_stories260k


async def test_stories260k_tells_the_golden_story(tmp_path: Path) -> None:
    path = write_stories260k(tmp_path / "stories.gguf")
    with open_model_file(path) as file:
        pieces = file.metadata["tokenizer.ggml.tokens"]
    async with opened(ReferenceExecutor(), path, context=512) as executor:
        tokens = await greedy(executor, np.array([BOS], np.int32), 80, context=512)
    text = "".join(pieces[token] for token in tokens).replace("▁", " ").removeprefix(" ")
    assert text.startswith(GOLDEN_TEXT)
