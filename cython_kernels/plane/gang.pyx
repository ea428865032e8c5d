"""A gang of native threads (gang.h)."""

from libc.errno cimport errno
from libc.stdint cimport int64_t
from posix.unistd cimport getpid

from pi2rt.cython_kernels.plane.declarations cimport *

import os

from pi2rt.host.limits import system_failure


cdef class Gang:
    """Native threads, one per entry of ``cores`` (-1: not pinned), asleep until a program is posted.

    ``event_fd`` becomes readable when a run has finished. ``close()`` joins the threads after finishing what was
    posted; it may block for one run, so stop runs first.
    """

    def __cinit__(self, cores, *, int64_t spin_ns=50_000):
        cdef int[256] c
        self.owner = getpid()
        self.cores = tuple(cores)
        if not 0 < len(self.cores) <= 256:
            raise ValueError(f"{len(self.cores)} threads: 1 to 256")
        for i, core in enumerate(self.cores):
            c[i] = core
        self.gang = pi2_gang_create(<int>len(self.cores), c, spin_ns)
        if self.gang == NULL:
            error = errno
            what = f"starting {len(self.cores)} compute threads"
            raise system_failure(what, error) or OSError(error, os.strerror(error))

    @property
    def event_fd(self):
        if self.gang == NULL:
            raise ValueError("gang is closed")
        return self.gang.event_fd

    def close(self):
        cdef pi2_gang *gang = self.gang
        self.gang = NULL
        if gang != NULL and self.owner == getpid():  # a forked child does not have the threads
            with nogil:
                pi2_gang_destroy(gang)

    def __dealloc__(self):
        if self.gang != NULL and self.owner == getpid():
            pi2_gang_destroy(self.gang)
