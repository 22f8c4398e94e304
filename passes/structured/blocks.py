"""Blocks of the residual stream: what stands between two values of one type, the later of which is the earlier plus something.

A model's layers are found by dominance: the values that every path from the first input to the output passes. A step from one to the
next is residual if the next one adds to it (directly, or as the residual of a linear layer). A block is as many steps as hold one
attention, which comes first; in a model without attention each step is one.
"""

from __future__ import annotations

import attrs
import networkx as nx

from jisu.compiler import ops
from jisu.compiler.graph import WEIGHT, Graph, Node

_SAME = (ops.reshape, ops.transpose, ops.cast)
"""Ops that hand the stream on in another shape."""


@attrs.frozen(eq=False)
class Block:
    """Everything between two values of one type. names: of the weights that only it uses, without ".weight"."""

    begin: Node
    end: Node
    names: tuple[str, ...]


def find_blocks(graph: Graph) -> list[Block]:
    """The blocks of the residual stream, in order; none where the model has no such stream."""
    found: list[Block] = []
    begin: Node | None = None
    attended = False
    no_attention = not graph.count(ops.attention)
    chain = _dominators(graph)

    def close(end: Node) -> None:
        if begin is not None and begin is not end and begin.type == end.type:
            found.append(Block(begin, end, _names(graph, begin, end)))

    for before, after in zip(chain, chain[1:], strict=False):
        inside = between(before, after)
        if _adds(before, after):
            attends = no_attention or any(n.op is ops.attention for n in inside)
            if attends and (attended or begin is None):
                close(before)
                begin, attended = before, False
            attended = attended or attends
        elif after.op not in _SAME or len(inside) > 1:
            close(before)
            begin, attended = None, False
    return found


def _dominators(graph: Graph) -> list[Node]:
    """The nodes on every path from the first input to the first output, in order."""
    index = {node: i for i, node in enumerate(graph.nodes)}
    view = nx.DiGraph((index[o], index[n]) for n in graph.nodes for o in n.parents)
    start, end = index[graph.inputs[0]], index[graph.outputs[0]]
    if start not in view or end not in nx.descendants(view, start):
        return []
    above = nx.immediate_dominators(view, start)
    path = [end]
    while path[-1] != start:
        path.append(above[path[-1]])
    return [graph.nodes[i] for i in reversed(path)]


def _adds(before: Node, after: Node) -> bool:
    """Whether `after` is `before` plus something, perhaps in several sums."""
    stack, seen = [after], set()
    while stack:
        node = stack.pop()
        if node is before:
            return True
        if node not in seen and node.op in (ops.add, ops.linear):
            seen.add(node)
            stack += [o for o in (node.operands if node.op is ops.add else node.operands[3:]) if o is not None]
    return False


def between(before: Node, after: Node) -> set[Node]:
    """What `after` is computed from, itself included, without `before` and what that is computed from."""
    old, stack = set(), [before]
    while stack:
        node = stack.pop()
        if node not in old:
            old.add(node)
            stack += node.parents
    found, stack = set(), [after]
    while stack:
        node = stack.pop()
        if node not in found and node not in old:
            found.add(node)
            stack += node.parents
    return found


def _names(graph: Graph, begin: Node, end: Node) -> tuple[str, ...]:
    inside = between(begin, end)
    return tuple(
        n.name.removesuffix(".weight")
        for n in graph.nodes
        if n in inside and n.op is WEIGHT and all(user in inside for user in graph.users[n])
    )


def remove_block(graph: Graph, block: Block) -> Graph:
    """The graph in which the block hands on what it gets."""
    done: dict[Node, Node] = {}
    for node in graph.nodes:
        if node is block.end:
            done[node] = done[block.begin]
        else:
            done[node] = node.with_operands(None if o is None else done[o] for o in node.operands)
    return graph.replace(outputs=tuple(done[o] for o in graph.outputs))
