"""Asynchronous reads of one file past the page cache (flash.h), for tests and for measuring."""

from cpython.buffer cimport PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_Release, PyObject_GetBuffer
from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_CheckSignals
from libc.stdint cimport INT64_MAX, int64_t, uint8_t, uint64_t, uintptr_t
from libc.stdlib cimport calloc, free
from posix.types cimport pid_t
from posix.unistd cimport getpid

cimport cython

from pi2rt.cython_kernels.flash.declarations cimport *
from pi2rt.cython_kernels.flash.files cimport open_file

import os
import threading
from dataclasses import dataclass
from typing import Literal

from pi2rt._errors import BusyError
from pi2rt.host.limits import memory_failure
from pi2rt.host.read_errors import read_failure

cdef extern from "pages.h" nogil:
    void *pi2_pages_map(int64_t, int)
    void pi2_pages_unmap(void *, int64_t)

cdef extern from "waiting.h" nogil:
    int64_t pi2_now_ns()

SECTOR = PI2_SECTOR
MOST_IN_FLIGHT = PI2_FLASH_MOST
EOF = PI2_EOF
Io = Literal["auto", "uring", "preadv"]
cdef int64_t PATIENCE_NS = 100_000_000  # how long a signal may have to wait for its Python handler


@dataclass(frozen=True, slots=True)
class Statistics:
    """Since open. ``io``: "uring" or "preadv". ``latencies[i]``: reads that took less than 2**i us, and not less than
    half of it; the last one: all others. The rest as in flash.h."""

    io: str
    io_reason: str
    direct: bool
    direct_reason: str
    depth: int
    threads: int
    file_bytes: int
    registered_bytes: int
    reads: int
    bytes: int
    errors: int
    retries: int
    short_reads: int
    latency_ns: int
    latencies: tuple[int, ...]

    @property
    def mean_latency_ns(self):
        return self.latency_ns / self.reads if self.reads else 0.0


cdef pi2_flash *open_flash(path, io, int depth) except NULL:
    if not 1 <= depth <= PI2_FLASH_MOST:
        raise ValueError(f"depth={depth}: 1 to {PI2_FLASH_MOST}")
    return open_file(path, path, io, depth)


cdef class Slot:
    """A read and the memory that it goes to, held until it is reaped."""

    cdef pi2_read read
    cdef Py_buffer view
    cdef bint held
    cdef object tag

    def __dealloc__(self):
        if self.held:
            PyBuffer_Release(&self.view)


@cython.no_gc_clear  # the slots hold memory that reads in flight write to, until __dealloc__ has waited for them
cdef class Reader:
    """Reads of the file at ``path``, at most ``depth`` at a time. One thread at a time uses it; any may wake it."""

    cdef pi2_flash *flash
    cdef object lock, using
    cdef dict slots  # of reads in flight, by address
    cdef Slot registered
    cdef int64_t wakes, wakes_seen
    cdef readonly int depth
    cdef pid_t owner

    def __cinit__(self, path, io="auto", int depth=8):
        self.owner = getpid()
        self.lock, self.using, self.slots = threading.Lock(), threading.Lock(), {}
        self.flash = open_flash(path, io, depth)
        self.depth = depth

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    cdef pi2_flash *use(self, bint idle=False) except NULL:
        if not self.using.acquire(blocking=False):
            raise BusyError("the reader is in use by another thread")
        try:
            if self.flash == NULL:
                raise ValueError("reader is closed")
            if idle and self.slots:
                raise BusyError(f"{len(self.slots)} reads are in flight")
            return self.flash
        except BaseException:
            self.using.release()
            raise

    cdef start(self, pi2_flash *f, int64_t offset, into, tag):
        cdef Slot slot = Slot()
        PyObject_GetBuffer(into, &slot.view, PyBUF_SIMPLE | PyBUF_WRITABLE)
        slot.held, slot.tag = True, tag
        slot.read.offset, slot.read.bytes, slot.read.to = offset, slot.view.len, <uint8_t *>slot.view.buf
        slot.read.user = <void *>slot
        if pi2_flash_submit(f, &slot.read):
            raise BusyError(f"{self.depth} reads are in flight")
        self.slots[<uintptr_t><void *>slot] = slot

    cdef list take(self, pi2_flash *f, int most, int64_t timeout_ns):
        cdef pi2_read *done[PI2_FLASH_MOST]
        cdef int n, i
        cdef Slot slot
        most = min(most, PI2_FLASH_MOST)
        with nogil:
            n = pi2_flash_reap(f, done, most, timeout_ns)
        out = []
        for i in range(n):
            slot = self.slots.pop(<uintptr_t>done[i].user)
            out.append((slot.tag, done[i].error, done[i].got))
        return out

    def submit(self, offset, into, tag=None):
        """Starts a read into a writable buffer; BusyError when ``depth`` are in flight."""
        f = self.use()
        try:
            self.start(f, offset, into, tag)
        finally:
            self.using.release()

    def reap(self, int most=PI2_FLASH_MOST, int64_t timeout_ns=-1):
        """(tag, error, bytes that arrived) of reads that have finished, the first one waited for: for ever when
        timeout_ns < 0. Empty after the timeout and after ``wake``. ``most`` 0 starts what was submitted."""
        cdef int64_t begin = pi2_now_ns(), left = timeout_ns
        f = self.use()
        try:
            while True:
                if self.wakes != self.wakes_seen:
                    left = 0
                out = self.take(f, most, PATIENCE_NS if left < 0 else min(left, PATIENCE_NS))
                if timeout_ns > 0:
                    left = max(0, timeout_ns - (pi2_now_ns() - begin))
                if out or most <= 0 or left == 0 or self.wakes != self.wakes_seen:
                    self.wakes_seen = self.wakes
                    return out
                PyErr_CheckSignals()
        finally:
            self.using.release()

    def wake(self):
        """From any thread: a ``reap`` that waits, or else the next one, returns."""
        with self.lock:
            self.wakes += 1
            if self.flash != NULL:
                pi2_flash_wake(self.flash)

    def register(self, memory):
        """Declares that reads go to this buffer mostly; it is held until ``close``. OSError where it cannot be: then
        reads work as before."""
        cdef Slot slot = Slot()
        f = self.use()
        try:
            PyObject_GetBuffer(memory, &slot.view, PyBUF_SIMPLE | PyBUF_WRITABLE)
            slot.held = True
            error = pi2_flash_register(f, slot.view.buf, slot.view.len, slot.view.len, PI2_SECTOR)
            if error:
                raise OSError(error, f"registering {slot.view.len} bytes: {os.strerror(error)}")
            self.registered = slot
        finally:
            self.using.release()

    def read_many(self, reads, into):
        """Reads each (offset, bytes) into the buffer, one behind the other; returns their errors (0, errno or EOF)."""
        memory = memoryview(into).cast("B")
        total = sum(size for _, size in reads)
        if any(size < 0 for _, size in reads) or total > len(memory):
            raise ValueError(f"{total} bytes do not fit into {len(memory)}")
        errors, at, begun, left = [0] * len(reads), 0, 0, len(reads)
        f = self.use(idle=True)
        try:
            while left:
                while begun < len(reads) and begun - (len(reads) - left) < self.depth:
                    offset, size = reads[begun]
                    self.start(f, offset, memory[at : at + size], begun)
                    at += size
                    begun += 1
                for i, error, _ in self.take(f, PI2_FLASH_MOST, PATIENCE_NS):
                    errors[i] = error
                    left -= 1
                PyErr_CheckSignals()
            return tuple(errors)
        finally:
            while self.slots:  # after a signal
                self.take(f, PI2_FLASH_MOST, -1)
            self.using.release()

    def read(self, int64_t offset, int64_t size):
        """Bytes [offset, offset + size), of any alignment. EOFError where the file ends before; OSError."""
        cdef pi2_read r
        cdef pi2_read *done
        cdef void *memory = NULL
        cdef int64_t first = offset // PI2_SECTOR * PI2_SECTOR
        if offset < 0 or size < 0 or size > INT64_MAX - 2 * PI2_SECTOR - offset:
            raise ValueError(f"offset {offset}, {size} bytes")
        if size == 0:
            return b""
        r.offset = first
        r.bytes = (offset - first + size + PI2_SECTOR - 1) // PI2_SECTOR * PI2_SECTOR
        f = self.use(idle=True)
        try:
            memory = pi2_pages_map(r.bytes, 0)
            if memory == NULL:
                raise memory_failure(f"reading {size} bytes", r.bytes)
            r.to, r.parts = <uint8_t *>memory, NULL
            with nogil:
                pi2_flash_submit(f, &r)
                while pi2_flash_reap(f, &done, 1, -1) == 0:
                    pass
            if r.got < offset - first + size:
                if r.error == PI2_EOF:
                    raise EOFError(f"{size} bytes at {offset}: the file ends at {first + r.got}")
                raise OSError(r.error, f"reading {size} bytes at {offset}: {os.strerror(r.error)}")
            return PyBytes_FromStringAndSize(<char *>r.to + (offset - first), size)
        finally:
            if memory != NULL:
                pi2_pages_unmap(memory, r.bytes)
            self.using.release()

    def statistics(self):
        cdef c_statistics s
        with self.lock:
            if self.flash == NULL:
                raise ValueError("reader is closed")
            c_take_statistics(self.flash, &s)
        return Statistics(
            io="uring" if s.io == PI2_IO_URING else "preadv",
            io_reason=(<bytes>s.io_reason).decode(),
            direct=bool(s.direct),
            direct_reason=(<bytes>s.direct_reason).decode(),
            depth=s.depth, threads=s.threads, file_bytes=s.file_bytes, registered_bytes=s.registered_bytes,
            reads=s.reads, bytes=s.bytes, errors=s.errors, retries=s.retries, short_reads=s.short_reads,
            latency_ns=s.latency_ns, latencies=tuple(s.latency[i] for i in range(PI2_FLASH_LATENCIES)),
        )

    def close(self):
        """Waits for reads in flight; they are not reaped. A reap that waits in another thread is BusyError: wake it."""
        cdef pi2_flash *f
        if not self.using.acquire(blocking=False):
            raise BusyError("the reader is in use by another thread")
        try:
            with self.lock:
                f = self.flash
                self.flash = NULL
            if f != NULL and self.owner == getpid():  # a forked child has no threads to join, and shares the ring
                with nogil:
                    pi2_flash_close(f, -1)
                self.slots.clear()
                self.registered = None
        finally:
            self.using.release()

    def __dealloc__(self):
        if self.flash != NULL and self.owner == getpid():
            with nogil:
                pi2_flash_close(self.flash, -1)


def measure(path, int64_t read_bytes, int depth=8, double seconds=0.2, io="auto", pattern="random"):
    """Bytes per second of reads of this size at this depth, at random blocks or, from a random place on, one behind the
    other."""
    cdef pi2_flash *f
    cdef c_statistics s
    cdef pi2_read *reads = NULL
    cdef void *memory = NULL
    cdef int64_t step, places, duration = <int64_t>(seconds * 1e9)
    cdef bint random = pattern == "random"
    if pattern not in ("random", "sequential"):
        raise ValueError(f"pattern={pattern!r}: random or sequential")
    if read_bytes <= 0 or read_bytes % PI2_SECTOR or not 0 < seconds <= 3600:
        raise ValueError(f"read_bytes={read_bytes}, seconds={seconds}: multiples of {PI2_SECTOR}; up to an hour")
    f = open_flash(path, io, depth)
    try:
        c_take_statistics(f, &s)
        if s.file_bytes < read_bytes:
            raise ValueError(f"{os.fspath(path)} has {s.file_bytes} bytes, fewer than one read of {read_bytes}")
        step = PI2_SECTOR if random else read_bytes
        places = (s.file_bytes - read_bytes) // step + 1
        reads = <pi2_read *>calloc(depth, sizeof(pi2_read))
        memory = pi2_pages_map(read_bytes * depth, 0)
        if reads == NULL or memory == NULL:
            raise memory_failure(f"measuring {depth} reads at once", read_bytes * depth)
        pi2_flash_register(f, memory, read_bytes * depth, read_bytes * depth, read_bytes)
        return run(f, reads, <uint8_t *>memory, depth, read_bytes, places, step, random, duration, path)
    finally:
        with nogil:
            pi2_flash_close(f, -1)
        if memory != NULL:
            pi2_pages_unmap(memory, read_bytes * depth)
        free(reads)


cdef double run(pi2_flash *f, pi2_read *reads, uint8_t *memory, int depth, int64_t read_bytes, int64_t places,
                int64_t step, bint random, int64_t duration, path) except -1:
    cdef pi2_read *done[PI2_FLASH_MOST]
    cdef pi2_read *r
    cdef int n = 0, i, error = 0
    cdef int64_t at = 0, finished = 0, in_flight = 0, begin, now
    cdef uint64_t state
    with nogil:
        begin = now = pi2_now_ns()
        state = <uint64_t>begin | 1  # not the same places again, which the device may have kept
        at = <int64_t>((state * 0x2545f4914f6cdd1dULL) % <uint64_t>places)
        for i in range(depth):
            reads[i].bytes, reads[i].to = read_bytes, memory + i * read_bytes
            done[i] = &reads[i]
        n = depth
        while True:
            for i in range(n):
                r = done[i]
                if now - begin >= duration or error:
                    break
                if random:
                    state ^= state >> 12
                    state ^= state << 25
                    state ^= state >> 27
                    at = <int64_t>((state * 0x2545f4914f6cdd1dULL) % <uint64_t>places)
                else:
                    at = (at + 1) % places
                r.offset = at * step
                pi2_flash_submit(f, r)
                in_flight += 1
            if in_flight == 0:
                break
            n = pi2_flash_reap(f, done, PI2_FLASH_MOST, -1)
            in_flight -= n
            finished += n
            now = pi2_now_ns()
            for i in range(n):
                if done[i].error:
                    error = done[i].error
    if error:
        raise read_failure("blocks to measure", error, path, None, pi2_flash_ended_at(f))
    return finished * read_bytes * 1e9 / max(1, now - begin)
