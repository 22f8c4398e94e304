"""Sparse matrices: expanding them, and layers and embeddings that read their packed form, a number at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tvm import tirx

from jisu.compiler import ops, schemes
from jisu.compiler.graph import Node, Op
from jisu.compiler.ops.semi_structured import INPUTS, ROWS, fours
from jisu.compiler.types import fixed, product
from jisu.targets.cpu.generic.build import Builder, Expr, Flat, i64, literal
from jisu.targets.cpu.generic.contract import Scaled, bit_of, byte, epilogue, gate_up, kept_elements, load, multiply_add
from jisu.targets.cpu.generic.element import Pull
from jisu.targets.cpu.generic.index import Table, check, resolve
from jisu.targets.cpu.generic.scalar import compute_dtype, narrow

ZERO = i64(0)


def _expand(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    values, mask = node.parents
    stored = pull.leaves[values]
    n, k = node.shape
    size = fixed(values.shape[0])
    kept_elements(
        b, pull.leaves[mask], fixed(n), fixed(k), target, size, lambda row, column, at: b.let(stored[at], "v")
    )


class _Packed:
    """The packed form in memory: its values and masks, `where` being a panel's index (and gate or up)."""

    def __init__(self, b: Builder, pull: Pull, node: Node, scales: Node | None, zeros: Node | None, k: int) -> None:
        values, mask, starts = node.operands[1:4] if node.op is ops.sparse_linear else node.operands[:3]
        assert values is not None and mask is not None and starts is not None
        self.b, self.node, self.k = b, node, k
        self.values, self.mask, self.starts = (pull.leaves[o] for o in (values, mask, starts))
        self.scaled = None if scales is None else Scaled(b, pull, node, scales, zeros, k)
        self.panel, self.words = fixed(mask.shape[-1]) * 4, -(-k // 2)
        self.per_byte = 1 if scales is None else schemes.scheme(node.scheme).per_byte
        self.count = fixed(values.shape[0]) * self.per_byte

    def bits(self, where: Sequence[Expr], word: Expr) -> Expr:
        """Where the bits of a word begin."""
        return self.b.let(self.mask.offset([*where, word, ZERO]), "bits")

    def bit(self, lane: Expr, within: Expr) -> Expr:
        """The number of a lane's and an input's bit in its word."""
        return lane * i64(2) + within if self.node.pair == 2 else within * i64(self.panel) + lane

    def there(self, at: Expr) -> Expr:
        """Whether there is a value number `at`."""
        return tirx.all(at >= ZERO, at < i64(self.count))

    def value(self, where: Sequence[Expr], at: Expr, lane: Expr, k: Expr, dtype: str) -> Expr:
        """The kept number `at` of a panel in `dtype`, in which arithmetic on it is done."""
        b = self.b
        if self.scaled is None:
            return load(b, self.values, at)
        code = byte(b, self.values, tirx.floordiv(at, i64(2)) if self.per_byte == 2 else at)
        if self.per_byte == 2:
            code = code >> (tirx.Cast("int32", tirx.floormod(at, i64(2))) * 4)
        found = self.scaled.value(where, k, lane, code)
        return found if dtype == "float32" else b.let(tirx.Cast(dtype, found))


def _sparse_linear(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    x, _, mask = node.parents[:3]
    dtype, k = compute_dtype(node.dtype), fixed(x.shape[-1])
    scales, zeros = node.operands[4:6]
    left, packed = pull.leaves[x], _Packed(b, pull, node, scales, zeros, k)
    depth, width, m, panel = i64(k), i64(node.outputs), product(node.shape[:-1]), i64(packed.panel)

    def strip(outer: list[Expr]) -> None:
        row, p = outer
        sums = [b.scratch(packed.panel, dtype) for _ in range(2 if node.gated else 1)]
        for half, total in enumerate(sums):
            where = [p, i64(half)] if node.gated else [p]
            position = b.scratch(1, "int64")
            b.store(position, ZERO, packed.starts[where])
            with b.loop(panel) as lane:
                b.store(total, lane, literal(0, dtype))
            with b.loop(packed.words) as word:
                first = packed.bits(where, word)
                with b.loop(2 * packed.panel) as bit:
                    with b.when(tirx.NE(bit_of(b, packed.mask, first, bit), 0)):
                        if node.pair == 2:
                            lane, within = tirx.floordiv(bit, i64(2)), tirx.floormod(bit, i64(2))
                        else:
                            lane, within = tirx.floormod(bit, panel), tirx.floordiv(bit, panel)
                        lane, column = b.let(lane, "lane"), b.let(word * i64(2) + within, "k")
                        at = b.let(position[ZERO], "at")
                        with b.when(tirx.all(packed.there(at), column < depth)):
                            w = packed.value(where, at, lane, column, dtype)
                            a = load(b, left, row * depth + column)
                            b.store(total, lane, multiply_add(a, w, total[lane], dtype))
                        b.store(position, ZERO, at + i64(1))
        with b.loop(tirx.min(panel, width - p * panel)) as lane:
            column = b.let(p * panel + lane, "column")
            values = [b.let(total[lane], "v") for total in sums]
            done = gate_up(b, node, *values) if node.gated else epilogue(b, pull, node, values[0], row, column)
            b.store(target, row * width + column, done)

    b.spread([m, mask.shape[0]], product((m, node.outputs, k)) * 8, strip)


def _semi_structured(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    x, values, places, scales, zeros = node.operands[:5]
    assert x is not None and values is not None and places is not None
    dtype, k = compute_dtype(node.dtype), fixed(x.shape[-1])
    left, stored, where = (pull.leaves[o] for o in (x, values, places))
    scaled = None if scales is None else Scaled(b, pull, node, scales, zeros, k)
    per, kind = fours(x.dtype, node.scheme), schemes.SCHEMES.get(node.scheme)
    m, width = product(node.shape[:-1]), i64(node.outputs)

    def bits(row: Expr, four: Expr) -> Expr:
        """The four bits of a row's four (see `jisu.compiler.ops.semi_structured`)."""
        within, half = tirx.floormod(four, i64(INPUTS // 4)), tirx.floormod(row, i64(ROWS))
        p = tirx.floormod(within, i64(per))
        number = tirx.floordiv(within, i64(4 * per)) * i64(per // 2) + tirx.floordiv(p, i64(2))
        thread = tirx.floormod(half, i64(8)) * 4 + tirx.floormod(number, i64(2)) * 2 + tirx.floormod(p, i64(2))
        place = tirx.floormod(tirx.floordiv(within, i64(per)), i64(4)) + tirx.floordiv(half, i64(8)) * 4
        at = tirx.floordiv(number, i64(2)) * 4 + tirx.floordiv(place, i64(2))
        unit = [tirx.floordiv(row, i64(ROWS)), tirx.floordiv(four, i64(INPUTS // 4)), thread, at]
        held = byte(b, where, b.let(where.offset(unit), "at"))
        return b.let((held >> (tirx.Cast("int32", tirx.floormod(place, i64(2))) * 4)) & 15, "bits")

    def kept(row: Expr, four: Expr, number: int) -> Expr:
        """The first or second number of a four."""
        if scaled is None or kind is None:
            return load(b, stored, row * i64(k // 2) + four * 2 + i64(number))
        word = i64(2 * kind.per_byte)
        code = tirx.floordiv(four, word) * word * 2 + word * i64(number) + tirx.floormod(four, word)
        size = i64(kind.per_byte)
        held = byte(b, stored, row * i64(k // 2 // kind.per_byte) + tirx.floordiv(code, size))
        found = scaled.value([row], four * 4, ZERO, held >> (tirx.Cast("int32", tirx.floormod(code, size)) * 4))
        return found if dtype == "float32" else b.let(tirx.Cast(dtype, found))

    def strip(outer: list[Expr]) -> None:
        row, column = outer
        sums = [b.scratch(1, dtype) for _ in range(2 if node.gated else 1)]
        for half, total in enumerate(sums):
            own = column * i64(len(sums)) + i64(half)
            b.store(total, ZERO, literal(0, dtype))
            with b.loop(k // 4) as four:
                held = bits(own, four)
                for number in (0, 1):
                    at = four * 4 + tirx.Cast("int64", (held >> (2 * number)) & 3)
                    a = load(b, left, row * i64(k) + at)
                    b.store(total, ZERO, multiply_add(a, kept(own, four, number), total[ZERO], dtype))
        values = [b.let(total[ZERO], "v") for total in sums]
        done = gate_up(b, node, *values) if node.gated else epilogue(b, pull, node, values[0], row, column)
        b.store(target, row * width + column, done)

    b.spread([m, node.outputs], product((m, node.outputs, k)) * 4, strip)


def _sparse_take(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    indices, scales, zeros = node.operands[3:]
    assert indices is not None
    packed = _Packed(b, pull, node, scales, zeros, node.width)
    dtype = compute_dtype(node.dtype)
    table = Table(node.rows)
    check(b, pull, indices, table)

    def row(outer: list[Expr]) -> None:
        picked = resolve(b, pull.fresh(), indices, outer, table)
        p, lane = b.let(tirx.floordiv(picked, i64(packed.panel))), b.let(tirx.floormod(picked, i64(packed.panel)))
        own = [b.let(packed.bit(lane, i64(within)), "own") for within in (0, 1)]
        position = b.scratch(1, "int64")
        b.store(position, ZERO, packed.starts[[p]])
        with b.loop(packed.words) as word:
            first = packed.bits([p], word)
            before = [b.scratch(1, "int64") for _ in own]
            for count in before:
                b.store(count, ZERO, position[ZERO])
            with b.loop(packed.panel // 4) as j:
                held = b.let(byte(b, packed.mask, first + j), "held")
                for count, bit in zip(before, own, strict=True):
                    behind = tirx.max(tirx.min(bit - j * i64(8), i64(8)), ZERO)  # bits of this byte before ours
                    earlier = tirx.bitwise_and(held, (tirx.IntImm("int32", 1) << tirx.Cast("int32", behind)) - 1)
                    b.store(count, ZERO, count[ZERO] + tirx.Cast("int64", tirx.popcount(earlier)))
                b.store(position, ZERO, position[ZERO] + tirx.Cast("int64", tirx.popcount(held)))
            for within, (count, bit) in enumerate(zip(before, own, strict=True)):
                k = b.let(word * i64(2) + i64(within), "k")
                with b.when(k < i64(node.width)):
                    at = b.let(count[ZERO], "at")
                    b.store(target, [*outer, k], narrow(b, literal(0, dtype), node.dtype))
                    with b.when(tirx.all(tirx.NE(bit_of(b, packed.mask, first, bit), 0), packed.there(at))):
                        value = packed.value([p], at, lane, k, dtype)
                        b.store(target, [*outer, k], narrow(b, value, node.dtype))

    b.spread(indices.shape, node.tensor.size * 32, row)


BODIES: Mapping[Op, Callable[[Builder, Pull, Node, Flat], None]] = {
    ops.expand: _expand,
    ops.sparse_linear: _sparse_linear,
    ops.sparse_take: _sparse_take,
    ops.semi_structured_linear: _semi_structured,
}
"""Bodies of this module's ops."""
