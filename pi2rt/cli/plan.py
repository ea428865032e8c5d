"""Write or show a plan: what runs where, what lies where, and how it is read.

``pi2rt plan MODEL`` writes what ``pi2rt run MODEL`` with the same options uses. ``pi2rt plan show FILE`` prints a plan.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pi2rt.cli import _runtime
from pi2rt.cli.run import CONTEXT

if TYPE_CHECKING:
    from pi2rt.formats.plan import Plan, Prediction


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help="as of 'pi2rt run'; or the word show, before a FILE")
    parser.add_argument("file", nargs="?", metavar="FILE", help="after show: the plan to print")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="where to write the plan (default: standard output)"
    )
    parser.add_argument("--svg", metavar="FILE", help="draw the actor graph of the plan")
    parser.add_argument(
        "--context", type=_runtime.positive, default=CONTEXT, metavar="N", help=f"tokens (default: {CONTEXT})"
    )
    parser.add_argument(
        "--sequences", type=_runtime.positive, default=1, metavar="N", help="requests at once (default: 1)"
    )
    parser.add_argument(
        "--prefill-lane",
        action="append",
        default=[],
        metavar="EXECUTOR",
        help="let this executor compute prompts beside the one that decodes; may repeat",
    )
    parser.add_argument(
        "--cluster-unit",
        metavar="UNIT[=N]",
        help="let this unit compute neuron clusters of each block beside the executor: N of them, or as many as "
        "measurements say that it pays for. Its sums have another order, so that text may change",
    )
    _runtime.add_runtime_options(parser)


def main(options: argparse.Namespace) -> int:
    from pi2rt._errors import RequestError
    from pi2rt.formats.plan import plan_text, read_plan, write_plan
    from pi2rt.host.output_file import OutputFile

    shows = options.model == "show"
    if shows and options.file is None:
        raise RequestError("plan show: the file of a plan is needed")
    if not shows and options.file is not None:
        raise RequestError(f"{options.file!r}: a FILE follows only on 'plan show'")
    if shows and options.output is not None:
        raise RequestError("plan show prints a plan that is there; -o writes a new one")
    outputs = [None if name is None else OutputFile(name) for name in (options.output, options.svg)]
    if shows:
        plan = read_plan(options.file)
        print("\n".join(_lines(plan)))
    else:
        plan = _plan(options)
        if outputs[0] is not None:
            write_plan(outputs[0], plan)
        elif outputs[1] is None:
            sys.stdout.write(plan_text(plan))
    if outputs[1] is not None:
        from pi2rt.runtime.graph import graph_of
        from pi2rt.tools.graph_svg import graph_svg

        with outputs[1] as svg:
            svg.write(graph_svg(graph_of(plan)).encode())
            svg.commit()
    return 0


def _plan(options: argparse.Namespace) -> Plan:
    from functools import partial

    from pi2rt.cli._interrupt import run_until_interrupted

    found: list[Any] = []
    run_until_interrupted(partial(_make, options, found))
    plan: Plan = found[0]
    return plan


async def _make(options: argparse.Namespace, found: list[Any]) -> int:
    from pi2rt import MemoryBudgetError
    from pi2rt.cli.pull import fetch
    from pi2rt.opening.opening import Opening

    path = await fetch(options.model)
    keywords = _runtime.runtime_keywords(options)
    keywords |= {"context": options.context, "max_sequences": options.sequences}
    beside = {"prefill": options.prefill_lane, "cluster_unit": options.cluster_unit}
    try:
        opening = await Opening.of(path, keywords, **beside)  # type: ignore[arg-type]
    except MemoryBudgetError as error:
        if not (options.convert and error.pack_fits):
            raise
        path = await _runtime.converted(path)
        opening = await Opening.of(path, keywords, **beside)  # type: ignore[arg-type]
    found.append(opening.plan)
    opening.close()
    return 0


def _lines(plan: Plan) -> Iterator[str]:
    from pi2rt.cli._console import size
    from pi2rt.runtime.graph import graph_of

    choices, model = plan.choices, plan.model
    yield f"model        {model.name} ({model.architecture}), {model.tensors} tensors, {size(model.nbytes)}"
    memory = "all that is free" if choices.memory is None else size(choices.memory)
    yield f"memory       {memory}; context {choices.context}, sequences {choices.max_sequences}, KV {choices.kv_type}"
    yield f"precision    activations {choices.activations}, sparsity {choices.sparsity}"
    for unit in plan.units:
        yield f"unit         {unit.name}: cores {', '.join(map(str, unit.cores)) or 'of its choice'}"
    for lane in plan.lanes:
        route = (
            f"decodes, and up to {lane.mixed_chunk} prompt tokens beside"
            if lane.role == "decode"
            else f"prompts of {lane.least_tokens} tokens or more, all but the last"
        )
        yield (
            f"lane         {lane.name}: {route}; executor {lane.executor}, units {', '.join(lane.units)}, "
            f"{lane.max_tokens} tokens in a step, {lane.in_flight} steps at once"
        )
    if (helper := plan.cluster_unit) is not None:
        counts = sorted({len(numbers) for numbers in helper.clusters.values()})
        each = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        yield (
            f"cluster unit {helper.name}: {helper.unit}, {each} neuron clusters of each of {len(helper.clusters)} "
            f"blocks"
        )
    placed = Counter(where.value for where in plan.placements.values())
    resident = model.tensors - sum(placed.values())
    yield f"placements   resident {resident}" + "".join(
        f", {where} {count}" for where, count in placed.items()
    )
    for name in plan.segments.__struct_fields__:
        if nbytes := getattr(plan.segments, name):
            yield f"segment      {name}: {size(nbytes)}"
    yield f"segment      all: {size(plan.segments.total)}"
    windowed = f", {plan.window_pages} at a time for blocks with a window" if plan.window_pages else ""
    yield f"KV pages     {plan.kv_pages}{windowed}"
    if placed:
        reads, basis = plan.reads, "chosen by the measured curve" if plan.reads.measured else "defaults"
        yield (
            f"reads        streamed {size(reads.stream_bytes)}, {reads.stream_depth} at once; neurons "
            f"{reads.neuron_depth} at once; expert pages {reads.cluster_depth} at once ({basis})"
        )
    for edge in graph_of(plan).edges:
        capacity = "" if edge.capacity is None else f", {edge.capacity} at once"
        yield f"edge         {edge.source} -> {edge.target}: {edge.item} ({edge.carrier}{capacity})"
    for prediction in plan.predictions:
        yield f"prediction   {prediction.what}: {_range(prediction)} ({prediction.basis})"


def _range(prediction: Prediction) -> str:
    from pi2rt.cli._console import duration, size

    def said(value: float | None) -> str:
        if value is None:
            return "?"
        return size(round(value)) if prediction.unit == "bytes" else duration(value)

    if prediction.low is None and prediction.high is None:
        return "not known"
    if prediction.low == prediction.high:
        return said(prediction.low)
    return f"{said(prediction.low)} to {said(prediction.high)}"
