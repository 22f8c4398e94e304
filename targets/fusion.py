"""Which nodes become one kernel."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence

import attrs
import networkx as nx

from jisu.compiler import ops
from jisu.compiler.graph import CONSTANT, INPUT, WEIGHT, Graph, Node
from jisu.compiler.ops import ELEMENTWISE
from jisu.compiler.ops.shape import windows
from jisu.compiler.types import same_shape
from jisu.targets.cpu import generic
from jisu.targets.cpu.generic import reduce
from jisu.targets.cpu.generic.element import always_pulled, is_literal
from jisu.targets.cpu.generic.moves import is_checked
from jisu.targets.cpu.generic.scalar import EXPENSIVE


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


MAX_NODES = 30  # of one kernel: beyond that LLVM's time grows faster than what a saved pass over memory is worth
_CHEAP_USES = 4

_MOVES = frozenset({ops.broadcast_to, ops.transpose, ops.slice_, ops.flip, windows})
# These read an operand at each index once; every other op that pulls may come back to an element.
_ONCE = frozenset(
    {*_MOVES - {ops.broadcast_to, windows}, *ELEMENTWISE, *reduce.BODIES, ops.concat, ops.pad, ops.sort}
) - {ops.softmax}
_PULLING = _ONCE | {ops.broadcast_to, windows, ops.softmax}


def regions(graph: Graph, chosen: Container[object], joined: Sequence[Region] = ()) -> tuple[Region, ...]:
    """The graph's kernels in an order in which every region stands behind those that it reads.

    joined: regions that are settled, which are `separable`.
    """
    inlined = _inlined(graph, chosen)
    taken = {node for region in joined for node in region.nodes}
    found = list(joined)
    for node in graph.nodes:
        if node.op not in (INPUT, WEIGHT, CONSTANT) and node not in inlined and node not in taken:
            stored = node.op in generic.STORED or node.op in chosen
            found.append(Region((node,), _leaves((node,), inlined, stored), node.op is ops.reshape))
    return _ordered(graph, _merged(graph, list(_ordered(graph, found)), inlined, chosen))


def separable(graph: Graph, joined: Iterable[Region]) -> bool:
    """Whether regions can be computed one after another: each node at most in one, and none needs what another makes of its results."""
    number: dict[Node, int] = {}
    for i, region in enumerate(joined):
        for node in region.nodes:
            if number.setdefault(node, -1 - i) != -1 - i:
                return False
    for i, node in enumerate(graph.nodes):
        number.setdefault(node, i)
    edges = {(number[parent], number[node]) for node in graph.nodes for parent in node.parents}
    return nx.is_directed_acyclic_graph(nx.DiGraph((a, b) for a, b in edges if a != b))


def _inlined(graph: Graph, chosen: Container[object]) -> dict[Node, int]:
    """The nodes that are computed inside the kernels of their users, with how many nodes each brings along.

    Moves always are where the users pull; elementwise nodes where that repeats no work, or next to none.
    """
    outputs = set(graph.outputs)
    found: dict[Node, int] = {}
    for node in graph.nodes:
        users = graph.users[node]
        if node in outputs or not users:
            continue
        pulls = all(u.op in _PULLING and u.op not in chosen for u in users)
        if always_pulled(node):
            if all(u.op not in generic.STORED and u.op not in chosen and u.op is not ops.reshape for u in users):
                found[node] = 0
            continue
        if not pulls or (node.op not in ELEMENTWISE and node.op not in _MOVES) or is_checked([node]):
            continue
        size = 1 + sum(found.get(p, 0) for p in set(node.parents))
        if size >= MAX_NODES:
            continue
        computes = [p for p in node.parents if found.get(p, 0)]
        once = len(users) == 1 and users[0].op in _ONCE and not _repeats(node, users[0])
        cheap = node.op not in EXPENSIVE and not computes and len(users) <= _CHEAP_USES
        if once or cheap:
            found[node] = size
    return found


def _repeats(node: Node, user: Node) -> bool:
    """Whether an elementwise user broadcasts the node, and so needs each element several times."""
    return user.op in ELEMENTWISE and not same_shape(node.shape, user.shape)


def _leaves(results: tuple[Node, ...], inlined: Container[Node], stored: bool = False) -> tuple[Node, ...]:
    """What a kernel of these results reads in memory; the parameters' order is that of first use."""
    inner = set(results)
    leaves: dict[Node, None] = {}
    seen: set[Node] = set()

    def visit(node: Node) -> None:
        if node in seen:
            return
        seen.add(node)
        for parent in node.parents:
            if parent in inner or (parent in inlined and not stored):
                visit(parent)
            elif not is_literal(parent) or stored:
                leaves[parent] = None

    for result in results:
        visit(result)
    return tuple(leaves)


def _merged(graph: Graph, found: list[Region], inlined: Container[Node], chosen: Container[object]) -> list[Region]:
    """Elementwise regions of one shape that read one another become one kernel, as long as no other lies between."""
    group: dict[Node, int] = {n: i for i, r in enumerate(found) for n in r.results}
    members: dict[int, list[Region]] = {i: [r] for i, r in enumerate(found)}
    above: dict[int, int] = {}  # per group the set of groups that it depends on, as bits
    for i, region in enumerate(found):
        above[i] = _bits(group[leaf] for leaf in region.leaves if leaf in group)
        for j in _indices(above[i]):
            above[i] |= above[j]
        if not _mergeable(region, chosen):
            continue
        for j in {group[leaf] for leaf in region.leaves if leaf in group}:
            mine = group[region.results[0]]
            if j == mine or not _mergeable(members[j][0], chosen):
                continue
            if not same_shape(members[j][0].results[0].shape, region.results[0].shape):
                continue
            if sum(len(r.nodes) for r in members[j] + members[mine]) > MAX_NODES:
                continue
            both = (1 << j) | (1 << mine)
            outside = (above[j] | above[mine]) & ~both
            if any(above[k] & both for k in _indices(outside)):
                continue
            for r in members[mine]:
                group[r.results[0]] = j
            members[j] += members.pop(mine)
            above[j] = outside
            for k, deps in above.items():
                if deps & both and k != j:
                    above[k] = (deps & ~both) | (1 << j) | outside
            del above[mine]
    merged = []
    for parts in members.values():
        if len(parts) == 1:
            merged.append(parts[0])
            continue
        own = tuple(r.results[0] for r in sorted(parts, key=lambda r: graph.nodes.index(r.results[0])))
        leaves = _leaves(own, inlined)
        inside = set(Region(own, leaves).nodes)
        outer = [
            n
            for n in own
            if n in graph.outputs or any(_lives_outside(u, inside, inlined, graph) for u in graph.users[n])
        ]
        merged.append(Region(tuple(outer), leaves))
    return merged


def _lives_outside(user: Node, inside: Container[Node], inlined: Container[Node], graph: Graph) -> bool:
    """Whether a use of a value happens in another kernel: there, or in an inlined node that another kernel computes."""
    if user in inlined:
        return any(_lives_outside(u, inside, inlined, graph) for u in graph.users[user])
    return user not in inside


def _mergeable(region: Region, chosen: Container[object]) -> bool:
    node = region.results[0]
    return (
        len(region.results) == 1 and node.op in ELEMENTWISE and node.op not in chosen and not is_checked(region.nodes)
    )


def _bits(indices: Iterable[int]) -> int:
    total = 0
    for i in indices:
        total |= 1 << i
    return total


def _indices(bits: int) -> Iterator[int]:
    while bits:
        low = bits & -bits
        yield low.bit_length() - 1
        bits ^= low


def _ordered(graph: Graph, found: list[Region]) -> tuple[Region, ...]:
    """The regions, each behind those that it reads, otherwise in the graph's order."""
    maker = {n: r for r in found for n in r.results}
    done: dict[int, Region] = {}

    def visit(region: Region) -> None:
        stack = [(region, iter(region.leaves))]
        while stack:
            top, leaves = stack[-1]
            for leaf in leaves:
                source = maker.get(leaf)
                if source is not None and id(source) not in done:
                    stack.append((source, iter(source.leaves)))
                    break
            else:
                stack.pop()
                done[id(top)] = top

    for node in graph.nodes:
        if node in maker and id(maker[node]) not in done:
            visit(maker[node])
    return tuple(done.values())
