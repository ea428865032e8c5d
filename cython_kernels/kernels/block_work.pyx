"""The work of feed-forward blocks by itself, to see how long it takes: results are thrown away
(planner/measure/crossover.py)."""

from libc.stdint cimport int8_t, int16_t, int64_t, uint8_t

from pi2rt.cython_kernels.kernels.declarations cimport *
from pi2rt.cython_kernels.kernels.memory cimport Memory
from pi2rt.cython_kernels.kernels.variants cimport Variant

from pi2rt.cython_kernels.kernels.layout import TYPE_IDS, matrix_bytes

cdef extern from "kernels.h" nogil:
    int64_t pi2_align(int64_t, int64_t)
    void __builtin_prefetch(const void *)

cdef extern from "flash.h" nogil:
    enum: PI2_SECTOR


cdef class BlockWork:
    """Up and down of feed-forward blocks, ``dim`` wide, for one row. ``every`` 0: whole matrices as row blocks; else
    one in ``every`` neurons, from bundles of this ``layout``. ``up_type`` None: up is not among it.
    ``nbytes``: of one block."""

    cdef Variant variant
    cdef int up, down
    cdef int64_t dim, neurons, per_page, page_bytes, neuron_bytes, down_at, pages_bytes, every
    cdef readonly int64_t nbytes

    def __init__(self, up_type, down_type, int64_t dim, int64_t neurons, layout, int64_t every, name=None):
        self.variant = Variant(name)
        self.up, self.down = -1 if up_type is None else TYPE_IDS[up_type], TYPE_IDS[down_type]
        self.dim, self.neurons, self.every = dim, neurons, every
        self.per_page, self.page_bytes, self.neuron_bytes, self.down_at = layout
        self.pages_bytes = pi2_align((neurons + self.per_page - 1) // self.per_page * self.page_bytes, 64)
        self.nbytes = matrix_bytes(down_type, dim, neurons)
        if up_type is not None:
            self.nbytes += matrix_bytes(up_type, neurons, dim)
        if every:
            self.nbytes = self.pages_bytes + (neurons + 31) // 32 * pi2_down_scales(self.down, dim)
            if up_type is not None:
                self.nbytes += neurons * pi2_up_scales(self.up, dim)
        self.nbytes = pi2_align(self.nbytes, PI2_SECTOR)

    def compute(self, Memory weights not None, int64_t copies):
        """``copies`` blocks, one behind the other in ``weights``. Without the GIL, so that threads compute at once."""
        cdef int64_t widest = pi2_align(max(self.dim, self.neurons), 512), i
        cdef Memory scratch = Memory(2 * widest + 4 * widest + 8 * (widest // 32) + 4096)
        cdef pi2_q8 x
        cdef const uint8_t *at = <const uint8_t *>weights.base
        if weights.view().nbytes < copies * self.nbytes:
            raise ValueError(f"{weights.view().nbytes} bytes are too few for {copies} blocks")
        scratch.view()[:] = 1  # no number of a scale is NaN or infinite, and no value is 0
        x.q = <int8_t *>scratch.base
        x.d = <float *>(x.q + 2 * widest)
        x.s = x.d + widest // 32
        x.h = NULL
        x.high = x.low = NULL
        x.ldq, x.ldb = 2 * widest, widest // 32
        with nogil:
            for i in range(copies):
                if self.every:
                    self._by_neuron(at + i * self.nbytes, &x, x.s + widest // 32)
                else:
                    self._whole(at + i * self.nbytes, &x, x.s + widest // 32)
        scratch.close()

    cdef void _whole(self, const uint8_t *w, const pi2_q8 *x, float *out) noexcept nogil:
        cdef int64_t i, size
        if self.up >= 0:
            size = pi2_row_block_bytes(self.up, self.dim)
            for i in range((self.neurons + 15) // 16):
                self.variant.table.gemm16[self.up](w, self.dim, x, 1, out, 16)
                w += size
        size = pi2_row_block_bytes(self.down, self.neurons)
        for i in range((self.dim + 15) // 16):
            self.variant.table.gemm16[self.down](w, self.neurons, x, 1, out, 16)
            w += size

    cdef const uint8_t *_neuron(self, const uint8_t *pages, int64_t n) noexcept nogil:
        return pages + n // self.per_page * self.page_bytes + n % self.per_page * self.neuron_bytes

    cdef void _by_neuron(self, const uint8_t *pages, const pi2_q8 *x, float *out) noexcept nogil:
        cdef const uint8_t *rows[32]
        cdef const uint8_t *numbers[16]
        cdef const uint8_t *scales = pages + self.pages_bytes
        cdef int16_t values[32]
        cdef int64_t stride, n = 0, group, padded = (self.dim + 127) // 128 * 128
        cdef int m, i
        for i in range(32):
            values[i] = 1
        if self.up >= 0:
            stride = pi2_up_scales(self.up, self.dim)
            while n < self.neurons:
                m = 0
                while m < 16 and n < self.neurons:
                    rows[m] = self._neuron(pages, n)
                    numbers[m] = scales + n * stride
                    m += 1
                    n += self.every
                # as the sparse block asks for what is next
                for i in range(16 if n + 16 * self.every <= self.neurons else 0):
                    __builtin_prefetch(self._neuron(pages, n + i * self.every))
                self.variant.table.neuron_rows[self.up](rows, numbers, m, self.dim, <const int16_t *>x.q, x.d, x.s, out)
            scales += self.neurons * stride
        stride = pi2_down_scales(self.down, self.dim)
        for group in range(self.neurons // 32):
            m = 0
            i = 0
            while i < 32:
                rows[m] = self._neuron(pages, group * 32 + i) + self.down_at
                m += 1
                i += <int>self.every
            self.variant.table.neuron_columns[self.down](rows, values, m, scales + group * stride, stride // 2, 1, 1,
                                                         padded, out)
