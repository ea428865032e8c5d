"""The names of models in several GGUF files, as llama-gguf-split gives them: ``NAME-00001-of-00003.gguf``."""

from __future__ import annotations

import re

MAX_PARTS = 4096  # each of them stays open

_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})(\.gguf)", re.DOTALL)


def part_names(name: str) -> tuple[str, ...]:
    """The names of all parts of the model that a file of this name is part of, in order; ``(name,)`` where it is not
    named as a part."""
    match = _NAME.fullmatch(name)
    if match is None:
        return (name,)
    stem, number, count, end = match[1], int(match[2]), int(match[3]), match[4]
    if not 1 <= number <= count <= MAX_PARTS:
        return (name,)
    return tuple(f"{stem}-{k:05}-of-{count:05}{end}" for k in range(1, count + 1))
