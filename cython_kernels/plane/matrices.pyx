"""Weights as operations have them: matrices, and bundles of neurons (op.h, sparse.h)."""

from libc.stdint cimport int64_t, uint8_t, uint16_t, uintptr_t

from pi2rt.cython_kernels.plane.declarations cimport *

from pi2rt._errors import InternalError


cdef class Matrix:
    """Row blocks of a weight matrix: ``address`` stays valid as long as the program lives; 0: it lies in parts of
    ``page_blocks`` row blocks, which are pages of region ``region`` of the program's clusters, or units of its stream:
    ``piece``, the first one's number and from each to the next. Neither: ``embed`` reads its rows one by one."""

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
