"""Reductions, running sums, softmax."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from tvm import tirx
from tvm.tirx.stmt import ForKind

from jisu.compiler import ops
from jisu.compiler.graph import Node, Op
from jisu.compiler.ops import ELEMENTWISE
from jisu.compiler.types import is_float
from jisu.targets.cpu.generic.build import Builder, Expr, Flat, i64, literal
from jisu.targets.cpu.generic.element import Pull
from jisu.targets.cpu.generic.moves import cost, inside, is_checked
from jisu.targets.cpu.generic.scalar import (
    arithmetic,
    compute_dtype,
    dtype_of,
    exp,
    is_nan,
    maximum,
    minimum,
    narrow,
)

LANES = 16
TILE = 64

KINDS = {
    ops.sum_: "sum",
    ops.prod: "prod",
    ops.reduce_max: "max",
    ops.reduce_min: "min",
    ops.any_: "any",
    ops.all_: "all",
}
_VECTORISED = frozenset({ops.add, ops.sub, ops.mul, ops.neg, ops.square, ops.abs_, ops.exp, ops.sqrt})


def accumulator(dtype: str, kind: str) -> str:
    """The dtype in which elements of `dtype` are combined: sums of float32 in float64, 16 bits in float32."""
    if dtype == "bool":
        return "int8"
    if kind == "sum" and dtype == "float32":
        return "float64"
    return compute_dtype(dtype)


def start(kind: str, dtype: str) -> Expr:
    """The neutral element."""
    if kind in ("sum", "any"):
        return literal(0, dtype)
    if kind in ("prod", "all"):
        return literal(1, dtype)
    if is_float(dtype):
        return literal(-np.inf if kind == "max" else np.inf, dtype)
    info = np.iinfo(dtype)
    return literal(info.min if kind == "max" else info.max, dtype)


def combine(kind: str, a: Expr, c: Expr) -> Expr:
    """a and c under the reduction."""
    if kind in ("sum", "prod"):
        return arithmetic({"sum": "add", "prod": "mul"}[kind], a, c)
    return {"max": maximum, "min": minimum, "any": lambda p, q: p | q, "all": lambda p, q: p & q}[kind](a, c)


def line(b: Builder, size: Expr, kind: str, dtype: str, element: Callable[[Expr], Expr], vector: bool = True) -> Expr:
    """The reduction of element(0) … element(size - 1), in `dtype`, with `LANES` partial results where `vector`."""
    at = [i64(0)]
    total = b.scratch(1, dtype)
    b.store(total, at, start(kind, dtype))
    done: Expr = i64(0)
    if vector and is_float(dtype):
        lanes = b.scratch(LANES, dtype)
        with b.loop(LANES, ForKind.VECTORIZED) as k:
            b.store(lanes, k, start(kind, dtype))
        whole = b.let(tirx.floordiv(size, i64(LANES)), "whole")
        with b.loop(whole) as t, b.loop(LANES, ForKind.VECTORIZED) as k:
            b.store(lanes, k, combine(kind, lanes[k], element(t * i64(LANES) + k)))
        done = b.let(whole * i64(LANES), "done")
        with b.loop(LANES) as k:
            b.store(total, at, combine(kind, total[at], lanes[k]))
    with b.loop(size - done) as k:
        b.store(total, at, combine(kind, total[at], element(done + k)))
    return b.let(total[at], "total")


def can_vectorise(nodes: Sequence[Node]) -> bool:
    """Whether TVM turns the scalar code of all these nodes into vector code."""
    return all(n.op in _VECTORISED for n in nodes if n.op in ELEMENTWISE)


def _reduce(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    (x,) = node.parents
    kind = KINDS[node.op]
    acc = accumulator(x.dtype, kind)
    nodes = inside([x], pull)
    kept = [k for k in range(x.rank) if k not in node.axes and x.shape[k] != 1]
    reduced = [k for k in node.axes if x.shape[k] != 1]
    sizes = [b.dim(d) for d in x.shape]

    def element(where: Mapping[int, Expr]) -> Expr:
        value = pull.fresh().wide(x, [where.get(k, i64(0)) for k in range(x.rank)])
        return value if dtype_of(value) == acc else tirx.Cast(acc, value)

    def put(index: Expr, value: Expr) -> None:
        if node.dtype == "bool":
            value = tirx.NE(value, literal(0, "int8"))
        elif dtype_of(value) != compute_dtype(node.dtype):
            value = tirx.Cast(compute_dtype(node.dtype), value)
        b.store(target, index, narrow(b, value, node.dtype))

    work = x.tensor.size * cost(nodes)
    parallel = not is_checked(nodes)
    # A GPU's neighbouring threads take columns by themselves.
    if kept and (not reduced or kept[-1] > reduced[-1]) and not b.points_fail:
        _reduce_columns(b, kind, acc, sizes, [x.shape[k] for k in kept], kept, reduced, element, put, work, parallel)
        return

    def row(outer: list[Expr]) -> None:
        where = dict(zip(kept, outer, strict=True))
        position = Flat(None, [sizes[k] for k in kept], acc).offset(outer)
        *others, last = reduced or [None]
        if last is None:
            put(position, element(where))
            return

        def inner(more: Mapping[int, Expr]) -> Expr:
            return line(b, sizes[last], kind, acc, lambda i: element({**where, **more, last: i}), can_vectorise(nodes))

        if not others:
            put(position, inner({}))
            return
        total = b.scratch(1, acc)
        b.store(total, i64(0), start(kind, acc))
        with b.loops([sizes[k] for k in others]) as indices:
            b.store(total, i64(0), combine(kind, total[i64(0)], inner(dict(zip(others, indices, strict=True)))))
        put(position, total[i64(0)])

    b.spread([x.shape[k] for k in kept], work, row, parallel=parallel)


def _reduce_columns(
    b: Builder,
    kind: str,
    acc: str,
    sizes: Sequence[Expr],
    extents: Sequence[Any],
    kept: Sequence[int],
    reduced: Sequence[int],
    element: Callable[[Mapping[int, Expr]], Expr],
    put: Callable[[Expr, Expr], None],
    work: Any,
    parallel: bool,
) -> None:
    """The last axis stays: `TILE` columns are reduced side by side."""
    width = sizes[kept[-1]]

    def row(outer: list[Expr]) -> None:
        where = dict(zip(kept[:-1], outer, strict=True))
        base = b.let(Flat(None, [sizes[k] for k in kept], acc).offset([*outer, i64(0)]), "base")
        with b.loop(tirx.floordiv(width + i64(TILE - 1), i64(TILE))) as tile:
            first = b.let(tile * i64(TILE), "first")
            count = b.let(tirx.min(i64(TILE), width - first), "count")
            totals = b.scratch(TILE, acc)
            with b.loop(count) as j:
                b.store(totals, j, start(kind, acc))
            with b.loops([sizes[k] for k in reduced]) as indices, b.loop(count) as j:
                here = {**where, **dict(zip(reduced, indices, strict=True)), kept[-1]: first + j}
                b.store(totals, j, combine(kind, totals[j], element(here)))
            with b.loop(count) as j:
                put(base + first + j, totals[j])

    b.spread(extents[:-1], work, row, parallel=parallel)


def _arg(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    (x,) = node.parents
    better = tirx.GT if node.op is ops.argmax else tirx.LT
    others = [d for k, d in enumerate(x.shape) if k != node.axis]
    nodes = inside([x], pull)

    def row(outer: list[Expr]) -> None:
        def at(i: Expr) -> Expr:
            value = pull.fresh().wide(x, [*outer[: node.axis], i, *outer[node.axis :]])
            return tirx.Cast("int8", value) if dtype_of(value) == "bool" else value

        first = at(i64(0))
        best, where = b.scratch(1, dtype_of(first)), b.scratch(1, "int64")
        zero = i64(0)
        b.store(best, zero, first)
        b.store(where, zero, zero)
        with b.loop(b.dim(x.shape[node.axis]) - i64(1)) as k:
            value = b.let(at(k + i64(1)))
            wins = better(value, best[zero])
            if is_float(x.dtype):
                wins = tirx.any(wins, tirx.all(is_nan(value), tirx.Not(is_nan(best[zero]))))
                wins = tirx.all(wins, tirx.Not(is_nan(best[zero])))
            with b.when(wins):
                b.store(best, zero, value)
                b.store(where, zero, k + i64(1))
        b.store(target, outer, where[zero])

    b.spread(others, x.tensor.size * cost(nodes), row, parallel=not is_checked(nodes))


def _scan(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    (x,) = node.parents
    acc = accumulator(x.dtype, node.kind)
    others = [d for k, d in enumerate(x.shape) if k != node.axis]
    nodes = inside([x], pull)

    def row(outer: list[Expr]) -> None:
        total = b.scratch(1, acc)
        b.store(total, i64(0), start(node.kind, acc))
        with b.loop(b.dim(x.shape[node.axis])) as i:
            index = [*outer[: node.axis], i, *outer[node.axis :]]
            value = pull.fresh().wide(x, index)
            value = value if dtype_of(value) == acc else tirx.Cast(acc, value)
            b.store(total, i64(0), combine(node.kind, total[i64(0)], value))
            result = total[i64(0)]
            result = result if acc == compute_dtype(x.dtype) else tirx.Cast(compute_dtype(x.dtype), result)
            b.store(target, index, narrow(b, result, x.dtype))

    b.spread(others, x.tensor.size * cost(nodes), row, parallel=not is_checked(nodes))


def _softmax(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    (x,) = node.parents
    dtype = compute_dtype(x.dtype)
    others = [d for k, d in enumerate(x.shape) if k != node.axis]
    size = b.dim(x.shape[node.axis])
    nodes = inside([x], pull)
    vector = can_vectorise(nodes) and dtype == "float32"

    def row(outer: list[Expr]) -> None:
        def element(i: Expr) -> Expr:
            return pull.fresh().wide(x, [*outer[: node.axis], i, *outer[node.axis :]])

        peak = line(b, size, "max", dtype, element, vector)
        held = b.scratch(x.shape[node.axis], dtype)
        with b.loop(size) as i:
            b.store(held, i, exp(b, b.let(element(i) - peak)))
        total = line(b, size, "sum", dtype, lambda i: held[i], vector)
        with b.loop(size) as i:
            b.store(target, [*outer[: node.axis], i, *outer[node.axis :]], narrow(b, held[i] / total, x.dtype))

    b.spread(others, x.tensor.size * (24 + cost(nodes)), row, parallel=not is_checked(nodes))


BODIES: Mapping[Op, Callable[[Builder, Pull, Node, Flat], None]] = {
    **dict.fromkeys(KINDS, _reduce),
    ops.argmax: _arg,
    ops.argmin: _arg,
    ops.scan: _scan,
    ops.softmax: _softmax,
}
