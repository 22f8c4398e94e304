"""Ops that select elements by index tensors. Indices run from -size to size - 1; others are an error at run time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jisu.compiler.errors import IndexOutOfRangeError
from jisu.compiler.graph import defop
from jisu.compiler.ops.elementwise import widened
from jisu.compiler.ops.shape import require_axis
from jisu.compiler.types import TensorType, TupleType, is_integer, require, same_dim

Samples = Iterator[tuple[tuple[str | None, ...], dict[str, Any]]]


def _checked(indices: np.ndarray, size: int, wrap: bool = True) -> np.ndarray:
    wrong = (indices < (-size if wrap else 0)) | (indices >= size)
    if wrong.any():
        raise IndexOutOfRangeError(f"index {indices[wrong][0]} is out of range for an axis of size {size}")
    return np.where(indices < 0, indices + size, indices)


def _take(x: np.ndarray, indices: np.ndarray, *, axis: int, wrap: bool = True) -> np.ndarray:
    return np.take(x, _checked(indices, x.shape[axis], wrap), axis)


def _take_axes(x: TensorType, indices: TensorType, *, axis: int, wrap: bool = True) -> str:
    inside = [f"a{i}" for i in range(x.rank)]
    index = [f"i{i}" for i in range(indices.rank)]
    return f"{' '.join(inside)}, {' '.join(index)} -> {' '.join(inside[:axis] + index + inside[axis + 1 :])}"


def _take_samples() -> Samples:
    yield ("float32[4, 3]", "int64[2, 2] < 4"), {"axis": 0}
    yield ("int64[2, 3]", "int64[] < 3"), {"axis": 1}
    yield ("float32[4, 3]", "int64[2] < 4"), {"axis": 0, "wrap": False}


@defop(meaning=_take, axes=_take_axes, flops=0, samples=_take_samples)
def take(x: TensorType, indices: TensorType, *, axis: int, wrap: bool = True) -> TensorType:
    """Slices of `x` along `axis`, one per index; the indices' axes take the axis' place (an embedding is axis 0).

    With `wrap` an index from -size to -1 counts from the end; without, as for token ids, it is an error.
    """
    require_axis(axis, x.rank)
    require(is_integer(indices.dtype), f"indices must be integers, got {indices}")
    return x.with_shape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _open(shape: tuple[int, ...], axis: int, indices: np.ndarray) -> tuple[Any, ...]:
    grids: list[Any] = list(np.indices(indices.shape, sparse=True))
    grids[axis] = _checked(indices, shape[axis])
    return tuple(grids)


def _gather(x: np.ndarray, indices: np.ndarray, *, axis: int) -> np.ndarray:
    return x[_open(x.shape, axis, indices)]


def _along(rank: int, axis: int, x_axis: str, other: str = "") -> str:
    return " ".join(x_axis if i == axis else f"{other}a{i}" for i in range(rank))


def _gather_axes(x: TensorType, indices: TensorType, *, axis: int) -> str | None:
    if not all(same_dim(a, b) for i, (a, b) in enumerate(zip(x.shape, indices.shape, strict=True)) if i != axis):
        return None  # indices may stop short of x: then the shared axes have two sizes
    return f"{_along(x.rank, axis, 'picked')}, {_along(x.rank, axis, 'j')} -> {_along(x.rank, axis, 'j')}"


def _require_inside(x: TensorType, indices: TensorType, axis: int) -> None:
    for i, (a, b) in enumerate(zip(x.shape, indices.shape, strict=True)):
        fits = i == axis or not isinstance(a, int) or not isinstance(b, int) or b <= a
        require(fits, f"indices {indices} are larger than {x} along axis {i}")


def _gather_samples() -> Samples:
    yield ("float32[4, 3]", "int64[2, 3] < 4"), {"axis": 0}
    yield ("int64[2, 3]", "int64[1, 5] < 3"), {"axis": 1}


@defop(meaning=_gather, axes=_gather_axes, flops=0, samples=_gather_samples)
def gather(x: TensorType, indices: TensorType, *, axis: int) -> TensorType:
    """result[i, j] = x[indices[i, j], j] for axis 0; `indices` may be smaller than `x` along the other axes."""
    require_axis(axis, x.rank)
    require(
        is_integer(indices.dtype) and indices.rank == x.rank,
        f"indices must be integers of rank {x.rank}, got {indices}",
    )
    _require_inside(x, indices, axis)
    return x.with_shape(*indices.shape)


MODES = ("set", "add", "mul", "min", "max")


def _scatter(x: np.ndarray, indices: np.ndarray, updates: np.ndarray, *, axis: int, mode: str) -> np.ndarray:
    result = x.copy()
    where = np.broadcast_arrays(*_open(x.shape, axis, indices)) if indices.size else None
    if where is None:
        return result
    if mode == "set":
        result[tuple(where)] = updates
    else:
        ufunc = {"add": np.add, "mul": np.multiply, "min": np.minimum, "max": np.maximum}[mode]
        ufunc.at(result, tuple(where), updates)
    return result


def _scatter_axes(x: TensorType, indices: TensorType, updates: TensorType, *, axis: int, mode: str) -> str | None:
    if not all(same_dim(a, b) for i, (a, b) in enumerate(zip(x.shape, indices.shape, strict=True)) if i != axis):
        return None
    return f"{_along(x.rank, axis, 's!')}, {_along(x.rank, axis, 'j!')}, {_along(x.rank, axis, 'j!')} -> {_along(x.rank, axis, 's!')}"


def _scatter_samples() -> Samples:
    yield ("float32[4, 3]", "int64[2, 3] < 4", "float32[2, 3]"), {"axis": 0, "mode": "add"}
    yield ("float32[4, 3]", "int64[1, 2] < 3", "float32[1, 2]"), {"axis": 1, "mode": "set"}
    yield ("int64[4]", "int64[3] < 4", "int64[3]"), {"axis": 0, "mode": "max"}


@defop(meaning=widened(_scatter), axes=_scatter_axes, samples=_scatter_samples)
def scatter(x: TensorType, indices: TensorType, updates: TensorType, *, axis: int, mode: str = "set") -> TensorType:
    """`x` with updates[i, j] put at (or combined into) x[indices[i, j], j] for axis 0, in row-major order of `indices`."""
    require_axis(axis, x.rank)
    require(
        is_integer(indices.dtype) and indices.rank == x.rank,
        f"indices must be integers of rank {x.rank}, got {indices}",
    )
    _require_inside(x, indices, axis)
    require(mode in MODES, f"mode is one of {', '.join(MODES)}, not {mode!r}")
    require(updates.dtype == x.dtype, f"updates must be {x.dtype}, got {updates}")
    require(
        updates.rank == indices.rank and all(same_dim(a, b) for a, b in zip(updates.shape, indices.shape, strict=True)),
        f"updates and indices differ in shape: {updates} and {indices}",
    )
    return x


def _sort(x: np.ndarray, *, axis: int, descending: bool) -> tuple[np.ndarray, np.ndarray]:
    # NaN counts as the largest, and equal elements keep their order, as in torch.sort(stable=True).
    wide = x.astype(np.float64) if x.dtype.itemsize == 2 and x.dtype.kind not in "iu" else x
    if descending:
        flipped = np.flip(wide, axis)
        order = x.shape[axis] - 1 - np.flip(np.argsort(flipped, axis, kind="stable"), axis)
    else:
        order = np.argsort(wide, axis, kind="stable")
    return np.take_along_axis(x, order, axis), order.astype(np.int64)


def _sort_axes(x: TensorType, *, axis: int, descending: bool) -> str:
    inside = _along(x.rank, axis, "s!")
    return f"{inside} -> {inside}, {inside}"


def _sort_samples() -> Samples:
    yield ("float32[3, 4]",), {"axis": 1, "descending": True}
    yield ("int64[5]",), {"axis": 0, "descending": False}


@defop(meaning=_sort, axes=_sort_axes, samples=_sort_samples)
def sort(x: TensorType, *, axis: int, descending: bool = False) -> TupleType:
    """Sorted values and their int64 indices along one axis, stable; NaN counts as the largest."""
    require_axis(axis, x.rank)
    return TupleType((x, x.with_dtype("int64")))
