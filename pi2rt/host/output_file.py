"""Every file that pi2rt writes is written through here: whole or not at all where that is possible.

A regular file, or a new one, is written beside its target under another name and renamed when it is complete, so that
there is the old file or the whole new one, whatever happens. Links are followed: they stay, and their target is
replaced. What cannot be replaced (devices, FIFOs, descriptors of this process such as /dev/stdout) is written into,
where the writer can do without seeking; else it is refused. Everything that can be known before the work begins is
checked when an ``OutputFile`` is made.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import itertools
import os
import re
import select
import stat
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Self

from pi2rt._errors import OutputError, RequestError

PATIENCE_S = 10.0
"""A FIFO or terminal that takes nothing for so long is given up: nobody reads it."""

MOST_LINKS = 40
"""As the kernel has it."""

MOST_NAME_BYTES = 255
"""Of one part of a path, on every file system in use."""

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
_numbers = itertools.count()
_DESCRIPTORS = re.compile(r"/proc/(\d+)(?:/task/\d+)?/fd|/dev/fd")


def follow_links(path: str | os.PathLike[str]) -> Path:
    """What a path leads to, through links to files that need not exist. A descriptor of this process
    (/proc/self/fd/1, and what leads there) ends the way: /proc/PID/fd/1.

    Raises:
        OSError: a loop of links.
    """
    at = os.path.join(os.getcwd(), path)  # not normalised: ".." behind a link is not what it seems
    for _ in range(MOST_LINKS):
        folder, name = os.path.split(at)
        at = os.path.join(os.path.realpath(folder), name)
        if _descriptor(at) is not None or not os.path.islink(at):
            return Path(at)
        at = os.path.join(os.path.dirname(at), os.readlink(at))
    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))


def try_lock(fd: int, path: object) -> bool | None:
    """Locks a file until its descriptor is closed. False: another one has it. None, with RuntimeWarning: its file
    system has no locks."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        warnings.warn(
            f"{path}: its file system has no locks ({error.strerror}); two processes that write it at once are not "
            f"kept apart",
            RuntimeWarning,
            stacklevel=2,
        )
        return None


class OutputFile:
    """Where something will be written; then, as a context manager, the writing.

    ``with output as file: file.write(...); file.commit()``. Leaving the block without ``commit`` removes what was
    written. May be entered again, also after a failure.

    Args:
        path: of a file or anything else that can be written to.
        seeks: whether the writer goes back in what it has written, so that only a regular file will do.
        overwrite: whether a file that is there already may be replaced.

    Raises:
        RequestError: it cannot be written to: it is a directory or a socket, its folder is missing or takes no new
            files, it is there already.
        OutputError: another process is writing it.
    """

    def __init__(self, path: str | os.PathLike[str], *, seeks: bool = False, overwrite: bool = True) -> None:
        self._given = os.fspath(path)
        self.path = Path(path)
        self._seeks, self._overwrite = seeks, overwrite
        self._held = self._fd = -1  # of a descriptor that was named; of what is being written
        self._part: Path | None = None  # beside the target, while it is written
        self.target = self._target()
        self.replaces = self._replaces()
        """Whether it is a regular file, or will be: what it was stays until ``commit``."""
        if self.replaces:
            self._open_part()
            self._discard()

    # -- writing

    def __enter__(self) -> Self:
        if self.replaces:
            self.refuse_present()
            self._open_part()
        else:
            self._fd = self._open_other()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._discard()

    @property
    def fd(self) -> int:
        """Of the file that is being written; only with ``seeks``."""
        return self._fd

    def write(self, data: bytes | memoryview) -> None:
        """The next bytes. Blocks.

        Raises:
            OutputError: no space, or nobody reads them.
        """
        rest = memoryview(data).cast("B")
        try:
            while rest.nbytes:
                rest = rest[self._write_some(rest) :]
        except OSError as error:
            raise self.failure(error) from error

    def commit(self) -> None:
        """All is written: gives the file its name, and the mode and, where permitted, the owner of the one before.

        Raises:
            RequestError: another one has appeared there meanwhile, which may not be replaced.
            OutputError: it cannot be done.
        """
        if not self.replaces:
            return
        assert self._part is not None
        try:
            self._keep_owner()
            os.fsync(self._fd)
            self.refuse_present()
            os.replace(self._part, self.target)
            self._part = None
            sync_directory(self.target.parent)
        except OSError as error:
            raise self.failure(error) from error

    def close(self) -> None:
        """Gives up the descriptor, where one was named as the path. Again is nothing."""
        held, self._held = self._held, -1
        if held >= 0:
            os.close(held)

    def __del__(self) -> None:
        if getattr(self, "_held", -1) >= 0:
            self.close()

    def refuse_present(self) -> None:
        """Raises RequestError where a file is there already, and may not be replaced."""
        if not self._overwrite and os.path.lexists(self.target):
            raise RequestError(
                f"{self.path} is there already; remove it, or ask for it to be overwritten (--force)"
            )

    def free_bytes(self) -> int:
        """Free where a regular file will be."""
        status = os.statvfs(self.target.parent)
        return status.f_bavail * status.f_frsize

    def failure(self, error: OSError) -> OutputError:
        """An error of writing, which names the path and what to do."""
        problem = error.strerror or str(error)
        if error.errno in FULL and self.replaces:
            problem += "; free some, or choose another place"
        return OutputError(self.path, problem)

    # -- what the path is

    def _target(self) -> Path:
        if self._given.endswith(os.sep) and not os.path.isdir(self._given):
            raise RequestError(f"{self._given}: cannot be written: there is no such folder")
        if "\0" in self._given:
            raise RequestError(f"{self._given!r}: a path cannot have a NUL in it")
        try:
            return follow_links(self._given)
        except OSError as error:
            raise self._refusal(error) from error

    def _replaces(self) -> bool:
        named = _descriptor(os.fspath(self.target))
        if named is not None:
            self._hold(named)
            return False
        try:
            mode = os.stat(self.target).st_mode
        except FileNotFoundError:
            self._check_folder()
            return True
        except OSError as error:
            raise self._refusal(error) from error
        if stat.S_ISREG(mode):
            self.refuse_present()
            self._check_folder()
            self._check_sticky()
            return True
        if stat.S_ISDIR(mode):
            raise RequestError(f"{self.path}: cannot be written: it is a directory; name a file in it")
        kind = "a socket" if stat.S_ISSOCK(mode) else "a FIFO" if stat.S_ISFIFO(mode) else "a device"
        if stat.S_ISSOCK(mode) or self._seeks:
            raise RequestError(
                f"{self.path}: cannot be written: it is there already, and is {kind}, not a file; choose another name"
            )
        if not os.access(self.target, os.W_OK):
            raise RequestError(f"{self.path}: cannot be written: {os.strerror(errno.EACCES)}")
        return False

    def _hold(self, named: int) -> None:
        """A descriptor of this process: a duplicate stays as it is whatever happens to its number."""
        if self._seeks:
            raise RequestError(
                f"{self.path}: cannot be written: it is a descriptor of this process, and this takes a file; choose "
                f"another name"
            )
        try:
            if fcntl.fcntl(named, fcntl.F_GETFL) & os.O_ACCMODE == os.O_RDONLY:
                raise RequestError(f"{self.path}: cannot be written: descriptor {named} is open for reading")
            self._held = fcntl.fcntl(named, fcntl.F_DUPFD_CLOEXEC, 3)
        except OSError as error:
            raise RequestError(
                f"{self.path}: cannot be written: there is no open descriptor {named}"
            ) from error

    def _check_folder(self) -> None:
        if not os.path.isdir(self.target.parent):
            raise RequestError(f"{self.path}: cannot be written: its folder does not exist")
        longest = len(os.fsencode(self.target.name)) + len("..part") + len(str(os.getpid())) + 1
        if longest > MOST_NAME_BYTES:
            raise RequestError(f"{self.path}: cannot be written: its name is too long")

    def _check_sticky(self) -> None:
        """In a sticky folder, only the owners of the file and of the folder may replace a file."""
        folder, user = os.stat(self.target.parent), os.geteuid()
        owners = (0, folder.st_uid, os.stat(self.target).st_uid)
        if folder.st_mode & stat.S_ISVTX and user not in owners:
            raise RequestError(
                f"{self.path}: cannot be written: it belongs to another user, and in a sticky folder it cannot be "
                f"replaced; choose another name"
            )

    def _refusal(self, error: OSError) -> RequestError:
        return RequestError(f"{self.path}: cannot be written: {error.strerror or error}")

    # -- the part

    def _open_part(self) -> None:
        """Beside the target. What seeks is large and takes long: its part has one name and is locked, so that what an
        interrupted run left behind is taken over. Else, and where the file system has no locks, the name is unique."""
        unique = not self._seeks
        while True:
            number = f"{os.getpid()}-{next(_numbers)}." if unique else ""
            part = self.target.with_name(f".{self.target.name}.{number}part")
            flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | (os.O_EXCL if unique else 0)
            try:
                fd = os.open(part, flags, 0o666)
            except FileExistsError:
                continue  # of a process that had our number before
            except OSError as error:
                raise self._folder_refusal(error) from error
            locked: bool | None = None
            try:
                locked = True if unique else try_lock(fd, self.path)
                if locked and os.path.samestat(os.fstat(fd), os.lstat(part)):
                    os.ftruncate(fd, 0)
                    self._fd, self._part = fd, part
                    return
                if locked is None:
                    part.unlink(missing_ok=True)
                    unique = True
            except FileNotFoundError:
                pass  # whoever had it has finished or given up since
            except BaseException:
                os.close(fd)
                raise
            os.close(fd)
            if locked is False:
                raise OutputError(self.path, "another process is writing it")

    def _folder_refusal(self, error: OSError) -> RequestError:
        problem = error.strerror
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            problem = f"{problem}: no file can be made in {self.target.parent}; choose another folder"
        return RequestError(f"{self.path}: cannot be written: {problem}")

    def _keep_owner(self) -> None:
        try:
            before = os.stat(self.target)
        except FileNotFoundError:
            return
        now = os.fstat(self._fd)
        if (before.st_uid, before.st_gid) != (now.st_uid, now.st_gid):
            try:
                os.fchown(self._fd, before.st_uid, before.st_gid)
            except PermissionError:
                with contextlib.suppress(PermissionError):  # the group alone may be one of ours
                    os.fchown(self._fd, -1, before.st_gid)
        os.fchmod(self._fd, stat.S_IMODE(before.st_mode) & 0o777)

    def _discard(self) -> None:
        part, self._part = self._part, None
        fd, self._fd = self._fd, -1
        if part is not None:
            part.unlink(missing_ok=True)
        if fd >= 0:
            os.close(fd)

    # -- what is written into

    def _open_other(self) -> int:
        if self._held >= 0:
            return fcntl.fcntl(self._held, fcntl.F_DUPFD_CLOEXEC, 3)
        until = time.monotonic() + PATIENCE_S
        while True:
            try:
                # Not blocking: a FIFO that nobody reads must not hold us up.
                return os.open(self.target, os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
            except OSError as error:
                if error.errno != errno.ENXIO or time.monotonic() >= until:
                    if error.errno == errno.ENXIO:
                        raise OutputError(self.path, "nobody reads it") from error
                    raise self.failure(error) from error
            time.sleep(0.05)

    def _write_some(self, data: memoryview) -> int:
        """Bytes written. A descriptor that is shared with others keeps its mode (no O_NONBLOCK): where poll says that a
        pipe takes something, it takes PIPE_BUF bytes at once."""
        if self.replaces:
            return os.write(self._fd, data)
        poll = select.poll()
        poll.register(self._fd, select.POLLOUT)
        if not poll.poll(PATIENCE_S * 1000):
            raise OutputError(self.path, f"nobody has read from it for {PATIENCE_S:g} s")
        try:
            return os.write(self._fd, data if self._held < 0 else data[: select.PIPE_BUF])
        except BlockingIOError:
            return 0


def _descriptor(path: str) -> int | None:
    """The number, of a path like /proc/PID/fd/1 of this process or /dev/fd/1."""
    folder, name = os.path.split(path)
    match = _DESCRIPTORS.fullmatch(folder)
    if match is None or not name.isdecimal() or match[1] not in (None, str(os.getpid())):
        return None
    return int(name)


def sync_directory(path: Path) -> None:
    """Makes what was renamed there durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
