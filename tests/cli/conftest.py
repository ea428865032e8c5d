"""A tiny model with a chat template, and the command line."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pi2rt.cli.main import main
from tests.support.tiny_models import TinyModel, write_gguf

COMMAND = (sys.executable, "-P", "-m", "pi2rt")
TEMPLATE = (
    "{% for m in messages %}<|bos|>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|bos|>assistant:{% endif %}"
)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a model whose context is so long that it never ends by itself."""
    path = tmp_path_factory.mktemp("model") / "tiny.gguf"
    return str(write_gguf(path, TinyModel(context=100_000), metadata={"tokenizer.chat_template": TEMPLATE}))


@pytest.fixture(scope="session")
def bare_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a model without a chat template."""
    return str(write_gguf(tmp_path_factory.mktemp("model") / "bare.gguf", TinyModel()))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Nobody's cache, and no terminal tricks."""
    return {**os.environ, "PI2RT_CACHE": str(tmp_path / "cache"), "TERM": "dumb", "PYTHONUTF8": "1"}


@dataclass(frozen=True)
class Done:
    """How a command ended, and what it wrote."""

    status: int
    output: str
    errors: str


Run = Callable[..., Done]


@pytest.fixture
def pi2rt(
    environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Run:
    """Runs ``pi2rt ARGUMENTS`` in this process: the whole command line but for its start."""

    def run(*arguments: str, stdin: bytes = b"") -> Done:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        try:
            status = main(arguments)
        except SystemExit as end:  # argparse
            status = int(str(end.code))
        return Done(status, *capfd.readouterr())

    return run
