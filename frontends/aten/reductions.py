"""Reductions, scans, sorting, softmax and normalisation."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from jisu.compiler import ops
from jisu.compiler.graph import Node, Op
from jisu.compiler.types import Dim, TensorType, dim, is_float
from jisu.frontends.aten.table import (
    HALF,
    Call,
    as_bool,
    at_least_1d,
    axes_of,
    axis_of,
    cast,
    count,
    cut,
    expand,
    filled,
    lowering,
    operand,
    positions,
    refuse,
    view,
    wide,
)

aten = torch.ops.aten


def _sum(x: Node, axes: Sequence[int], keepdim: bool = False) -> Node:
    return ops.sum_(x, axes=tuple(axes), keepdims=keepdim) if axes else x


@lowering(aten.sum.default, aten.sum.dim_IntList)
def _total(call: Call, x: Node, axes: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Node:
    inner = x if x.dtype in HALF and call.dtype == x.dtype else cast(x, call.dtype)
    if call.dtype == "bool":
        return ops.any_(inner, axes=axes_of(axes, x.rank), keepdims=keepdim)
    return _sum(inner, axes_of(axes, x.rank), keepdim)


@lowering(aten.nansum.default)
def _nansum(call: Call, x: Node, axes: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Node:
    if is_float(x.dtype):
        x = ops.where(ops.isnan(x), operand(0, x.dtype), x)
    return _total(call, x, axes, keepdim)


@lowering(aten.mean.default, aten.mean.dim)
def _mean(call: Call, x: Node, axes: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Node:
    along = axes_of(axes, x.rank)

    def average(v: Node) -> Node:
        return ops.div(_sum(v, along, keepdim), operand(count(x.shape, along), v.dtype))

    return wide(average, call.dtype, x)


@lowering(aten.prod.default, aten.prod.dim_int)
def _prod(call: Call, x: Node, axis: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Node:
    x = cast(x, call.dtype)
    along = axes_of(axis, x.rank)
    return ops.prod(x, axes=along, keepdims=keepdim) if along else x


def _logical(op: Op) -> Any:
    def lower(call: Call, x: Node, axes: Any = None, keepdim: bool = False) -> Node:
        x = as_bool(x)
        # None means all axes, but an empty list none of them.
        along = () if isinstance(axes, (list, tuple)) and not axes else axes_of(axes, x.rank)
        return cast(op(x, axes=along, keepdims=keepdim) if along else x, call.dtype)

    return lower


lowering(aten.any.default, aten.any.dim, aten.any.dims)(_logical(ops.any_))
lowering(aten.all.default, aten.all.dim, aten.all.dims)(_logical(ops.all_))


def _extreme(x: Node, op: Op, axes: Sequence[int], keepdim: bool = False) -> Node:
    if not axes:
        return x
    if x.dtype == "bool":
        either = ops.any_ if op is ops.reduce_max else ops.all_
        return either(x, axes=tuple(axes), keepdims=keepdim)
    return op(x, axes=tuple(axes), keepdims=keepdim)


@lowering(aten.amax.default, aten.max.default)
def _amax(call: Call, x: Node, axes: Any = None, keepdim: bool = False) -> Node:
    return _extreme(x, ops.reduce_max, axes_of(axes, x.rank), keepdim)


@lowering(aten.amin.default, aten.min.default)
def _amin(call: Call, x: Node, axes: Any = None, keepdim: bool = False) -> Node:
    return _extreme(x, ops.reduce_min, axes_of(axes, x.rank), keepdim)


@lowering(aten.aminmax.default)
def _aminmax(call: Call, x: Node, *, dim: Any = None, keepdim: bool = False) -> tuple[Node, Node]:
    along = axes_of(dim, x.rank)
    return _extreme(x, ops.reduce_min, along, keepdim), _extreme(x, ops.reduce_max, along, keepdim)


def _position(x: Node, op: Op, axis: Any, keepdim: bool, type: TensorType) -> Node:
    """The index of the largest or smallest element, in the shape that PyTorch gives it."""
    if x.rank == 0:
        return filled(0, type)
    if axis is None:
        x, axis = view(x, (x.tensor.size,)), 0
    found = op(cast(x, "uint8") if x.dtype == "bool" else x, axis=axis_of(axis, x.rank))
    return view(found, type.shape)


@lowering(aten.argmax.default)
def _argmax(call: Call, x: Node, axis: Any = None, keepdim: bool = False) -> Node:
    return _position(x, ops.argmax, axis, keepdim, call.type)


@lowering(aten.argmin.default)
def _argmin(call: Call, x: Node, axis: Any = None, keepdim: bool = False) -> Node:
    return _position(x, ops.argmin, axis, keepdim, call.type)


@lowering(aten.max.dim)
def _max_dim(call: Call, x: Node, axis: int, keepdim: bool = False) -> tuple[Node, Node]:
    values = _extreme(x, ops.reduce_max, axes_of(axis, x.rank) if x.rank else (), keepdim)
    return values, _position(x, ops.argmax, axis, keepdim, call.types[1])


@lowering(aten.min.dim)
def _min_dim(call: Call, x: Node, axis: int, keepdim: bool = False) -> tuple[Node, Node]:
    values = _extreme(x, ops.reduce_min, axes_of(axis, x.rank) if x.rank else (), keepdim)
    return values, _position(x, ops.argmin, axis, keepdim, call.types[1])


@lowering(aten.count_nonzero.default, aten.count_nonzero.dim_IntList)
def _count_nonzero(call: Call, x: Node, axes: Any = None) -> Node:
    return _sum(cast(as_bool(x), "int64"), axes_of(axes, x.rank))


# -------------------------------------------------------------------------------------------------- variance, norms


def _variance(call: Call, x: Node, axes: Any, correction: Any, keepdim: bool, root: bool) -> tuple[Node, Node]:
    along = axes_of(axes, x.rank)
    n = count(x.shape, along)
    correction = 1 if correction is None else correction

    def mean(v: Node) -> Node:
        return ops.div(_sum(v, along, True), operand(n, v.dtype))

    def spread(v: Node) -> Node:
        squares = _sum(ops.square(ops.sub(v, mean(v))), along, keepdim)
        left = max(n - correction, 0) if isinstance(n, int) else None
        if left is None:
            free = ops.maximum(ops.sub(operand(n, v.dtype), float(correction)), 0.0)
        else:
            free = operand(float(left), v.dtype)
        result = ops.div(squares, free)
        return ops.sqrt(result) if root else result

    average = wide(lambda v: view(mean(v), call.types[-1].shape), call.dtype, x)
    return wide(spread, call.dtype, x), average


@lowering(aten.var.correction)
def _var(call: Call, x: Node, axes: Any = None, *, correction: Any = None, keepdim: bool = False) -> Node:
    return _variance(call, x, axes, correction, keepdim, False)[0]


@lowering(aten.std.correction)
def _std(call: Call, x: Node, axes: Any = None, *, correction: Any = None, keepdim: bool = False) -> Node:
    return _variance(call, x, axes, correction, keepdim, True)[0]


@lowering(aten.var_mean.correction)
def _var_mean(call: Call, x: Node, axes: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    return _variance(call, x, axes, correction, keepdim, False)


@lowering(aten.std_mean.correction)
def _std_mean(call: Call, x: Node, axes: Any = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    return _variance(call, x, axes, correction, keepdim, True)


def p_norm(v: Node, p: float, axes: Sequence[int], keepdim: bool) -> Node:
    """The p-norm of float32 or float64 elements over axes."""
    magnitude = ops.abs_(v)
    if p == 0:
        return _sum(cast(ops.ne(v, 0.0), v.dtype), axes, keepdim)
    if p == 1:
        return _sum(magnitude, axes, keepdim)
    if p == 2:
        return ops.sqrt(_sum(ops.square(v), axes, keepdim))
    if math.isinf(p):
        return _extreme(magnitude, ops.reduce_max if p > 0 else ops.reduce_min, axes, keepdim)
    return ops.pow_(_sum(ops.pow_(magnitude, float(p)), axes, keepdim), 1.0 / p)


@lowering(aten.linalg_vector_norm.default)
def _vector_norm(
    call: Call, x: Node, p: Any = 2, axes: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> Node:
    along = axes_of(axes, x.rank)
    empty = any(x.shape[a] == 0 for a in along)
    if empty and math.isinf(p):
        return filled(0, call.type)
    return wide(lambda v: p_norm(v, float(p), along, keepdim), call.dtype, x)


@lowering(aten.norm.ScalarOpt_dim, aten.norm.Scalar, aten.norm.ScalarOpt_dim_dtype, aten.norm.ScalarOpt_dtype)
def _norm(call: Call, x: Node, p: Any, axes: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Node:
    return _vector_norm(call, x, 2 if p is None else p, axes, keepdim)


@lowering(aten._cdist_forward.default)
def _cdist(call: Call, a: Node, b: Node, p: float, mode: Any = None) -> Node:
    if 0 in call.shape or a.shape[-1] == 0:
        return filled(0, call.type)
    x = ops.reshape(a, shape=(*a.shape[:-1], 1, a.shape[-1]))
    y = ops.reshape(b, shape=(*b.shape[:-2], 1, *b.shape[-2:]))
    return wide(lambda u, v: p_norm(ops.sub(u, v), float(p), (len(call.shape),), False), call.dtype, x, y)


@lowering(aten._pdist_forward.default)
def _pdist(call: Call, a: Node, p: float = 2) -> Node:
    refuse("pairwise distances within one set; use torch.cdist")


# ----------------------------------------------------------------------------------------------------------- scans


def _scan(kind: str) -> Any:
    def lower(call: Call, x: Node, axis: int, *, dtype: Any = None) -> Node:
        x = cast(x, call.dtype)
        return x if x.rank == 0 else ops.scan(x, axis=axis_of(axis, x.rank), kind=kind)

    return lower


lowering(aten.cumsum.default)(_scan("sum"))
lowering(aten.cumprod.default)(_scan("prod"))


def _running(kind: str) -> Any:
    def lower(call: Call, x: Node, axis: int) -> tuple[Node, Node]:
        if x.rank == 0 or 0 in x.shape:
            return x, filled(0, call.types[1])
        along = axis_of(axis, x.rank)
        v = cast(x, "uint8") if x.dtype == "bool" else x
        values = ops.scan(v, axis=along, kind=kind)
        # The last of equal elements counts; NaN beats everything, and the last NaN counts.
        new = ops.eq(v, values)
        if is_float(v.dtype):
            new = ops.logical_or(new, ops.isnan(v))
        where = ops.where(new, expand(positions(x.shape, along), x.shape), operand(0, "int64"))
        return cast(values, x.dtype), ops.scan(where, axis=along, kind="max")

    return lower


lowering(aten.cummax.default)(_running("max"))
lowering(aten.cummin.default)(_running("min"))


@lowering(aten.logcumsumexp.default)
def _logcumsumexp(call: Call, x: Node, axis: int) -> Node:
    if x.rank == 0:
        return x
    along = axis_of(axis, x.rank)

    def running(v: Node) -> Node:
        peak = _finite(ops.reduce_max(v, axes=(along,), keepdims=True))
        return ops.add(ops.log(ops.scan(ops.exp(ops.sub(v, peak)), axis=along, kind="sum")), peak)

    return wide(running, call.dtype, x)


def _finite(peak: Node) -> Node:
    return ops.where(ops.eq(ops.abs_(peak), float("inf")), operand(0.0, peak.dtype), peak)


@lowering(aten.logsumexp.default)
def _logsumexp(call: Call, x: Node, axes: Any, keepdim: bool = False) -> Node:
    along = axes_of(axes, x.rank)
    if not along:
        return cast(x, call.dtype)

    def smooth(v: Node) -> Node:
        if any(n == 0 for n in (v.shape[a] for a in along)):
            return ops.log(_sum(ops.exp(v), along, keepdim))
        peak = _finite(ops.reduce_max(v, axes=along, keepdims=True))
        total = ops.log(_sum(ops.exp(ops.sub(v, peak)), along, keepdim))
        return ops.add(total, view(peak, total.shape))

    return wide(smooth, call.dtype, x)


# ---------------------------------------------------------------------------------------------------------- sorting


def _sorted(x: Node, axis: int, descending: bool) -> tuple[Node, Node]:
    v = cast(x, "uint8") if x.dtype == "bool" else x
    both = ops.sort(v, axis=axis, descending=descending)
    return cast(ops.get(both, index=0), x.dtype), ops.get(both, index=1)


@lowering(aten.sort.default)
def _sort(call: Call, x: Node, axis: int = -1, descending: bool = False) -> tuple[Node, Node]:
    if x.rank == 0:
        return x, filled(0, call.types[1])
    return _sorted(x, axis_of(axis, x.rank), descending)


@lowering(aten.sort.stable)
def _sort_stable(call: Call, x: Node, *, stable: Any = None, dim: int = -1, descending: bool = False) -> Any:
    return _sort(call, x, dim, descending)


@lowering(aten.argsort.default)
def _argsort(call: Call, x: Node, axis: int = -1, descending: bool = False) -> Node:
    if x.rank == 0:
        return filled(0, call.type)
    return _sorted(x, axis_of(axis, x.rank), descending)[1]


@lowering(aten.argsort.stable)
def _argsort_stable(call: Call, x: Node, *, stable: bool, dim: int = -1, descending: bool = False) -> Node:
    return _argsort(call, x, dim, descending)


@lowering(aten.topk.default)
def _topk(call: Call, x: Node, k: Dim, axis: int = -1, largest: bool = True, sorted: bool = True) -> Any:
    if x.rank == 0:
        return x, filled(0, call.types[1])
    along = axis_of(axis, x.rank)
    values, indices = (cut(v, along, 0, k) for v in _sorted(x, along, largest))
    wanted = any(user.args[1] == 1 and user.users for user in call.node.users)
    if wanted and not is_float(x.dtype):
        # Among equal elements PyTorch picks whatever its C++ library's selection comes upon first.
        refuse("which of several equal integers topk picks is unspecified; use torch.sort(stable=True)")
    return values, indices


@lowering(aten.kthvalue.default)
def _kthvalue(call: Call, x: Node, k: int, axis: int = -1, keepdim: bool = False) -> Any:
    if x.rank == 0:
        return x, filled(0, call.types[1])
    along = axis_of(axis, x.rank)
    both = _sorted(x, along, False)
    return tuple(view(cut(v, along, k - 1, k), t.shape) for v, t in zip(both, call.types, strict=True))


def _median(x: Node, axis: int, ignore_nan: bool) -> tuple[Node, Node]:
    """Lower median and its index along one axis, which stays with size 1; a NaN wins unless it is ignored."""
    values, indices = _sorted(x, axis, False)
    n = x.shape[axis]
    middle: Any = expand(
        operand(dim((n - 1) // 2), "int64"), tuple(1 if i == axis else d for i, d in enumerate(x.shape))
    )
    if is_float(x.dtype):
        nans = ops.sum_(cast(ops.isnan(x), "int64"), axes=(axis,), keepdims=True)
        if ignore_nan:
            left = ops.sub(operand(n, "int64"), nans)
            middle = ops.maximum(ops.floor_div(ops.sub(left, 1), 2), 0)
        else:  # the first NaN stands behind all numbers
            first = ops.sub(operand(n, "int64"), nans)
            middle = ops.where(ops.gt(nans, 0), first, middle)
    return ops.gather(values, middle, axis=axis), ops.gather(indices, middle, axis=axis)


@lowering(aten.median.dim, aten.nanmedian.dim)
def _median_dim(call: Call, x: Node, axis: int, keepdim: bool = False) -> Any:
    if x.rank == 0:
        return x, filled(0, call.types[1])
    both = _median(x, axis_of(axis, x.rank), call.node.target is aten.nanmedian.dim)
    return tuple(view(v, t.shape) for v, t in zip(both, call.types, strict=True))


@lowering(aten.median.default, aten.nanmedian.default)
def _median_all(call: Call, x: Node) -> Node:
    flat = view(x, (x.tensor.size,))
    return view(_median(flat, 0, call.node.target is aten.nanmedian.default)[0], ())


@lowering(aten.searchsorted.Tensor, aten.searchsorted.Scalar)
def _searchsorted(
    call: Call,
    table: Node,
    x: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: Any = None,
    sorter: Any = None,
) -> Node:
    right = right or side == "right"
    if sorter is not None:
        table = ops.gather(table, sorter, axis=table.rank - 1)
    scalar = not isinstance(x, Node) or x.rank == 0
    dtype = call.promoted() if not isinstance(x, Node) or x.dtype != table.dtype else table.dtype
    values = at_least_1d(operand(x, dtype))
    edges = cast(table, dtype)
    if edges.rank > 1:
        edges = ops.reshape(edges, shape=(*edges.shape[:-1], 1, edges.shape[-1]))
    values = ops.reshape(values, shape=(*values.shape, 1))
    # Where a value would go: behind as many edges as don't reach it. NaN is reached by none.
    passed = ops.logical_not(ops.gt(edges, values) if right else ops.ge(edges, values))
    found = cast(_sum(cast(passed, "int64"), (passed.rank - 1,)), call.dtype)
    return view(found, ()) if scalar and not call.shape else found


@lowering(aten.bucketize.Tensor, aten.bucketize.Scalar)
def _bucketize(call: Call, x: Any, table: Node, *, out_int32: bool = False, right: bool = False) -> Node:
    dtype = call.promoted() if not isinstance(x, Node) or x.dtype != table.dtype else table.dtype
    values = operand(x, dtype)
    values = ops.reshape(values, shape=(*values.shape, 1))
    edges = cast(table, dtype)
    passed = ops.logical_not(ops.gt(edges, values) if right else ops.ge(edges, values))
    return cast(_sum(cast(passed, "int64"), (passed.rank - 1,)), call.dtype)


# ------------------------------------------------------------------------------------------------- softmax and norms


@lowering(aten._softmax.default, aten.softmax.int)
def _softmax(call: Call, x: Node, axis: int, *_: Any) -> Node:
    x = cast(x, call.dtype)
    if x.rank == 0:
        return view(ops.softmax(at_least_1d(x), axis=0), ())
    return ops.softmax(x, axis=axis_of(axis, x.rank))


@lowering(aten._safe_softmax.default)
def _safe_softmax(call: Call, x: Node, axis: int, dtype: Any = None) -> Node:
    x = cast(x, call.dtype)
    if x.rank == 0:
        return view(_rows_without_keys(at_least_1d(x), 0), ())
    return _rows_without_keys(x, axis_of(axis, x.rank))


def _rows_without_keys(x: Node, axis: int) -> Node:
    """Softmax where a row of -inf gives 0."""
    hidden = ops.all_(ops.eq(x, -float("inf")), axes=(axis,), keepdims=True)
    return ops.where(hidden, operand(0.0, x.dtype), ops.softmax(x, axis=axis))


@lowering(aten._log_softmax.default, aten.log_softmax.int)
def _log_softmax(call: Call, x: Node, axis: int, *_: Any) -> Node:
    along = axis_of(axis, x.rank)

    def smooth(v: Node) -> Node:
        v = at_least_1d(v)
        if v.shape[along] == 0:
            return v
        centred = ops.sub(v, ops.reduce_max(v, axes=(along,), keepdims=True))
        total = ops.sum_(ops.exp(centred), axes=(along,), keepdims=True)
        return view(ops.sub(centred, ops.log(total)), call.shape)

    return wide(smooth, call.dtype, x)


@lowering(aten.layer_norm.default)
def _layer_norm(
    call: Call, x: Node, shape: Sequence[Dim], w: Any = None, b: Any = None, eps: float = 1e-5, *_: Any
) -> Node:
    flat, w, b = _flattened(call, x, shape, w, b)
    return view(ops.layer_norm(flat, w, b, eps=float(eps)), call.shape)


def _flattened(call: Call, x: Node, shape: Sequence[Dim], *affine: Node | None) -> tuple[Any, ...]:
    """x with its normalised axes joined into one last axis, and the affine parameters as vectors, in x's dtype."""
    inner = count(x.shape, range(x.rank - len(shape), x.rank))
    flat = view(x, (*x.shape[: x.rank - len(shape)], inner)) if len(shape) != 1 else x
    return (flat, *(None if v is None else view(cast(v, x.dtype), (inner,)) for v in affine))


@lowering(aten.native_layer_norm.default)
def _native_layer_norm(call: Call, x: Node, shape: Sequence[Dim], w: Any, b: Any, eps: float) -> Any:
    flat, w, b = _flattened(call, x, shape, w, b)
    y = view(ops.layer_norm(flat, w, b, eps=float(eps)), call.shape)
    axes = tuple(range(x.rank - len(shape), x.rank))
    inner = "float32" if x.dtype in HALF else x.dtype
    v = cast(x, inner)
    mean, rstd = _moments(v, axes, eps)
    return y, _as_type(mean, call.types[1]), _as_type(rstd, call.types[2])


def _as_type(x: Node, type: TensorType) -> Node:
    return view(cast(x, type.dtype), type.shape)


def _moments(v: Node, axes: Sequence[int], eps: float) -> tuple[Node, Node]:
    """Mean and 1 / sqrt(variance + eps) over axes, which stay with size 1."""
    n = operand(count(v.shape, axes), v.dtype)
    mean = ops.div(_sum(v, axes, True), n)
    variance = ops.div(_sum(ops.square(ops.sub(v, mean)), axes, True), n)
    return mean, ops.rsqrt(ops.add(variance, float(eps)))


@lowering(aten.rms_norm.default, aten._fused_rms_norm.default)
def _rms_norm(call: Call, x: Node, shape: Sequence[Dim], w: Any = None, eps: float | None = None) -> Any:
    if eps is None:
        eps = float(torch.finfo(getattr(torch, "float32" if x.dtype in HALF else x.dtype)).eps)
    gain = w if w is None or w.dtype == x.dtype else None
    flat, gain = _flattened(call, x, shape, gain)
    y = view(ops.rms_norm(flat, gain, eps=float(eps), round_first=False), call.shape)
    if w is not None and gain is None:
        y = ops.mul(cast(y, call.dtype), cast(w, call.dtype))
    if len(call.types) == 1:
        return y
    refuse("the second result of _fused_rms_norm")


def _channelwise(x: Node, rank: int, dtype: str) -> Node:
    """A vector per channel, shaped to broadcast against [batch, channels, space…]."""
    return view(cast(x, dtype), (1, x.shape[0], *(1,) * (rank - 2)))


@lowering(
    aten._native_batch_norm_legit_no_training.default, aten._native_batch_norm_legit.default,
    aten._native_batch_norm_legit.no_stats, aten.native_batch_norm.default, aten._batch_norm_no_update.default,
    aten._native_batch_norm_legit_functional.default, aten._batch_norm_with_update_functional.default,
)  # fmt: skip
def _batch_norm(call: Call, x: Node, w: Any, b: Any, *rest: Any) -> Any:
    target = call.node.target
    training, mean, variance = False, None, None
    momentum, eps = rest[-2:]
    if target is aten._native_batch_norm_legit.no_stats:
        training = True
    elif target in (
        aten._native_batch_norm_legit.default, aten.native_batch_norm.default,
        aten._native_batch_norm_legit_functional.default,
    ):  # fmt: skip
        mean, variance, training = rest[0], rest[1], rest[2]
    else:
        mean, variance = rest[0], rest[1]
        training = target is aten._batch_norm_with_update_functional.default
    inner = "float32" if x.dtype in HALF else x.dtype
    v = cast(x, inner)
    axes = tuple(i for i in range(x.rank) if i != 1)
    if training:
        m, r = _moments(v, axes, eps)
    else:
        assert mean is not None and variance is not None
        m, r = _channelwise(mean, x.rank, inner), _channelwise(variance, x.rank, inner)
        r = ops.rsqrt(ops.add(r, float(eps)))
    y = ops.mul(ops.sub(v, m), r)
    if w is not None:
        y = ops.mul(y, _channelwise(w, x.rank, inner))
    if b is not None:
        y = ops.add(y, _channelwise(b, x.rank, inner))
    y = cast(y, call.dtype)
    results: list[Node | None] = [y]
    for extra, type in zip((m, r), call.types[1:3], strict=False):
        results.append(_as_type(extra, type) if type.shape != (0,) else filled(0, type))
    if target is aten._native_batch_norm_legit_functional.default:
        results += _running_statistics(v, m, axes, mean, variance, float(momentum)) if training else [mean, variance]
    return tuple(results + [None] * (len(call.types) - len(results)))


def _running_statistics(
    v: Node, m: Node, axes: Sequence[int], mean: Any, variance: Any, momentum: float
) -> list[Node | None]:
    """The running mean and (unbiased) variance after one batch."""
    n = count(v.shape, axes)
    squares = _sum(ops.square(ops.sub(v, m)), axes, False)
    unbiased = ops.div(squares, operand(dim(n - 1), v.dtype))
    found: list[Node | None] = []
    for old, new in ((mean, view(m, mean.shape)), (variance, unbiased)):
        mixed = ops.add(ops.mul(cast(old, v.dtype), 1 - momentum), ops.mul(new, momentum))
        found.append(cast(mixed, old.dtype))
    return found


def _grouped_norm(
    x: Node, w: Node | None, b: Node | None, n: Dim, inside: Dim, groups: int, eps: float
) -> tuple[Node, Node, Node]:
    """Group normalisation of x [n, channels, space…] with `inside` elements per item; mean and rstd [n, groups, 1]."""
    dtype = "float32" if x.dtype in HALF else x.dtype
    width = inside // groups if isinstance(inside, int) else dim(inside / groups)
    grouped = view(cast(x, dtype), (n, groups, width))
    mean, rstd = _moments(grouped, (2,), eps)
    y = view(ops.mul(ops.sub(grouped, mean), rstd), x.shape)
    for gain, op in ((w, ops.mul), (b, ops.add)):
        if gain is not None:
            y = op(y, _channelwise(gain, x.rank, dtype))
    return cast(y, x.dtype), mean, rstd


@lowering(aten.native_group_norm.default)
def _native_group_norm(
    call: Call, x: Node, w: Any, b: Any, n: Dim, channels: Dim, inner: Dim, groups: int, eps: float
) -> Any:
    y, mean, rstd = _grouped_norm(x, w, b, n, dim(channels * inner), groups, eps)
    return y, _as_type(mean, call.types[1]), _as_type(rstd, call.types[2])


@lowering(aten.group_norm.default)
def _group_norm(call: Call, x: Node, groups: int, w: Any = None, b: Any = None, eps: float = 1e-5, *_: Any) -> Node:
    return _grouped_norm(x, w, b, x.shape[0], count(x.shape, range(1, x.rank)), groups, eps)[0]


@lowering(aten.glu.default)
def _glu(call: Call, x: Node, axis: int = -1) -> Node:
    along = axis_of(axis, x.rank)
    half = call.shape[along]
    a, b = cut(x, along, 0, half), cut(x, along, half, x.shape[along])
    return wide(lambda u, v: ops.mul(u, ops.sigmoid(v)), call.dtype, a, b)
