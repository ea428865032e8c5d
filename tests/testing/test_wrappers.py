"""What mutants are made of passes the suite, so that a mutant fails for what is wrong in it alone."""

from __future__ import annotations

from pi2rt.runtime.executor import Executor
from pi2rt.testing import StepExecutorConformance, Tolerance
from tests.testing.wrappers import Resampling, Wrapper


class TestWrapper(StepExecutorConformance):
    models = ("llama",)
    tolerance = Tolerance(reference=1e-4, repeat=1e-4)

    def make_executor(self) -> Executor:
        return Wrapper()


class TestResampling(TestWrapper):
    def make_executor(self) -> Executor:
        return Resampling()
