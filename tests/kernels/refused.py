"""System calls refused as a sandbox would: a seccomp filter that lasts as long as one thread.

    python -m tests.kernels.refused ACTION CALL,... MODULE ARGUMENTS...

runs a module with them refused: with an errno (its number), ``trap``, ``kill-thread`` or ``kill-process``.
"""

from __future__ import annotations

import ctypes
import os
import platform
import runpy
import struct
import sys
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
URING = {"io_uring_setup": 425, "io_uring_enter": 426, "io_uring_register": 427}
NUMBERS = {
    "x86_64": {
        "openat": 257, "pread64": 17, "preadv2": 327, "statx": 332, "getpriority": 140, "setpriority": 141,
        "sched_getattr": 315, "sched_setattr": 314, "sched_setaffinity": 203, "sched_getaffinity": 204,
        "clone": 56, **URING,
    },
    "aarch64": {
        "openat": 56, "pread64": 67, "preadv2": 286, "statx": 291, "getpriority": 141, "setpriority": 140,
        "sched_getattr": 275, "sched_setattr": 274, "sched_setaffinity": 122, "sched_getaffinity": 123,
        "clone": 220, **URING,
    },
}  # fmt: skip
OPTIONAL = (
    "io_uring_setup", "io_uring_enter", "io_uring_register", "preadv2", "statx", "getpriority", "setpriority",
    "sched_getattr", "sched_setattr", "sched_setaffinity",
)  # fmt: skip
"""Calls that pi2rt does without where they are refused."""
LOAD, JUMP_IF_EQUAL, JUMP_IF_SET, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000
ACTIONS = {"trap": 0x00030000, "kill-thread": 0, "kill-process": 0x80000000}
SET_SECCOMP, FILTER, SET_NO_NEW_PRIVS = 22, 2, 38


@dataclass(frozen=True, slots=True)
class Refusal:
    """``call`` gives ``error``, or does what ``ACTIONS`` has for it; where ``bits`` are given, only if one of them is
    set in its argument ``argument``."""

    call: str
    error: int | str
    argument: int = 0
    bits: int = 0


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_char_p))


def refuse(*refusals: Refusal) -> None:
    """From now on, in this thread and those that it starts. Skips the test where it cannot be done."""
    numbers = NUMBERS.get(platform.machine())
    if numbers is None:
        pytest.skip(f"numbers of system calls on {platform.machine()} are not known here")
    code = []
    for refusal in refusals:
        code.append((LOAD, 0, 0, 0))
        code.append((JUMP_IF_EQUAL, 0, 3 if refusal.bits else 1, numbers[refusal.call]))
        if refusal.bits:
            code.append((LOAD, 0, 0, 16 + 8 * refusal.argument))
            code.append((JUMP_IF_SET, 0, 1, refusal.bits))
        action = ACTIONS[refusal.error] if isinstance(refusal.error, str) else REFUSE | refusal.error
        code.append((RETURN, 0, 0, action))
    code.append((RETURN, 0, 0, ALLOW))
    packed = b"".join(struct.pack("=HBBI", *instruction) for instruction in code)
    libc = ctypes.CDLL(None, use_errno=True)
    program = _Program(len(code), packed)
    if libc.prctl(SET_NO_NEW_PRIVS, 1, 0, 0, 0) or libc.prctl(
        SET_SECCOMP, FILTER, ctypes.byref(program), 0, 0
    ):
        pytest.skip(f"no filters of system calls here: {os.strerror(ctypes.get_errno())}")


def in_thread(body: Callable[[], None]) -> None:
    """Runs ``body`` in a thread of its own; what it raises is raised here."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            body()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def command(action: str, calls: Iterable[str], *module: str) -> list[str]:
    """The command line that runs a module, and its arguments, with these calls refused. The checkout is looked at
    last: what is installed is tested."""
    start = f"import sys, runpy; sys.path.append({os.fspath(ROOT)!r}); "
    start += "runpy.run_module('tests.kernels.refused', run_name='__main__')"
    return [sys.executable, "-P", "-c", start, action, ",".join(calls), *module]


if __name__ == "__main__":
    action, calls, module = sys.argv[1:4]
    del sys.argv[1:4]
    sys.argv[0] = module
    refuse(*(Refusal(call, action if action in ACTIONS else int(action)) for call in calls.split(",")))
    runpy.run_module(module, run_name="__main__")
