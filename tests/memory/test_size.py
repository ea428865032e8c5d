"""Sizes as people write them."""

from __future__ import annotations

import pytest

from pi2rt._errors import RequestError
from pi2rt.memory import parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4096", 4096),
        ("600M", 600 << 20),
        ("600MiB", 600 << 20),
        ("600 mb", 600 << 20),
        ("1.5G", 3 << 29),
        (" 2T ", 2 << 40),
        ("8k", 8192),
        ("7B", 7),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "M", "-1", "0", "0.1", "600X", "1e9", "1_000", "\u0661M", "nan", "600M600M"]
)
def test_what_is_not_one(text: str) -> None:
    with pytest.raises(RequestError, match="is not a size: write for example 600M"):
        parse_size(text)
