"""A file opened for positioned reads."""

from __future__ import annotations

import os
import stat
from mmap import PAGESIZE
from pathlib import Path

from pi2rt._errors import ClosedError, ModelFormatError, ModelNotFoundError
from pi2rt.host.limits import explained


class RegularFile:
    """A regular file opened for reading at any offset, from any thread, without a shared file position.

    Reads go through ``pread`` and not through a mapping, so what was read counts as ours and nothing else
    does.

    Args:
        path: the file.

    Raises:
        ModelNotFoundError: it cannot be opened.
        ModelFormatError: it is a directory, a pipe or a device.
        SystemLimitError: the process may have no more open files.
    """

    __slots__ = ("_fd", "path", "size")

    def __init__(self, path: Path) -> None:
        try:
            # Non-blocking, so that opening a pipe nobody writes to returns and is refused below.
            fd = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
        except (OSError, ValueError) as error:  # ValueError: a NUL in the name
            raise explained(error) or not_found(path, error) from error
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            os.close(fd)
            raise ModelFormatError(path, "file", "is not a regular file")
        self.path, self.size, self._fd = path, status.st_size, fd

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fills ``buffer`` from byte ``offset`` on. Releases the GIL while it waits.

        Raises:
            ClosedError: the file was closed.
            ModelFormatError: the file ends before the buffer is full.
            OSError: the read failed; names the file.
        """
        if self._fd < 0:
            raise ClosedError(f"{self.path} is closed")
        with buffer.cast("B") as view:
            done, total = 0, len(view)
            while done < total:
                try:  # one call may give less than asked for; EINTR is retried by Python (PEP 475)
                    with view[done:] as rest:
                        count = os.preadv(self._fd, [rest], offset + done)
                except OSError as error:
                    raise OSError(error.errno, error.strerror, str(self.path)) from error
                if count == 0:
                    raise ModelFormatError(
                        self.path,
                        "file",
                        f"ended at byte {offset + done} while reading up to byte {offset + total}; "
                        f"it had {self.size} bytes when it was opened",
                    )
                done += count

    def read(self, offset: int, count: int) -> bytearray:
        """``count`` bytes from byte ``offset`` on. The caller has checked ``count``: it is allocated
        first."""
        out = bytearray(count)
        with memoryview(out) as view:
            self.read_into(offset, view)
        return out

    @property
    def held_path(self) -> str:
        """A path that opens this very file again, also when another has taken its name; its own path where the
        system has no such thing."""
        held = f"/proc/self/fd/{self._fd}"
        return held if os.path.exists(held) else os.fspath(self.path)

    def drop_cache(self, offset: int, count: int) -> None:
        """See the function of that name."""
        drop_cache(self._fd, offset, count)

    def close(self) -> None:
        """Closes the file; again is nothing. No read may be running."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)


def file_mode(path: Path) -> int:
    """``st_mode`` of what is there; 0 where nothing is.

    Raises:
        ModelNotFoundError: that cannot be found out: the name is too long, or a directory may not be searched.
    """
    try:
        return os.stat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except (OSError, ValueError) as error:
        raise not_found(path, error) from error


def not_found(path: object, error: Exception) -> ModelNotFoundError:
    """Why a path does not lead to a file."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return ModelNotFoundError(f"{path}: cannot be opened: {reason}")


def drop_cache(fd: int, offset: int, count: int) -> None:
    """Asks the system to keep no page of this range of a file in memory. Pages that are not written yet stay, and so
    does everything where the system has no such call."""
    if hasattr(os, "posix_fadvise"):
        begin = offset & -PAGESIZE
        os.posix_fadvise(
            fd, begin, -(-(offset + count) // PAGESIZE) * PAGESIZE - begin, os.POSIX_FADV_DONTNEED
        )
