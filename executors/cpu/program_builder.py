"""From a model description to a native program: one operation after another, with pointers to weights and cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from pi2rt._errors import UnsupportedModelError
from pi2rt.cython_kernels.flash.rows import Rows
from pi2rt.cython_kernels.flash.stream import Stream
from pi2rt.cython_kernels.kernels import native
from pi2rt.cython_kernels.plane.gang import Gang
from pi2rt.cython_kernels.plane.matrices import Matrix
from pi2rt.cython_kernels.plane.program import Program
from pi2rt.executors.cpu.expert_pages import CachedExperts
from pi2rt.executors.cpu.neurons import CachedNeurons
from pi2rt.executors.cpu.predictors import LoadedPredictor
from pi2rt.executors.cpu.unit_clusters import UnitClusters
from pi2rt.executors.cpu.weights import PackedMatrix, PlacedWeights
from pi2rt.formats import ModelFile
from pi2rt.memory import PagedLayout, StateLayout
from pi2rt.models import Attention, Block, FeedForward, Linear, MixtureOfExperts, ModelDescription, Norm, Rope
from pi2rt.runtime.executor import ExecutorOptions
from pi2rt.runtime.step import Floats

FLOATS = ("F32", "F16", "BF16")


class ProgramBuilder:
    """Builds the program of a model for a gang of threads; or for a number of threads, to be measured (``need.py``)."""

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
        self._file, self._model, self._weights, self._options = file, model, weights, options
        self._program = Program(
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
        p, model = self._program, self._model
        embedding = self._matrix(Linear(model.embedding))
        p.embed(embedding, rows=self._rows)
        self._state, self._pages, self._windowed = layout, pages, windowed
        self._places = {(each.layer, each.block): each for each in layout.paged}
        for index, layer in enumerate(model.layers):
            for number, block in enumerate(layer.blocks):
                BLOCKS[type(block)](self, block, index, number)
        p.head(self._norm(model.final_norm), self._matrix(model.head))
        return p

    def _attention(self, block: Attention, index: int, number: int) -> None:
        p, place = self._program, self._places[index, number]
        group = block.n_heads // block.n_kv_heads
        if group > 128:
            raise UnsupportedModelError(
                self._file.path,
                "attention",
                f"{group} query heads for each KV head; at most 128 are supported",
            )
        # The output is quantised where it is made, if its int8 blocks lie within one KV head's share of it.
        # Which blocks of a row are fine depends on all of it.
        mixed = self._is_mixed(block.out)
        q8 = not mixed and not self._is_float(block.out) and group * block.head_dim % 32 == 0
        p.linear(
            index,
            self._norm(block.norm),
            "x",
            "y",
            [self._matrix(m) for m in (block.q, block.k, block.v)],
            mixed=self._is_mixed(block.q, block.k, block.v),
        )
        p.attention(
            index,
            n_heads=block.n_heads,
            n_kv_heads=block.n_kv_heads,
            head_dim=block.head_dim,
            window=block.window or 0,
            scale=block.scale,
            softcap=block.softcap or 0.0,
            rope=self._rope(block.rope),
            q_norm=self._norm(block.q_norm),
            k_norm=self._norm(block.k_norm),
            kv=(self._windowed if place.windowed else self._pages) + place.offset,
            page_stride=self._state.window_page_bytes if place.windowed else self._state.page_bytes,
            head_stride=place.head_stride,
            v_offset=place.v_offset,
            kv_type=native.KV_TYPES[self._state.kv_type],
            q8_out=q8,
        )
        sink = "x" if block.post_norm is None else "y"
        p.linear(index, None, "attention", sink, [self._matrix(block.out)], q8_in=q8, mixed=mixed)
        self._close(index, block.post_norm)

    def _feed_forward(self, block: FeedForward, index: int, number: int) -> None:
        self._neurons_of(index, block)
        self._close(index, block.post_norm)

    def _neurons_of(self, index: int, block: FeedForward, expert: int = -1) -> None:
        """``expert``: the number of one of a mixture's; -1: the block stands by itself."""
        sink = "mix" if expert >= 0 else "x" if block.post_norm is None else "y"
        mixed = self._is_mixed(block.up, *(() if block.gate is None else (block.gate,)))
        mixed_down = self._is_mixed(block.down)
        if self._neurons is not None and block.down.weight in self._weights.scales:
            helped = self._options.unit_clusters.get(block.down.weight) if self._helped else None
            mailbox = None if self._unit is None else self._unit.mailbox
            if helped:
                self._program.hand_off(index, self._norm(block.norm), mailbox)
            self._program.sparse_ffn(
                index,
                self._norm(block.norm),
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
                self._program.join(index, sink, mailbox)
            return
        q8 = not mixed_down and not self._is_float(block.down)  # then hidden is a multiple of 32
        self._program.ffn(
            index,
            self._norm(block.norm),
            self._matrix(block.up),
            None if block.gate is None else self._matrix(block.gate),
            native.ACTIVATIONS[block.activation],
            native.ACTIVATIONS[block.up_activation],
            q8_out=q8,
            mixed=mixed,
            expert=expert,
        )
        down = [self._matrix(block.down)]
        self._program.linear(index, None, "hidden", sink, down, q8_in=q8, mixed=mixed_down, expert=expert)

    def _deciding(self, index: int, block: FeedForward, expert: int) -> Matrix | None:
        """What says which neurons of a block are read. None: all of them."""
        decides = block.up if block.gate is None else block.gate
        if decides.weight not in self._weights.scales:
            return self._matrix(decides)
        predictor = self._predictors.get(block.down.weight)
        if predictor is None:
            return None
        self._program.linear(index, self._norm(block.norm), "x", "reduced", [predictor.first], expert=expert)
        return predictor.second

    def _mixture(self, block: MixtureOfExperts, index: int, number: int) -> None:
        p, shared = self._program, block.shared_expert()
        routers = [self._matrix(block.router)]
        if block.shared is not None:
            routers.append(self._matrix(Linear(block.shared.router)))
        p.linear(index, self._norm(block.norm), "x", "y", routers)
        p.route(
            index,
            n_experts=block.n_experts,
            n_used=block.n_used,
            normalized=block.normalized,
            shared=shared is not None,
        )
        for expert in range(block.n_experts):
            self._neurons_of(index, block.expert(expert), expert)
        if shared is not None:
            self._neurons_of(index, shared, block.n_experts)
        p.add(index, self._norm(block.post_norm))

    def _close(self, index: int, post_norm: Norm | None) -> None:
        """The block's output is added to the residual stream through its second norm, where it has one."""
        if post_norm is not None:
            self._program.add(index, self._norm(post_norm))

    def _is_mixed(self, *linears: Linear) -> bool:
        """Whether rows that meet these matrices become int16 in both forms. By the type in the file, whatever form a
        matrix has here, so that each of them gives the same bits."""
        types = {self._file.tensors[each.weight].type for each in linears}
        return self._options.activations == "mixed" and not types <= set(FLOATS)

    def _is_float(self, linear: Linear) -> bool:
        return self._weights.matrices[linear.weight].type in FLOATS

    def _matrix(self, linear: Linear) -> Matrix:
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

    def _norm(self, norm: Norm | None) -> tuple[Floats, float, float] | None:
        return None if norm is None else (self._weights.vectors[norm.weight], norm.offset, norm.eps)

    def _rope(self, rope: Rope | None) -> int:
        if rope is None:
            return -1
        if rope not in self._ropes:
            frequencies = np.array(rope.inverse_frequencies, np.float64)
            self._ropes[rope] = self._program.rope(frequencies, rope.style == "interleaved", rope.magnitude)
        return self._ropes[rope]


BLOCKS: dict[type[Block], Callable[[ProgramBuilder, Any, int, int], None]] = {
    Attention: ProgramBuilder._attention,
    FeedForward: ProgramBuilder._feed_forward,
    MixtureOfExperts: ProgramBuilder._mixture,
}
"""What appends the operations of each kind of block: of the builder, the block, its layer and its number there."""
