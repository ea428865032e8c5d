"""Progress bars and numbers for people. Bars go to standard error, and only when it is a terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from functools import partial
from types import TracebackType
from typing import TYPE_CHECKING, Self, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

_REFRESH_S = 0.1

Result = TypeVar("Result")


class Bar:
    """One line that shows how far something is, in bytes or in pieces; gone when it is done. Used as a context manager.

    Silent where standard error is no terminal. Redraws from the caller's thread, at most ten times a second.
    """

    def __init__(self, title: str = "", *, pieces: bool = False) -> None:
        self._title, self._pieces = title, pieces
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._shown = title
        self._drawn = 0.0

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import (
                BarColumn,
                DownloadColumn,
                MofNCompleteColumn,
                Progress,
                TextColumn,
                TransferSpeedColumn,
            )

            measure = (MofNCompleteColumn(),) if self._pieces else (DownloadColumn(), TransferSpeedColumn())
            self._progress = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                *measure,
                console=Console(stderr=True),
                auto_refresh=False,
                transient=True,
            )
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Removes the line. May be called twice."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def stage(self, stage: str, done: int, total: int) -> None:
        """As ``update``, for work in named stages: a new stage begins at zero."""
        title = f"{stage} {self._title}".strip()
        if self._progress is not None and self._task is not None and title != self._shown:
            self._progress.remove_task(self._task)
            self._task = None
        self._update(title, done, total)

    def update(self, done: int, total: int) -> None:
        """Bytes done of bytes in all; ``total`` 0 is unknown."""
        self._update(self._title, done, total)

    def _update(self, title: str, done: int, total: int) -> None:
        if self._progress is None:
            return
        if self._task is None:
            self._task, self._shown = self._progress.add_task(title, total=total or None), title
        self._progress.update(self._task, completed=done, total=total or None)
        now = time.monotonic()
        if done == total or now - self._drawn >= _REFRESH_S:
            self._drawn = now
            self._progress.refresh()


def size(count: float) -> str:
    """A number of bytes in the largest unit that leaves at least 1 of it: ``93.8 MiB``."""
    for unit in ("bytes", "KiB", "MiB"):
        if abs(count) < 1024:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GiB"


def duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"


async def work_in_thread(work: Callable[..., Result], bar: Bar) -> Result:
    """Runs ``work(progress=...)`` in a thread with the bar; a cancellation is raised from its progress."""
    import trio

    def report(done: int, total: int) -> None:
        trio.from_thread.check_cancelled()
        trio.from_thread.run_sync(bar.update, done, total)

    return await trio.to_thread.run_sync(partial(work, progress=report))
