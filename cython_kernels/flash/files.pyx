"""Files that are opened for reading past the page cache (flash.h)."""

from pi2rt.cython_kernels.flash.declarations cimport *

import os

from pi2rt.host.read_errors import open_failure

cdef dict IO = {"auto": PI2_IO_AUTO, "uring": PI2_IO_URING, "preadv": PI2_IO_PREADV}


cdef tuple probed():
    """(errno or 0, a sentence): whether this process may use io_uring."""
    cdef char why[96]
    cdef int error = pi2_uring_probe(why, sizeof(why))
    return error, (<bytes>why).decode()


def probe():
    """(whether this process may use io_uring, a sentence that says why)."""
    error, why = probed()
    return error == 0, why


cdef pi2_flash *open_file(object path, object name, object io, int depth) except NULL:
    """``name``: what errors call the file. ``io``: a key of IO. ``depth``: reads in flight. Releases the GIL."""
    cdef int error = 0
    cdef pi2_flash *flash
    if io not in IO:
        raise ValueError(f"io={io!r}: one of {', '.join(IO)}")
    cdef pi2_io way = IO[io]
    cdef bytes encoded = os.fsencode(path)
    if b"\0" in encoded:
        raise ValueError("embedded null byte in the path")
    cdef const char *file = encoded
    with nogil:  # it reads: a device may not answer
        flash = pi2_flash_open(file, way, depth, &error)
    if flash == NULL:
        # The probe tells an io_uring that is refused from a file that cannot be opened.
        raise open_failure(error, io, name, probed() if io == "uring" else (0, ""))
    return flash
