"""Blocks of Markdown: what is found, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs.document_blocks import Command, blocks


def test_blocks_are_found_with_their_notes(tmp_path: Path) -> None:
    path = tmp_path / "a.md"
    path.write_text(
        "text\n```python\nx = 1\n```\n\n<!-- not run: takes an hour -->\n```console\n$ a --b\nout\n\nmore\n$ c\n```\n"
        "<!-- file: b/c.toml -->\n```toml\n[d]\n```\n"
    )
    python, console, file = blocks(path)
    assert (python.language, python.text, python.note, python.line) == ("python", "x = 1\n", "", 2)
    assert (console.language, console.note, console.reason) == ("console", "not run", "takes an hour")
    assert (file.language, file.note, file.reason, file.text) == ("toml", "file", "b/c.toml", "[d]\n")
    assert console.commands() == [Command("a --b", "out\n\nmore\n"), Command("c", "")]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("```\nx\n```\n", "without a language"),
        ("```python\nx\n", "without an end"),
        ("<!-- not run: because -->\n\n```python\nx\n```\n", "stands before no block"),
    ],
)
def test_what_is_refused(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "a.md").write_text(text)
    with pytest.raises(ValueError, match=problem):
        blocks(tmp_path / "a.md")


def test_output_needs_a_command(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("```console\noutput\n```\n")
    (block,) = blocks(tmp_path / "a.md")
    with pytest.raises(ValueError, match="before the first command"):
        block.commands()
