"""What mutants are made of passes the suite, so that a mutant fails for what is wrong in it alone."""

from __future__ import annotations

from pi2rt.runtime.executor import StepExecutor
from pi2rt.testing import Masks, StepExecutorConformance, Tolerance
from tests.testing.mask_mutants import MaskWrapper
from tests.testing.wrappers import Inexact, Resampling, Wrapper


class TestWrapper(StepExecutorConformance):
    models = ("llama",)
    tolerance = Tolerance(reference=1e-4, repeat=1e-4)

    def make_executor(self) -> StepExecutor:
        return Wrapper()


class TestResampling(TestWrapper):
    def make_executor(self) -> StepExecutor:
        return Resampling()


class TestMaskWrapper(Masks):
    models = ("llama",)
    tolerance = Tolerance(reference=1e-4, repeat=1e-4)

    def make_executor(self) -> StepExecutor:
        return MaskWrapper()


class TestInexact(StepExecutorConformance):
    """Passes by what it states: logits within 0.02, which is some of its errors of 0.01."""

    models = ("llama", "gemma3")
    tolerance = Tolerance(reference=0.02, repeat=0.02, scores=0.5)

    def make_executor(self) -> StepExecutor:
        return Inexact()
