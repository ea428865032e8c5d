"""A process that believes in a kernel with larger pages (``large_pages.c``)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SIZES = (16384, 65536)
"""Of pages of arm64 kernels: the Raspberry Pi 5, Asahi Linux and newer Android; some distributions for servers."""


def build(folder: Path) -> Path:
    """The library to be loaded before the C library. Skips the test where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("needs a C compiler, to imitate larger pages")
    path = folder / "large_pages.so"
    source = str(Path(__file__).with_suffix(".c"))
    subprocess.run([compiler, "-shared", "-fPIC", "-O1", "-o", str(path), source, "-ldl"], check=True)
    return path


def environment(library: Path, page_bytes: int) -> dict[str, str]:
    # Python's objects on the C heap, beside the buffers: zeros where they should not be show
    return os.environ | {"LD_PRELOAD": str(library), "PAGES": str(page_bytes), "PYTHONMALLOC": "malloc"}
