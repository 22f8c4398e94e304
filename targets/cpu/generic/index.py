"""Selection by index tensors, and sorting. An index outside its axis makes the call fail before anything is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
from tvm import tirx

from jisu.compiler import ops
from jisu.compiler.graph import Node, Op
from jisu.compiler.ops.contract import packed_take
from jisu.compiler.types import Dim, fixed, is_float
from jisu.targets.cpu.generic.build import Builder, Expr, Flat, i64
from jisu.targets.cpu.generic.contract import Scaled
from jisu.targets.cpu.generic.element import Pull
from jisu.targets.cpu.generic.scalar import HALF, arithmetic, dtype_of, is_nan, maximum, minimum, narrow, widen


@attrs.frozen
class Table:
    """An axis that indices look up: of `size`; `wrap`: negative ones count from its end."""

    size: Dim
    wrap: bool = True

    def inside(self, b: Builder, value: Expr) -> Expr:
        """Whether an index is one."""
        bound = b.dim(self.size)
        return tirx.all(value >= (i64(0) - bound if self.wrap else i64(0)), value < bound)

    def require(self, b: Builder, inside: Expr) -> None:
        """Fail where an index isn't inside."""
        size = self.size
        text = f"index out of range for an axis of size {size}" if isinstance(size, int) else "index out of range"
        b.require(inside, "IndexError", text)


def check(b: Builder, pull: Pull, indices: Node, table: Table) -> None:
    """Fail unless every index is inside, where what is computed point by point can't."""
    if b.points_fail:
        return
    bad = b.scratch(1, "int64")
    b.store(bad, i64(0), i64(0))
    with b.loops([b.dim(d) for d in indices.shape]) as where:
        value = _signed(b, pull.fresh(), indices, list(where))
        b.store(bad, i64(0), bad[i64(0)] | tirx.Cast("int64", tirx.Not(table.inside(b, value))))
    table.require(b, tirx.EQ(bad[i64(0)], i64(0)))


def _signed(b: Builder, pull: Pull, indices: Node, where: list[Expr]) -> Expr:
    value = pull(indices, where)
    return value if dtype_of(value) == "int64" else b.let(tirx.Cast("int64", value), "index")


def resolve(b: Builder, pull: Pull, indices: Node, where: list[Expr], table: Table) -> Expr:
    """A checked index with negative ones counted from the end."""
    value, size = _signed(b, pull, indices, where), b.dim(table.size)
    if b.points_fail:
        table.require(b, table.inside(b, value))
    value = tirx.Select(value < i64(0), value + size, value)
    return b.let(tirx.max(tirx.min(value, size - i64(1)), i64(0)), "index")


def _take(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    x, indices = node.parents
    (target,) = targets
    table = Table(x.shape[node.axis], node.wrap)
    check(b, pull, indices, table)

    def element(index: list[Expr], picked: Expr) -> Expr:
        return pull.fresh()(x, [*index[: node.axis], picked, *index[node.axis + indices.rank :]])

    def point(index: list[Expr]) -> None:
        where = index[node.axis :][: indices.rank]
        b.store(target, index, element(index, resolve(b, pull.fresh(), indices, where, table)))

    def row(outer: list[Expr]) -> None:
        picked = resolve(b, pull.fresh(), indices, outer[node.axis :][: indices.rank], table)
        with b.loop(b.dim(node.shape[-1])) as i:
            index = [*outer, i]
            b.store(target, index, element(index, picked))

    if node.rank == 0:
        b.store(target, [], element([], resolve(b, pull, indices, [], table)))
    elif node.axis + indices.rank == node.rank or b.points_fail:
        b.points(node.shape, node.tensor.size * 2, point)
    else:
        b.spread(node.shape[:-1], node.tensor.size, row)


def _gather(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    x, indices = node.parents
    table = Table(x.shape[node.axis])
    check(b, pull, indices, table)

    def point(index: list[Expr]) -> None:
        inside = list(index)
        inside[node.axis] = resolve(b, pull.fresh(), indices, index, table)
        b.store(targets[0], index, pull.fresh()(x, inside))

    b.spread(node.shape, node.tensor.size * 2, point)


def _packed_take(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    w, indices = node.parents
    matrix = pull.leaves[w]
    panel = w.shape[2]
    pair = w.shape[3] if w.rank == 4 else 1
    assert isinstance(panel, int) and isinstance(pair, int)
    table = Table(node.rows)
    check(b, pull, indices, table)

    def elements(outer: list[Expr]) -> Callable[[Expr], None]:
        picked = resolve(b, pull.fresh(), indices, outer, table)
        block, lane = b.let(tirx.floordiv(picked, i64(panel))), b.let(tirx.floormod(picked, i64(panel)))

        def put(k: Expr) -> None:
            if pair > 1:
                place = [block, tirx.floordiv(k, i64(pair)), lane, tirx.floormod(k, i64(pair))]
            else:
                place = [block, k, lane]
            b.store(targets[0], [*outer, k], matrix[place])

        return put

    _looked_up(b, indices, node, 2, elements)


def _looked_up(
    b: Builder, indices: Node, node: Node, cost: int, elements: Callable[[list[Expr]], Callable[[Expr], None]]
) -> None:
    """elements(index)(k) for each element k of each row: on a GPU point by point, elsewhere what belongs to a row is found once."""
    if b.points_fail:
        b.points((*indices.shape, node.width), node.tensor.size * cost, lambda index: elements(index[:-1])(index[-1]))
        return

    def row(outer: list[Expr]) -> None:
        put = elements(outer)
        with b.loop(node.width) as k:
            put(k)

    b.spread(indices.shape, node.tensor.size * cost, row)


def _quantized_take(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    codes, indices, scales, zeros = node.operands
    assert codes is not None and indices is not None
    panel, side = (fixed(codes.shape[i]) for i in (-2, -1))
    packed, scaled = pull.leaves[codes], Scaled(b, pull, node, scales, zeros, node.width)
    table = Table(node.rows)
    check(b, pull, indices, table)

    def elements(outer: list[Expr]) -> Callable[[Expr], None]:
        picked = resolve(b, pull.fresh(), indices, outer, table)
        where, lane = [b.let(tirx.floordiv(picked, i64(panel)))], b.let(tirx.floormod(picked, i64(panel)))

        def put(k: Expr) -> None:
            value = scaled.value(where, k, lane, scaled.code(packed, where, k, lane, side))
            wide = value if node.dtype != "float64" else tirx.Cast("float64", value)
            b.store(targets[0], [*outer, k], narrow(b, wide, node.dtype))

        return put

    _looked_up(b, indices, node, 8, elements)


def _scatter(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    x, indices, updates = node.parents
    (target,) = targets
    table = Table(x.shape[node.axis])
    check(b, pull, indices, table)
    sizes = [b.dim(d) for d in x.shape]
    # 16-bit sums and products are carried in float32 and rounded once, at the end.
    carried = x.dtype in HALF and node.mode in ("add", "mul")
    held = b.scratch(x.tensor.size, "float32", shared=True) if carried else target

    def first(outer: list[Expr]) -> None:
        position = Flat(None, sizes, x.dtype).offset(outer)
        value = pull.fresh()(x, outer)
        b.store(held, position, widen(b, value) if carried else value)

    b.spread(x.shape, x.tensor.size, first)
    with b.by_one(), b.loops([b.dim(d) for d in indices.shape]) as where:
        index = list(where)
        here = pull.fresh()
        value = here(updates, index)
        index[node.axis] = resolve(b, here, indices, list(where), table)
        position = b.let(Flat(None, sizes, x.dtype).offset(index), "at")
        if node.mode != "set":
            old = b.let(held[position], "old")
            value = _combined(b, node.mode, old, widen(b, value) if carried else value)
        b.store(held, position, value)
    if carried:
        b.flat_loop(x.tensor.size, 1, lambda i: b.store(target, i, narrow(b, held[i], x.dtype)))


def _combined(b: Builder, mode: str, old: Expr, new: Expr) -> Expr:
    dtype = dtype_of(old)
    if dtype == "bool":
        return tirx.Or(old, new) if mode in ("add", "max") else tirx.And(old, new)
    if mode in ("add", "mul"):
        return arithmetic(mode, old, new)
    pick = maximum if mode == "max" else minimum
    return narrow(b, pick(widen(b, old), widen(b, new)), dtype)


def _sort(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    """A bottom-up merge sort of each line, stable, on keys and positions."""
    (x,) = node.parents
    values, positions = targets
    size = b.dim(x.shape[node.axis])
    others = [d for k, d in enumerate(x.shape) if k != node.axis]

    def line(outer: list[Expr]) -> None:
        def place(i: Expr) -> list[Expr]:
            return [*outer[: node.axis], i, *outer[node.axis :]]

        sample = "int8" if x.dtype == "bool" else "float32" if x.dtype in HALF else x.dtype
        keys = b.scratch(x.shape[node.axis], sample)
        order, other = (b.scratch(x.shape[node.axis], "int64") for _ in range(2))
        with b.loop(size) as i:
            value = pull.fresh().wide(x, place(i))
            b.store(keys, i, tirx.Cast("int8", value) if x.dtype == "bool" else value)
            b.store(order, i, i)
        width = b.scratch(1, "int64")
        zero = i64(0)
        b.store(width, zero, i64(1))
        with b.scope() as body:
            run = b.let(width[zero], "run")
            with b.loop(tirx.floordiv(size + run * i64(2) - i64(1), run * i64(2))) as pair:
                _merge(b, node.descending, keys, order, other, b.let(pair * run * i64(2)), run, size)
            with b.loop(size) as i:
                b.store(order, i, other[i])
            b.store(width, zero, run * i64(2))
        b.emit(tirx.While(width[zero] < size, tirx.SeqStmt(body)))
        with b.loop(size) as i:
            at = b.let(order[i], "at")
            b.store(positions, place(i), at)
            value = tirx.NE(keys[at], tirx.IntImm("int8", 0)) if x.dtype == "bool" else narrow(b, keys[at], x.dtype)
            b.store(values, place(i), value)

    b.spread(others, x.tensor.size * 64, line)


def _merge(
    b: Builder, descending: bool, keys: Flat, order: Flat, other: Flat, low: Expr, run: Expr, size: Expr
) -> None:
    """Merge order[low : low + run] and the run behind it into `other`."""
    zero = i64(0)
    middle = b.let(tirx.min(low + run, size), "middle")
    high = b.let(tirx.min(low + run * i64(2), size), "high")
    left, right = b.scratch(1, "int64"), b.scratch(1, "int64")
    b.store(left, zero, low)
    b.store(right, zero, middle)
    with b.loop(high - low) as k:
        i, j = b.let(left[zero], "i"), b.let(right[zero], "j")
        a = b.let(keys[order[tirx.min(i, size - i64(1))]], "a")
        c = b.let(keys[order[tirx.min(j, size - i64(1))]], "c")
        wins = c > a if descending else c < a
        if is_float(dtype_of(a)):
            wins = tirx.any(
                wins,
                tirx.all(is_nan(c), tirx.Not(is_nan(a))) if descending else tirx.all(is_nan(a), tirx.Not(is_nan(c))),
            )
            if not descending:
                wins = tirx.all(wins, tirx.Not(is_nan(c)))
        takes = b.let(tirx.any(i >= middle, tirx.all(j < high, wins)), "takes")
        b.store(other, low + k, order[tirx.Select(takes, j, i)])
        b.store(left, zero, tirx.Select(takes, i, i + i64(1)))
        b.store(right, zero, tirx.Select(takes, j + i64(1), j))


BODIES: Mapping[Op, Callable[[Builder, Pull, Node, Sequence[Flat]], None]] = {
    ops.take: _take,
    ops.gather: _gather,
    ops.scatter: _scatter,
    ops.sort: _sort,
    packed_take: _packed_take,
    ops.quantized_take: _quantized_take,
}
