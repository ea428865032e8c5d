"""The fenced blocks of a Markdown document, and how each of them is to be treated by the tests."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

_FENCE = re.compile(r"^```(\w*)\s*$")
_NOTE = re.compile(r"^<!-- (not run|slow|file): (\S.*\S) -->$")


@dataclass(frozen=True, slots=True)
class Command:
    """A command of a console block, and what the document shows of its output ("" where it shows nothing)."""

    text: str
    output: str


@dataclass(frozen=True, slots=True)
class Block:
    """A fenced block.

    A comment on the line before the block says what tests do with it: ``<!-- not run: REASON -->`` leaves it out,
    ``<!-- slow: REASON -->`` runs it with the slow tests, ``<!-- file: PATH -->`` makes a file of it. ``note`` and
    ``reason`` are its two parts, "" without one.
    """

    document: Path
    line: int
    language: str
    text: str
    note: str = ""
    reason: str = ""

    def __str__(self) -> str:
        return f"{self.document.name}:{self.line}"

    def commands(self) -> list[Command]:
        """Of a console block: each line that begins with a prompt, and the lines up to the next one."""
        commands: list[Command] = []
        for line in self.text.splitlines():
            if line.startswith("$ "):
                commands.append(Command(line[2:], ""))
            elif commands:
                last = commands[-1]
                commands[-1] = Command(last.text, f"{last.output}{line}\n")
            else:
                raise ValueError(f"{self}: output before the first command: {line!r}")
        return commands


def blocks(document: Path) -> list[Block]:
    """All fenced blocks of a document.

    Raises:
        ValueError: a block has no language or no end, or a comment stands before no block.
    """
    found: list[Block] = []
    note, opened = None, None
    lines: list[str] = []
    for number, line in enumerate(document.read_text().splitlines(), 1):
        fence = _FENCE.match(line)
        if opened is not None:
            if line == "```":
                kind, reason = note.groups() if note else ("", "")
                found.append(Block(document, opened[0], opened[1], "\n".join(lines) + "\n", kind, reason))
                note, opened = None, None
                lines = []
            else:
                lines.append(line)
        elif fence is not None:
            if not fence[1]:
                raise ValueError(f"{document}:{number}: a block without a language")
            opened = number, fence[1]
        elif note is not None:
            raise ValueError(f"{document}:{number}: the comment before it stands before no block")
        else:
            note = _NOTE.match(line)
    if opened is not None:
        raise ValueError(f"{document}:{opened[0]}: a block without an end")
    return found
