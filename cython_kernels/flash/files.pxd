from pi2rt.cython_kernels.flash.declarations cimport pi2_flash


cdef pi2_flash *open_file(object path, object name, object io, int depth) except NULL
