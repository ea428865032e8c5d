"""How much memory the cpu executor takes for a model, before it is opened.

Activations are what the program takes from its arena: the program is built of the shapes alone, by the code that builds
the one that runs, and measured (``cython_kernels/plane/arena.h``).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from pi2rt.cython_kernels.flash.rows import memory_bytes
from pi2rt.cython_kernels.kernels import native
from pi2rt.executors.cpu.expert_pages import CachedExperts, expert_places, expert_regions
from pi2rt.executors.cpu.neurons import CachedNeurons, NeuronBlocks
from pi2rt.executors.cpu.predictors import predictor_bytes, predictor_shapes
from pi2rt.executors.cpu.program_builder import ProgramBuilder
from pi2rt.executors.cpu.weights import PackedMatrix, WeightLayout
from pi2rt.executors.flash.page_cache import cache_slots
from pi2rt.formats import ModelFile
from pi2rt.formats.placement import Placement
from pi2rt.memory import KvType, MemoryNeed, StateLayout
from pi2rt.models import ModelDescription
from pi2rt.models.stream_pieces import StreamPieces
from pi2rt.runtime.cluster_unit import unit_bytes
from pi2rt.runtime.executor import ExecutorOptions
from pi2rt.runtime.step import Floats

NOWHERE = 64
"""Address of weights that are not loaded: 0 means that a matrix is read while steps run."""


@dataclass(frozen=True, slots=True)
class _Shapes:
    """See ``PlacedWeights``: of weights that are nowhere."""

    matrices: Mapping[str, PackedMatrix]
    scales: Mapping[str, tuple[str, int]]
    vectors: Mapping[str, Floats]
    pieces: StreamPieces
    dim: int


def layout_of(file: ModelFile, model: ModelDescription, options: ExecutorOptions) -> WeightLayout:
    return WeightLayout(
        file,
        model,
        exact_floats=options.exact_floats,
        placements=options.placements,
        piece_bytes=options.reads.stream_bytes,
    )


def cpu_need(
    file: ModelFile, model: ModelDescription, options: ExecutorOptions, kv_type: KvType, threads: int
) -> MemoryNeed:
    """Reads no weights, and takes no memory for them.

    Args:
        kv_type: of the pages that the executor borrows.
        threads: that compute.

    Raises:
        UnsupportedModelError, RequestError: the model or an option is one that ``open`` refuses.
    """
    layout = layout_of(file, model, options)
    weights = _shapes(layout)
    neurons = None
    if weights.scales:
        neurons = CachedNeurons(NeuronBlocks(file, model, two_phase=options.two_phase), None)
    paged = options.placed(Placement.PAGED)
    experts = CachedExperts(expert_regions(file, paged), None) if paged else None
    state = StateLayout.of(model, kv_type, options.context)
    predictors = predictor_shapes(options.predictors, NOWHERE)
    builder = ProgramBuilder(
        file, model, weights, options, threads, None, None, neurons, experts, predictors
    )  # fmt: skip
    activations = builder.build(state, NOWHERE, NOWHERE).activation_bytes
    resident = layout.nbytes + layout.vector_bytes + options.ring_bytes
    resident += sum(each.nbytes for each in options.thresholds.values())
    if options.cluster_unit is not None:
        unit = options.cluster_unit()
        resident += unit_bytes(file, model, unit, options.unit_clusters, options.max_tokens)
    resident += sum(predictor_bytes(options.predictors[name]) for name in options.predictors)
    for name in options.placed(Placement.BY_ROW):
        info = file.tensors[name]
        activations += memory_bytes(native.TYPE_IDS[info.type], info.shape[1])
    if neurons is not None:
        resident += math.prod(cache_slots(neurons.blocks.regions, options.neuron_bytes))
    if paged:
        resident += math.prod(cache_slots(expert_places(file, paged), options.expert_bytes))
    return MemoryNeed(resident, state.page_bytes, activations, state.window_page_bytes)


def _shapes(layout: WeightLayout) -> _Shapes:
    matrices, scales, _ = layout.place(NOWHERE)
    zeros = np.zeros(max((info.shape[0] for info in layout.vector_infos), default=0), np.float32)
    vectors = {info.name: zeros[: info.shape[0]] for info in layout.vector_infos}
    return _Shapes(matrices, scales, vectors, layout.pieces, layout.dim)
