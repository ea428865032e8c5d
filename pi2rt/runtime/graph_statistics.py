"""What each actor of the graph did, and what went over each of its edges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from pi2rt.runtime.actor import ActorStatistics
from pi2rt.runtime.executor_statistics import FlashStatistics, ThreadStatistics
from pi2rt.runtime.graph import ENGINE, FLASH, Carrier, Edge, Graph, Kind, Node


@dataclass(frozen=True, slots=True)
class NodeStatistics:
    """An actor. ``state``, ``generation``: of the actor that owns its executor. ``threads``: native ones of its own;
    ``busy_ns``, ``waiting_ns``: of these, added up: inside kernels (of flash: with a read in flight), and inside steps
    without one. ``units``: what it has done, by kind: steps, row blocks, neuron clusters and units of attention that it
    took, reads, bytes."""

    name: str
    kind: Kind
    state: str
    generation: int
    threads: int
    busy_ns: int
    waiting_ns: int
    units: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class EdgeStatistics:
    """A queue. ``passed``: items that went over it; ``waiting``: that are in it now; ``peak``: the most that were.
    None: the carrier does not count that."""

    name: str
    source: str
    target: str
    item: str
    carrier: Carrier
    capacity: int | None
    passed: int | None
    waiting: int | None
    peak: int | None


def node_statistics(
    graph: Graph, leaders: Sequence[ActorStatistics], requests: int
) -> tuple[NodeStatistics, ...]:
    """One for each node, in their order.

    Args:
        leaders: of each lane, in the order of lanes.
        requests: that the engine was given.
    """
    owners = _owners(graph, leaders)
    found = []
    for node in graph.nodes:
        owner = owners.get(node.name)
        if node.name == ENGINE or owner is None:
            found.append(NodeStatistics(node.name, node.kind, "ready", 0, 0, 0, 0, {"requests": requests}))
            continue
        threads = [each for each in owner.executor.threads if each.actor == node.name]
        if node.kind == "cluster unit":
            found.append(_unit_node(node, owner, threads))
            continue
        units = _flash_units(owner) if node.name == FLASH else _units(threads)
        if owner.name == node.name:
            units = {"steps": owner.completed, **units}
        found.append(
            NodeStatistics(
                name=node.name,
                kind=node.kind,
                state=owner.state,
                generation=owner.generation,
                threads=len(threads),
                busy_ns=sum(each.kernel_ns for each in threads),
                waiting_ns=sum(each.waiting_ns for each in threads),
                units=units,
            )
        )
    return tuple(found)


def edge_statistics(
    graph: Graph, leaders: Sequence[ActorStatistics], handed_over: Mapping[str, int]
) -> tuple[EdgeStatistics, ...]:
    """One for each edge, in their order.

    Args:
        handed_over: sequences that each prefill lane handed over, by its name.
    """
    by_name = {leader.name: leader for leader in leaders}
    found = []
    for edge in graph.edges:
        passed = waiting = peak = None
        if edge.source == ENGINE:
            inbox = by_name[edge.target].inbox
            passed, waiting, peak = inbox.sent, inbox.buffered, inbox.peak_buffered
        elif edge.carrier == "state store":
            passed = handed_over.get(edge.source, 0)
        elif edge.carrier == "cursor":
            threads = by_name[edge.source].executor.threads
            passed = sum(_units([each for each in threads if each.actor == edge.target]).values())
        elif edge.carrier == "mailbox":
            lead = by_name[edge.source if edge.source in by_name else edge.target]
            passed = 0 if lead.executor.cluster_unit is None else lead.executor.cluster_unit.items
        elif edge.source == FLASH:
            passed = _passed(edge, by_name[edge.target].executor.flash)
        found.append(
            EdgeStatistics(
                edge.name,
                edge.source,
                edge.target,
                edge.item,
                edge.carrier,
                edge.capacity,
                passed,
                waiting,
                peak,
            )
        )
    return tuple(found)


def _owners(graph: Graph, leaders: Sequence[ActorStatistics]) -> dict[str, ActorStatistics]:
    """The actor whose executor runs each node."""
    owners = {leader.name: leader for leader in leaders}
    for edge in graph.edges:
        if edge.carrier == "cursor" or (edge.carrier == "mailbox" and edge.source in owners):
            owners[edge.target] = owners[edge.source]
        elif edge.source == FLASH:
            owners[FLASH] = owners[edge.target]
    return owners


def _unit_node(node: Node, owner: ActorStatistics, threads: Sequence[ThreadStatistics]) -> NodeStatistics:
    """A cluster unit. It is lost, once it failed, until its executor is made anew."""
    unit = owner.executor.cluster_unit
    return NodeStatistics(
        name=node.name,
        kind=node.kind,
        state="lost" if unit is not None and unit.lost is not None else owner.state,
        generation=owner.generation,
        threads=len(threads),
        busy_ns=sum(each.kernel_ns for each in threads),
        waiting_ns=sum(each.waiting_ns for each in threads),
        units={} if unit is None else {"items": unit.items, "rows": unit.rows},
    )


def _units(threads: Sequence[ThreadStatistics]) -> dict[str, int]:
    return {
        "row blocks": sum(each.row_blocks for each in threads),
        "neuron clusters": sum(each.clusters for each in threads),
        "units of attention": sum(each.attention for each in threads),
    }


def _flash_units(owner: ActorStatistics) -> dict[str, int]:
    flash = owner.executor.flash
    if flash is None:
        return {}
    pieces = 0 if flash.stream is None else flash.stream.reads
    return {
        "page reads": flash.page_reads,
        "piece reads": pieces,
        "row reads": flash.row_reads,
        "bytes": flash.bytes,
        "repairs": flash.repairs,
    }


def _passed(edge: Edge, flash: FlashStatistics | None) -> int | None:
    """Items that flash gave: pages that a cache had to ask for, pieces and rows that were read."""
    if flash is None:
        return None
    cached = {"neuron pages": flash.neurons, "expert page": flash.experts}.get(edge.item)
    if cached is not None:
        return cached.misses
    if edge.item == "streamed piece":
        return None if flash.stream is None else flash.stream.reads
    return flash.row_reads if edge.item == "embedding row" else None
