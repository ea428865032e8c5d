"""Weight layout, memory, and every kernel by itself (for tests and measurements)."""

from libc.errno cimport errno
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint64_t, uintptr_t
from posix.types cimport pid_t
from posix.unistd cimport getpid

from declarations cimport *

import os

import numpy as np

from pi2rt._errors import KernelUnavailableError
from pi2rt.host.limits import system_failure

cdef extern from "pages.h" nogil:
    int64_t pi2_page_bytes()
    int64_t pi2_huge_page_bytes()
    void *pi2_pages_map(int64_t, int)
    void pi2_pages_small(void *, int64_t)
    void pi2_pages_unmap(void *, int64_t)
    int pi2_pages_discard(void *, int64_t)
    int pi2_pages_abandon(void *, int64_t)

cdef extern from *:
    """
    #include <stdlib.h>
    #ifdef __GLIBC__
    #include <malloc.h>
    static void pi2_trim_heap(void) { malloc_trim(0); }
    /* Setting either ends their growth: glibc raises both, to 32 and 64 MiB, when a large block is freed. */
    static void pi2_fix_heap_thresholds(int bytes) {
      mallopt(M_MMAP_THRESHOLD, bytes);
      mallopt(M_TRIM_THRESHOLD, bytes);
    }
    #else
    static void pi2_trim_heap(void) {}
    static void pi2_fix_heap_thresholds(int bytes) { (void)bytes; }
    #endif
    """
    void pi2_trim_heap() nogil
    void pi2_fix_heap_thresholds(int)

cdef extern from "elementary.h" nogil:
    void pi2_rotation(const double *, int64_t, int32_t, float, float *, float *)
    double pi2_exp(double)

cdef extern from "bundles.h" nogil:
    ctypedef struct pi2_bundle_layout:
        int64_t neurons_per_page, page_bytes, neuron_bytes, up_bytes
    int64_t pi2_up_quants(int, int64_t)
    int64_t pi2_down_quants(int, int64_t)
    int64_t pi2_up_scales(int, int64_t)
    int64_t pi2_down_scales(int, int64_t)
    int64_t pi2_bundle_up(int, const uint8_t *, int64_t, int64_t, const pi2_bundle_layout *, uint8_t *, uint8_t *)
    int64_t pi2_bundle_down(int, const uint8_t *, int64_t, int64_t, int64_t, int64_t, const pi2_bundle_layout *,
                            uint8_t *, uint8_t *)
    void pi2_unbundle_up(int, const uint8_t *, const uint8_t *, int64_t, int64_t, const pi2_bundle_layout *, float *)
    void pi2_unbundle_down(int, const uint8_t *, const uint8_t *, int64_t, int64_t, const pi2_bundle_layout *, float *,
                           int64_t)

TYPE_IDS = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q5_0": 6, "Q5_1": 7, "Q8_0": 8, "Q4_K": 12, "Q5_K": 13,
            "Q6_K": 14, "BF16": 30}
KV_TYPES = {"f16": 0, "q8": 1, "f32": 2}
ACTIVATIONS = {None: 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, "relu2": 5}


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


def current(name=None):
    """Name of the variant that ``name`` (None: environment, then the best) selects."""
    return find_variant(name).name.decode()


def kernels_address(name=None):
    """Address of a variant's table, for ``program``."""
    return <uintptr_t>find_variant(name)


def page_bytes():
    """Bytes of a page of this system's memory."""
    return pi2_page_bytes()


def huge_page_bytes():
    """Bytes of a transparent huge page of this system."""
    return pi2_huge_page_bytes()


cdef class Memory:
    """Anonymous memory outside the interpreter: zeroed, page-aligned, resident only where touched (to the page of the
    system without ``huge_pages``). A forked child does not have it (``pages.h`` says why): there it is closed, and a
    view over it must not be used.

    ``address`` and ``nbytes``; ``view()`` is a uint8 array over it that must not outlive it; ``close()`` gives it back.
    """

    cdef uintptr_t base
    cdef pid_t owner  # the process that has it; a forked child may have something of its own in the same place
    cdef readonly int64_t nbytes

    def __cinit__(self, int64_t nbytes, *, bint huge_pages=True):
        if nbytes <= 0:
            raise ValueError(f"nbytes={nbytes}: must be positive")
        cdef void *p = pi2_pages_map(nbytes, huge_pages)
        if p == NULL:
            error = errno
            what = "memory for weights, keys and values or buffers"
            raise system_failure(what, error, nbytes) or OSError(error, os.strerror(error))
        if not huge_pages:
            pi2_pages_small(p, nbytes)
        self.base = <uintptr_t>p
        self.owner = getpid()
        self.nbytes = nbytes

    @property
    def address(self):
        """0 where it is closed."""
        return self.base if self.owner == getpid() else 0

    cdef uintptr_t take(self):
        """Its address, which from now on is the caller's; 0 where it is closed."""
        cdef uintptr_t base = self.base if self.owner == getpid() else 0
        self.base = 0
        return base

    def view(self):
        cdef uintptr_t base = self.address
        if not base:
            raise ValueError("memory is closed")
        return np.asarray(<uint8_t[:self.nbytes]><uint8_t *>base)

    def discard(self, int64_t offset, int64_t size):
        """Gives the whole pages among these bytes back to the system: they read as zeros until written again. What
        is at the ends of the range and is no whole page keeps its memory and its content."""
        cdef uintptr_t base = self.address
        if base == 0 or offset < 0 or size < 0 or size > self.nbytes - offset:
            raise ValueError(f"{size} bytes from byte {offset} on are not in {self.nbytes} bytes")
        cdef int error = pi2_pages_discard(<void *>(base + offset), size)
        if error:
            raise OSError(error, f"giving {size} bytes back: {os.strerror(error)}")

    def close(self):
        cdef uintptr_t base = self.take()
        if base:
            pi2_pages_unmap(<void *>base, self.nbytes)

    def abandon(self):
        """In place of ``close``, where a device may still write to it: its addresses stay taken for good, and its
        memory is given back, but for the pages of reads that have not ended, which the system keeps until then. Returns
        whether that could be done; if not, all of it stays."""
        cdef uintptr_t base = self.take()
        return not base or not pi2_pages_abandon(<void *>base, self.nbytes)

    def __dealloc__(self):
        if self.base and self.owner == getpid():
            pi2_pages_unmap(<void *>self.base, self.nbytes)


def trim_heap():
    """Gives freed memory of the C heap back to the system, where the C library can."""
    with nogil:
        pi2_trim_heap()


def fix_heap_thresholds(int nbytes):
    """Makes the C heap give blocks of ``nbytes`` and more back as soon as they are freed, and keep no more than that at
    the end of each thread's heap, where the C library can (glibc)."""
    pi2_fix_heap_thresholds(nbytes)


def rotations(const double[::1] frequencies, int32_t first, int32_t count, float magnitude=1.0):
    """Cosines and sines, float32 (count, frequencies), of positions ``first`` to ``first + count``, times
    ``magnitude``: those that a program rotates by."""
    cdef int64_t half = frequencies.shape[0]
    cosines, sines = np.empty((2, count, half), np.float32)
    cdef float[:, ::1] c = cosines, s = sines
    cdef int32_t i
    if half:
        with nogil:
            for i in range(count):
                pi2_rotation(&frequencies[0], half, first + i, magnitude, &c[i, 0], &s[i, 0])
    return cosines, sines


def exponential(const double[::1] x):
    """e to the power of each, as the native code has it where it softens choices and draws tokens."""
    out = np.empty(x.shape[0])
    cdef double[::1] o = out
    cdef int64_t i
    for i in range(x.shape[0]):
        o[i] = pi2_exp(x[i])
    return out


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


def read_bandwidth(int64_t nbytes, int threads, int repeats=3, name=None):
    """Bytes per second that ``threads`` threads together read from ``nbytes`` of memory, best of ``repeats``."""
    from concurrent.futures import ThreadPoolExecutor
    from time import perf_counter

    share = nbytes // threads // 256 * 256
    blocks = [Memory(share) for _ in range(threads)]
    for block in blocks:
        block.view()[:] = 1
    best = 0.0
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(repeats):
            start = perf_counter()
            list(pool.map(lambda block: _read(block, name), blocks))
            best = max(best, share * threads / (perf_counter() - start))
    for block in blocks:
        block.close()
    return best


def _read(Memory block, name):
    cdef const pi2_kernels *k = find_variant(name)
    cdef uint64_t sum
    with nogil:
        sum = k.read(<const uint8_t *>block.base, block.nbytes)
    return sum


cdef pi2_quantizer quantizer(const pi2_kernels *k, bint wide, bint mixed) noexcept:
    return k.quantize_mixed if wide and mixed else k.quantize16 if wide else k.quantize8


cdef class Kernels:
    """One variant's kernels, callable from Python on numpy arrays. Shapes are checked; speed is not the point."""

    cdef const pi2_kernels *k

    def __init__(self, name=None):
        self.k = find_variant(name)

    @property
    def name(self):
        return self.k.name.decode()

    def quantize(self, const float[::1] x, *, bint wide=False, bint mixed=False):
        """float32 (n,), n a multiple of 32, to (q int8 or int16 (n,), d, s float32 (n/32,), h int16 (n/16,)). int16
        values come in the file's order, not in the kernel's. ``mixed``: and their high and low bytes, int8 (n,) each;
        kernels.h says what h and they are."""
        cdef int64_t n = x.shape[0]
        if n % 32:
            raise ValueError(f"{n} values: not a multiple of 32")
        q = np.zeros(n * 2 if wide else n, np.int8)
        bytes_of = np.zeros((2, n), np.int8)
        d = np.empty(n // 32, np.float32)
        s = np.empty(n // 32, np.float32)
        h = np.zeros(n // 16, np.int16)
        cdef int8_t[::1] qv = q
        cdef float[::1] dv = d, sv = s
        cdef int16_t[::1] hv = h
        cdef int8_t[:, ::1] both = bytes_of
        cdef pi2_q8 row
        if n:
            row.q, row.d, row.s, row.h, row.high, row.low = &qv[0], &dv[0], &sv[0], &hv[0], &both[0, 0], &both[1, 0]
            quantizer(self.k, wide, mixed)(&x[0], n, &row)
        if wide:
            q = q.view(np.int16).reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(-1)
        return (q, d, s, h, *bytes_of) if mixed else (q, d, s, h)

    def gemm(self, type_name, uintptr_t address, int64_t rows, int64_t k, const float[:, ::1] x, *, bint wide=False,
             bint mixed=False, bint panels=False):
        """W (rows, k) as row blocks at ``address`` times x float32 (n, k): (n, rows). Where W is quantised, activations
        become int16 (``wide``, some of 8 bits where also ``mixed``) or int8, and row blocks are multiplied all in one
        call (``panels``) or one by one."""
        cdef int type_id = TYPE_IDS[type_name]
        cdef int64_t n = x.shape[0], size = pi2_row_block_bytes(type_id, k), blocks = (rows + 15) // 16, b
        cdef int64_t ldq = k * (2 if wide else 1)
        cdef bint is_float = self.k.gemm8[type_id] == NULL
        cdef pi2_gemm gemm = self.k.gemm16[type_id] if wide else self.k.gemm8[type_id]
        cdef pi2_panel panel = self.k.panel16[type_id] if wide else self.k.panel8[type_id]
        cdef pi2_q8 q8, row
        cdef int8_t[:, ::1] q, high, low
        cdef float[:, ::1] d, s, o
        cdef int16_t[:, ::1] h
        if x.shape[1] != k:
            raise ValueError(f"x has {x.shape[1]} columns, W {k}")
        out = np.zeros((n, blocks * 16), np.float32)
        if n == 0 or rows == 0 or k == 0:
            return out[:, :rows]
        o = out
        if not is_float:
            q = np.empty((n, ldq), np.int8)
            d = np.empty((n, k // 32), np.float32)
            s = np.empty((n, k // 32), np.float32)
            h = np.empty((n, k // 16), np.int16)
            high = np.empty((n, k), np.int8)
            low = np.empty((n, k), np.int8)
            q8.q, q8.d, q8.s, q8.h, q8.ldq, q8.ldb = &q[0, 0], &d[0, 0], &s[0, 0], &h[0, 0], ldq, k // 32
            q8.high, q8.low, q8.ldh = &high[0, 0] if mixed else NULL, &low[0, 0], k
            for b in range(n):
                row.q, row.d, row.s, row.h = &q[b, 0], &d[b, 0], &s[b, 0], &h[b, 0]
                row.high, row.low = &high[b, 0], &low[b, 0]
                quantizer(self.k, wide, mixed)(&x[b, 0], k, &row)
        b = 0
        if panels and not is_float:
            panel(<const uint8_t *>address, size, <int>blocks, k, &q8, <int>n, &o[0, 0], blocks * 16)
            b = blocks
        for b in range(b, blocks):
            if is_float:
                self.k.gemm_float[type_id](<const uint8_t *>address + b * size, k, &x[0, 0], k, <int>n, &o[0, b * 16],
                                           blocks * 16)
            else:
                gemm(<const uint8_t *>address + b * size, k, &q8, <int>n, &o[0, b * 16], blocks * 16)
        return out[:, :rows]

    def neuron_rows(self, type_name, pages, scales, layout, neurons, const float[::1] x, *, bint wide=False):
        """Products of up rows in bundles (``bundle_up``), those of ``neurons`` (numbers), with x (k,): float32 (n,)."""
        cdef int type_id = TYPE_IDS[type_name]
        cdef int64_t k = x.shape[0], stride = pi2_up_scales(type_id, k), at, i, n = len(neurons)
        cdef const uint8_t[::1] page = pages, scale = scales
        cdef const uint8_t *rows[16]
        cdef const uint8_t *numbers[16]
        cdef pi2_q8 q8
        cdef Memory arranged = Memory(2 * (k + 512) + 8 * (k // 32 + 16) + 256)
        cdef int16_t *order = <int16_t *>arranged.base
        cdef float *d = <float *>(arranged.base + (k + 511) // 512 * 1024)
        cdef float *s = d + (k // 32 + 15) // 16 * 16
        q, scale_d, scale_s, sums = self.quantize(x, wide=wide)
        cdef int8_t[::1] qv = q.view(np.int8)
        cdef float[::1] dv = scale_d, sv = scale_s
        out = np.empty(n, np.float32)
        cdef float[::1] o = out
        if not n or not k:
            return np.zeros(n, np.float32)
        if wide:  # quantize gives the plain order
            stored = np.ascontiguousarray(q.reshape(-1, 4)[:, [0, 2, 1, 3]].reshape(-1))
            qv = stored.view(np.int8)
        q8.q, q8.d, q8.s, q8.ldq, q8.ldb = &qv[0], &dv[0], &sv[0], k, k // 32
        pi2_arrange(&q8, wide, k, order, d, s)
        per_page, page_bytes, neuron_bytes, _ = layout
        for at in range(0, n, 16):
            for i in range(min(16, n - at)):
                number = neurons[at + i]
                rows[i] = &page[number // per_page * page_bytes + number % per_page * neuron_bytes]
                numbers[i] = &scale[number * stride]
            self.k.neuron_rows[type_id](rows, numbers, <int>min(16, n - at), k, order, d, s, &o[at])
        arranged.close()
        return out

    def neuron_columns(self, type_name, pages, scales, layout, const float[::1] h, int64_t rows, *, bint wide=False):
        """Product of the down columns of one group of 32 neurons in bundles (``bundle_down``) with their values h
        (32,): float32 (rows,). Neurons whose value becomes 0 are left out."""
        cdef int type_id = TYPE_IDS[type_name]
        cdef int64_t padded = (rows + 127) // 128 * 128
        cdef const uint8_t[::1] page = pages, scale = scales
        cdef const uint8_t *columns[32]
        cdef int16_t values[32]
        cdef int m = 0
        q, d, s, _ = self.quantize(h, wide=wide)
        out = np.zeros(padded, np.float32)
        cdef float[::1] o = out
        per_page, page_bytes, neuron_bytes, up_bytes = layout
        for i in range(32):
            if q[i]:
                columns[m] = &page[i // per_page * page_bytes + i % per_page * neuron_bytes + up_bytes]
                values[m] = q[i]
                m += 1
        if m:
            self.k.neuron_columns[type_id](columns, values, m, &scale[0], pi2_down_scales(type_id, rows) // 2, d[0],
                                           s[0], padded, &o[0])
        return out[:rows]

    def rmsnorm(self, const float[::1] x, const float[::1] w, float offset, float eps):
        if x.shape[0] != w.shape[0]:
            raise ValueError("x and w differ in length")
        out = np.empty(x.shape[0], np.float32)
        cdef float[::1] o = out
        if x.shape[0]:
            self.k.rmsnorm(&x[0], &w[0], offset, eps, &o[0], x.shape[0])
        return out

    def activate(self, activation, up_activation, gate, const float[::1] up):
        """act(gate) * up_act(up); gate None: act(up)."""
        cdef const float[::1] g
        out = np.empty(up.shape[0], np.float32)
        cdef float[::1] o = out
        if not up.shape[0]:
            return out
        if gate is None:
            self.k.activate(ACTIVATIONS[activation], ACTIVATIONS[up_activation], NULL, &up[0], &o[0], up.shape[0])
        else:
            g = gate
            if g.shape[0] != up.shape[0]:
                raise ValueError("gate and up differ in length")
            self.k.activate(ACTIVATIONS[activation], ACTIVATIONS[up_activation], &g[0], &up[0], &o[0], up.shape[0])
        return out

    def rope(self, const float[::1] x, const float[::1] cosine, const float[::1] sine, bint interleaved):
        if sine.shape[0] != cosine.shape[0] or 2 * cosine.shape[0] > x.shape[0]:
            raise ValueError("cosine and sine: one value per pair of x")
        out = np.array(x, np.float32)
        cdef float[::1] o = out
        if cosine.shape[0]:
            self.k.rope(&o[0], &cosine[0], &sine[0], <int>cosine.shape[0], interleaved)
        return out

    def add(self, const float[::1] x, const float[::1] y):
        out = np.array(y, np.float32)
        cdef float[::1] o = out
        if x.shape[0] != y.shape[0]:
            raise ValueError("x and y differ in length")
        if x.shape[0]:
            self.k.add(&x[0], &o[0], x.shape[0])
        return out

    def scale(self, const float[::1] x, float a):
        out = np.empty(x.shape[0], np.float32)
        cdef float[::1] o = out
        if x.shape[0]:
            self.k.scale(&x[0], a, &o[0], x.shape[0])
        return out

    def softcap(self, const float[::1] x, float cap):
        out = np.array(x, np.float32)
        cdef float[::1] o = out
        if x.shape[0]:
            self.k.softcap(&o[0], cap, x.shape[0])
        return out

    def argmax(self, const float[::1] x):
        if not x.shape[0]:
            raise ValueError("empty")
        return self.k.argmax(&x[0], x.shape[0])

    def logsumexp(self, const float[::1] x):
        if not x.shape[0]:
            raise ValueError("empty")
        return self.k.logsumexp(&x[0], x.shape[0])

    def attention(self, const float[:, ::1] keys, const float[:, ::1] values, const float[:, ::1] queries,
                  const int32_t[::1] lo, const int32_t[::1] hi, *, kv_type="f16", float softcap=0,
                  splits=((0, None),)):
        """Stores keys and values (positions, head_dim) in pages laid out backwards, then attends queries (nq, head_dim)
        over the given position ranges, merged in order. Returns (nq, head_dim)."""
        cdef int64_t n = keys.shape[0], hd = keys.shape[1], nq = queries.shape[0], i, pages = (n + 63) // 64
        cdef int64_t half = kv_half_bytes(kv_type, hd)
        cdef Memory memory = Memory(2 * half * pages + 64)
        cdef int32_t[::1] table = np.arange(pages, dtype=np.int32)[::-1].copy()
        cdef pi2_kv kv
        kv.base, kv.page_stride, kv.pages, kv.v_offset = <const uint8_t *>memory.base, 2 * half, &table[0], half
        kv.head_dim, kv.type = <int>hd, KV_TYPES[kv_type]
        if hd % 16:
            raise ValueError("head_dim must be a multiple of 16")
        memory.view()[:] = 0xff  # what was not written is NaN: it must not leak
        for i in range(n):
            self.k.kv_store(&kv, i, &keys[i, 0], &values[i, 0])
        cdef float[::1] m1 = np.empty(nq, np.float32), s1 = np.empty(nq, np.float32)
        cdef float[::1] m2 = np.empty(nq, np.float32), s2 = np.empty(nq, np.float32)
        cdef float[:, ::1] a1 = np.empty((nq, hd), np.float32), a2 = np.empty((nq, hd), np.float32)
        cdef float[::1] scratch = np.empty(nq * PI2_PAGE, np.float32)
        first = True
        for begin, end in splits:
            end = n if end is None else end
            if first:
                self.k.attend(&kv, &queries[0, 0], hd, <int>nq, &lo[0], &hi[0], begin, end, softcap, &m1[0], &s1[0],
                              &a1[0, 0], &scratch[0])
            else:
                self.k.attend(&kv, &queries[0, 0], hd, <int>nq, &lo[0], &hi[0], begin, end, softcap, &m2[0], &s2[0],
                              &a2[0, 0], &scratch[0])
                for i in range(nq):
                    self.k.attend_merge(&m1[i], &s1[i], &a1[i, 0], m2[i], s2[i], &a2[i, 0], <int>hd)
            first = False
        result = np.asarray(a1) / np.asarray(s1)[:, None]
        memory.close()
        return result
