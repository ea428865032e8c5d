from pi2rt.cython_kernels.kernels.declarations cimport pi2_kernels


cdef const pi2_kernels *find_variant(object name) except NULL
