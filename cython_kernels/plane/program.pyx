"""The data plane: a gang of native threads and the program it runs (gang.h, program.h)."""

from libc.errno cimport errno
from libc.stdint cimport int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.stdlib cimport free, malloc, realloc
from libc.string cimport memcpy, memset
from posix.types cimport pid_t
from posix.unistd cimport getpid

from declarations cimport *
from plane_declarations cimport *

import os

import numpy as np

from pi2rt._errors import BusyError, InternalError, RequestError
from pi2rt.host.limits import memory_failure, system_failure
from pi2rt.host.read_errors import read_failure
from pi2rt.runtime.cluster_unit import ClusterUnitError
from pi2rt.runtime.step import NeuronUse, Sampled, Skipped, StepResult, Unusable, Verified
from pi2rt.runtime.token_mask import mask_problem

MOST_IN_FLIGHT = PI2_QUEUE
SOURCES = {"x": 0, "attention": 1, "hidden": 2}
SINKS = {"y": 0, "x": 1, "mix": 2, "reduced": 3}
CLUSTER = PI2_CLUSTER  # neurons that are asked for together
PIPELINES = {"none": PI2_PIPELINE_NONE, "matrix": PI2_PIPELINE_MATRIX, "cluster": PI2_PIPELINE_CLUSTER}


cdef class Gang:
    """Native threads, one per entry of ``cores`` (-1: not pinned), asleep until a program is posted.

    ``event_fd`` becomes readable when a run has finished. ``close()`` joins the threads after finishing what was
    posted; it may block for one run, so stop runs first.
    """

    cdef pi2_gang *gang
    cdef pid_t owner
    cdef readonly tuple cores

    def __cinit__(self, cores, *, int64_t spin_ns=50_000):
        cdef int[256] c
        self.owner = getpid()
        self.cores = tuple(cores)
        if not 0 < len(self.cores) <= 256:
            raise ValueError(f"{len(self.cores)} threads: 1 to 256")
        for i, core in enumerate(self.cores):
            c[i] = core
        self.gang = pi2_gang_create(<int>len(self.cores), c, spin_ns)
        if self.gang == NULL:
            error = errno
            what = f"starting {len(self.cores)} compute threads"
            raise system_failure(what, error) or OSError(error, os.strerror(error))

    @property
    def event_fd(self):
        if self.gang == NULL:
            raise ValueError("gang is closed")
        return self.gang.event_fd

    def close(self):
        cdef pi2_gang *gang = self.gang
        self.gang = NULL
        if gang != NULL and self.owner == getpid():  # a forked child does not have the threads
            with nogil:
                pi2_gang_destroy(gang)

    def __dealloc__(self):
        if self.gang != NULL and self.owner == getpid():
            pi2_gang_destroy(self.gang)


cdef class Matrix:
    """Row blocks of a weight matrix: ``address`` stays valid as long as the program lives; 0: it lies in parts of
    ``page_blocks`` row blocks, which are pages of region ``region`` of the program's clusters, or units of its stream:
    ``piece``, the first one's number and from each to the next. Neither: ``embed`` reads its rows one by one."""

    cdef pi2_matrix m
    cdef object bias

    def __init__(self, int type_id, int64_t rows, int64_t k, uintptr_t address, bias=None, *, piece=None, int region=-1,
                 int64_t page_blocks=0):
        cdef const float[::1] b
        if (piece is not None or region >= 0) != (page_blocks > 0) or (piece is not None and region >= 0):
            raise InternalError("a matrix lies in pieces of a stream, or in pages of a region")
        self.m.unit, self.m.stride = piece or (-1, 0)
        self.m.region, self.m.page_blocks = region, page_blocks
        self.m.type, self.m.rows, self.m.k, self.m.data = type_id, rows, k, <const uint8_t *>address
        self.m.bias = NULL
        self.bias = bias
        if bias is not None:
            b = bias
            if b.shape[0] != rows:
                raise ValueError(f"bias of {b.shape[0]} values for {rows} rows")
            self.m.bias = &b[0]


cdef class Bundles:
    """The neurons of a feed-forward block: region ``region`` of the program's neuron cache, and their scales in memory.

    ``up``, ``down``: (type id, address of the scales, bytes from one neuron's (32 neurons') to the next), None where
    the block has no gate. ``down_plane``: bytes from a group's scales to its minimums, in types that have them.
    ``gate``: as ``up``, where gates are in the bundles too; ``gate_bytes``, ``up_bytes``: from a neuron's beginning to
    its row of up, and to its column of down. Biases: float32. ``thresholds``: float32 (neurons,), None for an exact
    block; a neuron is active when the activated gate's magnitude is above.
    ``order``: uint16 (neurons,), of each place the neuron of its cluster whose bundle lies there, a permutation of each
    cluster; None: the neurons' own. ``elsewhere``: uint8 (clusters,), not 0 for those that a cluster unit computes;
    None: none.
    Scales stay valid as long as the program lives.
    """

    cdef pi2_bundles b
    cdef list keep

    def __init__(self, int region, up, down, *, int64_t down_plane, int64_t neurons, int64_t per_page,
                 int64_t neuron_bytes, int64_t up_bytes, gate=None, int64_t gate_bytes=0, gate_bias=None, up_bias=None,
                 down_bias=None, thresholds=None, order=None, elsewhere=None):
        cdef const float[::1] bias
        cdef const uint16_t[::1] places
        cdef const uint8_t[::1] others
        self.keep = [gate_bias, up_bias, down_bias, thresholds, order, elsewhere]
        if elsewhere is not None:
            others = elsewhere
            if others.shape[0] != (neurons + PI2_CLUSTER - 1) // PI2_CLUSTER:
                raise InternalError(f"{others.shape[0]} clusters for {neurons} neurons")
            self.b.elsewhere = &others[0]
        if order is not None:
            places = order
            if places.shape[0] != neurons:
                raise InternalError(f"an order of {places.shape[0]} for {neurons} neurons")
            self.b.order = &places[0]
        self.b.gate_type, self.b.gate_bytes = -1, gate_bytes
        if gate is not None:
            self.b.gate_type, self.b.gate_stride = gate[0], gate[2]
            self.b.gate_scales = <const uint8_t *><uintptr_t>gate[1]
        if gate_bias is not None:
            bias = gate_bias
            self.b.gate_bias = &bias[0]
        self.b.region, self.b.up_type = region, -1
        if up is not None:
            self.b.up_type, self.b.up_stride = up[0], up[2]
            self.b.up_scales = <const uint8_t *><uintptr_t>up[1]
        self.b.down_type, self.b.down_stride, self.b.down_plane = down[0], down[2], down_plane
        self.b.down_scales = <const uint8_t *><uintptr_t>down[1]
        self.b.neurons, self.b.per_page = neurons, per_page
        self.b.neuron_bytes, self.b.up_bytes = neuron_bytes, up_bytes
        if up_bias is not None:
            bias = up_bias
            self.b.up_bias = &bias[0]
        if down_bias is not None:
            bias = down_bias
            self.b.down_bias = &bias[0]
        if thresholds is not None:
            bias = thresholds
            if bias.shape[0] != neurons:
                raise InternalError(f"{bias.shape[0]} thresholds for {neurons} neurons")
            self.b.thresholds = &bias[0]


cdef class Program:
    """A model's operations. Build in order with ``embed``, ``linear``, ``attention``, ``ffn``, ``add``, ``route``,
    ``head``, then ``prepare``; then ``post`` steps and ``result`` them in order.

    ``wide``: activations are int16, else int8. ``mixed``: int16 in two forms (``pi2_q8`` in kernels.h) in
    those operations that say so. ``stream``: a ``stream.Stream``, which outlives the gang; its units are
    matrices of the operations, in their order. ``neurons``: a ``neuron_cache.NeuronCache``, which does so too;
    ``pipeline``: a key of PIPELINES, how far reading its neurons overlaps with computing (sparse.h). ``clusters``:
    another one, whose regions are experts' matrices that are not in memory. ``traced``: steps may be posted with
    ``trace``. ``mask_deadline``: seconds that a step waits for masks of its slices.

    ``assisting``: so many of the last threads are assistants'. Where every matrix is in memory and no neurons are read
    one by one, nobody waits for these (assist.h); else they run jobs like the others.

    ``gang``: that runs it; or a number of threads, for a program that is only measured. Such a one needs no weights,
    readers and caches: of a matrix only its shape and place count. It has ``activation_bytes``, and cannot be prepared.

    ``expert`` of an operation: it works on the rows that chose this one, as the last ``route`` before says; -1: all
    rows. Its sink "mix" adds the results times the expert's weight to y, whence ``add`` takes them.
    Norms are ``(weight float32 (n,), offset, eps)`` or None. Everything passed in must stay alive and unmoved.
    """

    cdef pi2_program p
    cdef Gang gang
    cdef object stream, neurons, clusters, rows
    cdef int next_unit
    cdef list keep, waiting
    cdef float embedding_scale, logit_softcap
    cdef bint measured, prepared, only_measured
    cdef int64_t pages, page_bytes, window_page_bytes, state_slots, slot_bytes
    cdef uintptr_t page_memory, window_memory, slot_memory
    cdef readonly int64_t weight_bytes
    cdef list busy_ns
    cdef pid_t owner

    def __init__(self, gang, uintptr_t kernels, *, int64_t dim, int64_t vocab, int64_t max_rows, int64_t max_slots,
                 int64_t context, int64_t pages, bint wide=True, bint mixed=False, float embedding_scale=1,
                 float logit_softcap=0, stream=None, neurons=None, clusters=None, pipeline="cluster",
                 bint traced=False, int assisting=0, double mask_deadline=10.0):
        self.owner = getpid()
        self.only_measured = not isinstance(gang, Gang)
        self.gang, self.pages, self.stream = None if self.only_measured else gang, pages, stream
        self.neurons, self.clusters = neurons, clusters
        self.keep = []
        self.waiting = []
        p = &self.p
        p.threads, p.kernels = len(self.gang.cores) if self.gang is not None else gang, <const pi2_kernels *>kernels
        if self.gang is not None:
            p.gang = self.gang.gang
        self.busy_ns = [0] * p.threads
        if not 0 <= assisting < p.threads:
            raise InternalError(f"{assisting} of {p.threads} threads assist")
        p.assisting = assisting
        p.dim, p.vocab, p.max_rows, p.max_slots, p.context = dim, vocab, max_rows, max_slots, context
        p.wide, p.mixed, p.traced = wide, mixed, traced
        p.mask_deadline_ns = <int64_t>(mask_deadline * 1e9)
        if stream is not None:
            p.stream = <pi2_stream *><uintptr_t>stream.address
        if neurons is not None:
            p.neurons = <pi2_neuron_cache *><uintptr_t>neurons.address
        if clusters is not None:
            p.clusters = <pi2_neuron_cache *><uintptr_t>clusters.address
        p.pipeline = PIPELINES[pipeline]
        self.embedding_scale, self.logit_softcap = embedding_scale, logit_softcap

    cdef pi2_op *operation(self, int kind, int layer) except NULL:
        self.measured = False
        op = pi2_op_add(&self.p, kind, layer)
        if op == NULL:
            raise memory_failure("the operations of a step")
        return op

    cdef pi2_norm norm_of(self, norm) except *:
        cdef pi2_norm n
        cdef const float[::1] w
        n.weight, n.offset, n.eps = NULL, 0, 0
        if norm is not None:
            w = norm[0]
            self.keep.append(norm[0])
            n.weight, n.offset, n.eps = &w[0], norm[1], norm[2]
        return n

    cdef int set_matrices(self, pi2_op *op, matrices) except -1:
        cdef Matrix m
        cdef int pieces
        units = []
        for i, matrix in enumerate(matrices):
            m = matrix
            op.matrix[i] = m.m
            if m.m.data == NULL and m.m.region >= 0:
                if not self.only_measured and (self.clusters is None or m.m.region >= self.clusters.n_regions):
                    raise InternalError(f"a matrix of region {m.m.region} is in no cache")
                op.paged += 1
            elif m.m.data == NULL:
                if (self.stream is None and not self.only_measured) or m.m.page_blocks < 1 or op.expert >= 0:
                    raise InternalError("a matrix that is not in memory, and cannot be streamed")
                pieces = <int>(((m.m.rows + PI2_ROWS - 1) // PI2_ROWS + m.m.page_blocks - 1) // m.m.page_blocks)
                units += range(m.m.unit, m.m.unit + pieces * m.m.stride, m.m.stride)
                op.streamed += 1
            self.keep.append(m)
            nbytes = (m.m.rows + PI2_ROWS - 1) // PI2_ROWS * pi2_row_block_bytes(m.m.type, m.m.k)
            self.weight_bytes += nbytes
            op.weight_bytes += nbytes
        op.n_matrices = <int>len(matrices)
        if op.streamed:
            if sorted(units) != list(range(self.next_unit, self.next_unit + len(units))):
                raise InternalError(
                    f"pieces {min(units)} to {max(units)} are not those that follow {self.next_unit - 1}"
                )
            self.next_unit += <int>len(units)
            # 2: of a tile that begins in q, and ends in k
            at_once = op.streamed if op.kind == PI2_FFN else min(op.n_matrices, 2)
            if op.kind == PI2_SPARSE:  # gates of a cluster, wherever it begins
                at_once = <int>((PI2_CLUSTER // PI2_ROWS + op.matrix[0].page_blocks - 1)
                                // op.matrix[0].page_blocks) + 1
            if self.stream is not None:
                self.stream.check(units, at_once)
        return 0

    def rope(self, frequencies, bint interleaved, float magnitude):
        """Adds a rotation; returns its number."""
        cdef const double[::1] f = frequencies
        cdef pi2_rope *ropes = <pi2_rope *>realloc(self.p.ropes, (self.p.n_ropes + 1) * sizeof(pi2_rope))
        if ropes == NULL:
            raise memory_failure("the operations of a step")
        self.p.ropes = ropes
        memset(&ropes[self.p.n_ropes], 0, sizeof(pi2_rope))
        cdef double *copy = <double *>malloc(max(1, f.shape[0]) * sizeof(double))
        if copy == NULL:
            raise memory_failure("the operations of a step")
        memcpy(copy, &f[0], f.shape[0] * sizeof(double))
        ropes[self.p.n_ropes].frequencies = copy
        ropes[self.p.n_ropes].half = <int>f.shape[0]
        ropes[self.p.n_ropes].interleaved = interleaved
        ropes[self.p.n_ropes].magnitude = magnitude
        self.p.n_ropes += 1
        return self.p.n_ropes - 1

    def embed(self, Matrix matrix, *, rows=None):
        """``rows``: ``rows.Rows`` of a matrix that is not in memory, which outlive the gang."""
        if not self.only_measured and (matrix.m.data == NULL) != (rows is not None):
            raise InternalError("an embedding is in memory or in a file")
        data = <pi2_embed *>self.operation(PI2_EMBED, -1).data
        data.matrix, data.scale, self.rows = matrix.m, self.embedding_scale, rows
        if rows is not None:
            data.rows = <pi2_row_reader *><uintptr_t>rows.address
        self.keep.append(matrix)

    def linear(self, int layer, norm, source, sink, matrices, *, bint q8_in=False, bint mixed=False,
               int expert=-1):
        op = self.operation(PI2_LINEAR, layer)
        op.expert = expert
        op.norm = self.norm_of(norm)
        op.source, op.sink, op.q8_in, op.mixed = SOURCES[source], SINKS[sink], q8_in, mixed
        self.set_matrices(op, matrices)

    def ffn(self, int layer, norm, Matrix up, gate, int activation, int up_activation, *, bint q8_out, bint mixed=False,
            int expert=-1):
        op = self.operation(PI2_FFN, layer)
        op.expert = expert
        op.norm = self.norm_of(norm)
        data = <pi2_ffn *>op.data
        data.activation, data.up_activation, op.q8_out, op.mixed = activation, up_activation, q8_out, mixed
        self.set_matrices(op, [up] if gate is None else [up, gate])

    def sparse_ffn(self, int layer, norm, sink, decides, Bundles bundles, int activation, int up_activation, *,
                   bint mixed=False, bint mixed_down=False, int expert=-1):
        """A whole feed-forward block whose neurons are read when they are active. ``decides``: gate, or up where there
        is none. Where gates are in the bundles, what of a predictor is applied to the ``linear`` before, whose sink is
        "reduced"; None: all neurons are read."""
        if not self.only_measured and (self.neurons is None or not 0 <= bundles.b.region < self.neurons.n_regions):
            raise InternalError(f"neurons of region {bundles.b.region} are in no cache")
        op = self.operation(PI2_SPARSE, layer)
        op.expert = expert
        op.norm = self.norm_of(norm)
        op.sink, op.mixed = SINKS[sink], mixed
        data = <pi2_neuron_block *>op.data
        data.bundles = &bundles.b
        data.activation, data.up_activation, data.mixed_down = activation, up_activation, mixed_down
        self.set_matrices(op, [] if decides is None else [decides])
        self.keep.append(bundles)

    def hand_off(self, int layer, norm, mailbox):
        """Gives a ``cluster_unit.Mailbox`` the input of the block that follows; ``join`` follows that."""
        op = self.operation(PI2_HANDOFF, layer)
        op.norm = self.norm_of(norm)
        self.set_unit(op, mailbox)

    def join(self, int layer, sink, mailbox):
        """Adds what the unit has made of it. ``sink``: the block's, "x" or "y"."""
        op = self.operation(PI2_JOIN, layer)
        op.sink = SINKS[sink]
        self.set_unit(op, mailbox)

    cdef int set_unit(self, pi2_op *op, mailbox) except -1:
        if not self.only_measured:
            (<pi2_hop *>op.data).unit = <pi2_cluster_unit *><uintptr_t>mailbox.address
            self.keep.append(mailbox)
        return 0

    def attention(self, int layer, *, int n_heads, int n_kv_heads, int head_dim, int window, float scale, float softcap,
                  int rope, q_norm, k_norm, uintptr_t kv, int64_t page_stride, int64_t head_stride, int64_t v_offset,
                  int kv_type, bint q8_out):
        if n_heads % n_kv_heads or n_heads // n_kv_heads > 128:
            raise ValueError(f"{n_heads} heads over {n_kv_heads} KV heads")
        op = self.operation(PI2_ATTENTION, layer)
        op.q8_out = q8_out
        data = <pi2_attention *>op.data
        data.n_heads, data.n_kv_heads, data.head_dim, data.window = n_heads, n_kv_heads, head_dim, window
        data.scale, data.softcap, data.rope = scale, softcap, rope
        data.q_norm, data.k_norm = self.norm_of(q_norm), self.norm_of(k_norm)
        data.kv.base, data.kv.page_stride, data.kv.v_offset = <const uint8_t *>kv, page_stride, v_offset
        data.kv.head_dim, data.kv.type = (head_dim + 15) // 16 * 16, kv_type
        data.kv_head_stride = head_stride

    def route(self, int layer, *, int n_experts, int n_used, bint normalized, bint shared):
        """Chooses each row's experts by the logits in y; ``shared``: behind them is that of one more, for all rows."""
        data = <pi2_route *>self.operation(PI2_ROUTE, layer).data
        data.n_experts, data.n_used, data.normalized, data.shared = n_experts, n_used, normalized, shared

    def add(self, int layer, norm):
        """x += [norm](y)"""
        self.operation(PI2_ADD, layer).norm = self.norm_of(norm)

    def head(self, norm, Matrix matrix):
        op = self.operation(PI2_HEAD, -1)
        (<pi2_head *>op.data).softcap = self.logit_softcap
        op.norm = self.norm_of(norm)
        self.set_matrices(op, [matrix])

    def prepare(self):
        if self.only_measured:
            raise InternalError("a program without a gang can only be measured")
        if pi2_program_prepare(&self.p):
            raise memory_failure("buffers for activations")
        self.measured = self.prepared = True

    def state(self, *, uintptr_t pages, int64_t page_bytes, uintptr_t windowed=0, int64_t window_page_bytes=0,
              uintptr_t slots=0, int64_t n_slots=0, int64_t slot_bytes=0):
        """Where the first page lies, its part in the windowed area, and the first of ``n_slots`` slots of fixed arrays:
        what steps may copy."""
        self.page_memory, self.page_bytes = pages, page_bytes
        self.window_memory, self.window_page_bytes = windowed, window_page_bytes
        self.slot_memory, self.state_slots, self.slot_bytes = slots, n_slots, slot_bytes

    cdef int add_copy(self, pi2_run *r, copy) except -1:
        cdef bint paged = copy.kind == "page"
        cdef int64_t count = self.pages if paged else self.state_slots
        cdef int64_t nbytes = self.page_bytes if paged else self.slot_bytes
        cdef int64_t source = copy.source, target = copy.target
        cdef uintptr_t base = self.page_memory if paged else self.slot_memory
        if not (0 <= source < count and 0 <= target < count):
            raise InternalError(f"{copy!r}: there are {count} of that kind")
        self.add_bytes(r, base, nbytes, source, target)
        if paged:
            self.add_bytes(r, self.window_memory, self.window_page_bytes, source, target)
        return 0

    cdef int add_bytes(self, pi2_run *r, uintptr_t base, int64_t nbytes, int64_t source, int64_t target) except -1:
        if nbytes and pi2_copies_add(&r.copies, <const uint8_t *>(base + source * nbytes),
                                     <uint8_t *>(base + target * nbytes), nbytes):
            raise memory_failure("copies of state")
        return 0

    @property
    def activation_bytes(self):
        """What ``prepare`` takes, or has taken."""
        if not self.measured:
            pi2_program_measure(&self.p)
            self.measured = True
        return self.p.arena.used

    @property
    def rarely_used_bytes(self):
        """Of these, what steps of a few rows have no use for."""
        return self.p.tail_bytes

    def lend(self, int64_t nbytes, *, uintptr_t kv, int64_t kv_bytes, int64_t kv_page_bytes, int64_t kv_used):
        """Lets the stream keep units in ``nbytes`` of its reclaimable memory, at most (``Stream.borrow``): instead of
        what is rarely used, and of a KV cache at ``kv`` of which pages are used in their order, the first ``kv_used``
        bytes already. After ``prepare``."""
        self.p.kv_used = kv_used
        self.p.kv, self.p.kv_bytes, self.p.kv_page_bytes, self.p.loan_bytes = kv, kv_bytes, kv_page_bytes, nbytes

    @property
    def thread_ns(self):
        """Nanoseconds that each thread has spent in kernels, of the steps whose results were taken."""
        return tuple(self.busy_ns)

    @property
    def taken(self):
        """Units of work that each thread took: (row blocks, neuron clusters, units of attention)."""
        if not self.prepared:
            return ((0, 0, 0),) * self.p.threads
        return tuple((self.p.scratch[t].taken.row_blocks, self.p.scratch[t].taken.clusters,
                      self.p.scratch[t].taken.attention) for t in range(self.p.threads))

    @property
    def operations(self):
        """Names of the operations, for traces: ``"layer 3 attention"``."""
        out = []
        for i in range(self.p.n_ops):
            op = &self.p.ops[i]
            name = pi2_op_name(op).decode()
            if op.expert >= 0:
                name = f"expert {op.expert} {name}"
            out.append(name if op.layer < 0 else f"layer {op.layer} {name}")
        return tuple(out)

    def bind(self, bind):
        """Gives a slot to a new sequence. The slot must not be part of a run in flight."""
        cdef int slot = bind.slot
        cdef pi2_slot *s
        cdef const int32_t[::1] history = bind.history
        cdef int64_t i
        if not 0 <= slot < self.p.max_slots:
            raise InternalError(f"slot {slot} of {self.p.max_slots}")
        s = &self.p.slots[slot]
        o = bind.sampling
        s.temperature, s.top_k, s.top_p, s.min_p = o.temperature, o.top_k, o.top_p, o.min_p
        s.repetition, s.presence, s.frequency = o.repetition_penalty, o.presence_penalty, o.frequency_penalty
        s.seed, s.logprobs, s.last = o.seed & 0xffffffffffffffff, min(o.logprobs, self.p.vocab), 0
        free(s.bias_ids)
        free(s.bias)
        free(s.ends)
        s.bias_ids, s.bias, s.counts, s.n_bias = NULL, NULL, NULL, 0
        s.ends, s.n_ends, s.limit, s.ended = NULL, 0, 0 if bind.limit is None else bind.limit, 0
        if bind.ends:
            s.ends = <int32_t *>malloc(len(bind.ends) * 4)
            if s.ends == NULL:
                raise memory_failure("tokens that end a sequence")
            for token in bind.ends:
                s.ends[s.n_ends] = token
                s.n_ends += 1
        for token, _ in o.logit_bias:
            if not 0 <= token < self.p.vocab:
                raise RequestError(f"logit_bias: token {token} is outside the vocabulary of {self.p.vocab}")
        if o.logit_bias:
            n = len(o.logit_bias)
            s.bias_ids = <int32_t *>malloc(n * 4)
            s.bias = <float *>malloc(n * 4)
            if s.bias_ids == NULL or s.bias == NULL:
                raise memory_failure("a logit bias")
            for j, (token, value) in enumerate(o.logit_bias):
                s.bias_ids[j], s.bias[j] = token, value
            s.n_bias = n
        if o.repetition_penalty != 1 or o.presence_penalty or o.frequency_penalty:
            s.counts = self.p.counts + slot * self.p.vocab
            memset(s.counts, 0, self.p.vocab * sizeof(int32_t))
            for i in range(history.shape[0]):
                if 0 <= history[i] < self.p.vocab:
                    s.counts[history[i]] += 1

    def post(self, step, bint trace=False):
        """Starts a step; BusyError when too many are unfinished."""
        cdef pi2_run *r
        cdef pi2_slice *s
        cdef const int32_t[::1] tokens, pages, targets
        cdef float[:, ::1] logits
        cdef int64_t row = 0, page_room = self.p.context // PI2_PAGE + 1, i, count, needed, index = 0
        cdef pi2_slot *slot
        if not self.prepared:
            raise InternalError("program was not prepared")
        r = pi2_run_new(&self.p)
        if r == NULL:
            raise BusyError(f"{PI2_QUEUE} steps are in flight")
        if len(step.slices) > self.p.max_slots or step.tokens > self.p.max_rows:
            raise InternalError(f"{step!r} exceeds {self.p.max_slots} slots or {self.p.max_rows} tokens")
        for bind in step.binds:
            self.bind(bind)
        for copy in step.copies:
            self.add_copy(r, copy)
        held = []
        for sl in step.slices:
            s = &r.slices[index]
            memset(s, 0, sizeof(pi2_slice))
            tokens, pages = sl.tokens, sl.pages
            count = max(1, tokens.shape[0])
            s.slot, s.start, s.count, s.row, s.sample = sl.slot, sl.start, <int32_t>count, <int32_t>row, sl.sample
            needed = (s.start + count + PI2_PAGE - 1) // PI2_PAGE
            if not (0 <= s.slot < self.p.max_slots and s.start >= 0 and s.start + count <= self.p.context
                    and needed <= pages.shape[0] and needed <= page_room):
                raise InternalError(f"slice {sl!r} does not fit its pages or the context")
            for i in range(needed):
                if not 0 <= pages[i] < self.pages:
                    raise InternalError(f"page {pages[i]} of {self.pages}")
            s.pages = r.pages + index * page_room
            index += 1
            memcpy(<void *>s.pages, &pages[0], needed * 4)
            if tokens.shape[0] == 0:
                r.token[row] = -1
            else:
                r.urgent = 1
                for i in range(count):
                    if not 0 <= tokens[i] < self.p.vocab:
                        raise RequestError(f"token {tokens[i]} is outside the vocabulary of {self.p.vocab}")
                    r.token[row + i] = tokens[i]
            score = None
            if sl.targets is not None:
                targets = sl.targets
                if targets.shape[0] != count:
                    raise InternalError("targets and tokens differ in length")
                for i in range(count):
                    r.targets[row + i] = targets[i] if targets[i] < self.p.vocab else -1
                s.targets = r.targets + row
                s.scores = r.scores + row
                for i in range(count):
                    s.scores[i] = 0
            rows = None
            if sl.logits:
                rows = np.empty((count, self.p.vocab), np.float32)
                logits = rows
                s.want_logits, s.logits = 1, &logits[0, 0]
            top = None
            slot = &self.p.slots[s.slot]
            if not 0 <= sl.drafts < max(1, tokens.shape[0]) or (sl.drafts and not sl.sample):
                raise InternalError(f"{sl.drafts} drafts of {tokens.shape[0]} tokens; sample={sl.sample}")
            s.drafts = sl.drafts
            if sl.masked:
                if sl.drafts or not sl.sample:
                    raise InternalError(f"a mask for a slice with {sl.drafts} drafts; sample={sl.sample}")
                s.masked, s.mask = 1, r.masks + index * self.p.mask_words - self.p.mask_words
                r.n_masked += 1
            if s.drafts:
                s.picks = r.picks + row
            if sl.sample and slot.logprobs > 0:
                top = np.empty((1 + s.drafts, slot.logprobs, 2), np.int32)  # pi2_pick: int32 and float32
                s.top = <pi2_pick *><uintptr_t>top.ctypes.data
            held.append((rows, top, slot.logprobs))
            row += count
        r.n_rows, r.n_slices, r.trace = <int>row, <int>len(step.slices), trace
        if pi2_run_post(r):
            raise InternalError("the gang has no place for a step")
        self.waiting.append((<uintptr_t>r, step, held))

    def stop(self, step_id):
        """Asks a step in flight to end at its next barrier."""
        for address, step, _ in self.waiting:
            if step.id == step_id:
                pi2_run_stop(<pi2_run *><uintptr_t>address)

    def mask(self, step_id, slot, allowed):
        """What the masked slice of a slot in a step in flight may sample; see ``pi2rt.runtime.executor.Masking``."""
        cdef const uint32_t[::1] words
        cdef pi2_run *r
        cdef int i
        if allowed is not None and (problem := mask_problem(allowed, self.p.vocab)) is not None:
            raise InternalError(f"step {step_id}, the mask of slot {slot}: {problem}")
        for address, step, _ in self.waiting:
            if step.id != step_id:
                continue
            r = <pi2_run *><uintptr_t>address
            for i in range(r.n_slices):
                if r.slices[i].slot == slot:
                    words = None if allowed is None else np.ascontiguousarray(allowed)
                    pi2_mask_give(r, &r.slices[i], NULL if words is None else &words[0])

    @property
    def in_flight(self):
        return len(self.waiting)

    def ready(self):
        """Whether the oldest step has finished."""
        return bool(self.waiting) and (<pi2_run *><uintptr_t>self.waiting[0][0]).done

    def result(self):
        """StepResult of the oldest step, which has finished; and, where it was traced, (begin, end) nanoseconds of
        every operation on every thread, int64 (threads, operations), and for each thread (begin, end) of its waits
        within operations, int64 (waits, 2)."""
        cdef pi2_run *r
        cdef pi2_slice *s
        cdef int i, t, error, n = self.p.n_ops
        cdef uint64_t busy = 0
        cdef double ns_per_tick
        if not self.ready():
            raise InternalError("no finished step")
        address, step, held = self.waiting.pop(0)
        r = <pi2_run *><uintptr_t>address
        for t in range(self.p.threads):
            busy += r.busy[t]
        ns_per_tick = (r.end_ns - r.begin_ns) / max(1.0, <double>(r.end_ticks - r.begin_ticks))
        for t in range(self.p.threads):
            self.busy_ns[t] += <int64_t>(r.busy[t] * ns_per_tick)
        kernel_ns = <int64_t>(busy * ns_per_tick / self.p.threads)
        error = r.error  # atomic: clang 14 takes no switch over it
        if error == PI2_UNIT_FAILED or error == PI2_UNIT_LATE:
            raise ClusterUnitError("failed" if error == PI2_UNIT_FAILED else "has not answered in time")
        if error:
            readers = [each for each in (self.neurons, self.clusters, self.stream, self.rows) if each is not None]
            reader = readers[0]  # all read the same file; one of them knows where it ended
            raise read_failure("weights", error, reader.path, reader.deadline, max(each.ended_at for each in readers))
        if r.stopped:
            return StepResult(step.id, stopped=True, started_ns=r.begin_ns, finished_ns=r.end_ns,
                              kernel_ns=kernel_ns), None
        sampled, scores, logits = [], [], []
        for i, (rows, top, logprobs) in enumerate(held):
            s = &r.slices[i]
            if s.skipped:
                sampled.append(Skipped())
                scores.append(None)
                logits.append(None)
                continue
            if s.drafts:
                sampled.append(Verified(tuple([outcome(s.picks[j], None if top is None else top[j])
                                               for j in range(s.n_picks)])))
            elif s.sample:
                sampled.append(outcome(s.pick, None if top is None else top[0]))
            else:
                sampled.append(None)
            if s.targets != NULL:
                row = np.empty(s.count, np.float32)
                memcpy(<void *><uintptr_t>row.ctypes.data, s.scores, s.count * 4)
                scores.append(row)
            else:
                scores.append(None)
            logits.append(rows)
        times = None
        if r.trace:
            begin = np.empty((self.p.threads, n), np.uint64)
            end = np.empty((self.p.threads, n), np.uint64)
            memcpy(<void *><uintptr_t>begin.ctypes.data, r.op_begin, self.p.threads * n * 8)
            memcpy(<void *><uintptr_t>end.ctypes.data, r.op_end, self.p.threads * n * 8)
            to_ns = lambda x: r.begin_ns + ((x - r.begin_ticks).astype(np.int64) * ns_per_tick).astype(np.int64)
            waits = [np.empty((0 if r.n_waits == NULL else r.n_waits[t], 2), np.uint64) for t in range(self.p.threads)]
            for t in range(self.p.threads):
                memcpy(<void *><uintptr_t>waits[t].ctypes.data, r.waits + t * PI2_WAITS if r.waits != NULL else NULL,
                       waits[t].nbytes)
            times = to_ns(begin), to_ns(end), [to_ns(each) for each in waits]
        weights = self.weight_bytes - r.skipped_bytes + r.neuron_bytes if r.n_rows else 0
        streamed = 0 if self.stream is None or not r.n_rows else self.stream.lap_bytes - r.kept_bytes
        neurons = None
        if self.neurons is not None:
            neurons = NeuronUse(r.neuron_bytes, r.used.asked - r.before.asked, r.used.missed - r.before.missed,
                                r.used.foreseen - r.before.foreseen, r.used.missed_bytes - r.before.missed_bytes,
                                r.used.reads - r.before.reads, r.used.read_bytes - r.before.read_bytes,
                                r.used.gap_pages - r.before.gap_pages, r.used.gap_bytes - r.before.gap_bytes)
        return StepResult(step.id, tuple(sampled), tuple(scores), tuple(logits), False, r.begin_ns, r.end_ns, kernel_ns,
                          weights, streamed + r.cluster_bytes, neurons), times

    @property
    def waited_for(self):
        """Threads that a step waits for: all, or all but the assistants'."""
        return self.p.members

    def detach(self):
        """Lets the gang run another program, while none of this one's steps is in flight. Waits until no assistant's
        thread is at work in it."""
        if self.prepared and self.p.members < self.p.threads and self.gang.gang != NULL:
            with nogil:
                pi2_gang_assist(self.p.gang, self.p.threads, NULL, NULL)

    def __dealloc__(self):
        # The gang was closed before (it joins its threads after finishing what was posted). A forked child leaves all
        # as it is: buffers that a device may write to are not mapped there.
        if self.owner == getpid():
            pi2_program_free(&self.p)


cdef outcome(pi2_pick pick, top):
    """``top``: None, or int32 (logprobs, 2), pairs of an id and a float32."""
    if pick.token < 0:
        return unusable(pick.token)
    if top is None:
        return Sampled(pick.token, pick.logprob)
    ids, values = top[:, 0], top[:, 1].view(np.float32)
    return Sampled(pick.token, pick.logprob, tuple(zip(ids.tolist(), values.tolist())))


def unusable(int32_t token):
    """``Unusable`` for what ``sample`` gives instead of a token, a negative number."""
    cdef int by = PI2_UNUSABLE - token
    names = []
    if by & PI2_BY_MASK:
        names.append("token_mask")
    if by & PI2_BY_BIAS:
        names.append("logit_bias")
    if by & PI2_BY_REPETITION:
        names.append("repetition_penalty")
    if by & PI2_BY_PENALTIES:
        names += "presence_penalty", "frequency_penalty"
    return Unusable(tuple(names))


def sample(uintptr_t kernels, logits, sampling, counts, int64_t position, allowed=None):
    """One draw by itself, for tests: as ``pi2rt.executors.reference.sampling.sample``. Returns (token, logprob); see
    ``unusable`` for negative tokens."""
    cdef const uint32_t[::1] words = allowed
    cdef pi2_slot s
    cdef float[::1] x = np.array(logits, np.float32)
    cdef int32_t[::1] c = np.array(counts, np.int32)
    cdef int64_t n = x.shape[0]
    memset(&s, 0, sizeof(pi2_slot))
    s.temperature, s.top_k, s.top_p, s.min_p = sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p
    s.repetition, s.presence, s.frequency = (sampling.repetition_penalty, sampling.presence_penalty,
                                             sampling.frequency_penalty)
    s.seed, s.logprobs = sampling.seed & 0xffffffffffffffff, min(0, sampling.logprobs)
    ids = np.array([i for i, _ in sampling.logit_bias] or [0], np.int32)
    values = np.array([v for _, v in sampling.logit_bias] or [0], np.float32)
    cdef int32_t[::1] iv = ids
    cdef float[::1] vv = values
    s.n_bias, s.bias_ids, s.bias = len(sampling.logit_bias), &iv[0], &vv[0]
    if sampling.repetition_penalty != 1 or sampling.presence_penalty or sampling.frequency_penalty:
        s.counts = &c[0]
    cdef pi2_candidate *scratch = <pi2_candidate *>malloc(n * sizeof(pi2_candidate))
    if scratch == NULL:
        raise memory_failure("sampling", n * sizeof(pi2_candidate))
    pick = pi2_sample(<const pi2_kernels *>kernels, &s, &x[0], n, position, NULL if words is None else &words[0], NULL,
                      scratch)
    free(scratch)
    return pick.token, pick.logprob
