"""Standard input, output and error of the command line, whatever state they were handed over in.

A descriptor that is closed is taken by ``/dev/null``, so that no model file gets its number and is written to. Standard
input and output are opened the wrong way round: using them fails with EBADF, as it should. What is said on a standard
error that cannot be written to is lost, and nothing else.

Writing to a pipe that nobody reads blocks. A signal's handler in Python runs meanwhile, and then the write goes on; so
``interrupt_writes`` ends it from the handler, and what does not fit at once from then on is dropped.
"""

from __future__ import annotations

import codecs
import io
import os
import select
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from pi2rt._errors import OutputError

ENCODING_ERRORS = "pi2rt.output"
"""How characters are written that the encoding of standard output lacks: "?"; bytes of file names as they are."""


class Interrupted(KeyboardInterrupt):
    """A signal came while the main thread was blocked in a write to standard output or error."""


class StandardStream(io.RawIOBase):
    """Descriptor 1 or 2, for writing.

    Args:
        fd: it.
        name: what errors call it; None: there are no errors, and what cannot be written is lost.
    """

    def __init__(self, fd: int, name: str | None) -> None:
        super().__init__()
        self._fd, self._name = fd, name
        self._dropped = False  # all that is written
        self._hurries = False  # what cannot be written at once is dropped
        self._writer = 0  # the thread that is inside a write

    def fileno(self) -> int:
        return self._fd

    def isatty(self) -> bool:
        return os.isatty(self._fd)

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        """All of it, and blocks until it is taken.

        Raises:
            BrokenPipeError: whoever read it has gone.
            OutputError: it cannot be written to.
            Interrupted: by ``interrupt``.
        """
        view = memoryview(data).cast("B")
        total = view.nbytes
        try:
            while view.nbytes and not self._dropped:
                if self._hurries and not self.ready():
                    self._dropped = True
                else:  # pieces that a pipe takes at once, or not at all
                    view = view[self._write_some(view[: select.PIPE_BUF]) :]
        except KeyboardInterrupt:
            self._dropped = True
            raise
        except OSError as error:
            self._dropped = True  # Python writes once more on its way out
            if self._name is None:
                return total
            if isinstance(error, BrokenPipeError):
                raise
            raise OutputError(self._name, error.strerror or str(error)) from error
        return total

    def _write_some(self, view: memoryview) -> int:
        self._writer = threading.get_ident()
        try:
            return os.write(self._fd, view)
        except BlockingIOError:  # another process that shares it has made it so
            select.select([], [self._fd], [])
            return 0
        finally:
            self._writer = 0

    def ready(self) -> bool:
        """Whether a few bytes can be written now."""
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        return self._dropped or bool(poll.poll(0))

    def interrupt(self) -> None:
        """From a signal handler: what cannot be written now is dropped, and a write that is blocked raises
        ``Interrupted``."""
        self._hurries = True
        if not self.ready():
            self._dropped = True
            if self._writer == threading.get_ident():
                raise Interrupted


_own: list[StandardStream] = []  # those of this process, while the command line runs


@contextmanager
def standard_streams() -> Iterator[None]:
    """Makes the three usable while the command line runs. Streams that somebody has put in place of the process's own
    stay as they are."""
    _take_closed()
    before = sys.stdin, sys.stdout, sys.stderr
    codecs.register_error(ENCODING_ERRORS, _encode_the_rest)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115 - it stays open
    sys.stdout = _own_stream(
        sys.stdout, sys.__stdout__, StandardStream(1, "standard output"), ENCODING_ERRORS
    )
    sys.stderr = _own_stream(sys.stderr, sys.__stderr__, StandardStream(2, None), "backslashreplace")
    try:
        yield
    finally:
        _own.clear()
        sys.stdin, sys.stdout, sys.stderr = before


def interrupt_writes() -> None:
    """From a signal handler: standard output and error no longer block.

    Raises:
        Interrupted: out of the write that was blocked.
    """
    interrupted = False
    for stream in _own:
        try:
            stream.interrupt()
        except Interrupted:
            interrupted = True
    if interrupted:
        raise Interrupted


async def write(text: str) -> None:
    """To standard output, at once. Waits, and can be cancelled, while a reader is behind."""
    import trio

    for stream in _own:
        while stream.fileno() == 1 and not stream.ready():
            await trio.lowlevel.wait_writable(1)
    sys.stdout.write(text)
    sys.stdout.flush()


def _take_closed() -> None:
    for fd, flags in (0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_WRONLY):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, flags), True)  # the lowest number that is free: this one


def _own_stream(now: TextIO | None, own: TextIO | None, stream: StandardStream, errors: str) -> TextIO:
    if now is not None and now is not own:
        return now
    _own.append(stream)
    raw: Any = stream  # without a buffer, in which something would be left when a write fails
    return io.TextIOWrapper(
        raw,
        encoding="utf-8" if now is None else now.encoding,
        errors=errors,
        line_buffering=stream.isatty() or stream.fileno() == 2,
    )


def _encode_the_rest(error: UnicodeError) -> tuple[bytes, int]:
    assert isinstance(error, UnicodeEncodeError)
    codes = map(ord, error.object[error.start : error.end])
    return bytes(code - 0xDC00 if 0xDC80 <= code <= 0xDCFF else ord("?") for code in codes), error.end
