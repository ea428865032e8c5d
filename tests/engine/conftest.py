from __future__ import annotations

from pathlib import Path

import pytest

from pi2rt.formats import ModelFile, open_model_file
from pi2rt.memory import StateLayout
from pi2rt.models import describe
from pi2rt.tokenizer import Tokenizer, load_tokenizer
from tests.support.tiny_models import TinyModel, write_gguf


@pytest.fixture(scope="session")
def tiny_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("engine") / "tiny.gguf", TinyModel(context=4096))


@pytest.fixture(scope="session")
def tiny_file(tiny_path: Path) -> ModelFile:
    with open_model_file(tiny_path) as file:
        return file


@pytest.fixture(scope="session")
def tokenizer(tiny_file: ModelFile) -> Tokenizer:
    return load_tokenizer(tiny_file)


@pytest.fixture(scope="session")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> StateLayout:
    """Of a model with a window of 70 positions in all layers but one."""
    config = {"sliding_window": 70, "sliding_window_pattern": 3}
    model = TinyModel("gemma3_text", layers=4, context=4096, config=config)
    with open_model_file(write_gguf(tmp_path_factory.mktemp("windowed") / "gemma.gguf", model)) as file:
        return StateLayout.of(describe(file), "f16", 4096)
