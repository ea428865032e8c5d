"""Rows of a matrix that stays on flash (rows.h)."""

from libc.stdint cimport int64_t, uint8_t, uintptr_t
from posix.unistd cimport getpid

from pi2rt.cython_kernels.flash.declarations cimport *
from pi2rt.cython_kernels.flash.files cimport open_file

from pi2rt._errors import InternalError
from pi2rt.host.limits import memory_failure


def memory_bytes(int type_id, int64_t k):
    """Bytes of memory that ``Rows`` need for a matrix of ``k`` columns."""
    return PI2_ROWS_DEPTH * pi2_rows_buffer(type_id, k)


cdef class Rows:
    """Reads rows of the matrix of ``k`` columns whose row blocks lie at ``offset`` in ``path``.

    ``memory``: address of ``memory_bytes``, aligned to PI2_SECTOR, which outlives this. ``name``: what errors call
    the file, where that is not ``path``. ``deadline``: seconds; when no read in flight ends for so long, reading fails.
    """

    def __cinit__(self, path, int type_id, int64_t k, int64_t offset, uintptr_t memory, *, name=None, deadline=None):
        cdef pi2_flash *flash
        self.owner = getpid()
        self.path, self.deadline = path if name is None else name, deadline
        if k < 1 or offset < 0 or memory % PI2_SECTOR:
            raise InternalError(f"rows of {k} values at {offset}")
        flash = open_file(path, self.path, "preadv", PI2_ROWS_DEPTH)
        self.rows = pi2_rows_create(flash, type_id, k, offset, <uint8_t *>memory,
                                    -1 if deadline is None else <int64_t>(deadline * 1e9))
        if self.rows == NULL:
            pi2_flash_close(flash, -1)
            raise memory_failure("reading rows of an embedding", sizeof(pi2_row_reader))

    @property
    def ended_at(self):
        """The offset at which the file ended too early, in a read that failed for that; else -1."""
        return -1 if self.rows == NULL else pi2_flash_ended_at(self.rows.flash)

    @property
    def reads(self):
        """That have ended."""
        return 0 if self.rows == NULL else pi2_flash_reads(self.rows.flash)

    def close(self):
        """Only after the gang that runs the program was closed. Returns the bytes of reads that have not ended, or 0:
        their device does not answer and may still write to the memory (``Memory.abandon``)."""
        cdef pi2_row_reader *rows = self.rows
        cdef int64_t left = 0
        self.rows = NULL
        if rows != NULL and self.owner == getpid():  # a forked child does not have the threads
            with nogil:
                left = pi2_rows_destroy(rows)
        return left

    def __dealloc__(self):
        if self.rows != NULL and self.owner == getpid():
            pi2_rows_destroy(self.rows)
