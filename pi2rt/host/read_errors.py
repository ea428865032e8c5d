"""What opening a file for native reads, and reading it, failed with."""

from __future__ import annotations

import errno
import os

from pi2rt._errors import ModelFormatError, Pi2rtError, RequestError
from pi2rt.host.limits import system_failure, uring_failure


def open_failure(error: int, io: str, path: object, uring: tuple[int, str] = (0, "")) -> Exception:
    """Why a file cannot be opened for native reads.

    Args:
        error: an errno.
        io: "auto", "uring" or "preadv", as it was asked for.
        path: of the file.
        uring: (errno, sentence) of the probe of io_uring after the failure, which tells a refused io_uring from a file
            that cannot be opened.
    """
    if io == "uring" and error == errno.EOPNOTSUPP:
        return RequestError(
            f"{path}: io='uring': reads of its file system cannot be told not to wait (FUSE, tmpfs and network file "
            f"systems), for which io_uring is of no use; take io='preadv' or 'auto'"
        )
    if io == "uring" and uring[0] == error and error not in (errno.EMFILE, errno.ENFILE):
        return uring_failure(*uring)
    if (limit := system_failure(f"opening {path} for reads past the page cache", error)) is not None:
        return limit
    return OSError(error, os.strerror(error), os.fspath(str(path)))


def read_failure(
    what: str, error: int, path: object, deadline: float | None, end: int = -1
) -> OSError | Pi2rtError:
    """What a native reader has failed with.

    Args:
        what: was read.
        error: an errno, or -1 where the file ended too early.
        path: of the file, or None.
        deadline: seconds; see ``RuntimeOptions.read_deadline``.
        end: the offset at which the file ended, where it did and that is known.
    """
    if error < 0:
        where = "" if end < 0 else f" at byte {end}"
        return ModelFormatError(
            path, f"reading {what}", f"the file ends too early{where}: it became shorter after it was opened"
        )
    if error == errno.ETIMEDOUT and deadline is not None:
        problem = f"no read has ended for {deadline:g} s; the device does not answer"
    else:
        problem = os.strerror(error)
    return OSError(error, f"reading {what}: {problem}", *([] if path is None else [os.fspath(str(path))]))
