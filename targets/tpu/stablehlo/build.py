"""StableHLO in text: values that write themselves down, in the manner of NumPy.

An emitter computes with `Value`s as an op's NumPy meaning computes with arrays; every operation appends a line to the text of
its `Body`. All shapes are numbers. Operands broadcast as in NumPy, dtypes never change by themselves. Syntax and semantics: the
StableHLO specification, https://github.com/openxla/stablehlo/blob/main/docs/spec.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import numpy as np

from jisu.compiler.types import TensorType, broadcast, is_float, numpy_dtype

NAMES = {
    "bool": "i1", "uint8": "ui8", "int8": "i8", "int16": "i16", "int32": "i32", "int64": "i64",
    "float16": "f16", "bfloat16": "bf16", "float32": "f32", "float64": "f64",
}  # fmt: skip
"""Element types by dtype."""

Scalar = bool | int | float
HALF = ("float16", "bfloat16")


def type_text(shape: Sequence[int], dtype: str) -> str:
    """A tensor type, such as `tensor<2x3xf32>`."""
    return f"tensor<{''.join(f'{n}x' for n in shape)}{NAMES[dtype]}>"


def number_text(value: Any, dtype: str) -> str:
    """A number as it stands in `dense<…>`; what has no decimal form is given by its bits."""
    if dtype == "bool":
        return "true" if value else "false"
    if not is_float(dtype):
        return str(int(value))
    with np.errstate(over="ignore"):
        stored = np.asarray(value).astype(numpy_dtype(dtype))
    found = float(stored)
    if not math.isfinite(found):
        return f"0x{stored.tobytes()[::-1].hex().upper()}"
    mantissa, e, exponent = repr(found).partition("e")
    return f"{mantissa if '.' in mantissa else mantissa + '.0'}{e}{exponent}"


def array_text(array: np.ndarray, dtype: str) -> str:
    """An array as it stands in `dense<…>`."""
    if array.ndim == 0:
        return number_text(array[()], dtype)
    return f"[{', '.join(array_text(a, dtype) for a in array)}]"


def _list(numbers: Sequence[int]) -> str:
    return f"[{', '.join(map(str, numbers))}]"


def _i64s(numbers: Sequence[int]) -> str:
    return f"array<i64: {', '.join(map(str, numbers))}>" if len(numbers) else "array<i64>"


class Body:
    """The statements of one function, in order. `name` makes the names of new values."""

    def __init__(self, prefix: str = "%", indent: str = "    ", tail: str = "") -> None:
        self.lines: list[str] = []
        self.prefix, self.indent, self.tail = prefix, indent, tail
        self._count = 0

    def name(self) -> str:
        """A new name."""
        self._count += 1
        return f"{self.prefix}{self._count - 1}"

    def write(self, text: str) -> None:
        """Append a statement."""
        self.lines.append(f"{self.indent}{text}{self.tail}")

    def value(self, text: str, shape: Sequence[int], dtype: str) -> Value:
        """Append `%name = text` and return the value that it defines."""
        name = self.name()
        self.write(f"{name} = {text}")
        return Value(self, name, tuple(shape), dtype)

    def full(self, value: Scalar, shape: Sequence[int], dtype: str) -> Value:
        """`value` everywhere."""
        text = f"stablehlo.constant dense<{number_text(value, dtype)}> : {type_text(shape, dtype)}"
        return self.value(text, shape, dtype)

    def array(self, array: np.ndarray, dtype: str) -> Value:
        """A small array."""
        if array.size == 0:
            return self.full(0, array.shape, dtype)
        text = f"stablehlo.constant dense<{array_text(array, dtype)}> : {type_text(array.shape, dtype)}"
        return self.value(text, array.shape, dtype)

    def iota(self, shape: Sequence[int], axis: int, dtype: str = "int32") -> Value:
        """0, 1, … along `axis`."""
        return self.value(f"stablehlo.iota dim = {axis} : {type_text(shape, dtype)}", shape, dtype)

    def concat(self, parts: Sequence[Value], axis: int) -> Value:
        """Values behind each other."""
        shape = list(parts[0].shape)
        shape[axis] = sum(p.shape[axis] for p in parts)
        shown = ", ".join(p.name for p in parts)
        types = ", ".join(p.type for p in parts)
        result = type_text(shape, parts[0].dtype)
        return self.value(f"stablehlo.concatenate {shown}, dim = {axis} : ({types}) -> {result}", shape, parts[0].dtype)

    def stack(self, parts: Sequence[Value], axis: int) -> Value:
        """Values beside each other along a new axis; -1 is behind the last one."""
        axis = axis if axis >= 0 else parts[0].rank + 1 + axis
        return self.concat([p.expand(axis) for p in parts], axis)

    def several(self, text: str, types: Sequence[TensorType]) -> tuple[Value, ...]:
        """Append a statement with these results."""
        name = self.name()
        self.write(f"{name}{f':{len(types)}' if len(types) > 1 else ''} = {text}")
        names = [f"{name}#{i}" for i in range(len(types))] if len(types) > 1 else [name]
        return tuple(Value(self, n, t.shape, t.dtype) for n, t in zip(names, types, strict=True))  # type: ignore[arg-type]

    def inner(self) -> Body:
        """The body of a region in this one, with names of its own."""
        return Body(f"%in_{self.name()[1:]}.", self.indent + "  ")  # a name that starts with a digit has only digits

    def region(self, types: Sequence[TensorType], compute: Callable[..., Sequence[Value]]) -> str:
        """A block of arguments of these types that returns what `compute` makes of them."""
        inner = self.inner()
        given = [Value(inner, inner.name(), t.shape, t.dtype) for t in types]  # type: ignore[arg-type]
        results = compute(*given)
        shown = ", ".join(f"{v.name}: {v.type}" for v in given)
        inner.write(_return("stablehlo.return", results))
        return "\n".join([f"{self.indent}^bb0({shown}):", *inner.lines])

    def loop(self, count: int, state: Sequence[Value], step: Callable[..., Sequence[Value]]) -> tuple[Value, ...]:
        """The state behind `count` steps; `step(i, *state)` gives the next one, i is int32 []."""
        start = [self.full(0, (), "int32"), *state]
        inner, more = self.inner(), self.inner()
        names = [inner.name() for _ in start]
        given = [Value(inner, n, v.shape, v.dtype) for n, v in zip(names, start, strict=True)]
        more.write(_return("stablehlo.return", [Value(more, names[0], (), "int32") < count]))
        inner.write(_return("stablehlo.return", [given[0] + 1, *step(*given)]))
        shown = ", ".join(f"{n} = {v.name}" for n, v in zip(names, start, strict=True))
        types = ", ".join(v.type for v in start)
        cond, do = "\n".join(more.lines), "\n".join(inner.lines)
        text = f"stablehlo.while({shown}) : {types}\n{self.indent}cond {{\n{cond}\n{self.indent}}} do {{\n{do}\n{self.indent}}}"
        return self.several(text, [TensorType(v.shape, v.dtype) for v in start])[1:]


def _return(word: str, values: Sequence[Value]) -> str:
    return f"{word} {', '.join(v.name for v in values)} : {', '.join(v.type for v in values)}"


@attrs.frozen(eq=False)
class Value:
    """A tensor in a body: a name, a shape, a dtype. Python numbers among operands take the value's dtype."""

    body: Body
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def rank(self) -> int:
        """Number of axes."""
        return len(self.shape)

    @property
    def type(self) -> str:
        """The type's text."""
        return type_text(self.shape, self.dtype)

    # --- Element by element ---------------------------------------------------------------------------------------------

    def unary(self, op: str) -> Value:
        """`stablehlo.op` of each element."""
        return self.body.value(f"stablehlo.{op} {self.name} : {self.type}", self.shape, self.dtype)

    def _pair(self, other: Value | Scalar) -> tuple[Value, Value]:
        if not isinstance(other, Value):
            return self, self.body.full(other, self.shape, self.dtype)
        if self.dtype != other.dtype:
            raise AssertionError(f"operands' dtypes differ: {self.type} and {other.type}")
        shape = broadcast(self.shape, other.shape)
        return self.broadcast(shape), other.broadcast(shape)  # type: ignore[arg-type]

    def binary(self, op: str, other: Value | Scalar) -> Value:
        """`stablehlo.op` of two operands."""
        a, b = self._pair(other)
        return self.body.value(f"stablehlo.{op} {a.name}, {b.name} : {a.type}", a.shape, a.dtype)

    def __add__(self, other: Value | Scalar) -> Value:
        return self.binary("add", other)

    def __sub__(self, other: Value | Scalar) -> Value:
        return self.binary("subtract", other)

    def __mul__(self, other: Value | Scalar) -> Value:
        return self.binary("multiply", other)

    def __truediv__(self, other: Value | Scalar) -> Value:
        """The quotient; of integers rounded towards zero."""
        return self.binary("divide", other)

    def __mod__(self, other: Value | Scalar) -> Value:
        """The remainder with the dividend's sign."""
        return self.binary("remainder", other)

    def __and__(self, other: Value | Scalar) -> Value:
        return self.binary("and", other)

    def __or__(self, other: Value | Scalar) -> Value:
        return self.binary("or", other)

    def __xor__(self, other: Value | Scalar) -> Value:
        return self.binary("xor", other)

    def __invert__(self) -> Value:
        return self.unary("not")

    def __neg__(self) -> Value:
        return self.unary("negate")

    def __rshift__(self, bits: int) -> Value:
        """Bits moved down; the sign stays."""
        return self.binary("shift_right_logical" if self.dtype == "uint8" else "shift_right_arithmetic", bits)

    def __lshift__(self, bits: int) -> Value:
        return self.binary("shift_left", bits)

    def maximum(self, other: Value | Scalar) -> Value:
        """The larger; NaN wins."""
        return self.binary("maximum", other)

    def minimum(self, other: Value | Scalar) -> Value:
        """The smaller; NaN wins."""
        return self.binary("minimum", other)

    def compare(self, how: str, other: Value | Scalar) -> Value:
        """bool: EQ, NE, LT, LE, GT or GE."""
        a, b = self._pair(other)
        kind = "FLOAT" if is_float(a.dtype) else "UNSIGNED" if a.dtype in ("bool", "uint8") else "SIGNED"
        result = type_text(a.shape, "bool")
        text = f"stablehlo.compare {how}, {a.name}, {b.name}, {kind} : ({a.type}, {b.type}) -> {result}"
        return self.body.value(text, a.shape, "bool")

    def __lt__(self, other: Value | Scalar) -> Value:
        return self.compare("LT", other)

    def __le__(self, other: Value | Scalar) -> Value:
        return self.compare("LE", other)

    def __gt__(self, other: Value | Scalar) -> Value:
        return self.compare("GT", other)

    def __ge__(self, other: Value | Scalar) -> Value:
        return self.compare("GE", other)

    def equals(self, other: Value | Scalar) -> Value:
        """bool: a == b."""
        return self.compare("EQ", other)

    def differs(self, other: Value | Scalar) -> Value:
        """bool: a != b; a value differs from itself where it is NaN."""
        return self.compare("NE", other)

    def isfinite(self) -> Value:
        """bool: whether an element is neither NaN nor infinite."""
        result = type_text(self.shape, "bool")
        return self.body.value(f"stablehlo.is_finite {self.name} : ({self.type}) -> {result}", self.shape, "bool")

    def isnan(self) -> Value:
        """bool: whether an element is NaN."""
        return self.differs(self)

    def select(self, a: Value | Scalar, b: Value | Scalar) -> Value:
        """`a` where this bool holds, else `b`; at least one of them is a Value."""
        known = a if isinstance(a, Value) else b
        assert isinstance(known, Value)
        shape = broadcast(self.shape, *(v.shape for v in (a, b) if isinstance(v, Value)))
        x, y = (
            v.broadcast(shape) if isinstance(v, Value) else self.body.full(v, shape, known.dtype)  # type: ignore[arg-type]
            for v in (a, b)
        )
        where = self.broadcast(shape)  # type: ignore[arg-type]
        text = f"stablehlo.select {where.name}, {x.name}, {y.name} : {where.type}, {x.type}"
        return self.body.value(text, x.shape, x.dtype)

    def astype(self, dtype: str) -> Value:
        """Another dtype: floats to integers truncate, anything to bool is `!= 0`."""
        if dtype == self.dtype:
            return self
        if dtype == "bool":
            return self.differs(0)
        result = type_text(self.shape, dtype)
        return self.body.value(f"stablehlo.convert {self.name} : ({self.type}) -> {result}", self.shape, dtype)

    def wide(self) -> Value:
        """Half precision as float32; anything else as it is."""
        return self.astype("float32") if self.dtype in HALF else self

    def rounded(self, dtype: str) -> Value:
        """This float32 rounded to a dtype of half precision, still float32 (a compiler may drop two conversions instead)."""
        form = {"float16": "e5m10", "bfloat16": "e8m7"}[dtype]
        return self.body.value(
            f"stablehlo.reduce_precision {self.name}, format = {form} : {self.type}", self.shape, self.dtype
        )

    def bits(self, dtype: str) -> Value:
        """The same bits: of as many bits each, into a last axis of smaller parts, or out of one."""
        a, b = numpy_dtype(self.dtype).itemsize, numpy_dtype(dtype).itemsize
        shape = self.shape if a == b else (*self.shape, a // b) if a > b else self.shape[:-1]
        result = type_text(shape, dtype)
        return self.body.value(f"stablehlo.bitcast_convert {self.name} : ({self.type}) -> {result}", shape, dtype)

    # --- Moves ----------------------------------------------------------------------------------------------------------

    def broadcast(self, shape: Sequence[int]) -> Value:
        """Repeated to `shape`, as in NumPy."""
        if tuple(shape) == self.shape:
            return self
        dims = range(len(shape) - self.rank, len(shape))
        result = type_text(shape, self.dtype)
        text = f"stablehlo.broadcast_in_dim {self.name}, dims = {_list(dims)} : ({self.type}) -> {result}"
        return self.body.value(text, shape, self.dtype)

    def reshape(self, *shape: int) -> Value:
        """The same elements, row-major; one size may be -1."""
        if -1 in shape:
            rest = -math.prod(shape)
            shape = tuple(math.prod(self.shape) // rest if n == -1 else n for n in shape)
        if shape == self.shape:
            return self
        result = type_text(shape, self.dtype)
        return self.body.value(f"stablehlo.reshape {self.name} : ({self.type}) -> {result}", shape, self.dtype)

    def expand(self, axis: int) -> Value:
        """A new axis of size 1; -1 is behind the last one."""
        at = axis if axis >= 0 else self.rank + 1 + axis
        return self.reshape(*self.shape[:at], 1, *self.shape[at:])

    def transpose(self, *perm: int) -> Value:
        """Axis i of the result is axis perm[i]."""
        if tuple(perm) == tuple(range(self.rank)):
            return self
        shape = tuple(self.shape[p] for p in perm)
        result = type_text(shape, self.dtype)
        text = f"stablehlo.transpose {self.name}, dims = {_list(perm)} : ({self.type}) -> {result}"
        return self.body.value(text, shape, self.dtype)

    def slice(self, starts: Sequence[int], stops: Sequence[int], steps: Sequence[int] | None = None) -> Value:
        """Elements starts:stops:steps along every axis."""
        steps = steps or [1] * self.rank
        shape = tuple(max(-(-(b - a) // s), 0) for a, b, s in zip(starts, stops, steps, strict=True))
        if shape == self.shape:
            return self
        cuts = [f"{a}:{b}" + (f":{s}" if s != 1 else "") for a, b, s in zip(starts, stops, steps, strict=True)]
        result = type_text(shape, self.dtype)
        text = f"stablehlo.slice {self.name} [{', '.join(cuts)}] : ({self.type}) -> {result}"
        return self.body.value(text, shape, self.dtype)

    def part(self, axis: int, start: int, stop: int, step: int = 1) -> Value:
        """Elements start:stop:step along one axis."""
        axis %= self.rank
        starts, stops, steps = [0] * self.rank, list(self.shape), [1] * self.rank
        starts[axis], stops[axis], steps[axis] = start, stop, step
        return self.slice(starts, stops, steps)

    def pick(self, axis: int, index: int) -> Value:
        """One index of an axis, which goes away."""
        axis %= self.rank
        return self.part(axis, index, index + 1).reshape(*self.shape[:axis], *self.shape[axis + 1 :])

    def pad(
        self, low: Sequence[int], high: Sequence[int], interior: Sequence[int] | None = None, value: Value | Scalar = 0
    ) -> Value:
        """`value` before, behind and between the elements of each axis."""
        gaps = interior or [0] * self.rank
        shape = tuple(n + a + b + max(n - 1, 0) * g for n, a, b, g in zip(self.shape, low, high, gaps, strict=True))
        if shape == self.shape:
            return self
        fill = value if isinstance(value, Value) else self.body.full(value, (), self.dtype)
        how = f"low = {_list(low)}, high = {_list(high)}, interior = {_list(gaps)}"
        types = f"({self.type}, {fill.type}) -> {type_text(shape, self.dtype)}"
        return self.body.value(f"stablehlo.pad {self.name}, {fill.name}, {how} : {types}", shape, self.dtype)

    def padded(self, axis: int, size: int) -> Value:
        """Zeros behind one axis, up to `size`."""
        axis %= self.rank
        return self.pad([0] * self.rank, [size - n if i == axis else 0 for i, n in enumerate(self.shape)])

    def reverse(self, axes: Sequence[int]) -> Value:
        """Elements in reverse order along `axes`."""
        text = f"stablehlo.reverse {self.name}, dims = {_list(axes)} : {self.type}"
        return self.body.value(text, self.shape, self.dtype) if len(axes) else self

    # --- Reductions -----------------------------------------------------------------------------------------------------

    def reduce(self, kind: str, axes: Sequence[int], keepdims: bool = False) -> Value:
        """`kind` (add, multiply, maximum, minimum, or, and) over axes, from the kind's neutral element."""
        axes = sorted(a % self.rank for a in axes)
        shape = tuple(n for i, n in enumerate(self.shape) if i not in axes)
        init = self.body.full(neutral(kind, self.dtype), (), self.dtype)
        text = (
            f"stablehlo.reduce({self.name} init: {init.name}) applies stablehlo.{kind} across dimensions = {_list(axes)}"
            f" : ({self.type}, {init.type}) -> {type_text(shape, self.dtype)}"
        )
        found = self.body.value(text, shape, self.dtype) if axes else self
        return found.reshape(*(1 if i in axes else n for i, n in enumerate(self.shape))) if keepdims else found

    def sum(self, *axes: int, keepdims: bool = False) -> Value:
        """Sum over axes."""
        return self.reduce("add", axes, keepdims)

    def max(self, *axes: int, keepdims: bool = False) -> Value:
        """Largest element over axes; NaN wins."""
        return self.reduce("maximum", axes, keepdims)

    def min(self, *axes: int, keepdims: bool = False) -> Value:
        """Smallest element over axes; NaN wins."""
        return self.reduce("minimum", axes, keepdims)

    def mean(self, axis: int, keepdims: bool = False) -> Value:
        """Mean over an axis."""
        return self.sum(axis, keepdims=keepdims) / self.shape[axis]

    def scan(self, kind: str, axis: int) -> Value:
        """Running `kind` (as in `reduce`) along an axis: a window that reaches back to the first element."""
        axis %= self.rank
        n = self.shape[axis]
        if math.prod(self.shape) == 0:
            return self
        init = self.body.full(neutral(kind, self.dtype), (), self.dtype)
        scalar = TensorType((), self.dtype)
        block = self.body.region([scalar, scalar], lambda a, b: [a.binary(kind, b)])
        window = [n if i == axis else 1 for i in range(self.rank)]
        ones = [1] * self.rank
        padding = ", ".join(f"[{n - 1 if i == axis else 0}, 0]" for i in range(self.rank))
        how = (
            f"base_dilations = {_i64s(ones)}, padding = dense<[{padding}]> : tensor<{self.rank}x2xi64>, window_dilations = "
            f"{_i64s(ones)}, window_dimensions = {_i64s(window)}, window_strides = {_i64s(ones)}"
        )
        text = (
            f'"stablehlo.reduce_window"({self.name}, {init.name}) <{{{how}}}> ({{\n{block}\n{self.body.indent}}})'
            f" : ({self.type}, {init.type}) -> {self.type}"
        )
        return self.body.value(text, self.shape, self.dtype)

    # --- Products -------------------------------------------------------------------------------------------------------

    def dot(
        self,
        other: Value,
        contract: tuple[int, int],
        batch: Sequence[tuple[int, int]] = (),
        *,
        to: str,
        exact: bool = True,
    ) -> Value:
        """The product over one axis of each: axes are the batch's, then the rest of this, then the rest of the other.

        to: the dtype in which products are summed. exact: floats are multiplied in their own precision; else a matrix unit may round
        them to bfloat16 first, as it does by default.
        """
        left, right = (c % v.rank for c, v in zip(contract, (self, other), strict=True))
        both = ([a for a, _ in batch], [b for _, b in batch])
        shape = (
            *(self.shape[a] for a in both[0]),
            *(n for i, n in enumerate(self.shape) if i != left and i not in both[0]),
            *(n for i, n in enumerate(other.shape) if i != right and i not in both[1]),
        )
        how = f"batching_dims = {_list(both[0])} x {_list(both[1])}, " if batch else ""
        how += f"contracting_dims = [{left}] x [{right}]"
        if exact and {self.dtype, other.dtype} & {"float16", "float32"}:
            how += ", precision = [HIGHEST, HIGHEST]"
        types = f"({self.type}, {other.type}) -> {type_text(shape, to)}"
        return self.body.value(f"stablehlo.dot_general {self.name}, {other.name}, {how} : {types}", shape, to)

    # --- Places ---------------------------------------------------------------------------------------------------------

    def dynamic_slice(self, starts: Sequence[Value], sizes: Sequence[int]) -> Value:
        """A block of `sizes` that starts at int32 [] `starts`, moved inside where it would stick out."""
        shown = ", ".join(s.name for s in starts)
        types = ", ".join([self.type, *(s.type for s in starts)])
        text = f"stablehlo.dynamic_slice {self.name}, {shown}, sizes = {_list(sizes)} : ({types}) -> {type_text(sizes, self.dtype)}"
        return self.body.value(text, sizes, self.dtype)

    def dynamic_update(self, new: Value, starts: Sequence[Value]) -> Value:
        """`new` put at int32 [] `starts`, moved inside where it would stick out."""
        shown = ", ".join(v.name for v in (self, new, *starts))
        types = ", ".join(v.type for v in (self, new, *starts))
        return self.body.value(
            f"stablehlo.dynamic_update_slice {shown} : ({types}) -> {self.type}", self.shape, self.dtype
        )

    def take(self, indices: Value, axis: int) -> Value:
        """Slices along `axis`, one per index; indices outside are moved to the nearest end."""
        axis %= self.rank
        n = indices.rank
        shape = (*self.shape[:axis], *indices.shape, *self.shape[axis + 1 :])
        offset = [i for i in range(len(shape)) if not axis <= i < axis + n]
        sizes = [1 if i == axis else size for i, size in enumerate(self.shape)]
        how = f"offset_dims = {_list(offset)}, collapsed_slice_dims = [{axis}], start_index_map = [{axis}], index_vector_dim = {n}"
        return self._gather(indices, how, sizes, shape)

    def at(self, places: Value, axes: Sequence[int] | None = None) -> Value:
        """What lies at places int32 [..., len(axes)] (default: all axes): [..., the other axes in order]."""
        axes = range(self.rank) if axes is None else axes
        lead = places.shape[:-1]
        rest = [n for i, n in enumerate(self.shape) if i not in axes]
        how = f"offset_dims = {_list(range(len(lead), len(lead) + len(rest)))}, " if rest else ""
        how += f"collapsed_slice_dims = {_list(axes)}, start_index_map = {_list(axes)}, index_vector_dim = {len(lead)}"
        return self._gather(places, how, [1 if i in axes else n for i, n in enumerate(self.shape)], (*lead, *rest))

    def _gather(self, indices: Value, how: str, sizes: Sequence[int], shape: Sequence[int]) -> Value:
        text = (
            f'"stablehlo.gather"({self.name}, {indices.name}) <{{dimension_numbers = #stablehlo.gather<{how}>, indices_are_sorted = '
            f"false, slice_sizes = {_i64s(sizes)}}}> : ({self.type}, {indices.type}) -> {type_text(shape, self.dtype)}"
        )
        return self.body.value(text, shape, self.dtype)

    def scatter(
        self, places: Value, updates: Value, axes: Sequence[int], kind: str = "", unique: bool = False
    ) -> Value:
        """`updates` put at (or by `kind` combined into) places int32 [..., len(axes)].

        updates: [..., the other axes in order]; later ones win, where places are not `unique` (so the CPU does it; the specification
        leaves the order open). A place outside is left out.
        """
        scalar = TensorType((), self.dtype)
        block = self.body.region([scalar, scalar], lambda a, b: [a.binary(kind, b) if kind else b])
        lead = places.rank - 1
        how = (
            f"update_window_dims = {_list(range(lead, updates.rank))}, inserted_window_dims = {_list(axes)}, "
            f"scatter_dims_to_operand_dims = {_list(axes)}, index_vector_dim = {lead}"
        )
        text = (
            f'"stablehlo.scatter"({self.name}, {places.name}, {updates.name}) <{{indices_are_sorted = false, '
            f"scatter_dimension_numbers = #stablehlo.scatter<{how}>, unique_indices = {str(unique).lower()}}}> ({{\n{block}\n"
            f"{self.body.indent}}}) : ({self.type}, {places.type}, {updates.type}) -> {self.type}"
        )
        return self.body.value(text, self.shape, self.dtype)


def neutral(kind: str, dtype: str) -> Scalar:
    """What `kind` of reduction starts from."""
    if kind in ("add", "or"):
        return 0
    if kind == "multiply" or (kind == "and" and dtype == "bool"):
        return 1
    if dtype == "bool":
        return kind == "minimum"
    if is_float(dtype):
        return -math.inf if kind == "maximum" else math.inf
    info = np.iinfo(numpy_dtype(dtype))
    return int(info.min if kind == "maximum" else info.max)
