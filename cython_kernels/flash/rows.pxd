from posix.types cimport pid_t

from pi2rt.cython_kernels.flash.declarations cimport pi2_row_reader


cdef class Rows:
    cdef pi2_row_reader *rows  # NULL where it is closed
    cdef readonly object path, deadline
    cdef pid_t owner
