"""Reads of a device that may not answer: what to do without them, and with the memory that they go to."""

from __future__ import annotations

import errno
import os
import threading
import warnings
from collections.abc import Callable
from typing import TypeVar

import trio

from pi2rt.cython_kernels.kernels import native
from pi2rt.host.read_errors import read_failure

T = TypeVar("T")


def give_back(*memories: native.Memory, late: int, path: str | os.PathLike[str]) -> None:
    """Closes them, or, where reads of ``late`` bytes have not ended, gives back all but these: what has reached a
    device cannot be cancelled. Warns with RuntimeWarning then."""
    if not late:
        for memory in memories:
            memory.close()
        return
    whole = [memory for memory in memories if not memory.abandon()]
    stays = max(late, sum(memory.nbytes for memory in whole))
    warnings.warn(
        f"{os.fspath(path)}: the device does not answer; {stays} bytes that it may write to stay taken until it does",
        RuntimeWarning,
        stacklevel=2,
    )


class LateReads:
    """Calls in worker threads that read, and are left alone when none of those that run has returned for ``deadline``
    seconds (None: never).

    Cancellation waits for a call to return, or for the deadline: what it reads into is in use until then. It is noticed
    by the next ``run``, so that what a call has made is not lost.
    """

    def __init__(self, path: str | os.PathLike[str], deadline: float | None, workers: int = 1) -> None:
        self._path, self._deadline = path, deadline
        self._limiter = trio.CapacityLimiter(workers)  # not Trio's own: calls that hang would use it up
        self._scopes: set[trio.CancelScope] = set()

    async def run(self, what: str, call: Callable[[], T], undo: Callable[[T], None] | None = None) -> T:
        """What ``call`` returns. Where it does so too late, ``undo`` gets that, in the same thread.

        Raises:
            OSError: ETIMEDOUT, names ``what`` was read; or whatever ``call`` raises.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        lock = threading.Lock()
        given_up = False
        results: list[T] = []

        def work() -> None:
            result = call()
            with lock:
                if not given_up:
                    results.append(result)
                    return
            if undo is not None:
                undo(result)

        with trio.CancelScope(shield=True) as scope:
            self._scopes.add(scope)
            self._put_off()
            try:
                await trio.to_thread.run_sync(work, abandon_on_cancel=True, limiter=self._limiter)
                self._put_off()
            finally:
                self._scopes.remove(scope)
        with lock:
            given_up = True
        if not results:
            raise read_failure(what, errno.ETIMEDOUT, self._path, self._deadline)
        return results[0]

    def _put_off(self) -> None:
        """Something has begun or ended."""
        if self._deadline is not None:
            for scope in self._scopes:
                scope.deadline = trio.current_time() + self._deadline
