"""Sizes as people write them: 600M, 1.5GiB, 4096."""

from __future__ import annotations

import re

from pi2rt._errors import RequestError

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(?:i?B)?", re.IGNORECASE | re.ASCII)


def parse_size(text: str) -> int:
    """Bytes. Units are powers of 1024, with or without "iB" or "B".

    Raises:
        RequestError: it is not a size, or less than one byte.
    """
    match = _SIZE.fullmatch(text.strip())
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size < 1:
        raise RequestError(f"{text!r} is not a size: write for example 600M, 1.5GiB or a number of bytes")
    return size
