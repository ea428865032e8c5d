from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

from pi2rt._errors import RequestError
from pi2rt.host.topology import (
    CoreClass,
    Topology,
    parse_core_classes,
    parse_core_list,
    read_topology,
)

from .fake_system import write_cpus, write_tree


@pytest.fixture
def sys(tmp_path: Path) -> Path:
    return tmp_path / "sys"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    write_tree(tmp_path / "proc", {"self/cgroup": "0::/"})
    return tmp_path / "proc"


def classes(sys: Path, proc: Path, affinity: set[int]) -> list[tuple[str, tuple[int, ...]]]:
    return [(cls.name, cls.cores) for cls in read_topology(sys, affinity, proc).classes]


def test_phone_with_capacities(sys: Path, proc: Path) -> None:
    capacity = {0: 325, 1: 325, 2: 822, 3: 822, 4: 822, 5: 870, 6: 870, 7: 1024}
    khz = {0: 2265600, 1: 2265600, 2: 2956800, 3: 2956800, 4: 2956800, 5: 3148800, 6: 3148800, 7: 3302400}
    write_cpus(sys, 8, cpu_capacity=capacity, cpufreq__cpuinfo_max_freq=khz)
    topology = read_topology(sys, range(8), proc)
    assert topology == Topology(
        (
            CoreClass("prime", (7,), 1024, 3302),
            CoreClass("big", (2, 3, 4, 5, 6), 870, 3148),
            CoreClass("little", (0, 1), 325, 2265),
        )
    )
    assert topology.cores == (7, 2, 3, 4, 5, 6, 0, 1)
    assert topology.threads == tuple(range(8))


def test_phone_with_frequencies_only(sys: Path, proc: Path) -> None:
    khz = dict.fromkeys(range(4), 1_800_000) | dict.fromkeys(range(4, 8), 2_400_000)
    write_cpus(sys, 8, cpufreq__cpuinfo_max_freq=khz)
    topology = read_topology(sys, range(8), proc)
    assert topology.classes == (
        CoreClass("big", (4, 5, 6, 7), 1024, 2400),
        CoreClass("little", (0, 1, 2, 3), 768, 1800),
    )


def test_intel_hybrid(sys: Path, proc: Path) -> None:
    """Six performance cores with two threads each, of which one is favoured; eight efficiency cores."""
    siblings = {core: f"{core - core % 2}-{core - core % 2 + 1}" for core in range(12)}
    siblings |= {core: str(core) for core in range(12, 20)}
    khz = dict.fromkeys(range(12), 4_700_000) | {4: 5_300_000, 5: 5_300_000}
    khz |= dict.fromkeys(range(12, 20), 3_600_000)
    write_cpus(sys, 20, topology__thread_siblings_list=siblings, cpufreq__cpuinfo_max_freq=khz)
    write_tree(sys, {"devices/cpu_core/cpus": "0-11", "devices/cpu_atom/cpus": "12-19"})
    topology = read_topology(sys, range(20), proc)
    big, little = topology.classes
    assert (big.name, big.cores, big.siblings) == ("big", (0, 2, 4, 6, 8, 10), (1, 3, 5, 7, 9, 11))
    assert (little.name, little.cores, little.siblings) == ("little", tuple(range(12, 20)), ())
    assert big.capacity > little.capacity
    assert topology.class_of(3) is big
    assert topology.class_of(20) is None


def test_one_class(sys: Path, proc: Path) -> None:
    khz = dict.fromkeys(range(4), 4_900_000) | {2: 5_100_000}  # a favoured core is no class of its own
    write_cpus(sys, 4, cpufreq__cpuinfo_max_freq=khz)
    assert classes(sys, proc, {0, 1, 2, 3}) == [("cpu", (0, 1, 2, 3))]


def test_equal_capacities_tell_nothing(sys: Path, proc: Path) -> None:
    khz = {0: 3_000_000, 1: 1_500_000}
    write_cpus(sys, 2, cpu_capacity={0: 1024, 1: 1024}, cpufreq__cpuinfo_max_freq=khz)
    assert classes(sys, proc, {0, 1}) == [("big", (0,)), ("little", (1,))]


def test_more_classes_than_names(sys: Path, proc: Path) -> None:
    write_cpus(sys, 4, cpu_capacity={0: 1024, 1: 700, 2: 400, 3: 200})
    assert [name for name, _ in classes(sys, proc, {0, 1, 2, 3})] == ["class0", "class1", "class2", "class3"]


def test_affinity(sys: Path, proc: Path) -> None:
    write_cpus(sys, 8, cpu_capacity=dict.fromkeys(range(4), 400) | dict.fromkeys(range(4, 8), 1024))
    assert classes(sys, proc, {1, 5, 6, 99}) == [("big", (5, 6)), ("little", (1,))]
    assert classes(sys, proc, {1, 2}) == [("cpu", (1, 2))]


def test_affinity_to_second_threads(sys: Path, proc: Path) -> None:
    write_cpus(sys, 4, topology__core_cpus_list={0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    assert classes(sys, proc, {2, 3}) == [("cpu", (2, 3))]
    (cls,) = read_topology(sys, {0, 2, 3}, proc).classes
    assert (cls.cores, cls.siblings) == ((0, 3), (2,))


def test_offline_cores_are_not_used(sys: Path, proc: Path) -> None:
    write_cpus(sys, 4)
    write_tree(sys, {"devices/system/cpu/online": "0,2-3"})
    assert classes(sys, proc, {0, 1, 2, 3}) == [("cpu", (0, 2, 3))]


def test_without_sysfs(sys: Path, proc: Path) -> None:
    assert classes(sys, proc, {3, 5}) == [("cpu", (3, 5))]


def test_malformed_sysfs(sys: Path, proc: Path) -> None:
    write_cpus(
        sys,
        2,
        cpu_capacity={0: "many", 1: ""},
        cpufreq__cpuinfo_max_freq={0: "<unsupported>"},
        topology__thread_siblings_list={0: "0-x", 1: "1-99999999"},
    )
    write_tree(sys, {"devices/system/cpu/online": "?!", "devices/cpu_core/cpus": "0-"})
    assert classes(sys, proc, {0, 1}) == [("cpu", (0, 1))]


# ---------- control groups ----------


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({}, None),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"a/b/cpu.max": "max 100000", "a/cpu.max": "200000 50000"}, 4.0),
        ({"a/b/cpu.max": "300000 100000", "a/cpu.max": "200000 100000", "cpu.max": "900000 100000"}, 2.0),
        ({"a/b/cpu.max": "nonsense"}, None),
    ],
)
def test_quota_version_2(sys: Path, proc: Path, files: dict[str, str], quota: float | None) -> None:
    write_cpus(sys, 2)
    write_tree(proc, {"self/cgroup": "0::/a/b"})
    write_tree(sys / "fs" / "cgroup", {"a/b/cgroup.procs": "1"} | files)
    assert read_topology(sys, {0, 1}, proc).quota_cores == quota


@pytest.mark.parametrize(
    ("mount", "microseconds", "quota"),
    [("cpu", "-1", None), ("cpu", "250000", 2.5), ("cpu,cpuacct", "50000", 0.5)],
)
def test_quota_version_1(sys: Path, proc: Path, mount: str, microseconds: str, quota: float | None) -> None:
    write_cpus(sys, 2)
    write_tree(proc, {"self/cgroup": "4:memory:/\n3:cpu,cpuacct:/docker/x\n0::/"})
    write_tree(
        sys / "fs" / "cgroup" / mount, {"cpu.cfs_quota_us": microseconds, "cpu.cfs_period_us": "100000"}
    )
    assert read_topology(sys, {0, 1}, proc).quota_cores == quota


@pytest.mark.parametrize(
    ("membership", "name"),
    [
        ("0::/a", "a/cpuset.cpus.effective"),
        ("0::/../elsewhere", "cpuset.cpus.effective"),
        ("5:cpuset:/a", "cpuset/a/cpuset.cpus"),
        ("5:cpuset:/not/visible", "cpuset/cpuset.effective_cpus"),
    ],
)
def test_cpuset(sys: Path, proc: Path, membership: str, name: str) -> None:
    write_cpus(sys, 4)
    write_tree(proc, {"self/cgroup": membership})
    write_tree(sys / "fs" / "cgroup", {name: "1-2"})
    assert classes(sys, proc, {0, 1, 2, 3}) == [("cpu", (1, 2))]


def test_this_machine() -> None:
    topology = read_topology()
    assert set(topology.threads) <= (
        os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set(topology.threads)
    )
    assert len(topology.cores) >= 1
    assert topology.quota_cores is None or topology.quota_cores > 0


# ---------- what the user writes ----------

BOARD = Topology(
    (CoreClass("big", (4, 5), 1024, 2400, (6, 7)), CoreClass("little", (0, 1, 2, 3), 512, 1800)), None
)


def test_parse_core_classes() -> None:
    assert parse_core_classes(["little=1,2-3", "big=4"], BOARD) == (
        CoreClass("little", (1, 2, 3), 512, 1800),
        CoreClass("big", (4,), 1024, 2400),
    )
    assert parse_core_classes(["a=0 b=6"], BOARD) == parse_core_classes(["a=0", "b=6"], BOARD)
    assert parse_core_classes(["mixed=5,0"], BOARD) == (CoreClass("mixed", (5, 0), 512, 1800),)
    assert parse_core_classes([], BOARD) == ()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["0"], "cores '0': write NAME=CORES, for example big=0 or little=1,2-3"),
        (["big="], "cores 'big=': write NAME=CORES"),
        (["=1"], "cores '=1': write NAME=CORES"),
        (["big=x"], "cores 'big=x': 'x' is neither a core nor a range of cores"),
        (["big=1,,2"], "'' is neither a core nor a range of cores"),
        (["big=-1"], "'-1' is neither a core nor a range of cores"),
        (["big=1-"], "'1-' is neither"),
        (["big=3-1"], "the range '3-1' is empty or far too long"),
        (["big=0-999999999"], "the range '0-999999999' is empty or far too long"),
        (["big=²"], "'²' is neither"),
        (["big=0,0"], "core 0 is given twice"),
        (["big=0-2,1"], "core 1 is given twice"),
        (["big=0", "little=0"], "cores 'little=0': core 0 is in class 'big' already"),
        (["big=0", "big=1"], "cores 'big=1': the class 'big' is given twice; list all its cores in one"),
        (
            ["big=8"],
            "cores 'big=8': this process cannot use core 8; it can use 0, 1, 2, 3, 4, 5, 6, 7",
        ),
    ],
)
def test_parse_core_classes_errors(given: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=re.escape(message)):
        parse_core_classes(given, BOARD)


def test_parse_core_list() -> None:
    assert parse_core_list("0,2-4, 7") == (0, 2, 3, 4, 7)
    assert parse_core_list("") == ()
