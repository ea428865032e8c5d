"""A CPU quota for single threads: a control group of theirs. Needs root and cgroup v1, or v2 with threads."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


def threads_named(name: str) -> list[int]:
    """Ids of the threads of this process with this name."""
    tasks = map(int, os.listdir("/proc/self/task"))
    return [task for task in tasks if Path(f"/proc/self/task/{task}/comm").read_text() == name + "\n"]


@contextmanager
def cpu_quota(threads: Iterable[int], share: float, period_s: float = 0.1) -> Iterator[None]:
    """Gives these threads ``share`` of one core together: in each period they run for that part of it, and then not
    until the next one begins."""
    quota, period = round(share * period_s * 1e6), round(period_s * 1e6)
    first = (ROOT / "cpu").is_dir()
    top = ROOT / "cpu" if first else ROOT
    group = top / f"pi2rt.{os.getpid()}.{time.monotonic_ns()}"
    group.mkdir()
    members = "tasks" if first else "cgroup.threads"
    try:
        if first:
            (group / "cpu.cfs_period_us").write_text(str(period))
            (group / "cpu.cfs_quota_us").write_text(str(quota))
        else:
            (group / "cgroup.type").write_text("threaded")
            (group / "cpu.max").write_text(f"{quota} {period}")
        threads = list(threads)
        for thread in threads:
            (group / members).write_text(str(thread))
        yield
    finally:
        for thread in threads:
            (top / members).write_text(str(thread))
        group.rmdir()
