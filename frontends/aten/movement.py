"""Operators that create, move, repeat and select elements by position."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import sympy
import torch

from jisu.compiler import ops
from jisu.compiler.graph import MAX_INLINE, Node, constant
from jisu.compiler.types import Dim, dim, is_float, product, same_dim
from jisu.frontends.aten.table import (
    Call,
    axes_of,
    axis_of,
    cast,
    cut,
    expand,
    filled,
    literal,
    lowering,
    operand,
    pad,
    permute,
    pick,
    positions,
    refuse,
    unsqueeze,
    view,
)
from jisu.frontends.aten.values import array_of

aten = torch.ops.aten
prims = torch.ops.prims


@lowering(
    aten.clone.default, aten.alias.default, aten.detach.default, aten.contiguous.default, aten.lift_fresh_copy.default,
    aten.lift_fresh.default, aten.detach_.default, aten.positive.default, aten.alias_copy.default, aten.lift.default,
    aten.resolve_conj.default, aten.resolve_neg.default, aten.dropout.default, aten.native_dropout.default,
)  # fmt: skip
def _identity(call: Call, x: Node, *rest: Any) -> Any:
    if "dropout" in call.name and rest[1] and rest[0]:
        refuse("dropout in training mode is random; call model.eval() first")
    return (x, filled(True, call.types[1])) if call.name == "native_dropout" else x


@lowering(aten._to_copy.default, aten.to.dtype, prims.convert_element_type.default)
def _to_copy(call: Call, x: Node, *_: Any, **__: Any) -> Node:
    return cast(x, call.dtype)


@lowering(aten.copy.default)
def _copy(call: Call, x: Node, source: Node, non_blocking: bool = False) -> Node:
    return expand(cast(source, call.dtype), call.shape)


@lowering(
    aten.view.default, aten._unsafe_view.default, aten.reshape.default, aten.unsqueeze.default, aten.squeeze.default,
    aten.squeeze.dim, aten.squeeze.dims, aten.view_copy.default, aten.flatten.using_ints, aten._reshape_alias.default,
    aten.unflatten.int,
)  # fmt: skip
def _view(call: Call, x: Node, *_: Any) -> Node:
    return view(x, call.shape)


@lowering(aten.view.dtype)
def _view_dtype(call: Call, x: Node, dtype: Any) -> Node:
    return x if x.dtype == call.dtype else refuse("reinterprets the bits of a tensor as another dtype")


@lowering(aten.expand.default, aten.broadcast_to.default)
def _expand(call: Call, x: Node, *_: Any, **__: Any) -> Node:
    return expand(x, call.shape)


@lowering(aten.permute.default)
def _permute(call: Call, x: Node, perm: Sequence[int]) -> Node:
    return permute(x, [axis_of(p, x.rank) for p in perm])


@lowering(aten.transpose.int)
def _transpose(call: Call, x: Node, a: int, b: int) -> Node:
    perm = list(range(x.rank))
    if perm:
        a, b = axis_of(a, x.rank), axis_of(b, x.rank)
        perm[a], perm[b] = perm[b], perm[a]
    return permute(x, perm)


@lowering(aten.t.default)
def _t(call: Call, x: Node) -> Node:
    return permute(x, tuple(reversed(range(x.rank))))


@lowering(aten.select.int)
def _select(call: Call, x: Node, axis: int, index: Dim) -> Node:
    axis = axis_of(axis, x.rank)
    return pick(x, axis, inside(index, x.shape[axis]))


def inside(index: Dim, size: Dim) -> Dim:
    """An index from 0 on, for one that counts from either end."""
    negative = index < 0 if isinstance(index, int) else index.is_negative
    if not isinstance(index, int) and negative is None:
        negative = (index - size).is_negative and not (index + size).is_negative and not index.is_nonnegative
    return dim(index + size) if negative else index


def bounds(start: Any, stop: Any, size: Dim, length: Dim, step: int) -> tuple[Dim, Dim]:
    """start and stop of a Python slice that is known to have `length` elements, clamped into the axis."""
    if same_dim(length, 0):
        return 0, 0
    first: Dim = 0 if start is None else start
    if isinstance(first, int):
        first = first if first >= 0 else dim(size + first)
        if not isinstance(size, int) and isinstance(start, int) and start < 0 and _may_be_negative(first):
            first = dim(sympy.Max(first, 0))
        first = max(first, 0) if isinstance(first, int) else first
    elif first.is_nonnegative is None and not same_dim(length, size):
        first = dim(sympy.Max(first, 0)) if _may_be_negative(first) else first
    if same_dim(length, size):
        return 0, size
    return first, dim(first + (length - 1) * step + 1)


def _may_be_negative(value: Dim) -> bool:
    """Whether a dimension, with every symbol at least 1, could be below zero."""
    if isinstance(value, int):
        return value < 0
    shifted = sympy.expand(value.subs({s: s + 1 for s in value.free_symbols}))
    return not all(c >= 0 for c in shifted.as_coefficients_dict().values())


@lowering(aten.slice.Tensor)
def _slice(call: Call, x: Node, axis: int = 0, start: Any = None, stop: Any = None, step: int = 1) -> Node:
    axis = axis_of(axis, x.rank)
    first, last = bounds(start, stop, x.shape[axis], call.shape[axis], step)
    return cut(x, axis, first, last, step)


@lowering(aten.narrow.default)
def _narrow(call: Call, x: Node, axis: int, start: Dim, length: Dim) -> Node:
    axis = axis_of(axis, x.rank)
    first = inside(start, x.shape[axis])
    return cut(x, axis, first, dim(first + length))


@lowering(
    aten.split.Tensor, aten.split_with_sizes.default, aten.split.sizes, aten.chunk.default,
    aten.tensor_split.sections, aten.tensor_split.indices, aten.unsafe_split.Tensor,
    aten.unsafe_split_with_sizes.default, aten.split_with_sizes_copy.default,
)  # fmt: skip
def _split(call: Call, x: Node, sizes: Any, axis: int = 0) -> tuple[Node, ...]:
    axis = axis_of(axis, x.rank)
    start: Dim = 0
    parts = []
    for type in call.types:
        stop = dim(start + type.shape[axis])
        parts.append(cut(x, axis, start, stop))
        start = stop
    return tuple(parts)


@lowering(aten.unbind.int, aten.unbind_copy.int)
def _unbind(call: Call, x: Node, axis: int = 0) -> tuple[Node, ...]:
    return tuple(pick(x, axis_of(axis, x.rank), i) for i in range(len(call.types)))


@lowering(aten.cat.default, aten.concat.default)
def _cat(call: Call, xs: Sequence[Node], axis: int = 0) -> Node:
    rank = len(call.shape)
    # Legacy: a tensor of shape [0] joins tensors of any rank.
    parts = [cast(x, call.dtype) for x in xs if x.rank == rank or x.shape != (0,)]
    return parts[0] if len(parts) == 1 else ops.concat(*parts, axis=axis_of(axis, rank))


@lowering(aten.stack.default)
def _stack(call: Call, xs: Sequence[Node], axis: int = 0) -> Node:
    axis = axis_of(axis, len(call.shape))
    parts = [unsqueeze(cast(x, call.dtype), axis) for x in xs]
    return parts[0] if len(parts) == 1 else ops.concat(*parts, axis=axis)


@lowering(aten.repeat.default, aten.tile.default)
def _repeat(call: Call, x: Node, repeats: Sequence[Dim]) -> Node:
    rank = len(call.shape)
    repeats = (1,) * (rank - len(repeats)) + tuple(repeats)
    shape = (1,) * (rank - x.rank) + x.shape
    spread = [d for r, n in zip(repeats, shape, strict=True) for d in ((r, n) if r != 1 else (n,))]
    apart = [d for r, n in zip(repeats, shape, strict=True) for d in ((1, n) if r != 1 else (n,))]
    return view(expand(view(x, apart), spread), call.shape)


@lowering(aten.repeat_interleave.self_int)
def _repeat_interleave(call: Call, x: Node, repeats: int, axis: int | None = None, *, output_size: Any = None) -> Node:
    if axis is None:
        x, axis = view(x, (x.tensor.size,)), 0
    axis = axis_of(axis, x.rank)
    spread = (*x.shape[: axis + 1], repeats, *x.shape[axis + 1 :])
    return view(expand(unsqueeze(x, axis + 1), spread), call.shape)


@lowering(aten.repeat_interleave.Tensor)
def _repeat_indices(call: Call, repeats: Node, *, output_size: Any = None) -> Node:
    """0 repeats[0] times, 1 repeats[1] times, …: the number of running totals that a position has reached."""
    (size,) = call.shape
    ends = ops.scan(cast(repeats, "int64"), axis=0, kind="sum")
    place = ops.reshape(ops.iota(extent=size), shape=(size, 1))
    return cast(ops.sum_(cast(ops.ge(place, ends), "int64"), axes=(1,), keepdims=False), call.dtype)


@lowering(aten.flip.default)
def _flip(call: Call, x: Node, axes: Sequence[int]) -> Node:
    return ops.flip(x, axes=axes_of(axes, x.rank)) if x.rank and axes else x


@lowering(aten.roll.default)
def _roll(call: Call, x: Node, shifts: Any, axes: Any = ()) -> Node:
    if not axes:
        flat = view(x, (x.tensor.size,))
        return view(_rolled(flat, shifts[0], 0), x.shape)
    for shift, axis in zip(shifts, axes, strict=True):
        x = _rolled(x, shift, axis_of(axis, x.rank)) if x.rank else x
    return x


def _rolled(x: Node, shift: Dim, axis: int) -> Node:
    size = x.shape[axis]
    if size == 0:
        return x
    cutting = (-shift) % size if isinstance(shift, int) and isinstance(size, int) else dim(sympy.Mod(-shift, size))
    if isinstance(shift, int) and not isinstance(size, int) and abs(shift) == 1:
        cutting = dim(size - 1) if shift == 1 else 1
    if cutting == 0:
        return x
    return ops.concat(cut(x, axis, cutting, size), cut(x, axis, 0, cutting), axis=axis)


@lowering(aten.constant_pad_nd.default)
def _constant_pad(call: Call, x: Node, amounts: Sequence[Dim], value: Any = 0) -> Node:
    low: list[Dim] = [0] * x.rank
    high: list[Dim] = [0] * x.rank
    for k in range(len(amounts) // 2):
        low[x.rank - 1 - k], high[x.rank - 1 - k] = amounts[2 * k], amounts[2 * k + 1]
    return pad(x, value, low, high)


def _padded_axes(x: Node, amounts: Sequence[Dim]) -> list[tuple[int, Dim, Dim]]:
    return [(x.rank - 1 - k, amounts[2 * k], amounts[2 * k + 1]) for k in range(len(amounts) // 2)]


@lowering(aten.reflection_pad1d.default, aten.reflection_pad2d.default, aten.reflection_pad3d.default)
def _reflection_pad(call: Call, x: Node, amounts: Sequence[Dim]) -> Node:
    for axis, before, behind in _padded_axes(x, amounts):
        size = x.shape[axis]
        parts = [x]
        if before != 0 and before > 0:
            parts.insert(0, ops.flip(cut(x, axis, 1, dim(before + 1)), axes=(axis,)))
        if behind != 0 and behind > 0:
            parts.append(ops.flip(cut(x, axis, dim(size - 1 - behind), dim(size - 1)), axes=(axis,)))
        x = _trimmed(ops.concat(*parts, axis=axis) if len(parts) > 1 else x, axis, before, behind)
    return x


@lowering(aten.replication_pad1d.default, aten.replication_pad2d.default, aten.replication_pad3d.default)
def _replication_pad(call: Call, x: Node, amounts: Sequence[Dim]) -> Node:
    for axis, before, behind in _padded_axes(x, amounts):
        size = x.shape[axis]
        parts = [x]
        if before > 0:
            parts.insert(0, _repeated(cut(x, axis, 0, 1), axis, before))
        if behind > 0:
            parts.append(_repeated(cut(x, axis, dim(size - 1), size), axis, behind))
        x = _trimmed(ops.concat(*parts, axis=axis) if len(parts) > 1 else x, axis, before, behind)
    return x


def _repeated(x: Node, axis: int, times: Dim) -> Node:
    return expand(x, tuple(times if i == axis else n for i, n in enumerate(x.shape)))


def _trimmed(x: Node, axis: int, before: Dim, behind: Dim) -> Node:
    start = dim(-before) if before < 0 else 0
    stop = dim(x.shape[axis] + behind) if behind < 0 else x.shape[axis]
    return cut(x, axis, start, stop)


@lowering(aten.unfold.default)
def _unfold(call: Call, x: Node, axis: int, size: int, step: int) -> Node:
    if x.rank == 0:
        return view(x, call.shape)
    if 0 in call.shape:
        return filled(0, call.type)
    return ops.windows(x, axes=(axis_of(axis, x.rank),), sizes=(size,), strides=(step,), dilations=(1,))


# ------------------------------------------------------------------------------------------------------ diagonals


@lowering(aten.diagonal.default, aten.diagonal_copy.default)
def _diagonal(call: Call, x: Node, offset: int = 0, first: int = 0, second: int = 1) -> Node:
    first, second = axis_of(first, x.rank), axis_of(second, x.rank)
    rest = [i for i in range(x.rank) if i not in (first, second)]
    x = permute(x, [*rest, first, second])
    *batch, rows, columns = x.shape
    length = call.shape[-1]
    if length == 0:
        return filled(0, call.type)
    flat = view(x, (*batch, dim(rows * columns)))
    start = dim(offset if offset >= 0 else -offset * columns)
    stop = dim(start + (length - 1) * (columns + 1) + 1)
    if not isinstance(columns, int):
        place = ops.mul(ops.iota(extent=length), operand(dim(columns + 1), "int64"))
        return ops.take(flat, ops.add(place, operand(start, "int64")), axis=len(batch))
    return cut(flat, len(batch), start, stop, columns + 1)


def _band(shape: Sequence[Dim], offset: Dim, first: int, second: int) -> Node:
    """Whether column - row == offset, broadcastable to `shape`."""
    row, column = positions(shape, first), positions(shape, second)
    return ops.eq(ops.sub(column, row), operand(offset, "int64"))


@lowering(aten.diag_embed.default)
def _diag_embed(call: Call, x: Node, offset: int = 0, first: int = -2, second: int = -1) -> Node:
    rank = x.rank + 1
    first, second = axis_of(first, rank), axis_of(second, rank)
    if offset < 0:
        first, second, offset = second, first, -offset
    # Element k stands in row k, column k + offset: spread the columns, then mask the band.
    columns = call.shape[second]
    padded = pad(x, 0, [0] * (x.rank - 1) + [offset], [0] * (x.rank - 1) + [dim(columns - offset - x.shape[-1])])
    spread = unsqueeze(padded, x.rank - 1)
    order = [i for i in range(rank) if i not in (first, second)] + [first, second]
    inverse = [order.index(i) for i in range(rank)]
    spread = permute(spread, inverse)
    return ops.where(_band(call.shape, offset, first, second), spread, operand(0, x.dtype))


@lowering(aten.diagonal_scatter.default)
def _diagonal_scatter(call: Call, x: Node, source: Node, offset: int = 0, first: int = 0, second: int = 1) -> Node:
    first, second = axis_of(first, x.rank), axis_of(second, x.rank)
    columns = x.shape[second]
    before = max(offset, 0)
    # Place element k of the source in its column, for every row; the band picks the right one.
    amounts: list[Dim] = [0] * source.rank
    amounts[-1] = before
    behind: list[Dim] = [0] * source.rank
    behind[-1] = dim(columns - before - source.shape[-1])
    spread = unsqueeze(pad(cast(source, x.dtype), 0, amounts, behind), source.rank - 1)
    order = [i for i in range(x.rank) if i not in (first, second)] + [first, second]
    spread = permute(spread, [order.index(i) for i in range(x.rank)])
    return ops.where(_band(x.shape, offset, first, second), spread, x)


def _triangle(x: Node, k: Dim, upper: bool) -> Node:
    row, column = positions(x.shape, x.rank - 2), positions(x.shape, x.rank - 1)
    limit = row if k == 0 else ops.add(row, operand(k, "int64"))
    keep = ops.ge(column, limit) if upper else ops.le(column, limit)
    return ops.where(keep, x, operand(0, x.dtype))


@lowering(aten.tril.default)
def _tril(call: Call, x: Node, k: Dim = 0) -> Node:
    return _triangle(x, k, upper=False)


@lowering(aten.triu.default)
def _triu(call: Call, x: Node, k: Dim = 0) -> Node:
    return _triangle(x, k, upper=True)


# ------------------------------------------------------------------------------------------------ scattering slices


@lowering(aten.select_scatter.default)
def _select_scatter(call: Call, x: Node, source: Node, axis: int, index: Dim) -> Node:
    axis = axis_of(axis, x.rank)
    first = inside(index, x.shape[axis])
    return _replaced(x, unsqueeze(cast(source, x.dtype), axis), axis, first, 1)


@lowering(aten.slice_scatter.default)
def _slice_scatter(
    call: Call, x: Node, source: Node, axis: int = 0, start: Any = None, stop: Any = None, step: int = 1
) -> Node:
    axis = axis_of(axis, x.rank)
    source = cast(source, x.dtype)
    if source.shape[axis] == 0:
        return x
    first, _ = bounds(start, stop, x.shape[axis], source.shape[axis], step)
    return _replaced(x, source, axis, first, step)


def _replaced(x: Node, source: Node, axis: int, first: Dim, step: int) -> Node:
    """`x` with `source` at first, first + step, … along one axis."""
    size, length = x.shape[axis], source.shape[axis]
    if step == 1:
        last = dim(first + length)
        parts = [source]
        if first != 0:
            parts.insert(0, cut(x, axis, 0, first))
        if not same_dim(last, size):
            parts.append(cut(x, axis, last, size))
        return ops.concat(*parts, axis=axis) if len(parts) > 1 else source
    span = dim((length - 1) * step + 1)
    low: list[Dim] = [0] * x.rank
    high: list[Dim] = [0] * x.rank
    gaps = [0] * x.rank
    low[axis], high[axis], gaps[axis] = first, dim(size - first - span), step - 1
    spread = pad(source, 0, low, high, gaps)
    offset = ops.sub(positions(x.shape, axis), operand(first, "int64"))
    hit = ops.eq(ops.remainder(offset, step), 0)
    within = ops.logical_and(ops.ge(offset, 0), ops.lt(offset, operand(span, "int64")))
    return ops.where(ops.logical_and(hit, within), spread, x)


@lowering(aten.as_strided.default)
def _as_strided(call: Call, x: Node, shape: Any, strides: Sequence[Dim], offset: Any = None) -> Node:
    source = call.meta(0)
    if not source.is_contiguous() or source.storage_offset() != 0:
        refuse("as_strided of a view")
    first = 0 if offset is None else offset
    index: Node = operand(first, "int64")
    for axis, stride in enumerate(strides):
        if stride != 0:
            index = ops.add(index, ops.mul(positions(call.shape, axis), operand(stride, "int64")))
    return ops.take(view(x, (x.tensor.size,)), expand(index, call.shape), axis=0)


# ------------------------------------------------------------------------------------------------------- creation


@lowering(
    aten.full.default, aten.full_like.default, aten.new_full.default, aten.fill.Scalar, aten.fill.Tensor,
)  # fmt: skip
def _full(call: Call, *arguments: Any, **_: Any) -> Node:
    return filled(arguments[1], call.type)


@lowering(
    aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default, aten.empty.memory_format,
    aten.empty_like.default, aten.new_empty.default, aten.empty_strided.default, aten.new_empty_strided.default,
    aten.empty_permuted.default,
)  # fmt: skip
def _zeros(call: Call, *_: Any, **__: Any) -> Node:
    return filled(0, call.type)  # of uninitialised memory nothing is promised


@lowering(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(call: Call, *_: Any, **__: Any) -> Node:
    return filled(1, call.type)


@lowering(aten.scalar_tensor.default)
def _scalar_tensor(call: Call, value: Any, **_: Any) -> Node:
    return operand(value, call.dtype)


@lowering(aten.arange.start_step, aten.arange.start, aten.arange.default, prims.iota.default)
def _arange(call: Call, *arguments: Any, **keywords: Any) -> Node:
    target = call.node.target
    start, step = 0, 1
    if target is prims.iota.default:
        start, step = keywords["start"], keywords["step"]
    elif target is not aten.arange.default:
        start = arguments[0]
        step = arguments[2] if target is aten.arange.start_step else 1
    (size,) = call.shape
    if is_float(call.dtype):
        numbers = [v for v in (start, step) if isinstance(v, (int, float))]
        if isinstance(size, int) and size <= MAX_INLINE and len(numbers) == 2:
            return _evaluated(call)
        values = ops.iota(extent=size, dtype="float64")
        values = ops.add(ops.mul(values, operand(step, "float64")), operand(start, "float64"))
        return cast(values, call.dtype)
    values = ops.iota(extent=size, dtype=call.dtype)
    if step != 1:
        values = ops.mul(values, operand(step, call.dtype))
    return values if start == 0 else ops.add(values, operand(start, call.dtype))


def _evaluated(call: Call) -> Node:
    """What PyTorch itself computes for a creation with plain arguments."""
    target: Any = call.node.target
    with torch.no_grad():
        kwargs = {k: v for k, v in call.node.kwargs.items() if k not in ("device", "pin_memory", "layout")}
        return constant(array_of(target(*call.node.args, **kwargs)))


@lowering(aten.linspace.default)
def _linspace(call: Call, start: float, stop: float, steps: int, **_: Any) -> Node:
    if steps <= MAX_INLINE:
        return _evaluated(call)
    ramp = ops.iota(extent=steps, dtype="float64")
    step = (stop - start) / (steps - 1)
    head = ops.add(ops.mul(ramp, step), float(start))
    tail = ops.sub(operand(float(stop), "float64"), ops.mul(ops.sub(operand(steps - 1.0, "float64"), ramp), step))
    return cast(ops.where(ops.lt(ramp, steps / 2), head, tail), call.dtype)


@lowering(aten.eye.default, aten.eye.m)
def _eye(call: Call, *_: Any, **__: Any) -> Node:
    return expand(cast(_band(call.shape, 0, 0, 1), call.dtype), call.shape)


@lowering(aten.tril_indices.default, aten.triu_indices.default)
def _triangle_indices(call: Call, rows: int, columns: int, offset: int = 0, **_: Any) -> Node:
    lower = call.node.target is aten.tril_indices.default
    found = np.tril_indices(rows, offset, columns) if lower else np.triu_indices(rows, offset, columns)
    return literal(np.stack(found), call.dtype)


@lowering(prims.broadcast_in_dim.default)
def _broadcast_in_dim(call: Call, x: Node, shape: Any, where: Sequence[int]) -> Node:
    apart: list[Dim] = [1] * len(call.shape)
    for size, axis in zip(x.shape, where, strict=True):
        apart[axis] = size
    return expand(view(x, apart), call.shape)


@lowering(aten._shape_as_tensor.default)
def _shape_as_tensor(call: Call, x: Node) -> Node:
    parts = [ops.reshape(operand(n, "int64"), shape=(1,)) for n in x.shape]
    return ops.concat(*parts, axis=0) if parts else literal([], "int64")


@lowering(aten.numel.default)
def _numel(call: Call, x: Node) -> Dim:
    return product(x.shape)
