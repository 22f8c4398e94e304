"""Pictures of graphs: DOT for other tools, and SVG written here, the data flowing from top to bottom."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

import networkx as nx

from jisu.compiler.errors import InputError
from jisu.compiler.graph import CONSTANT, INPUT, WEIGHT, Graph, Node
from jisu.compiler.text import attribute_text
from jisu.compiler.types import TensorType

_CELL = (220.0, 84.0)  # pixels from one node to the next, across and down
_BOX = (196.0, 46.0)
_COLOURS = {INPUT.name: "#d7ebff", WEIGHT.name: "#eee6d8", CONSTANT.name: "#f4f4f4"}


def _label(node: Node) -> tuple[str, str]:
    """Two lines: what the node is, and its type."""
    if node.op in (INPUT, WEIGHT):
        return f"{node.op.name} {node.name}", str(node.type)
    if node.op is CONSTANT:
        value = attribute_text(node.value)
        return value if len(value) <= 24 else f"{value[:21]}…", str(node.type)
    return node.op.name, str(node.type) if isinstance(node.type, TensorType) else f"{len(node.type.items)} results"


def layers(graph: Graph) -> Mapping[Node, int]:
    """The layer of each node: one below its deepest operand; weights and constants right above their first user."""
    depth: dict[Node, int] = {}
    for node in graph.nodes:
        depth[node] = 1 + max((depth[p] for p in node.parents), default=-1)
    for node in graph.nodes:
        if node.op in (WEIGHT, CONSTANT):
            depth[node] = max(0, min((depth[u] for u in graph.users[node]), default=1) - 1)
    return depth


def to_dot(graph: Graph) -> str:
    """The graph in Graphviz's language, nodes named n0, n1, … as in the text form."""
    number = {node: i for i, node in enumerate(graph.nodes)}
    lines = ["digraph {", "  node [shape=box, style=filled, fillcolor=white, fontname=sans];"]
    for node, i in number.items():
        label = "\\n".join(_quoted(part) for part in _label(node))
        colour = _COLOURS.get(node.op.name)
        lines.append(f'  n{i} [label="{label}"{f", fillcolor={_dot_string(colour)}" if colour else ""}];')
        lines += [f"  n{number[p]} -> n{i};" for p in node.parents]
    for i, output in enumerate(graph.outputs):
        lines += [f'  out{i} [label="output {i}", shape=plain];', f"  n{number[output]} -> out{i};"]
    return "\n".join([*lines, "}"]) + "\n"


def _quoted(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"')


def _dot_string(text: str) -> str:
    return f'"{_quoted(text)}"'


def to_svg(graph: Graph) -> str:
    """The graph as an SVG picture, placed by networkx's multipartite layout."""
    number = {node: i for i, node in enumerate(graph.nodes)}
    view = nx.DiGraph()
    for node, layer in layers(graph).items():
        view.add_node(number[node], layer=layer)
    view.add_edges_from((number[p], i) for node, i in number.items() for p in node.parents)
    place = nx.multipartite_layout(view, subset_key="layer", align="horizontal") if view else {}
    rows: dict[int, list[int]] = {}
    for i in view:
        rows.setdefault(view.nodes[i]["layer"], []).append(i)
    widest = max(map(len, rows.values()), default=1)
    at: dict[int, tuple[float, float]] = {}
    for layer, row in rows.items():
        for column, i in enumerate(sorted(row, key=lambda n: (place[n][0], n))):
            at[i] = ((column + (widest - len(row)) / 2 + 0.5) * _CELL[0], (layer + 0.5) * _CELL[1])
    width, height = widest * _CELL[0], (max(rows, default=0) + 1) * _CELL[1]
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" '
        'font-family="sans-serif" font-size="11">',
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="8" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0,0 L8,4 L0,8 z" fill="#666"/></marker></defs>',
    ]
    for a, b in view.edges:
        (x1, y1), (x2, y2) = at[a], at[b]
        y1, y2 = y1 + _BOX[1] / 2, y2 - _BOX[1] / 2
        middle = (y1 + y2) / 2
        path = f"M{x1:.0f},{y1:.0f} C{x1:.0f},{middle:.0f} {x2:.0f},{middle:.0f} {x2:.0f},{y2:.0f}"
        lines.append(f'<path d="{path}" fill="none" stroke="#666" marker-end="url(#arrow)"/>')
    returned = set(graph.outputs)
    for node, i in number.items():
        lines += _box(node, at[i], node in returned)
    return "\n".join([*lines, "</svg>"]) + "\n"


def _box(node: Node, at: tuple[float, float], returned: bool) -> list[str]:
    x, y = at
    first, second = map(escape, _label(node))
    colour, stroke = _COLOURS.get(node.op.name, "#ffffff"), 2.5 if returned else 1
    return [
        f'<rect x="{x - _BOX[0] / 2:.0f}" y="{y - _BOX[1] / 2:.0f}" width="{_BOX[0]:.0f}" height="{_BOX[1]:.0f}" '
        'rx="6" '
        f'fill="{colour}" stroke="#333" stroke-width="{stroke}"/>',
        f'<text x="{x:.0f}" y="{y - 4:.0f}" text-anchor="middle" font-weight="bold">{first}</text>',
        f'<text x="{x:.0f}" y="{y + 12:.0f}" text-anchor="middle" fill="#555">{second}</text>',
    ]


def draw(graph: Graph, path: str | Path | None = None) -> str:
    """The graph in DOT (`path` None or ending in .dot) or SVG (.svg); returns the text and writes it to `path`.

    Outputs have a thick border. Raises InputError for another ending.
    """
    ending = Path(path).suffix.lower() if path is not None else ".dot"
    if ending not in (".dot", ".svg"):
        raise InputError(f"can draw to *.dot and *.svg, not to {str(path)!r}")
    text = to_dot(graph) if ending == ".dot" else to_svg(graph)
    if path is not None:
        Path(path).write_text(text, encoding="utf-8")
    return text
