"""Elementwise ops: operands broadcast as in NumPy and share one dtype; casts are explicit."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from jisu.compiler.graph import Op, defop
from jisu.compiler.types import TensorType, is_float, is_integer, numpy_dtype, require

UNARY = "*b -> *b"
BINARY = "*b, *b -> *b"


def widened(function: Callable[..., Any]) -> Callable[..., Any]:
    """Compute half-precision operands in float32 and round once, as PyTorch's CPU kernels do."""

    def wrapped(*arrays: Any, **attributes: Any) -> Any:
        dtype = next((a.dtype for a in arrays if a is not None), None)
        if dtype in (np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)):
            wide = [a.astype(np.float32) if a is not None and a.dtype == dtype else a for a in arrays]
            return np.asarray(function(*wide, **attributes)).astype(dtype)
        return np.asarray(function(*arrays, **attributes))

    return wrapped


def _float_unary(name: str, meaning: Callable[..., Any], doc: str, flops: float = 8) -> Op:
    def rule(x: TensorType) -> TensorType:
        require(is_float(x.dtype), f"needs a floating-point operand, got {x}")
        return x

    rule.__doc__ = doc
    return defop(meaning=widened(meaning), axes=UNARY, flops=flops, name=name)(rule)


def _unary(name: str, meaning: Callable[..., Any], doc: str) -> Op:
    def rule(x: TensorType) -> TensorType:
        require(x.dtype != "bool", f"needs a number, got {x}")
        return x

    rule.__doc__ = doc
    return defop(meaning=widened(meaning), axes=UNARY, name=name)(rule)


def _binary(
    name: str,
    meaning: Callable[..., Any],
    doc: str,
    *,
    allow: str = "number",
    commutative: bool = False,
    result: str = "",
) -> Op:
    kinds = {
        "number": (lambda d: d != "bool", "numbers"),
        "float": (is_float, "floating-point operands"),
        "integer": (is_integer, "integers"),
        "bits": (lambda d: not is_float(d), "integers or bools"),
        "bool": (lambda d: d == "bool", "bools"),
        "any": (lambda d: True, "operands"),
    }
    accepts, wanted = kinds[allow]

    def rule(a: TensorType, b: TensorType) -> Any:
        from jisu.compiler.types import broadcast

        require(a.dtype == b.dtype, f"operands' dtypes differ: {a} and {b}")
        require(accepts(a.dtype), f"needs {wanted}, got {a}")
        return TensorType(broadcast(a.shape, b.shape), result or a.dtype)

    rule.__doc__ = doc
    return defop(meaning=meaning if result else widened(meaning), axes=BINARY, commutative=commutative, name=name)(rule)


def _erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[x.dtype])(x) if x.size else x


def _sigmoid(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


def _round(x: np.ndarray) -> np.ndarray:
    return np.round(x)


def _trunc_div(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if np.issubdtype(a.dtype, np.integer):
        quotient = np.floor_divide(a, b)
        return quotient + ((np.remainder(a, b) != 0) & ((a < 0) != (b < 0))).astype(a.dtype)
    return np.trunc(a / b)


def _floor_div(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if np.issubdtype(a.dtype, np.integer):
        return np.floor_divide(a, b)
    # PyTorch's order: the exact remainder decides, so that 1.0 // 0.1 is 9; a zero divisor gives a / b.
    remainder = np.fmod(a, b)
    quotient = (a - remainder) / b
    quotient = np.where((remainder != 0) & ((b < 0) != (remainder < 0)), quotient - 1, quotient)
    rounded = np.floor(quotient)
    rounded = np.where(quotient - rounded > 0.5, rounded + 1, rounded)
    return np.where(b == 0, a / b, np.where(quotient != 0, rounded, np.copysign(np.zeros_like(a), a / b))).astype(
        a.dtype
    )


def _remainder(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if np.issubdtype(a.dtype, np.integer):
        return np.remainder(a, b)
    result = np.fmod(a, b)
    return np.where((result != 0) & ((b < 0) != (result < 0)), result + b, result).astype(a.dtype)


def _pow(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    if np.issubdtype(a.dtype, np.integer):  # a negative power of an integer: 1 and -1 stay, everything else is 0
        positive = np.power(a, np.maximum(b, 0))
        negative = np.where(a == 1, 1, np.where(a == -1, np.where(b % 2 == 0, 1, -1), 0))
        return np.where(b >= 0, positive, negative).astype(a.dtype)
    return np.power(a, b)


def _shift(function: Callable[..., Any], fill: Callable[[np.ndarray], Any]) -> Callable[..., Any]:
    def meaning(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        bits = a.dtype.itemsize * 8
        inside = (b >= 0) & (b < bits)
        return np.where(inside, function(a, np.where(inside, b, 0).astype(a.dtype)), fill(a)).astype(a.dtype)

    return meaning


neg = _unary("neg", np.negative, "The negative.")
abs_ = _unary("abs", np.abs, "The absolute value.")
sign = _unary(
    "sign", lambda x: (x > 0).astype(x.dtype) - (x < 0).astype(x.dtype), "-1, 0 or 1; 0 for NaN, as in PyTorch."
)
relu = _unary("relu", lambda x: np.maximum(x, np.zeros((), x.dtype)), "max(x, 0); NaN stays NaN.")
square = _unary("square", np.square, "x * x.")

exp = _float_unary("exp", np.exp, "e to the x.")
exp2 = _float_unary("exp2", np.exp2, "2 to the x.")
expm1 = _float_unary("expm1", np.expm1, "exp(x) - 1, accurate near 0.")
log = _float_unary("log", np.log, "Natural logarithm.")
log2 = _float_unary("log2", np.log2, "Logarithm to base 2.")
log10 = _float_unary("log10", np.log10, "Logarithm to base 10.")
log1p = _float_unary("log1p", np.log1p, "log(1 + x), accurate near 0.")
sqrt = _float_unary("sqrt", np.sqrt, "Square root.")
rsqrt = _float_unary("rsqrt", lambda x: 1 / np.sqrt(x), "1 / sqrt(x).")
reciprocal = _float_unary("reciprocal", lambda x: 1 / x, "1 / x.")
sin = _float_unary("sin", np.sin, "Sine.")
cos = _float_unary("cos", np.cos, "Cosine.")
tan = _float_unary("tan", np.tan, "Tangent.")
asin = _float_unary("asin", np.arcsin, "Inverse sine.")
acos = _float_unary("acos", np.arccos, "Inverse cosine.")
atan = _float_unary("atan", np.arctan, "Inverse tangent.")
sinh = _float_unary("sinh", np.sinh, "Hyperbolic sine.")
cosh = _float_unary("cosh", np.cosh, "Hyperbolic cosine.")
tanh = _float_unary("tanh", np.tanh, "Hyperbolic tangent.")
asinh = _float_unary("asinh", np.arcsinh, "Inverse hyperbolic sine.")
acosh = _float_unary("acosh", np.arccosh, "Inverse hyperbolic cosine.")
atanh = _float_unary("atanh", np.arctanh, "Inverse hyperbolic tangent.")
erf = _float_unary("erf", _erf, "The error function.")
sigmoid = _float_unary("sigmoid", _sigmoid, "1 / (1 + exp(-x)).")
silu = _float_unary("silu", lambda x: x * _sigmoid(x), "x * sigmoid(x).")
floor = _float_unary("floor", np.floor, "The largest integer not above x.", 1)
ceil = _float_unary("ceil", np.ceil, "The smallest integer not below x.", 1)
round_ = _float_unary("round", _round, "The nearest integer, halves to even.", 1)
trunc = _float_unary("trunc", np.trunc, "x without its fraction.", 1)


def _gelu(x: np.ndarray, *, approximate: str) -> np.ndarray:
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + _erf(x / math.sqrt(2)))


@defop(meaning=widened(_gelu), axes=UNARY, flops=12)
def gelu(x: TensorType, *, approximate: str = "none") -> TensorType:
    """x times the normal distribution function of x; "tanh" is the usual approximation (Hendrycks and Gimpel, 2016)."""
    require(is_float(x.dtype), f"needs a floating-point operand, got {x}")
    require(approximate in ("none", "tanh"), f'approximate is "none" or "tanh", not {approximate!r}')
    return x


add = _binary("add", np.add, "Sum.", commutative=True)
sub = _binary("sub", np.subtract, "Difference.")
mul = _binary("mul", np.multiply, "Product.", commutative=True)
div = _binary("div", np.divide, "True division.", allow="float")
trunc_div = _binary("trunc_div", _trunc_div, "Division rounded towards zero.")
floor_div = _binary("floor_div", _floor_div, "Division rounded down.")
remainder = _binary("remainder", _remainder, "Remainder with the divisor's sign.")
fmod = _binary("fmod", np.fmod, "Remainder with the dividend's sign.")
pow_ = _binary("pow", _pow, "Power.")
maximum = _binary("maximum", np.maximum, "The larger; NaN wins.", commutative=True)
minimum = _binary("minimum", np.minimum, "The smaller; NaN wins.", commutative=True)
atan2 = _binary("atan2", np.arctan2, "The angle of (x, y) = (b, a).", allow="float")
copysign = _binary("copysign", np.copysign, "The first's magnitude with the second's sign.", allow="float")

eq = _binary("eq", np.equal, "a == b.", allow="any", commutative=True, result="bool")
ne = _binary("ne", np.not_equal, "a != b.", allow="any", commutative=True, result="bool")
lt = _binary("lt", np.less, "a < b.", allow="any", result="bool")
le = _binary("le", np.less_equal, "a <= b.", allow="any", result="bool")
gt = _binary("gt", np.greater, "a > b.", allow="any", result="bool")
ge = _binary("ge", np.greater_equal, "a >= b.", allow="any", result="bool")

logical_and = _binary("logical_and", np.logical_and, "Both.", allow="bool", commutative=True)
logical_or = _binary("logical_or", np.logical_or, "Either.", allow="bool", commutative=True)
logical_xor = _binary("logical_xor", np.logical_xor, "Exactly one.", allow="bool", commutative=True)
bit_and = _binary("bit_and", np.bitwise_and, "Bitwise and.", allow="integer", commutative=True)
bit_or = _binary("bit_or", np.bitwise_or, "Bitwise or.", allow="integer", commutative=True)
bit_xor = _binary("bit_xor", np.bitwise_xor, "Bitwise exclusive or.", allow="integer", commutative=True)
shift_left = _binary(
    "shift_left",
    _shift(np.left_shift, lambda a: np.zeros_like(a)),
    "Bits moved up; 0 for a shift outside the width.",
    allow="integer",
)
shift_right = _binary(
    "shift_right",
    _shift(np.right_shift, lambda a: np.where(a < 0, -1, 0)),
    "Bits moved down, keeping the sign; only sign bits for a shift outside the width.",
    allow="integer",
)


@defop(meaning=np.logical_not, axes=UNARY)
def logical_not(x: TensorType) -> TensorType:
    """Not, for bools."""
    require(x.dtype == "bool", f"needs bools, got {x}")
    return x


@defop(meaning=np.invert, axes=UNARY)
def bit_not(x: TensorType) -> TensorType:
    """Bitwise complement of integers."""
    require(is_integer(x.dtype), f"needs integers, got {x}")
    return x


@defop(meaning=lambda x: np.isnan(x), axes=UNARY)
def isnan(x: TensorType) -> TensorType:
    """Whether an element is NaN."""
    require(is_float(x.dtype), f"needs a floating-point operand, got {x}")
    return x.with_dtype("bool")


def _cast(x: np.ndarray, *, dtype: str) -> np.ndarray:
    with np.errstate(invalid="ignore", over="ignore"):
        return x.astype(numpy_dtype(dtype))


@defop(meaning=_cast, axes=UNARY)
def cast(x: TensorType, *, dtype: str) -> TensorType:
    """Another dtype: floats to integers truncate, anything to bool is `!= 0`."""
    return x.with_dtype(dtype)


def _where_samples() -> Any:
    yield ("bool[2, 3]", "float32[2, 3]", "float32[2, 3]"), {}
    yield ("bool[3]", "int64[2, 3]", "int64[2, 1]"), {}


@defop(meaning=np.where, axes="*b, *b, *b -> *b", samples=_where_samples)
def where(condition: TensorType, a: TensorType, b: TensorType) -> TensorType:
    """`a` where `condition` holds, else `b`."""
    from jisu.compiler.types import broadcast

    require(condition.dtype == "bool", f"the condition must be bool, got {condition}")
    require(a.dtype == b.dtype, f"operands' dtypes differ: {a} and {b}")
    return TensorType(broadcast(condition.shape, a.shape, b.shape), a.dtype)
