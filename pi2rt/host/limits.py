"""Which limit of the operating system was met, told from an errno: by its name, its value and what raises it.

An errno alone does not tell: ``pthread_create`` reports EAGAIN for too many threads as well as for a stack that does
not fit into the address space, and ENOMEM may be a limit of the process or a machine that is full. So the limits are
read here and compared with what the process has.
"""

from __future__ import annotations

import errno
import os
import resource
from collections.abc import Iterator
from contextlib import contextmanager

from pi2rt._errors import RequestError, SystemLimitError

_STACK_BYTES = 8 << 20  # of a thread, where no limit says otherwise


def system_failure(doing: str, error: int, nbytes: int = 0) -> SystemLimitError | None:
    """What was refused, and why; None where the errno does not stand for a limit.

    Args:
        doing: what was attempted, such as "starting the compute threads".
        error: EMFILE, ENFILE, EAGAIN (of a new thread) or ENOMEM.
        nbytes: of the memory that was asked for, where that is known.
    """
    if error == errno.EMFILE:
        soft, hard = _limit(resource.RLIMIT_NOFILE)
        return SystemLimitError(
            doing,
            f"this process may have {soft} open files at most (RLIMIT_NOFILE; hard limit {hard}); raise that with "
            f"'ulimit -n', or close some",
        )
    if error == errno.ENFILE:
        return SystemLimitError(
            doing, "the whole system has no more open files (sysctl fs.file-max); close some, or raise that"
        )
    if error == errno.EAGAIN:
        return SystemLimitError(doing, _no_thread())
    if error == errno.ENOMEM:
        asked = f" for {_mib(nbytes)}" if nbytes else ""
        return SystemLimitError(doing, f"no memory{asked}: {_no_memory(nbytes)}")
    return None


def memory_failure(doing: str, nbytes: int = 0) -> SystemLimitError:
    """As ``system_failure`` for ENOMEM."""
    failure = system_failure(doing, errno.ENOMEM, nbytes)
    assert failure is not None
    return failure


def explained(error: BaseException) -> SystemLimitError | None:
    """The same for an exception of Python's own, where it stands for such a limit."""
    text = str(error)
    if isinstance(error, RuntimeError) and text == "can't start new thread":
        return system_failure("starting a thread", errno.EAGAIN)
    if isinstance(error, MemoryError):
        return memory_failure(text or "allocating memory")
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):
        return system_failure(f"opening {error.filename}" if error.filename else "a system call", error.errno)
    if isinstance(error, ImportError) and os.strerror(errno.EMFILE) in text:
        return system_failure(f"importing {error.name}", errno.EMFILE)
    return None


@contextmanager
def limits_explained() -> Iterator[None]:
    """Turns such an exception of Python's own into a SystemLimitError."""
    try:
        yield
    except (RuntimeError, MemoryError, OSError) as error:
        if (limit := explained(error)) is None:
            raise
        raise limit from error


def uring_failure(error: int, why: str) -> RequestError:
    """io_uring was asked for by name, and the system does not give it.

    Args:
        error: an errno of setting it up.
        why: what the probe found, in a sentence.
    """
    cause = why
    if error in (errno.EPERM, errno.EACCES, errno.ENOSYS):
        disabled = _read("/proc/sys/kernel/io_uring_disabled")
        if disabled in ("1", "2"):
            cause += f": sysctl kernel.io_uring_disabled is {disabled}"
        elif _seccomp():
            cause += ": a seccomp filter applies to this process, as containers have it"
    if error == errno.ENOMEM:
        cause += f": RLIMIT_MEMLOCK is {_limit(resource.RLIMIT_MEMLOCK)[0]} ('ulimit -l')"
    return RequestError(f"io='uring': {cause}; take io='preadv' or 'auto'")


def _no_thread() -> str:
    stack = resource.getrlimit(resource.RLIMIT_STACK)[0]
    stack = stack if 0 < stack < 1 << 40 else _STACK_BYTES
    if (space := _over_address_space(stack)) is not None:
        return f"no memory for the stack of a new thread: {space}"
    for path in _pids_directories():
        most, now = _read(f"{path}/pids.max"), _read(f"{path}/pids.current")
        if most.isdigit() and now.isdigit() and int(now) >= int(most):
            return (
                f"no more threads: the cgroup {path} has {now} processes and threads, and its pids.max is {most}; "
                f"raise that, or take fewer threads"
            )
    soft, hard = _limit(resource.RLIMIT_NPROC)
    if soft != "unlimited" and os.geteuid() != 0:
        return (
            f"no more threads: this user may have {soft} processes and threads at most (RLIMIT_NPROC; hard limit "
            f"{hard}); raise that with 'ulimit -u', or take fewer threads"
        )
    return (
        "no more threads: the system refuses them (sysctl kernel.threads-max, kernel.pid_max, or a seccomp filter); "
        "take fewer threads"
    )


def _no_memory(nbytes: int) -> str:
    if (space := _over_address_space(nbytes)) is not None:
        return space
    soft, _ = resource.getrlimit(resource.RLIMIT_DATA)
    if 0 <= soft < 1 << 62 and _status("VmData") + nbytes > soft:
        return f"the data of this process may take {_mib(soft)} at most (RLIMIT_DATA); raise that with 'ulimit -d'"
    return "the system has no more to give (memory, or sysctl vm.overcommit_memory); free some"


def _over_address_space(nbytes: int) -> str | None:
    soft, _ = resource.getrlimit(resource.RLIMIT_AS)
    # A limit that is nearly reached is taken for the cause: what was asked for is not always known.
    if not 0 <= soft < 1 << 62 or _status("VmSize") + max(nbytes, _STACK_BYTES) <= soft:
        return None
    return (
        f"the address space of this process may have {_mib(soft)} (RLIMIT_AS), and it has {_mib(_status('VmSize'))}; "
        f"raise that with 'ulimit -v' ('memory=' and '--memory' limit memory that is used)"
    )


def _limit(which: int) -> tuple[str, str]:
    """Soft and hard, as a shell shows them."""
    soft, hard = resource.getrlimit(which)
    return _shown(soft), _shown(hard)


def _shown(limit: int) -> str:
    return "unlimited" if limit in (resource.RLIM_INFINITY, -1) else str(limit)


def _pids_directories() -> Iterator[str]:
    """Of the cgroup that counts our threads, and those around it; innermost first."""
    for line in _read("/proc/self/cgroup").splitlines():
        number, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if number == "0" and not controllers:
            root = "/sys/fs/cgroup"
        elif "pids" in controllers.split(","):
            root = "/sys/fs/cgroup/pids"
        else:
            continue
        parts = [part for part in path.split("/") if part and part != ".."]
        for count in range(len(parts), -1, -1):
            yield "/".join((root, *parts[:count]))


def _status(name: str) -> int:
    """Bytes of an entry of /proc/self/status; 0 where there is none."""
    for line in _read("/proc/self/status").splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) << 10
    return 0


def _seccomp() -> bool:
    status = _read("/proc/thread-self/status")  # filters are of threads
    return any(line.split() == ["Seccomp:", "2"] for line in status.splitlines())


def _read(path: str) -> str:
    """ "" where it cannot be read, for want of descriptors too."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:  # whose codec is always there
            return file.read().strip()
    except OSError:
        return ""


def _mib(nbytes: int) -> str:
    return f"{nbytes / (1 << 20):.1f} MiB"
