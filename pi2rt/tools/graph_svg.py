"""The actor graph as a picture: SVG that any browser shows, in light and in dark."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

from pi2rt.runtime.graph import ENGINE, FLASH, Edge, Graph, Node

_BOX_WIDTH, _BOX_HEIGHT = 210, 56
_COLUMN, _ROW, _MARGIN = 470, 100, 24
_AROUND = 230  # of an edge between two actors of the last column, and its text

_STYLE = """
text { font: 13px sans-serif; fill: #1c1c1c }
.detail, .edge { font-size: 11px; fill: #5a5a5a }
.box { fill: #f4f6f8; stroke: #5a6b7b; stroke-width: 1.2 }
.flash { fill: #fdf3e0; stroke: #a97718 }
.unit { fill: #ece9f6; stroke: #6a5a9b }
.engine { fill: #e9f2ea; stroke: #4b7d51 }
.line { fill: none; stroke: #5a6b7b; stroke-width: 1.4; marker-end: url(#head) }
#head path { fill: #5a6b7b }
@media (prefers-color-scheme: dark) {
  text { fill: #e8e8e8 } .detail, .edge { fill: #b0b0b0 }
  .box { fill: #26303a; stroke: #8fa3b5 } .flash { fill: #3a3020; stroke: #d7a64a }
  .engine { fill: #233026; stroke: #7fb387 } .line { stroke: #8fa3b5 } #head path { fill: #8fa3b5 }
}
"""


def graph_svg(graph: Graph) -> str:
    """Three columns: the engine; the actors that lead a lane; their assistants and flash. Edges carry the name of their
    item, the carrier and the capacity."""
    places = dict(_places(graph))
    last = max(column for column, _ in places.values())
    around = any(places[edge.source][0] == places[edge.target][0] == last for edge in graph.edges)
    width = _MARGIN * 2 + _COLUMN * last + _BOX_WIDTH + (_AROUND if around else 0)
    height = _MARGIN * 2 + _ROW * max(row for _, row in places.values()) + _BOX_HEIGHT
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}">',
        f"<style>{_STYLE}</style>",
        '<defs><marker id="head" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="8" markerHeight="8" orient="auto">',
        '<path d="M0 0L8 4L0 8z"/></marker></defs>',
    ]
    for edge in graph.edges:
        parts += _edge(edge, places)
    for node in graph.nodes:
        parts += _node(node, places[node.name])
    return "\n".join([*parts, "</svg>\n"])


def _places(graph: Graph) -> Iterator[tuple[str, tuple[int, float]]]:
    """(column, row) of each node by name."""
    leads = list(dict.fromkeys(edge.target for edge in graph.edges if edge.source == ENGINE))
    others = [node.name for node in graph.nodes if node.name not in (ENGINE, *leads)]
    rows = max(len(leads), len(others), 1)
    yield ENGINE, (0, (rows - 1) / 2)
    for column, names in ((1, leads), (2, sorted(others, key=lambda name: name == FLASH))):
        for number, name in enumerate(names):
            yield name, (column, number + (rows - len(names)) / 2)


def _corner(place: tuple[int, float]) -> tuple[float, float]:
    return _MARGIN + _COLUMN * place[0], _MARGIN + _ROW * place[1]


def _node(node: Node, place: tuple[int, float]) -> list[str]:
    x, y = _corner(place)
    kind = f"box {node.kind}" if node.kind != "units" else "box"
    middle = x + _BOX_WIDTH / 2
    return [
        f'<rect class="{kind}" x="{x:g}" y="{y:g}" width="{_BOX_WIDTH}" height="{_BOX_HEIGHT}" rx="8"/>',
        f'<text x="{middle:g}" y="{y + 24:g}" text-anchor="middle">{escape(node.name)}</text>',
        f'<text class="detail" x="{middle:g}" y="{y + 42:g}" text-anchor="middle">{escape(_short(node.detail))}</text>',
    ]


def _edge(edge: Edge, places: dict[str, tuple[int, float]]) -> list[str]:
    (x1, y1), (x2, y2) = _corner(places[edge.source]), _corner(places[edge.target])
    y1, y2 = y1 + _BOX_HEIGHT / 2, y2 + _BOX_HEIGHT / 2
    capacity = "" if edge.capacity is None else f", {edge.capacity}"
    text = escape(f"{edge.item} ({edge.carrier}{capacity})")
    if x1 == x2:  # between two actors of a column, around those between them
        x = x1 + _BOX_WIDTH
        bulge = 24 + abs(y2 - y1) / 4
        return [
            f'<path class="line" d="M{x:g} {y1:g}C{x + bulge:g} {y1:g} {x + bulge:g} {y2:g} {x:g} {y2:g}"/>',
            f'<text class="edge" x="{x + bulge * 0.75 + 6:g}" y="{(y1 + y2) / 2 + 4:g}">{text}</text>',
        ]
    right = x2 > x1
    x1, x2 = (x1 + _BOX_WIDTH, x2) if right else (x1, x2 + _BOX_WIDTH)
    middle = (x1 + x2) / 2
    label, anchor = (x2 - 14, "end") if right else (x2 + 14, "start")  # where edges of one actor are apart
    return [
        f'<path class="line" d="M{x1:g} {y1:g}C{middle:g} {y1:g} {middle:g} {y2:g} {x2:g} {y2:g}"/>',
        f'<text class="edge" x="{label:g}" y="{y2 + (16 if y1 < y2 else -7):g}" text-anchor="{anchor}">{text}</text>',
    ]


def _short(text: str) -> str:
    return text if len(text) <= 34 else f"{text[:33]}\N{HORIZONTAL ELLIPSIS}"
