"""Values rounded to a scheme's grid at each call."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from tvm import tirx

from jisu.compiler import ops, schemes
from jisu.compiler.graph import Node, Op
from jisu.targets.cpu.generic.build import Builder, Expr, Flat, i64, literal
from jisu.targets.cpu.generic.element import Pull
from jisu.targets.cpu.generic.reduce import line
from jisu.targets.cpu.generic.scalar import dtype_of, intrinsic, maximum, minimum, narrow


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


BODIES: Mapping[Op, Callable[[Builder, Pull, Node, Flat], None]] = {ops.fake_quantize: _fake_quantize}
