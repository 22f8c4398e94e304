"""Operators that read and write by index tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from jisu.compiler import ops
from jisu.compiler.graph import CONSTANT, Node
from jisu.compiler.types import Dim, TensorType, broadcast, dim, is_float, is_integer, product
from jisu.frontends.aten.reductions import p_norm
from jisu.frontends.aten.table import (
    HALF,
    Call,
    as_bool,
    at_least_1d,
    axis_of,
    cast,
    cut,
    expand,
    filled,
    highest,
    lowering,
    lowest,
    operand,
    permute,
    refuse,
    view,
    wide,
)

aten = torch.ops.aten


@lowering(aten.embedding.default)
def _embedding(call: Call, table: Node, ids: Node, *_: Any) -> Node:
    return ops.take(table, ids, axis=0, wrap=False)


@lowering(aten.embedding_renorm.default)
def _embedding_renorm(call: Call, table: Node, ids: Node, limit: float, p: float) -> Node:
    """Rows that `ids` name are scaled down to a p-norm of at most `limit`."""
    size = table.shape[0]
    flat = view(ids, (ids.tensor.size,))
    none = filled(False, TensorType((size,), "bool"))
    named = ops.scatter(none, flat, filled(True, TensorType(flat.shape, "bool")), axis=0, mode="set")

    def scaled(v: Node) -> Node:
        norm = p_norm(v, float(p), (1,), True)
        factor = ops.div(operand(float(limit), v.dtype), ops.add(norm, 1e-7))
        return ops.where(ops.gt(norm, float(limit)), ops.mul(v, factor), v)

    return ops.where(view(named, (size, 1)), wide(scaled, table.dtype, table), table)


@lowering(aten.index_select.default)
def _index_select(call: Call, x: Node, axis: int, index: Node) -> Node:
    if x.rank == 0:
        return x
    return ops.take(x, at_least_1d(index), axis=axis_of(axis, x.rank), wrap=False)


@lowering(aten.gather.default)
def _gather(call: Call, x: Node, axis: int, index: Node, *, sparse_grad: bool = False) -> Node:
    if 0 in index.shape:
        return filled(0, call.type)
    found = ops.gather(at_least_1d(x), at_least_1d(index), axis=axis_of(axis, x.rank))
    return view(found, call.shape)


@lowering(aten.take.default)
def _take(call: Call, x: Node, index: Node) -> Node:
    return ops.take(view(x, (x.tensor.size,)), index, axis=0)


def index_range(x: Node) -> tuple[int, int] | None:
    """The smallest and largest value that an integer node can have, where its construction tells."""
    if x.op is CONSTANT and x.value.array.size:
        return int(x.value.array.min()), int(x.value.array.max())
    if x.op is ops.iota and isinstance(x.extent, int) and x.extent > 0:
        return 0, x.extent - 1
    if x.op in (ops.reshape, ops.broadcast_to, ops.transpose, ops.slice_, ops.flip, ops.cast):
        (source,) = x.parents
        return index_range(source) if is_integer(source.dtype) else None
    if x.op in (ops.add, ops.sub, ops.mul, ops.minimum, ops.maximum):
        return _combined(x)
    return None


def _combined(x: Node) -> tuple[int, int] | None:
    a, b = (index_range(o) for o in x.parents)
    if x.op is ops.maximum and b is not None and a is None:
        return None
    if a is None or b is None:
        return None
    if x.op is ops.add:
        return a[0] + b[0], a[1] + b[1]
    if x.op is ops.sub:
        return a[0] - b[1], a[1] - b[0]
    if x.op is ops.mul:
        products = [p * q for p in a for q in b]
        return min(products), max(products)
    pick = min if x.op is ops.minimum else max
    return pick(a[0], b[0]), pick(a[1], b[1])


def _linear_index(index: Sequence[Node], sizes: Sequence[Dim]) -> Node:
    """One index into the flattened axes. An index outside its axis becomes one outside the flattened axes."""
    total = product(sizes)
    result: Node | None = None
    checks: list[Node] = []
    for k, (i, size) in enumerate(zip(index, sizes, strict=True)):
        i = cast(i, "int64")
        known = index_range(i)
        if not (known and isinstance(size, int) and 0 <= known[0] and known[1] < size):
            bound = operand(size, "int64")
            if not (known and known[0] >= 0):
                i = ops.where(ops.lt(i, 0), ops.add(i, bound), i)
            checks.append(ops.logical_and(ops.ge(i, 0), ops.lt(i, bound)))
        stride = product(sizes[k + 1 :])
        term = i if stride == 1 else ops.mul(i, operand(stride, "int64"))
        result = term if result is None else ops.add(result, term)
    assert result is not None
    for check in checks:
        result = ops.where(check, result, operand(total, "int64"))
    return result


def _index_plan(x: Node, indices: Sequence[Node | None]) -> tuple[list[int], list[int], int]:
    """Indexed axes, the other axes, and where the index axes go in the result."""
    axes = [i for i, index in enumerate(indices) if index is not None]
    others = [i for i in range(x.rank) if i not in axes]
    together = axes == list(range(axes[0], axes[-1] + 1))
    return axes, others, axes[0] if together else 0


@lowering(aten.index.Tensor, aten._unsafe_index.Tensor)
def _index(call: Call, x: Node, indices: Sequence[Node | None]) -> Node:
    if any(i is not None and i.dtype in ("bool", "uint8") for i in indices):
        refuse("a mask as index: the result's size depends on the data (use torch.where)")
    if all(i is None for i in indices):
        return x
    if 0 in call.shape:
        return filled(0, call.type)
    axes, others, place = _index_plan(x, indices)
    found = [i for i in indices if i is not None]
    if len(axes) == 1:
        return ops.take(x, found[0], axis=axes[0])
    shape = broadcast(*(i.shape for i in found))
    sizes = [x.shape[a] for a in axes]
    joined = view(permute(x, [*axes, *others]), (product(sizes), *(x.shape[a] for a in others)))
    taken = ops.take(joined, expand(_linear_index(found, sizes), shape), axis=0)
    rank = len(shape)
    before = list(range(rank, rank + place))
    return permute(taken, [*before, *range(rank), *range(rank + place, taken.rank)])


@lowering(aten._unsafe_masked_index.default)
def _masked_index(call: Call, x: Node, mask: Node, indices: Sequence[Node | None], fill: Any) -> Node:
    if 0 in x.shape:
        return filled(fill, call.type)
    axes = iter(range(len(indices)))
    clamped = [_clamped(i, x.shape[a]) if i is not None else None for a, i in zip(axes, indices, strict=False)]
    return ops.where(mask, _index(call, x, clamped), operand(fill, x.dtype))


def _clamped(index: Node, size: Dim) -> Node:
    index = cast(index, "int64")
    return ops.minimum(ops.maximum(index, 0), operand(dim(size - 1), "int64"))


@lowering(aten.index_put.default, aten._unsafe_index_put.default)
def _index_put(call: Call, x: Node, indices: Sequence[Node | None], values: Node, accumulate: bool = False) -> Node:
    values = cast(values, x.dtype)
    given = [i for i in indices if i is not None]
    if any(i.dtype in ("bool", "uint8") for i in given):
        return _masked_put(x, indices, values, accumulate)
    if not given:
        return _added(x, expand(values, x.shape)) if accumulate else expand(values, x.shape)
    axes, others, place = _index_plan(x, indices)
    shape = broadcast(*(i.shape for i in given))
    rest = [x.shape[a] for a in others]
    full = (*rest[:place], *shape, *rest[place:])
    if 0 in full or 0 in x.shape:
        return x
    rank = len(shape)
    # Updates come as [rest before, index axes, rest behind]; bring the index axes to the front.
    updates = permute(
        expand(values, full), [*range(place, place + rank), *range(place), *range(place + rank, len(full))]
    )
    sizes = [x.shape[a] for a in axes]
    order = [*axes, *others]
    joined = view(permute(x, order), (product(sizes), product(rest)))
    points = product(shape)
    index = view(expand(_linear_index(given, sizes), shape), (points, 1))
    updates = view(updates, (points, product(rest)))
    done = _combine(joined, expand(index, updates.shape), updates, "add" if accumulate else "set", 0)
    spread = view(done, [x.shape[a] for a in order])
    return permute(spread, [order.index(a) for a in range(x.rank)])


def _added(a: Node, b: Node) -> Node:
    return ops.logical_or(a, b) if a.dtype == "bool" else ops.add(a, b)


def _combine(x: Node, index: Node, updates: Node, mode: str, axis: int) -> Node:
    """Scatter, by way of uint8 for bools where the mode computes."""
    if x.dtype == "bool" and mode != "set":
        mode = {"add": "max", "mul": "min"}.get(mode, mode)
        done = ops.scatter(cast(x, "uint8"), index, cast(updates, "uint8"), axis=axis, mode=mode)
        return cast(done, "bool")
    return ops.scatter(x, index, updates, axis=axis, mode=mode)


def _masked_put(x: Node, indices: Sequence[Node | None], values: Node, accumulate: bool) -> Node:
    """x[mask] = values, for one mask and values that don't depend on how many elements it selects."""
    position = next(i for i, index in enumerate(indices) if index is not None)
    mask = as_bool(indices[position])
    if sum(i is not None for i in indices) != 1:
        refuse("assignment by a mask together with other indices")
    rest = x.shape[position + mask.rank :]
    if values.rank > len(rest) and any(n != 1 for n in values.shape[: values.rank - len(rest)]):
        refuse("assignment of as many values as a mask selects (use torch.where or masked_scatter)")
    if position and values.rank > len(rest):
        values = view(values, values.shape[values.rank - len(rest) :] if rest else ())
    values = view(values, values.shape[values.rank - len(rest) :]) if values.rank > len(rest) else values
    mask = view(mask, (*mask.shape, *(1,) * len(rest)))
    return expand(ops.where(mask, _added(x, values) if accumulate else values, x), x.shape)


@lowering(aten.masked_scatter.default)
def _masked_scatter(call: Call, x: Node, mask: Node, source: Node) -> Node:
    full = broadcast(x.shape, mask.shape)
    if 0 in full:
        return expand(x, full)
    flat = view(expand(mask, full), (product(full),))
    order = ops.sub(ops.scan(cast(flat, "int64"), axis=0, kind="sum"), 1)
    pool = view(source, (source.tensor.size,))
    if source.tensor.size == 0:
        return expand(x, full)
    # Where the mask is off the position may lie behind a short source, and is not read.
    index = ops.where(flat, order, operand(0, "int64"))
    taken = view(ops.take(pool, index, axis=0), full)
    return ops.where(mask, taken, x)


# ------------------------------------------------------------------------------------------------------- scatter


def _scatter(call: Call, x: Node, axis: int, index: Node, updates: Any, mode: str) -> Node:
    if 0 in index.shape:
        return x
    shape = x.shape
    x, index = at_least_1d(x), at_least_1d(index)
    if isinstance(updates, Node) and updates.rank > 0:
        updates = at_least_1d(cast(updates, x.dtype))
        for a, n in enumerate(index.shape):
            updates = cut(updates, a, 0, n)
    else:
        updates = filled(updates, index.type.with_dtype(x.dtype))
    return view(_combine(x, index, updates, mode, axis_of(axis, x.rank)), shape)


@lowering(aten.scatter.src, aten.scatter.value)
def _scatter_set(call: Call, x: Node, axis: int, index: Node, updates: Any) -> Node:
    return _scatter(call, x, axis, index, updates, "set")


@lowering(aten.scatter.reduce, aten.scatter.value_reduce)
def _scatter_old_reduce(call: Call, x: Node, axis: int, index: Node, updates: Any, *, reduce: str) -> Node:
    return _scatter(call, x, axis, index, updates, {"add": "add", "multiply": "mul"}[reduce])


@lowering(aten.scatter_add.default)
def _scatter_add(call: Call, x: Node, axis: int, index: Node, updates: Node) -> Node:
    return _scatter(call, x, axis, index, updates, "add")


_REDUCE = {"sum": "add", "prod": "mul", "amax": "max", "amin": "min", "mean": "add"}


@lowering(aten.scatter_reduce.two)
def _scatter_reduce(
    call: Call, x: Node, axis: int, index: Node, updates: Node, reduce: str, *, include_self: bool = True
) -> Node:
    mode = _REDUCE[reduce]
    if 0 in index.shape:
        return x
    base = x
    if not include_self:
        identity = {"add": 0, "mul": 1, "max": lowest(x.dtype), "min": highest(x.dtype)}[mode]
        base = _scatter(call, x, axis, index, identity, "set")
    if reduce != "mean":
        return _scatter(call, base, axis, index, updates, mode)
    inner = "float32" if x.dtype in HALF else x.dtype

    def average(start: Node, values: Node) -> Node:
        total = _scatter(call, start, axis, index, values, "add")
        ones = filled(1, x.type.with_dtype("int64"))
        counts = ones if include_self else _scatter(call, ones, axis, index, 0, "set")
        counts = ops.maximum(_scatter(call, counts, axis, index, 1, "add"), 1)
        divide = ops.div if is_float(inner) else ops.floor_div
        return divide(total, cast(counts, inner))

    return wide(average, x.dtype, base, updates)


@lowering(aten.index_add.default)
def _index_add(call: Call, x: Node, axis: int, index: Node, source: Node, *, alpha: Any = 1) -> Node:
    def scaled(v: Node) -> Node:
        if v.dtype == "bool":
            return v
        return v if alpha == 1 else ops.mul(v, operand(alpha, v.dtype))

    return _along(call, x, axis, index, scaled(cast(source, x.dtype)), "add")


@lowering(aten.index_copy.default)
def _index_copy(call: Call, x: Node, axis: int, index: Node, source: Node) -> Node:
    return _along(call, x, axis, index, cast(source, x.dtype), "set")


@lowering(aten.index_fill.int_Scalar, aten.index_fill.int_Tensor)
def _index_fill(call: Call, x: Node, axis: int, index: Node, value: Any) -> Node:
    return _along(call, x, axis, index, operand(value, x.dtype), "set")


@lowering(aten.index_reduce.default)
def _index_reduce(
    call: Call, x: Node, axis: int, index: Node, source: Node, reduce: str, *, include_self: bool = True
) -> Node:
    mode = {"prod": "prod", "mean": "mean", "amax": "amax", "amin": "amin"}[reduce]
    along = axis_of(axis, x.rank)
    full = tuple(index.tensor.size if i == along else n for i, n in enumerate(at_least_1d(x).shape))
    column = view(index, tuple(n if i == along else 1 for i, n in enumerate(full)))
    return _scatter_reduce(
        call, x, axis, expand(column, full), expand(view(source, full), full), mode, include_self=include_self
    )


def _along(call: Call, x: Node, axis: int, index: Node, source: Node, mode: str) -> Node:
    """Whole slices of `x` set to or combined with slices of `source`, by a vector of indices."""
    shape = x.shape
    x, index = at_least_1d(x), at_least_1d(index)
    along = axis_of(axis, x.rank)
    full = tuple(index.shape[0] if i == along else n for i, n in enumerate(x.shape))
    if 0 in full:
        return view(x, shape)
    column = expand(view(index, tuple(n if i == along else 1 for i, n in enumerate(full))), full)
    source = expand(source, full) if source.rank in (0, x.rank) else expand(view(source, full), full)
    return view(_combine(x, column, source, mode, along), shape)


# -------------------------------------------------------------------------------------------------- embedding bags


@lowering(aten._embedding_bag_forward_only.default, aten._embedding_bag.default)
def _embedding_bag(
    call: Call, table: Node, ids: Node, offsets: Node, scale_by_freq: bool = False, mode: int = 0, sparse: bool = False,
    weights: Node | None = None, include_last: bool = False, padding: int = -1,
) -> Any:  # fmt: skip
    if scale_by_freq:
        refuse("scale_grad_by_freq concerns training")
    starts = cut(offsets, 0, 0, dim(offsets.shape[0] - 1)) if include_last else offsets
    bags, n = starts.shape[0], ids.shape[0]
    if bags == 0 or n == 0:
        return filled(0, call.type), None, None, None
    dtype = "float32" if table.dtype in HALF else table.dtype
    rows = cast(ops.take(table, ids, axis=0, wrap=False), dtype)
    place = ops.iota(extent=n, dtype="int64")
    first = view(cast(starts, "int64"), (bags, 1))
    member = ops.ge(place, first)
    if bags != 1:
        following = ops.concat(cut(first, 0, 1, bags), view(operand(n, "int64"), (1, 1)), axis=0)
        member = ops.logical_and(member, ops.lt(place, following))
    if padding >= 0:
        member = ops.logical_and(member, ops.ne(cast(ids, "int64"), padding))
    if mode == 2:
        chosen = ops.where(
            view(member, (bags, n, 1)), view(rows, (1, n, table.shape[1])), operand(-float("inf"), dtype)
        )
        found = ops.reduce_max(chosen, axes=(1,), keepdims=False)
        empty = ops.logical_not(ops.any_(member, axes=(1,), keepdims=True))
        found = ops.where(empty, operand(0.0, dtype), found)
    else:
        if weights is not None:
            rows = ops.mul(rows, view(cast(weights, dtype), (n, 1)))
        picked = ops.where(view(member, (bags, n, 1)), view(rows, (1, n, table.shape[1])), operand(0.0, dtype))
        found = ops.sum_(picked, axes=(1,), keepdims=False)
        if mode == 1:
            members = ops.sum_(cast(member, dtype), axes=(1,), keepdims=True)
            found = ops.div(found, ops.maximum(members, 1.0))
    return cast(found, call.dtype), None, None, None
