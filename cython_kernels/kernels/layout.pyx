"""Weights as row blocks (kernels.h): types, sizes, and the way there and back."""

from libc.stdint cimport int64_t, uint8_t, uintptr_t

from pi2rt.cython_kernels.kernels.declarations cimport *

import numpy as np

TYPE_IDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13,
            "Q6_K": 14, "BF16": 30}
KV_TYPES = {"f16": 0, "q8": 1, "f32": 2}
ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu2": 5}


def row_bytes(type_name, int64_t k):
    """Bytes of one row of ``k`` values in a model file; 0 where k is no multiple of the type's block."""
    return pi2_row_bytes(TYPE_IDS[type_name], k)


def matrix_bytes(type_name, int64_t rows, int64_t k):
    """Bytes of a (rows, k) matrix as row blocks."""
    return (rows + PI2_ROWS - 1) // PI2_ROWS * pi2_row_block_bytes(TYPE_IDS[type_name], k)


def kv_half_bytes(kv_type, int64_t head_dim):
    """Bytes of the keys (or values) of one page, layer and KV head; ``head_dim`` a multiple of 16."""
    return PI2_PAGE * {"f16": 2 * head_dim, "f32": 4 * head_dim, "q8": head_dim + 4}[kv_type]


def repack(type_name, const uint8_t[::1] source, int64_t rows, int64_t k, uintptr_t address):
    """Puts ``rows`` rows of a model file's bytes into row blocks at ``address`` (64-byte aligned, ``matrix_bytes``
    long). Releases the GIL. Returns None, or the index of the first row with a scale or value that is not finite."""
    cdef int type_id = TYPE_IDS[type_name]
    cdef int64_t bad
    if source.shape[0] != rows * pi2_row_bytes(type_id, k):
        raise ValueError(f"{source.shape[0]} bytes for {rows} rows of {k} {type_name} values")
    if address % 64 or not address:
        raise ValueError("address must be a multiple of 64")
    if rows == 0 or k == 0:
        return None
    with nogil:
        bad = pi2_repack(type_id, &source[0], rows, k, <uint8_t *>address)
    return bad - 1 if bad else None


def unpack(type_name, uintptr_t address, int64_t rows, int64_t k):
    """Row blocks back to float32 (rows, k), with the file format's own arithmetic."""
    cdef int type_id = TYPE_IDS[type_name]
    out = np.empty((rows, k), np.float32)
    cdef float[:, ::1] o = out
    cdef int64_t i
    if rows and k:
        for i in range(rows):
            pi2_unpack_row(type_id, <const uint8_t *>address, k, i, &o[i, 0])
    return out
