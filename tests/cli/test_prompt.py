"""What ``pi2rt run`` reads of a prompt."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from pi2rt._errors import ContextOverflowError, RequestError
from pi2rt.cli._prompt import LARGEST, PromptFile
from pi2rt.planner.pack.convert import convert
from pi2rt.tokenizer import Tokenizer, load_tokenizer
from tests.cli.conftest import COMMAND, Run
from tests.support.real_model import smollm2
from tests.tokenizer.files import byte_level_file, chain

REFERENCE = ("--executor", "reference")


class Endless:
    """Goes on and on, a few bytes at a time."""

    def __init__(self, text: bytes = b"so ", end: int | None = None) -> None:
        self._text, self._end = text, end
        self.given = 0

    def read(self, size: int, /) -> bytes:
        size = min(size, 5000, size if self._end is None else self._end - self.given)
        start = self.given % len(self._text)
        self.given += size
        return (self._text * (size // len(self._text) + 2))[start : start + size]

    def close(self) -> None: ...


@pytest.fixture
def tokenizer() -> Tokenizer:
    """A token has at most 40 bytes."""
    return load_tokenizer(byte_level_file(chain(" " * 40)))


def test_no_more_is_read_than_the_context_could_hold(tokenizer: Tokenizer) -> None:
    reader = Endless()
    prompt = PromptFile(reader, "it", "the prompt")
    assert reader.given == 64 << 10
    with pytest.raises(ContextOverflowError, match=r"^prompt of at least 9991 tokens plus max_tokens=10 "):
        prompt.text(tokenizer, 10_000, 10)
    assert reader.given == 9991 * 40


def test_bytes_that_become_no_token_do_not_count() -> None:
    file = byte_level_file()
    tokens = file.metadata["tokenizer.ggml.tokens"]
    tokens[0] = "[zero]"  # in place of the token of the byte 0
    text = PromptFile(Endless(b"\0" * 9 + b"x", 500_000), "it", "the prompt").text(
        load_tokenizer(file), 60_000, None
    )
    assert len(text) == 500_000
    with pytest.raises(ContextOverflowError):
        PromptFile(Endless(b"\0" * 9 + b"x"), "it", "the prompt").text(load_tokenizer(file), 60_000, None)
    with pytest.raises(RequestError, match=rf"^the prompt is larger than {LARGEST} bytes"):
        PromptFile(Endless(b"\0" * 8192), "it", "the prompt").text(load_tokenizer(file), 100, None)


def test_a_long_prompt_that_fits_is_all_there(tokenizer: Tokenizer) -> None:
    prompt = PromptFile(Endless("\u00e9".encode(), 100_001), "it", "the prompt")
    with pytest.raises(RequestError, match=r"^the prompt is not UTF-8: byte 0xc3 at offset 100000"):
        prompt.text(tokenizer, 1 << 20, None)
    prompt = PromptFile(Endless("\u00e9".encode(), 100_000), "it", "the prompt")
    assert prompt.text(tokenizer, 1 << 20, None) == "\u00e9" * 50_000


def test_marks_at_both_ends_are_no_part_of_it(tokenizer: Tokenizer) -> None:
    """Of the byte order, as some editors write it, and of the last line's end."""
    data = b"\xef\xbb\xbfso\n\n"
    assert PromptFile(Endless(data, len(data)), "it", "the prompt").text(tokenizer, 99, None) == "so\n"
    with pytest.raises(RequestError, match="empty"):
        PromptFile(Endless(data[:3], 3), "it", "the prompt")


def test_a_file_that_is_far_too_long(pi2rt: Run, model: str, tmp_path: Path) -> None:
    file = tmp_path / "long.txt"
    file.write_text("so it goes\n" * (1 << 20))
    more = (*REFERENCE, "--context", "64")
    for done in (
        pi2rt("run", model, "-f", str(file), *more),
        pi2rt("run", model, *more, stdin=file.read_bytes()),
        pi2rt("run", model, "-f", str(file), "--raw", *more),
    ):
        assert (done.status, done.output) == (2, "")
        assert done.errors.startswith("pi2rt: error: prompt of at least ")
        assert done.errors.count("\n") == 1


def test_an_endless_pipe_is_refused(model: str, environment: dict[str, str]) -> None:
    process = subprocess.Popen(
        [*COMMAND, "run", model, *REFERENCE, "--context", "64"],
        bufsize=0,
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        env=environment,
    )
    assert process.stdin is not None
    with process.stdin as pipe, pytest.raises(BrokenPipeError):
        write_for_ever(pipe)
    assert process.wait(60) == 2
    assert process.stderr is not None
    with process.stderr as errors:
        assert errors.read().startswith(b"pi2rt: error: prompt of at least ")


def write_for_ever(pipe: IO[bytes]) -> None:
    while True:
        pipe.write(b"so it goes\n" * 1000)


PEAK = """
import os, sys
child = os.spawnv(os.P_NOWAIT, sys.argv[1], sys.argv[1:])
_, status, usage = os.wait4(child, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_maxrss * 1024)
"""
"""Runs a command, and says how it ended and what memory it had at most. In between, since the peak of a process begins
with that of the one that started it, which here is all that tests have loaded."""


@pytest.mark.slow
@pytest.mark.parametrize("part", ["some words ", "\U0001f468\u200d\U0001f469", "#" * 81, " \n"], ids=repr)
def test_a_budget_holds_whatever_the_prompt(part: str, tmp_path: Path, environment: dict[str, str]) -> None:
    """The most that the process ever had, where its prompt is refused after all that the context could hold."""
    pack, file = tmp_path / "smollm2.pi2", tmp_path / "long.txt"
    convert(smollm2(), pack)
    for size in (80_000, 20 << 20):
        file.write_text(part * (size // len(part.encode())))
        command = [*COMMAND, "run", str(pack), "--memory", "200M", "--context", "1024", "-f", str(file)]
        done = subprocess.run(
            [sys.executable, "-c", PEAK, *command],
            capture_output=True,
            env=environment,
            check=True,
        )
        assert done.stderr.startswith(b"pi2rt: error: prompt of at least ")
        status, peak = map(int, done.stdout.split())
        assert (status, peak <= 200 << 20) == (2, True), peak
