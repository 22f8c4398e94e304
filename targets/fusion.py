"""Which nodes become one kernel."""

from __future__ import annotations

from collections.abc import Container

import attrs

from jisu.compiler import ops
from jisu.compiler.graph import CONSTANT, INPUT, WEIGHT, Graph, Node
from jisu.targets.cpu import generic
from jisu.targets.cpu.generic.element import always_pulled


@attrs.frozen
class Region:
    """Nodes that one kernel computes: `results` from `leaves`, pulling what lies between (`nodes`, results included).

    `view`: no kernel at all, the result is its operand's memory.
    """

    results: tuple[Node, ...]
    leaves: tuple[Node, ...]
    view: bool = False

    @property
    def nodes(self) -> tuple[Node, ...]:
        """Every node of the region, operands first."""
        order: dict[Node, None] = {}
        leaves = set(self.leaves)

        def visit(node: Node) -> None:
            if node in leaves or node in order:
                return
            for parent in node.parents:
                visit(parent)
            order[node] = None

        for result in self.results:
            visit(result)
        return tuple(order)


def regions(graph: Graph, chosen: Container[object]) -> tuple[Region, ...]:
    """The graph's kernels in an order in which every region stands behind those that it reads."""
    needed = {o for n in graph.nodes if n.op in generic.STORED or n.op in chosen for o in n.parents} | set(
        graph.outputs
    )
    found = []
    for node in graph.nodes:
        if node.op in (INPUT, WEIGHT, CONSTANT) or (always_pulled(node) and node not in needed):
            continue
        stored = node.op in generic.STORED or node.op in chosen
        leaves = tuple(dict.fromkeys(o for o in node.parents if stored or not always_pulled(o)))
        found.append(Region((node,), leaves, node.op is ops.reshape))
    return tuple(found)
