from pi2rt.cython_kernels.kernels.declarations cimport pi2_kernels


cdef class Variant:
    cdef const pi2_kernels *table  # of its functions; never NULL
