from libc.stdint cimport int64_t
from posix.types cimport pid_t

from pi2rt.cython_kernels.flash.declarations cimport pi2_extent, pi2_stream


cdef class Stream:
    cdef pi2_stream *stream  # NULL where it is closed
    cdef pi2_extent *units
    cdef readonly int n
    cdef readonly int64_t ring_bytes, lap_bytes
    cdef readonly object path, deadline, io_reason
    cdef pid_t owner
