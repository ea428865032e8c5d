"""A disk that hangs, fails and comes short when a test says so: a FUSE file system with one file, served by a process
of its own, so that the system ends what hangs when that process ends, whatever became of the tests.

It is mounted where only that process and its children see it, and found through ``/proc``; where the system permits
neither that nor FUSE, ``FaultyDisk`` skips the test.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import struct
import subprocess
import sys
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest

NAME = "disk.pi2"
LOOKUP, FORGET, GETATTR, OPEN, READ, RELEASE, FLUSH, INIT, INTERRUPT, BATCH_FORGET = (
    1, 2, 3, 14, 15, 18, 25, 26, 36, 42,
)  # fmt: skip
NEW_USER, NEW_MOUNTS, PRIVATE, RECURSIVE = 0x10000000, 0x20000, 1 << 18, 1 << 14
FOR_EVER = 1 << 32
DIRECT = getattr(os, "O_DIRECT", 0)


class FaultyDisk:
    """``path`` shows what ``source`` holds. Faults concern reads past the page cache (O_DIRECT) alone, but for
    ``hang_wholly``: so a model can be opened from it, and its weights loaded."""

    def __init__(self, source: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-P", __file__, source], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self._waiting = 0
        answer = self._answer()
        if not answer.startswith("/"):
            self.close()
            pytest.skip(f"no FUSE file system here: {answer}")
        self.path = Path(f"/proc/{self._process.pid}/root{answer}/{NAME}")

    def hang(self, first: int = 0, last: int = FOR_EVER) -> None:
        """Reads that overlap bytes ``first`` to ``last`` get no answer until ``work``."""
        self._tell("hang", first, last)

    def hang_wholly(self) -> None:
        """No read gets an answer until ``work``, through the page cache neither."""
        self._tell("hang_wholly", 0, FOR_EVER)

    def fail(self, error: int) -> None:
        """Reads fail with this errno: the disk is unplugged."""
        self._tell("fail", error)

    def damage(self, first: int, last: int) -> None:
        """Reads that overlap bytes ``first`` to ``last`` fail: sectors are broken."""
        self._tell("damage", first, last)

    def come_short(self) -> None:
        """Of more than one block, reads get the first half."""
        self._tell("short")

    def work(self) -> None:
        """From now on as a disk should; what hung is answered."""
        self._tell("work")

    def hanging(self) -> int:
        """Reads that have got no answer."""
        return int(self._tell("hanging"))

    def hanging_bytes(self) -> int:
        """Of these."""
        return int(self._tell("hanging_bytes"))

    def close(self) -> None:
        """Also answers what hangs: with an error."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _tell(self, *words: object) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(" ".join(map(str, words)) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()


# -- the process that serves it


def mount() -> tuple[int, str]:
    """(descriptor that requests come from, folder)"""
    libc = ctypes.CDLL(None, use_errno=True)

    def check(result: int, what: str) -> None:
        if result:
            raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")

    requests = os.open("/dev/fuse", os.O_RDWR)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_MOUNTS):
        check(libc.unshare(NEW_USER | NEW_MOUNTS), "unshare")
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"{user} {user} 1")
        Path("/proc/self/gid_map").write_text(f"{group} {group} 1")
    check(libc.mount(None, b"/", None, PRIVATE | RECURSIVE, None), "mount")
    folder = "/mnt"
    options = f"fd={requests},rootmode=40000,user_id={user},group_id={group}"
    check(libc.mount(b"faulty", folder.encode(), b"fuse", 6, options.encode()), "mount of FUSE")
    return requests, folder


class Server:
    def __init__(self, requests: int, source: int) -> None:
        self.requests, self.source = requests, source
        self.size = os.fstat(source).st_size
        self.mode: tuple[str, int, int] = ("work", 0, 0)
        self.hanging: list[tuple[int, int, int]] = []  # (number of the request, offset, size)

    def serve(self) -> None:
        commands = ""
        while True:
            ready, _, _ = select.select([self.requests, 0], [], [])
            if 0 in ready:
                more = os.read(0, 4096).decode()
                if not more:
                    return
                *lines, commands = (commands + more).split("\n")
                for line in lines:
                    print(self.command(line.split()), flush=True)
            if self.requests in ready:
                try:
                    request = os.read(self.requests, 1 << 20)
                except OSError as error:  # interrupted meanwhile
                    if error.errno not in (errno.ENOENT, errno.EINTR, errno.EAGAIN):
                        raise
                else:
                    self.answer(request)

    def command(self, words: list[str]) -> str:
        if words[0] == "hanging":
            return str(len(self.hanging))
        if words[0] == "hanging_bytes":
            return str(sum(size for _, _, size in self.hanging))
        first, last = (*map(int, words[1:]), 0, 0)[:2]
        self.mode = (words[0], first, last)
        if words[0] == "work":
            hung, self.hanging = self.hanging, []
            for number, offset, size in hung:
                self.send(number, os.pread(self.source, size, offset))
        return "ok"

    def send(self, number: int, body: bytes = b"", error: int = 0) -> None:
        try:
            os.write(self.requests, struct.pack("<IiQ", 16 + len(body), -error, number) + body)
        except OSError as failure:  # nobody waits for it any more
            if failure.errno != errno.ENOENT:
                raise

    def attributes(self, node: int) -> bytes:
        size, mode = (self.size, 0o100444) if node == 2 else (0, 0o40555)
        times, owner = (0,) * 6, (os.getuid(), os.getgid())
        return struct.pack(
            "<6Q10I", node, size, size // 512, *times[:3], *times[3:], mode, 1, *owner, 0, 4096, 0
        )

    def answer(self, request: bytes) -> None:
        operation, number, node = struct.unpack_from("<IQQ", request, 4)
        body = request[40:]
        if operation == INIT:
            self.send(
                number, struct.pack("<4I2H2I2H8I", 7, 31, 0, 1 << 22, 64, 64, 4096, 1, 256, 0, *(0,) * 8)
            )
        elif operation == LOOKUP and body.rstrip(b"\0") == NAME.encode():
            self.send(number, struct.pack("<4Q2I", 2, 0, 1 << 30, 1 << 30, 0, 0) + self.attributes(2))
        elif operation == LOOKUP:
            self.send(number, error=errno.ENOENT)
        elif operation == GETATTR:
            self.send(number, struct.pack("<QII", 1 << 30, 0, 0) + self.attributes(node))
        elif operation == OPEN:
            self.send(number, struct.pack("<QII", 1, 1, 0))  # no page cache, or FUSE asks for the rest itself
        elif operation == READ:
            self.read(number, body)
        elif operation in (RELEASE, FLUSH):
            self.send(number)
        elif operation not in (FORGET, BATCH_FORGET, INTERRUPT):
            self.send(number, error=errno.ENOSYS)

    def read(self, number: int, body: bytes) -> None:
        offset, size = struct.unpack_from("<QI", body, 8)
        flags = struct.unpack_from("<I", body, 32)[0]
        mode, first, last = self.mode if flags & DIRECT or self.mode[0] == "hang_wholly" else ("work", 0, 0)
        if mode.startswith("hang") and offset < last and offset + size > first:
            self.hanging.append((number, offset, size))
        elif mode == "damage" and offset < last and offset + size > first:
            self.send(number, error=errno.EIO)
        elif mode == "fail":
            self.send(number, error=first)
        else:
            if mode == "short" and size > 4096:
                size = size // 2 // 4096 * 4096
            self.send(number, os.pread(self.source, size, offset))


def main() -> None:
    source = os.open(sys.argv[1], os.O_RDONLY)
    try:
        requests, folder = mount()
    except OSError as error:
        print(error, flush=True)
        return
    print(folder, flush=True)
    Server(requests, source).serve()


if __name__ == "__main__":
    main()
