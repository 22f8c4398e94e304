"""Ops that move, repeat or select elements by position; none of them computes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jisu.compiler.graph import defop
from jisu.compiler.types import (
    Dim,
    TensorType,
    TupleType,
    TypeRuleError,
    dim,
    numpy_dtype,
    product,
    require,
    same_dim,
)

Samples = Iterator[tuple[tuple[str | None, ...], dict[str, Any]]]


def names(rank: int, prefix: str = "a") -> list[str]:
    """`rank` distinct axis names."""
    return [f"{prefix}{i}" for i in range(rank)]


def require_axis(axis: int, rank: int) -> None:
    """Axes in the IR are never negative."""
    require(isinstance(axis, int) and 0 <= axis < rank, f"axis {axis} is outside 0..{rank - 1}")


def require_axes(axes: tuple[int, ...], rank: int) -> None:
    """Distinct, sorted, never negative."""
    for axis in axes:
        require_axis(axis, rank)
    require(tuple(sorted(set(axes))) == tuple(axes), f"axes {axes} must be distinct and sorted")


def _reshape_samples() -> Samples:
    yield ("float32[2, 3, 4]",), {"shape": (6, 4)}
    yield ("int64[4]",), {"shape": (2, 1, 2)}


@defop(meaning=lambda x, *, shape: np.reshape(x, shape), flops=0, samples=_reshape_samples)
def reshape(x: TensorType, *, shape: tuple[Dim, ...]) -> TensorType:
    """The same elements, row-major, in another shape of equal size."""
    if not same_dim(x.size, product(shape)):
        raise TypeRuleError(f"{x} has {x.size} elements, shape {shape} has {product(shape)}")
    return x.with_shape(*shape)


def reshape_groups(old: tuple[Dim, ...], new: tuple[Dim, ...]) -> list[tuple[tuple[int, ...], tuple[int, ...]]] | None:
    """Split a reshape into the finest groups of old axes that become groups of new axes with the same product.

    None where the symbolic products can't be matched.
    """
    groups = []
    i = j = 0
    while i < len(old) or j < len(new):
        left, right = [], []
        a: Dim = 1
        b: Dim = 1
        if i < len(old):
            a, left, i = old[i], [i], i + 1
        if j < len(new):
            b, right, j = new[j], [j], j + 1
        while not same_dim(a, b):
            grow_left = i < len(old) and (j >= len(new) or _divides(a, b) or not _divides(b, a))
            if grow_left:
                a, left, i = product((a, old[i])), [*left, i], i + 1
            elif j < len(new):
                b, right, j = product((b, new[j])), [*right, j], j + 1
            else:
                return None
        groups.append((tuple(left), tuple(right)))
    return groups


def _divides(a: Dim, b: Dim) -> bool:
    """Whether a divides b with a quotient other than 1 (symbolically, where needed)."""
    if a == 0 or b == 0:
        return False
    if isinstance(a, int) and isinstance(b, int):
        return b % a == 0 and abs(b) > abs(a)
    import sympy

    quotient = sympy.cancel(sympy.sympify(b) / a)
    numerator, denominator = quotient.as_numer_denom()
    return bool(denominator == 1 and numerator != 1)


def _transpose_axes(x: TensorType, *, perm: tuple[int, ...]) -> str:
    letters = names(x.rank)
    return f"{' '.join(letters)} -> {' '.join(letters[p] for p in perm)}"


def _transpose_samples() -> Samples:
    yield ("float32[2, 3, 4]",), {"perm": (1, 0, 2)}
    yield ("bool[2, 3]",), {"perm": (1, 0)}


@defop(meaning=lambda x, *, perm: np.transpose(x, perm), axes=_transpose_axes, flops=0, samples=_transpose_samples)
def transpose(x: TensorType, *, perm: tuple[int, ...]) -> TensorType:
    """Axis i of the result is axis perm[i] of the operand."""
    require(sorted(perm) == list(range(x.rank)), f"perm {perm} doesn't permute the {x.rank} axes of {x}")
    return x.with_shape(*(x.shape[p] for p in perm))


def _broadcast_axes(x: TensorType, *, shape: tuple[Dim, ...]) -> str:
    letters = names(len(shape))
    return f"{' '.join(letters[len(shape) - x.rank :])} -> {' '.join(letters)}"


def _broadcast_samples() -> Samples:
    yield ("float32[3, 1]",), {"shape": (2, 3, 4)}
    yield ("int64[]",), {"shape": (3,)}


@defop(meaning=lambda x, *, shape: np.broadcast_to(x, shape), axes=_broadcast_axes, flops=0, samples=_broadcast_samples)
def broadcast_to(x: TensorType, *, shape: tuple[Dim, ...]) -> TensorType:
    """Repeat axes of size 1, and new leading axes, to reach `shape`."""
    require(len(shape) >= x.rank, f"{x} has more axes than {shape}")
    for have, want in zip(x.shape, shape[len(shape) - x.rank :], strict=True):
        require(have == 1 or same_dim(have, want), f"{x} doesn't broadcast to {shape}")
    return x.with_shape(*shape)


def slice_length(start: Dim, stop: Dim, step: int) -> Dim:
    """Number of elements of start:stop:step, for 0 <= start <= stop."""
    span = dim(stop - start)
    return span if step == 1 else dim((span + step - 1) // step)


def _slice_axes(x: TensorType, *, starts: Any, stops: Any, steps: Any) -> str:
    marks = [
        "" if a == 0 and same_dim(b, n) and s == 1 else "!"
        for a, b, s, n in zip(starts, stops, steps, x.shape, strict=True)
    ]
    inside = [f"a{i}{m}" for i, m in enumerate(marks)]
    return f"{' '.join(inside)} -> {' '.join(inside)}"


def _slice_samples() -> Samples:
    yield ("float32[5, 4]",), {"starts": (1, 0), "stops": (5, 3), "steps": (2, 1)}
    yield ("int64[3]",), {"starts": (0,), "stops": (0,), "steps": (1,)}


@defop(
    meaning=lambda x, *, starts, stops, steps: x[tuple(slice(*k) for k in zip(starts, stops, steps, strict=True))],
    axes=_slice_axes,
    flops=0,
    samples=_slice_samples,
    name="slice",
)
def slice_(x: TensorType, *, starts: tuple[Dim, ...], stops: tuple[Dim, ...], steps: tuple[int, ...]) -> TensorType:
    """Elements starts:stops:steps along every axis, with 0 <= start <= stop <= size and step >= 1."""
    require(len(starts) == len(stops) == len(steps) == x.rank, f"starts, stops and steps need {x.rank} entries each")
    shape = []
    for a, b, s, n in zip(starts, stops, steps, x.shape, strict=True):
        require(isinstance(s, int) and s >= 1, f"step {s} must be at least 1")
        if isinstance(a, int) and isinstance(b, int):
            require(0 <= a <= b, f"slice {a}:{b} is not in order")
            require(not isinstance(n, int) or b <= n, f"slice {a}:{b} leaves the axis of size {n}")
        shape.append(slice_length(a, b, s))
    return x.with_shape(*shape)


def _concat_axes(*types: TensorType, axis: int) -> str:
    letters = [f"a{i}" for i in range(types[0].rank)]
    # The axis has another size in each part, so each part names it for itself.
    parts = [" ".join(f"cat{k}" if i == axis else name for i, name in enumerate(letters)) for k in range(len(types))]
    return f"{', '.join(parts)} -> {' '.join('joined' if i == axis else name for i, name in enumerate(letters))}"


def _concat_samples() -> Samples:
    yield ("float32[2, 3]", "float32[2, 1]"), {"axis": 1}
    yield ("int64[2]", "int64[0]", "int64[3]"), {"axis": 0}


@defop(meaning=lambda *xs, axis: np.concatenate(xs, axis), axes=_concat_axes, flops=0, samples=_concat_samples)
def concat(*xs: TensorType, axis: int) -> TensorType:
    """Operands behind each other along one axis."""
    require(len(xs) > 0, "needs at least one operand")
    require_axis(axis, xs[0].rank)
    total: Dim = 0
    for x in xs:
        require(x.dtype == xs[0].dtype and x.rank == xs[0].rank, f"operands differ: {xs[0]} and {x}")
        rest = [(p, q) for i, (p, q) in enumerate(zip(x.shape, xs[0].shape, strict=True)) if i != axis]
        require(all(same_dim(p, q) for p, q in rest), f"operands differ beside axis {axis}: {xs[0]} and {x}")
        total = total + x.shape[axis]
    return xs[0].with_shape(*(dim(total) if i == axis else d for i, d in enumerate(xs[0].shape)))


def _pad(x: np.ndarray, value: np.ndarray, *, low: Any, high: Any, interior: Any) -> np.ndarray:
    shape = [lo + hi + n + max(n - 1, 0) * i for n, lo, hi, i in zip(x.shape, low, high, interior, strict=True)]
    result = np.full(shape, value, x.dtype)
    result[tuple(slice(lo, size - hi, i + 1) for lo, hi, i, size in zip(low, high, interior, shape, strict=True))] = x
    return result


def _pad_axes(x: TensorType, value: TensorType, *, low: Any, high: Any, interior: Any) -> str:
    inside, out = [], []
    for i, change in enumerate(zip(low, high, interior, strict=True)):
        same = all(c == 0 for c in change)
        inside.append(f"a{i}")
        out.append(f"a{i}" if same else f"p{i}")
    return f"{' '.join(inside)}, -> {' '.join(out)}"


def _pad_samples() -> Samples:
    yield ("float32[2, 3]", "float32[]"), {"low": (1, 0), "high": (0, 2), "interior": (0, 1)}
    yield ("int64[2]", "int64[]"), {"low": (0,), "high": (3,), "interior": (0,)}


@defop(meaning=_pad, axes=_pad_axes, flops=0, samples=_pad_samples)
def pad(
    x: TensorType, value: TensorType, *, low: tuple[Dim, ...], high: tuple[Dim, ...], interior: tuple[int, ...]
) -> TensorType:
    """Put `value` (a scalar) before, behind and between (`interior` per gap) the elements of each axis."""
    require(len(low) == len(high) == len(interior) == x.rank, f"low, high and interior need {x.rank} entries each")
    require(value.rank == 0 and value.dtype == x.dtype, f"the padding value must be a scalar {x.dtype}, got {value}")
    shape = []
    for n, lo, hi, gap in zip(x.shape, low, high, interior, strict=True):
        require(not any(isinstance(k, int) and k < 0 for k in (lo, hi, gap)), "padding can't be negative; use slice")
        shape.append(dim(n + lo + hi + (n - 1) * gap if gap else n + lo + hi))
    return x.with_shape(*shape)


def _flip_axes(x: TensorType, *, axes: tuple[int, ...]) -> str:
    inside = " ".join(f"a{i}{'!' if i in axes else ''}" for i in range(x.rank))
    return f"{inside} -> {inside}"


def _flip_samples() -> Samples:
    yield ("float32[2, 3]",), {"axes": (1,)}


@defop(meaning=lambda x, *, axes: np.flip(x, axes), axes=_flip_axes, flops=0, samples=_flip_samples)
def flip(x: TensorType, *, axes: tuple[int, ...]) -> TensorType:
    """Elements in reverse order along `axes`."""
    require_axes(axes, x.rank)
    return x


def _iota_samples() -> Samples:
    yield (), {"extent": 5, "dtype": "int64"}


@defop(meaning=lambda *, extent, dtype: np.arange(extent).astype(numpy_dtype(dtype)), flops=0, samples=_iota_samples)
def iota(*, extent: Dim, dtype: str = "int64") -> TensorType:
    """0, 1, … extent - 1."""
    require(dtype != "bool", "iota makes numbers")
    return TensorType((extent,), dtype)


@defop(meaning=lambda *, value: np.asarray(value, np.int64), flops=0, samples=lambda: iter([((), {"value": 7})]))
def dim_value(*, value: Dim) -> TensorType:
    """A symbolic dimension as an int64 scalar."""
    return TensorType((), "int64")


def _windows(x: np.ndarray, *, axes: Any, sizes: Any, strides: Any, dilations: Any) -> np.ndarray:
    result = x
    for k, (axis, size, stride, dilation) in enumerate(zip(axes, sizes, strides, dilations, strict=True)):
        count = (x.shape[axis] - dilation * (size - 1) - 1) // stride + 1
        index = np.arange(max(count, 0))[:, None] * stride + np.arange(size) * dilation
        result = np.moveaxis(np.take(result, index, axis), axis + 1, x.ndim + k)
    return result


def _windows_axes(x: TensorType, *, axes: Any, sizes: Any, strides: Any, dilations: Any) -> str:
    inside = [f"a{i}" for i in range(x.rank)]
    out = [f"w{i}" if i in axes else f"a{i}" for i in range(x.rank)] + [f"k{i}" for i in axes]
    return f"{' '.join(inside)} -> {' '.join(out)}"


def _windows_samples() -> Samples:
    yield ("float32[2, 5, 6]",), {"axes": (1, 2), "sizes": (2, 3), "strides": (1, 2), "dilations": (2, 1)}


@defop(meaning=_windows, axes=_windows_axes, flops=0, samples=_windows_samples)
def windows(
    x: TensorType,
    *,
    axes: tuple[int, ...],
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    dilations: tuple[int, ...],
) -> TensorType:
    """Sliding windows along `axes`; each axis becomes the window's position, and its inside a new last axis."""
    require_axes(axes, x.rank)
    require(
        len(axes) == len(sizes) == len(strides) == len(dilations), "axes, sizes, strides, dilations differ in length"
    )
    shape = list(x.shape)
    for axis, size, stride, dilation in zip(axes, sizes, strides, dilations, strict=True):
        span = dilation * (size - 1) + 1
        require(min(size, stride, dilation) >= 1, "sizes, strides and dilations must be at least 1")
        n = x.shape[axis]
        require(not isinstance(n, int) or n >= span, f"windows of span {span} don't fit into axis {axis} of {x}")
        shape[axis] = dim(n - span + 1) if stride == 1 else dim((n - span) // stride + 1)
    return x.with_shape(*shape, *sizes)


def _get_samples() -> Samples:
    return iter(())


@defop(meaning=lambda xs, *, index: xs[index], flops=0, samples=_get_samples)
def get(xs: TupleType, *, index: int) -> TensorType:
    """One result of an op with several."""
    require(isinstance(xs, TupleType), "get reads from an op with several results")
    require(0 <= index < len(xs.items), f"index {index} is outside 0..{len(xs.items) - 1}")
    return xs.items[index]
