"""Trio on a thread of its own, for callers that do not run Trio."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Generic, TypeVar

import trio

from pi2rt._errors import ClosedError
from pi2rt.host.limits import limits_explained
from pi2rt.host.owner import Owner

T = TypeVar("T")


class TrioThread(Generic[T]):
    """Runs ``await main()`` under Trio. Starts at once; ``future`` gets the result, or ClosedError where ``cancel``
    came first. A forked child refuses ``call_soon``, and the rest does nothing there: it has no such thread."""

    def __init__(self, main: Callable[[], Awaitable[T]]) -> None:
        self._main = main
        self.owner = Owner()
        self.future: Future[T] = Future()
        self.future.set_running_or_notify_cancel()  # who stops waiting for it does not change it
        self.scope = trio.CancelScope()  # around ``main``; for the thread itself
        self._token: trio.lowlevel.TrioToken | None = None
        self._began, self._over = threading.Event(), threading.Event()
        # A daemon, so that what nobody closed cannot keep the interpreter from exiting.
        self._thread = threading.Thread(target=self._run, name="pi2rt", daemon=True)
        with limits_explained():
            self._thread.start()
        self._began.wait()

    @property
    def current(self) -> bool:
        """Whether the caller is on this thread."""
        return threading.current_thread() is self._thread

    def call_soon(self, function: Callable[[], object]) -> None:
        """Runs ``function`` on the thread, soon. From any thread, also from a finaliser.

        Raises:
            ClosedError: it has ended, or belongs to another process.
        """
        self.owner.check()
        token = self._token
        try:
            if token is not None:  # else Trio could not begin
                token.run_sync_soon(function)
                return
        except trio.RunFinishedError:
            pass
        raise ClosedError("the engine is closed")

    def cancel(self) -> None:
        """Begins to end it; ``join`` waits. Safe to call twice, from any thread."""
        try:
            self.call_soon(self.scope.cancel)
        except ClosedError:
            return

    def join(self, timeout: float | None = None) -> None:
        """Waits for the end."""
        # Not by Thread.join alone: where Ctrl-C interrupts that, Python 3.11 takes the thread for one that has ended.
        if not self.owner.elsewhere and not self.current and self._over.wait(timeout):
            self._thread.join(timeout)

    def _run(self) -> None:
        try:
            result = trio.run(self._scoped)
        except BaseException as error:
            # The future keeps the error, and its traceback all that its frames hold: the model's metadata and tokenizer
            # and, from this frame, this thread. Nobody needs more of them than their lines.
            traceback.clear_frames(error.__traceback__)
            below = None if error.__traceback__ is None else error.__traceback__.tb_next
            self.future.set_exception(error.with_traceback(below))
        else:
            self.future.set_result(result)
        finally:
            self._began.set()
            self._over.set()

    async def _scoped(self) -> T:
        self._token = trio.lowlevel.current_trio_token()
        self._began.set()
        with self.scope:
            return await self._main()
        raise ClosedError("it was cancelled")
