"""The numpy executor passes pi2rt's conformance suite."""

from numpy_executor.executor import NumpyExecutor

from pi2rt.testing import StepExecutorConformance, Tolerance


class TestNumpyExecutor(StepExecutorConformance):
    models = ("llama", "mistral", "qwen2", "qwen3")
    tolerance = Tolerance(reference=1e-4, repeat=1e-4)  # numpy adds in another order for other shapes

    def make_executor(self) -> NumpyExecutor:
        return NumpyExecutor()
