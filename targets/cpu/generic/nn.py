"""Norms, rotary embedding, attention, experts and the KV cache."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import sympy
from tvm import tirx

from jisu.compiler import ops
from jisu.compiler.graph import Node, Op
from jisu.compiler.types import Dim, product
from jisu.targets.cpu.generic.build import Builder, Expr, Flat, i64, literal
from jisu.targets.cpu.generic.contract import load
from jisu.targets.cpu.generic.element import Pull, aligned
from jisu.targets.cpu.generic.reduce import line
from jisu.targets.cpu.generic.rounding import record
from jisu.targets.cpu.generic.scalar import (
    ACTIVATE,
    compute_dtype,
    dtype_of,
    exp,
    intrinsic,
    maximum,
    narrow,
    round_to,
    tanh,
)


def _norm(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    x, gain, *more = node.operands
    assert x is not None
    bias = more[0] if more else None
    rms = node.op is ops.rms_norm
    dtype = compute_dtype(x.dtype)
    size = b.dim(x.shape[-1])

    def row(outer: list[Expr]) -> None:
        def value(i: Expr) -> Expr:
            return pull.fresh().wide(x, [*outer, i])

        count = b.let(tirx.Cast(dtype, size), "count")
        centre = None if rms else b.let(line(b, size, "sum", dtype, value) / count, "mean")

        def centred(i: Expr) -> Expr:
            return value(i) if centre is None else b.let(value(i) - centre)

        squares = line(b, size, "sum", dtype, lambda i: (lambda v: v * v)(centred(i)))
        scale = b.let(intrinsic("sqrt", squares / count + literal(node.eps, dtype)), "scale")
        with b.loop(size) as i:
            normed = centred(i) / scale
            if gain is not None:
                weight = pull.fresh().wide(gain, [i])
                if rms:
                    weight = weight + literal(node.offset, dtype) if node.offset else weight
                    normed = round_to(b, b.let(normed), x.dtype) if node.round_first else normed
                normed = normed * weight
            if bias is not None:
                normed = normed + pull.fresh().wide(bias, [i])
            b.store(targets[0], [*outer, i], narrow(b, normed, x.dtype))

    b.spread(x.shape[:-1], x.tensor.size * 4, row)


def _rotary(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    x, cos, sin = node.parents
    (target,) = targets
    width, total = cos.shape[2], x.shape[3]
    assert isinstance(width, int) and isinstance(total, int)
    half = width // 2

    def point(index: list[Expr]) -> None:
        *outer, k = index
        here = aligned([outer[0], outer[1], i64(0)], cos.shape, (*x.shape[:2], width))

        def angle(table: Node, i: Expr) -> Expr:
            return pull.fresh().wide(table, [*here[:2], i])

        def turned(i: Expr, own: Expr, turn: Expr) -> Expr:
            first = round_to(b, b.let(own * angle(cos, i)), x.dtype)
            second = round_to(b, b.let(turn * angle(sin, i)), x.dtype)
            return narrow(b, first + second, x.dtype)

        low, high = (k * i64(2), k * i64(2) + i64(1)) if node.interleaved else (k, k + i64(half))
        p, q = pull.fresh().wide(x, [*outer, low]), pull.fresh().wide(x, [*outer, high])
        a, c = b.let(turned(low, p, -q)), b.let(turned(high, q, p))
        b.store(target, [*outer, low], a)
        b.store(target, [*outer, high], c)

    def rest(index: list[Expr]) -> None:
        at = [*index[:-1], index[-1] + i64(width)]
        b.store(target, at, pull.fresh()(x, at))

    b.points((*x.shape[:3], half), x.tensor.size * 4, point)
    if total > width:
        b.points((*x.shape[:3], total - width), product((*x.shape[:3], total - width)), rest)


def at_least_one(size: Dim) -> Dim:
    """The size, of which memory is allocated."""
    return max(size, 1) if isinstance(size, int) else sympy.Max(size, 1)


def attend(
    b: Builder,
    *,
    dtype: str,
    storage: str,
    low: Expr,
    high: Expr,
    most: Dim,
    query: Callable[[Expr], Expr],
    key: Callable[[Expr], Callable[[Expr], Expr]],
    value: Callable[[Expr], Callable[[Expr], Expr]],
    width: Expr,
    out: Dim,
    scale: float,
    softcap: float,
    adjust: Callable[[Expr, Expr], Expr],
    sink: Expr | None,
    empty_nan: bool,
    put: Callable[[Expr, Expr], None],
) -> None:
    """One row of attention over the keys low … high - 1, which are at most `most` (a function of shapes alone: TVM can't
    allocate memory whose size depends on data).

    key(j) and value(j) are rows, as functions of the element; adjust(j, score) adds a bias or hides the key with -inf.
    """
    vector = dtype == "float32"
    least = literal(-np.inf, dtype)
    zero = literal(0, dtype)
    count = b.let(tirx.max(high - low, i64(0)), "count")
    scores = b.scratch(at_least_one(most), dtype)
    with b.loop(count) as t:
        j = b.let(low + t, "j")
        total = line_product(b, width, dtype, query, key(j), vector)
        score = b.let(total * literal(scale, dtype), "score")
        if softcap:
            cap = literal(softcap, dtype)
            score = b.let(cap * tanh(b, b.let(score / cap)), "score")
        b.store(scores, t, adjust(j, score))
    peak = line(b, count, "max", dtype, lambda t: scores[t], vector)
    if sink is not None:
        peak = b.let(maximum(peak, sink), "peak")
    if not empty_nan:
        peak = b.let(tirx.Select(tirx.EQ(peak, least), zero, peak), "peak")
    with b.loop(count) as t:
        b.store(scores, t, exp(b, b.let(scores[t] - peak)))
    total = line(b, count, "sum", dtype, lambda t: scores[t], vector)
    if sink is not None:
        total = b.let(total + exp(b, b.let(sink - peak)), "total")
    sums = b.scratch(at_least_one(out), dtype)
    with b.loop(b.dim(out)) as e:
        b.store(sums, e, zero)
    with b.loop(count) as t:
        p = scores[t] / total
        p = b.let(p if empty_nan else tirx.Select(tirx.EQ(total, zero), zero, p), "p")
        element = value(b.let(low + t, "j"))
        with b.loop(b.dim(out)) as e:
            b.store(sums, e, sums[e] + p * element(e))
    with b.loop(b.dim(out)) as e:
        put(e, narrow(b, sums[e], storage))


def row_of(b: Builder, flat: Flat, position: Expr) -> Callable[[Expr], Expr]:
    """The row that starts at a position, as a function of the element."""
    base = b.let(position, "base")
    return lambda d: load(b, flat, base + d)


def _row_of_cache(b: Builder, node: Node, cache: _Cache, position: Expr, width: int) -> Callable[[Expr], Expr]:
    """A slot's row of `width` numbers in the cache that a node reads, as a function of the element."""
    if node.scheme == "none":
        return row_of(b, cache.cache, position)
    found = record(b, cache.cache, position, node.scheme, width)
    return found if node.dtype != "float64" else lambda d: b.let(tirx.Cast("float64", found(d)))


def line_product(
    b: Builder, size: Expr, dtype: str, left: Callable[[Expr], Expr], right: Callable[[Expr], Expr], vector: bool
) -> Expr:
    """The sum over d of left(d) * right(d)."""
    return line(b, size, "sum", dtype, lambda d: left(d) * right(d), vector)


def _attention(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    q, k, v, bias, sinks = node.operands
    assert q is not None and k is not None and v is not None
    dtype = compute_dtype(q.dtype)
    batch, s, h, width = q.shape
    t, groups = k.shape[1], k.shape[2]
    assert isinstance(h, int) and isinstance(groups, int)
    full: tuple[Dim, ...] = (batch, h, s, t)
    keys, values, queries = pull.leaves[k], pull.leaves[v], pull.leaves[q]

    def row(outer: list[Expr]) -> None:
        image, i, head = outer
        group = b.let(tirx.floordiv(head, i64(h // groups)), "group")
        high = b.dim(t)
        low: Expr = i64(0)
        if node.causal:
            high = b.let(tirx.min(b.dim(t) - b.dim(s) + i + i64(1), b.dim(t)), "high")
            low = b.let(tirx.max(high - i64(node.window), i64(0)), "low") if node.window else low
        q_base = b.let(queries.offset([image, i, head, i64(0)]), "q")

        def adjust(j: Expr, score: Expr) -> Expr:
            if bias is None:
                return score
            found = pull.fresh()(bias, aligned([image, head, i, j], bias.shape, full))
            if dtype_of(found) == "bool":
                return tirx.Select(found, score, literal(-np.inf, dtype))
            return score + pull.fresh().wide(bias, aligned([image, head, i, j], bias.shape, full))

        attend(
            b, dtype=dtype, storage=q.dtype, low=low, high=high, most=t,
            query=lambda d: load(b, queries, q_base + d),
            key=lambda j: row_of(b, keys, keys.offset([image, j, group, i64(0)])),
            value=lambda j: row_of(b, values, values.offset([image, j, group, i64(0)])),
            width=b.dim(width), out=v.shape[3], scale=node.scale, softcap=node.softcap, adjust=adjust,
            sink=None if sinks is None else pull.fresh().wide(sinks, [head]),
            empty_nan=bias is not None and bias.dtype != "bool",
            put=lambda e, value: b.store(targets[0], [*outer, e], value),
        )  # fmt: skip

    b.spread((batch, s, h), product((batch, s, h, t, width)) * 2, row)


NO_PAGE = "index out of range: the page table names no page of the cache"
NEGATIVE = "the cache's length is negative"
BEYOND = "the new slots are beyond the cache's capacity"
"""What can be wrong with a cache."""


class _Cache:
    """Where slots of sequences live in a cache: rows of it, or pages behind a table."""

    def __init__(self, b: Builder, pull: Pull, cache: Node, table: Node | None) -> None:
        self.b, self.cache, self.table = b, pull.leaves[cache], None if table is None else pull.leaves[table]
        self.page = b.dim(cache.shape[2])
        self.slots: Dim = cache.shape[2] if table is None else table.shape[1] * cache.shape[2]
        self.capacity = b.dim(self.slots)

    def base(self, sequence: Expr, group: Expr, slot: Expr) -> Expr:
        """The position of the first element of a slot's row."""
        b = self.b
        place = b.let(tirx.floormod(slot, tirx.max(self.capacity, i64(1))), "place")
        if self.table is None:
            return b.let(self.cache.offset([sequence, group, place, i64(0)]), "base")
        page = b.let(tirx.Cast("int64", self.table[[sequence, tirx.floordiv(place, self.page)]]), "page")
        if b.points_fail:
            # Who reads the page looks whether it's there; `check` would have every thread look at all of them.
            b.require(tirx.all(page >= i64(0), page < self.cache.shape[0]), "IndexError", NO_PAGE)
            page = b.let(tirx.max(tirx.min(page, self.cache.shape[0] - i64(1)), i64(0)), "page")
        return b.let(self.cache.offset([page, group, tirx.floormod(place, self.page), i64(0)]), "base")

    def check(self) -> None:
        """Fail where the table names a page that isn't there."""
        if self.table is not None and not self.b.points_fail:
            bad = self.b.scratch(1, "int64")
            self.b.store(bad, i64(0), i64(0))
            with self.b.loops(self.table.shape) as where:
                page = tirx.Cast("int64", self.table[list(where)])
                outside = tirx.any(page < i64(0), page >= self.cache.shape[0])
                self.b.store(bad, i64(0), bad[i64(0)] | tirx.Cast("int64", outside))
            self.b.require(tirx.EQ(bad[i64(0)], i64(0)), "IndexError", NO_PAGE)


def _attention_cached(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    q, k, v, length, start, table, sinks = node.operands
    assert q is not None and k is not None and v is not None and length is not None and start is not None
    dtype = compute_dtype(q.dtype)
    batch, c, h, width = q.shape
    groups = k.shape[1]
    assert isinstance(h, int) and isinstance(groups, int)
    queries = pull.leaves[q]
    keys, values = _Cache(b, pull, k, table), _Cache(b, pull, v, table)
    keys.check()
    first = pull(length, [i64(0)])
    b.require(first >= i64(0), "ValueError", NEGATIVE)
    oldest = b.let(tirx.max(first + b.dim(c) - keys.capacity, i64(0)), "oldest")

    def row(outer: list[Expr]) -> None:
        image, i, head = outer
        group = b.let(tirx.floordiv(head, i64(h // groups)), "group")
        here = pull.fresh()
        high = b.let(first + i + i64(1), "high")
        low = b.let(tirx.max(oldest, here(start, [image])), "low")
        if node.window:
            low = b.let(tirx.max(low, high - i64(node.window)), "low")
        q_base = b.let(queries.offset([image, i, head, i64(0)]), "q")
        attend(
            b, dtype=dtype, storage=q.dtype, low=low, high=high, most=keys.slots,
            query=lambda d: load(b, queries, q_base + d),
            key=lambda j: _row_of_cache(b, node, keys, keys.base(image, group, j), int(width)),
            value=lambda j: _row_of_cache(b, node, values, values.base(image, group, j), int(node.shape[3])),
            width=b.dim(width), out=node.shape[3], scale=node.scale, softcap=node.softcap,
            adjust=lambda j, score: score,
            sink=None if sinks is None else pull.fresh().wide(sinks, [head]),
            empty_nan=False,
            put=lambda e, value: b.store(targets[0], [*outer, e], value),
        )  # fmt: skip

    b.spread((batch, c, h), product((batch, c, h, width)) * 256, row)


def _cache_append(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    cache, new, length, table = node.operands
    assert cache is not None and new is not None and length is not None
    place = _Cache(b, pull, cache, table)
    place.check()
    first = pull(length, [i64(0)])
    batch, c, groups, width = new.shape
    b.require(first >= i64(0), "ValueError", NEGATIVE)
    if not node.ring:
        b.require(first + b.dim(c) <= place.capacity, "ValueError", BEYOND)

    def point(index: list[Expr]) -> None:
        image, i, group, d = index
        base = place.base(image, group, b.let(first + i))
        b.store(place.cache, base + d, pull.fresh()(new, [image, i, group, d]))

    # With a table two sequences may share a page; the order of writes is then that of one core.
    b.points((batch, c, groups, width), new.tensor.size, point, parallel=table is None)


def _experts(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    x, index, scores, gate_up, down = node.parents
    count, inner = gate_up.shape[0], down.shape[2]
    first, second = pull.leaves[gate_up], pull.leaves[down]
    _mixture(
        b, pull, node, count, inner,
        lambda e, half, i, d: load(b, first, first.offset([e, i + i64(half) * b.dim(inner), d])),
        lambda e, i, d: load(b, second, second.offset([e, i, d])),
        targets[0],
    )  # fmt: skip


def _packed_experts(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    _, _, _, gate_up, down = node.parents
    first, second = pull.leaves[gate_up], pull.leaves[down]

    def place(w: Node, row: Expr, column: Expr, half: list[Expr], lead: int) -> list[Expr]:
        panel, *pairs = w.shape[lead:]
        assert isinstance(panel, int)
        index = [tirx.floordiv(row, i64(panel)), *half]
        if not pairs:
            return [*index, column, tirx.floormod(row, i64(panel))]
        pair = b.dim(pairs[0])
        return [*index, tirx.floordiv(column, pair), tirx.floormod(row, i64(panel)), tirx.floormod(column, pair)]

    _mixture(
        b, pull, node, gate_up.shape[0], node.inner,
        lambda e, half, i, d: load(b, first, first.offset([e, *place(gate_up, i, d, [i64(half)], 4)])),
        lambda e, i, d: load(b, second, second.offset([e, *place(down, i, d, [], 3)])),
        targets[0],
    )  # fmt: skip


def _mixture(
    b: Builder,
    pull: Pull,
    node: Node,
    count: Dim,
    inner: Dim,
    up: Callable[[Expr, int, Expr, Expr], Expr],
    down: Callable[[Expr, Expr, Expr], Expr],
    target: Flat,
) -> None:
    """Experts whose weights are up(expert, 0 for the gate or 1, channel, input) and down(expert, output, channel)."""
    x, index, scores = node.parents[:3]
    dtype = compute_dtype(x.dtype)
    tokens, h = x.shape
    hidden, width = b.dim(h), b.dim(inner)
    rows = pull.leaves[x]
    vector = dtype == "float32" and node.op is ops.experts

    def project(size: Expr, left: Callable[[Expr], Expr], right: Callable[[Expr], Expr]) -> Expr:
        return b.let(round_to(b, line_product(b, size, dtype, left, right, vector), x.dtype), "dot")

    def expert(t: Expr, j: Expr) -> tuple[Expr, Expr]:
        """The number of a token's expert, and whether it is one."""
        e = b.let(tirx.Cast("int64", pull.fresh()(index, [t, j])), "e")
        return e, tirx.all(e >= i64(0), e < b.dim(count))

    def channel(t: Expr, e: Expr, i: Expr) -> Expr:
        """What an expert's channel makes of a token."""
        gate, linear = (
            project(hidden, lambda d: load(b, rows, t * hidden + d), lambda d, half=half: up(e, half, i, d))  # type: ignore[misc]
            for half in (0, 1)
        )
        active = b.let(round_to(b, ACTIVATE[node.activation](b, gate), x.dtype))
        return round_to(b, b.let(active * linear), x.dtype)

    def output(e: Expr, i: Expr, weight: Expr, mixed: Callable[[Expr], Expr]) -> Expr:
        """What an expert adds to a token's output."""
        out = project(width, mixed, lambda d: down(e, i, d))
        return round_to(b, b.let(out * weight), x.dtype)

    if b.points_fail:
        chosen = index.shape[1]
        held = b.scratch(at_least_one(product((tokens, chosen, inner))), dtype, shared=True)

        def at(t: Expr, j: Expr, i: Expr) -> Expr:
            return (t * b.dim(chosen) + j) * width + i

        def one_channel(point: list[Expr]) -> None:
            t, j, i = point
            e, inside = expert(t, j)
            with b.when(inside):
                b.store(held, at(t, j, i), channel(t, e, i))

        def one_output(point: list[Expr]) -> None:
            t, i = point
            total = b.scratch(1, dtype)
            b.store(total, i64(0), literal(0, dtype))
            with b.loop(b.dim(chosen)) as j:
                e, inside = expert(t, j)
                with b.when(inside):
                    weight = pull.fresh().wide(scores, [t, j])
                    more = output(e, i, weight, lambda d: held[at(t, j, d)])
                    b.store(total, i64(0), total[i64(0)] + more)
            b.store(target, [t, i], narrow(b, total[i64(0)], x.dtype))

        b.points((tokens, chosen, inner), product((tokens, chosen, inner, h)) * 4, one_channel)
        b.points((tokens, h), product((tokens, chosen, inner, h)) * 2, one_output)
        return

    def token(outer: list[Expr]) -> None:
        (t,) = outer
        result = b.scratch(at_least_one(h), dtype)
        mixed = b.scratch(at_least_one(inner), dtype)
        with b.loop(hidden) as i:
            b.store(result, i, literal(0, dtype))

        with b.loop(b.dim(index.shape[1])) as j:
            e, inside = expert(t, j)
            with b.when(inside):
                weight = pull.fresh().wide(scores, [t, j])
                with b.loop(width) as i:
                    b.store(mixed, i, channel(t, e, i))
                with b.loop(hidden) as i:
                    b.store(result, i, result[i] + output(e, i, weight, lambda d: mixed[d]))
        with b.loop(hidden) as i:
            b.store(target, [t, i], narrow(b, result[i], x.dtype))

    b.spread((tokens,), product((tokens, index.shape[1], inner, h)) * 6, token)


def _expert_linear(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    x, index, w, bias = node.operands
    assert x is not None and index is not None and w is not None
    (target,) = targets
    dtype = compute_dtype(x.dtype)
    rows, matrix = pull.leaves[x], pull.leaves[w]
    count, _, depth = w.shape
    shared = x.shape[1] == 1

    def point(place: list[Expr]) -> None:
        t, j, n = place
        e = b.let(tirx.Cast("int64", pull.fresh()(index, [t, j])), "e")
        inside = tirx.all(e >= i64(0), e < b.dim(count))
        with b.when(inside):
            row = b.let(rows.offset([t, i64(0) if shared else j, i64(0)]), "row")
            own = b.let(matrix.offset([e, n, i64(0)]), "own")
            value = line_product(
                b, b.dim(depth), dtype, lambda d: load(b, rows, row + d), lambda d: load(b, matrix, own + d), dtype == "float32"
            )  # fmt: skip
            if bias is not None:
                value = value + load(b, pull.leaves[bias], pull.leaves[bias].offset([e, n]))
            b.store(target, place, narrow(b, b.let(value), x.dtype))
        with b.when(tirx.Not(inside)):
            b.store(target, place, narrow(b, literal(0, dtype), x.dtype))

    b.points(node.shape, node.tensor.size * depth * 2, point)


BODIES: Mapping[Op, Callable[[Builder, Pull, Node, Sequence[Flat]], None]] = {
    ops.rms_norm: _norm,
    ops.layer_norm: _norm,
    ops.rotary: _rotary,
    ops.attention: _attention,
    ops.attention_cached: _attention_cached,
    ops.cache_append: _cache_append,
    ops.experts: _experts,
    ops.packed_experts: _packed_experts,
    ops.expert_linear: _expert_linear,
}
