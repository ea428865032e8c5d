"""All that an executor which runs whole steps must do."""

from __future__ import annotations

from pi2rt.testing.agreement import Agreement
from pi2rt.testing.drafts import Drafts
from pi2rt.testing.flow import Flow
from pi2rt.testing.lifecycle import Lifecycle
from pi2rt.testing.masks import Masks
from pi2rt.testing.memory import Memory
from pi2rt.testing.outputs import Outputs
from pi2rt.testing.sampling_options import SamplingOptions
from pi2rt.testing.sequences import Sequences
from pi2rt.testing.slot_copies import SlotCopies
from pi2rt.testing.unusable_logits import UnusableLogits


class StepExecutorConformance(
    Lifecycle,
    Flow,
    Sequences,
    SlotCopies,
    Drafts,
    Masks,
    Outputs,
    UnusableLogits,
    SamplingOptions,
    Agreement,
    Memory,
):
    """Subclass it under a name that starts with "Test", and give ``make_executor``; see ``Harness`` for the rest."""
