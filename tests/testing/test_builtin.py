"""The built-in executors pass the suite; variants of the CPU's are beside their own tests in ``tests/executors``."""

from __future__ import annotations

from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.executors.reference.executor import ReferenceExecutor
from pi2rt.runtime.executor import ExecutorOptions, StepExecutor
from pi2rt.testing import StepExecutorConformance, Tolerance


class TestReference(StepExecutorConformance):
    """BLAS adds in another order for other shapes."""

    tolerance = Tolerance(reference=1e-4, repeat=1e-4)

    def make_executor(self) -> StepExecutor:
        return ReferenceExecutor()


class TestCpu(StepExecutorConformance):
    """Keys and values are float16, the same sums are the same bits."""

    tolerance = Tolerance(reference=5e-3)

    def make_executor(self) -> StepExecutor:
        return CpuExecutor()


class TestCpuWithExactFloats(StepExecutorConformance):
    options = ExecutorOptions(slots=4, pages=16, context=256, max_tokens=192, exact_floats=True)
    tolerance = Tolerance(reference=1e-4)

    def make_executor(self) -> StepExecutor:
        return CpuExecutor()
