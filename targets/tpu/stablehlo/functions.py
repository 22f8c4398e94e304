"""Functions that StableHLO lacks, from those that it has, for float32 and float64."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from jisu.compiler import ops
from jisu.compiler.graph import Op
from jisu.targets.tpu.stablehlo.build import Value

# Rational approximations of the error function, the highest power first. In float64: for |x| <= 1, x T(x²) / U(x²); beyond,
# 1 - exp(-x²) P(|x|) / Q(|x|) (the Cephes library, Moshier). In float32: x A(x²) / B(x²) up to where the result is 1 (Eigen, XLA).
_T = (9.60497373987051638749e0, 9.00260197203842689217e1, 2.23200534594684319226e3, 7.00332514112805075473e3, 5.55923013010394962768e4)  # fmt: skip
_U = (1.0, 3.35617141647503099647e1, 5.21357949780152679795e2, 4.59432382970980127987e3, 2.26290000613890934246e4, 4.92673942608635921086e4)  # fmt: skip
_P = (2.46196981473530512524e-10, 5.64189564831068821977e-1, 7.46321056442269912687e0, 4.86371970985681366614e1, 1.96520832956077098242e2,
      5.26445194995477358631e2, 9.34528527171957607540e2, 1.02755188689515710272e3, 5.57535335369399327526e2)  # fmt: skip
_Q = (1.0, 1.32281951154744992508e1, 8.67072140885989742329e1, 3.54937778887819891062e2, 9.75708501743205489753e2,
      1.82390916687909736289e3, 2.24633760818710981792e3, 1.65666309194161350182e3, 5.57535340817727675546e2)  # fmt: skip
_A = (0.00022905065861350646, 0.0034082910107109506, 0.050955695062380861, 0.18520832239976145, 1.128379143519084)
_B = (-1.1791602954361697e-7, 0.000023547966471313185, 0.0010179625278914885, 0.014070470171167667, 0.11098505178285362,
      0.49746925110067538, 1.0)  # fmt: skip
_ONE = 3.7439211627767994  # float32 of the error function is 1 from here on


def polynomial(x: Value, coefficients: Sequence[float]) -> Value:
    """The polynomial with these coefficients, the highest power's first."""
    found = x * coefficients[0] + coefficients[1]
    for c in coefficients[2:]:
        found = found * x + c
    return found


def erf(x: Value) -> Value:
    """The error function."""
    if x.dtype == "float32":
        inside = x.maximum(-_ONE).minimum(_ONE)
        square = inside * inside
        found = inside * polynomial(square, _A) / polynomial(square, _B)
        return (x.unary("abs") >= _ONE).select(x.unary("sign"), found)
    near = x.maximum(-1).minimum(1)
    square = near * near
    inside = near * polynomial(square, _T) / polynomial(square, _U)
    far = x.unary("abs").maximum(1).minimum(8)
    tail = (-(far * far)).unary("exponential") * polynomial(far, _P) / polynomial(far, _Q)
    outside = x.unary("sign") * (tail * -1 + 1)
    return (x.unary("abs") <= 1).select(inside, outside)


def _half_sum(x: Value, sign: int) -> Value:
    """(exp(x) + sign * exp(-x)) / 2, without overflow where the result has none."""
    half = math.log(0.5)
    up, down = (x + half).unary("exponential"), (-x + half).unary("exponential")
    return up + down if sign > 0 else up - down


def _sinh(x: Value) -> Value:
    e = x.unary("exponential_minus_one")
    near = (e + e / (e + 1)) * 0.5
    return (x.unary("abs") < 1).select(near, _half_sum(x, -1))


def _turn(x: Value) -> Value:
    """sqrt(1 - x²), accurate near the ends."""
    return ((x * -1 + 1) * (x + 1)).unary("sqrt")


def _asin(x: Value) -> Value:
    return x.binary("atan2", _turn(x))


def _acos(x: Value) -> Value:
    return _turn(x).binary("atan2", x)


def _large(x: Value) -> float:
    """Beyond this x² overflows, or swallows 1."""
    return 1e9 if x.dtype == "float32" else 1e150


def _asinh(x: Value) -> Value:
    size = x.unary("abs")
    square = size * size
    near = (size + square / ((square + 1).unary("sqrt") + 1)).unary("log_plus_one")
    far = size.unary("log") + math.log(2)
    found = (size > _large(x)).select(far, near)
    return (x < 0).select(-found, found)


def _acosh(x: Value) -> Value:
    rest = x - 1
    near = (rest + (rest * (x + 1)).unary("sqrt")).unary("log_plus_one")
    return (x > _large(x)).select(x.unary("log") + math.log(2), near)


def _atanh(x: Value) -> Value:
    return (x.unary("log_plus_one") - (-x).unary("log_plus_one")) * 0.5


FUNCTIONS: Mapping[Op, Callable[[Value], Value]] = {
    ops.erf: erf,
    ops.asin: _asin,
    ops.acos: _acos,
    ops.atan: lambda x: x.binary("atan2", 1),
    ops.sinh: _sinh,
    ops.cosh: lambda x: _half_sum(x, 1),
    ops.asinh: _asinh,
    ops.acosh: _acosh,
    ops.atanh: _atanh,
}
