from __future__ import annotations

import os
from pathlib import Path

import pytest

from pi2rt import catalogue


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The real default model, where it is on this machine: ``$PI2RT_SMOLLM2``, else the cache of ``pi2rt
    pull``."""
    default = catalogue.models_directory() / catalogue.catalogue()["smollm2"].file
    path = Path(os.environ.get("PI2RT_SMOLLM2", default))
    if not path.is_file():
        pytest.skip(f"{path} is not there: run 'pi2rt pull smollm2' or set PI2RT_SMOLLM2")
    return path
