# The headers of the reads, as Cython modules use them. Declarations only: nothing here exists at run time.
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t

cdef extern from "flash.h" nogil:
    enum: PI2_SECTOR, PI2_FLASH_MOST, PI2_FLASH_LATENCIES, PI2_EOF
    ctypedef struct pi2_flash:
        pass
    enum pi2_io:
        PI2_IO_AUTO, PI2_IO_URING, PI2_IO_PREADV
    ctypedef struct pi2_read:
        int64_t offset, bytes
        uint8_t *to
        void *parts
        void *user
        int error
        int64_t got, latency_ns
    struct c_statistics "pi2_flash_statistics":
        pi2_io io
        int direct, depth, threads
        int64_t file_bytes, registered_bytes, reads, bytes, errors, retries, short_reads, latency_ns
        int64_t *latency
        char *io_reason
        char *direct_reason
    pi2_flash *pi2_flash_open(const char *, pi2_io, int, int *)
    int pi2_flash_register(pi2_flash *, void *, int64_t, int64_t, int64_t)
    int pi2_flash_submit(pi2_flash *, pi2_read *)
    int pi2_flash_reap(pi2_flash *, pi2_read **, int, int64_t)
    void pi2_flash_wake(pi2_flash *)
    int64_t pi2_flash_close(pi2_flash *, int64_t)
    int64_t pi2_flash_ended_at(pi2_flash *)
    const char *pi2_flash_io_reason(const pi2_flash *)
    int64_t pi2_flash_registered(pi2_flash *)
    int64_t pi2_flash_reads(pi2_flash *)
    int pi2_uring_probe(char *, int)
    void c_take_statistics "pi2_flash_statistics"(pi2_flash *, c_statistics *)

cdef extern from "stream.h" nogil:
    ctypedef struct pi2_extent:
        int64_t offset, bytes, skip, home
    ctypedef struct pi2_placed:
        int64_t begin_ns, end_ns
    ctypedef struct pi2_stream:
        pi2_flash *flash
        pi2_placed *placed
        int64_t bytes, busy_ns, stall_ns, lent
    pi2_stream *pi2_stream_create(pi2_flash *, const pi2_extent *, int, int64_t, int, uint8_t *, int64_t, int64_t,
                                  int *)
    int64_t pi2_stream_destroy(pi2_stream *)
    void pi2_stream_loan(pi2_stream *, uint8_t *)

cdef extern from "rows.h" nogil:
    enum: PI2_ROWS_DEPTH
    ctypedef struct pi2_row_reader:
        pi2_flash *flash
    int64_t pi2_rows_buffer(int, int64_t)
    pi2_row_reader *pi2_rows_create(pi2_flash *, int, int64_t, int64_t, uint8_t *, int64_t)
    int64_t pi2_rows_destroy(pi2_row_reader *)

cdef extern from "neuron_cache.h" nogil:
    enum: PI2_MERGED_BYTES
    ctypedef struct pi2_region:
        int64_t offset, page_bytes, last_bytes, head_bytes
        int32_t first, pages
    ctypedef struct pi2_neuron_cache:
        pi2_flash *flash
        int32_t used, n_slots, n_pages, capacity
        uint32_t event
        int64_t hits, early, misses, evictions, completed, gap_pages, gap_bytes
        int64_t bytes, reads_done, busy_ns, stall_ns
    pi2_neuron_cache *pi2_neuron_cache_create(pi2_flash *, const pi2_region *, int, int32_t, int64_t, uint8_t *,
                                              int32_t, int32_t, int, int64_t, int *)
    ctypedef struct pi2_read_record:
        int64_t begin_ns, end_ns
        int32_t region
        uint16_t pages, foreseen
    int pi2_neuron_cache_read_through(pi2_neuron_cache *, int64_t)
    int pi2_neuron_cache_trace(pi2_neuron_cache *, int64_t)
    int64_t pi2_neuron_cache_take_records(pi2_neuron_cache *, pi2_read_record *, int64_t *)
    int32_t pi2_neuron_cache_resize(pi2_neuron_cache *, int32_t)
    void pi2_neuron_cache_absent(pi2_neuron_cache *, float *)
    int pi2_neuron_cache_fetch(pi2_neuron_cache *, const int32_t *, int)
    int64_t pi2_neuron_cache_waiting(pi2_neuron_cache *)
    void pi2_neuron_cache_wait(pi2_neuron_cache *, uint32_t, int64_t)
    int64_t pi2_neuron_cache_destroy(pi2_neuron_cache *)
    int pi2_neuron_cache_fill(pi2_neuron_cache *, int, int32_t, int32_t)
    ctypedef struct pi2_neuron_counts:
        int64_t asked, missed, foreseen, missed_bytes, reads, read_bytes, gap_pages, gap_bytes
