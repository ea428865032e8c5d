"""What ``AsyncStream`` and ``Stream`` share: the state of one request as its consumer sees it."""

from __future__ import annotations

from pi2rt._errors import ClosedError
from pi2rt.api.jobs import End, Item, Pump, Report, Started
from pi2rt.api.runtime_thread import RuntimeThread
from pi2rt.engine import Chunk, Timing
from pi2rt.engine.blame import carried
from pi2rt.engine.token_stream import CLOSED


class RequestStream:
    """Not started -> entered (the engine has the request) -> ended. What ended it is raised again by every later call,
    so that no interrupted stream looks like a whole one."""

    def __init__(self, engine: object, thread: RuntimeThread, pump: Pump) -> None:
        self._engine = engine  # which closes when nobody knows it any more
        self._thread, self._pump = thread, pump
        self._begun = self._entered = False
        self._end: End | None = None

    @property
    def timing(self) -> Timing:
        """What the request has used so far, or had used when it ended, was cancelled or failed."""
        return self._pump.timing

    def _ended(self) -> bool:
        return self._end is not None

    def _begin(self) -> None:
        """Starts the request, once."""
        if not self._begun and not self._ended():
            self._begun = True
            self._thread.start(self._pump)
            if self._ended():  # another thread has closed it meanwhile
                self._pump.cancel()

    def _accept(self, item: Item) -> Chunk | None:
        """What has arrived; None where it is no chunk."""
        if isinstance(item, Chunk):
            self._pump.took()
            return item
        if isinstance(item, Started):
            self._entered = True
        elif isinstance(item, End):
            self._end = self._end or item
        else:
            self._report(item)
        return None

    def _report(self, report: Report) -> None:
        try:
            report.call()
        except BaseException as error:
            given = carried(error)
            self._leave(given if isinstance(given, Exception) else ClosedError("this stream was interrupted"))
            raise given from given.__cause__

    def _leave(self, error: BaseException | None = None) -> bool:
        """Ends the request, if it has not ended. Returns whether it had to. From any thread, also from a finaliser."""
        if self._end is not None or self._thread.trio.owner.elsewhere:
            return False
        self._end = End(error or ClosedError(CLOSED))
        if self._begun:
            self._pump.cancel()
        return True
