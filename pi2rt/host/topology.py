"""The cores this process may run on, in classes: what big.LITTLE and hybrid processors are made of.

Read from Linux's sysfs (Documentation/ABI/testing/sysfs-devices-system-cpu in the kernel). In order of trust:

1. ``devices/cpu_core/cpus`` and ``devices/cpu_atom/cpus``: Intel's performance and efficiency cores. First,
   because favoured performance cores clock a little higher than others and are still the same class.
2. ``cpu*/cpu_capacity``: relative performance, 1024 for the best core; Arm.
3. ``cpu*/cpufreq/cpuinfo_max_freq``.

Cores within 10 % of the best of a class belong to it: a phone with 3 cores at 3.15 GHz and 2 at 2.96 has 5 of
a kind.
"""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from pi2rt._errors import RequestError
from pi2rt.host.cgroup import cgroup_directories, read_int, read_text

_SAME_CLASS = 0.9
_NAMES = {1: ("cpu",), 2: ("big", "little"), 3: ("prime", "big", "little")}
_FULL_CAPACITY = 1024


@dataclass(frozen=True, slots=True)
class CoreClass:
    """Cores of a kind. ``cores``: one thread of each physical core, ascending. ``capacity``: of one core,
    1024 for the best of the machine. ``max_mhz``: 0 where unknown. ``siblings``: further threads of the same
    physical cores, which add little to dot products."""

    name: str
    cores: tuple[int, ...]
    capacity: int = _FULL_CAPACITY
    max_mhz: int = 0
    siblings: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Topology:
    """``classes``: best first. ``quota_cores``: how many cores' worth of time the control groups grant, None
    for all."""

    classes: tuple[CoreClass, ...]
    quota_cores: float | None = None

    @property
    def cores(self) -> tuple[int, ...]:
        """One thread of each physical core, best class first."""
        return tuple(core for cls in self.classes for core in cls.cores)

    @property
    def threads(self) -> tuple[int, ...]:
        """All hardware threads that may be used, ascending."""
        return tuple(sorted(core for cls in self.classes for core in (*cls.cores, *cls.siblings)))

    def class_of(self, core: int) -> CoreClass | None:
        """The class that a hardware thread belongs to; None where it may not be used."""
        return next((cls for cls in self.classes if core in cls.cores or core in cls.siblings), None)


def read_topology(
    root: str | os.PathLike[str] = "/sys",
    affinity: Collection[int] | None = None,
    proc: str | os.PathLike[str] = "/proc",
) -> Topology:
    """The cores that are online, within the affinity and within the cpuset of the control groups.

    Args:
        root, proc: where sysfs and procfs are mounted.
        affinity: cores allowed; None asks the kernel for this process's.
    """
    root, proc = Path(root), Path(proc)
    allowed = set(own_cores() if affinity is None else affinity)
    cpus = root / "devices" / "system" / "cpu"
    present = {int(path.name[3:]) for path in cpus.glob("cpu[0-9]*") if path.name[3:].isdecimal()}
    present &= _cores_in(cpus / "online", present)
    present &= _cpuset(root, proc, present)
    usable = (present & allowed) or allowed or {0}  # without sysfs: believe the affinity
    mhz = {core: (read_int(cpus / f"cpu{core}/cpufreq/cpuinfo_max_freq") or 0) // 1000 for core in usable}
    groups = _groups(root, cpus, usable, mhz)
    best_mhz = max(mhz.values())
    names = _NAMES.get(len(groups)) or tuple(f"class{i}" for i in range(len(groups)))
    classes = []
    for name, members in zip(names, groups, strict=True):
        firsts = _first_threads(cpus, members)
        fastest = max(mhz[core] for core in members)
        capacity = max(read_int(cpus / f"cpu{core}/cpu_capacity") or 0 for core in members)
        if not capacity:
            capacity = round(_FULL_CAPACITY * fastest / best_mhz) if best_mhz else _FULL_CAPACITY
        classes.append(CoreClass(name, firsts, capacity, fastest, tuple(sorted(members - set(firsts)))))
    return Topology(tuple(classes), _quota(root, proc))


def parse_core_classes(specifications: list[str], topology: Topology | None = None) -> tuple[CoreClass, ...]:
    """``["big=0", "little=1,2-3"]``: classes as the user wants them, in that order.

    Args:
        specifications: ``NAME=CORES``, CORES a list of numbers and ranges.
        topology: what there is; None reads this machine's.

    Raises:
        RequestError: malformed, a class or core given twice, or a core that this process cannot use.
    """
    topology = read_topology() if topology is None else topology
    classes: dict[str, CoreClass] = {}
    taken: dict[int, str] = {}
    for text in (part for specification in specifications for part in specification.split()):
        name, separator, numbers = text.partition("=")
        if not separator or not name or not numbers:
            raise RequestError(f"cores {text!r}: write NAME=CORES, for example big=0 or little=1,2-3")
        if name in classes:
            raise RequestError(
                f"cores {text!r}: the class {name!r} is given twice; list all its cores in one"
            )
        try:
            cores = parse_core_list(numbers)
        except ValueError as error:
            raise RequestError(f"cores {text!r}: {error}; write numbers and ranges, as in 1,2-3") from None
        for core in cores:
            if core in taken:
                raise RequestError(f"cores {text!r}: core {core} is in class {taken[core]!r} already")
            if topology.class_of(core) is None:
                raise RequestError(
                    f"cores {text!r}: this process cannot use core {core}; it can use "
                    f"{', '.join(map(str, topology.threads))}"
                )
            taken[core] = name
        kinds = [kind for core in cores if (kind := topology.class_of(core)) is not None]
        classes[name] = CoreClass(
            name, cores, min(kind.capacity for kind in kinds), min(kind.max_mhz for kind in kinds)
        )
    return tuple(classes.values())


def parse_core_list(text: str) -> tuple[int, ...]:
    """``"0,2-4"`` as the kernel and ``--cores`` write it: (0, 2, 3, 4), in the order given; () for "".

    Raises:
        ValueError: malformed, empty between commas, a range that runs backwards or is absurdly long, or a
            core twice.
    """
    cores: list[int] = []
    for part in text.split(",") if text else ():
        first, dash, last = part.strip().partition("-")
        if not (first.isdecimal() and (last.isdecimal() or not dash)) or len(part) > 16:
            raise ValueError(f"{part!r} is neither a core nor a range of cores")
        start, end = int(first), int(last or first)
        if not start <= end < start + 65536:
            raise ValueError(f"the range {part!r} is empty or far too long")
        cores += range(start, end + 1)
    if len(set(cores)) != len(cores):
        twice = next(core for core in cores if cores.count(core) > 1)
        raise ValueError(f"core {twice} is given twice")
    return tuple(cores)


def own_cores() -> set[int]:
    """Cores that this thread may run on; all there are, where the system does not say."""
    try:
        return os.sched_getaffinity(0)
    except (AttributeError, OSError):  # not of this system, or refused by a sandbox
        return set(range(os.cpu_count() or 1))


def _cores_in(path: Path, default: set[int]) -> set[int]:
    """A file that lists cores; ``default`` where it is missing, empty or malformed."""
    try:
        return set(parse_core_list(read_text(path) or "")) or default
    except ValueError:
        return default


def _cpuset(root: Path, proc: Path, default: set[int]) -> set[int]:
    for directory in cgroup_directories("cpuset", root, proc):
        for name in ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus"):
            if read_text(directory / name):
                return _cores_in(directory / name, default)
    return default


def _groups(root: Path, cpus: Path, usable: set[int], mhz: dict[int, int]) -> list[set[int]]:
    performance = _cores_in(root / "devices" / "cpu_core" / "cpus", set()) & usable
    efficiency = _cores_in(root / "devices" / "cpu_atom" / "cpus", set()) & usable
    if performance and efficiency:
        return [usable - efficiency, efficiency]
    capacities = {core: read_int(cpus / f"cpu{core}" / "cpu_capacity") or 0 for core in usable}
    strength = capacities if all(capacities.values()) and len(set(capacities.values())) > 1 else mhz
    groups: list[set[int]] = []
    best = 0
    for core in sorted(usable, key=lambda core: (-strength[core], core)):
        if not groups or strength[core] < best * _SAME_CLASS:
            groups.append(set())
            best = strength[core]
        groups[-1].add(core)
    return groups


def _first_threads(cpus: Path, members: set[int]) -> tuple[int, ...]:
    """One thread of each physical core: of those that may be used, the lowest."""
    firsts: set[int] = set()
    for core in sorted(members):
        topology = cpus / f"cpu{core}" / "topology"
        siblings = _cores_in(
            topology / "thread_siblings_list", _cores_in(topology / "core_cpus_list", {core})
        )
        if not siblings & firsts:
            firsts.add(core)
    return tuple(sorted(firsts))


def _quota(root: Path, proc: Path) -> float | None:
    """The tightest quota of CPU time over all levels, in cores."""
    quotas: list[float] = []
    for directory in cgroup_directories("cpu", root, proc):
        words = (read_text(directory / "cpu.max") or "").split()  # version 2: "QUOTA PERIOD"
        if len(words) == 2 and words[0].isdecimal() and words[1].isdecimal():
            quota, period = int(words[0]), int(words[1])
        else:
            quota = read_int(directory / "cpu.cfs_quota_us") or -1
            period = read_int(directory / "cpu.cfs_period_us") or 0
        if quota > 0 and period > 0:
            quotas.append(quota / period)
    return min(quotas, default=None)
