"""Values rounded to a scheme's grid at each call, and rows as records of codes."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from tvm import tirx

from jisu.compiler import levels, ops, rows, schemes
from jisu.compiler.graph import Node, Op
from jisu.targets.cpu.generic.build import Builder, Expr, Flat, i64, literal
from jisu.targets.cpu.generic.contract import level
from jisu.targets.cpu.generic.element import Pull
from jisu.targets.cpu.generic.reduce import line
from jisu.targets.cpu.generic.scalar import dtype_of, intrinsic, is_nan, maximum, minimum, narrow, round_to, select, u32


def _exponent(value: Expr) -> Expr:
    """The exponent int32 in a float32's bits."""
    return tirx.bitwise_and(tirx.reinterpret("int32", value) >> 23, 255) - 127


def _power(exponent: Expr) -> Expr:
    """2 to an int32 of at least -126, float32."""
    return tirx.reinterpret("float32", (exponent + 127) << 23)


def rounded(b: Builder, kind: schemes.Scheme, value: Expr) -> Expr:
    """The scheme's level nearest to a float32, relative to its middle."""
    low = -kind.middle if kind.uniform else -kind.top
    found = value
    if not kind.uniform:
        step = b.let(_power(tirx.max(_exponent(value), 1 - kind.bias) - kind.mantissa))
        found = b.let(value / step)
    found = intrinsic("rint", found)
    if not kind.uniform:
        found = found * step
    return b.let(minimum(b.let(maximum(b.let(found), literal(low, "float32"))), literal(kind.top, "float32")))


def _fake_quantize(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    x, given = node.operands
    assert x is not None
    kind, k = schemes.scheme(node.scheme), int(x.shape[-1])
    size = node.group or k
    one, top = literal(1, "float32"), literal(kind.top, "float32")

    def positive(scale: Expr) -> Expr:
        return b.let(tirx.Select(tirx.EQ(scale, literal(0, "float32")), one, scale))

    def row(outer: list[Expr]) -> None:
        def value(i: Expr) -> Expr:
            found = pull.fresh().wide(x, [*outer, i])
            return found if dtype_of(found) == "float32" else b.let(tirx.Cast("float32", found))

        def reach(first: Expr, count: int) -> Expr:
            return line(b, i64(count), "max", "float32", lambda i: intrinsic("fabs", value(first + i)), vector=False)

        whole = None if given is None else b.let(pull.leaves[given][i64(0)])
        if kind.scale == "e4m3" and whole is None:
            whole = positive(b.let(reach(i64(0), k) / literal(kind.top * 448, "float32")))
        with b.loop(k // size) as part:
            first = b.let(part * i64(size), "first")
            if kind.scale == "e8m0":
                two = _exponent(reach(first, size)) - int(schemes.exponent(np.float32(kind.top)))
                scale = b.let(_power(tirx.max(tirx.min(two, 127), -126)))
            elif kind.scale == "e4m3":
                code = rounded(b, schemes.scheme("fp8"), b.let(reach(first, size) / top / whole))
                scale = b.let(maximum(code, literal(2.0**-9, "float32")) * whole)
            else:
                scale = whole if whole is not None else positive(b.let(reach(first, size) / top))
            with b.loop(size) as i:
                found = b.let(rounded(b, kind, b.let(value(first + i) / scale)) * scale)
                wide = found if node.dtype != "float64" else tirx.Cast("float64", found)
                b.store(target, [*outer, first + i], narrow(b, wide, node.dtype))

    b.spread(x.shape[:-1], x.tensor.size * 8, row)


def small_float(b: Builder, value: Expr) -> Expr:
    """The code int32 of a float32 that e4m3 holds: sign, exponent and mantissa move down, subnormal numbers are counted."""
    bits = b.let(tirx.reinterpret("int32", value), "bits")
    size = tirx.bitwise_and(bits, 0x7FFFFFFF) >> 20
    least = tirx.Cast("int32", intrinsic("fabs", value) * literal(2.0**9, "float32"))
    code = b.let(tirx.Select(size < (121 << 3), least, size - (120 << 3)), "code")
    return tirx.bitwise_or(code, tirx.Select(bits < 0, tirx.IntImm("int32", 128), tirx.IntImm("int32", 0)))


def _encode_levels(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    x, given = node.operands
    assert x is not None
    kind, k = schemes.scheme(node.scheme), int(x.shape[-1])
    size, top, zero = node.group or k, literal(kind.top, "float32"), tirx.IntImm("int32", 0)
    end = int(node.shape[-1])

    def row(outer: list[Expr]) -> None:
        def value(i: Expr) -> Expr:
            found = pull.fresh().wide(x, [*outer, i])
            return found if dtype_of(found) == "float32" else b.let(tirx.Cast("float32", found))

        def put(at: Expr, bits: Expr) -> None:
            word = b.let(bits, "word")
            for n in range(4):
                byte = tirx.Cast("uint8", tirx.bitwise_and(word >> (8 * n), 255))
                b.store(target, [*outer, at + i64(n)], byte)

        def running(first: Expr, count: Expr) -> Expr:
            reach = line(b, count, "max", "float32", lambda i: intrinsic("fabs", value(first + i)), vector=False)
            found = b.let(reach / top)
            return b.let(tirx.Select(tirx.EQ(found, literal(0, "float32")), literal(1, "float32"), found), "scale")

        with b.loop(end) as i:
            b.store(target, [*outer, i], tirx.IntImm("uint8", 0))
        whole = None
        if not node.own:
            whole = running(i64(0), i64(k)) if given is None else b.let(pull.leaves[given][i64(0)], "scale")
            put(i64(levels.scale_offset(k)), tirx.reinterpret("int32", whole))
        sums = b.scratch(1, "int32")
        with b.loop(-(-k // size)) as part:
            first = b.let(part * i64(size), "first")
            count = tirx.min(i64(size), i64(k) - first)
            scale = running(first, count) if whole is None else whole
            b.store(sums, i64(0), zero)
            with b.loop(count) as i:
                near = rounded(b, kind, b.let(value(first + i) / scale))
                near = b.let(select(is_nan(near), literal(0, "float32"), near))
                level = b.let(tirx.Cast("int32", near) if kind.uniform else small_float(b, near), "level")
                b.store(target, [*outer, first + i], tirx.Cast("uint8", tirx.bitwise_and(level, 255)))
                if kind.uniform:
                    b.store(sums, i64(0), sums[i64(0)] + level)
            if node.own:
                put(i64(levels.scale_offset(k)) + part * i64(4), tirx.reinterpret("int32", scale))
            put(i64(levels.sum_offset(k, node.group, node.own)) + part * i64(4), sums[i64(0)])

    b.spread(x.shape[:-1], x.tensor.size * 8, row)


def _bytes_of(b: Builder, value: Expr) -> tuple[Expr, Expr]:
    """Both bytes of a float32 that bfloat16 holds, the lower first."""
    bits = b.let(tirx.reinterpret("uint32", value) >> u32(16), "bits")
    return tirx.Cast("uint8", bits & u32(255)), tirx.Cast("uint8", bits >> u32(8))


def _encode_rows(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    x, feedback = node.operands
    assert x is not None
    k, bits = int(x.shape[-1]), rows.ROW_BITS[node.scheme]
    kind, size, zero = schemes.scheme(node.scheme), k * bits // 8, literal(0, "float32")
    top = literal(2**bits - 1 if kind.uniform else kind.top, "float32")
    shares = None if feedback is None else pull.leaves[feedback]

    def row(outer: list[Expr]) -> None:
        def value(i: Expr) -> Expr:
            found = pull.fresh().wide(x, [*outer, i])
            return found if dtype_of(found) == "float32" else b.let(tirx.Cast("float32", found))

        def of_row(how: str, each: Callable[[Expr], Expr]) -> Expr:
            return line(b, i64(k), how, "float32", each, vector=False)

        if kind.uniform:
            low, high = of_row("min", value), of_row("max", value)
            offset = round_to(b, low, "bfloat16")
            reach = high - offset
        else:
            offset, reach = zero, of_row("max", lambda i: intrinsic("fabs", value(i)))
        scale = round_to(b, b.let(reach / top), "bfloat16")
        step = b.let(tirx.Select(tirx.EQ(scale, zero), literal(1, "float32"), scale), "step")
        steps, wanted, codes = b.scratch(k, "float32"), b.scratch(k, "float32"), b.scratch(k, "uint8")
        with b.loop(k) as i:
            b.store(steps, i, (value(i) - offset) / step)
            b.store(wanted, i, steps[i])
        with b.loop(k) as j:
            if kind.uniform:
                nearest = b.let(minimum(b.let(maximum(b.let(intrinsic("rint", wanted[j])), zero)), top), "level")
            else:
                nearest = rounded(b, kind, wanted[j])
            sound = b.let(select(is_nan(nearest), zero, nearest))
            b.store(codes, j, tirx.Cast("uint8", tirx.Cast("int32", sound) if kind.uniform else small_float(b, sound)))
            if shares is not None:
                error = b.let(nearest - steps[j], "error")
                share = b.let(shares.offset([outer[-1], j, i64(0)]), "share")
                with b.loop(i64(k - 1) - j) as n:
                    i = b.let(j + i64(1) + n)
                    b.store(wanted, i, wanted[i] - shares[share + i] * error)
        with b.loop(size) as i:
            packed = codes[i] if bits == 8 else codes[i] | codes[i + i64(size)] << tirx.IntImm("uint8", 4)
            b.store(target, [*outer, i], packed)
        for n, byte in enumerate((*_bytes_of(b, scale), *_bytes_of(b, offset))):
            b.store(target, [*outer, i64(size + n)], byte)

    b.spread(x.shape[:-1], x.tensor.size * (16 if feedback is None else 16 + k // 2), row)


def record(b: Builder, flat: Flat, position: Expr, scheme: str, k: int) -> Callable[[Expr], Expr]:
    """The row of k numbers whose record starts at a position, as a float32 function of the element."""
    bits = rows.ROW_BITS[scheme]
    size = k * bits // 8
    base = b.let(position, "base")

    def stored(n: int) -> Expr:
        low, high = (tirx.Cast("uint32", flat[base + i64(size + n + m)]) for m in (0, 1))
        return b.let(tirx.reinterpret("float32", (low << u32(16)) | (high << u32(24))), "tail")

    scale, offset = stored(0), stored(2)

    def element(i: Expr) -> Expr:
        if bits == 8:
            code = tirx.Cast("int32", flat[base + i])
        else:
            both = b.let(tirx.Cast("int32", flat[base + tirx.floormod(i, i64(size))]), "both")
            code = tirx.Select(i < i64(size), both & 15, both >> 4)
        return b.let(level(b, scheme, b.let(code)) * scale + offset)

    return element


def _decode_rows(b: Builder, pull: Pull, node: Node, target: Flat) -> None:
    (records,) = node.parents
    flat, k = pull.leaves[records], int(node.shape[-1])

    def row(outer: list[Expr]) -> None:
        element = record(b, flat, flat.offset([*outer, i64(0)]), node.scheme, k)
        with b.loop(k) as i:
            found = element(i)
            wide = found if node.dtype != "float64" else tirx.Cast("float64", found)
            b.store(target, [*outer, i], narrow(b, wide, node.dtype))

    b.spread(node.shape[:-1], node.tensor.size * 4, row)


BODIES: Mapping[Op, Callable[[Builder, Pull, Node, Flat], None]] = {
    ops.fake_quantize: _fake_quantize,
    ops.encode_levels: _encode_levels,
    ops.encode_rows: _encode_rows,
    ops.decode_rows: _decode_rows,
}
