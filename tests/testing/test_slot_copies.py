"""Copies of slots: of executors that compute with fixed arrays, and of those that have them beside the pages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from pi2rt.executors.cpu.executor import CpuExecutor
from pi2rt.executors.reference.executor import ReferenceExecutor
from pi2rt.executors.reference.model import BLOCKS
from pi2rt.executors.simulated.executor import SimulatedExecutor
from pi2rt.formats import ModelFile
from pi2rt.memory import FixedLayout, StateLayout, StateStore
from pi2rt.models import FixedArray, ModelDescription
from pi2rt.runtime.executor import StepExecutor
from pi2rt.testing import SlotCopies, Tolerance
from tests.support.running_sum import RunningSum, compute, open_running_sum
from tests.testing.wrappers import Wrapper


@pytest.fixture(autouse=True)
def _kind_of_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCKS, RunningSum, compute)


class TestReference(SlotCopies):
    tolerance = Tolerance(repeat=1e-4)

    def make_executor(self) -> StepExecutor:
        return ReferenceExecutor()

    def open_fixed_model(self) -> tuple[ModelFile, ModelDescription]:
        return open_running_sum(self.folder)


class TestWrapper(TestReference):
    def make_executor(self) -> StepExecutor:
        return Wrapper()


class TestCpu(SlotCopies):
    """It runs no block with fixed arrays yet, but copies what the store has."""

    def make_executor(self) -> StepExecutor:
        return CpuExecutor()

    def open_fixed_model(self) -> tuple[ModelFile, ModelDescription]:
        return self.open_model("llama")

    def make_fixed_store(self, executor: StepExecutor, description: ModelDescription) -> StateStore:
        arrays = FixedArray("window", (5, 7), "float16"), FixedArray("state", (3, 2, 11))
        layout = StateLayout.of(description, "f16", self.options.context)
        layout = replace(
            layout, fixed=(FixedLayout(0, 0, arrays[0], 0), FixedLayout(1, 0, arrays[1], 128)), slot_bytes=448
        )
        return StateStore(layout, self.options.pages, self.options.slots)


def skipped(suite: SlotCopies) -> Iterator[str]:
    for name in dir(suite):
        if name.startswith("test_"):
            with pytest.raises(pytest.skip.Exception) as caught:
                getattr(suite, name)()
            yield str(caught.value)


def test_executors_without_fixed_arrays_are_skipped(tmp_path_factory: pytest.TempPathFactory) -> None:
    class Suite(SlotCopies):
        models = ("llama", "mixtral")

        def make_executor(self) -> StepExecutor:
            return ReferenceExecutor()

    suite = Suite()
    suite.folder = tmp_path_factory.getbasetemp() / "conformance"
    assert set(skipped(suite)) == {
        "no block of models keeps fixed arrays, and open_fixed_model is not overridden"
    }


def test_executors_that_do_not_borrow_are_skipped(tmp_path_factory: pytest.TempPathFactory) -> None:
    class Suite(TestReference):
        def make_executor(self) -> StepExecutor:
            return SimulatedExecutor()

    suite = Suite()
    suite.folder = tmp_path_factory.getbasetemp() / "conformance"
    assert set(skipped(suite)) == {
        "the executor has no method page_type: it keeps the arrays of its slots by itself"
    }
