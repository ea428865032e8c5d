"""Every kernel by itself, for tests and measurements."""

from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint64_t, uintptr_t

from pi2rt.cython_kernels.kernels.declarations cimport *
from pi2rt.cython_kernels.kernels.memory cimport Memory
from pi2rt.cython_kernels.kernels.variants cimport Variant

import numpy as np

from pi2rt.cython_kernels.kernels.layout import ACTIVATIONS, KV_TYPES, TYPE_IDS, kv_half_bytes

cdef extern from "elementary.h" nogil:
    void pi2_rotation(const double *, int64_t, int32_t, float, float *, float *)
    double pi2_exp(double)


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
    cdef Variant variant = Variant(name)
    cdef uint64_t sum
    with nogil:
        sum = variant.table.read(<const uint8_t *>block.base, block.nbytes)
    return sum


cdef pi2_quantizer quantizer(const pi2_kernels *k, bint wide, bint mixed) noexcept:
    return k.quantize_mixed if wide and mixed else k.quantize16 if wide else k.quantize8


cdef class Kernels(Variant):
    """One variant's kernels, callable from Python on numpy arrays. Shapes are checked; speed is not the point."""

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
            quantizer(self.table, wide, mixed)(&x[0], n, &row)
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
        cdef bint is_float = self.table.gemm8[type_id] == NULL
        cdef pi2_gemm gemm = self.table.gemm16[type_id] if wide else self.table.gemm8[type_id]
        cdef pi2_panel panel = self.table.panel16[type_id] if wide else self.table.panel8[type_id]
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
                quantizer(self.table, wide, mixed)(&x[b, 0], k, &row)
        b = 0
        if panels and not is_float:
            panel(<const uint8_t *>address, size, <int>blocks, k, &q8, <int>n, &o[0, 0], blocks * 16)
            b = blocks
        for b in range(b, blocks):
            if is_float:
                self.table.gemm_float[type_id](<const uint8_t *>address + b * size, k, &x[0, 0], k, <int>n,
                                               &o[0, b * 16], blocks * 16)
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
            self.table.neuron_rows[type_id](rows, numbers, <int>min(16, n - at), k, order, d, s, &o[at])
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
            self.table.neuron_columns[type_id](columns, values, m, &scale[0], pi2_down_scales(type_id, rows) // 2, d[0],
                                           s[0], padded, &o[0])
        return out[:rows]

    def rmsnorm(self, const float[::1] x, const float[::1] w, float offset, float eps):
        if x.shape[0] != w.shape[0]:
            raise ValueError("x and w differ in length")
        out = np.empty(x.shape[0], np.float32)
        cdef float[::1] o = out
        if x.shape[0]:
            self.table.rmsnorm(&x[0], &w[0], offset, eps, &o[0], x.shape[0])
        return out

    def activate(self, activation, up_activation, gate, const float[::1] up):
        """act(gate) * up_act(up); gate None: act(up)."""
        cdef const float[::1] g
        out = np.empty(up.shape[0], np.float32)
        cdef float[::1] o = out
        if not up.shape[0]:
            return out
        if gate is None:
            self.table.activate(ACTIVATIONS[activation], ACTIVATIONS[up_activation], NULL, &up[0], &o[0], up.shape[0])
        else:
            g = gate
            if g.shape[0] != up.shape[0]:
                raise ValueError("gate and up differ in length")
            self.table.activate(ACTIVATIONS[activation], ACTIVATIONS[up_activation], &g[0], &up[0], &o[0], up.shape[0])
        return out

    def rope(self, const float[::1] x, const float[::1] cosine, const float[::1] sine, bint interleaved):
        if sine.shape[0] != cosine.shape[0] or 2 * cosine.shape[0] > x.shape[0]:
            raise ValueError("cosine and sine: one value per pair of x")
        out = np.array(x, np.float32)
        cdef float[::1] o = out
        if cosine.shape[0]:
            self.table.rope(&o[0], &cosine[0], &sine[0], <int>cosine.shape[0], interleaved)
        return out

    def add(self, const float[::1] x, const float[::1] y):
        out = np.array(y, np.float32)
        cdef float[::1] o = out
        if x.shape[0] != y.shape[0]:
            raise ValueError("x and y differ in length")
        if x.shape[0]:
            self.table.add(&x[0], &o[0], x.shape[0])
        return out

    def scale(self, const float[::1] x, float a):
        out = np.empty(x.shape[0], np.float32)
        cdef float[::1] o = out
        if x.shape[0]:
            self.table.scale(&x[0], a, &o[0], x.shape[0])
        return out

    def softcap(self, const float[::1] x, float cap):
        out = np.array(x, np.float32)
        cdef float[::1] o = out
        if x.shape[0]:
            self.table.softcap(&o[0], cap, x.shape[0])
        return out

    def argmax(self, const float[::1] x):
        if not x.shape[0]:
            raise ValueError("empty")
        return self.table.argmax(&x[0], x.shape[0])

    def logsumexp(self, const float[::1] x):
        if not x.shape[0]:
            raise ValueError("empty")
        return self.table.logsumexp(&x[0], x.shape[0])

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
            self.table.kv_store(&kv, i, &keys[i, 0], &values[i, 0])
        cdef float[::1] m1 = np.empty(nq, np.float32), s1 = np.empty(nq, np.float32)
        cdef float[::1] m2 = np.empty(nq, np.float32), s2 = np.empty(nq, np.float32)
        cdef float[:, ::1] a1 = np.empty((nq, hd), np.float32), a2 = np.empty((nq, hd), np.float32)
        cdef float[::1] scratch = np.empty(nq * PI2_PAGE, np.float32)
        first = True
        for begin, end in splits:
            end = n if end is None else end
            if first:
                self.table.attend(&kv, &queries[0, 0], hd, <int>nq, &lo[0], &hi[0], begin, end, softcap, &m1[0], &s1[0],
                              &a1[0, 0], &scratch[0])
            else:
                self.table.attend(&kv, &queries[0, 0], hd, <int>nq, &lo[0], &hi[0], begin, end, softcap, &m2[0], &s2[0],
                              &a2[0, 0], &scratch[0])
                for i in range(nq):
                    self.table.attend_merge(&m1[i], &s1[i], &a1[i, 0], m2[i], s2[i], &a2[i, 0], <int>hd)
            first = False
        result = np.asarray(a1) / np.asarray(s1)[:, None]
        memory.close()
        return result
