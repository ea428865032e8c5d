"""Memory outside the interpreter (pages.h), and what the C heap keeps."""

from cpython.buffer cimport PyBUF_WRITE
from cpython.memoryview cimport PyMemoryView_FromMemory
from libc.errno cimport errno
from libc.stdint cimport int64_t, uintptr_t
from posix.unistd cimport getpid

import os

import numpy as np

from pi2rt.host.limits import system_failure

cdef extern from "pages.h" nogil:
    int64_t pi2_page_bytes()
    int64_t pi2_huge_page_bytes()
    void *pi2_pages_map(int64_t, int)
    void pi2_pages_small(void *, int64_t)
    void pi2_pages_unmap(void *, int64_t)
    int pi2_pages_discard(void *, int64_t)
    int pi2_pages_abandon(void *, int64_t)

cdef extern from *:
    """
    #include <stdlib.h>
    #ifdef __GLIBC__
    #include <malloc.h>
    static void pi2_trim_heap(void) { malloc_trim(0); }
    /* Setting either ends their growth: glibc raises both, to 32 and 64 MiB, when a large block is freed. */
    static void pi2_fix_heap_thresholds(int bytes) {
      mallopt(M_MMAP_THRESHOLD, bytes);
      mallopt(M_TRIM_THRESHOLD, bytes);
    }
    #else
    static void pi2_trim_heap(void) {}
    static void pi2_fix_heap_thresholds(int bytes) { (void)bytes; }
    #endif
    """
    void pi2_trim_heap() nogil
    void pi2_fix_heap_thresholds(int)


def page_bytes():
    """Bytes of a page of this system's memory."""
    return pi2_page_bytes()


def huge_page_bytes():
    """Bytes of a transparent huge page of this system."""
    return pi2_huge_page_bytes()


cdef class Memory:
    """Anonymous memory outside the interpreter: zeroed, page-aligned, resident only where touched (to the page of the
    system without ``huge_pages``). A forked child does not have it (``pages.h`` says why): there it is closed, and a
    view over it must not be used.

    ``address`` and ``nbytes``; ``view()`` is a uint8 array over it that must not outlive it; ``close()`` gives it back.

    Python code divides such memory by adding to its address, for weights, KV pages, slots of fixed arrays, rings and
    caches. So only addresses of such memory cross from module to module as integers. Who takes one says what must be
    there, and for how long. All other native things cross as objects of their class.
    """

    def __cinit__(self, int64_t nbytes, *, bint huge_pages=True):
        if nbytes <= 0:
            raise ValueError(f"nbytes={nbytes}: must be positive")
        cdef void *p = pi2_pages_map(nbytes, huge_pages)
        if p == NULL:
            error = errno
            what = "memory for weights, keys and values or buffers"
            raise system_failure(what, error, nbytes) or OSError(error, os.strerror(error))
        if not huge_pages:
            pi2_pages_small(p, nbytes)
        self.base = <uintptr_t>p
        self.owner = getpid()
        self.nbytes = nbytes

    @property
    def address(self):
        """0 where it is closed."""
        return self.base if self.owner == getpid() else 0

    cdef uintptr_t take(self):
        """Its address, which from now on is the caller's; 0 where it is closed."""
        cdef uintptr_t base = self.base if self.owner == getpid() else 0
        self.base = 0
        return base

    def view(self):
        cdef uintptr_t base = self.address
        if not base:
            raise ValueError("memory is closed")
        return np.frombuffer(PyMemoryView_FromMemory(<char *>base, self.nbytes, PyBUF_WRITE), np.uint8)

    def discard(self, int64_t offset, int64_t size):
        """Gives the whole pages among these bytes back to the system: they read as zeros until written again. What
        is at the ends of the range and is no whole page keeps its memory and its content."""
        cdef uintptr_t base = self.address
        if base == 0 or offset < 0 or size < 0 or size > self.nbytes - offset:
            raise ValueError(f"{size} bytes from byte {offset} on are not in {self.nbytes} bytes")
        cdef int error = pi2_pages_discard(<void *>(base + offset), size)
        if error:
            raise OSError(error, f"giving {size} bytes back: {os.strerror(error)}")

    def close(self):
        cdef uintptr_t base = self.take()
        if base:
            pi2_pages_unmap(<void *>base, self.nbytes)

    def abandon(self):
        """In place of ``close``, where a device may still write to it: its addresses stay taken for good, and its
        memory is given back, but for the pages of reads that have not ended, which the system keeps until then. Returns
        whether that could be done; if not, all of it stays."""
        cdef uintptr_t base = self.take()
        return not base or not pi2_pages_abandon(<void *>base, self.nbytes)

    def __dealloc__(self):
        if self.base and self.owner == getpid():
            pi2_pages_unmap(<void *>self.base, self.nbytes)


def trim_heap():
    """Gives freed memory of the C heap back to the system, where the C library can."""
    with nogil:
        pi2_trim_heap()


def fix_heap_thresholds(int nbytes):
    """Makes the C heap give blocks of ``nbytes`` and more back as soon as they are freed, and keep no more than that at
    the end of each thread's heap, where the C library can (glibc)."""
    pi2_fix_heap_thresholds(nbytes)
