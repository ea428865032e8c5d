from pi2rt.cython_kernels.plane.declarations cimport pi2_bundles, pi2_matrix


cdef class Matrix:
    cdef pi2_matrix m
    cdef object bias


cdef class Bundles:
    cdef pi2_bundles b
    cdef list keep
