"""System calls refused as a sandbox would: a seccomp filter that lasts as long as one thread."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest

NUMBERS = {
    "x86_64": {"openat": 257, "pread64": 17, "preadv2": 327, "io_uring_setup": 425, "io_uring_enter": 426},
    "aarch64": {"openat": 56, "pread64": 67, "preadv2": 286, "io_uring_setup": 425, "io_uring_enter": 426},
}
LOAD, JUMP_IF_EQUAL, JUMP_IF_SET, RETURN = 0x20, 0x15, 0x45, 0x06
ALLOW, REFUSE = 0x7FFF0000, 0x00050000
SET_SECCOMP, FILTER, SET_NO_NEW_PRIVS = 22, 2, 38


@dataclass(frozen=True, slots=True)
class Refusal:
    """``call`` gives ``error``; where ``bits`` are given, only if one of them is set in its argument ``argument``."""

    call: str
    error: int
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
        code.append((RETURN, 0, 0, REFUSE | refusal.error))
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
