"""Reductions and scans. Half-precision sums accumulate in float32; integers wrap as two's complement."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from jisu.compiler.graph import Op, defop
from jisu.compiler.ops.elementwise import widened
from jisu.compiler.ops.shape import require_axes, require_axis
from jisu.compiler.types import TensorType, is_float, require

Samples = Iterator[tuple[tuple[str | None, ...], dict[str, Any]]]


def _reduce_axes(x: TensorType, *, axes: tuple[int, ...], keepdims: bool) -> str:
    inside = [f"a{i}" for i in range(x.rank)]
    out = [("1" if i in axes else n) for i, n in enumerate(inside) if keepdims or i not in axes]
    return f"{' '.join(inside)} -> {' '.join(out)}"


def _reduced(x: TensorType, axes: tuple[int, ...], keepdims: bool) -> TensorType:
    require_axes(axes, x.rank)
    return x.with_shape(*(1 if i in axes else d for i, d in enumerate(x.shape) if keepdims or i not in axes))


def _samples(dtype: str) -> Callable[[], Samples]:
    def make() -> Samples:
        yield (f"{dtype}[2, 3, 4]",), {"axes": (0, 2), "keepdims": True}
        yield (f"{dtype}[2, 3]",), {"axes": (1,), "keepdims": False}

    return make


def _reduction(name: str, function: Callable[..., Any], doc: str, kind: str) -> Op:
    def rule(x: TensorType, *, axes: tuple[int, ...], keepdims: bool = False) -> TensorType:
        require((x.dtype == "bool") == (kind == "bool"), f"needs {'bools' if kind == 'bool' else 'numbers'}, got {x}")
        if kind == "nonempty":
            require(not any(x.shape[a] == 0 for a in axes), f"an empty axis of {x} has no {name}")
        return _reduced(x, axes, keepdims)

    def meaning(x: np.ndarray, *, axes: tuple[int, ...], keepdims: bool = False) -> np.ndarray:
        return np.asarray(function(x, axis=tuple(axes), keepdims=keepdims)).astype(x.dtype)

    rule.__doc__ = doc
    return defop(
        meaning=widened(meaning),
        axes=_reduce_axes,
        name=name,
        samples=_samples("bool" if kind == "bool" else "float32"),
    )(rule)


sum_ = _reduction("sum", np.sum, "Sum over axes.", "number")
prod = _reduction("prod", np.prod, "Product over axes.", "number")
reduce_max = _reduction("reduce_max", np.max, "Largest element over axes; NaN wins.", "nonempty")
reduce_min = _reduction("reduce_min", np.min, "Smallest element over axes; NaN wins.", "nonempty")
any_ = _reduction("any", np.any, "Whether any element over axes holds.", "bool")
all_ = _reduction("all", np.all, "Whether all elements over axes hold.", "bool")


def _arg_axes(x: TensorType, *, axis: int) -> str:
    inside = [f"a{i}" for i in range(x.rank)]
    return f"{' '.join(inside)} -> {' '.join(n for i, n in enumerate(inside) if i != axis)}"


def _arg_samples() -> Samples:
    yield ("float32[2, 3]",), {"axis": 1}
    yield ("int64[4]",), {"axis": 0}


def _arg(function: Callable[..., Any]) -> Callable[..., Any]:
    def meaning(x: np.ndarray, *, axis: int) -> np.ndarray:
        wide = x.astype(np.float32) if x.dtype.itemsize == 2 and x.dtype.kind not in "iu" else x
        return np.asarray(function(wide, axis)).astype(np.int64)

    return meaning


@defop(meaning=_arg(np.argmax), axes=_arg_axes, samples=_arg_samples)
def argmax(x: TensorType, *, axis: int) -> TensorType:
    """int64 index of the largest element along one axis: the first of equals; the first NaN wins."""
    require_axis(axis, x.rank)
    require(x.shape[axis] != 0, f"an empty axis of {x} has no largest element")
    return TensorType(tuple(d for i, d in enumerate(x.shape) if i != axis), "int64")


@defop(meaning=_arg(np.argmin), axes=_arg_axes, samples=_arg_samples)
def argmin(x: TensorType, *, axis: int) -> TensorType:
    """int64 index of the smallest element along one axis: the first of equals; the first NaN wins."""
    require_axis(axis, x.rank)
    require(x.shape[axis] != 0, f"an empty axis of {x} has no smallest element")
    return TensorType(tuple(d for i, d in enumerate(x.shape) if i != axis), "int64")


def _scan(x: np.ndarray, *, axis: int, kind: str) -> np.ndarray:
    function = {"sum": np.cumsum, "prod": np.cumprod, "max": np.maximum.accumulate, "min": np.minimum.accumulate}[kind]
    return np.asarray(function(x, axis=axis)).astype(x.dtype)  # type: ignore[operator]


def _scan_axes(x: TensorType, *, axis: int, kind: str) -> str:
    inside = " ".join("t<" if i == axis else f"a{i}" for i in range(x.rank))
    return f"{inside} -> {inside}"


def _scan_samples() -> Samples:
    yield ("float32[2, 3]",), {"axis": 1, "kind": "sum"}
    yield ("int64[4]",), {"axis": 0, "kind": "max"}
    yield ("float32[2, 3]",), {"axis": 0, "kind": "prod"}


@defop(meaning=widened(_scan), axes=_scan_axes, samples=_scan_samples)
def scan(x: TensorType, *, axis: int, kind: str) -> TensorType:
    """Running sum, prod, max or min along one axis (NaN wins in max and min)."""
    require_axis(axis, x.rank)
    require(kind in ("sum", "prod", "max", "min"), f"kind is sum, prod, max or min, not {kind!r}")
    require(x.dtype != "bool", f"needs numbers, got {x}")
    return x


def _softmax(x: np.ndarray, *, axis: int) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        e = np.exp(x - np.max(x, axis, keepdims=True, initial=-np.inf))
    return e / np.sum(e, axis, keepdims=True)


def _softmax_axes(x: TensorType, *, axis: int) -> str:
    inside = " ".join("s!" if i == axis else f"a{i}" for i in range(x.rank))
    return f"{inside} -> {inside}"


@defop(
    meaning=widened(_softmax), axes=_softmax_axes, flops=10, samples=lambda: iter([(("float32[2, 3]",), {"axis": 1})])
)
def softmax(x: TensorType, *, axis: int) -> TensorType:
    """exp(x) normalised to sum 1 along one axis; a row of -inf gives NaN."""
    require_axis(axis, x.rank)
    require(is_float(x.dtype), f"needs a floating-point operand, got {x}")
    return x
