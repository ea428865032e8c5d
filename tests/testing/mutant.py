"""A wrong executor, and the test of the suite that has to find it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from pi2rt.formats import ModelFile
from pi2rt.models import ModelDescription
from pi2rt.runtime.executor import StepExecutor
from pi2rt.testing import StepExecutorConformance, Tolerance
from tests.support.running_sum import open_running_sum


@dataclass(frozen=True)
class Mutant:
    """``make``: makes the executor; ``test``: of the suite, which must fail; ``says``: a regular expression that its
    message matches; ``arguments``: of the test; ``patience``: less where the mutant hangs."""

    make: Callable[[], StepExecutor]
    test: str
    says: str
    arguments: Mapping[str, Any] = field(default_factory=dict)
    patience: float = 60.0
    name: str = ""

    def __str__(self) -> str:
        return self.name or getattr(self.make, "__name__", repr(self.make))

    def check(self, folder: Path) -> None:
        """That the test fails, and says why."""
        mutant = self

        class Suite(StepExecutorConformance):
            tolerance = Tolerance(reference=1e-4, repeat=1e-4)
            patience = mutant.patience
            tries = 10

            def make_executor(self) -> StepExecutor:
                return mutant.make()

            def open_fixed_model(self) -> tuple[ModelFile, ModelDescription]:
                return open_running_sum(self.folder)

        suite = Suite()
        suite.folder = folder
        with pytest.raises(AssertionError, match=self.says):
            getattr(suite, self.test)(**self.arguments)
