from posix.types cimport pid_t

from pi2rt.cython_kernels.plane.declarations cimport pi2_gang


cdef class Gang:
    cdef pi2_gang *gang
    cdef pid_t owner
    cdef readonly tuple cores
