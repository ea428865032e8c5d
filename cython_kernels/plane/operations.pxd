from libc.stdint cimport int64_t
from posix.types cimport pid_t

from pi2rt.cython_kernels.flash.neuron_cache cimport NeuronCache
from pi2rt.cython_kernels.flash.rows cimport Rows
from pi2rt.cython_kernels.flash.stream cimport Stream
from pi2rt.cython_kernels.plane.cluster_unit cimport Mailbox
from pi2rt.cython_kernels.plane.declarations cimport *
from pi2rt.cython_kernels.plane.gang cimport Gang


cdef class Operations:
    cdef pi2_program p
    cdef Gang gang
    cdef Stream stream
    cdef NeuronCache neurons, clusters
    cdef Rows rows
    cdef int next_unit
    cdef list keep
    cdef float embedding_scale, logit_softcap
    cdef bint measured, prepared, only_measured
    cdef readonly int64_t weight_bytes
    cdef pid_t owner

    cdef pi2_op *operation(self, int kind, int layer) except NULL
    cdef pi2_norm norm_of(self, norm) except *
    cdef int set_matrices(self, pi2_op *op, matrices) except -1
    cdef int set_unit(self, pi2_op *op, Mailbox mailbox) except -1
