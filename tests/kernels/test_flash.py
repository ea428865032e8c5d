"""The flash reader against real files, through both backends."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pi2rt._errors import BusyError, RequestError
from pi2rt.cython_kernels.flash import reader as flash
from pi2rt.cython_kernels.flash.files import probe
from pi2rt.cython_kernels.flash.reader import EOF, SECTOR, Io, Reader
from tests.kernels.refused import Refusal, in_thread, refuse
from tests.support.native_threads import settles_at

Bytes = npt.NDArray[np.uint8]
SIZE = (3 << 20) + 1234  # the last block is not whole
UNMAPPED = SECTOR  # an address that no process may map: reading it in /proc/self/mem fails


def aligned(size: int, fill: int = 0) -> Bytes:
    memory = np.full(size + SECTOR, fill, np.uint8)
    start = -memory.ctypes.data % SECTOR
    return memory[start : start + size]


@pytest.fixture(scope="module")
def content() -> bytes:
    return np.random.default_rng(7).bytes(SIZE)


@pytest.fixture(scope="module")
def path(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("flash") / "weights"
    path.write_bytes(content)
    return path


@pytest.fixture
def own(content: bytes, tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(content)
    return path


def without_uring(path: Path) -> str:
    """Why this file is not read through io_uring; "" where it is."""
    with Reader(path) as reader:
        statistics = reader.statistics()
    return "" if statistics.io == "uring" else statistics.io_reason


@pytest.fixture(params=["uring", "preadv"], scope="module")
def io(request: pytest.FixtureRequest, path: Path) -> Io:
    if request.param == "uring" and (why := without_uring(path)):
        pytest.skip(why)
    return "uring" if request.param == "uring" else "preadv"


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """Neither a thread nor a descriptor outlives its reader."""
    gc.collect()
    before = sorted(os.listdir("/proc/self/fd"))
    yield
    assert settles_at("pi2rt/io", 0)
    assert sorted(os.listdir("/proc/self/fd")) == before


# -- bytes


@settings(max_examples=150, deadline=None)
@given(offset=st.integers(0, SIZE - 1), data=st.data(), depth=st.sampled_from([1, 2, 64]))
def test_any_bytes(path: Path, content: bytes, io: Io, offset: int, data: st.DataObject, depth: int) -> None:
    size = data.draw(st.integers(0, SIZE - offset))
    with Reader(path, io, depth) as reader:
        assert reader.read(offset, size) == content[offset : offset + size]


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), depth=st.integers(1, 64), register=st.booleans())
def test_many_reads(path: Path, content: bytes, io: Io, seed: int, depth: int, register: bool) -> None:
    rng = random.Random(seed)
    reads = []
    for _ in range(rng.randrange(200)):
        first = rng.randrange(SIZE // SECTOR)
        reads.append((first * SECTOR, rng.randint(1, min(8, SIZE // SECTOR - first)) * SECTOR))
    into = aligned(200 * 8 * SECTOR, 0xFF)
    with Reader(path, io, depth) as reader:
        if register and io == "uring":
            reader.register(into)
        assert reader.read_many(reads, into) == (0,) * len(reads)
        statistics = reader.statistics()
    wanted = b"".join(content[offset : offset + size] for offset, size in reads)
    assert into[: len(wanted)].tobytes() == wanted
    assert (into[len(wanted) :] == 0xFF).all()
    assert (statistics.reads, statistics.bytes, statistics.errors) == (len(reads), len(wanted), 0)
    assert sum(statistics.latencies) == len(reads)
    assert 0 <= statistics.mean_latency_ns <= statistics.latency_ns


@pytest.mark.parametrize("depth", [1, 3, 16, 64])
def test_thousands_of_reads(path: Path, content: bytes, io: Io, depth: int) -> None:
    rng = random.Random(depth)
    buffers = [aligned(2 * SECTOR) for _ in range(depth)]
    spare, where = list(range(depth)), [0] * depth
    left = in_flight = 2000
    in_flight = 0
    with Reader(path, io, depth) as reader:
        while left or in_flight:
            while left and spare:
                slot = spare.pop()
                where[slot] = rng.randrange(SIZE // SECTOR - 1) * SECTOR
                reader.submit(where[slot], buffers[slot], slot)
                left, in_flight = left - 1, in_flight + 1
            finished = reader.reap(rng.randint(1, depth))
            assert finished
            for slot, error, got in finished:
                assert (error, got) == (0, 2 * SECTOR)
                assert buffers[slot].tobytes() == content[where[slot] : where[slot] + 2 * SECTOR]
                spare.append(slot)
                in_flight -= 1
        assert reader.statistics().reads == 2000


def test_reads_around_registered_memory(path: Path, content: bytes, io: Io) -> None:
    memory = aligned(8 * SECTOR)
    with Reader(path, io) as reader:
        for wrong in (memory[1:], memory[: SECTOR + 1], memory[:0]):
            with pytest.raises(OSError, match="registering") as caught:
                reader.register(wrong)
            assert caught.value.errno == errno.EINVAL
        if io == "preadv":
            with pytest.raises(OSError, match="registering 16384 bytes") as caught:
                reader.register(memory[2 * SECTOR : 6 * SECTOR])
            assert caught.value.errno == errno.EOPNOTSUPP
        else:
            reader.register(memory[2 * SECTOR : 6 * SECTOR])
            with pytest.raises(OSError, match="registering") as caught:
                reader.register(memory)
            assert caught.value.errno == errno.EBUSY
            assert reader.statistics().registered_bytes == 4 * SECTOR
        for begin in range(8):  # before, over its beginning, inside, over its end, behind
            for end in range(begin + 1, 9):
                part = memory[begin * SECTOR : end * SECTOR]
                part[:] = 0
                assert reader.read_many([(begin * SECTOR, len(part))], part) == (0,)
                assert part.tobytes() == content[begin * SECTOR : end * SECTOR]


# -- files that end, change, fail


def test_end_of_file(path: Path, content: bytes, io: Io) -> None:
    last = SIZE // SECTOR * SECTOR
    into = aligned(4 * SECTOR, 0xFF)
    with Reader(path, io) as reader:
        assert reader.read(SIZE - 1, 1) == content[-1:]
        with pytest.raises(EOFError, match=f"2 bytes at {SIZE - 1}: the file ends at {SIZE}"):
            reader.read(SIZE - 1, 2)
        reader.submit(last, into[:SECTOR], "over the end")
        assert reader.reap() == [("over the end", EOF, SIZE - last)]
        assert into[: SIZE - last].tobytes() == content[last:]
        reader.submit(last - 2 * SECTOR, into, "more of it")
        assert reader.reap() == [("more of it", EOF, SIZE - last + 2 * SECTOR)]
        assert into[: SIZE - last + 2 * SECTOR].tobytes() == content[last - 2 * SECTOR :]
        for far in (last + SECTOR, 1 << 40, 2**63 - 4 * SECTOR):
            reader.submit(far, into[:SECTOR], "behind")
            # EINVAL: beyond what the file system can address
            assert reader.reap()[0][1] in (EOF, errno.EINVAL)
        statistics = reader.statistics()
        assert statistics.file_bytes == SIZE
        assert (statistics.reads, statistics.errors) == (
            7,
            7,
        )  # the helper's, of whole blocks, are two of them
        assert statistics.short_reads >= 4
    empty = path.with_name("empty")
    empty.touch()
    with Reader(empty, io) as reader:
        assert reader.read(0, 0) == b""
        with pytest.raises(EOFError, match="the file ends at 0"):
            reader.read(0, 1)


def test_file_truncated_while_reads_are_queued(own: Path, content: bytes, io: Io) -> None:
    whole = 64 * SECTOR
    buffers = [aligned(whole) for _ in range(11)]
    with Reader(own, io, 16) as reader:
        for i, into in enumerate(buffers):
            reader.submit(i * whole, into, i)
        os.truncate(own, whole)
        results: dict[int, tuple[int, int]] = {}
        while len(results) < len(buffers):
            results.update({tag: (error, got) for tag, error, got in reader.reap()})
        assert results[0] == (0, whole)
        for i, (error, got) in results.items():  # each of them before, after or during
            assert error == (0 if got == whole else EOF)
            # What arrived is of the file, or zeros: a truncated page that was read while it went.
            same = np.frombuffer(content, np.uint8)[i * whole : i * whole + got] == buffers[i][:got]
            assert (same | (buffers[i][:got] == 0)).all()
        assert reader.read(whole - 10, 10) == content[whole - 10 : whole]  # goes on
        with pytest.raises(EOFError):
            reader.read(whole - 10, 11)


def test_replaced_file_is_the_old_one(own: Path, content: bytes, io: Io) -> None:
    with Reader(own, io) as reader:
        new = own.with_name("new")
        new.write_bytes(bytes(SIZE))
        new.replace(own)
        assert reader.read(5, SIZE - 5) == content[5:]
        own.unlink()
        assert reader.read(0, SIZE) == content


def test_failing_read_fails_alone() -> None:
    source, into = aligned(4 * SECTOR, 0x5A), aligned(9 * SECTOR)
    good = source.ctypes.data
    with Reader("/proc/self/mem", "auto", 4) as reader:  # through preadv: io_uring is not for such files
        reads = [(UNMAPPED, SECTOR) if i % 3 == 1 else (good, SECTOR) for i in range(9)]
        assert reader.read_many(reads, into) == (0, errno.EIO, 0) * 3
        rows = into.reshape(9, SECTOR)
        assert [set(row.tolist()) for row in rows] == [{0x5A}, {0}, {0x5A}] * 3
        statistics = reader.statistics()
        assert (statistics.reads, statistics.errors) == (9, 3)
        assert statistics.retries == 2 * 3  # EIO is tried three times
        assert not statistics.direct
        assert statistics.direct_reason == (
            "buffered: no O_DIRECT on this file (EINVAL); pages are dropped after reading"
        )
        with pytest.raises(OSError, match=f"reading 1 bytes at {UNMAPPED + 3}") as caught:
            reader.read(UNMAPPED + 3, 1)
        assert caught.value.errno == errno.EIO


def test_wrong_reads_are_reaped_with_their_error(path: Path, io: Io) -> None:
    memory = aligned(2 * SECTOR)
    wrong = [(1, memory), (-SECTOR, memory), (0, memory[:100]), (0, memory[8 : 8 + SECTOR]), (0, memory[:0])]
    with Reader(path, io, 8) as reader:
        for i, (offset, into) in enumerate(wrong):
            reader.submit(offset, into, i)
        results: list[tuple[int, int, int]] = []
        while len(results) < len(wrong):
            results += reader.reap()
        assert sorted(results) == [(i, errno.EINVAL, 0) for i in range(len(wrong))]
        with pytest.raises((ValueError, BufferError)):
            reader.submit(0, bytes(SECTOR))
        assert reader.reap(timeout_ns=0) == []


# -- waiting


def test_depth_is_a_limit(path: Path, io: Io) -> None:
    with Reader(path, io, 2) as reader:
        for _ in range(3):
            reader.submit(0, aligned(SECTOR))
            reader.submit(0, aligned(SECTOR))
            with pytest.raises(BusyError, match="2 reads are in flight"):
                reader.submit(0, aligned(SECTOR))
            with pytest.raises(BusyError, match="2 reads are in flight"):
                reader.read(0, 1)
            assert len(reader.reap(1)) == 1
            reader.submit(0, aligned(SECTOR))
            left = 2
            while left:
                left -= len(reader.reap())


def test_timeout_and_no_busy_waiting(path: Path, io: Io) -> None:
    with Reader(path, io, 4) as reader:
        assert reader.reap(timeout_ns=0) == []
        for nanoseconds in (1, 1_000_000, 250_000_000):
            begin, used = time.perf_counter_ns(), time.process_time_ns()
            assert reader.reap(timeout_ns=nanoseconds) == []
            assert time.perf_counter_ns() - begin >= nanoseconds
        assert time.process_time_ns() - used < 50_000_000  # of the 250 ms
        reader.submit(0, aligned(SECTOR))
        assert reader.reap(0) == []  # starts it
        assert len(reader.reap(timeout_ns=2**63 - 1)) == 1


def test_wake(path: Path, io: Io) -> None:
    with Reader(path, io, 4) as reader:
        reader.wake()
        reader.wake()
        assert reader.reap() == []  # the wake came first; both are one
        assert reader.reap(timeout_ns=1000) == []
        waiting, woken = threading.Semaphore(0), threading.Semaphore(0)

        def wait() -> None:
            for _ in range(300):
                waiting.release()
                assert reader.reap() == []  # for ever, but for the wake
                woken.release()

        thread = threading.Thread(target=wait)
        thread.start()
        for i in range(300):
            assert waiting.acquire(timeout=30)
            for _ in range(i * 50):  # from before it waits until it sleeps
                pass
            reader.wake()
            assert woken.acquire(timeout=30)
        thread.join()
        # reads are not lost over it
        reader.submit(0, aligned(SECTOR), "read")
        reader.wake()
        assert (reader.reap() or reader.reap()) == [("read", 0, SECTOR)]


def test_interrupt_while_waiting(path: Path, io: Io) -> None:
    with Reader(path, io) as reader:
        timer = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
        timer.start()
        with pytest.raises(KeyboardInterrupt):
            reader.reap()
        timer.join()
        assert len(reader.read(0, 10)) == 10


def test_one_thread_at_a_time(path: Path, io: Io) -> None:
    with Reader(path, io) as reader:
        begun = threading.Event()

        def wait() -> None:
            begun.set()
            reader.reap()

        thread = threading.Thread(target=wait)
        thread.start()
        begun.wait()
        deadline = time.monotonic() + 30
        while True:  # until it is in there
            try:
                reader.reap(timeout_ns=0)
                assert time.monotonic() < deadline
            except BusyError as error:
                assert "another thread" in str(error)  # noqa: PT017
                break
        with pytest.raises(BusyError, match="another thread"):
            reader.close()
        reader.wake()
        thread.join()


# -- the end


@pytest.mark.parametrize("in_flight", [1, 5, 64])
def test_close_with_reads_in_flight(path: Path, io: Io, in_flight: int) -> None:
    buffers = [aligned(1 << 20) for _ in range(in_flight)]
    for reap in (False, True):
        reader = Reader(path, io, 64)
        for i, into in enumerate(buffers):
            reader.submit(i % 2 << 20, into)
        reader.reap(reap, 0)  # starts them
        reader.close()
        for into in buffers:
            into[:] = 0x77
        with Reader(path, io) as other:  # whatever was still on its way would have come
            other.read(0, SIZE)
        assert all((into == 0x77).all() for into in buffers)


def test_forgotten_reader_waits_for_its_reads(path: Path, io: Io) -> None:
    for _ in range(20):
        reader = Reader(path, io, 16)
        for _ in range(16):
            reader.submit(0, aligned(1 << 18), reader)  # a cycle through its tag
        reader.reap(0)
        del reader
        gc.collect()


def test_reads_outlive_the_thread_that_started_them(path: Path, content: bytes, io: Io) -> None:
    buffers = [aligned(1 << 18) for _ in range(8)]
    with Reader(path, io, 8) as reader:

        def start() -> None:
            for i, into in enumerate(buffers):
                reader.submit(i << 18, into, i)
            reader.reap(0)

        for _ in range(5):
            in_thread(start)
            errors: dict[int, int] = {}
            while len(errors) < len(buffers):
                errors.update({tag: error for tag, error, _ in reader.reap()})
            assert errors == dict.fromkeys(range(8), 0)
            assert b"".join(into.tobytes() for into in buffers) == content[: 8 << 18]
        in_thread(start)  # closed by another thread


def test_threads_of_preadv(path: Path) -> None:
    for depth, threads in ((1, 1), (5, 5), (64, 8)):
        with Reader(path, "preadv", depth) as reader:
            assert reader.statistics().threads == threads
            assert settles_at("pi2rt/io", threads)
        assert settles_at("pi2rt/io", 0)


def test_closed_reader(path: Path, io: Io) -> None:
    reader = Reader(path, io)
    reader.close()
    reader.close()
    reader.wake()
    for use in (reader.reap, reader.statistics, lambda: reader.read(0, 1)):
        with pytest.raises(ValueError, match="reader is closed"):
            use()


def test_what_cannot_be_opened(tmp_path: Path, path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="missing"):
        Reader(tmp_path / "missing")
    with pytest.raises(IsADirectoryError):
        Reader(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    for kind in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(OSError, match="seek") as caught:  # and does not wait for a writer
            Reader(kind)
        assert caught.value.errno == errno.ESPIPE
    with pytest.raises(ValueError, match="null byte"):
        Reader("weights\0")
    for depth in (0, 257, -1):
        with pytest.raises(ValueError, match=f"depth={depth}: 1 to 256"):
            Reader(path, depth=depth)
    with pytest.raises(ValueError, match="io='aio': one of auto, uring, preadv"):
        Reader(path, "aio")  # type: ignore[arg-type]
    with Reader(path) as reader:
        with pytest.raises(ValueError, match="offset -1, 1 bytes"):
            reader.read(-1, 1)
        with pytest.raises(ValueError, match="8192 bytes do not fit into 4096"):
            reader.read_many([(0, SECTOR)] * 2, aligned(SECTOR))


# -- the page cache


def resident(path: Path) -> int:
    """Pages of the file in the page cache."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
        pages = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
        memory = np.frombuffer(view, np.uint8)
        libc = ctypes.CDLL(None, use_errno=True)
        mincore = libc.mincore(
            ctypes.c_void_p(memory.ctypes.data),
            ctypes.c_size_t(len(view)),
            ctypes.c_void_p(pages.ctypes.data),
        )
        del memory
        assert mincore == 0, os.strerror(ctypes.get_errno())
    return int((pages & 1).sum())


def drop(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if resident(path):
        pytest.skip("this file system keeps its files in memory")


def read_all(path: Path, content: bytes, io: Io) -> flash.Statistics:
    offsets = list(range(0, SIZE - SECTOR, SECTOR))
    random.Random(1).shuffle(offsets)
    into = aligned(len(offsets) * SECTOR)
    with Reader(path, io, 16) as reader:
        assert reader.read_many([(offset, SECTOR) for offset in offsets], into) == (0,) * len(offsets)
        for i, offset in enumerate(offsets):
            assert into[i * SECTOR : (i + 1) * SECTOR].tobytes() == content[offset : offset + SECTOR]
        assert reader.read(0, SIZE) == content  # the ragged end too
        return reader.statistics()


def test_page_cache_does_not_grow(own: Path, content: bytes, io: Io) -> None:
    drop(own)
    statistics = read_all(own, content, io)
    assert resident(own) == 0
    assert statistics.direct == statistics.direct_reason.startswith("O_DIRECT")
    own.read_bytes()
    assert resident(own) > 0  # that is what would have been seen


@pytest.mark.parametrize(
    ("refusal", "reason"),
    [
        (Refusal("openat", errno.EINVAL, 2, os.O_DIRECT), "EINVAL"),  # as most file systems without it
        (Refusal("pread64", errno.EOPNOTSUPP), "EOPNOTSUPP"),  # as those that find out later
    ],
)
def test_without_o_direct_the_page_cache_does_not_grow_either(
    own: Path, content: bytes, io: Io, refusal: Refusal, reason: str
) -> None:
    drop(own)

    def body() -> None:
        refuse(refusal)
        statistics = read_all(own, content, io)
        assert not statistics.direct
        assert statistics.direct_reason == (
            f"buffered: no O_DIRECT on this file ({reason}); pages are dropped after reading"
        )
        assert statistics.errors == 0 or statistics.short_reads  # the ragged end

    in_thread(body)
    assert resident(own) == 0


# -- io_uring, where it is taken away


@pytest.mark.parametrize(
    ("error", "why"),
    [
        (errno.EPERM, "io_uring: not permitted by this system (EPERM)"),
        (errno.ENOSYS, "io_uring: not in this kernel, or older than 5.11 (ENOSYS)"),
        (errno.ENOMEM, "io_uring: no memory for it, or over RLIMIT_MEMLOCK (ENOMEM)"),
    ],
)
@pytest.mark.parametrize("call", ["io_uring_setup", "io_uring_enter"])
def test_io_uring_refused(path: Path, content: bytes, call: str, error: int, why: str) -> None:
    permitted, by_itself = probe()
    if not permitted:  # what refuses it already may come first
        pytest.skip(by_itself)

    def body() -> None:
        refuse(Refusal(call, error))
        assert probe() == (False, why)
        with Reader(path) as reader:
            statistics = reader.statistics()
            assert (statistics.io, statistics.io_reason, statistics.threads) == ("preadv", why, 8)
            assert reader.read(100, 100_000) == content[100:100_100]
        cause = "RLIMIT_MEMLOCK is " if error == errno.ENOMEM else "a seccomp filter applies to this process"
        with pytest.raises(RequestError, match=re.escape(f"io='uring': {why}: {cause}")):
            Reader(path, "uring")

    in_thread(body)


def test_files_whose_reads_wait_anyway_are_not_read_through_io_uring(path: Path, content: bytes) -> None:
    permitted, why = probe()
    if not permitted:
        pytest.skip(why)

    def body() -> None:
        refuse(Refusal("preadv2", errno.EOPNOTSUPP))
        with Reader(path) as reader:
            statistics = reader.statistics()
            assert statistics.io == "preadv"
            assert statistics.io_reason == (
                "preadv: reads of this file system cannot be told not to wait (EOPNOTSUPP)"
            )
            assert reader.read(100, 100_000) == content[100:100_100]
        with pytest.raises(
            RequestError,
            match=rf"{path}: io='uring': .* cannot be told not to wait .* take io='preadv' or 'auto'",
        ):
            Reader(path, "uring")
        with Reader(path, "preadv") as reader:
            assert reader.statistics().io_reason == "preadv: asked for"

    in_thread(body)


def test_io_uring_taken_away_while_reading(path: Path, content: bytes) -> None:
    if why := without_uring(path):
        pytest.skip(why)
    buffers = [aligned(SECTOR) for _ in range(8)]

    def body() -> None:
        with Reader(path, "uring", 8) as reader:
            for i in range(4):
                reader.submit(i * SECTOR, buffers[i], i)
            reader.reap(0)  # these are the kernel's by now
            refuse(Refusal("io_uring_enter", errno.EPERM))
            for i in range(4, 8):
                reader.submit(i * SECTOR, buffers[i], i)
            errors: Counter[int] = Counter()
            while errors.total() < 8:
                for tag, error, _ in reader.reap():
                    assert error == (errno.EPERM if tag >= 4 else 0)
                    errors[error] += 1
            assert errors == {0: 4, errno.EPERM: 4}
            for i in range(4):
                assert buffers[i].tobytes() == content[i * SECTOR : (i + 1) * SECTOR]
            reader.submit(0, buffers[0], "another")
            assert reader.reap() == [("another", errno.EPERM, 0)]
            used = time.thread_time_ns()
            assert reader.reap(timeout_ns=100_000_000) == []
            assert time.thread_time_ns() - used < 50_000_000
            reader.wake()
            assert reader.reap() == []

    in_thread(body)


# -- measuring


@pytest.mark.parametrize("pattern", ["random", "sequential"])
def test_measure(path: Path, io: Io, pattern: str) -> None:
    begin = time.perf_counter()
    for read_bytes, depth in ((SECTOR, 1), (SECTOR, 32), (1 << 20, 3), (3 << 20, 2)):
        assert flash.measure(path, read_bytes, depth, 0.02, io, pattern) > 0  # type: ignore[arg-type]
    assert time.perf_counter() - begin < 20


def test_measure_refuses(path: Path) -> None:
    for wrong in (0, -SECTOR, SECTOR + 1):
        with pytest.raises(ValueError, match=f"read_bytes={wrong}"):
            flash.measure(path, wrong)
    with pytest.raises(ValueError, match="seconds=0"):
        flash.measure(path, SECTOR, seconds=0)
    with pytest.raises(ValueError, match="fewer than one read of 4194304"):
        flash.measure(path, 4 << 20)
    with pytest.raises(ValueError, match="pattern='backwards'"):
        flash.measure(path, SECTOR, pattern="backwards")  # type: ignore[arg-type]
