"""The cluster unit of ``examples/numpy_cluster_unit``, which need not be installed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PATH = Path(__file__).parents[2] / "examples/numpy_cluster_unit/numpy_cluster_unit/unit.py"
_SPEC = importlib.util.spec_from_file_location("numpy_cluster_unit_of_the_example", _PATH)
assert _SPEC is not None
assert _SPEC.loader is not None
_MODULE = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(_MODULE)

NumpyUnit = _MODULE.NumpyUnit
