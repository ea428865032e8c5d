"""Weights that do not fit: read from flash in the order of their use, round and round (stream.h)."""

from libc.stdint cimport int64_t, uint8_t, uintptr_t
from libc.stdlib cimport free, malloc
from posix.unistd cimport getpid

from pi2rt.cython_kernels.flash.declarations cimport *
from pi2rt.cython_kernels.flash.files cimport open_file

import os

import numpy as np

from pi2rt._errors import InternalError
from pi2rt.host.limits import memory_failure, system_failure

SECTOR = PI2_SECTOR
MOST_DEPTH = 64
"""Reads in flight, at most: what the reader takes at once (stream.c)."""


cdef class Stream:
    """Reads ``units``, (offset, bytes, skip) in ``path`` in the order of their use, round and round into ``ring``.
    Offset and bytes are whole sectors, of which the first ``skip`` bytes are not the unit's.

    A native thread begins at once. ``ring`` (address, ``ring_bytes``) is aligned to SECTOR and outlives the stream; it
    has room for units that are used together, and, where units differ in size, for the largest beside them, which may
    not have fitted before its end.
    ``lap_bytes``: of all units.
    ``name``: what errors call the file, where that is not ``path``. ``read_bytes``: size of one read, a multiple of
    SECTOR; ``depth``: reads in flight, at most MOST_DEPTH.
    """

    def __cinit__(self, path, units, uintptr_t ring, int64_t ring_bytes, *, name=None, io="auto",
                  int64_t read_bytes=1 << 20, int depth=8, deadline=None):
        cdef int error = 0
        cdef pi2_flash *flash
        self.owner = getpid()
        self.path, self.n, self.ring_bytes = path if name is None else name, <int>len(units), ring_bytes
        self.deadline = deadline
        largest = max(size for _, size, _ in units)
        if ring % PI2_SECTOR or any(
            offset % PI2_SECTOR or size % PI2_SECTOR or not 0 <= skip < size for offset, size, skip in units
        ):
            raise InternalError("units and ring of a stream are whole sectors")
        if ring_bytes < largest or read_bytes <= 0 or read_bytes % PI2_SECTOR or not 1 <= depth <= MOST_DEPTH:
            raise InternalError(
                f"a ring of {ring_bytes} bytes for units of {largest}, reads of {read_bytes}, {depth} at once"
            )
        self.units = <pi2_extent *>malloc(self.n * sizeof(pi2_extent))
        if self.units == NULL:
            raise memory_failure("reading weights in every step", self.n * sizeof(pi2_extent))
        for i, (offset, size, skip) in enumerate(units):
            self.units[i].offset, self.units[i].bytes, self.units[i].skip = offset, size, skip
            self.units[i].home = -1
            self.lap_bytes += size
        flash = open_file(path, self.path, io, depth)
        self.io_reason = (<bytes>pi2_flash_io_reason(flash)).decode()
        cdef int64_t deadline_ns = -1 if deadline is None else <int64_t>(deadline * 1e9)
        with nogil:  # it touches all of the ring, where that is pinned
            self.stream = pi2_stream_create(flash, self.units, self.n, read_bytes, depth, <uint8_t *>ring, ring_bytes,
                                            deadline_ns, &error)
        if self.stream == NULL:
            pi2_flash_close(flash, -1)
            raise system_failure("starting the thread that reads weights", error) or OSError(error, os.strerror(error))

    def check(self, units, int at_once):
        """Raises InternalError where so many of these units, one behind the other, cannot be in the ring."""
        sizes = {self.units[i].bytes for i in range(self.n)}
        gap = max(sizes) if len(sizes) > 1 else 0
        together = at_once * max(self.units[i].bytes for i in units)
        if together + gap > self.ring_bytes:
            raise InternalError(f"a ring of {self.ring_bytes} bytes for {together} used together, and a gap of {gap}")

    def borrow(self, uintptr_t address, homes):
        """Reclaimable memory at ``address``, whole sectors: units that are kept there are not read again. ``homes``: of
        the unit with each number its offset, a multiple of SECTOR. Once, before any of it is used; it outlives the
        stream."""
        for number, offset in homes.items():
            if address % PI2_SECTOR or offset % PI2_SECTOR:
                raise InternalError(f"a home at {offset} of {address}, which is no sector")
            self.units[<int>number].home = offset
        pi2_stream_loan(self.stream, <uint8_t *>address)

    @property
    def ended_at(self):
        """The offset at which the file ended too early, in a read that failed for that; else -1."""
        return -1 if self.stream == NULL else pi2_flash_ended_at(self.stream.flash)

    @property
    def lent_bytes(self):
        """Of the reclaimable memory, those that it may use now."""
        return 0 if self.stream == NULL else self.stream.lent

    @property
    def pinned_bytes(self):
        """Of the ring, those that reads through io_uring find pinned; others are pinned by each read."""
        return 0 if self.stream == NULL else pi2_flash_registered(self.stream.flash)

    @property
    def counters(self):
        """(bytes read, nanoseconds in which the reader waited for flash, nanoseconds in which steps waited for it)"""
        if self.stream == NULL:
            return 0, 0, 0
        return self.stream.bytes, self.stream.busy_ns, self.stream.stall_ns

    @property
    def reads(self):
        """That have ended."""
        return 0 if self.stream == NULL else pi2_flash_reads(self.stream.flash)

    def times(self):
        """(begin, end) nanoseconds of the last reading of each unit, int64 (n,); 0 where it has not ended yet."""
        begin, end = np.zeros(self.n, np.int64), np.zeros(self.n, np.int64)
        if self.stream != NULL:
            for i in range(self.n):
                begin[i], end[i] = self.stream.placed[i].begin_ns, self.stream.placed[i].end_ns
        return begin, end

    def close(self):
        """Joins the reader. Only after the gang that runs the program was closed. Returns the bytes of reads that have
        not ended, or 0: their device does not answer and may still write to the ring (``Memory.abandon``)."""
        cdef pi2_stream *stream = self.stream
        cdef int64_t left = 0
        self.stream = NULL
        if stream != NULL and self.owner == getpid():  # a forked child does not have the thread
            with nogil:
                left = pi2_stream_destroy(stream)
        return left

    def __dealloc__(self):
        if self.stream != NULL and self.owner == getpid():
            pi2_stream_destroy(self.stream)
        free(self.units)
