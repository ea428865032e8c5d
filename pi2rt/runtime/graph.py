"""The actor graph that a plan describes: actors, and the queues between them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from pi2rt.formats.placement import Placement
from pi2rt.formats.plan import Plan

Kind: TypeAlias = Literal["engine", "units", "flash", "cluster unit"]
Carrier: TypeAlias = Literal["Trio", "cursor", "ring", "state store", "mailbox"]
"""What items travel on: a queue of Trio tasks; the atomic cursor from which several units take their next one; a ring
of native threads; KV pages that change their owner; one place for what a cluster unit is given, and one for what it has
made of it."""


@dataclass(frozen=True, slots=True)
class Node:
    """An actor. ``detail``: on what it runs, for people."""

    name: str
    kind: Kind
    detail: str


@dataclass(frozen=True, slots=True)
class Edge:
    """A queue from actor ``source`` to actor ``target``. ``capacity``: items at once, at most; None: one operation's
    worth, which the cursor counts down."""

    name: str
    source: str
    target: str
    item: str
    carrier: Carrier
    capacity: int | None


@dataclass(frozen=True, slots=True)
class Graph:
    nodes: tuple[Node, ...]
    edges: tuple[Edge, ...]


ENGINE, FLASH = "engine", "flash"

_READ = {
    Placement.STREAMED: ("streamed piece", "stream_depth"),
    Placement.NEURONS: ("neuron pages", "neuron_depth"),
    Placement.PAGED: ("expert page", "cluster_depth"),
}


def graph_of(plan: Plan) -> Graph:
    """Nodes in the order of lanes; edges from the engine first."""
    nodes, edges = [Node(ENGINE, "engine", "requests, scheduler")], []
    decode = plan.lanes[0]
    for lane in plan.lanes:
        lead = lane.units[0]
        for number, name in enumerate(lane.units):
            cores = plan.unit(name).cores
            where = f"cores {', '.join(map(str, cores))}" if cores else "cores of its choice"
            nodes.append(Node(name, "units", f"{lane.executor}, {where}" if not number else where))
        item = "step" if lane is decode else "prompt chunk"
        edges.append(Edge(f"{lane.name}.inbox", ENGINE, lead, item, "Trio", lane.in_flight))
        edges += [
            Edge(f"{lead}.{name}", lead, name, "row block, neuron cluster", "cursor", None)
            for name in lane.units[1:]
        ]
        if lane is not decode:
            slots = plan.choices.max_sequences
            edges.append(
                Edge(f"{lane.name}.sequences", lead, decode.units[0], "sequence", "state store", slots)
            )
    if (unit := plan.cluster_unit) is not None:
        nodes.append(Node(unit.name, "cluster unit", unit.unit))
        lead = decode.units[0]
        edges.append(Edge(f"{unit.name}.handoff", lead, unit.name, "input of a block", "mailbox", 1))
        edges.append(Edge(f"{unit.name}.join", unit.name, lead, "output of its clusters", "mailbox", 1))
    reads = [where for where in _READ if plan.placed(where)]
    by_row = plan.placed(Placement.BY_ROW)
    if reads or by_row:
        nodes.append(Node(FLASH, "flash", plan.choices.io))
    for placement in reads:
        item, depth = _READ[placement]
        edges.append(
            Edge(f"{FLASH}.{item}", FLASH, decode.units[0], item, "ring", getattr(plan.reads, depth))
        )
    if by_row:
        edges.append(
            Edge(f"{FLASH}.embedding row", FLASH, decode.units[0], "embedding row", "ring", decode.max_tokens)
        )
    return Graph(tuple(nodes), tuple(edges))
