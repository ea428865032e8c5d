# The headers of the plane, as Cython modules use them. Declarations only: nothing here exists at run time.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t

from pi2rt.cython_kernels.flash.declarations cimport pi2_neuron_cache, pi2_neuron_counts, pi2_row_reader, pi2_stream
from pi2rt.cython_kernels.kernels.declarations cimport pi2_kernels, pi2_kv

cdef extern from "gang.h" nogil:
    ctypedef struct pi2_gang:
        int n, event_fd
    pi2_gang *pi2_gang_create(int, const int *, int64_t)
    void pi2_gang_destroy(pi2_gang *)
    void pi2_gang_assist(pi2_gang *, int, void *, void *)

cdef extern from "sampler.h" nogil:
    ctypedef struct pi2_slot:
        float temperature, top_p, min_p, repetition, presence, frequency
        int32_t top_k
        uint64_t seed
        int32_t logprobs, n_bias
        int32_t *bias_ids
        float *bias
        int32_t *counts
        int32_t last, n_ends
        int32_t *ends
        int64_t limit
        int ended
    enum: PI2_UNUSABLE, PI2_BY_BIAS, PI2_BY_REPETITION, PI2_BY_PENALTIES, PI2_BY_MASK
    ctypedef struct pi2_pick:
        int32_t token
        float logprob
    ctypedef struct pi2_candidate:
        float value
        int32_t id
    pi2_pick pi2_sample(const pi2_kernels *, pi2_slot *, float *, int64_t, int64_t, const uint32_t *, pi2_pick *,
                        pi2_candidate *)

cdef extern from "sparse.h" nogil:
    enum: PI2_CLUSTER
    enum: PI2_PIPELINE_NONE, PI2_PIPELINE_MATRIX, PI2_PIPELINE_CLUSTER
    ctypedef struct pi2_bundles:
        int region, up_type, down_type, gate_type
        int64_t neurons, per_page, neuron_bytes, gate_bytes, up_bytes
        const uint8_t *gate_scales
        int64_t gate_stride
        const float *gate_bias
        const uint8_t *up_scales
        const uint8_t *down_scales
        int64_t up_stride, down_stride, down_plane
        const float *up_bias
        const float *down_bias
        const float *thresholds
        const uint16_t *order
        const uint8_t *elsewhere
    ctypedef struct pi2_neuron_block:
        const pi2_bundles *bundles
        int activation, up_activation, mixed_down

cdef extern from "cluster_unit.h" nogil:
    enum: PI2_UNIT_FAILED, PI2_UNIT_LATE
    ctypedef struct pi2_cluster_unit:
        float *x
        float *out
        int64_t deadline_ns
        int32_t layer, rows
        int64_t items, item_rows, busy_ns, stall_ns
        uint32_t asked, answered
    int pi2_unit_take(pi2_cluster_unit *)
    void pi2_unit_ask(pi2_cluster_unit *, int, int)
    int pi2_unit_wait(pi2_cluster_unit *, int64_t, const void *)
    void pi2_unit_answer(pi2_cluster_unit *, int, int64_t)
    void pi2_unit_close(pi2_cluster_unit *)
    ctypedef struct pi2_hop:
        pi2_cluster_unit *unit

cdef extern from "copies.h" nogil:
    ctypedef struct pi2_copies:
        int n
    int pi2_copies_add(pi2_copies *, const uint8_t *, uint8_t *, int64_t)

cdef extern from "op.h" nogil:
    enum: PI2_EMBED, PI2_LINEAR, PI2_ATTENTION, PI2_FFN, PI2_ADD, PI2_HEAD, PI2_SPARSE, PI2_ROUTE, PI2_HANDOFF, PI2_JOIN
    ctypedef struct pi2_matrix:
        int type
        int64_t rows, k
        const uint8_t *data
        const float *bias
        int unit, stride, region
        int64_t page_blocks
    ctypedef struct pi2_norm:
        const float *weight
        float offset, eps
    ctypedef struct pi2_op:
        int kind, layer
        pi2_norm norm
        int source, sink, n_matrices
        pi2_matrix matrix[3]
        int streamed, paged, expert
        int64_t weight_bytes
        int mixed, q8_in, q8_out
        void *data
    const char *pi2_op_name(const pi2_op *)

cdef extern from "ops_embed.h" nogil:
    ctypedef struct pi2_embed:
        pi2_matrix matrix
        pi2_row_reader *rows
        float scale

cdef extern from "ops_linear.h" nogil:
    ctypedef struct pi2_ffn:
        int activation, up_activation
    ctypedef struct pi2_head:
        float softcap

cdef extern from "ops_attention.h" nogil:
    ctypedef struct pi2_attention:
        int n_heads, n_kv_heads, head_dim, window
        float scale, softcap
        int rope
        pi2_norm q_norm, k_norm
        pi2_kv kv
        int64_t kv_head_stride

cdef extern from "ops_experts.h" nogil:
    ctypedef struct pi2_route:
        int n_experts, n_used, normalized, shared

cdef extern from "arena.h" nogil:
    ctypedef struct pi2_arena:
        int64_t used

cdef extern from "program.h" nogil:
    enum: PI2_QUEUE
    ctypedef struct pi2_rope:
        int half, interleaved
        const double *frequencies
        float magnitude
    ctypedef struct pi2_slice:
        int32_t slot, start, count, row
        const int32_t *pages
        int32_t sample, want_logits, skipped
        const int32_t *targets
        float *scores
        float *logits
        pi2_pick pick
        pi2_pick *top
        int32_t drafts, n_picks, closed
        pi2_pick *picks
        int32_t masked
        uint32_t *mask
    enum: PI2_WAITS
    ctypedef struct pi2_wait:
        uint64_t begin, end
    ctypedef struct pi2_run:
        int n_rows, n_slices, n_masked, trace, urgent
        int32_t *token
        pi2_slice *slices
        pi2_copies copies
        int32_t *pages
        int32_t *targets
        float *scores
        pi2_pick *picks
        uint32_t *masks
        int stopped, done, error
        int64_t neuron_bytes, skipped_bytes, cluster_bytes, kept_bytes
        pi2_neuron_counts before, used
        int64_t begin_ns, end_ns
        uint64_t begin_ticks, end_ticks
        uint64_t *busy
        uint64_t *op_begin
        uint64_t *op_end
        pi2_wait *waits
        uint32_t *n_waits
    ctypedef struct pi2_taken:
        int64_t row_blocks, clusters, attention
    ctypedef struct pi2_scratch:
        pi2_taken taken
    ctypedef struct pi2_program:
        pi2_scratch *scratch
        const pi2_kernels *kernels
        pi2_gang *gang
        pi2_stream *stream
        pi2_neuron_cache *neurons
        pi2_neuron_cache *clusters
        int pipeline
        int64_t dim, vocab, max_rows, max_slots, context
        int wide, mixed, traced, threads, n_ropes, n_ops, assisting, members
        int64_t mask_words, mask_deadline_ns
        pi2_op *ops
        pi2_rope *ropes
        pi2_slot *slots
        int32_t *counts
        pi2_arena arena
        int64_t tail_bytes, loan_bytes, kv_bytes, kv_page_bytes, kv_used
        uintptr_t kv
    pi2_op *pi2_op_add(pi2_program *, int, int)
    void pi2_program_measure(pi2_program *)
    int pi2_program_prepare(pi2_program *)
    void pi2_program_free(pi2_program *)
    pi2_run *pi2_run_new(pi2_program *)
    int pi2_run_post(pi2_run *)

cdef extern from "masks.h" nogil:
    void pi2_mask_give(pi2_run *, pi2_slice *, const uint32_t *)
    void pi2_run_stop(pi2_run *)
