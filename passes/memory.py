"""Memory planning: when each value lives, and the most that intermediate values need at once."""

from __future__ import annotations

from collections.abc import Mapping

import attrs

from jisu.compiler import ops
from jisu.compiler.cost import VIEWS
from jisu.compiler.graph import Graph, Node
from jisu.compiler.types import TensorType, TupleType, substitute

SHARING = VIEWS | {ops.cache_append}
"""Ops whose result shares its operand's storage."""


@attrs.frozen
class MemoryPlan:
    """peak_bytes: the most that intermediates need at once; peak_at: the node at which; total_bytes: without any reuse."""

    peak_bytes: int
    peak_at: str
    total_bytes: int


def plan_memory(graph: Graph, env: Mapping[str, int]) -> MemoryPlan:
    """The lifetimes of `graph`'s intermediates with every symbol fixed by `env`, executed in the graph's order.

    Inputs, weights and constants are not counted. Raises TypeRuleError where `env` lacks a symbol.
    """
    owner: dict[Node, Node] = {}
    last: dict[Node, int] = {}
    for i, node in enumerate(graph.nodes):
        owner[node] = owner[node.parents[0]] if node.op in SHARING else node
        for parent in node.parents:
            last[owner[parent]] = i
        last[owner[node]] = max(last.get(owner[node], i), i)
    for output in graph.outputs:
        last[owner[output]] = len(graph.nodes)
    ends: dict[int, list[Node]] = {}
    for node, i in last.items():
        ends.setdefault(i, []).append(node)
    live = peak = total = 0
    where = ""
    for i, node in enumerate(graph.nodes):
        if owner[node] is node and not node.op.leaf:
            size = _bytes(node, env)
            live, total = live + size, total + size
            if live > peak:
                peak, where = live, f"%{i} = {node.op.name}"
        for dead in ends.get(i, ()):
            if not dead.op.leaf:
                live -= _bytes(dead, env)
    return MemoryPlan(peak, where, total)


def _bytes(node: Node, env: Mapping[str, int]) -> int:
    types = node.type.items if isinstance(node.type, TupleType) else (node.type,)
    return sum(substitute(t.nbytes, env) for t in types if isinstance(t, TensorType))
