"""Kernels that compute tensors element by element: fused elementwise groups, moves, concatenation, padding."""

from __future__ import annotations

from collections.abc import Sequence

from jisu.compiler import ops
from jisu.compiler.graph import Node
from jisu.compiler.ops import ELEMENTWISE
from jisu.compiler.types import Dim, is_integer, product
from jisu.targets.cpu.generic.build import Builder, Expr, Flat, Index, i64
from jisu.targets.cpu.generic.element import Pull, always_pulled
from jisu.targets.cpu.generic.scalar import CHECKED, EXPENSIVE, apply


def inside(results: Sequence[Node], pull: Pull) -> list[Node]:
    """The nodes that computing `results` pulls, without those in memory."""
    found: dict[Node, None] = {}
    stack = list(results)
    while stack:
        node = stack.pop()
        if node not in found and node not in pull.leaves:
            found[node] = None
            stack += node.parents
    return list(found)


def cost(nodes: Sequence[Node]) -> int:
    """Roughly how many simple scalar operations one element of these nodes takes."""
    return 1 + sum(16 if n.op in EXPENSIVE or n.op is ops.cast else 1 for n in nodes)


def is_checked(nodes: Sequence[Node]) -> bool:
    """Whether computing these nodes can fail (an integer division by a value that may be zero)."""
    return any(n.op in CHECKED and is_integer(n.dtype) for n in nodes)


def elementwise(b: Builder, pull: Pull, results: Sequence[Node], targets: Sequence[Flat]) -> None:
    """Store every element of `results` (all of one shape) into `targets`."""
    nodes = inside(results, pull)
    parallel = not is_checked(nodes)
    work = cost(nodes)
    shape = results[0].shape
    axes = _collapsed(nodes, pull, shape)
    if axes is not None and len(axes) <= 1:

        def one(i: Expr) -> None:
            here = _FlatPull(b, pull, shape, axes)
            values = [here(node, [i][: len(axes)]) for node in results]
            for value, target in zip(values, targets, strict=True):
                b.store(target, i, value)

        b.flat_loop(product(shape), work, one, parallel=parallel)
        return
    grouped = axes if axes is not None else [[k] for k in range(len(shape))]
    sizes = [product(shape[k] for k in group) for group in grouped]

    def point(index: list[Expr]) -> None:
        here = pull.fresh() if axes is None else _FlatPull(b, pull, shape, axes)
        values = [here(node, index) for node in results]
        at = Flat(None, [b.dim(s) for s in sizes], "int64").offset(index)
        for value, target in zip(values, targets, strict=True):
            b.store(target, at, value)

    b.points(sizes, product(shape) * work, point, parallel=parallel)


def _collapsed(nodes: Sequence[Node], pull: Pull, shape: Sequence[Dim]) -> list[list[int]] | None:
    """The axes of `shape` in runs over which every tensor in memory is read alike (all its elements, or one again and
    again); None where some node needs its index axis by axis."""
    if any(n.op not in ELEMENTWISE and n.op is not ops.broadcast_to and not always_pulled(n) for n in nodes):
        return None
    if any(n.op is ops.iota for n in nodes):
        return None
    rows = set()
    for node in nodes:
        for operand in node.parents:
            if operand in pull.leaves or operand.op in ELEMENTWISE or operand.op is ops.broadcast_to:
                rows.add(_pattern(operand.shape, shape))
    groups: list[list[int]] = []
    for axis, size in enumerate(shape):
        if size == 1:
            continue
        if groups and all(row[axis] == row[groups[-1][-1]] for row in rows):
            groups[-1].append(axis)
        else:
            groups.append([axis])
    return groups


def _pattern(shape: Sequence[Dim], result: Sequence[Dim]) -> tuple[bool, ...]:
    """Per axis of `result`, whether an operand of `shape` has it."""
    shift = len(result) - len(shape)
    return tuple(k >= shift and (shape[k - shift] != 1 or result[k] == 1) for k in range(len(result)))


class _FlatPull(Pull):
    """Pulls elements by one index per run of axes of the result; a tensor that lacks a run repeats along it."""

    def __init__(self, b: Builder, pull: Pull, shape: Sequence[Dim], runs: Sequence[Sequence[int]]) -> None:
        flat = {}
        self.has: dict[Node, list[bool]] = {}
        for node, tensor in pull.leaves.items():
            if len(node.shape) <= len(shape):
                pattern = _pattern(node.shape, shape)
                self.has[node] = [pattern[run[0]] for run in runs]
                sizes = [
                    product(shape[k] for k in run) if has else 1 for run, has in zip(runs, self.has[node], strict=True)
                ]
                flat[node] = Flat(tensor.buffer, [b.dim(s) for s in sizes], node.dtype)
        super().__init__(b, flat)

    def _compute(self, node: Node, index: Index) -> Expr:
        if node in self.leaves:
            at = [i if has else i64(0) for i, has in zip(index, self.has[node], strict=True)]
            return self.b.let(self.leaves[node][at], "v")
        if node.op in ELEMENTWISE:
            return apply(self.b, node.op, [self(o, index) for o in node.parents], node.attributes, node.dtype)
        if node.op is ops.broadcast_to:
            return self(node.parents[0], index)
        return super()._compute(node, index)


def concat(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    """Each operand is stored by loops of its own, but where these would be launches."""
    if b.launches:
        elementwise(b, pull, [node], [target])
        return
    begin: Expr = i64(0)
    for x in node.parents:
        first = b.let(begin, "first")

        def point(index: list[Expr], x: Node = x, first: Expr = first) -> None:
            value = pull.fresh()(x, index)
            there = list(index)
            there[node.axis] = there[node.axis] + first
            b.store(target, there, value)

        nodes = inside([x], pull)
        b.points(x.shape, x.tensor.size * cost(nodes), point, parallel=not is_checked(nodes))
        begin = first + b.dim(x.shape[node.axis])


def pad(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    """Fill, then store the operand's elements at their new places."""
    x, value = node.parents
    if x.rank == 0:
        b.store(target, [], pull(x, []))
        return
    filler = pull(value, [])
    b.flat_loop(node.tensor.size, 1, lambda i: b.store(target, i, filler))

    def point(index: list[Expr]) -> None:
        places = [b.dim(lo) + k * i64(gap + 1) for k, lo, gap in zip(index, node.low, node.interior, strict=True)]
        b.store(target, places, pull.fresh()(x, index))

    nodes = inside([x], pull)
    b.points(x.shape, x.tensor.size * cost(nodes), point, parallel=not is_checked(nodes))
