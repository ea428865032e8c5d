"""Ctrl-C and its like as a Trio cancellation, so that everything opened is closed on the way out."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable

import trio


def run_until_interrupted(function: Callable[[], Awaitable[int]]) -> int:
    """Runs ``function`` under Trio and returns its status, or 128 + n after signal n (Ctrl-C, SIGTERM,
    SIGHUP) made it stop. A second signal ends the process at once."""
    return trio.run(_until_interrupted, function)


async def _until_interrupted(function: Callable[[], Awaitable[int]]) -> int:
    # A signal that whoever started us has ignored (nohup, a job in the background) stays ignored.
    wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    wanted = [number for number in wanted if signal.getsignal(number) != signal.SIG_IGN]
    interrupted_by = 0
    status: int | None = None

    async def watch(nursery_scope: trio.CancelScope, *, task_status: trio.TaskStatus[None]) -> None:
        nonlocal interrupted_by
        with trio.open_signal_receiver(*wanted) as signals:
            task_status.started()
            interrupted_by = await anext(signals)
        signal.signal(interrupted_by, signal.SIG_DFL)
        nursery_scope.cancel()

    async with trio.open_nursery() as nursery:
        if wanted:
            await nursery.start(watch, nursery.cancel_scope)
        status = await function()
        nursery.cancel_scope.cancel()
    return 128 + interrupted_by if status is None else status
