from __future__ import annotations

from pathlib import Path

import pytest

from pi2rt.formats import ModelFile, open_model_file
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
