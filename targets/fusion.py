"""Which nodes become one kernel."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Sequence

import attrs
import networkx as nx

from jisu.compiler import ops
from jisu.compiler.graph import CONSTANT, INPUT, WEIGHT, Graph, Node
from jisu.compiler.ops import ELEMENTWISE
from jisu.compiler.ops.shape import windows
from jisu.compiler.types import Dim, same_shape
from jisu.targets.cpu import generic
from jisu.targets.cpu.generic import reduce
from jisu.targets.cpu.generic.element import always_pulled, is_literal, splits_known_axes
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
_CHEAP_NODES = 12  # that are computed again wherever they are used, rather than launched once

_MOVES = frozenset({ops.broadcast_to, ops.transpose, ops.slice_, ops.flip, windows})
# These read an operand at each index once; every other op that pulls may come back to an element.
_ONCE = frozenset(
    {*_MOVES - {ops.broadcast_to, windows}, *ELEMENTWISE, *reduce.BODIES, ops.concat, ops.pad, ops.sort}
) - {ops.softmax}
_PULLING = _ONCE | {ops.broadcast_to, windows, ops.softmax}


def regions(
    graph: Graph, chosen: Container[object], joined: Sequence[Region] = (), *, launched: bool = False
) -> tuple[Region, ...]:
    """The graph's kernels in an order in which every region stands behind those that it reads.

    joined: regions that are settled, which are `separable`. launched: each kernel is a launch, which costs more than a few scalar operations and a branch
    per element; so kernels also pull concatenations, reshapes and what is made of less than it is, and those of one shape that read the same become
    one.
    """
    inlined = _Inlined(graph, chosen, launched).found
    taken = {node for region in joined for node in region.nodes}
    found = list(joined)
    for node in graph.nodes:
        if node.op not in (INPUT, WEIGHT, CONSTANT) and node not in inlined and node not in taken:
            stored = node.op in generic.STORED or node.op in chosen
            found.append(Region((node,), _leaves((node,), inlined, stored), node.op is ops.reshape))
    return _ordered(graph, _merged(graph, list(_ordered(graph, found)), inlined, chosen, launched))


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


class _Inlined:
    """The nodes that are computed inside the kernels of their users (`found`), with how many nodes each brings along.

    Moves always are where the users pull; elementwise nodes where that repeats no work, or next to none.
    """

    def __init__(self, graph: Graph, chosen: Container[object], launched: bool) -> None:
        self.graph, self.chosen, self.launched = graph, chosen, launched
        self.found: dict[Node, int] = {}
        self.small: set[Node] = set()  # of them those that read less than they are
        self.outputs = set(graph.outputs)
        self.moves = _MOVES | {ops.concat, ops.reshape} if launched else _MOVES
        for node in graph.nodes:
            self.visit(node)

    def visit(self, node: Node) -> None:
        """Note a node, all of whose operands are noted."""
        readers = self.readers(node)
        if node in self.outputs or not readers:
            return
        pulls = all(u.op in _PULLING and u.op not in self.chosen for _, u in readers)
        if always_pulled(node):
            if all(
                u.op not in generic.STORED and u.op not in self.chosen and u.op is not ops.reshape for _, u in readers
            ):
                self.found[node] = 0
            return
        if not pulls or (node.op not in ELEMENTWISE and node.op not in self.moves) or is_checked([node]):
            return
        if node.op is ops.reshape:  # nothing is computed for a view; it goes where its operand goes
            (x,) = node.parents
            if x in self.found and self.passes(node):
                self.found[node] = self.found[x]
                if x in self.small or always_pulled(x):
                    self.small.add(node)
            return
        size = 1 + sum(self.found.get(p, 0) for p in set(node.parents))
        if size >= MAX_NODES:
            return
        computes = [p for p in node.parents if self.found.get(p, 0)]
        once = len(readers) == 1 and readers[0][1].op in _ONCE and not _repeats(*readers[0])
        cheap = node.op not in EXPENSIVE and not computes and len(readers) <= _CHEAP_USES
        small = self.launched and size <= _CHEAP_NODES and node.op not in EXPENSIVE and self.reads_less(node)
        if once or cheap or small:
            self.found[node] = size
            if small:
                self.small.add(node)

    def passes(self, node: Node) -> bool:
        """Whether a reshape's users may pull what it views."""
        return self.launched and node.op is ops.reshape and node not in self.outputs and splits_known_axes(node)

    def readers(self, node: Node) -> list[tuple[Node, Node]]:
        """The node's users, with what they see of it: in place of a reshape its users, where they may pull, with the reshape."""
        found: list[tuple[Node, Node]] = []
        for user in self.graph.users[node]:
            behind = self.readers(user) if self.passes(user) else []
            pulls = behind and all(u.op in _PULLING and u.op not in self.chosen for _, u in behind)
            found += behind if pulls else [(node, user)]
        return found

    def reads_less(self, node: Node) -> bool:
        """Whether computing the node reads less memory than the node takes: each operand lacks one of its axes, or itself reads less."""
        return all(p in self.small or always_pulled(p) or _lacks(p.shape, node) for p in node.parents)


def _lacks(shape: Sequence[Dim], node: Node) -> bool:
    """Whether a node repeats an operand of a shape."""
    if node.op not in ELEMENTWISE and node.op is not ops.broadcast_to:
        return False
    shift = node.rank - len(shape)
    return any(n != 1 and (k < shift or shape[k - shift] == 1) for k, n in enumerate(node.shape))


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


def _merged(
    graph: Graph, found: list[Region], inlined: Container[Node], chosen: Container[object], launched: bool
) -> list[Region]:
    """Elementwise regions of one shape that read one another (`launched`: or the same) become one kernel, as long as no other lies between."""
    group: dict[Node, int] = {n: i for i, r in enumerate(found) for n in r.results}
    members: dict[int, list[Region]] = {i: [r] for i, r in enumerate(found)}
    above: dict[int, int] = {}  # per group the set of groups that it depends on, as bits
    reading: dict[Node, list[Node]] = {}  # per value the results of mergeable regions that read it
    for i, region in enumerate(found):
        above[i] = _bits(group[leaf] for leaf in region.leaves if leaf in group)
        for j in _indices(above[i]):
            above[i] |= above[j]
        if not _mergeable(region, chosen, launched):
            continue
        moves = region.results[0].op not in ELEMENTWISE  # which would compute again, elsewhere, what they read
        near = [leaf for leaf in region.leaves if leaf in group and not moves]
        if launched:
            near += [other for leaf in region.leaves for other in reading.get(leaf, ())]
            for leaf in region.leaves:
                reading.setdefault(leaf, []).append(region.results[0])
        for j in dict.fromkeys(group[n] for n in near):
            mine = group[region.results[0]]
            if j == mine or not _mergeable(members[j][0], chosen, launched):
                continue
            if moves and above[mine] & (1 << j):
                continue
            if not same_shape(members[j][0].results[0].shape, region.results[0].shape):
                continue
            if len({n for r in members[j] + members[mine] for n in r.nodes}) > MAX_NODES:
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


def _mergeable(region: Region, chosen: Container[object], launched: bool) -> bool:
    node = region.results[0]
    by_element = node.op in ELEMENTWISE or (launched and node.op in _MOVES | {ops.concat})
    return len(region.results) == 1 and by_element and node.op not in chosen and not is_checked(region.nodes)


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
