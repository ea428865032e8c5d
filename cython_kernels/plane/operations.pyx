"""What a program consists of, one operation after another (op.h)."""

from libc.stdint cimport int64_t, uint8_t, uintptr_t
from libc.stdlib cimport malloc, realloc
from libc.string cimport memcpy, memset
from posix.unistd cimport getpid

from pi2rt.cython_kernels.flash.neuron_cache cimport NeuronCache
from pi2rt.cython_kernels.flash.rows cimport Rows
from pi2rt.cython_kernels.flash.stream cimport Stream
from pi2rt.cython_kernels.kernels.declarations cimport *
from pi2rt.cython_kernels.kernels.variants cimport Variant
from pi2rt.cython_kernels.plane.cluster_unit cimport Mailbox
from pi2rt.cython_kernels.plane.declarations cimport *
from pi2rt.cython_kernels.plane.gang cimport Gang
from pi2rt.cython_kernels.plane.matrices cimport Bundles, Matrix

from pi2rt._errors import InternalError
from pi2rt.host.limits import memory_failure

SOURCES = {"x": 0, "attention": 1, "hidden": 2}
SINKS = {"y": 0, "x": 1, "mix": 2, "reduced": 3}
PIPELINES = {"none": PI2_PIPELINE_NONE, "matrix": PI2_PIPELINE_MATRIX, "cluster": PI2_PIPELINE_CLUSTER}


cdef class Operations:
    """A model's operations. Build in order with ``embed``, ``linear``, ``attention``, ``ffn``, ``add``, ``route``,
    ``head``, then ``prepare``.

    ``wide``: activations are int16, else int8. ``mixed``: int16 in two forms (``pi2_q8`` in kernels.h) in those
    operations that say so. ``stream``: its units are matrices of the operations, in their order. ``pipeline``: a key of
    PIPELINES, how far reading ``neurons`` overlaps with computing (sparse.h). ``clusters``: its regions are experts'
    matrices that are not in memory. Stream and caches outlive the gang. ``traced``: steps may be posted with ``trace``.
    ``mask_deadline``: seconds that a step waits for masks of its slices.

    ``assisting``: so many of the last threads are assistants'. Where every matrix is in memory and no neurons are read
    one by one, nobody waits for these (assist.h); else they run jobs like the others.

    ``gang``: that runs it; or a number of threads, for a program that is only measured. Such a one needs no weights,
    readers and caches: of a matrix only its shape and place count. It has ``activation_bytes``, and cannot be prepared.

    ``expert`` of an operation: it works on the rows that chose this one, as the last ``route`` before says; -1: all
    rows. Its sink "mix" adds the results times the expert's weight to y, whence ``add`` takes them.
    Norms are ``(weight float32 (n,), offset, eps)`` or None. Everything passed in must stay alive and unmoved.
    """

    def __init__(self, gang, Variant kernels not None, *, int64_t dim, int64_t vocab, int64_t max_rows,
                 int64_t max_slots, int64_t context, bint wide=True, bint mixed=False, float embedding_scale=1,
                 float logit_softcap=0, Stream stream=None, NeuronCache neurons=None, NeuronCache clusters=None,
                 pipeline="cluster", bint traced=False, int assisting=0, double mask_deadline=10.0):
        self.owner = getpid()
        self.only_measured = not isinstance(gang, Gang)
        self.gang, self.stream = None if self.only_measured else gang, stream
        self.neurons, self.clusters = neurons, clusters
        self.keep = []
        p = &self.p
        p.threads, p.kernels = len(self.gang.cores) if self.gang is not None else gang, kernels.table
        if self.gang is not None:
            p.gang = self.gang.gang
        if not 0 <= assisting < p.threads:
            raise InternalError(f"{assisting} of {p.threads} threads assist")
        p.assisting = assisting
        p.dim, p.vocab, p.max_rows, p.max_slots, p.context = dim, vocab, max_rows, max_slots, context
        p.wide, p.mixed, p.traced = wide, mixed, traced
        p.mask_deadline_ns = <int64_t>(mask_deadline * 1e9)
        if stream is not None:
            p.stream = stream.stream
        if neurons is not None:
            p.neurons = neurons.cache
        if clusters is not None:
            p.clusters = clusters.cache
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
            m = <Matrix?>matrix
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

    def embed(self, Matrix matrix not None, *, Rows rows=None):
        """``rows``: of a matrix that is not in memory; they outlive the gang."""
        if not self.only_measured and (matrix.m.data == NULL) != (rows is not None):
            raise InternalError("an embedding is in memory or in a file")
        data = <pi2_embed *>self.operation(PI2_EMBED, -1).data
        data.matrix, data.scale, self.rows = matrix.m, self.embedding_scale, rows
        if rows is not None:
            data.rows = rows.rows
        self.keep.append(matrix)

    def linear(self, int layer, norm, source, sink, matrices, *, bint q8_in=False, bint mixed=False,
               int expert=-1):
        op = self.operation(PI2_LINEAR, layer)
        op.expert = expert
        op.norm = self.norm_of(norm)
        op.source, op.sink, op.q8_in, op.mixed = SOURCES[source], SINKS[sink], q8_in, mixed
        self.set_matrices(op, matrices)

    def ffn(self, int layer, norm, Matrix up not None, Matrix gate, int activation, int up_activation, *,
            bint q8_out, bint mixed=False, int expert=-1):
        op = self.operation(PI2_FFN, layer)
        op.expert = expert
        op.norm = self.norm_of(norm)
        data = <pi2_ffn *>op.data
        data.activation, data.up_activation, op.q8_out, op.mixed = activation, up_activation, q8_out, mixed
        self.set_matrices(op, [up] if gate is None else [up, gate])

    def sparse_ffn(self, int layer, norm, sink, Matrix decides, Bundles bundles not None, int activation,
                   int up_activation, *, bint mixed=False, bint mixed_down=False, int expert=-1):
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

    def hand_off(self, int layer, norm, Mailbox mailbox):
        """Gives a mailbox the input of the block that follows; ``join`` follows that."""
        op = self.operation(PI2_HANDOFF, layer)
        op.norm = self.norm_of(norm)
        self.set_unit(op, mailbox)

    def join(self, int layer, sink, Mailbox mailbox):
        """Adds what the unit has made of it. ``sink``: the block's, "x" or "y"."""
        op = self.operation(PI2_JOIN, layer)
        op.sink = SINKS[sink]
        self.set_unit(op, mailbox)

    cdef int set_unit(self, pi2_op *op, Mailbox mailbox) except -1:
        if not self.only_measured:
            if mailbox is None:
                raise InternalError("a block's clusters are elsewhere, and there is no unit")
            (<pi2_hop *>op.data).unit = mailbox.unit
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

    def head(self, norm, Matrix matrix not None):
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

    def __dealloc__(self):
        # The gang was closed before (it joins its threads after finishing what was posted). A forked child leaves all
        # as it is: buffers that a device may write to are not mapped there.
        if self.owner == getpid():
            pi2_program_free(&self.p)
