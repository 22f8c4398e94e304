"""The C library's functions for machines that have none: in double precision, and in single precision for float32 arguments where that is
often wanted (and kernels don't compute it themselves, as they do exp, tanh and erf), since many GPUs compute doubles at 1/64 of the
rate; the other functions of float32 are those of doubles, rounded once.

Every function is LLVM IR under the name that kernels call ("cosf", "pow"). Errors are a few ulp of a double (pow: |c log a| ulp; sine, cosine
and tangent: up to 2^45), and at most 2 ulp of a float.
Sources: Cody and Waite's reductions (Software Manual for the Elementary Functions, 1980); Payne and Hanek's of large arguments (Radian
reduction for trigonometric functions, 1983); Kahan's log1p; Taylor series; minimax polynomials for float32, by Lawson's iteration.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence

from jisu.targets.cpu.isa import Function, Val
from jisu.targets.target import Target

_LN2 = (float.fromhex("0x1.62e42fefa39efp-1"), float.fromhex("0x1.abc9e3b39803fp-56"))
_HALF_PI = tuple(float.fromhex(x) for x in ("0x1.921fb54442d18p+0", "0x1.1a62633145c07p-54", "-0x1.f1976b7ed8fbcp-110"))


class _Formula(Function):
    """A function of doubles, or `single`, of floats, under construction."""

    def __init__(self, name: str, count: int, target: Target, single: bool = False) -> None:
        self.type, self.suffix = ("float", "f32") if single else ("double", "f64")
        super().__init__(name, [(self.type, f"x{i}") for i in range(count)], target)
        self.name, self.arity = name, count

    def number(self, value: float) -> Val:
        """A constant."""
        return self.const(value, self.type)

    def fma(self, a: Val, b: Val | float, c: Val | float) -> Val:
        """a * b + c in one rounding."""
        return self.call(self.type, f"llvm.fma.{self.suffix}", a, self.like(b, a), self.like(c, a))

    def of(self, name: str, x: Val) -> Val:
        """An LLVM function: "fabs", "sqrt", "rint", "trunc"."""
        return self.call(self.type, f"llvm.{name}.{self.suffix}", x)

    def with_sign(self, x: Val, sign: Val) -> Val:
        """|x| with another's sign."""
        return self.call(self.type, f"llvm.copysign.{self.suffix}", x, sign)

    def series(self, x: Val, coefficients: Sequence[float]) -> Val:
        """The sum of coefficients[i] x^i."""
        total = self.number(coefficients[-1])
        for c in reversed(coefficients[:-1]):
            total = self.fma(total, x, self.number(c))
        return total

    def ours(self, name: str, *args: Val) -> Val:
        """Another of these functions, of doubles."""
        return self.op(f"call double @{name}({', '.join(f'double {a.name}' for a in args)})", "double")

    def power_of_two(self, n: Val) -> Val:
        """2^n for an i64 in the range of normal numbers."""
        if self.type == "float":
            return self.cast("bitcast", self.cast("trunc", n + 127, "i32") << 23, "float")
        return self.cast("bitcast", (n + 1023) << 52, "double")

    def whole(self, x: Val) -> Val:
        """An integral number (0 for NaN) as i64."""
        return self.cast("fptosi", self.select(x.cmp("uno", x), self.number(0.0), x), "i64")

    def text(self, result: Val) -> str:
        """The definition."""
        name, given = (
            (self.name if self.type == "double" else f"{self.name}f"),
            ", ".join(f"{t} %{n}" for t, n in self._params),
        )
        body = "\n".join(self._lines)
        return f"define {self.type} @{name}({given}) {{\nentry:\n{body}\n  ret {self.type} {result.name}\n}}\n"

    def rounded_text(self) -> str:
        """The definition for floats of a function of doubles."""
        floats = ", ".join(f"float %x{i}" for i in range(self.arity))
        wide = "\n".join(f"  %w{i} = fpext float %x{i} to double" for i in range(self.arity))
        passed = ", ".join(f"double %w{i}" for i in range(self.arity))
        return (
            f"define float @{self.name}f({floats}) {{\n{wide}\n  %r = call double @{self.name}({passed})\n"
            "  %s = fptrunc double %r to float\n  ret float %s\n}\n"
        )


def _exp_of_rest(f: _Formula, r: Val, n: Val) -> Val:
    """e^r 2^n for small r; subnormal results come out."""
    return _scaled(f, f.series(r, [1 / math.factorial(i) for i in range(15)]), n)


def _scaled(f: _Formula, p: Val, n: Val) -> Val:
    """p 2^n in two steps."""
    k = f.whole(n)
    half = f.op(f"ashr i64 {k.name}, 1", "i64")
    return p * f.power_of_two(half) * f.power_of_two(k - half)


def _clamped(f: _Formula, x: Val, low: float, high: float) -> Val:
    x = f.select(x < low, f.number(low), x)
    return f.select(x > high, f.number(high), x)


def _exp(f: _Formula, x: Val) -> Val:
    held = _clamped(f, x, -760.0, 720.0)
    n = f.of("rint", held * math.log2(math.e))
    r = f.fma(n, f.number(-_LN2[0]), held)
    return _exp_of_rest(f, f.fma(n, f.number(-_LN2[1]), r), n)


def _exp2(f: _Formula, x: Val) -> Val:
    held = _clamped(f, x, -1100.0, 1030.0)
    n = f.of("rint", held)
    return _exp_of_rest(f, (held - n) * math.log(2), n)


def _expm1(f: _Formula, x: Val) -> Val:
    near = x * f.series(x, [1 / math.factorial(i + 1) for i in range(18)])
    return f.select(f.of("fabs", x) < 0.5, near, f.ours("exp", x) - 1.0)


def _parts(f: _Formula, x: Val) -> tuple[Val, Val]:
    """m and e (as a double) with x = m 2^e and m between the root of a half and that of two."""
    tiny = x < 2.3e-308
    scaled = f.select(tiny, x * 2.0**54, x)
    bits = f.cast("bitcast", scaled, "i64")
    e = ((bits >> 52) & 0x7FF) - 1023
    m = f.cast("bitcast", (bits & ((1 << 52) - 1)) | (1023 << 52), "double")
    above = m > math.sqrt(2)
    m, e = f.select(above, m * 0.5, m), f.select(above, e + 1, e)
    return m, f.cast("sitofp", f.select(tiny, e - 54, e), "double")


def _log_of_part(f: _Formula, m: Val) -> Val:
    """log m for m near 1: 2 artanh((m - 1) / (m + 1))."""
    s = (m - 1.0) / (m + 1.0)
    return s * f.series(s * s, [2 / (2 * i + 1) for i in range(14)])


def _log_ends(f: _Formula, x: Val, inside: Val) -> Val:
    """`inside`, but for what has no logarithm."""
    found = f.select(x.cmp("oeq", math.inf), x, inside)
    found = f.select(x.cmp("oeq", 0.0), f.number(-math.inf), found)
    return f.select(x.cmp("uge", 0.0), f.select(x.cmp("uno", x), x, found), f.number(math.nan))


def _log(f: _Formula, x: Val) -> Val:
    m, e = _parts(f, x)
    return _log_ends(f, x, f.fma(e, f.number(_LN2[0]), _log_of_part(f, m) + e * _LN2[1]))


def _log2(f: _Formula, x: Val) -> Val:
    m, e = _parts(f, x)
    return _log_ends(f, x, e + _log_of_part(f, m) * math.log2(math.e))


def _log1p(f: _Formula, x: Val) -> Val:
    u = x + 1.0
    found = f.ours("log", u) * (x / (u - 1.0))
    found = f.select(u.cmp("oeq", 1.0), x, found)
    return f.select(x.cmp("oeq", math.inf), x, f.select(x.cmp("oeq", -1.0), f.number(-math.inf), found))


def _turned(f: _Formula, x: Val, quarter: int) -> Val:
    """sin(x + quarter pi / 2)."""
    k = f.of("rint", x * (2 / math.pi))
    r = x
    for part in _HALF_PI:
        r = f.fma(k, f.number(-part), r)
    z = r * r
    sine = r * f.series(z, [(-1) ** i / math.factorial(2 * i + 1) for i in range(10)])
    cosine = f.series(z, [(-1) ** i / math.factorial(2 * i) for i in range(11)])
    inside = f.of("fabs", k) < 2.0**62
    number = f.whole(f.select(inside, k, f.number(0.0))) + quarter
    value = f.select((number & 1).cmp("eq", 1), cosine, sine)
    value = f.select((number & 2).cmp("eq", 2), -value, value)
    return _ends_of_turns(f, x, value, quarter)


def _ends_of_turns(f: _Formula, x: Val, value: Val, quarter: int) -> Val:
    """`value`, but NaN of infinite angles, and a zero's own sign."""
    value = f.select(f.of("fabs", x).cmp("oeq", math.inf), f.number(math.nan), value)
    return value if quarter else f.select(x.cmp("oeq", 0.0), x, value)


def _atan(f: _Formula, x: Val) -> Val:
    a = f.of("fabs", x)
    inverse = a > 1.0
    a = f.select(inverse, 1.0 / a, a)
    turned = a > math.sqrt(2) - 1
    b = f.select(turned, (a - 1.0) / (a + 1.0), a)
    found = b * f.series(b * b, [(-1) ** i / (2 * i + 1) for i in range(24)])
    found = f.select(turned, found + math.pi / 4, found)
    return f.with_sign(f.select(inverse, math.pi / 2 - found, found), x)


def _atan2(f: _Formula, y: Val, x: Val) -> Val:
    a, b = f.of("fabs", y), f.of("fabs", x)
    ratio = f.select(a.cmp("oeq", b), f.number(1.0), a / b)
    ratio = f.select(a.cmp("oeq", 0.0), f.number(0.0), f.select(y.cmp("uno", x), f.number(math.nan), ratio))
    ratio = f.select(b.cmp("uno", b), b, ratio)
    found = f.ours("atan", ratio)
    left = f.cast("bitcast", x, "i64") < 0
    return f.with_sign(f.select(left, math.pi - found, found), y)


def _erf(f: _Formula, x: Val) -> Val:
    """2 / sqrt(pi) e^(-x^2) times the sum of 2^n x^(2n+1) / (1 3 5 ... (2n+1)), whose terms are all of one sign."""
    a = f.of("fabs", x)
    held = f.select(a > 6.0, f.number(6.0), a)
    twice = held * held * 2.0

    def step(i: Val, state: list[Val]) -> list[Val]:
        term, total = state
        term = term * twice / f.cast("sitofp", i * 2 + 1, "double")
        return [term, total + term]

    *state, _ = f.loop(1, 160, 1, [held, held], step)
    found = state[1] * f.ours("exp", -(held * held)) * (2 / math.sqrt(math.pi))
    found = f.select(found > 1.0, f.number(1.0), found)
    return f.select(x.cmp("uno", x), x, f.with_sign(found, x))


def _pow(f: _Formula, a: Val, c: Val) -> Val:
    size = f.of("fabs", a)
    value = f.ours("exp", c * f.ours("log", size))
    value = f.select(size.cmp("oeq", 1.0), f.number(1.0), value)
    integral = f.of("trunc", c).cmp("oeq", c)
    half = c * 0.5
    odd = f.op(f"and i1 {integral.name}, {f.of('trunc', half).cmp('one', half).name}", "i1")
    negative = f.cast("bitcast", a, "i64") < 0
    signed = f.select(f.op(f"and i1 {negative.name}, {odd.name}", "i1"), -value, value)
    # A negative number has no power but an integral one; zero and infinity have.
    plain = f.op(f"and i1 {(a < 0.0).name}, {size.cmp('one', math.inf).name}", "i1")
    lost = f.op(f"and i1 {plain.name}, {f.op(f'xor i1 {integral.name}, true', 'i1').name}", "i1")
    found = f.select(lost, f.number(math.nan), signed)
    found = f.select(a.cmp("uno", c), f.number(math.nan), found)
    one = f.op(f"or i1 {c.cmp('oeq', 0.0).name}, {a.cmp('oeq', 1.0).name}", "i1")
    return f.select(one, f.number(1.0), found)


def _fmod(f: _Formula, a: Val, c: Val) -> Val:
    size, by = f.of("fabs", a), f.of("fabs", c)
    usable = f.op(f"and i1 {(size < math.inf).name}, {(by > 0.0).name}", "i1")
    first, step_by = f.select(usable, size, f.number(0.0)), f.select(usable, by, f.number(1.0))

    def step(i: Val, state: list[Val]) -> list[Val]:
        # A quotient that is rounded up leaves a negative rest, which is less than the divisor.
        (rest,) = state
        more = f.of("fabs", rest).cmp("oge", step_by)
        quotient = f.of("trunc", rest / step_by)
        quotient = f.select(quotient > 1e300, f.number(1e300), quotient)
        return [f.select(more, f.fma(-quotient, step_by, rest), rest)]

    *state, _ = f.loop(0, 48, 1, [first], step)
    rest = f.select(state[0] < 0.0, state[0] + step_by, state[0])
    found = f.with_sign(rest, a)
    found = f.select(by.cmp("oeq", math.inf), f.select(size < math.inf, a, f.number(math.nan)), found)
    given = f.op(f"or i1 {usable.name}, {by.cmp('oeq', math.inf).name}", "i1")
    return f.select(a.cmp("uno", c), f.number(math.nan), f.select(given, found, f.number(math.nan)))


def _tanh(f: _Formula, x: Val) -> Val:
    a = f.of("fabs", x)
    t = f.ours("expm1", f.select(a > 40.0, f.number(40.0), a) * 2.0)
    return f.with_sign(t / (t + 2.0), x)


def _sinh(f: _Formula, x: Val) -> Val:
    a = f.of("fabs", x)
    t = f.ours("expm1", a)
    near = (t + t / (t + 1.0)) * 0.5
    root = f.ours("exp", a * 0.5)
    return f.with_sign(f.select(a > 700.0, root * 0.5 * root, near), x)


def _cosh(f: _Formula, x: Val) -> Val:
    a = f.of("fabs", x)
    e, root = f.ours("exp", a), f.ours("exp", a * 0.5)
    return f.select(a > 700.0, root * 0.5 * root, (e + 1.0 / e) * 0.5)


def _asinh(f: _Formula, x: Val) -> Val:
    a = f.of("fabs", x)
    near = f.ours("log1p", a + a * a / (f.of("sqrt", a * a + 1.0) + 1.0))
    return f.with_sign(f.select(a > 1e150, f.ours("log", a) + math.log(2), near), x)


def _acosh(f: _Formula, x: Val) -> Val:
    t = x - 1.0
    near = f.ours("log1p", t + f.of("sqrt", t * 2.0 + t * t))
    return f.select(x > 1e150, f.ours("log", x) + math.log(2), near)


def _atanh(f: _Formula, x: Val) -> Val:
    a = f.of("fabs", x)
    return f.with_sign(f.ours("log1p", (a + a) / (1.0 - a)) * 0.5, x)


_FORMULAS: dict[str, tuple[int, Callable[..., Val]]] = {
    "exp": (1, _exp),
    "exp2": (1, _exp2),
    "expm1": (1, _expm1),
    "log": (1, _log),
    "log2": (1, _log2),
    "log10": (1, lambda f, x: f.ours("log", x) * math.log10(math.e)),
    "log1p": (1, _log1p),
    "sin": (1, lambda f, x: _turned(f, x, 0)),
    "cos": (1, lambda f, x: _turned(f, x, 1)),
    "tan": (1, lambda f, x: f.ours("sin", x) / f.ours("cos", x)),
    "atan": (1, _atan),
    "atan2": (2, _atan2),
    "asin": (1, lambda f, x: f.ours("atan2", x, f.of("sqrt", (1.0 - x) * (x + 1.0)))),
    "acos": (1, lambda f, x: f.ours("atan2", f.of("sqrt", 1.0 - x), f.of("sqrt", x + 1.0)) * 2.0),
    "sinh": (1, _sinh),
    "cosh": (1, _cosh),
    "tanh": (1, _tanh),
    "asinh": (1, _asinh),
    "acosh": (1, _acosh),
    "atanh": (1, _atanh),
    "erf": (1, _erf),
    "pow": (2, _pow),
    "fmod": (2, _fmod),
}


# In single precision

_LN2_SINGLE = tuple(float.fromhex(x) for x in ("0x1.62e43p-1", "-0x1.05c61p-29"))
_HALF_PI_SINGLE = tuple(float.fromhex(x) for x in ("0x1.921fb6p+0", "-0x1.777a5cp-25", "-0x1.ee59dap-50"))
_TWO_OVER_PI = (0, 0xA2F9836E, 0x4E441529, 0xFC2757D1, 0xF534DDC0, 0xDB629599, 0x3C439041, 0xFE5163AB)
"""Bits: of the whole number, then 32 at a time of the fraction."""
_LARGE = 65536.0  # angles from here on are reduced by integers


def _exp2_single(f: _Formula, x: Val) -> Val:
    held = _clamped(f, x, -151.0, 129.0)
    n = f.of("rint", held)
    p = f.series(
        held - n,
        [1.0, 0.6931471824645996, 0.24022650718688965, 0.055503278970718384, 0.009618003852665424, 0.0013400270836427808, 0.0001547627180116251],
    )  # fmt: skip
    return _scaled(f, p, n)


def _log_single(f: _Formula, x: Val) -> Val:
    tiny = x < 2.0**-126
    bits = f.cast("bitcast", f.select(tiny, x * 2.0**24, x), "i32")
    # Of what is left after the root of a half is taken off, the exponent is that of m 2^e with m up to the root of two.
    e = f.op(f"ashr i32 {(bits - 0x3F3504F3).name}, 23", "i32")
    m = f.cast("bitcast", bits - (e << 23), "float")
    e = f.cast("sitofp", f.select(tiny, e - 24, e), "float")
    r = m - 1.0
    z = r * r
    p = f.series(
        r,
        [0.3333331346511841, -0.25000008940696716, 0.2000211924314499, -0.1666799634695053, 0.14219552278518677, -0.1240558922290802,
         0.11888162046670914, -0.11675652116537094, 0.06746640801429749],
    )  # fmt: skip
    rest = f.fma(e, _LN2_SINGLE[1], f.fma(z, -0.5, p * (z * r)))
    return _log_ends(f, x, f.fma(e, _LN2_SINGLE[0], r + rest))


def _turned_single(f: _Formula, x: Val, quarter: int) -> Val:
    """sin(x + quarter pi / 2)."""
    k = f.of("rint", x * (2 / math.pi))
    r = x
    for part in _HALF_PI_SINGLE:  # the first product is exact, and so is what it leaves
        r = f.fma(k, -part, r)
    size = f.of("fabs", x)
    large = f.op(f"and i1 {size.cmp('oge', _LARGE).name}, {(size < math.inf).name}", "i1")
    count = f.select(large, f.i64(1), 0)
    number, r, _ = f.loop(0, count, 1, [f.whole(f.select(large, f.number(0.0), k)), r], lambda *_: _reduced(f, x))
    number, z = number + quarter, r * r
    sine = f.series(z, [-0.16666653752326965, 0.008332133293151855, -0.0001951145677594468])
    sine = f.fma(sine * z, r, r)
    cosine = f.series(z, [0.04166664555668831, -0.0013887278037145734, 2.442878576403018e-05])
    cosine = f.fma(cosine, z * z, f.fma(z, -0.5, 1.0))
    value = f.select((number & 1).cmp("eq", 1), cosine, sine)
    value = f.select((number & 2).cmp("eq", 2), -value, value)
    return _ends_of_turns(f, x, value, quarter)


def _reduced(f: _Formula, x: Val) -> list[Val]:
    """k mod 4 (i64) and r of x = k pi / 2 + r for finite |x| from `_LARGE` on: the mantissa times those 96 bits of 2 / pi that aren't
    multiples of 4 and count."""
    bits = f.cast("zext", f.cast("bitcast", x, "i32"), "i64")
    mantissa = (bits & 0x7FFFFF) | 0x800000
    begin = ((bits >> 23) & 255) - 120  # the first bit that counts, of those in the table
    word, within = begin >> 5, begin & 31

    def taken(number: int) -> Val:
        found = f.i64(_TWO_OVER_PI[min(4 + number, 7)])
        for i in range(3, -1, -1):
            found = f.select(word.cmp("eq", i), f.i64(_TWO_OVER_PI[i + number]), found)
        return found

    words = [taken(i) for i in range(4)]
    left = 32 - within
    window = [
        f.op(f"lshr i64 {((high << 32) | low).name}, {left.name}", "i64") & 0xFFFFFFFF
        for high, low in zip(words, words[1:], strict=False)
    ]
    top = ((mantissa * window[0]) << 32) + mantissa * window[1] + ((mantissa * window[2]) >> 32)
    rest = top << 2  # signed: what is above or below the nearest quarter turn, as a fraction of 2^64
    k = (top >> 62) + f.select(rest < 0, f.i64(1), 0)
    half = f.op(f"ashr i64 {rest.name}, 1", "i64")
    high = f.cast("sitofp", half, "float")
    low = f.cast("sitofp", half - f.cast("fptosi", high, "i64"), "float")
    r = f.fma(high, _HALF_PI_SINGLE[0], f.fma(low, _HALF_PI_SINGLE[0], high * _HALF_PI_SINGLE[1])) * 2.0**-63
    negative = x < 0.0
    return [f.select(negative, -k, k), f.select(negative, -r, r)]


_SINGLE: dict[str, Callable[..., Val]] = {
    "exp2": _exp2_single,
    "log": _log_single,
    "sin": lambda f, x: _turned_single(f, x, 0),
    "cos": lambda f, x: _turned_single(f, x, 1),
}


@functools.cache
def library(target: Target) -> str:
    """All functions as LLVM IR text; what nobody calls costs nothing in a module that is compiled with optimisation."""
    declares: set[str] = set()
    texts = []
    for name, (count, formula) in _FORMULAS.items():
        f = _Formula(name, count, target)
        texts.append(f.text(formula(f, *f.params())))
        declares |= f._declares
        if name not in _SINGLE:
            texts.append(f.rounded_text())
            continue
        f = _Formula(name, count, target, single=True)
        texts.append(f.text(_SINGLE[name](f, *f.params())))
        declares |= f._declares
    return "\n".join([*sorted(declares), *texts])


def called(source: str) -> bool:
    """Whether a TIR function's text calls one of these functions."""
    names = "|".join(_FORMULAS)
    return re.search(rf'"(?:{names})f?"', source) is not None
