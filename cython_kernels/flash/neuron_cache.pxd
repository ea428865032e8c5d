from libc.stdint cimport int64_t
from posix.types cimport pid_t

from pi2rt.cython_kernels.flash.declarations cimport pi2_neuron_cache, pi2_read_record, pi2_region


cdef class NeuronCache:
    cdef pi2_neuron_cache *cache  # NULL where it is closed
    cdef pi2_region *regions
    cdef readonly int n_regions
    cdef readonly object path, deadline, io_reason
    cdef object last
    cdef pi2_read_record *records
    cdef int64_t n_records
    cdef pid_t owner
