"""The variants of the kernels in this build, one for each instruction set (kernels.h)."""

from pi2rt.cython_kernels.kernels.declarations cimport *

import os

from pi2rt._errors import KernelUnavailableError


cdef const pi2_kernels *find_variant(object name) except NULL:
    """The variant called ``name``, or with None: ``PI2RT_KERNELS`` of the environment, else the best that runs."""
    cdef const pi2_kernels *const *v = pi2_variants()
    cdef const pi2_kernels *best = NULL
    wanted = name if name is not None else os.environ.get("PI2RT_KERNELS")
    names = []
    while v[0] != NULL:
        this = v[0].name.decode()
        runs = bool(pi2_variant_runs(v[0]))
        names.append(this)
        if this == wanted:
            if not runs:
                raise KernelUnavailableError(f"kernel variant {wanted!r} is built in, but this processor cannot run it")
            return v[0]
        if runs:
            best = v[0]
        v += 1
    if wanted:
        raise KernelUnavailableError(f"no kernel variant {wanted!r} in this build; it has: {', '.join(names)}")
    return best


def variants():
    """Every variant in this build, worst first: ``(name, runs_here, float_lanes)``."""
    cdef const pi2_kernels *const *v = pi2_variants()
    found = []
    while v[0] != NULL:
        found.append((v[0].name.decode(), bool(pi2_variant_runs(v[0])), v[0].lanes))
        v += 1
    return tuple(found)


cdef class Variant:
    """A variant by its ``name``; None: that of ``PI2RT_KERNELS`` in the environment, else the best that runs here.

    Raises:
        KernelUnavailableError: it is not in this build, or this processor cannot run it.
    """

    def __cinit__(self, name=None):
        self.table = find_variant(name)

    @property
    def name(self):
        return self.table.name.decode()


def current(name=None):
    """Name of the variant that ``name`` (None: environment, then the best) selects."""
    return Variant(name).name
