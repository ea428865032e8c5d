"""From a model description to a native program: one operation after another, with pointers to weights and cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import numpy as np

from pi2rt.cython_kernels.flash.rows import Rows
from pi2rt.cython_kernels.flash.stream import Stream
from pi2rt.cython_kernels.kernels import native
from pi2rt.cython_kernels.plane.gang import Gang
from pi2rt.cython_kernels.plane.matrices import Matrix
from pi2rt.cython_kernels.plane.program import Program
from pi2rt.executors.cpu.blocks import BLOCKS
from pi2rt.executors.cpu.expert_pages import CachedExperts
from pi2rt.executors.cpu.neurons import CachedNeurons
from pi2rt.executors.cpu.predictors import LoadedPredictor
from pi2rt.executors.cpu.unit_clusters import UnitClusters
from pi2rt.executors.cpu.weights import PackedMatrix, PlacedWeights
from pi2rt.formats import ModelFile
from pi2rt.memory import PagedLayout, StateLayout
from pi2rt.models import FeedForward, Linear, ModelDescription, Norm, Rope
from pi2rt.runtime.executor import ExecutorOptions
from pi2rt.runtime.step import Floats

FLOATS = ("F32", "F16", "BF16")


class KeysAndValues(TypedDict):
    """Where those of a block lie, in bytes (``pi2_kv`` in ``cython_kernels/kernels/kernels.h``)."""

    kv: int
    page_stride: int
    head_stride: int
    v_offset: int
    kv_type: int


class ProgramBuilder:
    """Builds the program of a model for a gang of threads; or for a number of threads, to be measured (``need.py``).

    Functions in ``BLOCKS`` append a block's operations to ``program`` with the arguments that ``matrix``, ``norm``,
    ``rope``, ``keys_and_values``, ``is_mixed`` and ``is_float`` give for parts of its description. ``end_block`` is the
    last that most of them call. ``feed_forward`` appends a whole feed-forward block, however its weights are kept.
    ``file``: the model's, for errors.
    """

    def __init__(
        self,
        file: ModelFile,
        model: ModelDescription,
        weights: PlacedWeights,
        options: ExecutorOptions,
        gang: Gang | int,
        stream: Stream | None,
        rows: Rows | None,
        neurons: CachedNeurons | None,
        clusters: CachedExperts | None,
        predictors: Mapping[str, LoadedPredictor],
        unit: UnitClusters | None = None,
    ) -> None:
        self.file, self._model, self._weights, self._options = file, model, weights, options
        self.program = Program(
            gang,
            native.Variant(options.kernels),
            dim=model.dim,
            vocab=model.vocab_size,
            max_rows=options.max_tokens,
            max_slots=options.slots,
            context=options.context,
            pages=options.pages,
            wide=options.activations != "int8",
            mixed=options.activations == "mixed",
            embedding_scale=model.embedding_scale,
            logit_softcap=model.logit_softcap or 0.0,
            stream=stream,
            neurons=None if neurons is None else neurons.cache,
            clusters=None if clusters is None else clusters.cache,
            pipeline=options.pipeline,
            traced=options.trace is not None,
            assisting=sum(len(cores) for _, cores in options.assistants),
            mask_deadline=options.mask_deadline,
        )
        self._neurons = neurons
        self._clusters = clusters
        self._predictors = predictors
        self._rows = rows
        self._unit = unit
        self._helped = unit is not None or isinstance(
            gang, int
        )  # a unit that was lost leaves its clusters here
        self._ropes: dict[Rope, int] = {}
        self._state: StateLayout
        self._pages = self._windowed = 0
        self._places: Mapping[tuple[int, int], PagedLayout] = {}

    def build(self, layout: StateLayout, pages: int, windowed: int) -> Program:
        """Not prepared yet. ``pages``, ``windowed``: addresses of the two areas of the KV pages that it works on, which
        ``layout`` describes."""
        p, model = self.program, self._model
        embedding = self.matrix(Linear(model.embedding))
        p.embed(embedding, rows=self._rows)
        self._state, self._pages, self._windowed = layout, pages, windowed
        self._places = {(each.layer, each.block): each for each in layout.paged}
        for index, layer in enumerate(model.layers):
            for number, block in enumerate(layer.blocks):
                BLOCKS[type(block)](self, block, index, number)
        p.head(self.norm(model.final_norm), self.matrix(model.head))
        return p

    def feed_forward(self, index: int, block: FeedForward, expert: int = -1) -> None:
        """Appends all of a feed-forward block but ``end_block``. ``expert``: the number of one of a mixture's, whose
        output is mixed into y; -1: the block stands by itself."""
        sink = "mix" if expert >= 0 else "x" if block.post_norm is None else "y"
        mixed = self.is_mixed(block.up, *(() if block.gate is None else (block.gate,)))
        mixed_down = self.is_mixed(block.down)
        if self._neurons is not None and block.down.weight in self._weights.scales:
            helped = self._options.unit_clusters.get(block.down.weight) if self._helped else None
            mailbox = None if self._unit is None else self._unit.mailbox
            if helped:
                self.program.hand_off(index, self.norm(block.norm), mailbox)
            self.program.sparse_ffn(
                index,
                self.norm(block.norm),
                sink,
                self._deciding(index, block, expert),
                self._neurons.blocks.block(
                    block, self._weights, self._options.thresholds.get(block.down.weight), helped or ()
                ),
                native.ACTIVATIONS[block.activation],
                native.ACTIVATIONS[block.up_activation],
                mixed=mixed,
                mixed_down=mixed_down,
                expert=expert,
            )
            if helped:
                self.program.join(index, sink, mailbox)
            return
        q8 = not mixed_down and not self.is_float(block.down)  # then hidden is a multiple of 32
        self.program.ffn(
            index,
            self.norm(block.norm),
            self.matrix(block.up),
            None if block.gate is None else self.matrix(block.gate),
            native.ACTIVATIONS[block.activation],
            native.ACTIVATIONS[block.up_activation],
            q8_out=q8,
            mixed=mixed,
            expert=expert,
        )
        down = [self.matrix(block.down)]
        self.program.linear(index, None, "hidden", sink, down, q8_in=q8, mixed=mixed_down, expert=expert)

    def _deciding(self, index: int, block: FeedForward, expert: int) -> Matrix | None:
        """What says which neurons of a block are read. None: all of them."""
        decides = block.up if block.gate is None else block.gate
        if decides.weight not in self._weights.scales:
            return self.matrix(decides)
        predictor = self._predictors.get(block.down.weight)
        if predictor is None:
            return None
        self.program.linear(index, self.norm(block.norm), "x", "reduced", [predictor.first], expert=expert)
        return predictor.second

    def end_block(self, index: int, post_norm: Norm | None) -> None:
        """Adds the block's output, which is in y, to the residual stream x through its second norm. Without one it does
        nothing: then the block's last operation has x as its sink."""
        if post_norm is not None:
            self.program.add(index, self.norm(post_norm))

    def is_mixed(self, *linears: Linear) -> bool:
        """Whether rows that meet these matrices become int16 in both forms. By the type in the file, whatever form a
        matrix has here, so that each of them gives the same bits."""
        types = {self.file.tensors[each.weight].type for each in linears}
        return self._options.activations == "mixed" and not types <= set(FLOATS)

    def is_float(self, linear: Linear) -> bool:
        """Whether the matrix has floats here, so that rows that meet it are not quantised."""
        return self._weights.matrices[linear.weight].type in FLOATS

    def matrix(self, linear: Linear) -> Matrix:
        """A matrix and its bias, wherever it is: in memory, streamed, or in pages of an expert."""
        packed: PackedMatrix = self._weights.matrices[linear.weight]
        bias = None if linear.bias is None else self._weights.vectors[linear.bias]
        paged = None if self._clusters is None else self._clusters.matrices.get(linear.weight)
        region, page_blocks = (-1, 0) if paged is None else paged
        streamed = self._weights.pieces.matrices.get(linear.weight)
        if streamed is not None:
            page_blocks = streamed.blocks
        return Matrix(
            native.TYPE_IDS[packed.type],
            packed.rows,
            packed.columns,
            packed.address,
            bias,
            piece=None if streamed is None else (streamed.first, streamed.stride),
            region=region,
            page_blocks=page_blocks,
        )

    def norm(self, norm: Norm | None) -> tuple[Floats, float, float] | None:
        """Its weight, the offset that is added to the weight, and epsilon."""
        return None if norm is None else (self._weights.vectors[norm.weight], norm.offset, norm.eps)

    def keys_and_values(self, layer: int, number: int) -> KeysAndValues:
        """Where those of the block with this number in its layer lie, as ``Program.attention`` takes it."""
        place = self._places[layer, number]
        return {
            "kv": (self._windowed if place.windowed else self._pages) + place.offset,
            "page_stride": self._state.window_page_bytes if place.windowed else self._state.page_bytes,
            "head_stride": place.head_stride,
            "v_offset": place.v_offset,
            "kv_type": native.KV_TYPES[self._state.kv_type],
        }

    def rope(self, rope: Rope | None) -> int:
        """The number of a rotation in the program; -1: none."""
        if rope is None:
            return -1
        if rope not in self._ropes:
            frequencies = np.array(rope.inverse_frequencies, np.float64)
            self._ropes[rope] = self.program.rope(frequencies, rope.style == "interleaved", rope.magnitude)
        return self._ropes[rope]
