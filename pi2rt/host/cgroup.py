"""Where the limits of this process's control groups lie. Linux: ``man 7 cgroups``.

Paths are found the same way for version 1 (a hierarchy for each controller) and version 2 (one for all). A
limit may be set at every level, so all levels are given. In a container the path of the group often does not
exist below the mount point, because the mount shows the container's own part only; then its top level is what
counts.
"""

from __future__ import annotations

from pathlib import Path


def cgroup_directories(controller: str, sys: Path, proc: Path) -> tuple[Path, ...]:
    """The existing directories of a controller ("memory", "cpu", "cpuset"), innermost first; () without
    cgroups.

    Args:
        controller: as version 1 names it.
        sys, proc: where sysfs and procfs are mounted.
    """
    mount = sys / "fs" / "cgroup"
    found: list[Path] = []
    for line in (read_text(proc / "self" / "cgroup") or "").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            tops = [mount, mount / "unified"]  # alone, or beside version 1
        elif controller in controllers.split(","):
            tops = [mount / controller, mount / controllers]
        else:
            continue
        for top in tops:
            found += [level for level in _levels(top, path) if level not in found]
    return tuple(found)


def read_text(path: Path) -> str | None:
    """The stripped text of a small file of sysfs or procfs; None where it is missing or unreadable."""
    try:
        return (
            path.read_bytes().decode("ascii", "replace").strip()
        )  # a text file leaves strings in a cache of Python's
    except OSError:
        return None


def read_int(path: Path) -> int | None:
    """A file that holds one whole number; None where it is missing or holds something else ("max")."""
    try:
        return int(read_text(path) or "")
    except ValueError:
        return None


def _levels(top: Path, path: str) -> list[Path]:
    if not top.is_dir():
        return []
    parts = [part for part in path.split("/") if part and part != ".."]
    levels = [top.joinpath(*parts[:length]) for length in range(len(parts), 0, -1)]
    return [*(level for level in levels if level.is_dir()), top]
