"""Contractions: matrix products, linear layers (plain and over packed weights), convolution, packing."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import sympy
from tvm import tirx
from tvm.tirx.stmt import ForKind

from jisu.compiler import levels, ops, schemes
from jisu.compiler.graph import Node, Op
from jisu.compiler.ops.contract import pack, pack_gated, packed_gated_linear, packed_linear, packed_projections
from jisu.compiler.types import Dim, is_integer, product
from jisu.targets.cpu.generic.build import Builder, Expr, Flat, block, i64, literal
from jisu.targets.cpu.generic.element import Pull, aligned
from jisu.targets.cpu.generic.scalar import ACTIVATE, arithmetic, compute_dtype, fma, narrow, round_to, widen

LANES = 16
ROWS = 4
TILE = 2 * LANES


def multiply_add(a: Expr, c: Expr, total: Expr, dtype: str) -> Expr:
    """total + a * c; integers wrap around."""
    return arithmetic("add", total, arithmetic("mul", a, c)) if is_integer(dtype) else fma(a, c, total)


def load(b: Builder, flat: Flat, position: Expr) -> Expr:
    """An element in the dtype that arithmetic on it is done in."""
    return widen(b, b.let(flat[position], "v"))


def columns(
    b: Builder, dtype: str, count: Expr, depth: Sequence[Expr], left: Callable[[list[Expr]], Expr],
    right: Callable[[list[Expr], Expr], Expr], put: Callable[[Expr, Expr], None],
) -> None:  # fmt: skip
    """put(j, sum over k in `depth` of left(k) * right(k, j)) for j < count <= TILE, side by side."""
    zero = literal(0, dtype)
    totals = b.scratch(TILE, dtype)
    with b.loop(count) as j:
        b.store(totals, j, zero)
    with b.loops(depth) as k:
        a = b.let(left(list(k)), "a")
        with b.loop(count) as j:
            b.store(totals, j, multiply_add(a, right(list(k), j), totals[j], dtype))
    with b.loop(count) as j:
        put(j, totals[j])


def _matmul(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    x, w = node.parents
    dtype = compute_dtype(node.dtype)
    left, right = pull.leaves[x], pull.leaves[w]
    *batch, m, n = node.shape
    depth, width, rows = b.dim(x.shape[-1]), b.dim(n), b.dim(m)
    vector = dtype == "float32"
    blocks = -(-m // ROWS) if isinstance(m, int) else m
    step = ROWS if isinstance(m, int) else 1

    def tile(outer: list[Expr]) -> None:
        *where, group, first_tile = outer
        first = b.let(first_tile * i64(TILE), "first")
        a_base = b.let(left.offset([*aligned(where, x.shape[:-2], batch), i64(0), i64(0)]), "a")
        w_base = b.let(right.offset([*aligned(where, w.shape[:-2], batch), i64(0), first]), "w")
        y_base = b.let(target.offset([*where, i64(0), first]), "y")

        def put(row: Expr, j: Expr, value: Expr) -> None:
            b.store(target, y_base + row * width + j, narrow(b, value, node.dtype))

        def full(row: Expr, many: int) -> None:
            parts = TILE // LANES
            totals = [[b.scratch(LANES, dtype) for _ in range(parts)] for _ in range(many)]
            with b.loop(LANES, ForKind.VECTORIZED) as lane:
                for line in totals:
                    for total in line:
                        b.store(total, lane, literal(0, dtype))
            with b.loop(depth) as k:
                scalars = [load(b, left, a_base + (row + i64(r)) * depth + k) for r in range(many)]
                with b.loop(LANES, ForKind.VECTORIZED) as lane:
                    for p in range(parts):
                        value = load(b, right, w_base + k * width + i64(p * LANES) + lane)
                        for r in range(many):
                            b.store(totals[r][p], lane, fma(scalars[r], value, totals[r][p][lane]))
            for r in range(many):
                for p in range(parts):
                    with b.loop(LANES, ForKind.VECTORIZED) as lane:
                        put(row + i64(r), i64(p * LANES) + lane, totals[r][p][lane])

        def narrow_tile(row: Expr, count: Expr) -> None:
            columns(
                b, dtype, count, [depth],
                lambda k: load(b, left, a_base + row * depth + k[0]),
                lambda k, j: load(b, right, w_base + k[0] * width + j),
                lambda j, value: put(row, j, value),
            )  # fmt: skip

        begin = b.let(group * i64(step), "begin")
        count = b.let(tirx.min(i64(step), rows - begin), "rows")
        wide = first + i64(TILE) <= width
        if vector:
            with b.scope() as vectors:
                if step == 1:
                    full(begin, 1)
                else:
                    with b.when(tirx.EQ(count, i64(ROWS))):
                        full(begin, ROWS)
                    with b.when(count < i64(ROWS)), b.loop(count) as r:
                        full(begin + r, 1)
            with b.scope() as rest, b.loop(count) as r:
                narrow_tile(begin + r, width - first)
            b.emit(tirx.IfThenElse(wide, block(vectors), block(rest)))
        else:
            with b.loop(count) as r:
                narrow_tile(begin + r, b.let(tirx.min(i64(TILE), width - first), "count"))

    tiles = _ceil(n, TILE)
    b.spread([*batch, blocks, tiles], product((*batch, m, n, x.shape[-1])), tile)


def _ceil(n: Dim, step: int) -> Dim:
    return -(-n // step) if isinstance(n, int) else sympy.floor((n + step - 1) / step)


def dots(
    b: Builder, dtype: str, depth: Expr, rows: Sequence[Callable[[Expr], Expr]], outs: Sequence[Callable[[Expr], Expr]]
) -> list[list[Expr]]:
    """All products of `rows` with `outs`, each a function of k, summed over k < depth."""
    vector = dtype == "float32"
    zero = literal(0, dtype)
    sums = [[b.scratch(1, dtype) for _ in outs] for _ in rows]
    done: Expr = i64(0)
    for line in sums:
        for total in line:
            b.store(total, i64(0), zero)
    if vector:
        lanes = [[b.scratch(LANES, dtype) for _ in outs] for _ in rows]
        with b.loop(LANES, ForKind.VECTORIZED) as lane:
            for line in lanes:
                for total in line:
                    b.store(total, lane, zero)
        whole = b.let(tirx.floordiv(depth, i64(LANES)), "whole")
        with b.loop(whole) as t, b.loop(LANES, ForKind.VECTORIZED) as lane:
            k = t * i64(LANES) + lane
            left, right = [row(k) for row in rows], [out(k) for out in outs]
            for r, line in enumerate(lanes):
                for c, total in enumerate(line):
                    b.store(total, lane, fma(left[r], right[c], total[lane]))
        done = b.let(whole * i64(LANES), "done")
        for r, line in enumerate(lanes):
            for c, total in enumerate(line):
                vector_value = tirx.BufferLoad(total.buffer, [tirx.Ramp(i64(0), i64(1), LANES)])
                b.store(
                    sums[r][c], i64(0), tirx.call_llvm_pure_intrin(dtype, "llvm.vector.reduce.fadd", zero, vector_value)
                )
    with b.loop(depth - done) as rest:
        k = done + rest
        left, right = [row(k) for row in rows], [out(k) for out in outs]
        for r, line in enumerate(sums):
            for c, total in enumerate(line):
                b.store(total, i64(0), multiply_add(left[r], right[c], total[i64(0)], dtype))
    return [[b.let(total[i64(0)], "dot") for total in line] for line in sums]


def epilogue(b: Builder, pull: Pull, node: Node, value: Expr, row: Expr, column: Expr) -> Expr:
    """bias, activation and residual of a linear layer (its last two operands), each rounded as its meaning says."""
    *_, bias, residual = node.operands
    if bias is not None:
        value = value + load(b, pull.leaves[bias], column)
    value = b.let(round_to(b, value, node.dtype))
    if node.activation != "none":
        value = b.let(round_to(b, ACTIVATE[node.activation](b, value), node.dtype))
    if residual is not None:
        value = value + load(b, pull.leaves[residual], row * b.dim(node.shape[-1]) + column)
    return narrow(b, value, node.dtype)


def gate_up(b: Builder, node: Node, gate: Expr, up: Expr) -> Expr:
    """activation(gate) * up, each rounded as the meaning of `gated_linear` says."""
    gate, up = b.let(round_to(b, gate, node.dtype)), b.let(round_to(b, up, node.dtype))
    active = round_to(b, ACTIVATE[node.activation](b, gate), node.dtype)
    return narrow(b, b.let(active) * up, node.dtype)


def _linear(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    gated = node.op is ops.gated_linear
    x = node.operands[0]
    weights = [o for o in node.operands[1:3] if o is not None] if gated else [node.operands[1]]
    assert x is not None
    dtype = compute_dtype(node.dtype)
    left = pull.leaves[x]
    matrices = [pull.leaves[w] for w in weights if w is not None]
    n = node.shape[-1]
    depth, width = b.dim(x.shape[-1]), b.dim(n)
    m = product(node.shape[:-1])
    rows = b.let(b.dim(m), "rows")
    wide = 4 // len(matrices)

    def strip(outer: list[Expr]) -> None:
        begin = b.let(outer[0] * i64(wide), "column")

        def cover(row: Expr, many: int, column: Expr, outs: int) -> None:
            found = dots(
                b, dtype, depth,
                [lambda k, r=r: load(b, left, (row + i64(r)) * depth + k) for r in range(many)],  # type: ignore[misc]
                [lambda k, w=w, c=c: load(b, w, (column + i64(c)) * depth + k) for w in matrices for c in range(outs)],  # type: ignore[misc]
            )  # fmt: skip
            for r in range(many):
                for c in range(outs):
                    here, there = row + i64(r), column + i64(c)
                    if gated:
                        value = gate_up(b, node, found[r][c], found[r][outs + c])
                    else:
                        value = epilogue(b, pull, node, found[r][c], here, there)
                    b.store(target, here * width + there, value)

        def down(column: Expr, outs: int) -> None:
            with b.loop(tirx.floordiv(rows, i64(2))) as pair:
                cover(pair * i64(2), 2, column, outs)
            with b.when(tirx.EQ(tirx.floormod(rows, i64(2)), i64(1))):
                cover(rows - i64(1), 1, column, outs)

        with b.scope() as full:
            down(begin, wide)
        with b.scope() as part, b.loop(width - begin) as c:
            down(begin + c, 1)
        b.emit(tirx.IfThenElse(begin + i64(wide) <= width, block(full), block(part)))

    b.spread([_ceil(n, wide)], product((m, n, x.shape[-1])) * len(matrices), strip)


def _packed(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    gated = node.op is packed_gated_linear
    x, w = node.operands[:2]
    assert x is not None and w is not None
    dtype = compute_dtype(node.dtype)
    left, right = pull.leaves[x], pull.leaves[w]
    panels, *rest = w.shape
    _, panel, *pairs = rest[1:] if gated else rest
    pair = pairs[0] if pairs else 1
    assert isinstance(panel, int) and isinstance(pair, int)
    depth, width = b.dim(x.shape[-1]), i64(node.outputs)
    m = product(node.shape[:-1])

    def strip(outer: list[Expr]) -> None:
        row, p = outer
        with b.loop((panel + TILE - 1) // TILE) as part:
            first = b.let(part * i64(TILE), "first")
            column = b.let(p * i64(panel) + first, "column")
            count = b.let(tirx.max(tirx.min(tirx.min(i64(TILE), i64(panel) - first), width - column), i64(0)), "count")
            held = b.scratch(TILE, dtype)

            def weight(half: int, k: list[Expr], j: Expr) -> Expr:
                word, within = (
                    (tirx.floordiv(k[0], i64(pair)), [tirx.floormod(k[0], i64(pair))]) if pair > 1 else (k[0], [])
                )
                return load(b, right, right.offset([p, *([i64(half)] if gated else []), word, first + j, *within]))

            def run(half: int, put: Callable[[Expr, Expr], None]) -> None:
                columns(
                    b, dtype, count, [depth],
                    lambda k: load(b, left, row * depth + k[0]),
                    lambda k, j: weight(half, k, j),
                    put,
                )  # fmt: skip

            def put(j: Expr, value: Expr) -> None:
                done = gate_up(b, node, held[j], value) if gated else epilogue(b, pull, node, value, row, column + j)
                b.store(target, row * width + column + j, done)

            if gated:
                run(0, lambda j, value: b.store(held, j, value))
                run(1, put)
            else:
                run(0, put)

    b.spread([m, panels], product((m, node.outputs, x.shape[-1])) * (2 if gated else 1), strip)


def _packed_projections(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    x, *operands = node.parents
    count = len(node.outputs)
    for i, (outputs, target) in enumerate(zip(node.outputs, targets, strict=True)):
        bias = operands[count + i] if node.biased else None
        _packed(b, pull, packed_linear(x, operands[i], bias, outputs=outputs), target)


def _levels_projections(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    x, *operands = node.parents
    count = len(node.outputs)
    kinds = (True, True, node.offset, node.biased)
    how = {a: node.attributes[a] for a in ("k", "scheme", "group", "own", "dtype", "records")}
    for i, (outputs, target) in enumerate(zip(node.outputs, targets, strict=True)):
        own = iter(operands[i::count])
        codes, scales, zeros, bias = (next(own) if there else None for there in kinds)
        one = ops.levels_linear.make((x, codes, scales, zeros, bias, None), {"outputs": outputs, **how}, node.source)
        _quantized(b, pull, one, target)


def _conv(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    x, w = node.parents
    dtype = compute_dtype(node.dtype)
    left, right = pull.leaves[x], pull.leaves[w]
    batch, outputs, *space = node.shape
    channels, kernel = b.dim(w.shape[1]), [b.dim(d) for d in w.shape[2:]]
    per_group = b.dim(outputs) if node.groups == 1 else b.let(tirx.floordiv(b.dim(outputs), i64(node.groups)))
    width = b.dim(space[-1])

    def tile(outer: list[Expr]) -> None:
        image, out, *place, part = outer
        first = b.let(part * i64(TILE), "first")
        count = b.let(tirx.min(i64(TILE), width - first), "count")
        base = i64(0) if node.groups == 1 else b.let(tirx.floordiv(out, per_group) * channels, "channel")

        def pixel(k: list[Expr], j: Expr) -> Expr:
            channel, *inside = k
            where = [
                p * i64(stride) + u * i64(dilation)
                for p, u, stride, dilation in zip(
                    [*place, first + j], inside, node.strides, node.dilations, strict=True
                )
            ]
            return load(b, left, left.offset([image, base + channel, *where]))

        columns(
            b, dtype, count, [channels, *kernel],
            lambda k: load(b, right, right.offset([out, *k])),
            pixel,
            lambda j, value: b.store(target, [image, out, *place, first + j], narrow(b, value, node.dtype)),
        )  # fmt: skip

    work = product((batch, outputs, *space, *w.shape[1:]))
    b.spread([batch, outputs, *space[:-1], _ceil(space[-1], TILE)], work, tile)


def _pack(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    sources = [pull.leaves[w] for w in node.parents]
    *experts, n, k = node.parents[0].shape
    gated = node.op is pack_gated
    dtype = node.dtype
    nothing = narrow(b, literal(0, "float32"), dtype) if dtype == "bfloat16" else literal(0, dtype)

    def row(outer: list[Expr]) -> None:
        lead, (panel, *half, word) = outer[: len(experts)], outer[len(experts) :]
        with b.loops([i64(node.panel), i64(node.pair)]) as (lane, within):
            index = [*outer, lane, *([within] if node.pair > 1 else [])]
            line, column = b.let(panel * i64(node.panel) + lane), b.let(word * i64(node.pair) + within)
            inside = tirx.all(line < b.dim(n), column < b.dim(k))
            values = [tirx.if_then_else(inside, source[[*lead, line, column]], nothing) for source in sources]
            b.store(target, index, tirx.if_then_else(tirx.EQ(half[0], i64(0)), *values) if gated else values[0])

    b.spread(node.shape[: len(experts) + (3 if gated else 2)], node.tensor.size, row)


def level(b: Builder, scheme: str, code: Expr) -> Expr:
    """The level float32 of a scheme's code (an int32)."""
    kind = schemes.scheme(scheme)
    if kind.uniform:
        return tirx.Cast("float32", code)
    if kind.mantissa:  # exponent and mantissa lie as in float32, moved
        sign = 1 << (kind.bits - 1)
        bits = tirx.bitwise_and(code, sign - 1) << (23 - kind.mantissa)
        size = b.let(tirx.reinterpret("float32", bits) * tirx.FloatImm("float32", 2.0 ** (127 - kind.bias)))
        return tirx.Select(tirx.NE(tirx.bitwise_and(code, sign), 0), -size, size)
    found: Expr = literal(float(kind.levels[-1]), "float32")
    for i in range(len(kind.levels) - 2, -1, -1):
        found = tirx.Select(tirx.EQ(code, i), literal(float(kind.levels[i]), "float32"), found)
    return found


def byte(b: Builder, flat: Flat, position: Expr) -> Expr:
    """A byte as int32."""
    return tirx.Cast("int32", b.let(flat[position]))


def _dequantize(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    codes, scales, zeros, mask = node.operands
    assert codes is not None and scales is not None
    kind = schemes.scheme(node.scheme)
    n, k = node.shape
    group = node.group or k
    groups = kind.groups(k, node.group)
    packed, stored = pull.leaves[codes], pull.leaves[scales]

    def value(row: Expr, column: Expr, bit: Expr, last: Expr) -> Expr:
        """The number whose code begins at `bit`; `last` is the last byte that it may reach into."""
        at = b.let(tirx.floordiv(bit, i64(8)), "byte")
        code = byte(b, packed, at)
        if 8 % kind.bits:  # a code may go on in the next byte
            code = tirx.bitwise_or(code, byte(b, packed, tirx.min(at + i64(1), last)) << 8)
        shift = tirx.Cast("int32", tirx.floormod(bit, i64(8)))
        code = b.let(tirx.bitwise_and(code >> shift, 2**kind.bits - 1), "code")
        where = b.let(row * i64(groups) + tirx.floordiv(column, i64(group)), "group")
        if scales.dtype != "uint8":
            scale = tirx.Cast("float32", b.let(stored[where]))
        elif kind.scale == "e8m0":
            scale = tirx.reinterpret("float32", tirx.max(byte(b, stored, where) << 23, 1 << 22))
        else:
            scale = level(b, "fp8", byte(b, stored, where)) * literal(node.whole, "float32")
        zero = (
            literal(kind.middle, "float32")
            if zeros is None
            else tirx.Cast("float32", byte(b, pull.leaves[zeros], where))
        )
        found = b.let((level(b, node.scheme, code) - zero) * scale)
        return narrow(b, found if node.dtype != "float64" else tirx.Cast("float64", found), node.dtype)

    def element(outer: list[Expr]) -> None:
        row, column = outer
        row_bytes = i64(kind.row_bytes(k))
        start = b.let(row * row_bytes, "start")
        bit = start * i64(8) + column * i64(kind.bits)
        b.store(target, outer, value(row, column, bit, start + row_bytes - i64(1)))

    if mask is None:
        b.spread([n, k], product((n, k, 8)), element)
        return
    size = int(codes.shape[0])
    kept_elements(
        b, pull.leaves[mask], int(n), int(k), target, size * 8 // kind.bits,
        lambda row, column, at: value(row, column, at * i64(kind.bits), i64(size - 1)),
    )  # fmt: skip


def kept_elements(
    b: Builder, mask: Flat, n: int, k: int, target: Flat, size: int, value: Callable[[Expr, Expr, Expr], Expr]
) -> None:
    """target[n, k] = value(row, column, i) for the i-th set bit of a mask in row-major order if i < size, else 0."""
    row_bytes = -(-k // 8)
    starts = b.scratch(n + 1, "int64")
    zero = i64(0)
    b.store(starts, zero, zero)
    with b.loop(n) as row:
        count = b.scratch(1, "int64")
        b.store(count, zero, zero)
        with b.loop(k) as column:
            b.store(count, zero, count[zero] + tirx.Cast("int64", bit_of(b, mask, row * i64(row_bytes), column)))
        b.store(starts, row + i64(1), starts[row] + count[zero])
    nothing = narrow(b, literal(0, compute_dtype(target.dtype)), target.dtype)

    def line(outer: list[Expr]) -> None:
        (row,) = outer
        position = b.scratch(1, "int64")
        b.store(position, zero, starts[row])
        with b.loop(k) as column:
            at = b.let(position[zero], "at")
            there = b.let(bit_of(b, mask, row * i64(row_bytes), column), "there")
            b.store(target, [row, column], nothing)
            with b.when(tirx.all(tirx.NE(there, 0), at < i64(size))):
                b.store(target, [row, column], value(row, column, at))
            b.store(position, zero, at + tirx.Cast("int64", there))

    b.spread([n], n * k * 8, line)


def bit_of(b: Builder, mask: Flat, first: Expr, bit: Expr) -> Expr:
    """A bit (int32) of the bytes of a mask that begin at `first`, the lowest first."""
    held = byte(b, mask, first + tirx.floordiv(bit, i64(8)))
    return tirx.bitwise_and(held >> tirx.Cast("int32", tirx.floormod(bit, i64(8))), 1)


class Scaled:
    """Values of codes, from scales and zeros in panels; `where` is a panel's index (and gate or up)."""

    def __init__(self, b: Builder, pull: Pull, node: Node, scales: Node | None, zeros: Node | None, k: int) -> None:
        assert scales is not None
        self.b, self.kind, self.group = b, schemes.scheme(node.scheme), node.group or k
        self.scales, self.zeros = pull.leaves[scales], None if zeros is None else pull.leaves[zeros]

    def value(self, where: Sequence[Expr], k: Expr, lane: Expr, code: Expr) -> Expr:
        """The float32 that a code (int32) of input k and a panel's output stands for."""
        b, kind = self.b, self.kind
        at = b.let(self.scales.offset([*where, tirx.floordiv(k, i64(self.group)), lane]), "at")
        middle = literal(kind.middle, "float32")
        zero = middle if self.zeros is None else tirx.Cast("float32", byte(b, self.zeros, at))
        scale = tirx.Cast("float32", b.let(self.scales[at]))
        return b.let((level(b, kind.name, b.let(tirx.bitwise_and(code, 2**kind.bits - 1), "code")) - zero) * scale)

    def code(self, packed: Flat, where: Sequence[Expr], k: Expr, lane: Expr, side: int) -> Expr:
        """The code (int32, other bits above it) of input k and a panel's output, of codes `side` inputs of which lie side by side."""
        size = i64(side * self.kind.per_byte)
        within = tirx.floormod(k, size)
        at = packed.offset([*where, tirx.floordiv(k, size), lane, tirx.floormod(within, i64(side))])
        return byte(self.b, packed, at) >> (tirx.Cast("int32", tirx.floordiv(within, i64(side))) * 4)


def _quantized(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    x, codes, scales, zeros = node.operands[:4]
    assert x is not None and codes is not None
    levelled = node.op is ops.levels_linear
    dtype = compute_dtype(node.dtype)
    left, packed = pull.leaves[x], pull.leaves[codes]
    k = int(node.k if levelled else x.shape[-1])
    scaled = Scaled(b, pull, node, scales, zeros, k)
    panels, panel, side = (int(codes.shape[i]) for i in (0, -2, -1))
    depth, width, m, stride = i64(k), i64(node.outputs), product(node.shape[:-1]), i64(int(x.shape[-1]))

    def strip(outer: list[Expr]) -> None:
        row, p = outer

        def data(i: Expr) -> Expr:
            if not levelled:
                return load(b, left, row * depth + i)
            group = tirx.floordiv(i, i64(node.group)) if node.own and node.group else i64(0)
            at = b.let(row * stride + i64(levels.scale_offset(k)) + group * i64(4), "at")
            bits: Expr = tirx.IntImm("uint32", 0)
            for n in range(4):
                bits = tirx.bitwise_or(bits, tirx.Cast("uint32", left[at + i64(n)]) << tirx.IntImm("uint32", 8 * n))
            scale = b.let(tirx.reinterpret("float32", b.let(bits)), "scale")
            code = b.let(left[row * stride + i])
            if schemes.scheme(node.records).uniform:
                found: Expr = tirx.Cast("float32", tirx.Cast("int8", code))
            else:
                found = level(b, node.records, b.let(tirx.Cast("int32", code)))
            return b.let(tirx.Cast(dtype, b.let(found * scale)))

        with b.loop((panel + TILE - 1) // TILE) as part:
            first = b.let(part * i64(TILE), "first")
            column = b.let(p * i64(panel) + first, "column")
            count = b.let(tirx.max(tirx.min(tirx.min(i64(TILE), i64(panel) - first), width - column), i64(0)), "count")
            held = b.scratch(TILE, dtype)

            def weight(half: int, k: Expr, j: Expr) -> Expr:
                lead = [p, *([i64(half)] if node.gated else [])]
                value = scaled.value(lead, k, first + j, scaled.code(packed, lead, k, first + j, side))
                return value if dtype == "float32" else b.let(tirx.Cast(dtype, value))

            def run(half: int, put: Callable[[Expr, Expr], None]) -> None:
                columns(
                    b, dtype, count, [depth], lambda i: data(i[0]), lambda i, j: weight(half, i[0], j), put,
                )  # fmt: skip

            def put(j: Expr, value: Expr) -> None:
                gate = node.gated
                done = gate_up(b, node, held[j], value) if gate else epilogue(b, pull, node, value, row, column + j)
                b.store(target, row * width + column + j, done)

            if node.gated:
                run(0, lambda j, value: b.store(held, j, value))
            run(1 if node.gated else 0, put)

    b.spread([m, panels], product((m, node.outputs, k)) * (2 if node.gated else 1), strip)


SEVERAL: Mapping[Op, Callable[[Builder, Pull, Node, Sequence[Flat]], None]] = {
    packed_projections: _packed_projections,
    ops.levels_projections: _levels_projections,
}
"""Bodies of ops with several results."""

BODIES: Mapping[Op, Callable[[Builder, Pull, Node, Flat], None]] = {
    ops.matmul: _matmul,
    ops.linear: _linear,
    ops.gated_linear: _linear,
    packed_linear: _packed,
    packed_gated_linear: _packed,
    ops.conv: _conv,
    pack: _pack,
    pack_gated: _pack,
    ops.dequantize: _dequantize,
    ops.quantized_linear: _quantized,
    ops.levels_linear: _quantized,
}
