from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.tiny_models import TinyModel, write_gguf

TEMPLATE = (
    "{% for m in messages %}{{ m.role }}:{{ m.content }}|{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a chat template."""
    path = tmp_path_factory.mktemp("faces") / "tiny.gguf"
    return write_gguf(path, TinyModel(context=1024), metadata={"tokenizer.chat_template": TEMPLATE})


@pytest.fixture(scope="session")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model without one."""
    return write_gguf(tmp_path_factory.mktemp("faces") / "plain.gguf", TinyModel(context=512))
