"""Which channels stay or go together, derived from the ops' declared axes.

Every index of every axis of fixed size gets a label. Two indices have one label when neither can be removed without the other: the
notation gives axes of one name the same labels; reshapes, slices, concatenations, grouped heads and expert numbers, which it can't
say, have a rule each below. A label is pinned, with a reason, where an op would mean something else without it: a norm over the
channels, a result of the model. Labels without a reason can be removed wherever they stand, and the graph stays well-typed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping

import attrs
import numpy as np

from jisu.compiler import ops
from jisu.compiler.axes import named_axes
from jisu.compiler.graph import INPUT, WEIGHT, Graph, Node
from jisu.compiler.ops.shape import reshape_groups
from jisu.compiler.types import Dim, TupleType, is_integer

_RANKING = (ops.softmax, ops.sort)
"""Ops over an axis of experts that mean the same without some: as if those had the score -inf."""

_MOVES = (ops.reshape, ops.transpose, ops.slice_, ops.broadcast_to, ops.cast)
"""Ops that keep numbers of experts what they are."""


def where(node: Node) -> str:
    """A node in a message: op, type and the module that it comes from."""
    return f"{node.op.name} ({node.type}){f' at {node.source}' if node.source else ''}"


def shape_of(node: Node) -> tuple[Dim, ...]:
    """The shape of a node's first result."""
    shape: tuple[Dim, ...] = node.type.items[0].shape if isinstance(node.type, TupleType) else node.type.shape
    return shape


@attrs.frozen(eq=False)
class Coupling:
    """The labels of a graph, numbers below `count`.

    axes: for each node the labels int64 [n] of each axis, None for symbolic ones. pins: why a label can't be removed. ranked: like
    pins, for labels that only ranking ops (softmax, sort) mix: removed, they count as never chosen. heads: labels of the key heads
    of each attention. experts: for each node that selects by the numbers that a sort gives, the labels of what it selects from.
    sorts: labels of the places in each sort's order, and of what it orders: as many of the last places go as of the latter.
    """

    graph: Graph
    count: int
    axes: Mapping[Node, tuple[np.ndarray | None, ...]]
    pins: Mapping[int, str]
    ranked: Mapping[int, str]
    heads: Mapping[Node, np.ndarray]
    experts: Mapping[Node, np.ndarray]
    sorts: tuple[tuple[np.ndarray, np.ndarray], ...]

    @property
    def weights(self) -> dict[str, Node]:
        """One node for each stored tensor."""
        return {n.name: n for n in self.graph.nodes if n.op is WEIGHT}


def couple(graph: Graph) -> Coupling:
    """The labels of every axis of `graph`, and what pins them."""
    return _Walk(graph).result()


class _Walk:
    """Numbers every index of every axis, collects which numbers belong together, and joins them at the end."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.count = 0
        self.numbers: dict[Node, tuple[np.ndarray | None, ...]] = {}
        self.stored: dict[str, tuple[np.ndarray | None, ...]] = {}
        self.edges: list[tuple[np.ndarray, np.ndarray]] = []
        self.pinned: list[tuple[np.ndarray, str]] = []
        self.ranked: list[tuple[np.ndarray, str]] = []
        self.meant: dict[Node, np.ndarray] = {}  # integers that number the indices of an axis: that axis
        self.sorts: list[tuple[np.ndarray, np.ndarray]] = []  # the axis of places in the order, and what is ordered
        self.heads: dict[Node, np.ndarray] = {}
        self.experts: dict[Node, np.ndarray] = {}
        for node in graph.nodes:
            self.numbers[node] = self.number(node)
            self.visit(node)
        for i, output in enumerate(graph.outputs):
            self.pin(self.numbers[output], f"it is part of the model's output {i}")

    def number(self, node: Node) -> tuple[np.ndarray | None, ...]:
        """Fresh numbers for a node's axes; two uses of one stored tensor share them, and so do a sort and what is got from it."""
        if node.op is WEIGHT and node.name in self.stored:
            return self.stored[node.name]
        if node.op is ops.get and node.parents[0].op is ops.sort:
            return self.numbers[node.parents[0]]
        found: list[np.ndarray | None] = []
        for size in shape_of(node):
            if isinstance(size, int):
                found.append(np.arange(self.count, self.count + size))
                self.count += size
            else:
                found.append(None)
        if node.op is WEIGHT:
            self.stored[node.name] = tuple(found)
        return tuple(found)

    def join(self, a: np.ndarray | None, b: np.ndarray | None) -> None:
        """Index i of one axis goes with index i of the other."""
        if a is not None and b is not None:
            self.edges.append((a, b))

    def join_blocks(self, blocks: int, *axes: np.ndarray | None) -> None:
        """Each axis is so many blocks of equal length, and block i of one goes with block i of the others."""
        firsts = []
        for axis in axes:
            if axis is not None:
                grid = axis.reshape(blocks, -1)
                self.edges.append((grid.ravel(), np.repeat(grid[:, 0], grid.shape[1])))
                firsts.append(grid[:, 0])
        for first in firsts[1:]:
            self.edges.append((firsts[0], first))

    def pin(self, axes: Iterable[np.ndarray | None], why: str) -> None:
        """None of these may be removed."""
        self.pinned += [(axis, why) for axis in axes if axis is not None]

    def visit(self, node: Node) -> None:
        """What one node couples and pins."""
        mine = self.numbers[node]
        self.use_numbers(node)
        if node.op is INPUT:
            self.pin(mine, f"it is part of the model's input {node.name!r}")
        elif node.op.leaf or node.op is ops.get and node.parents[0].op is ops.sort:
            return
        elif node.op is ops.reshape:
            self.reshape(node)
        elif node.op is ops.slice_:
            self.slice(node)
        elif node.op is ops.concat:
            self.concat(node)
        else:
            self.by_notation(node)
        if node.op is ops.attention:
            q, k = (self.numbers[o][2] for o in node.parents[:2])
            assert k is not None
            self.join_blocks(len(k), q, k)
            self.heads[node] = k
        if node.op is ops.conv and node.groups > 1:
            self.join_blocks(node.groups, self.numbers[node.parents[0]][1], mine[1])

    def use_numbers(self, node: Node) -> None:
        """Follow integers that number the entries of an axis (what a sort gives) to where they select from another."""
        if node.op is ops.get and node.parents[0].op is ops.sort and node.index == 1:
            axis = self.numbers[node.parents[0].parents[0]][node.parents[0].axis]
            if axis is not None:
                self.meant[node] = axis
        for i, operand in enumerate(node.operands):
            axis = self.meant.get(operand) if operand is not None else None
            if axis is None:
                continue
            if node.op in _MOVES and is_integer(node.dtype):
                self.meant[node] = axis
            elif i == 1 and self.selected(node):
                for position, along in self.selected(node):
                    other = node.operands[position]
                    assert other is not None
                    self.join(axis, self.numbers[other][along])
                self.experts[node] = axis
            else:
                self.pin([axis], f"{where(node)} computes with its number")

    def selected(self, node: Node) -> tuple[tuple[int, int], ...]:
        """(operand, axis) pairs that operand 1 selects from, where it holds numbers of entries."""
        if node.op in (ops.take, ops.gather):
            return ((0, node.axis),)
        if node.op is ops.expert_linear:
            return tuple((i, 0) for i in (2, 3) if node.operands[i] is not None)
        return ((3, 0), (4, 0)) if node.op is ops.experts else ()

    def by_notation(self, node: Node) -> None:
        """Axes of one name go together; what mixes, or reduces other than by a contraction, is pinned."""
        found = named_axes(node)
        operands = [(o, self.numbers[o]) for o in node.parents]
        if found is None:
            for axes in (self.numbers[node], *(axes for _, axes in operands)):
                self.pin(axes, f"{where(node)} doesn't say how its axes relate")
            return
        rows, out = found
        uses: dict[str, list[tuple[int, int, str, np.ndarray | None]]] = {}
        for k, (operand, row) in enumerate(zip(node.operands, rows, strict=True)):
            for axis, (name, mark) in enumerate(row or ()):
                assert operand is not None
                uses.setdefault(name, []).append((k, axis, mark, self.numbers[operand][axis]))
        for axis, (name, mark) in enumerate(out):
            uses.setdefault(name, []).append((-1, axis, mark, self.numbers[node][axis]))
        uses.pop("1", None)
        grouped = node.op is ops.conv and node.groups > 1
        for users in uses.values():
            self.same_name(node, users, grouped)

    def same_name(self, node: Node, users: list[tuple[int, int, str, np.ndarray | None]], grouped: bool) -> None:
        """What the axes of one name couple and pin."""
        largest = max((len(n) for *_, n in users if n is not None), default=0)
        full = [
            u for u in users if u[3] is not None and len(u[3]) == largest
        ]  # an axis of size 1 repeats, and holds no channel
        if node.op is ops.sort and full and full[0][2]:
            source, result = full[0][3], full[-1][3]  # places in the order are no channels: they only become fewer
            assert source is not None and result is not None
            self.ranked.append((source, f"{where(node)} orders it"))
            self.sorts.append((result, source))
            return
        for user in full[1:]:
            self.join(full[0][3], user[3])
        operand, axis, _, numbers = full[0] if full else users[0]
        place = f"axis {axis}{f' of operand {operand}' if operand >= 0 else ''}"
        for mark in {mark for _, _, mark, _ in users if mark}:
            why = f"{where(node)} {'mixes' if mark == '!' else 'runs along'} {place}"
            if node.op in _RANKING and numbers is not None:
                self.ranked.append((numbers, why))
            else:
                self.pin([numbers], why)
        sides = {operand for operand, *_ in users}
        if any((operand, axis) in self.selected(node) for operand, axis, *_ in users):
            if node not in self.experts:
                self.pin([numbers], f"{where(node)} selects from {place} by numbers that can't be followed")
        elif sides == {-1}:
            if node.op is not ops.broadcast_to:
                self.pin([numbers], f"{where(node)} makes {place} itself")
        elif len(sides) == 1 and not (grouped and sides == {0}):
            self.pin([numbers], f"{where(node)} reduces {place}")

    def reshape(self, node: Node) -> None:
        """The outermost axes of a group go together block by block; those inside stay whole."""
        (operand,) = node.parents
        groups = reshape_groups(operand.shape, node.shape)
        old, new = self.numbers[operand], self.numbers[node]
        if groups is None:
            self.pin((*old, *new), f"{where(node)} can't be followed")
            return
        for left, right in groups:
            mine = [(old[a], operand.shape[a]) for a in left if operand.shape[a] != 1]
            mine_new = [(new[a], node.shape[a]) for a in right if node.shape[a] != 1]
            if not mine:
                continue
            (a, _), (b, _) = mine[0], mine_new[0]
            if a is None or b is None:
                self.pin([n for n, _ in (*mine, *mine_new)], f"{where(node)} merges it with a dynamic axis")
                continue
            self.join_blocks(math.gcd(len(a), len(b)), a, b)
            self.pin([n for n, _ in (*mine[1:], *mine_new[1:])], f"{where(node)} has it inside of another axis")

    def slice(self, node: Node) -> None:
        """What is kept goes with the result's indices; how many of a sort are taken stays."""
        (operand,) = node.parents
        for axis, (old, new) in enumerate(zip(self.numbers[operand], self.numbers[node], strict=True)):
            start, stop, step = node.starts[axis], node.stops[axis], node.steps[axis]
            if old is None or new is None or not isinstance(start, int):
                self.pin((old, new), f"{where(node)} cuts axis {axis} at a dynamic place")
                continue
            if step != 1:
                self.pin((old, new), f"{where(node)} takes every {step}th of axis {axis}")
                continue
            self.join(old[start:stop], new)
            if len(new) < len(old) and any(result is old for result, _ in self.sorts):
                self.pin([new], f"{where(node)} takes the first {stop} of a sort")

    def concat(self, node: Node) -> None:
        """Each part goes with its place in the result."""
        begin = 0
        for part in node.parents:
            for axis, (old, new) in enumerate(zip(self.numbers[part], self.numbers[node], strict=True)):
                if axis != node.axis:
                    self.join(old, new)
                elif old is None or new is None:
                    self.pin((old, new), f"{where(node)} joins it with a dynamic axis")
                else:
                    self.join(old, new[begin : begin + len(old)])
                    begin += len(old)

    def result(self) -> Coupling:
        """The joined labels."""
        label = _components(self.count, self.edges)
        pins: dict[int, str] = {}
        ranked: dict[int, str] = {}
        for found, numbers in ((pins, self.pinned), (ranked, self.ranked)):
            for axis, why in numbers:
                for k in np.unique(label[axis]).tolist():
                    found.setdefault(k, why)
        axes = {node: tuple(None if n is None else label[n] for n in row) for node, row in self.numbers.items()}
        return Coupling(
            self.graph,
            self.count,
            axes,
            pins,
            ranked,
            {node: label[n] for node, n in self.heads.items()},
            {node: label[n] for node, n in self.experts.items()},
            tuple((label[result], label[source]) for result, source in self.sorts),
        )


def _components(count: int, edges: list[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """The least member of each number's connected component, by hooking roots and halving paths until nothing moves."""
    parent = np.arange(count)
    if not edges:
        return parent
    u, v = (np.concatenate([e[k] for e in edges]) for k in (0, 1))
    while True:
        a, b = parent[u], parent[v]
        apart = a != b
        if not apart.any():
            return parent
        np.minimum.at(parent, np.maximum(a, b)[apart], np.minimum(a, b)[apart])
        while (parent != parent[parent]).any():
            parent = parent[parent]
