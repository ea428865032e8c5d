"""A memory cgroup for one measured process: page cache included, no swap. Needs root and cgroup v1 or v2."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class MemoryGroup:
    path: Path
    version: int

    def enter(self) -> None:
        """For ``preexec_fn``: the process to be joins."""
        (self.path / "cgroup.procs").write_text(str(os.getpid()))

    def peak(self) -> int:
        """The most bytes it ever held, page cache included."""
        name = "memory.peak" if self.version == 2 else "memory.max_usage_in_bytes"
        return int((self.path / name).read_text())


@contextmanager
def memory_group(limit: int) -> Iterator[MemoryGroup]:
    """A group of its own that may hold ``limit`` bytes; gone at the end, when its processes have ended."""
    version = 1 if (ROOT / "memory").is_dir() else 2
    path = (ROOT / "memory" if version == 1 else ROOT) / f"pi2rt.{os.getpid()}.{time.monotonic_ns()}"
    if version == 2 and "memory" not in (ROOT / "cgroup.subtree_control").read_text().split():
        (ROOT / "cgroup.subtree_control").write_text("+memory")
    path.mkdir()
    try:
        if version == 1:
            (path / "memory.limit_in_bytes").write_text(str(limit))
            swap = path / "memory.memsw.limit_in_bytes"
            if swap.exists():
                swap.write_text(str(limit))
        else:
            (path / "memory.max").write_text(str(limit))
            if (path / "memory.swap.max").exists():
                (path / "memory.swap.max").write_text("0")
        yield MemoryGroup(path, version)
    finally:
        for _ in range(50):
            try:
                path.rmdir()
                break
            except OSError:
                time.sleep(0.1)  # the kernel still counts the last process


def forget(*paths: str | os.PathLike[str]) -> None:
    """Drops the files' pages from the page cache."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)
