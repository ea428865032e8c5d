"""Limits of the operating system, imposed for real: each is called by its own name, with its value and what to do."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from pi2rt._errors import SystemLimitError
from pi2rt.host.limits import explained, system_failure, uring_failure
from tests.support.limited import run_limited
from tests.support.tiny_models import TinyModel, write_gguf

COMMAND = """
from pi2rt.cli.main import main
arguments = ["run", sys.argv[1], "-p", "hi", "-n", "2", "--raw", "--context", "30000", "--threads", "2"]
assert main(arguments) == 0  # everything is imported
print("limited", file=sys.stderr)
"""
AGAIN = "\nsys.exit(main(arguments))"


@pytest.fixture(scope="module")
def model() -> Iterator[Path]:
    """Where any user may read it."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield write_gguf(folder / "tiny.gguf", TinyModel(context=30_000))
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    ("limit", "doing", "problem"),
    [
        (
            "limit_files(0)",
            "opening |a system call",
            r"this process may have \d+ open files at most \(RLIMIT_NOFILE; .*'ulimit -n'",
        ),
        (
            "limit_files(6)",
            "starting 2 compute threads",
            r"this process may have \d+ open files at most \(RLIMIT_NOFILE",
        ),
        (
            "limit_threads()",
            "starting (2 compute threads|a thread)",  # the second where those of the first run have ended
            r"no more threads: this user may have \d+ processes and threads at most \(RLIMIT_NPROC; .*'ulimit -u'",
        ),
        (
            "limit_address_space(8 << 20)",
            "memory for weights, keys and values or buffers",
            r"no memory for [\d.]+ MiB: the address space of this process may have [\d.]+ MiB \(RLIMIT_AS\).* -v'",
        ),
    ],
)
def test_a_limit_has_its_name(model: Path, limit: str, doing: str, problem: str) -> None:
    done = run_limited(f"{COMMAND}{limit}{AGAIN}", model)
    before, _, errors = done.stderr.partition("limited\n")
    assert before, done.stderr
    assert done.returncode == 1, errors
    assert errors.count("\n") == 1
    import re

    assert re.match(rf"pi2rt: error: ({doing}).*: {problem}", errors), errors


@pytest.mark.parametrize("call", ["io_uring_setup", "io_uring_enter"])
@pytest.mark.parametrize("error", ["EPERM", "ENOSYS"])
def test_a_refused_io_uring_is_not_a_file_that_cannot_be_opened(model: Path, call: str, error: str) -> None:
    program = f"""
from pi2rt import RequestError
from pi2rt.cython_kernels.flash.reader import Reader
refuse({call!r}, errno.{error})
print(Reader(sys.argv[1]).statistics().io)
try:
    Reader(sys.argv[1], io="uring")
except RequestError as refused:
    print(refused)
"""
    done = run_limited(program, model)
    assert done.returncode == 0, done.stderr
    io, message = done.stdout.splitlines()
    assert io == "preadv"
    assert message.startswith("io='uring': io_uring: not ")
    assert f"({error}): a seccomp filter applies to this process" in message
    assert message.endswith("; take io='preadv' or 'auto'")
    assert str(model) not in message


def test_a_file_that_cannot_be_opened_is_one_with_io_uring_too(tmp_path: Path) -> None:
    from pi2rt.cython_kernels.flash.reader import Reader

    for io in ("uring", "preadv", "auto"):
        with pytest.raises(FileNotFoundError, match="nothing"):
            Reader(tmp_path / "nothing", io=io)


def test_all_threads_that_are_refused_are_told(model: Path) -> None:
    """Python's own threads too, which a command needs before any other."""
    program = """
import trio
import pi2rt.planner.pack.convert, pi2rt.cli._console
from pi2rt.cli.main import main
trio.run(trio.sleep, 0)  # so is all that it imports, which a stranger may not read
limit_threads()
sys.exit(main(["verify", sys.argv[1]]))
"""
    done = run_limited(program, model)
    assert done.returncode == 1
    assert "pi2rt: error: starting a thread: no more threads: this user may have " in done.stderr


@pytest.mark.parametrize("idle", range(4))
def test_programs_are_told_too(model: Path, idle: int) -> None:
    """Whichever thread is the first one too many: ``idle`` of Trio's worker threads are there and wait for work."""
    program = (
        f"idle = {idle}"
        + """
import threading
import pi2rt, trio

async def opened():
    async with pi2rt.open_runtime(sys.argv[1]):
        pass

with pi2rt.Engine(sys.argv[1]):
    pass
trio.run(opened)

async def workers():
    together = threading.Barrier(idle)
    async with trio.open_nursery() as nursery:
        for _ in range(idle):
            nursery.start_soon(trio.to_thread.run_sync, together.wait)

if idle:
    trio.run(workers)
limit_threads()
for what in (lambda: trio.run(opened), lambda: pi2rt.Engine(sys.argv[1])):
    try:
        what()
    except pi2rt.SystemLimitError as error:
        print(error)
"""
    )
    done = run_limited(program, model)
    lines = done.stdout.splitlines()
    assert len(lines) == 2, done.stderr
    assert all("no more threads: this user may have " in line for line in lines)


def test_a_long_prompt_that_gets_no_thread(model: Path) -> None:
    program = """
import threading
import pi2rt, trio, trio.testing

LONG = "a" * 3000

async def main():
    go_on = threading.Event()
    async with pi2rt.open_runtime(sys.argv[1], max_sequences=1, max_queue=0) as runtime:
        await runtime.generate(LONG, max_tokens=1)
        async with trio.open_nursery() as nursery:
            for _ in range(10):  # all idle threads, and some more
                nursery.start_soon(trio.to_thread.run_sync, go_on.wait)
            await trio.testing.wait_all_tasks_blocked()
            limit_threads()
            for _ in range(2):  # the first one has given its place back
                try:
                    await runtime.generate(LONG, max_tokens=1)
                except pi2rt.SystemLimitError as error:
                    print(error)
            go_on.set()
        print((await runtime.generate(LONG, max_tokens=1)).finish_reason)

trio.run(main)
"""
    done = run_limited(program, model)
    lines = done.stdout.splitlines()
    assert len(lines) == 3, done.stderr
    assert all(line.startswith("starting a thread: no more threads: ") for line in lines[:2])
    assert lines[2] == "length"


def test_an_engine_is_closed_without_another_thread(model: Path) -> None:
    program = """
import threading
import pi2rt, trio, trio.testing

def native_threads():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sum(name.startswith("pi2rt/") for name in names)

async def main():
    go_on = threading.Event()
    async with trio.open_nursery() as nursery:
        async with pi2rt.open_runtime(sys.argv[1], threads=2) as runtime:
            await runtime.generate([1, 2, 3], max_tokens=1)
            for _ in range(10):  # all idle threads, and some more
                nursery.start_soon(trio.to_thread.run_sync, go_on.wait)
            await trio.testing.wait_all_tasks_blocked()
            print(native_threads())
            limit_threads()
        go_on.set()
    print(native_threads())

trio.run(main)
"""
    done = run_limited(program, model)
    assert done.stdout.split() == ["2", "0"], done.stderr


def test_files_of_a_model_are_no_missing_files(model: Path) -> None:
    program = """
from pi2rt.formats import open_model_file
open_model_file(sys.argv[1]).close()
limit_files(0)
open_model_file(sys.argv[1])
"""
    done = run_limited(program, model)
    assert f"SystemLimitError: opening {model}: this process may have " in done.stderr


def test_what_an_errno_stands_for() -> None:
    for error, name in (
        (errno.EMFILE, "RLIMIT_NOFILE"),
        (errno.ENFILE, "fs.file-max"),
        (errno.EAGAIN, "no more threads"),
        (errno.ENOMEM, "no memory for 1.0 MiB"),
    ):
        failure = system_failure("doing it", error, 1 << 20)
        assert isinstance(failure, SystemLimitError)
        assert str(failure).startswith("doing it: ")
        assert name in str(failure)
    assert system_failure("doing it", errno.EACCES) is None


def test_what_an_exception_of_pythons_stands_for() -> None:
    for error, name in (
        (RuntimeError("can't start new thread"), "starting a thread: no more threads"),
        (MemoryError(), "allocating memory: no memory"),
        (OSError(errno.EMFILE, "Too many open files", "a.gguf"), "opening a.gguf: this process may have"),
        (OSError(errno.ENFILE, "Too many open files in system"), "a system call: the whole system"),
        (
            ImportError(f"x.so: cannot open shared object file: {os.strerror(errno.EMFILE)}", name="x"),
            "importing x: this process may have",
        ),
    ):
        assert str(explained(error)).startswith(name)
    for other in (RuntimeError("no"), OSError(errno.ENOENT, "x"), ImportError("no module"), ValueError()):
        assert explained(other) is None


def test_io_uring_that_fails_for_another_reason() -> None:
    failure = uring_failure(errno.EMFILE, "io_uring: cannot be set up (EMFILE)")
    assert str(failure) == "io='uring': io_uring: cannot be set up (EMFILE); take io='preadv' or 'auto'"
