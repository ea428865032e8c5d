"""The least time of a decode step, and what steps took."""

from __future__ import annotations

from pathlib import Path

import pytest

from pi2rt.planner.laws import DecodeUse, Rates, bound_s, measure_flash, percentile
from pi2rt.runtime.executor_statistics import StepUse
from pi2rt.runtime.step import NeuronUse


def step(
    missed: int, reads: int, *, asked: int = 1000, weights: int = 10_000_000, streamed: int = 0
) -> StepUse:
    neurons = NeuronUse(asked * 4096, asked, missed, missed // 2, missed * 4096, reads, reads * 4096)
    return StepUse(1, 5, weights, streamed, neurons)


def test_means_and_percentiles_are_over_steps() -> None:
    use = DecodeUse.of([step(missed, 2 * missed) for missed in range(1, 101)])
    assert (use.steps, use.misses_mean, use.misses_p99) == (100, 50.5, 99)
    assert (use.missed_bytes_mean, use.missed_bytes_p99) == (50.5 * 4096, 99 * 4096)
    assert (use.reads_mean, use.reads_p99, use.read_bytes_mean) == (101, 198, 101 * 4096)
    assert use.needed_reads == 50.5  # half of what was read was in vain
    assert use.miss_share == pytest.approx(0.0505)


def test_steps_without_neurons_have_no_misses() -> None:
    use = DecodeUse.of([StepUse(1, 5, 100, 60, None), StepUse(1, 5, 300, 60, None)])
    assert (use.weight_bytes, use.streamed_bytes) == (200, 60)
    assert (use.misses_p99, use.needed_reads, use.miss_share) == (0, 0, 0)
    with pytest.raises(ValueError, match="no steps"):
        DecodeUse.of([])


@pytest.mark.parametrize(
    ("use", "rates", "seconds"),
    [
        (step(0, 0, weights=3 * 10**9), Rates(1e9), 3.0),
        (step(100, 100), Rates(1e9, flash_reads=50), 2.0),
        (step(100, 400), Rates(1e9, flash_reads=50), 2.0),
        (step(0, 0, streamed=10**9), Rates(1e9, flash=5e8), 2.0),
        (step(100, 100, streamed=10**9), Rates(1e9, flash=5e8, flash_reads=50), 4.0),
        (step(100, 100, weights=5 * 10**9, streamed=10**9), Rates(1e9, flash=5e8, flash_reads=50), 5.0),
    ],
)
def test_the_longer_of_memory_and_flash_binds(use: StepUse, rates: Rates, seconds: float) -> None:
    assert bound_s(DecodeUse.of([use]), rates) == pytest.approx(seconds)


@pytest.mark.parametrize(("share", "value"), [(0.0, 1), (0.5, 2), (0.51, 3), (0.99, 4), (1.0, 4)])
def test_percentiles_are_values_that_occurred(share: float, value: int) -> None:
    assert percentile([4, 1, 3, 2], share) == value


def test_flash_is_measured_only_where_it_was_used(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(bytes(4 << 20))
    given = {"page_bytes": 4096, "depth": 8, "io": "auto", "seconds": 0.01}
    assert measure_flash(path, DecodeUse.of([step(0, 0)]), **given) == (0, 0)  # type: ignore[arg-type]
    flash, reads = measure_flash(path, DecodeUse.of([step(1, 1, streamed=1)]), **given)  # type: ignore[arg-type]
    assert flash > 0
    assert reads > 0
