from pi2rt.cython_kernels.plane.declarations cimport pi2_cluster_unit


cdef class Mailbox:
    cdef pi2_cluster_unit *unit
    cdef readonly object x, out, deadline, failure
