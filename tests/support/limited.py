"""What the operating system refuses, for real: in a process of its own, imposed once everything is imported."""

from __future__ import annotations

import ctypes
import errno
import os
import platform
import resource
import struct
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
STRANGER = 54321
"""A user whom nobody knows, and who has no processes."""

SYSTEM_CALLS = {
    "io_uring_setup": 425,
    "io_uring_enter": 426,
    "flock": {"x86_64": 73, "aarch64": 32}.get(platform.machine(), -1),
}

_LOAD, _EQUAL, _RETURN = (
    0x20,
    0x15,
    0x06,
)  # BPF: of the number of the call; to the next but one where it differs
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000
_NO_NEW_PRIVS, _SECCOMP = 38, 22


def run_limited(program: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a program, with its ``arguments`` in ``sys.argv[1:]``, that imposes limits on itself by the functions below.
    Skips the test, with the reason, where the system does not permit that."""
    start = f"import sys; sys.path.append({str(ROOT)!r})"  # the checkout last: what is installed is tested
    done = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            f"{start}\nfrom tests.support.limited import *\n{program}",
            *map(str, arguments),
        ],
        capture_output=True,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        timeout=120,
        check=False,
    )
    if done.returncode == 77:
        pytest.skip(done.stderr.strip())
    return done


def refuse(call: str, error: int) -> None:
    """From now on this system call fails with this errno (seccomp)."""
    if SYSTEM_CALLS[call] < 0:
        _not_permitted(f"the number of {call} on {platform.machine()} is not known")
    steps = (
        (_LOAD, 0, 0, 0),
        (_EQUAL, 0, 1, SYSTEM_CALLS[call]),
        (_RETURN, 0, 0, _ERRNO | error),
        (_RETURN, 0, 0, _ALLOW),
    )
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    head = struct.pack("HxxxxxxQ", len(steps), ctypes.addressof(program))
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(_SECCOMP, 2, ctypes.c_char_p(head), 0, 0):
        _not_permitted(f"seccomp: {os.strerror(ctypes.get_errno())}")


def limit_files(more: int) -> None:
    """Only so many more files can be opened."""
    free = os.dup(0)
    os.close(free)
    _limit(resource.RLIMIT_NOFILE, free + more)


def limit_threads() -> None:
    """No more threads can be started."""
    if os.geteuid() == 0:  # whom that limit does not concern
        become_stranger()
    _limit(resource.RLIMIT_NPROC, 1)


def limit_address_space(more: int) -> None:
    """Only so many more bytes of addresses can be taken."""
    with open("/proc/self/status") as file:
        size = next(int(line.split()[1]) << 10 for line in file if line.startswith("VmSize:"))
    _limit(resource.RLIMIT_AS, size + more)


def become_stranger() -> None:
    """A user without rights, without a home and without an entry in the password database."""
    if os.geteuid() != 0:
        _not_permitted("only root can become somebody else")
    os.setgroups([])
    os.setresgid(STRANGER, STRANGER, STRANGER)
    os.setresuid(STRANGER, STRANGER, STRANGER)
    for module in ("pi2rt", "numpy"):  # more of them will be imported
        found = find_spec(module)
        if found is None or found.origin is None or not os.access(found.origin, os.R_OK):
            _not_permitted(f"strangers may not read {module}, as installed here")


def _limit(which: int, value: int) -> None:
    most = resource.getrlimit(which)[1]
    resource.setrlimit(which, (value, most))
    if resource.getrlimit(which) != (value, most):  # qemu says yes to some limits of memory, and sets none
        name = next(
            name for name in dir(resource) if name.startswith("RLIMIT") and getattr(resource, name) == which
        )
        _not_permitted(f"{name} is not set when asked for (an emulator of user programs)")


def _not_permitted(why: str) -> None:
    print(why, file=sys.stderr)
    sys.exit(77)


__all__ = [
    "become_stranger",
    "errno",
    "limit_address_space",
    "limit_files",
    "limit_threads",
    "os",
    "refuse",
    "sys",
]
