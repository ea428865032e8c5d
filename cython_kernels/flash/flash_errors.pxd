# Why pi2_flash_open has failed, for the modules that open files with it.
cdef extern from "flash.h" nogil:
    int pi2_uring_probe(char *, int)

cdef inline object open_error(int error, object io, object path):
    """An exception. The probe tells an io_uring that is refused from a file that cannot be opened."""
    from pi2rt.host.read_errors import open_failure
    cdef char why[96]
    cdef int refused = 0
    why[0] = 0
    if io == "uring":
        refused = pi2_uring_probe(why, sizeof(why))
    return open_failure(error, io, path, (refused, (<bytes>why).decode()))
