"""The picture of an actor graph."""

from __future__ import annotations

from xml.etree import ElementTree

from pi2rt.runtime.graph import Edge, Graph, Node, graph_of
from pi2rt.tools.graph_svg import graph_svg
from tests.formats.test_plan import DOCUMENT, parsed


def texts(graph: Graph) -> list[str]:
    root = ElementTree.fromstring(graph_svg(graph))
    return [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]


def test_the_graph_of_a_plan() -> None:
    graph = graph_of(parsed(DOCUMENT))
    assert [node.name for node in graph.nodes] == ["engine", "big", "little", "npu", "dsp", "flash"]
    assert [(edge.source, edge.target, edge.carrier, edge.capacity) for edge in graph.edges] == [
        ("engine", "big", "Trio", 8),
        ("big", "little", "cursor", None),
        ("engine", "npu", "Trio", 2),
        ("npu", "big", "state store", 2),
        ("big", "dsp", "mailbox", 1),
        ("dsp", "big", "mailbox", 1),
        ("flash", "big", "ring", 32),
        ("flash", "big", "ring", 8),
        ("flash", "big", "ring", 64),
    ]


def test_every_node_and_edge_is_in_the_picture() -> None:
    graph = graph_of(parsed(DOCUMENT))
    shown = texts(graph)
    for node in graph.nodes:
        assert node.name in shown
    assert "prompt chunk (Trio, 2)" in shown
    assert "row block, neuron cluster (cursor)" in shown
    assert "sequence (state store, 2)" in shown
    assert "input of a block (mailbox, 1)" in shown


def test_names_are_text() -> None:
    graph = Graph(
        (Node("engine", "engine", "&"), Node("<script>", "units", '"quoted"')),
        (Edge("e", "engine", "<script>", "a & b", "Trio", 1),),
    )
    assert texts(graph) == ["a & b (Trio, 1)", "engine", "&", "<script>", '"quoted"']
