"""The suite fails wrong executors, each in the test that is there for it, with a message that says what is wrong."""

from __future__ import annotations

from pathlib import Path

import pytest

from pi2rt.executors.reference.model import BLOCKS
from pi2rt.testing import StepExecutorConformance
from tests.support.running_sum import RunningSum, compute
from tests.testing import (
    draft_mutants,
    flow_mutants,
    lifecycle_mutants,
    mask_mutants,
    model_mutants,
    output_mutants,
    sampling_mutants,
    sequence_mutants,
    slot_mutants,
    unusable_mutants,
)
from tests.testing.mutant import Mutant

MUTANTS = [
    *lifecycle_mutants.MUTANTS,
    *flow_mutants.MUTANTS,
    *sequence_mutants.MUTANTS,
    *slot_mutants.MUTANTS,
    *draft_mutants.MUTANTS,
    *mask_mutants.MUTANTS,
    *output_mutants.MUTANTS,
    *unusable_mutants.MUTANTS,
    *sampling_mutants.MUTANTS,
    *model_mutants.MUTANTS,
]


@pytest.fixture(autouse=True)
def _kind_of_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BLOCKS, RunningSum, compute)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("mutants")


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: f"{mutant}, {mutant.test}")
def test_the_suite_fails(mutant: Mutant, folder: Path) -> None:
    mutant.check(folder)


def test_every_test_of_the_suite_fails_a_mutant() -> None:
    tests = {name for name in dir(StepExecutorConformance) if name.startswith("test_")}
    assert tests == {mutant.test for mutant in MUTANTS}
