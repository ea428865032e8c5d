"""From a divided budget to a plan, and from a plan to what executors are opened with.

Every model is opened through these two, with a plan file or without: so ``run`` does what ``plan`` writes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from pi2rt import catalogue
from pi2rt._errors import MemoryBudgetError, ModelNotFoundError, RequestError
from pi2rt.engine.lane import rows_in_flight
from pi2rt.formats import ModelFile
from pi2rt.formats.placement import Placement
from pi2rt.formats.plan import (
    VERSION,
    Plan,
    PlanChoices,
    PlanClusterUnit,
    PlanLane,
    PlanReads,
    PlanSegments,
    PlanUnit,
    Prediction,
    differences,
    plan_model,
)
from pi2rt.memory import least_window_pages, widest_window
from pi2rt.models import ModelDescription, iterate_tensors
from pi2rt.models.stream_pieces import cut, matrices_in_order
from pi2rt.opening.executor_plan import ExecutorPlan
from pi2rt.opening.options import MIXED_CHUNK, RuntimeOptions
from pi2rt.planner.cluster_units import UnitChoice
from pi2rt.planner.measure.kept_curve import kept_curve
from pi2rt.planner.measure.read_curve import ReadCurve
from pi2rt.planner.placement import UnitPlacement
from pi2rt.planner.weights import all_neurons, expert_operations, least_experts, least_neurons
from pi2rt.runtime.cluster_unit import misplaced_clusters, unit_bytes
from pi2rt.runtime.executor import ExecutorOptions, StepExecutor
from pi2rt.runtime.flash_reads import FlashReads
from pi2rt.runtime.registry import load_cluster_unit, load_executor
from pi2rt.runtime.trace import Trace

LEAST_PREFILL = 64
"""Prompt tokens that are worth a lane of their own, until a planner has measured it: a page, which the lane that
decodes need not compute."""

CHOICES = ("context", "max_sequences", "kv_type", "activations", "exact_floats", "sparsity", "kernels", "io",
           "read_deadline", "pipeline", "two_phase", "executor_options")  # fmt: skip
"""Fields of ``RuntimeOptions`` that a plan records as they are."""


def make_plan(
    file: ModelFile,
    description: ModelDescription,
    divided: ExecutorPlan,
    units: UnitPlacement,
    cores: Iterable[int],
    executor: StepExecutor,
    prefill: Iterable[str] = (),
    unit: UnitChoice | None = None,
) -> Plan:
    """What ``divided`` says, for reading and for keeping.

    Args:
        units: the actors of the lane that decodes.
        cores: that the process may use.
        executor: of the kind that decodes; it is only asked.
        prefill: names of the executors of further lanes.
        unit: the cluster unit that was asked for.
    """
    options, chosen = divided.options, divided.chosen
    actors = [PlanUnit(actor.name, list(actor.cores)) for actor in units.actors]
    lanes = [
        PlanLane(
            name=units.lead.name,
            executor=chosen.executor if isinstance(chosen.executor, str) else executor.name,
            role="decode",
            units=[actor.name for actor in actors],
            max_tokens=options.max_tokens,
            in_flight=executor.max_in_flight,
            mixed_chunk=min(MIXED_CHUNK, options.max_tokens),
        )
    ]
    for name in prefill:
        own = _other_name(name, [actor.name for actor in actors])
        actors.append(PlanUnit(own, []))
        lanes.append(
            PlanLane(
                name=own,
                executor=name,
                role="prefill",
                units=[own],
                max_tokens=options.max_tokens,
                in_flight=load_executor(name, chosen.executor_options)().max_in_flight,
                least_tokens=LEAST_PREFILL,
            )
        )
    taken = [actor.name for actor in actors]
    unit_plan, unit_size = None, 0
    if options.cluster_unit is not None and unit is not None:
        unit_plan = PlanClusterUnit(_other_name(unit.name, taken, "clusters"), unit.name, unit.clusters)
        made, clusters = options.cluster_unit(), options.unit_clusters
        unit_size = unit_bytes(file, description, made, clusters, options.max_tokens)
    placements = _placements(file, description, options)
    experts = options.expert_bytes
    segments = PlanSegments(
        process=divided.own - divided.lanes,
        lanes=divided.lanes,
        resident=max(
            0, divided.need.weights - options.ring_bytes - experts - options.neuron_bytes - unit_size
        ),
        ring=options.ring_bytes,
        experts=experts,
        neurons=options.neuron_bytes,
        kv=divided.need.kv(options.pages, options.window_pages),
        activations=divided.need.activations,
        unit=unit_size,
    )
    return Plan(
        version=VERSION,
        model=plan_model(file, description.name),
        cores=sorted(cores),
        choices=PlanChoices(
            memory=chosen.memory_bytes or None,
            cache=chosen.cache_bytes,
            **{name: getattr(chosen, name) for name in CHOICES} | {"context": options.context},
        ),
        units=actors,
        lanes=lanes,
        placements=placements,
        segments=segments,
        reads=PlanReads(**{name: getattr(options.reads, name) for name in PlanReads.__struct_fields__}),
        kv_pages=options.pages,
        window_pages=options.window_pages,
        predictions=_predictions(file, options, segments, placements, chosen)
        + ([] if unit is None else list(unit.predictions)),
        cluster_unit=unit_plan,
    )


def executor_options(
    plan: Plan, lane: PlanLane, options: Mapping[str, Any] | None = None, trace: Trace | None = None
) -> ExecutorOptions:
    """What the executor of a lane is opened with. ``options``: more fields, which no plan has."""
    choices, lead = plan.choices, plan.unit(lane.units[0])
    decodes = lane.role == "decode"
    made = ExecutorOptions(
        slots=choices.max_sequences,
        pages=plan.kv_pages,
        window_pages=plan.window_pages,
        context=choices.context,
        max_tokens=lane.max_tokens,
        cores=tuple(lead.cores),
        actor=lead.name,
        assistants=tuple((unit.name, tuple(unit.cores)) for unit in map(plan.unit, lane.units[1:])),
        kv_type=choices.kv_type,
        activations=choices.activations,
        exact_floats=choices.exact_floats,
        kernels=choices.kernels,
        io=choices.io,
        read_deadline=choices.read_deadline,
        pipeline=choices.pipeline,
        two_phase=choices.two_phase,
        reads=FlashReads(**{name: getattr(plan.reads, name) for name in PlanReads.__struct_fields__}),
        trace=trace,
        **(options or {}),
    )
    if not decodes:
        return made  # its weights are resident
    segments = plan.segments
    return replace(
        made,
        placements=plan.placements,
        ring_bytes=segments.ring,
        expert_bytes=segments.experts,
        neuron_bytes=segments.neurons,
        **unit_options(plan),
    )


def unit_options(plan: Plan) -> dict[str, Any]:
    """Fields of ``ExecutorOptions`` for the plan's cluster unit."""
    if plan.cluster_unit is None:
        return {}
    clusters = {name: tuple(numbers) for name, numbers in plan.cluster_unit.clusters.items()}
    made = load_cluster_unit(plan.cluster_unit.unit, plan.choices.executor_options)
    return {"cluster_unit": made, "unit_actor": plan.cluster_unit.name, "unit_clusters": clusters}


def check_plan(plan: Plan, file: ModelFile, description: ModelDescription, cores: Iterable[int]) -> None:
    """Refuses a plan that is not for this model and machine.

    Raises:
        RequestError: with each difference.
    """
    found = differences(plan, plan_model(file, description.name), cores)
    if not found:
        found = [*_misplaced(plan, file, description), *_wrong_windows(plan, description)]
    if found:
        raise RequestError(
            f"the plan is not for {os.fspath(file.path)!r} on this machine: {'; '.join(found)}; make another one with "
            f"'pi2rt plan'"
        )


def check_budget(
    plan: Plan, file: ModelFile, description: ModelDescription, chosen: RuntimeOptions, own: int
) -> None:
    """``own``: bytes that this process takes itself, which may be another than the one that made the plan, and that its
    prefill lanes take.

    Raises:
        MemoryBudgetError: the plan takes more than its budget.
    """
    if chosen.memory is None:
        return
    elsewhere = {name for name, where in plan.placements.items() if where is not Placement.RESIDENT}
    resident = sum(
        file.tensors[name].nbytes for name, _ in iterate_tensors(description) if name not in elsewhere
    )
    segments = plan.segments
    total = (
        own
        + resident
        + segments.ring
        + segments.experts
        + segments.neurons
        + segments.kv
        + segments.activations
        + segments.unit
    )
    if total > chosen.memory_bytes:
        parts = {
            "resident weights": resident,
            "ring": segments.ring,
            "experts": segments.experts,
            "neurons": segments.neurons,
            "KV pages": segments.kv,
            "activations": segments.activations,
            "cluster unit": segments.unit,
            "the process itself and prefill lanes": own,
        }
        made_of = ", ".join(f"{name} {-(-size >> 20)} MiB" for name, size in parts.items() if size)
        raise MemoryBudgetError(
            f"the plan takes {-(-total >> 20)} MiB, more than its memory of {chosen.memory_bytes >> 20} MiB: "
            f"{made_of}; make another one with 'pi2rt plan'"
        )


def with_plan(chosen: RuntimeOptions, given: Iterable[str], plan: Plan) -> RuntimeOptions:
    """The options of a runtime that has a plan.

    Args:
        given: names of the options that the user gave beside it.

    Raises:
        RequestError: one of these contradicts the plan.
    """
    sizes: dict[str, Any] = {
        "memory": plan.choices.memory,
        "cache": plan.choices.cache,
        "read_through": plan.reads.neuron_gap,
    }
    planned = {name: getattr(plan.choices, name) for name in CHOICES} | sizes
    planned["prefill_chunk"] = plan.lanes[0].max_tokens
    if isinstance(chosen.executor, str):
        planned["executor"] = plan.lanes[0].executor
    asked = {name: getattr(chosen, name) for name in planned}
    asked |= {
        "memory": chosen.memory_bytes or None,
        "cache": chosen.cache_bytes,
        "read_through": chosen.read_through_bytes,
    }
    for name in given:
        if name in ("threads", "cores") and getattr(chosen, name) is not None:
            raise RequestError(
                f"{name}={getattr(chosen, name)!r}: the plan says which cores compute; leave it out"
            )
        if name in planned and asked[name] != planned[name]:
            raise RequestError(f"{name}={asked[name]!r} contradicts the plan, which has {planned[name]!r}")
    if planned["cache"] == 0:
        planned["cache"] = "off"
    return replace(chosen, **planned)


def _placements(
    file: ModelFile, description: ModelDescription, options: ExecutorOptions
) -> dict[str, Placement]:
    """Of each kind in the order of use, so that two plans of one model differ in few lines."""
    kinds = (Placement.BY_ROW, Placement.STREAMED, Placement.PAGED)
    placements = {name: kind for kind in kinds for name in options.placed(kind)}
    if options.neuron_bytes:
        bundled = [
            name for name, _ in matrices_in_order(description) if file.tensors[name].layout == "neurons"
        ]
        placements |= dict.fromkeys(bundled, Placement.NEURONS)
    return placements


def _misplaced(plan: Plan, file: ModelFile, description: ModelDescription) -> Iterable[str]:
    """Tensors that cannot be where the plan has them."""
    used = {name for name, _ in iterate_tensors(description)}
    for name, placement in plan.placements.items():
        if name not in used:
            yield f"tensor {name!r} is not in the model"
            continue
        layout = file.tensors[name].layout
        wanted = "neurons" if placement is Placement.NEURONS else "blocks16"
        if placement is Placement.BY_ROW:
            if name != description.embedding:
                yield f"tensor {name!r} is placed by row, and is no embedding"
        elif placement is not Placement.RESIDENT and layout != wanted:
            yield f"tensor {name!r} is {placement.value}, which takes the layout {wanted!r}, not {layout!r}"
    if plan.cluster_unit is not None:
        problem = misplaced_clusters(file, description, plan.cluster_unit.clusters)
        if problem is not None:
            yield problem
            return
    neurons = {name for name in used if file.tensors[name].layout == "neurons"}
    if plan.segments.neurons and (missing := neurons - set(plan.placed(Placement.NEURONS))):
        yield f"tensor {min(missing)!r} is in neuron bundles, and the plan places it elsewhere"
    streamed, ring = plan.placed(Placement.STREAMED), plan.segments.ring
    least = cut(file, description, streamed, plan.reads.stream_bytes).ring if streamed else 0
    if ring < least or bool(ring) != bool(streamed):
        yield f"a ring of {ring} bytes for {len(streamed)} streamed tensors, which take {least} at least"
    if neurons and plan.segments.neurons and plan.segments.neurons < least_neurons(file):
        yield f"neurons of {plan.segments.neurons} bytes, fewer than the {least_neurons(file)} that one step takes"
    paged = set(plan.placed(Placement.PAGED))
    if paged or plan.segments.experts:
        infos = [infos for infos in expert_operations(file, description) if infos]
        if not infos or paged != {info.name for operation in infos for info in operation}:
            yield f"{len(paged)} tensors are paged: all of the experts' matrices are, or none"
        elif plan.segments.experts < least_experts(infos):
            yield f"experts of {plan.segments.experts} bytes, fewer than the {least_experts(infos)} of one expert"


def _wrong_windows(plan: Plan, description: ModelDescription) -> Iterable[str]:
    """Where windowed bytes have too little memory, or are not there."""
    if not plan.window_pages or plan.window_pages == plan.kv_pages:  # all pages have memory for all blocks
        return
    context, sequences = plan.choices.context, plan.choices.max_sequences
    window = widest_window(description, context)
    if window is None:
        yield f"window_pages={plan.window_pages}: no block has a window that is smaller than the context"
        return
    rows = sum(rows_in_flight(lane.max_tokens, lane.in_flight, sequences) for lane in plan.lanes)
    least = least_window_pages(window, sequences, rows, context)
    if plan.window_pages < least:
        yield f"window_pages={plan.window_pages}: fewer than the {least} that sequences and steps in flight hold"


def _predictions(
    file: ModelFile,
    options: ExecutorOptions,
    segments: PlanSegments,
    placements: Mapping[str, Placement],
    chosen: RuntimeOptions,
) -> list[Prediction]:
    streamed = sum(file.tensors[name].nbytes for name in options.placed(Placement.STREAMED))
    found = [Prediction("memory", "bytes", 0, segments.total, "the sum of the segments")]
    if streamed:
        found.append(
            Prediction("streamed in a step", "bytes", streamed, streamed, "sizes of the streamed tensors")
        )
        found.append(_streaming_time(file, options, streamed, chosen))
    if options.neuron_bytes:
        missing = max(0, all_neurons(file) - options.neuron_bytes)
        basis = (
            "none to all of the neurons that the cache does not hold: which are active depends on the text"
        )
        found.append(Prediction("neurons read for a token", "bytes", 0, missing, basis))
    if paged := options.placed(Placement.PAGED):
        total = sum(file.tensors[name].nbytes for name in paged)
        missing = max(0, total - options.expert_bytes)
        basis = (
            "none to all of the experts that the cache does not hold: which are chosen depends on the text"
        )
        found.append(Prediction("expert pages read for a token", "bytes", 0, missing, basis))
    return found


def _streaming_time(
    file: ModelFile, options: ExecutorOptions, streamed: int, chosen: RuntimeOptions
) -> Prediction:
    """Seconds that a step takes at least."""
    curve: ReadCurve | None = None
    try:
        kept = kept_curve(catalogue.curves_directory(), file.path, chosen.io)
        curve = None if kept is None else kept.curve
    except ModelNotFoundError:  # there is no cache directory
        pass
    what = "time of a step for its streamed tensors"
    if curve is None:
        basis = "not measured: 'pi2rt info --measure' measures the device"
        return Prediction(what, "seconds", None, None, basis)
    try:
        rate = curve.bandwidth(options.reads.stream_bytes, options.reads.stream_depth, "sequential")
    except ValueError:
        return Prediction(what, "seconds", None, None, "not measured: the curve has no reads in order")
    return Prediction(
        what, "seconds", streamed / rate, None, "the measured curve of the device: at least so long"
    )


def _other_name(executor: str, taken: list[str], does: str = "prefill") -> str:
    """Of a further lane or unit: "npu", "npu prefill", "npu prefill 2", ..."""
    name = executor if executor not in taken else f"{executor} {does}"
    number = 2
    while name in taken:
        name = f"{executor} {does} {number}"
        number += 1
    return name
