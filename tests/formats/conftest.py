from __future__ import annotations

from pathlib import Path

import pytest

from tests.support import real_model


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real default model; skips the test where it is not on this machine."""
    return real_model.smollm2()
