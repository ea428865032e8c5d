from pi2rt.cython_kernels.plane.declarations cimport pi2_pick


cdef outcome(pi2_pick pick, top)
