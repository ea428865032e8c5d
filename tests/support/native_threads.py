"""Native threads of this process, by name."""

from __future__ import annotations

import os
import time
from pathlib import Path

PATIENCE_S = 20.0


def thread_ids(name: str) -> list[int]:
    found = []
    for task in os.listdir("/proc/self/task"):
        try:
            if Path(f"/proc/self/task/{task}/comm").read_text() == name + "\n":
                found.append(int(task))
        except OSError:  # it ended meanwhile
            continue
    return found


def count(name: str) -> int:
    return len(thread_ids(name))


def settles_at(name: str, expected: int) -> bool:
    """Whether there are so many threads of that name, now or very soon: the kernel lists a thread for a moment after it
    was joined, and a thread that just started may not have its name yet."""
    deadline = time.monotonic() + PATIENCE_S
    while count(name) != expected:
        if time.monotonic() > deadline:
            return False
        os.sched_yield()
    return True
