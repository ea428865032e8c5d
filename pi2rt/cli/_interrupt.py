"""Ctrl-C and its like as a Trio cancellation, so that everything opened is closed on the way out."""

from __future__ import annotations

import signal
from collections.abc import Awaitable, Callable

import trio

from pi2rt.cli._streams import Interrupted, interrupt_writes


def run_until_interrupted(function: Callable[[], Awaitable[int]]) -> int:
    """Runs ``function`` under Trio and returns its status, or 128 + n after signal n (Ctrl-C, SIGTERM,
    SIGHUP) made it stop, also where it was writing to a pipe that nobody reads. A second signal ends the process at
    once."""
    return trio.run(_until_interrupted, function)


async def _until_interrupted(function: Callable[[], Awaitable[int]]) -> int:
    # A signal that whoever started us has ignored (nohup, a job in the background) stays ignored.
    wanted = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    wanted = [number for number in wanted if signal.getsignal(number) != signal.SIG_IGN]
    interrupted_by = 0
    scope = trio.CancelScope()
    token = trio.lowlevel.current_trio_token()

    def interrupt(number: int, frame: object) -> None:
        nonlocal interrupted_by
        interrupted_by = number
        for each in wanted:
            signal.signal(each, signal.SIG_DFL)
        token.run_sync_soon(scope.cancel)
        interrupt_writes()

    before = {number: signal.signal(number, interrupt) for number in wanted}
    status: int | None = None
    try:
        with scope:
            status = await function()
    except BaseException as error:
        rest = _without_interrupted(error)
        if rest is not None:
            raise rest from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + interrupted_by if status is None else status


def _without_interrupted(error: BaseException) -> BaseException | None:
    if isinstance(error, BaseExceptionGroup):
        return error.split(Interrupted)[1]
    return None if isinstance(error, Interrupted) else error
