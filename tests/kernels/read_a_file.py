"""Reads a file (argument 1) through the flash reader, by the way that argument 2 names."""

from __future__ import annotations

import sys

from pi2rt.cython_kernels.flash import Reader

with Reader(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else "auto") as reader:  # type: ignore[arg-type]
    with open(sys.argv[1], "rb") as file:
        content = file.read()
    assert reader.read(0, len(content)) == content
    print(reader.statistics().io_reason)
