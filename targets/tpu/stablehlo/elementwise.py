"""Emitters of elementwise ops. Half precision is computed in float32 and rounded once, as the ops' meaning does."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from jisu.compiler import ops
from jisu.compiler.graph import Op
from jisu.compiler.types import is_float
from jisu.targets.tpu.stablehlo.build import HALF, Value
from jisu.targets.tpu.stablehlo.functions import FUNCTIONS, erf

Unary = Callable[[Value], Value]
Binary = Callable[[Value, Value], Value]


def widened(function: Callable[..., Value]) -> Callable[..., Value]:
    """`function` in float32 where operands are half precision."""

    def emitter(body: Any, *values: Value, **attributes: Any) -> Value:
        dtype = values[0].dtype
        if dtype not in HALF:
            return function(*values, **attributes)
        found = function(*(v.astype("float32") if v.dtype == dtype else v for v in values), **attributes)
        return found.astype(dtype) if found.dtype == "float32" else found

    return emitter


def plain(function: Callable[..., Value]) -> Callable[..., Value]:
    """`function` in the operands' own dtype, for what rounds nothing."""
    return lambda body, *values, **attributes: function(*values, **attributes)


def op(name: str) -> Callable[..., Value]:
    """A StableHLO op of one or two operands."""
    return lambda a, b=None: a.unary(name) if b is None else a.binary(name, b)


def sigmoid(x: Value) -> Value:
    """1 / (1 + exp(-x))."""
    return x.unary("logistic")


def gelu(x: Value, *, approximate: str) -> Value:
    """x times the normal distribution function of x."""
    if approximate == "tanh":
        inside = (x + x * x * x * 0.044715) * math.sqrt(2 / math.pi)
        return x * 0.5 * (inside.unary("tanh") + 1)
    return x * 0.5 * (erf(x * (1 / math.sqrt(2))) + 1)


def relu(x: Value) -> Value:
    """max(x, 0); NaN stays."""
    return x.maximum(0)


ACTIVATIONS: Mapping[str, Unary] = {
    "none": lambda x: x,
    "relu": relu,
    "relu2": lambda x: relu(x) * relu(x),
    "gelu": lambda x: gelu(x, approximate="none"),
    "gelu_tanh": lambda x: gelu(x, approximate="tanh"),
    "silu": lambda x: x * sigmoid(x),
    "sigmoid": sigmoid,
}
"""As `jisu.compiler.ops.ACTIVATIONS`, of values in float32 or float64."""


def _sign(x: Value) -> Value:
    return (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype)


def _trunc(x: Value) -> Value:
    return (x < 0).select(x.unary("ceil"), x.unary("floor"))


def _copysign(a: Value, b: Value) -> Value:
    word = {"float16": "int16", "bfloat16": "int16", "float32": "int32", "float64": "int64"}[b.dtype]
    size = a.unary("abs")
    return (b.bits(word) < 0).select(-size, size)


def _whole(function: Binary) -> Binary:
    """A division; of integers by zero 0, as in NumPy (the specification leaves it open)."""

    def emitter(a: Value, b: Value) -> Value:
        return function(a, b) if is_float(a.dtype) else b.equals(0).select(0, function(a, b.equals(0).select(1, b)))

    return emitter


def _trunc_div(a: Value, b: Value) -> Value:
    return _trunc(a / b) if is_float(a.dtype) else a / b


def _other_signs(r: Value, b: Value) -> Value:
    """Where a remainder is there and has not the divisor's sign."""
    return r.differs(0) & ((r < 0) ^ (b < 0))


def _floor_div(a: Value, b: Value) -> Value:
    r = a % b
    if not is_float(a.dtype):
        q = a / b
        return _other_signs(r, b).select(q - 1, q) if a.dtype != "uint8" else q
    q = (a - r) / b
    q = _other_signs(r, b).select(q - 1, q)
    low = q.unary("floor")
    low = (q - low > 0.5).select(low + 1, low)
    quotient = a / b
    return b.equals(0).select(quotient, q.differs(0).select(low, _copysign(a.body.full(0, (), a.dtype), quotient)))


def _remainder(a: Value, b: Value) -> Value:
    r = a % b
    return r if a.dtype == "uint8" else _other_signs(r, b).select(r + b, r)


def _pow(a: Value, b: Value) -> Value:
    if is_float(a.dtype) or a.dtype == "uint8":
        return a.binary("power", b)
    ones = (b & 1).equals(0).select(a.body.full(1, b.shape, a.dtype), -1)
    negative = a.equals(1).select(a.body.full(1, (), a.dtype), a.equals(-1).select(ones, 0))
    return (b >= 0).select(a.binary("power", b.maximum(0)), negative)


def _shift(name: str, fills: bool) -> Binary:
    def emitter(a: Value, b: Value) -> Value:
        bits = {"uint8": 8, "int8": 8, "int16": 16, "int32": 32, "int64": 64}[a.dtype]
        inside = (b >= 0) & (b < bits)
        found = a.binary(name if a.dtype != "uint8" or not fills else "shift_right_logical", inside.select(b, 0))
        signs = (a < 0).select(a.body.full(-1 if a.dtype != "uint8" else 0, a.shape, a.dtype), 0) if fills else 0
        return inside.select(found, signs)

    return emitter


def _cast(x: Value, *, dtype: str) -> Value:
    if is_float(x.dtype) and dtype in ("uint8", "int8", "int16"):
        return x.astype("int32").astype(dtype)  # numbers outside wrap, as in NumPy on most machines
    return x.astype(dtype)


def _power_of_two(x: Value) -> Value:
    return x.body.full(2, x.shape, x.dtype).binary("power", x)


_PLAIN: Mapping[Op, Callable[..., Value]] = {
    ops.neg: op("negate"), ops.abs_: lambda x: x if x.dtype == "uint8" else x.unary("abs"), ops.sign: _sign, ops.relu: relu,
    ops.maximum: op("maximum"), ops.minimum: op("minimum"), ops.copysign: _copysign,
    ops.eq: Value.equals, ops.ne: Value.differs, ops.lt: Value.__lt__, ops.le: Value.__le__, ops.gt: Value.__gt__, ops.ge: Value.__ge__,
    ops.logical_and: Value.__and__, ops.logical_or: Value.__or__, ops.logical_xor: Value.__xor__, ops.logical_not: Value.__invert__,
    ops.bit_and: Value.__and__, ops.bit_or: Value.__or__, ops.bit_xor: Value.__xor__, ops.bit_not: Value.__invert__,
    ops.shift_left: _shift("shift_left", False), ops.shift_right: _shift("shift_right_arithmetic", True),
    ops.isnan: Value.isnan, ops.cast: _cast, ops.where: Value.select,
}  # fmt: skip

_WIDENED: Mapping[Op, Callable[..., Value]] = {
    ops.square: lambda x: x * x, ops.exp: op("exponential"), ops.exp2: _power_of_two, ops.expm1: op("exponential_minus_one"),
    ops.log: op("log"), ops.log2: lambda x: x.unary("log") * (1 / math.log(2)), ops.log10: lambda x: x.unary("log") * (1 / math.log(10)),
    ops.log1p: op("log_plus_one"), ops.sqrt: op("sqrt"), ops.rsqrt: op("rsqrt"),
    ops.reciprocal: lambda x: x.body.full(1, x.shape, x.dtype) / x, ops.sin: op("sine"), ops.cos: op("cosine"), ops.tan: op("tan"),
    ops.tanh: op("tanh"), ops.sigmoid: sigmoid, ops.silu: ACTIVATIONS["silu"], ops.gelu: gelu,
    ops.floor: op("floor"), ops.ceil: op("ceil"), ops.round_: op("round_nearest_even"), ops.trunc: _trunc,
    ops.add: Value.__add__, ops.sub: Value.__sub__, ops.mul: Value.__mul__, ops.div: Value.__truediv__, ops.trunc_div: _whole(_trunc_div),
    ops.floor_div: _whole(_floor_div), ops.remainder: _whole(_remainder), ops.fmod: _whole(Value.__mod__), ops.pow_: _pow, ops.atan2: op("atan2"),
    **FUNCTIONS,
}  # fmt: skip

EMITTERS: Mapping[Op, Callable[..., Any]] = {
    **{key: plain(function) for key, function in _PLAIN.items()},
    **{key: widened(function) for key, function in _WIDENED.items()},
}
"""Every elementwise op."""
