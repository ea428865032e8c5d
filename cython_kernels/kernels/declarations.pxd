# The headers of the kernels, as Cython modules use them. Declarations only: nothing here exists at run time.
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint64_t

cdef extern from "kernels.h" nogil:
    enum: PI2_TYPES, PI2_PAGE, PI2_ROWS
    ctypedef struct pi2_q8:
        int8_t *q
        int8_t *high
        int8_t *low
        float *d
        float *s
        int16_t *h
        int64_t ldq, ldh, ldb
    ctypedef struct pi2_kv:
        const uint8_t *base
        int64_t page_stride
        const int32_t *pages
        int64_t v_offset
        int head_dim
        int type
    ctypedef void (*pi2_gemm)(const uint8_t *, int64_t, const pi2_q8 *, int, float *, int64_t) noexcept nogil
    ctypedef void (*pi2_panel)(const uint8_t *, int64_t, int, int64_t, const pi2_q8 *, int, float *,
                              int64_t) noexcept nogil
    ctypedef void (*pi2_gemm_float)(const uint8_t *, int64_t, const float *, int64_t, int, float *,
                                   int64_t) noexcept nogil
    ctypedef void (*pi2_neuron_rows)(const uint8_t *const *, const uint8_t *const *, int, int64_t, const int16_t *,
                                     const float *, const float *, float *) noexcept nogil
    ctypedef void (*pi2_neuron_columns)(const uint8_t *const *, const int16_t *, int, const uint8_t *, int64_t, float,
                                        float, int64_t, float *) noexcept nogil
    ctypedef void (*pi2_quantizer)(const float *, int64_t, const pi2_q8 *) noexcept nogil
    ctypedef struct pi2_kernels:
        const char *name
        int lanes
        pi2_gemm gemm8[31]
        pi2_gemm gemm16[31]
        pi2_panel panel8[31]
        pi2_panel panel16[31]
        pi2_gemm_float gemm_float[31]
        pi2_neuron_rows neuron_rows[31]
        pi2_neuron_columns neuron_columns[31]
        pi2_quantizer quantize8, quantize16, quantize_mixed
        void (*rmsnorm)(const float *, const float *, float, float, float *, int64_t) noexcept nogil
        void (*add)(const float *, float *, int64_t) noexcept nogil
        void (*activate)(int, int, const float *, const float *, float *, int64_t) noexcept nogil
        void (*rope)(float *, const float *, const float *, int, int) noexcept nogil
        void (*kv_store)(const pi2_kv *, int64_t, const float *, const float *) noexcept nogil
        void (*attend)(const pi2_kv *, const float *, int64_t, int, const int32_t *, const int32_t *, int64_t, int64_t,
                       float, float *, float *, float *, float *) noexcept nogil
        void (*attend_merge)(float *, float *, float *, float, float, const float *, int) noexcept nogil
        void (*scale)(const float *, float, float *, int64_t) noexcept nogil
        int64_t (*argmax)(const float *, int64_t) noexcept nogil
        double (*logsumexp)(const float *, int64_t) noexcept nogil
        void (*softcap)(float *, float, int64_t) noexcept nogil
        uint64_t (*read)(const uint8_t *, int64_t) noexcept nogil
    void pi2_arrange(const pi2_q8 *, int, int64_t, int16_t *, float *, float *)
    const pi2_kernels *const *pi2_variants()
    int pi2_variant_runs(const pi2_kernels *)
    int64_t pi2_row_bytes(int, int64_t)
    int64_t pi2_row_block_bytes(int, int64_t)
    int64_t pi2_repack(int, const uint8_t *, int64_t, int64_t, uint8_t *)
    void pi2_unpack_row(int, const uint8_t *, int64_t, int64_t, float *)

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
