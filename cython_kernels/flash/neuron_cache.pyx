"""Memory for neurons that are read from flash when they are active (neuron_cache.h)."""

from libc.stdint cimport int32_t, int64_t, uint8_t, uintptr_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcpy
from posix.unistd cimport getpid

from pi2rt.cython_kernels.flash.declarations cimport *
from pi2rt.cython_kernels.flash.files cimport open_file

import os
from dataclasses import dataclass

import numpy as np

from pi2rt._errors import InternalError
from pi2rt.host.limits import memory_failure, system_failure
from pi2rt.host.read_errors import read_failure

MOST_DEPTH = PI2_FLASH_MOST
MOST_READ_THROUGH = PI2_MERGED_BYTES
PAGE = PI2_SECTOR
"""Pages and slots are multiples of it."""
RECORD = np.dtype([("begin", np.int64), ("end", np.int64), ("region", np.int32), ("pages", np.uint16),
                   ("foreseen", np.uint16)])
"""A read that has ended: nanoseconds, the block whose neurons it read, how many pages, and how many of these
were foreseen."""
assert RECORD.itemsize == sizeof(pi2_read_record)


@dataclass(frozen=True, slots=True)
class Counters:
    """Of pages: asked for while they were there (hits; early: of these, read because they were foreseen, and asked for
    the first time) or not (misses), read to their end because their neurons are active (completed; in two phases only),
    and given up for others. Of reading: reads, bytes, nanoseconds with a read in flight, and nanoseconds in which
    compute threads (all of them, added up) waited. ``read_through``, ``read_through_bytes``: pages and bytes of gaps,
    which nobody asked for, read to make one read of two; they are among ``bytes``."""

    hits: int = 0
    early: int = 0
    misses: int = 0
    completed: int = 0
    evictions: int = 0
    reads: int = 0
    bytes: int = 0
    busy_ns: int = 0
    stall_ns: int = 0
    read_through: int = 0
    read_through_bytes: int = 0


cdef class NeuronCache:
    """Holds pages of ``regions``, (offset in the file, bytes of a page, bytes of all) for each feed-forward block, in
    ``slots`` slots of ``slot_bytes`` at ``memory`` (aligned to PAGE, outlives the cache, has room for a slot for each
    page, of which those that are not used need not be there).

    A native thread that reads begins at once. ``name``: what errors call the file, where that is not ``path``.
    ``heads``: bytes of each region's pages that are read first, the rest once a program asks for it; 0: all at once.
    ``read_through``: bytes of a gap between pages that a read runs through at most, whole PAGEs.
    ``depth``: reads in flight, at most MOST_DEPTH. ``deadline``: seconds; when none of those in flight ends for so
    long, reading fails.
    """

    def __cinit__(self, path, regions, uintptr_t memory, int slots, int64_t slot_bytes, *, heads=None, name=None,
                  io="auto", int depth=64, deadline=None, int64_t read_through=0):
        cdef int error = 0
        cdef int32_t first = 0
        cdef pi2_flash *flash
        self.owner = getpid()
        self.path, self.n_regions = path if name is None else name, <int>len(regions)
        self.deadline = deadline
        if memory % PAGE or slot_bytes % PAGE or slots < 1 or not regions or not 1 <= depth <= PI2_FLASH_MOST:
            raise InternalError(f"{slots} slots of {slot_bytes} bytes, {len(regions)} regions, {depth} reads at once")
        if any(offset % PAGE or size % PAGE or not 0 < size <= slot_bytes or total < 1 or total % PAGE
               for offset, size, total in regions):
            raise InternalError(f"regions of neurons {regions} are whole pages of at most {slot_bytes} bytes")
        if read_through % PAGE or not 0 <= read_through <= MOST_READ_THROUGH:
            raise InternalError(f"gaps of {read_through} bytes")
        heads = [0] * len(regions) if heads is None else heads
        if any(head % PAGE or not 0 <= head < size for head, (_, size, _) in zip(heads, regions, strict=True)):
            raise InternalError(f"heads of {heads} bytes for pages of {regions}")
        self.regions = <pi2_region *>malloc(self.n_regions * sizeof(pi2_region))
        if self.regions == NULL:
            raise memory_failure("a cache of neurons", self.n_regions * sizeof(pi2_region))
        for i, (offset, size, total) in enumerate(regions):
            pages = -(-total // size)
            self.regions[i].offset, self.regions[i].page_bytes = offset, size
            self.regions[i].last_bytes = total - (pages - 1) * size
            self.regions[i].first, self.regions[i].pages, self.regions[i].head_bytes = first, pages, heads[i]
            first += pages
        flash = open_file(path, self.path, io, depth)
        self.io_reason = (<bytes>pi2_flash_io_reason(flash)).decode()
        cdef int32_t most = max(slots, first)
        cdef int64_t deadline_ns = -1 if deadline is None else <int64_t>(deadline * 1e9)
        with nogil:  # it touches all of the memory, where that is pinned
            self.cache = pi2_neuron_cache_create(flash, self.regions, self.n_regions, first, slot_bytes,
                                                 <uint8_t *>memory, slots, most, depth, deadline_ns, &error)
        if self.cache == NULL:
            pi2_flash_close(flash, -1)
            raise system_failure("starting the thread that reads neurons", error) or OSError(error, os.strerror(error))
        if pi2_neuron_cache_read_through(self.cache, read_through):
            raise memory_failure("a cache of neurons")

    @property
    def ended_at(self):
        """The offset at which the file ended too early, in a read that failed for that; else -1."""
        return -1 if self.cache == NULL else pi2_flash_ended_at(self.cache.flash)

    def fill(self, int region, int first, int count):
        """Reads these pages of a region into free slots, while there are any. Blocks; releases the GIL.

        Raises:
            OSError: the file cannot be read.
        """
        cdef int error
        if self.cache == NULL or not (0 <= region < self.n_regions and 0 <= first
                                      and first + count <= self.regions[region].pages):
            raise InternalError(f"pages {first} to {first + count} of region {region}")
        with nogil:
            error = pi2_neuron_cache_fill(self.cache, region, first, count)
        if error:
            raise read_failure("weights", error, self.path, self.deadline, self.ended_at)

    def trace(self, int64_t reads):
        """From now on reads are recorded, the last ``reads`` of those that were not taken. Before any program runs."""
        if self.cache == NULL or reads < 1 or self.records != NULL:
            raise InternalError(f"a trace of {reads} reads")
        self.records = <pi2_read_record *>malloc(reads * sizeof(pi2_read_record))
        if self.records == NULL or pi2_neuron_cache_trace(self.cache, reads):
            raise memory_failure("a trace of neuron reads", reads * sizeof(pi2_read_record))
        self.n_records = reads

    def take_reads(self):
        """(reads that have ended since, of RECORD, in the order of their ends; nanoseconds before which no read began
        that is still to come)"""
        cdef int64_t n, horizon = 0
        if self.cache == NULL or self.records == NULL:
            raise InternalError("reads are not recorded")
        with nogil:
            n = pi2_neuron_cache_take_records(self.cache, self.records, &horizon)
        out = np.empty(n, RECORD)
        memcpy(<void *><uintptr_t>out.ctypes.data, self.records, n * sizeof(pi2_read_record))
        return out, horizon

    def resize(self, int slots):
        """Other than so many slots, also while programs run. Blocks for 5 ms at most; returns whether nothing uses the
        memory of slots that go. If not, call it again: reads into them go on, of a device that may not answer."""
        cdef int32_t left
        if self.cache == NULL or not 1 <= slots <= self.cache.capacity:
            raise InternalError(f"{slots} slots")
        with nogil:
            left = pi2_neuron_cache_resize(self.cache, slots)
            if left:
                pi2_neuron_cache_wait(self.cache, self.cache.event, 5_000_000)
        return not left

    def absent(self):
        """How much each page was used of late, float32 (pages of all regions); -1 where it is present or on its way."""
        if self.cache == NULL:
            raise InternalError("the cache is closed")
        out = np.empty(self.cache.n_pages, np.float32)
        cdef float[::1] uses = out
        with nogil:
            pi2_neuron_cache_absent(self.cache, &uses[0])
        return out

    def fetch(self, pages):
        """Starts reading these pages (int32, numbers among all) into slots that were never used, where they are not
        there. Returns whether there are more such slots. While programs run; a read that fails leaves its page absent.
        """
        cdef const int32_t[::1] numbers = pages
        cdef int count = <int>numbers.shape[0], room
        if self.cache == NULL or not count or not 0 <= min(pages) <= max(pages) < self.cache.n_pages:
            raise InternalError(f"{count} pages to fetch")
        with nogil:
            room = pi2_neuron_cache_fetch(self.cache, &numbers[0], count)
        return bool(room)

    @property
    def waiting(self):
        """Pages whose reads have not begun."""
        return 0 if self.cache == NULL else pi2_neuron_cache_waiting(self.cache)

    @property
    def slots_used(self):
        return 0 if self.cache == NULL else self.cache.used

    @property
    def pinned_bytes(self):
        """Of the memory, those that reads through io_uring find pinned; others are pinned by each read."""
        return 0 if self.cache == NULL else pi2_flash_registered(self.cache.flash)

    @property
    def counters(self):
        cdef pi2_neuron_cache *c = self.cache
        if c == NULL:
            return self.last or Counters()
        return Counters(c.hits, c.early, c.misses, c.completed, c.evictions, c.reads_done, c.bytes, c.busy_ns,
                        c.stall_ns, c.gap_pages, c.gap_bytes)

    def close(self):
        """Joins the reader. Only after the gang that runs the program was closed. Returns the bytes of reads that have
        not ended, or 0: their device does not answer and may still write to the memory (``Memory.abandon``)."""
        cdef pi2_neuron_cache *cache = self.cache
        cdef int64_t left = 0
        if cache != NULL and self.owner == getpid():  # a forked child does not have the thread
            self.last = self.counters
            self.cache = NULL
            with nogil:
                left = pi2_neuron_cache_destroy(cache)
        return left

    def __dealloc__(self):
        if self.cache != NULL and self.owner == getpid():
            pi2_neuron_cache_destroy(self.cache)
        free(self.records)
        free(self.regions)
