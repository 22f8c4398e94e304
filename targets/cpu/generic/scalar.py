"""What every elementwise op does to one element, as TIR expressions that mirror the ops' NumPy meaning.

16-bit floats are computed in float32 and rounded once. Integer arithmetic goes through unsigned types, since TVM tells
LLVM that signed overflow never happens. Functions that hot loops use (exp, tanh, erf and what is made of them) are
branch-free polynomials in float32, which LLVM vectorises; the rest calls the C library.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from tvm import tirx

from jisu.compiler import ops
from jisu.compiler.graph import Op
from jisu.compiler.types import is_float, is_integer
from jisu.targets.cpu.generic.build import Builder, Expr, dtype_of, literal

HALF = ("float16", "bfloat16")
_BITS = {"bool": 8, "uint8": 8, "int8": 8, "int16": 16, "int32": 32, "int64": 64, "float16": 16, "bfloat16": 16}
BITS = {**_BITS, "float32": 32, "float64": 64}


def u32(value: int) -> Expr:
    """A uint32 literal."""
    return tirx.IntImm("uint32", value)


def f32(value: float) -> Expr:
    """A float32 literal."""
    return literal(value, "float32")


def compute_dtype(dtype: str) -> str:
    """The dtype that arithmetic on `dtype` is done in."""
    return "float32" if dtype in HALF else dtype


def is_nan(x: Expr) -> Expr:
    """Whether x is NaN, by its bits: TVM folds x == x, and its != is LLVM's ordered comparison."""
    if dtype_of(x) == "float64":
        high = tirx.Cast("uint32", tirx.reinterpret("uint64", x) >> tirx.IntImm("uint64", 32))
        low = tirx.NE(tirx.Cast("uint32", tirx.reinterpret("uint64", x)), u32(0))
        magnitude = high & u32(0x7FFFFFFF)
        return tirx.any(magnitude > u32(0x7FF00000), tirx.all(tirx.EQ(magnitude, u32(0x7FF00000)), low))
    return (tirx.reinterpret("uint32", x) & u32(0x7FFFFFFF)) > u32(0x7F800000)


def unequal(a: Expr, c: Expr) -> Expr:
    """a != c, true for NaN; also of bools, which LLVM can't compare."""
    if dtype_of(a) == "bool":
        return tirx.NE(tirx.Cast("int8", a), tirx.Cast("int8", c))
    if not is_float(dtype_of(a)):
        return tirx.NE(a, c)
    return tirx.any(a < c, c < a, is_nan(a), is_nan(c))


def select(condition: Expr, a: Expr, b: Expr) -> Expr:
    """a where condition holds, else b; both are computed."""
    if dtype_of(a) == "bfloat16":
        return tirx.reinterpret("bfloat16", tirx.Select(condition, *(tirx.reinterpret("uint16", x) for x in (a, b))))
    return tirx.Select(condition, a, b)


def intrinsic(name: str, *args: Expr) -> Expr:
    """An LLVM intrinsic on float32 or float64, such as "floor"."""
    return tirx.call_llvm_pure_intrin(dtype_of(args[0]), f"llvm.{name}", *args)


def fma(a: Expr, c: Expr, d: Expr) -> Expr:
    """a * c + d, in one rounding where the processor has that."""
    return intrinsic("fmuladd", a, c, d)


def libm(name: str, *args: Expr) -> Expr:
    """A function of the C library in the precision of its arguments."""
    dtype = dtype_of(args[0])
    return tirx.call_pure_extern(dtype, name + ("f" if dtype == "float32" else ""), *args)


# --- Conversions ----------------------------------------------------------------------------------------------------


def widen(b: Builder, x: Expr) -> Expr:
    """x in the dtype that arithmetic on it is done in."""
    dtype = dtype_of(x)
    if dtype == "bfloat16":
        return b.let(tirx.reinterpret("float32", tirx.Cast("uint32", tirx.reinterpret("uint16", x)) << u32(16)), "w")
    return b.let(tirx.Cast("float32", x), "w") if dtype == "float16" else x


def narrow(b: Builder, x: Expr, dtype: str) -> Expr:
    """A float32 rounded to the storage dtype (to nearest, ties to even; NaN stays NaN); other dtypes as they are."""
    if dtype == "bfloat16":
        value = b.let(x, "f")
        bits = b.let(tirx.reinterpret("uint32", value), "bits")
        rounded = (bits + u32(0x7FFF) + ((bits >> u32(16)) & u32(1))) >> u32(16)
        quiet = (bits >> u32(16)) | u32(0x40)
        return b.let(tirx.reinterpret("bfloat16", tirx.Cast("uint16", select(is_nan(value), quiet, rounded))), "h")
    return b.let(tirx.Cast("float16", x), "h") if dtype == "float16" else x


def round_to(b: Builder, x: Expr, dtype: str) -> Expr:
    """A computed value rounded to `dtype` and widened again."""
    return widen(b, narrow(b, x, dtype)) if dtype in HALF else x


def _to_odd(b: Builder, x: Expr) -> Expr:
    """float64 to float32, rounding to odd, so that a second rounding to 16 bits rounds the true value."""
    y = b.let(tirx.Cast("float32", x), "y")
    back = b.let(tirx.Cast("float64", y), "back")
    bits = b.let(tirx.reinterpret("uint32", y), "bits")
    inexact = tirx.all(unequal(back, x), tirx.EQ(bits & u32(1), u32(0)), tirx.Not(is_nan(x)))
    larger = intrinsic("fabs", back) > intrinsic("fabs", x)
    return b.let(
        tirx.reinterpret("float32", select(inexact, select(larger, bits - u32(1), bits + u32(1)), bits)), "odd"
    )


def convert(b: Builder, x: Expr, dtype: str) -> Expr:
    """The op `cast`. A float outside the integer's range gives what x86 gives: the least value of int32 or int64."""
    source = dtype_of(x)
    if source == dtype:
        return x
    if dtype == "bool":
        x = widen(b, x)
        return unequal(x, literal(0, dtype_of(x)))
    if source == "float64" and dtype in HALF:
        return narrow(b, _to_odd(b, b.let(x)), dtype)
    if source in ("int64", "int32") and dtype in HALF:
        # Through float64 an int32 is exact; of an int64 NumPy, too, rounds once more to float32 first.
        return narrow(
            b, _to_odd(b, b.let(tirx.Cast("float64", x))) if source == "int32" else tirx.Cast("float32", x), dtype
        )
    x = b.let(widen(b, x))
    if is_float(source) and is_integer(dtype):
        step = "int64" if dtype == "int64" else "int32"
        low, high = -(2.0 ** (BITS[step] - 1)), 2.0 ** (BITS[step] - 1)
        kind = dtype_of(x)
        inside = b.let(tirx.all(x >= literal(low, kind), x < literal(high, kind)), "in")
        whole = tirx.Cast(step, select(inside, x, literal(0, kind)))
        return tirx.Cast(dtype, b.let(select(inside, whole, literal(-(1 << (BITS[step] - 1)), step))))
    if dtype in HALF:
        return narrow(b, tirx.Cast("float32", x), dtype)
    return tirx.Cast(dtype, x)


# --- Float functions ------------------------------------------------------------------------------------------------


def _polynomial(x: Expr, coefficients: list[float]) -> Expr:
    """Horner's scheme, highest power first."""
    total: Expr = f32(coefficients[0])
    for c in coefficients[1:]:
        total = fma(total, x, f32(c))
    return total


def exp(b: Builder, x: Expr) -> Expr:
    """e to the x; in float32 within 1.5 ulp by 2**n * p(r) with |r| <= ln(2) / 2."""
    if dtype_of(x) == "float64":
        return libm("exp", x)
    x = b.let(x, "x")
    held = b.let(select(x > f32(89.0), f32(89.0), select(x < f32(-104.0), f32(-104.0), x)), "held")
    n = b.let(intrinsic("rint", held * f32(math.log2(math.e))), "n")
    r = b.let(fma(n, f32(-0.693359375), held), "r")
    r = b.let(fma(n, f32(2.12194440e-4), r), "r")
    p = b.let(_polynomial(r, [1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 0.5, 1.0, 1.0]), "p")
    whole = b.let(tirx.Cast("int32", select(is_nan(n), f32(0), n)), "k")
    half = b.let(whole >> tirx.IntImm("int32", 1), "k")
    rest = b.let(whole - half, "k")
    scale = [
        tirx.reinterpret("float32", (k + tirx.IntImm("int32", 127)) << tirx.IntImm("int32", 23)) for k in (half, rest)
    ]
    return b.let(p * scale[0] * scale[1], "e")


def sigmoid(b: Builder, x: Expr) -> Expr:
    """1 / (1 + exp(-x))."""
    one = literal(1, dtype_of(x))
    return one / (one + exp(b, -x))


def tanh(b: Builder, x: Expr) -> Expr:
    """The hyperbolic tangent; in float32 a polynomial below 0.625 (Cephes), else 1 - 2 / (exp(2 |x|) + 1)."""
    if dtype_of(x) == "float64":
        return libm("tanh", x)
    x = b.let(x, "x")
    a = b.let(intrinsic("fabs", x), "a")
    z = b.let(x * x, "z")
    coefficients = [-5.70498872745e-3, 2.06390887954e-2, -5.37397155531e-2, 1.33314422036e-1, -3.33332819422e-1]
    small = b.let(fma(_polynomial(z, coefficients) * z, x, x), "small")
    big = b.let(f32(1) - f32(2) / (exp(b, a + a) + f32(1)), "big")
    return b.let(select(a < f32(0.625), small, intrinsic("copysign", big, x)), "tanh")


def erf(b: Builder, x: Expr) -> Expr:
    """The error function; in float32 within 1 ulp (N. Juffa's pair of polynomials)."""
    if dtype_of(x) == "float64":
        return libm("erf", x)
    x = b.let(x, "x")
    a = b.let(intrinsic("fabs", x), "a")
    s = b.let(x * x, "s")
    high = fma(f32(-1.72853470e-5), a, f32(3.83197126e-4))
    low = fma(f32(-3.88396438e-3), a, f32(2.42546219e-2))
    r = b.let(fma(high, s, low), "r")
    for c in (-1.06777877e-1, -6.34846687e-1, -1.28717512e-1):
        r = fma(r, a, f32(c))
    r = b.let(fma(r, a, -a), "r")
    big = b.let(intrinsic("copysign", f32(1) - exp(b, r), x), "big")
    coefficients = [-5.96761703e-4, 4.99119423e-3, -2.67681349e-2, 1.12819925e-1, -3.76125336e-1, 1.28379166e-1]
    small = b.let(fma(_polynomial(s, coefficients), x, x), "small")
    # Far out the polynomial in the exponent overflows to NaN; erf is 1 there.
    return b.let(
        select(a > f32(0.927734375), select(a > f32(4.0), intrinsic("copysign", f32(1), x), big), small), "erf"
    )


def gelu(b: Builder, x: Expr, approximate: str) -> Expr:
    """x times the normal distribution function of x."""
    kind = dtype_of(x)
    c = lambda value: literal(value, kind)  # noqa: E731
    x = b.let(x, "x")
    if approximate == "tanh":
        inner = b.let(c(math.sqrt(2 / math.pi)) * (x + c(0.044715) * (x * x * x)))
        return c(0.5) * x * (c(1) + tanh(b, inner))
    return c(0.5) * x * (c(1) + erf(b, b.let(x / c(math.sqrt(2)))))


ACTIVATE: Mapping[str, Callable[[Builder, Expr], Expr]] = {
    "none": lambda b, x: x,
    "relu": lambda b, x: relu(b, x),
    "relu2": lambda b, x: _squared(b.let(relu(b, x))),
    "gelu": lambda b, x: gelu(b, x, "none"),
    "gelu_tanh": lambda b, x: gelu(b, x, "tanh"),
    "silu": lambda b, x: x * sigmoid(b, x),
    "sigmoid": sigmoid,
    "tanh": tanh,
}
"""The activations of `linear`, on a value in the compute dtype."""


def relu(b: Builder, x: Expr) -> Expr:
    """max(x, 0); NaN stays."""
    zero = literal(0, dtype_of(x))
    return select(x > zero, x, zero) if is_integer(dtype_of(x)) else select(tirx.any(x > zero, is_nan(x)), x, zero)


def maximum(a: Expr, c: Expr) -> Expr:
    """The larger; NaN wins."""
    return select(tirx.any(a > c, is_nan(a)), a, c) if is_float(dtype_of(a)) else select(a > c, a, c)


def minimum(a: Expr, c: Expr) -> Expr:
    """The smaller; NaN wins."""
    return select(tirx.any(a < c, is_nan(a)), a, c) if is_float(dtype_of(a)) else select(a < c, a, c)


def _squared(x: Expr) -> Expr:
    return arithmetic("mul", x, x)


# --- Integers -------------------------------------------------------------------------------------------------------


def arithmetic(kind: str, a: Expr, c: Expr) -> Expr:
    """a + c, a - c or a * c; integers wrap around."""
    dtype = dtype_of(a)
    function = {"add": lambda p, q: p + q, "sub": lambda p, q: p - q, "mul": lambda p, q: p * q}[kind]
    if not is_integer(dtype):
        return function(a, c)
    if kind == "sub" and isinstance(a, tirx.IntImm):  # TVM takes 0 - x of unsigned numbers for 0
        return tirx.Cast(dtype, tirx.bitwise_not(_unsigned(c)) + _unsigned(tirx.IntImm(dtype, a.value + 1)))
    # A cast back, not a reinterpretation: x - x is simplified to a literal, which could not be reinterpreted.
    return tirx.Cast(dtype, function(_unsigned(a), _unsigned(c)))


def _unsigned(x: Expr) -> Expr:
    """An integer's bits as an unsigned one (TVM takes a reinterpreted literal 0 for a null pointer)."""
    unsigned = f"uint{BITS[dtype_of(x)]}"
    is_small = isinstance(x, tirx.IntImm) and x.value >= 0
    return (
        tirx.IntImm(unsigned, x.value) if is_small else x if dtype_of(x) == unsigned else tirx.reinterpret(unsigned, x)
    )


def divide(b: Builder, a: Expr, c: Expr, zero_message: str) -> tuple[Expr, Expr]:
    """(quotient, remainder) of integers, rounded towards zero; a zero divisor makes the call fail."""
    dtype = dtype_of(a)
    a, c = b.let(a), b.let(c)
    if not (isinstance(c, tirx.IntImm) and c.value != 0):
        b.require(tirx.NE(c, literal(0, dtype)), "ZeroDivisionError", zero_message)
    if dtype.startswith("u"):
        return b.let(tirx.truncdiv(a, c)), b.let(tirx.truncmod(a, c))
    # The least value over -1 overflows, which traps; -a wraps around.
    minus = b.let(tirx.EQ(c, literal(-1, dtype)))
    safe = b.let(select(minus, literal(1, dtype), c))
    quotient = select(minus, arithmetic("sub", literal(0, dtype), a), tirx.truncdiv(a, safe))
    return b.let(quotient), b.let(select(minus, literal(0, dtype), tirx.truncmod(a, safe)))


def _floored(b: Builder, a: Expr, c: Expr) -> tuple[Expr, Expr]:
    quotient, rest = divide(b, a, c, "integer division by zero")
    zero, one = literal(0, dtype_of(a)), literal(1, dtype_of(a))
    if dtype_of(a).startswith("u"):
        return quotient, rest
    down = b.let(tirx.all(unequal(rest, zero), unequal(c < zero, rest < zero)))
    return select(down, quotient - one, quotient), select(down, rest + c, rest)


def _float_mod(b: Builder, a: Expr, c: Expr) -> Expr:
    return b.let(libm("fmod", a, c), "mod")


def _floor_div(b: Builder, a: Expr, c: Expr) -> Expr:
    kind = dtype_of(a)
    if is_integer(kind):
        return _floored(b, a, c)[0]
    a, c = b.let(a), b.let(c)
    rest = _float_mod(b, a, c)
    zero, one, half = literal(0, kind), literal(1, kind), literal(0.5, kind)
    quotient = b.let((a - rest) / c)
    quotient = b.let(select(tirx.all(unequal(rest, zero), unequal(c < zero, rest < zero)), quotient - one, quotient))
    rounded = b.let(intrinsic("floor", quotient))
    rounded = b.let(select(quotient - rounded > half, rounded + one, rounded))
    ratio = b.let(a / c)
    result = select(unequal(quotient, zero), rounded, intrinsic("copysign", zero, ratio))
    return select(tirx.EQ(c, zero), ratio, result)


def _remainder(b: Builder, a: Expr, c: Expr) -> Expr:
    if is_integer(dtype_of(a)):
        return _floored(b, a, c)[1]
    rest = _float_mod(b, a, c)
    zero = literal(0, dtype_of(a))
    return select(tirx.all(unequal(rest, zero), unequal(c < zero, rest < zero)), rest + c, rest)


def _pow(b: Builder, a: Expr, c: Expr) -> Expr:
    dtype = dtype_of(a)
    if not is_integer(dtype):
        return libm("pow", a, c)
    zero, one = literal(0, dtype), literal(1, dtype)
    base, left, total = (b.scratch(1, dtype) for _ in range(3))
    a, c = b.let(a), b.let(c)
    at = [tirx.IntImm("int64", 0)]
    b.store(base, at, a)
    b.store(left, at, maximum(c, zero))
    b.store(total, at, one)
    with b.scope() as body:
        with b.when(tirx.EQ(left[at] & one, one)):
            b.store(total, at, arithmetic("mul", total[at], base[at]))
        b.store(base, at, arithmetic("mul", base[at], base[at]))
        b.store(left, at, left[at] >> one)
    b.emit(tirx.While(left[at] > zero, tirx.SeqStmt(body)))
    if dtype.startswith("u"):
        return b.let(total[at])
    minus = literal(-1, dtype)
    negative = select(tirx.EQ(a, one), one, select(tirx.EQ(a, minus), select(tirx.EQ(c & one, zero), one, minus), zero))
    return b.let(select(c >= zero, total[at], negative))


def _shift(b: Builder, a: Expr, c: Expr, left: bool) -> Expr:
    dtype = dtype_of(a)
    bits, zero = literal(BITS[dtype], dtype), literal(0, dtype)
    inside = b.let(c < bits if dtype.startswith("u") else tirx.all(c >= zero, c < bits))
    by = b.let(select(inside, c, zero))
    if left:
        shifted = tirx.reinterpret(dtype, _unsigned(a) << _unsigned(by))
        return select(inside, shifted, zero)
    if dtype.startswith("u"):
        return select(inside, a >> by, zero)
    return select(inside, a >> by, select(a < zero, literal(-1, dtype), zero))


def _negative(b: Builder, x: Expr) -> Expr:
    dtype = dtype_of(x)
    return arithmetic("sub", literal(0, dtype), x) if is_integer(dtype) else -x


def _abs(b: Builder, x: Expr) -> Expr:
    dtype = dtype_of(x)
    if is_float(dtype):
        return intrinsic("fabs", x)
    return x if dtype.startswith("u") else select(x < literal(0, dtype), _negative(b, x), x)


def _sign(b: Builder, x: Expr) -> Expr:
    dtype = dtype_of(x)
    zero, one = literal(0, dtype), literal(1, dtype)
    positive = select(x > zero, one, zero)
    return positive if dtype.startswith("u") else select(x < zero, literal(-1, dtype), positive)


def _trunc_div(b: Builder, a: Expr, c: Expr) -> Expr:
    return divide(b, a, c, "integer division by zero")[0] if is_integer(dtype_of(a)) else intrinsic("trunc", a / c)


def _fmod(b: Builder, a: Expr, c: Expr) -> Expr:
    return divide(b, a, c, "integer division by zero")[1] if is_integer(dtype_of(a)) else _float_mod(b, a, c)


Scalar = Callable[..., Expr]  # (builder, *operands in the compute dtype, **attributes) -> result in the compute dtype


def _simple(function: Callable[..., Expr]) -> Scalar:
    return lambda b, *args: function(*args)


def _libm(name: str) -> Scalar:
    return lambda b, *args: libm(name, *args)


def _llvm(name: str) -> Scalar:
    return lambda b, *args: intrinsic(name, *args)


def _compare(function: Callable[..., Expr]) -> Scalar:
    def compare(b: Builder, a: Expr, c: Expr) -> Expr:
        if dtype_of(a) == "bool":
            a, c = tirx.Cast("int8", a), tirx.Cast("int8", c)
        if a.same_as(c) and is_float(dtype_of(a)) and function in (tirx.EQ, tirx.LE, tirx.GE):
            return tirx.Not(is_nan(a))  # TVM would take it for true
        return function(a, c)

    return compare


def _reciprocal(x: Expr) -> Expr:
    return literal(1, dtype_of(x)) / x


def _log1p(b: Builder, x: Expr) -> Expr:
    return libm("log1p", x)


SCALARS: Mapping[Op, Scalar] = {
    ops.neg: _negative,
    ops.abs_: _abs,
    ops.sign: _sign,
    ops.relu: relu,
    ops.square: _simple(_squared),
    ops.exp: exp,
    ops.exp2: _libm("exp2"),
    ops.expm1: _libm("expm1"),
    ops.log: _libm("log"),
    ops.log2: _libm("log2"),
    ops.log10: _libm("log10"),
    ops.log1p: _log1p,
    ops.sqrt: _llvm("sqrt"),
    ops.rsqrt: _simple(lambda x: _reciprocal(intrinsic("sqrt", x))),
    ops.reciprocal: _simple(_reciprocal),
    ops.sin: _libm("sin"),
    ops.cos: _libm("cos"),
    ops.tan: _libm("tan"),
    ops.asin: _libm("asin"),
    ops.acos: _libm("acos"),
    ops.atan: _libm("atan"),
    ops.sinh: _libm("sinh"),
    ops.cosh: _libm("cosh"),
    ops.tanh: tanh,
    ops.asinh: _libm("asinh"),
    ops.acosh: _libm("acosh"),
    ops.atanh: _libm("atanh"),
    ops.erf: erf,
    ops.sigmoid: sigmoid,
    ops.silu: lambda b, x: x * sigmoid(b, x),
    ops.gelu: gelu,
    ops.floor: _llvm("floor"),
    ops.ceil: _llvm("ceil"),
    ops.round_: _llvm("rint"),
    ops.trunc: _llvm("trunc"),
    ops.add: _simple(lambda a, c: arithmetic("add", a, c)),
    ops.sub: _simple(lambda a, c: arithmetic("sub", a, c)),
    ops.mul: _simple(lambda a, c: arithmetic("mul", a, c)),
    ops.div: _simple(lambda a, c: a / c),
    ops.trunc_div: _trunc_div,
    ops.floor_div: _floor_div,
    ops.remainder: _remainder,
    ops.fmod: _fmod,
    ops.pow_: _pow,
    ops.maximum: _simple(maximum),
    ops.minimum: _simple(minimum),
    ops.atan2: _libm("atan2"),
    ops.copysign: _llvm("copysign"),
    ops.eq: _compare(tirx.EQ),
    ops.ne: _simple(unequal),
    ops.lt: _compare(tirx.LT),
    ops.le: _compare(tirx.LE),
    ops.gt: _compare(tirx.GT),
    ops.ge: _compare(tirx.GE),
    ops.logical_and: _simple(tirx.And),
    ops.logical_or: _simple(tirx.Or),
    ops.logical_xor: _simple(unequal),
    ops.logical_not: _simple(tirx.Not),
    ops.bit_and: _simple(lambda a, c: a & c),
    ops.bit_or: _simple(lambda a, c: a | c),
    ops.bit_xor: _simple(lambda a, c: a ^ c),
    ops.bit_not: _simple(lambda x: tirx.bitwise_not(x)),
    ops.shift_left: lambda b, a, c: _shift(b, a, c, True),
    ops.shift_right: lambda b, a, c: _shift(b, a, c, False),
    ops.isnan: _simple(is_nan),
    ops.where: _simple(select),
}
"""The elementwise ops except `cast`, whose result is in another dtype (see `convert`)."""

CHECKED = frozenset({ops.trunc_div, ops.floor_div, ops.remainder, ops.fmod})
"""Ops that fail at run time on an integer zero divisor: their loops stay on the calling thread."""

EXPENSIVE = frozenset(
    {
        ops.exp, ops.exp2, ops.expm1, ops.log, ops.log2, ops.log10, ops.log1p, ops.sin, ops.cos, ops.tan, ops.asin, ops.acos,
        ops.atan, ops.sinh, ops.cosh, ops.tanh, ops.asinh, ops.acosh, ops.atanh, ops.erf, ops.sigmoid, ops.silu, ops.gelu,
        ops.pow_, ops.atan2, ops.fmod, ops.remainder, ops.floor_div, ops.trunc_div, ops.div, ops.rsqrt, ops.sqrt,
    }
)  # fmt: skip
"""Ops whose result is worth keeping rather than computing twice."""


def apply(b: Builder, op: Op, operands: list[Expr], attributes: Mapping[str, Any], dtype: str) -> Expr:
    """One elementwise op on operands in their storage dtypes; the result is in storage dtype `dtype`, bound once."""
    if op is ops.cast:
        return b.let(convert(b, operands[0], attributes["dtype"]))
    if op is ops.where:
        return b.let(select(*operands))
    wide = [widen(b, o) for o in operands]
    result = SCALARS[op](b, *wide, **attributes)
    if dtype == "bool":
        return b.let(result)
    return b.let(narrow(b, result, dtype))
