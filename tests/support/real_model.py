"""The real model of the slower tests: SmolLM2-135M-Instruct, Q4_1."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import trio

from pi2rt import catalogue
from pi2rt._errors import ModelNotFoundError, Pi2rtError

NAME = "smollm2"


def smollm2() -> Path:
    """The GGUF file: ``$PI2RT_SMOLLM2``, else the one in pi2rt's cache, else (only with
    ``PI2RT_TEST_DOWNLOAD=1``) fetched into it. Skips the test, with the reason, where there is none."""
    if named := os.environ.get("PI2RT_SMOLLM2"):
        if not Path(named).is_file():
            pytest.fail(f"PI2RT_SMOLLM2={named}: no such file")
        return Path(named)
    try:
        return catalogue.resolve(NAME)
    except ModelNotFoundError as error:
        if os.environ.get("PI2RT_TEST_DOWNLOAD") != "1":
            pytest.skip(f"{error}; or set PI2RT_SMOLLM2 to the file, or PI2RT_TEST_DOWNLOAD=1")
    try:
        return _pull()
    except Pi2rtError as error:
        pytest.skip(f"PI2RT_TEST_DOWNLOAD=1, but: {error}")


def _pull() -> Path:
    """On a thread of its own, because the caller may be inside a Trio run already."""
    result: list[Path | BaseException] = []

    def run() -> None:
        try:
            result.append(trio.run(catalogue.pull, NAME))
        except BaseException as error:  # carried over to the caller
            result.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if isinstance(result[0], BaseException):
        raise result[0]
    return result[0]
