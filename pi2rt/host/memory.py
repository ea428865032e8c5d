"""How much memory there is for us, and how much we have used."""

from __future__ import annotations

import os
from pathlib import Path

from pi2rt.host.cgroup import cgroup_directories, read_int, read_text

# (limit, use, key in memory.stat of page cache that the kernel drops first) of versions 2 and 1
_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.high", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def available_memory(sys: str | os.PathLike[str] = "/sys", proc: str | os.PathLike[str] = "/proc") -> int:
    """Bytes that can be allocated now without swapping or being killed.

    The least of the kernel's MemAvailable and, for each control group above this process, its limit minus its
    use. Page cache that the kernel drops first does not count as use.

    Args:
        sys, proc: where sysfs and procfs are mounted.
    """
    sys, proc = Path(sys), Path(proc)
    least = _machine_memory(proc)
    for directory in cgroup_directories("memory", sys, proc):
        for limit_file, use_file, cache_key in _FILES:
            limit, used = read_int(directory / limit_file), read_int(directory / use_file)
            if limit is not None and used is not None:
                cache = _fields(directory / "memory.stat").get(cache_key, 0)
                least = min(least, limit - max(0, used - cache))
    return max(0, least)


def peak_rss_bytes(proc: str | os.PathLike[str] = "/proc") -> int:
    """The most memory this process ever had resident, in bytes."""
    peak = _fields(Path(proc) / "self" / "status").get("VmHWM")
    if peak is not None:
        return peak * 1024
    import resource  # not on every system
    import sys

    # Linux counts in KiB, macOS in bytes. Not used where VmHWM is there, since it survives exec on Linux.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def rss_bytes(proc: str | os.PathLike[str] = "/proc") -> int:
    """Memory of this process that is resident now, in bytes; the peak where only that is known."""
    now = _fields(Path(proc) / "self" / "status").get("VmRSS")
    return peak_rss_bytes(proc) if now is None else now * 1024


def _machine_memory(proc: Path) -> int:
    fields = _fields(proc / "meminfo")
    for key in ("MemAvailable", "MemFree", "MemTotal"):
        if key in fields:
            return fields[key] * 1024
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _fields(path: Path) -> dict[str, int]:
    """Lines like ``MemAvailable:  1024 kB`` or ``inactive_file 1024``, without the unit."""
    fields: dict[str, int] = {}
    for line in (read_text(path) or "").splitlines():
        words = line.split()
        if len(words) >= 2 and words[1].isdecimal():
            fields[words[0].rstrip(":")] = int(words[1])
    return fields
