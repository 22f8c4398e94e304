"""Pooling, by way of sliding windows, and im2col."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from jisu.compiler import ops
from jisu.compiler.graph import Node
from jisu.compiler.types import Dim, dim
from jisu.frontends.aten.table import (
    Call,
    cast,
    expand,
    filled,
    lowering,
    lowest,
    operand,
    pad,
    permute,
    positions,
    refuse,
    view,
    wide,
)

aten = torch.ops.aten


def _each(value: Sequence[int], n: int, default: Sequence[int] = ()) -> tuple[int, ...]:
    value = tuple(value) or tuple(default)
    return value * n if len(value) == 1 else value


def _covering(
    x: Node, value: Any, out: Sequence[Dim], sizes: Sequence[int], strides: Sequence[int], padding: Sequence[int],
    dilations: Sequence[int],
) -> Node:  # fmt: skip
    """Windows [*leading, *out, *sizes] of `x` over its last axes; what lies outside is `value`."""
    n = len(sizes)
    lead = x.rank - n
    high: list[Dim] = []
    for k in range(n):
        reach = dim((out[k] - 1) * strides[k] + dilations[k] * (sizes[k] - 1) + 1)
        high.append(dim(reach - padding[k] - x.shape[lead + k]))
    x = pad(x, value, (*(0,) * lead, *padding), (*(0,) * lead, *high))
    return ops.windows(
        x, axes=tuple(range(lead, x.rank)), sizes=tuple(sizes), strides=tuple(strides), dilations=tuple(dilations)
    )


@lowering(
    aten.max_pool2d_with_indices.default, aten.max_pool3d_with_indices.default, aten.max_pool1d_with_indices.default
)
def _max_pool_with_indices(
    call: Call, x: Node, sizes: Sequence[int], strides: Sequence[int] = (), padding: Sequence[int] = (0,),
    dilations: Sequence[int] = (1,), ceil_mode: bool = False,
) -> Any:  # fmt: skip
    n = int(call.name.split("max_pool")[1][0])
    sizes = _each(sizes, n)
    strides, padding, dilations = _each(strides, n, sizes), _each(padding, n), _each(dilations, n)
    if 0 in call.shape:
        return filled(0, call.types[0]), filled(0, call.types[1])
    lead = x.rank - n
    out = call.shape[lead:]
    around = _covering(x, lowest(x.dtype), out, sizes, strides, padding, dilations)
    inner = tuple(range(x.rank, x.rank + n))
    values = ops.reduce_max(around, axes=inner, keepdims=False)
    # Where in the image each tap of a window lies, flat; taps in the padding are never the first largest.
    flat: Node | None = None
    within: Node | None = None
    for k in range(n):
        size = x.shape[lead + k]
        start = positions((*out, *sizes), k)
        tap = positions((*out, *sizes), n + k)
        at = ops.add(ops.sub(_times(start, strides[k]), padding[k]), _times(tap, dilations[k]))
        ok = ops.logical_and(ops.ge(at, 0), ops.lt(at, operand(size, "int64")))
        within = ok if within is None else ops.logical_and(within, ok)
        flat = at if flat is None else ops.add(ops.mul(flat, operand(size, "int64")), at)
    assert flat is not None and within is not None
    window = (*call.shape, *sizes)
    taps = 1
    for s in sizes:
        taps *= s
    best = ops.eq(around, view(values, (*call.shape, *(1,) * n)))
    if x.dtype in ("float16", "bfloat16", "float32", "float64"):
        best = ops.logical_or(best, ops.isnan(around))
    best = ops.logical_and(best, within)
    chosen = ops.argmax(view(cast(expand(best, window), "uint8"), (*call.shape, taps)), axis=x.rank)
    where = view(expand(flat, (*out, *sizes)), (*(1,) * lead, *out, taps))
    where = expand(where, (*call.shape, taps))
    indices = ops.gather(where, view(chosen, (*call.shape, 1)), axis=x.rank)
    return values, view(indices, call.shape)


def _times(x: Node, factor: int) -> Node:
    return x if factor == 1 else ops.mul(x, factor)


@lowering(aten.max_pool1d.default, aten.max_pool2d.default, aten.max_pool3d.default)
def _max_pool(
    call: Call, x: Node, sizes: Sequence[int], strides: Sequence[int] = (), padding: Sequence[int] = (0,),
    dilations: Sequence[int] = (1,), ceil_mode: bool = False,
) -> Node:  # fmt: skip
    n = int(call.name.split("max_pool")[1][0])
    sizes = _each(sizes, n)
    strides, padding, dilations = _each(strides, n, sizes), _each(padding, n), _each(dilations, n)
    if 0 in call.shape:
        return filled(0, call.type)
    around = _covering(x, lowest(x.dtype), call.shape[x.rank - n :], sizes, strides, padding, dilations)
    return ops.reduce_max(around, axes=tuple(range(x.rank, x.rank + n)), keepdims=False)


@lowering(aten.avg_pool1d.default, aten.avg_pool2d.default, aten.avg_pool3d.default)
def _avg_pool(
    call: Call, x: Node, sizes: Sequence[int], strides: Sequence[int] = (), padding: Sequence[int] = (0,),
    ceil_mode: bool = False, include_pad: bool = True, divisor: int | None = None,
) -> Node:  # fmt: skip
    n = int(call.name.split("avg_pool")[1][0])
    sizes = _each(sizes, n)
    strides, padding = _each(strides, n, sizes), _each(padding, n)
    if 0 in call.shape:
        return filled(0, call.type)
    lead = x.rank - n
    out = call.shape[lead:]

    def average(v: Node) -> Node:
        total = ops.sum_(
            _covering(v, 0, out, sizes, strides, padding, (1,) * n),
            axes=tuple(range(v.rank, v.rank + n)),
            keepdims=False,
        )
        if divisor:
            return ops.div(total, operand(divisor, v.dtype))
        return ops.div(total, _taps(x.shape[lead:], out, sizes, strides, padding, ceil_mode, include_pad, v.dtype))

    return wide(average, call.dtype, x)


def _taps(
    space: Sequence[Dim], out: Sequence[Dim], sizes: Sequence[int], strides: Sequence[int], padding: Sequence[int],
    ceil_mode: bool, include_pad: bool, dtype: str,
) -> Node:  # fmt: skip
    """How many taps of each window count, broadcastable to [*leading, *out]."""
    result: Node | None = None
    for k, size in enumerate(space):
        if (include_pad and not ceil_mode) or (not padding[k] and not ceil_mode):
            number: Node = operand(sizes[k], dtype)
        else:
            start = ops.sub(_times(positions(out, k), strides[k]), padding[k])
            last = dim(size + padding[k]) if include_pad else size
            stop = ops.minimum(ops.add(start, sizes[k]), operand(last, "int64"))
            number = cast(ops.sub(stop, start if include_pad else ops.maximum(start, 0)), dtype)
        result = number if result is None else ops.mul(result, number)
    assert result is not None
    return result


@lowering(aten._adaptive_avg_pool2d.default, aten._adaptive_avg_pool3d.default, aten.adaptive_avg_pool1d.default)
def _adaptive_avg_pool(call: Call, x: Node, *_: Any) -> Node:
    """Averages over floor(i n / m) … ceil((i + 1) n / m), axis by axis, as products with a weight matrix."""
    n = int(call.name.split("avg_pool")[1][0])
    if 0 in call.shape:
        return filled(0, call.type)

    def average(v: Node) -> Node:
        for axis in range(v.rank - n, v.rank):
            size, out = v.shape[axis], call.shape[axis]
            if not (isinstance(size, int) and isinstance(out, int)):
                refuse("adaptive pooling over an axis of a dynamic size")
            inside = _adaptive_members(size, out)
            weights = cast(inside, v.dtype)
            weights = ops.div(weights, ops.sum_(weights, axes=(1,), keepdims=True))
            perm = [i for i in range(v.rank) if i != axis] + [axis]
            y = ops.matmul(permute(v, perm), permute(weights, (1, 0)))
            v = permute(y, [perm.index(i) for i in range(v.rank)])
        return v

    return wide(average, call.dtype, x)


def _adaptive_members(size: int, out: int) -> Node:
    """bool [out, size]: whether an element belongs to an output's window."""
    i, j = positions((out, size), 0), positions((out, size), 1)
    start = ops.floor_div(ops.mul(i, size), out)
    stop = ops.floor_div(ops.add(ops.mul(ops.add(i, 1), size), out - 1), out)
    return ops.logical_and(ops.ge(j, start), ops.lt(j, stop))


@lowering(aten.adaptive_max_pool1d.default, aten.adaptive_max_pool2d.default, aten.adaptive_max_pool3d.default)
def _adaptive_max_pool(call: Call, x: Node, *_: Any) -> Any:
    n = int(call.name.split("max_pool")[1][0])
    if 0 in call.shape:
        return filled(0, call.types[0]), filled(0, call.types[1])
    lead = x.rank - n
    sizes, outs = x.shape[lead:], call.shape[lead:]
    if not all(isinstance(v, int) for v in (*sizes, *outs)):
        refuse("adaptive pooling over an axis of a dynamic size")
    # Every output looks at the whole image through its mask.
    total = 1
    for s in sizes:
        total *= s
    member: Node | None = None
    for k in range(n):
        shape = (*(outs[i] if i == k else 1 for i in range(n)), *(sizes[i] if i == k else 1 for i in range(n)))
        one = view(_adaptive_members(sizes[k], outs[k]), shape)
        member = one if member is None else ops.logical_and(member, one)
    assert member is not None
    full = (*call.shape, *sizes)
    image = view(x, (*x.shape[:lead], *(1,) * n, *sizes))
    seen = ops.where(member, image, operand(lowest(x.dtype), x.dtype))
    flat = view(expand(seen, full), (*call.shape, total))
    values = ops.reduce_max(flat, axes=(x.rank,), keepdims=False)
    best = ops.eq(flat, view(values, (*call.shape, 1)))
    if x.dtype in ("float16", "bfloat16", "float32", "float64"):
        best = ops.logical_or(best, ops.isnan(flat))
    mask = view(expand(member, (*outs, *sizes)), (*(1,) * lead, *outs, total))
    chosen = ops.argmax(cast(ops.logical_and(best, mask), "uint8"), axis=x.rank)
    return values, chosen


@lowering(aten.im2col.default)
def _im2col(
    call: Call, x: Node, sizes: Sequence[int], dilations: Sequence[int], padding: Sequence[int], strides: Sequence[int]
) -> Node:
    if 0 in call.shape:
        return filled(0, call.type)
    batched = x if x.rank == 4 else view(x, (1, *x.shape))
    padded = pad(batched, 0, (0, 0, *padding), (0, 0, *padding))
    around = ops.windows(padded, axes=(2, 3), sizes=tuple(sizes), strides=tuple(strides), dilations=tuple(dilations))
    return view(permute(around, (0, 1, 4, 5, 2, 3)), call.shape)
