"""Neuron bundles (bundles.h): sizes, and the way there and back."""

from libc.stdint cimport int64_t, uint8_t

from pi2rt.cython_kernels.kernels.declarations cimport *

import numpy as np

from pi2rt.cython_kernels.kernels.layout import TYPE_IDS


def up_quants(type_name, int64_t k):
    """Bytes of a neuron's up quants in a bundle; 0 where there are no bundles of that type or of rows of ``k`` values.
    Of this and all that follow, ``bundles.h`` has the layout."""
    return pi2_up_quants(TYPE_IDS[type_name], k)


def down_quants(type_name, int64_t rows):
    """Bytes of a neuron's down quants in a bundle; 0 where there are no bundles of that type."""
    return pi2_down_quants(TYPE_IDS[type_name], rows)


def up_scales(type_name, int64_t k):
    """Bytes of a neuron's up scales; 0 as for ``up_quants``."""
    return pi2_up_scales(TYPE_IDS[type_name], k)


def down_scales(type_name, int64_t rows):
    """Bytes of the down scales of 32 neurons; 0 as for ``down_quants``."""
    return pi2_down_scales(TYPE_IDS[type_name], rows)


cdef int bundle_layout(object layout, int64_t neurons, int64_t pages, int64_t begin, int64_t size,
                       pi2_bundle_layout *out) except -1:
    """Checks that ``neurons`` neurons with ``size`` bytes from byte ``begin`` on are inside ``pages`` bytes."""
    out.neurons_per_page, out.page_bytes, out.neuron_bytes, out.up_bytes = layout
    if out.neurons_per_page < 1 or out.page_bytes < out.neurons_per_page * out.neuron_bytes:
        raise ValueError(f"{layout}: neurons do not fit into their page")
    if size <= 0 or out.up_bytes < 0 or begin + size > out.neuron_bytes:
        raise ValueError(f"{layout}: {size} bytes of quants from byte {begin} on do not fit into a neuron")
    if pages < (neurons + out.neurons_per_page - 1) // out.neurons_per_page * out.page_bytes:
        raise ValueError(f"{pages} bytes for the pages of {neurons} neurons, {layout}")
    return 0


cdef int scales_length(object scales, int64_t expected) except -1:
    if scales is not None and len(scales) != expected:
        raise ValueError(f"{len(scales)} bytes of scales, not {expected}")
    return 0


def bundle_up(type_name, const uint8_t[::1] source, int64_t n, int64_t k, layout, uint8_t[::1] to, uint8_t[::1] scales,
              *, int64_t at_byte=0):
    """Puts ``n`` rows of a model file's bytes into bundles: quants to the pages ``to``, scales to ``scales``
    (n * ``up_scales``); either may be None. Releases the GIL.

    Args:
        layout: (neurons per page, bytes of a page, of a neuron, of its gate and up quants).
        at_byte: where in a neuron its row begins: behind the gate's, where that is in the bundles too.
    Returns: None, or the index of the first row with a scale that is not finite.
    """
    cdef int type_id = TYPE_IDS[type_name]
    cdef int64_t bad, size = pi2_up_quants(type_id, k)
    cdef pi2_bundle_layout at
    cdef uint8_t *pages = NULL
    cdef uint8_t *numbers = NULL
    bundle_layout(layout, n if to is not None else 0, to.shape[0] if to is not None else 0, at_byte, size, &at)
    if at_byte < 0 or at_byte + size > at.up_bytes:
        raise ValueError(f"{layout}: up quants take {size} bytes, from byte {at_byte} on")
    scales_length(scales, n * pi2_up_scales(type_id, k))
    if n < 0 or source.shape[0] != n * pi2_row_bytes(type_id, k):
        raise ValueError(f"{source.shape[0]} bytes for {n} rows of {k} {type_name} values")
    if n == 0:
        return None
    if to is not None:
        pages = &to[0] + at_byte
    if scales is not None:
        numbers = &scales[0]
    with nogil:
        bad = pi2_bundle_up(type_id, &source[0], n, k, &at, pages, numbers)
    return bad - 1 if bad else None


def bundle_down(type_name, const uint8_t[::1] source, int64_t rows, int64_t hidden, int64_t first, int64_t count,
                layout, uint8_t[::1] to, uint8_t[::1] scales):
    """As ``bundle_up``, of columns ``first`` to ``first + count`` (multiples of 32) of a matrix (rows, hidden), all of
    whose bytes are in ``source``; scales: count / 32 * ``down_scales``. Returns the index of a row."""
    cdef int type_id = TYPE_IDS[type_name]
    cdef int64_t bad, size = pi2_down_quants(type_id, rows)
    cdef pi2_bundle_layout at
    cdef uint8_t *pages = NULL
    cdef uint8_t *numbers = NULL
    if first < 0 or count < 0 or first % 32 or count % 32 or hidden % 32 or first + count > hidden:
        raise ValueError(f"neurons {first} to {first + count} of {hidden}: not whole blocks of 32")
    bundle_layout(layout, count if to is not None else 0, to.shape[0] if to is not None else 0, layout[3], size, &at)
    scales_length(scales, count // 32 * pi2_down_scales(type_id, rows))
    if source.shape[0] != rows * pi2_row_bytes(type_id, hidden):
        raise ValueError(f"{source.shape[0]} bytes for {rows} rows of {hidden} {type_name} values")
    if count == 0:
        return None
    if to is not None:
        pages = &to[0]
    if scales is not None:
        numbers = &scales[0]
    with nogil:
        bad = pi2_bundle_down(type_id, &source[0], rows, hidden, first, count, &at, pages, numbers)
    return bad - 1 if bad else None


def unbundle_up(type_name, const uint8_t[::1] pages, const uint8_t[::1] scales, int64_t n, int64_t k, layout, *,
                int64_t at_byte=0):
    """Bundles back to float32 (n, k), the first ``n`` up (or gate) rows in ``pages``, with the file format's own
    arithmetic. ``at_byte``: as ``bundle_up``."""
    cdef int type_id = TYPE_IDS[type_name]
    cdef pi2_bundle_layout at
    if n < 0 or at_byte < 0:
        raise ValueError(f"{n} neurons, from byte {at_byte} on")
    bundle_layout(layout, n, pages.shape[0], at_byte, pi2_up_quants(type_id, k), &at)
    scales_length(scales, n * pi2_up_scales(type_id, k))
    out = np.empty((n, k), np.float32)
    cdef float[:, ::1] o = out
    if n:
        with nogil:
            pi2_unbundle_up(type_id, &pages[0] + at_byte, &scales[0], n, k, &at, &o[0, 0])
    return out


def unbundle_down(type_name, const uint8_t[::1] pages, const uint8_t[::1] scales, int64_t rows, int64_t n, layout):
    """As ``unbundle_up``: float32 (rows, n), the down columns of ``n`` neurons, a multiple of 32."""
    cdef int type_id = TYPE_IDS[type_name]
    cdef pi2_bundle_layout at
    if n < 0 or n % 32:
        raise ValueError(f"{n} neurons: not a multiple of 32")
    bundle_layout(layout, n, pages.shape[0], layout[3], pi2_down_quants(type_id, rows), &at)
    scales_length(scales, n // 32 * pi2_down_scales(type_id, rows))
    out = np.empty((rows, n), np.float32)
    cdef float[:, ::1] o = out
    if n:
        with nogil:
            pi2_unbundle_down(type_id, &pages[0], &scales[0], rows, n, &at, &o[0, 0], n)
    return out
