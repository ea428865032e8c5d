from __future__ import annotations

from collections.abc import Sequence

import pytest

from pi2rt._errors import MemoryBudgetError
from pi2rt.host.topology import read_topology
from pi2rt.planner.measure.device_profile import DeviceProfile, measure_device
from pi2rt.planner.placement import PlacedActor, UnitPlacement, default_placement

TWO = UnitPlacement((PlacedActor("big", (4, 5), True), PlacedActor("little", (0,), False)))


def test_together_and_alone() -> None:
    runs: list[tuple[int, tuple[int, ...]]] = []

    def measured(count: int, cores: Sequence[int]) -> float:
        runs.append((count, tuple(cores)))
        return 1e9 * len(cores) + (len(runs) % 3)  # the median is the middle one

    profile = measure_device(TWO, buffer_bytes=1000, repeat=3, read_bandwidth=measured)
    assert profile == DeviceProfile(3e9 + 1, {"big": 2e9 + 1, "little": 1e9 + 1}, 1000)
    assert runs == [(1000, (4, 5, 0))] * 3 + [(1000, (4, 5))] * 3 + [(1000, (0,))] * 3


def test_one_actor_is_measured_once() -> None:
    alone = UnitPlacement(TWO.actors[:1])
    profile = measure_device(alone, buffer_bytes=1, repeat=1, read_bandwidth=lambda count, cores: 5.0)
    assert profile == DeviceProfile(5.0, {"big": 5.0}, 1)


def test_buffer_must_fit() -> None:
    with pytest.raises(MemoryBudgetError, match="needs 1073741824 MiB, and only"):
        measure_device(TWO, buffer_bytes=1 << 50, read_bandwidth=lambda count, cores: 1.0)


@pytest.mark.parametrize("settings", [{"repeat": 0}, {"buffer_bytes": 0}])
def test_bad_settings(settings: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(settings))}=0"):
        measure_device(TWO, **settings)  # type: ignore[arg-type]


def test_this_machine() -> None:
    pytest.importorskip("pi2rt.cython_kernels.kernels.native", reason="the native module is not built")
    profile = measure_device(default_placement(read_topology()), buffer_bytes=32 << 20, repeat=1)
    assert 1e8 < profile.read_bandwidth < 1e13
