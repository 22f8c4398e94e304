"""Types of values: a dtype and a shape whose dimensions are integers or sympy expressions.

A symbolic dimension is a positive integer symbol (`symbol("s0")`); its range belongs to the graph, not to the type.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, overload

import attrs
import ml_dtypes
import numpy as np
import sympy

from jisu.compiler.errors import JisuError

Dim: TypeAlias = "int | sympy.Expr"

FLOATS = ("float16", "bfloat16", "float32", "float64")
INTEGERS = ("uint8", "int8", "int16", "int32", "int64")
DTYPES = ("bool", *INTEGERS, *FLOATS)
_NUMPY = {name: np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name) for name in DTYPES}
_NAMES = {dtype: name for name, dtype in _NUMPY.items()}


class TypeRuleError(JisuError, TypeError):
    """Operands or attributes that an op's type rule refuses."""


def require(condition: object, reason: str) -> None:
    """Raise `TypeRuleError(reason)` unless `condition` holds."""
    if not condition:
        raise TypeRuleError(reason)


def numpy_dtype(name: str) -> np.dtype:
    """The NumPy dtype of a dtype name ("bfloat16" comes from ml_dtypes)."""
    require(name in _NUMPY, f"unknown dtype {name!r}; known: {', '.join(DTYPES)}")
    return _NUMPY[name]


def dtype_name(dtype: np.dtype) -> str:
    """The name of a NumPy dtype; raises TypeRuleError for one outside `DTYPES`."""
    require(np.dtype(dtype) in _NAMES, f"dtype {dtype} is not one of {', '.join(DTYPES)}")
    return _NAMES[np.dtype(dtype)]


def is_float(dtype: str) -> bool:
    """Whether `dtype` is a floating-point dtype."""
    return dtype in FLOATS


def is_integer(dtype: str) -> bool:
    """Whether `dtype` is an integer dtype (bool is not)."""
    return dtype in INTEGERS


def symbol(name: str) -> sympy.Symbol:
    """The symbolic dimension called `name`: a positive integer."""
    return sympy.Symbol(name, integer=True, positive=True)


def dim(value: object) -> Dim:
    """`value` as a dimension: sympy integers become ints, expressions are expanded to one normal form."""
    if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, sympy.Expr):
        return _normal(value)
    raise TypeRuleError(f"{value!r} is no dimension; expected an int or a sympy expression")


@functools.lru_cache(1 << 16)
def _normal(value: sympy.Expr) -> Dim:
    expanded = sympy.expand(value)
    return int(expanded) if expanded.is_Integer else expanded


def fixed(value: Dim) -> int:
    """The integer of a dimension that has to be one; raises TypeRuleError naming its symbols otherwise."""
    found = value if isinstance(value, int) else dim(value)
    if isinstance(found, int):
        return found
    raise TypeRuleError(
        f"a dimension has to be a fixed number here, and {found} varies with {', '.join(sorted(map(str, found.free_symbols)))}"
    )


def same_dim(a: Dim, b: Dim) -> bool:
    """Whether two dimensions are provably equal."""
    if a == b:
        return True
    if isinstance(a, int) and isinstance(b, int):
        return False
    return _equal(a, b)


@functools.lru_cache(1 << 16)
def _equal(a: Dim, b: Dim) -> bool:
    return bool(sympy.expand(sympy.sympify(a) - b) == 0)


def same_shape(a: Iterable[Dim], b: Iterable[Dim]) -> bool:
    """Whether two shapes are provably equal."""
    a, b = tuple(a), tuple(b)
    return len(a) == len(b) and all(map(same_dim, a, b))


def round_up(value: int, multiple: int) -> int:
    """The least multiple that isn't smaller."""
    return -(-value // multiple) * multiple


def product(dims: Iterable[Dim]) -> Dim:
    """The product of dimensions; 1 for none."""
    return _product(tuple(dims))


@functools.lru_cache(1 << 16)
def _product(dims: tuple[Dim, ...]) -> Dim:
    result: Dim = 1
    for d in dims:
        result = result * d
    return dim(result)


@overload
def substitute(value: Dim, env: Mapping[str, int]) -> int: ...
@overload
def substitute(value: object, env: Mapping[str, int]) -> object: ...
def substitute(value: object, env: Mapping[str, int]) -> object:
    """`value` with every symbolic dimension in it (also inside tuples) replaced by its integer in `env`."""
    if isinstance(value, tuple):
        return tuple(substitute(v, env) for v in value)
    if isinstance(value, sympy.Expr):
        symbols = _symbols(value)
        try:
            return _evaluated(value, tuple((s, env[s.name]) for s in symbols))
        except KeyError as missing:
            raise TypeRuleError(f"dimension {value} needs a value for {missing.args[0]}") from None
    return value


@functools.lru_cache(1 << 16)
def _symbols(value: sympy.Expr) -> tuple[sympy.Symbol, ...]:
    return tuple(sorted(value.free_symbols, key=str))


@functools.lru_cache(1 << 16)
def _evaluated(value: sympy.Expr, env: tuple[tuple[sympy.Symbol, int], ...]) -> int:
    """An expression at fixed symbols; cached, since the same few dimensions stand all over a model."""
    result = value.subs(dict(env))
    require(result.is_Integer, f"dimension {value} is not an integer ({result}) under {dict(env)}")
    return int(result)


def _dims(dims: Iterable[Any]) -> tuple[Dim, ...]:
    return tuple(dim(d) for d in dims)


@attrs.frozen
class TensorType:
    """A tensor's dtype and shape; prints as `float32[2, s0]`."""

    shape: tuple[Dim, ...] = attrs.field(converter=_dims)
    dtype: str = attrs.field()

    @dtype.validator
    def _known(self, _: object, value: str) -> None:
        numpy_dtype(value)

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def itemsize(self) -> int:
        """Bytes of one element."""
        return numpy_dtype(self.dtype).itemsize

    @property
    def size(self) -> Dim:
        """Number of elements."""
        return _size(self)

    @property
    def nbytes(self) -> Dim:
        """Bytes of the whole tensor."""
        return product((self.size, self.itemsize))

    @property
    def symbols(self) -> frozenset[str]:
        """Names of the symbols in the shape."""
        return frozenset(s.name for d in self.shape if not isinstance(d, int) for s in d.free_symbols)

    def with_shape(self, *shape: Dim) -> TensorType:
        """The same dtype with another shape."""
        return TensorType(shape, self.dtype)

    def with_dtype(self, dtype: str) -> TensorType:
        """The same shape with another dtype."""
        return TensorType(self.shape, dtype)

    def at(self, env: Mapping[str, int]) -> TensorType:
        """This type with its symbols replaced by the integers in `env`."""
        return TensorType(tuple(substitute(d, env) for d in self.shape), self.dtype)

    def __str__(self) -> str:
        return _shown(self)


@functools.lru_cache(1 << 16)
def _size(t: TensorType) -> Dim:
    return product(t.shape)


@functools.lru_cache(1 << 16)
def _shown(t: TensorType) -> str:
    """A type as text; cached, since printing symbolic dimensions is slow and messages name types all the time."""
    return f"{t.dtype}[{', '.join(str(d) for d in t.shape)}]"


@attrs.frozen
class TupleType:
    """Types of an op with several results, read with the op `get`."""

    items: tuple[TensorType, ...]

    def __str__(self) -> str:
        return f"({', '.join(map(str, self.items))})"


Type = TensorType | TupleType


def same_type(a: Type, b: Type) -> bool:
    """Whether two types are provably equal."""
    if isinstance(a, TupleType) or isinstance(b, TupleType):
        return (
            isinstance(a, TupleType)
            and isinstance(b, TupleType)
            and len(a.items) == len(b.items)
            and all(map(same_type, a.items, b.items))
        )
    return a.dtype == b.dtype and same_shape(a.shape, b.shape)


def broadcast(*shapes: tuple[Dim, ...]) -> tuple[Dim, ...]:
    """The NumPy broadcast of shapes; raises TypeRuleError where two dimensions are neither equal nor 1."""
    rank = max(map(len, shapes), default=0)
    result: list[Dim] = []
    for axis in range(-rank, 0):
        found: Dim = 1
        for shape in shapes:
            if len(shape) < -axis or shape[axis] == 1:
                continue
            if found != 1 and not same_dim(found, shape[axis]):
                raise TypeRuleError(f"shapes {' and '.join(map(str, shapes))} don't broadcast")
            found = shape[axis]
        result.append(found)
    return tuple(result)
