from libc.stdint cimport int64_t, uintptr_t
from posix.types cimport pid_t


cdef class Memory:
    cdef uintptr_t base
    cdef pid_t owner  # the process that has it; a forked child may have something of its own in the same place
    cdef readonly int64_t nbytes

    cdef uintptr_t take(self)
