"""Elementwise operators."""

from __future__ import annotations

import math
from typing import Any

import torch

from jisu.compiler import ops
from jisu.compiler.graph import Node, Op
from jisu.compiler.types import is_float
from jisu.frontends.aten.table import (
    HALF,
    Call,
    as_bool,
    cast,
    expand,
    filled,
    lowering,
    operand,
    refuse,
    rounded,
    unary,
    wide,
)

aten = torch.ops.aten

for _name, _op in {
    "exp": ops.exp, "exp2": ops.exp2, "expm1": ops.expm1, "log": ops.log, "log2": ops.log2, "log10": ops.log10,
    "log1p": ops.log1p, "sqrt": ops.sqrt, "rsqrt": ops.rsqrt, "reciprocal": ops.reciprocal, "sin": ops.sin,
    "cos": ops.cos, "tan": ops.tan, "asin": ops.asin, "acos": ops.acos, "atan": ops.atan, "sinh": ops.sinh,
    "cosh": ops.cosh, "tanh": ops.tanh, "asinh": ops.asinh, "acosh": ops.acosh, "atanh": ops.atanh, "erf": ops.erf,
    "sigmoid": ops.sigmoid, "silu": ops.silu, "neg": ops.neg, "square": ops.square,
}.items():  # fmt: skip
    lowering(getattr(aten, _name).default)(unary(_op))


@lowering(aten.floor.default, aten.ceil.default, aten.trunc.default, aten.round.default)
def _integral(call: Call, x: Node) -> Node:
    functions = {"floor": ops.floor, "ceil": ops.ceil, "trunc": ops.trunc, "round": ops.round_}
    return functions[call.name](x) if is_float(x.dtype) else x


@lowering(aten.round.decimals)
def _round_decimals(call: Call, x: Node, *, decimals: int) -> Node:
    if not is_float(x.dtype):
        return x
    power = 10.0 ** abs(decimals)

    def scaled(v: Node) -> Node:
        if decimals < 0:
            return ops.mul(ops.round_(ops.div(v, power)), power)
        return ops.div(ops.round_(ops.mul(v, power)), power)

    return wide(scaled, call.dtype, x) if decimals else ops.round_(x)


@lowering(aten.abs.default)
def _abs(call: Call, x: Node) -> Node:
    return x if x.dtype == "bool" else ops.abs_(x)


@lowering(aten.sign.default, aten.sgn.default)
def _sign(call: Call, x: Node) -> Node:
    return x if x.dtype == "bool" else ops.sign(x)


@lowering(aten.relu.default)
def _relu(call: Call, x: Node) -> Node:
    return x if x.dtype == "bool" else ops.relu(x)


@lowering(aten.gelu.default)
def _gelu(call: Call, x: Node, *, approximate: str) -> Node:
    return ops.gelu(x, approximate=approximate)


@lowering(aten.frac.default)
def _frac(call: Call, x: Node) -> Node:
    return ops.sub(x, ops.trunc(x))


@lowering(aten.erfc.default)
def _erfc(call: Call, x: Node) -> Node:
    def tail(v: Node) -> Node:
        # 1 - erf(v) loses all digits for large v: this is the rational approximation of Numerical Recipes (erfcc),
        # with a relative error below 1.2e-7 everywhere.
        t = ops.reciprocal(ops.add(ops.mul(ops.abs_(v), 0.5), 1.0))
        series = _horner(
            t, (-1.26551223, 1.00002368, 0.37409196, 0.09678418, -0.18628806, 0.27886807, -1.13520398, 1.48851587,
                -0.82215223, 0.17087277)
        )  # fmt: skip
        result = ops.mul(t, ops.exp(ops.sub(series, ops.square(v))))
        return ops.where(ops.lt(v, 0.0), ops.sub(operand(2.0, v.dtype), result), result)

    return wide(tail, call.dtype, x)


def _one(v: Node) -> Any:
    return operand(1.0, v.dtype)


def _horner(t: Node, coefficients: tuple[float, ...]) -> Node:
    result = operand(coefficients[-1], t.dtype)
    for c in reversed(coefficients[:-1]):
        result = ops.add(ops.mul(result, t), c)
    return result


@lowering(aten.erfinv.default)
def _erfinv(call: Call, x: Node) -> Node:
    def inverse(v: Node) -> Node:
        # M. Giles, Approximating the erfinv function (2012), refined by one Newton step.
        w = ops.neg(ops.log(ops.mul(ops.sub(_one(v), v), ops.add(v, 1.0))))
        near = _horner(
            ops.sub(w, 2.5),
            (1.50140941, 0.246640727, -0.00417768164, -0.00125372503, 0.000218580870, -4.39150654e-06,
             -3.5233877e-06, 3.43273939e-07, 2.81022636e-08),
        )  # fmt: skip
        far = _horner(
            ops.sub(ops.sqrt(w), 3.0),
            (2.83297682, 1.00167406, 0.00943887047, -0.0076224613, 0.00573950773, -0.00367342844, 0.00134934322,
             0.000100950558, -0.000200214257),
        )  # fmt: skip
        y = ops.mul(ops.where(ops.lt(w, 5.0), near, far), v)
        slope = ops.mul(ops.exp(ops.neg(ops.square(y))), 2.0 / math.sqrt(math.pi))
        refined = ops.sub(y, ops.div(ops.sub(ops.erf(y), v), slope))
        edge = ops.eq(ops.abs_(v), 1.0)
        return ops.where(edge, ops.mul(v, float("inf")), refined)

    return wide(inverse, call.dtype, x)


@lowering(aten.isnan.default)
def _isnan(call: Call, x: Node) -> Node:
    return ops.isnan(x) if is_float(x.dtype) else filled(False, call.type)


@lowering(aten.isinf.default)
def _isinf(call: Call, x: Node) -> Node:
    return ops.eq(ops.abs_(x), float("inf")) if is_float(x.dtype) else filled(False, call.type)


@lowering(aten.isfinite.default)
def _isfinite(call: Call, x: Node) -> Node:
    return ops.lt(ops.abs_(x), float("inf")) if is_float(x.dtype) else filled(True, call.type)


@lowering(aten.signbit.default)
def _signbit(call: Call, x: Node) -> Node:
    if x.dtype == "bool":
        return filled(False, call.type)
    if is_float(x.dtype):
        x = ops.copysign(operand(1.0, x.dtype), x)
    return ops.lt(x, 0)


# ----------------------------------------------------------------------------------------------------- arithmetic


def _scaled(dtype: str, y: Any, alpha: Any) -> Any:
    return ops.mul(operand(y, dtype), operand(alpha, dtype))


def _sum(call: Call, a: Any, b: Any, alpha: Any, op: Op) -> Node:
    dtype = call.dtype
    if dtype == "bool":  # True + True is True
        return ops.logical_or(as_bool(a), ops.logical_and(as_bool(b), as_bool(alpha)))
    if isinstance(alpha, (int, float)) and alpha == 1:
        return expand(rounded(op, dtype, a, b), call.shape)
    return wide(lambda x, y: op(x, _scaled(x.dtype, y, alpha)), dtype, a, b)


@lowering(aten.add.Tensor, aten.add.Scalar)
def _add(call: Call, a: Any, b: Any, *rest: Any, alpha: Any = 1) -> Node:
    return _sum(call, a, b, rest[0] if rest else alpha, ops.add)


@lowering(aten.sub.Tensor, aten.sub.Scalar)
def _sub(call: Call, a: Any, b: Any, *rest: Any, alpha: Any = 1) -> Node:
    return _sum(call, a, b, rest[0] if rest else alpha, ops.sub)


@lowering(aten.rsub.Tensor, aten.rsub.Scalar)
def _rsub(call: Call, a: Any, b: Any, *rest: Any, alpha: Any = 1) -> Node:
    return _sum(call, b, a, rest[0] if rest else alpha, ops.sub)


@lowering(aten.mul.Tensor, aten.mul.Scalar)
def _mul(call: Call, a: Any, b: Any) -> Node:
    if call.dtype == "bool":
        return ops.logical_and(as_bool(a), as_bool(b))
    return rounded(ops.mul, call.dtype, a, b)


@lowering(aten.div.Tensor, aten.div.Scalar)
def _div(call: Call, a: Any, b: Any) -> Node:
    return rounded(ops.div, call.dtype, a, b)


@lowering(aten.div.Tensor_mode, aten.div.Scalar_mode)
def _div_mode(call: Call, a: Any, b: Any, *, rounding_mode: str | None) -> Node:
    op = {None: ops.div, "floor": ops.floor_div, "trunc": ops.trunc_div}[rounding_mode]
    return rounded(op, call.dtype, a, b)


@lowering(aten.floor_divide.default, aten.floor_divide.Scalar)
def _floor_divide(call: Call, a: Any, b: Any) -> Node:
    return rounded(ops.floor_div, call.dtype, a, b)


@lowering(aten.remainder.Tensor, aten.remainder.Scalar, aten.remainder.Scalar_Tensor)
def _remainder(call: Call, a: Any, b: Any) -> Node:
    return _plain_binary(ops.remainder, call.dtype, a, b)


@lowering(aten.fmod.Tensor, aten.fmod.Scalar)
def _fmod(call: Call, a: Any, b: Any) -> Node:
    return _plain_binary(ops.fmod, call.dtype, a, b)


def _plain_binary(op: Op, dtype: str, a: Any, b: Any) -> Node:
    return op(operand(a, dtype), operand(b, dtype))


@lowering(aten.pow.Tensor_Tensor, aten.pow.Tensor_Scalar, aten.pow.Scalar)
def _pow(call: Call, a: Any, b: Any) -> Node:
    dtype = call.dtype
    if dtype == "bool":  # False only for False ** True
        return ops.logical_or(as_bool(a), ops.logical_not(as_bool(b)))
    if isinstance(b, (int, float)) and isinstance(a, Node):
        x = cast(a, dtype)
        if b == 2:
            return ops.square(x)
        if b == 1:
            return x
        if is_float(dtype) and b in (0.5, -0.5, -1):
            return {0.5: ops.sqrt, -0.5: ops.rsqrt, -1: ops.reciprocal}[b](x)
        if b == 3:
            return wide(lambda v: ops.mul(ops.square(v), v), dtype, a)
    return wide(ops.pow_, dtype, a, b)


@lowering(aten.maximum.default, aten.max.other)
def _maximum(call: Call, a: Node, b: Node) -> Node:
    if call.dtype == "bool":
        return ops.logical_or(a, b)
    return _plain_binary(ops.maximum, call.dtype, a, b)


@lowering(aten.minimum.default, aten.min.other)
def _minimum(call: Call, a: Node, b: Node) -> Node:
    if call.dtype == "bool":
        return ops.logical_and(a, b)
    return _plain_binary(ops.minimum, call.dtype, a, b)


@lowering(aten.fmax.default)
def _fmax(call: Call, a: Node, b: Node) -> Node:
    return _ignoring_nan(ops.maximum, call, a, b)


@lowering(aten.fmin.default)
def _fmin(call: Call, a: Node, b: Node) -> Node:
    return _ignoring_nan(ops.minimum, call, a, b)


def _ignoring_nan(op: Op, call: Call, a: Node, b: Node) -> Node:
    if not is_float(call.dtype):
        return cast(_plain_binary(op, "uint8" if call.dtype == "bool" else call.dtype, a, b), call.dtype)
    a, b = cast(a, call.dtype), cast(b, call.dtype)
    return ops.where(ops.isnan(a), b, ops.where(ops.isnan(b), a, op(a, b)))


@lowering(aten.atan2.default)
def _atan2(call: Call, a: Node, b: Node) -> Node:
    return _plain_binary(ops.atan2, call.dtype, a, b)


@lowering(aten.copysign.Tensor, aten.copysign.Scalar)
def _copysign(call: Call, a: Node, b: Any) -> Node:
    return _plain_binary(ops.copysign, call.dtype, a, b)


@lowering(aten.hypot.default)
def _hypot(call: Call, a: Node, b: Node) -> Node:
    def length(x: Node, y: Node) -> Node:
        x, y = ops.abs_(x), ops.abs_(y)
        large, small = ops.maximum(x, y), ops.minimum(x, y)
        plain = ops.logical_or(ops.eq(large, 0.0), ops.eq(large, float("inf")))
        ratio = ops.where(plain, operand(0.0, x.dtype), ops.div(small, large))
        return ops.mul(large, ops.sqrt(ops.add(ops.square(ratio), 1.0)))

    return wide(length, call.dtype, a, b)


@lowering(aten.heaviside.default)
def _heaviside(call: Call, x: Node, at_zero: Node) -> Node:
    inner = "uint8" if call.dtype == "bool" else call.dtype
    x, at_zero = cast(x, inner), cast(at_zero, inner)
    step = cast(ops.gt(x, 0), inner)
    return cast(ops.where(ops.eq(x, 0), at_zero, step), call.dtype)


@lowering(aten.gcd.default, aten.lcm.default)
def _gcd(call: Call, a: Node, b: Node) -> Node:
    refuse("has no counterpart with a bounded number of steps")


# ------------------------------------------------------------------------------------------------- bits and truth


def _bits(integer: Op, boolean: Op) -> Any:
    def lower(call: Call, a: Any, b: Any) -> Node:
        return _plain_binary(boolean if call.dtype == "bool" else integer, call.dtype, a, b)

    return lower


for _name, _integer, _boolean in (
    ("and", ops.bit_and, ops.logical_and),
    ("or", ops.bit_or, ops.logical_or),
    ("xor", ops.bit_xor, ops.logical_xor),
):
    _packet = getattr(aten, f"bitwise_{_name}")
    lowering(_packet.Tensor, _packet.Scalar, _packet.Scalar_Tensor)(_bits(_integer, _boolean))
    _packet = getattr(aten, f"__{_name}__")
    lowering(_packet.Tensor, _packet.Scalar)(_bits(_integer, _boolean))


@lowering(aten.bitwise_not.default)
def _bitwise_not(call: Call, x: Node) -> Node:
    return ops.logical_not(x) if x.dtype == "bool" else ops.bit_not(x)


@lowering(
    aten.bitwise_left_shift.Tensor,
    aten.bitwise_left_shift.Tensor_Scalar,
    aten.bitwise_left_shift.Scalar_Tensor,
    aten.__lshift__.Tensor,
    aten.__lshift__.Scalar,
)
def _shift_left(call: Call, a: Any, b: Any) -> Node:
    return _plain_binary(ops.shift_left, call.dtype, a, b)


@lowering(
    aten.bitwise_right_shift.Tensor,
    aten.bitwise_right_shift.Tensor_Scalar,
    aten.bitwise_right_shift.Scalar_Tensor,
    aten.__rshift__.Tensor,
    aten.__rshift__.Scalar,
)
def _shift_right(call: Call, a: Any, b: Any) -> Node:
    return _plain_binary(ops.shift_right, call.dtype, a, b)


@lowering(aten.logical_and.default)
def _logical_and(call: Call, a: Node, b: Node) -> Node:
    return ops.logical_and(as_bool(a), as_bool(b))


@lowering(aten.logical_or.default)
def _logical_or(call: Call, a: Node, b: Node) -> Node:
    return ops.logical_or(as_bool(a), as_bool(b))


@lowering(aten.logical_xor.default)
def _logical_xor(call: Call, a: Node, b: Node) -> Node:
    return ops.logical_xor(as_bool(a), as_bool(b))


@lowering(aten.logical_not.default)
def _logical_not(call: Call, x: Node) -> Node:
    return ops.logical_not(as_bool(x))


def _comparison(op: Op) -> Any:
    def lower(call: Call, a: Any, b: Any) -> Node:
        return _plain_binary(op, call.promoted(), a, b)

    return lower


for _op in (ops.eq, ops.ne, ops.lt, ops.le, ops.gt, ops.ge):
    _packet = getattr(aten, _op.name)
    lowering(_packet.Tensor, _packet.Scalar)(_comparison(_op))


@lowering(aten.where.self)
def _where(call: Call, condition: Node, a: Node, b: Node) -> Node:
    return ops.where(as_bool(condition), cast(a, call.dtype), cast(b, call.dtype))


@lowering(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(call: Call, x: Node, mask: Node, value: Any) -> Node:
    return ops.where(as_bool(mask), operand(value, call.dtype), x)


# --------------------------------------------------------------------------------------------------- activations


@lowering(aten.clamp.default, aten.clamp.Tensor)
def _clamp(call: Call, x: Node, low: Any = None, high: Any = None) -> Node:
    dtype = call.dtype
    result = cast(x, dtype)
    if low is not None:
        result = ops.maximum(result, operand(low, dtype))
    return result if high is None else ops.minimum(result, operand(high, dtype))


@lowering(aten.clamp_min.default, aten.clamp_min.Tensor)
def _clamp_min(call: Call, x: Node, low: Any) -> Node:
    return _clamp(call, x, low)


@lowering(aten.clamp_max.default, aten.clamp_max.Tensor)
def _clamp_max(call: Call, x: Node, high: Any) -> Node:
    return _clamp(call, x, None, high)


@lowering(aten.hardtanh.default)
def _hardtanh(call: Call, x: Node, low: Any, high: Any) -> Node:
    return _clamp(call, x, low, high)


@lowering(aten.relu6.default)
def _relu6(call: Call, x: Node) -> Node:
    return _clamp(call, x, 0, 6)


def _sixth(v: Node) -> Node:
    return ops.mul(ops.minimum(ops.maximum(ops.add(v, 3.0), 0.0), 6.0), 1 / 6)


@lowering(aten.hardsigmoid.default)
def _hardsigmoid(call: Call, x: Node) -> Node:
    return wide(_sixth, call.dtype, x)


@lowering(aten.hardswish.default)
def _hardswish(call: Call, x: Node) -> Node:
    return wide(lambda v: ops.mul(v, _sixth(v)), call.dtype, x)


@lowering(aten.leaky_relu.default)
def _leaky_relu(call: Call, x: Node, slope: Any) -> Node:
    return wide(lambda v: ops.where(ops.gt(v, 0.0), v, ops.mul(v, operand(slope, v.dtype))), call.dtype, x)


@lowering(aten.elu.default)
def _elu(call: Call, x: Node, alpha: float, scale: float, input_scale: float) -> Node:
    def branches(v: Node) -> Node:
        below = ops.mul(ops.expm1(ops.mul(v, float(input_scale))), float(alpha) * float(scale))
        return ops.where(ops.gt(v, 0.0), ops.mul(v, float(scale)), below)

    return wide(branches, call.dtype, x)


@lowering(aten.softplus.default)
def _softplus(call: Call, x: Node, beta: float, threshold: float) -> Node:
    def smooth(v: Node) -> Node:
        scaled = ops.mul(v, float(beta))
        return ops.where(ops.gt(scaled, float(threshold)), v, ops.div(ops.log1p(ops.exp(scaled)), float(beta)))

    return wide(smooth, call.dtype, x)


@lowering(aten.mish.default)
def _mish(call: Call, x: Node) -> Node:
    return wide(lambda v: ops.mul(v, ops.tanh(_log1pexp(v))), call.dtype, x)


def _log1pexp(v: Node) -> Node:
    """log(1 + exp(v)) without overflow."""
    return ops.add(ops.maximum(v, 0.0), ops.log1p(ops.exp(ops.neg(ops.abs_(v)))))


@lowering(aten.log_sigmoid_forward.default)
def _log_sigmoid(call: Call, x: Node) -> tuple[Node, None]:
    def smooth(v: Node) -> Node:
        return ops.sub(ops.minimum(v, 0.0), ops.log1p(ops.exp(ops.neg(ops.abs_(v)))))

    return wide(smooth, call.dtype, x), None


@lowering(aten.logaddexp.default, aten.logaddexp2.default)
def _logaddexp(call: Call, a: Node, b: Node) -> Node:
    base2 = call.node.target is aten.logaddexp2.default

    def smooth(x: Node, y: Node) -> Node:
        gap = ops.neg(ops.abs_(ops.sub(x, y)))
        tail = ops.mul(ops.log1p(ops.exp2(gap)), 1 / math.log(2)) if base2 else ops.log1p(ops.exp(gap))
        peak = ops.maximum(x, y)
        infinite = ops.logical_and(ops.eq(ops.abs_(x), float("inf")), ops.eq(x, y))
        return ops.where(infinite, peak, ops.add(peak, tail))

    return wide(smooth, call.dtype, a, b)


@lowering(aten.xlogy.Tensor, aten.xlogy.Scalar_Self, aten.xlogy.Scalar_Other)
def _xlogy(call: Call, a: Any, b: Any) -> Node:
    def product(x: Node, y: Node) -> Node:
        result = ops.where(ops.eq(x, 0.0), operand(0.0, x.dtype), ops.mul(x, ops.log(y)))
        return ops.where(ops.isnan(y), operand(float("nan"), x.dtype), result)

    return wide(product, call.dtype, a, b)


@lowering(aten.threshold.default)
def _threshold(call: Call, x: Node, threshold: Any, value: Any) -> Node:
    return ops.where(ops.le(x, operand(threshold, x.dtype)), operand(value, x.dtype), x)


@lowering(aten.hardshrink.default)
def _hardshrink(call: Call, x: Node, lambd: float) -> Node:
    inside = ops.le(ops.abs_(cast(x, "float32") if x.dtype in HALF else x), float(lambd))
    return ops.where(inside, operand(0.0, x.dtype), x)


@lowering(aten.softshrink.default)
def _softshrink(call: Call, x: Node, lambd: float) -> Node:
    def shrink(v: Node) -> Node:
        above, below = ops.sub(v, float(lambd)), ops.add(v, float(lambd))
        middle = ops.mul(v, 0.0)  # keeps NaN
        return ops.where(ops.gt(v, float(lambd)), above, ops.where(ops.lt(v, -float(lambd)), below, middle))

    return wide(shrink, call.dtype, x)


@lowering(aten._prelu_kernel.default)
def _prelu(call: Call, x: Node, slope: Node) -> Node:
    return wide(lambda v, s: ops.where(ops.gt(v, 0.0), v, ops.mul(v, s)), call.dtype, x, slope)


@lowering(aten.addcmul.default)
def _addcmul(call: Call, x: Node, a: Node, b: Node, *, value: Any) -> Node:
    def fused(v: Node, p: Node, q: Node) -> Node:
        return ops.add(v, _times(ops.mul(p, q), value))

    return wide(fused, call.dtype, x, a, b)


@lowering(aten.addcdiv.default)
def _addcdiv(call: Call, x: Node, a: Node, b: Node, *, value: Any) -> Node:
    def fused(v: Node, p: Node, q: Node) -> Node:
        return ops.add(v, ops.div(_times(p, value), q))

    return wide(fused, call.dtype, x, a, b)


def _times(x: Node, factor: Any) -> Node:
    return x if isinstance(factor, (int, float)) and factor == 1 else ops.mul(x, operand(factor, x.dtype))


@lowering(aten.lerp.Scalar, aten.lerp.Tensor)
def _lerp(call: Call, a: Node, b: Node, weight: Any) -> Node:
    def mix(x: Node, y: Node, w: Node) -> Node:
        gap = ops.sub(y, x)
        near = ops.add(x, ops.mul(w, gap))
        far = ops.sub(y, ops.mul(gap, ops.sub(_one(w), w)))
        return ops.where(ops.lt(ops.abs_(w), 0.5), near, far)

    return wide(mix, call.dtype, a, b, weight)


@lowering(aten.nan_to_num.default)
def _nan_to_num(call: Call, x: Node, nan: float | None, posinf: float | None, neginf: float | None) -> Node:
    if not is_float(x.dtype):
        return x
    largest = torch.finfo(getattr(torch, x.dtype)).max
    x = ops.where(ops.isnan(x), operand(nan or 0.0, x.dtype), x)
    x = ops.where(ops.eq(x, float("inf")), operand(largest if posinf is None else posinf, x.dtype), x)
    return ops.where(ops.eq(x, -float("inf")), operand(-largest if neginf is None else neginf, x.dtype), x)
