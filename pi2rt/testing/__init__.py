"""Conformance tests for executors and cluster units, as classes of tests that pytest collects from a subclass::

    from pi2rt.testing import StepExecutorConformance

    class TestMine(StepExecutorConformance):
        models = ("llama",)  # those of TINY_MODELS that it can run

        def make_executor(self) -> StepExecutor:
            return MyExecutor()

No plug-in of pytest is needed. Models are made from a seed in pytest's temporary folder; what is right comes from the
reference executor while the tests run. pytest is imported by this package alone.
"""

from pi2rt.testing.agreement import Agreement
from pi2rt.testing.cluster_unit import ClusterUnitConformance
from pi2rt.testing.conformance import StepExecutorConformance
from pi2rt.testing.drafts import Drafts
from pi2rt.testing.flow import Flow
from pi2rt.testing.lifecycle import Lifecycle
from pi2rt.testing.masks import Masks
from pi2rt.testing.memory import Memory
from pi2rt.testing.outputs import Outputs
from pi2rt.testing.sampling_options import SamplingOptions
from pi2rt.testing.sequences import Sequences
from pi2rt.testing.slot_copies import SlotCopies
from pi2rt.testing.tiny_model import TinyModel
from pi2rt.testing.tiny_models import TINY_MODELS, tiny_model_path
from pi2rt.testing.tolerance import Tolerance
from pi2rt.testing.unusable_logits import UnusableLogits

__all__ = [
    "TINY_MODELS",
    "Agreement",
    "ClusterUnitConformance",
    "Drafts",
    "Flow",
    "Lifecycle",
    "Masks",
    "Memory",
    "Outputs",
    "SamplingOptions",
    "Sequences",
    "SlotCopies",
    "StepExecutorConformance",
    "TinyModel",
    "Tolerance",
    "UnusableLogits",
    "tiny_model_path",
]
