"""The process that threads, files and devices belong to.

A forked child has a copy of the memory and none of the threads: whatever waits for one of them would wait for ever, and
what it shares with its parent (eventfds, io_uring, epoll) must not be touched. So a child refuses every call on what
its parent opened, and leaves closing to the parent.
"""

from __future__ import annotations

import os

from pi2rt._errors import ClosedError


class Owner:
    """Remembers the process in which it was made. Compares process ids instead of counting forks, because C code can
    fork without Python's hooks; that costs 0.1 us."""

    __slots__ = ("pid",)

    def __init__(self) -> None:
        self.pid = os.getpid()

    @property
    def elsewhere(self) -> bool:
        """Whether this is another process than the owner, a forked child of it."""
        return os.getpid() != self.pid

    def check(self) -> None:
        """Raises:
        ClosedError: this is a forked child.
        """
        if os.getpid() != self.pid:
            raise ClosedError(
                f"this engine belongs to another process (PID {self.pid}); open one in this process"
            )
