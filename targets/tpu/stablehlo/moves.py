"""Emitters of ops that move elements, select them by index, reduce, scan and sort.

An index outside its table, which the interpreter refuses, reads the nearest end here: a TPU program has no way to fail.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jisu.compiler import ops
from jisu.compiler.graph import Op
from jisu.compiler.types import TensorType, is_float
from jisu.targets.tpu.stablehlo.build import Body, Value
from jisu.targets.tpu.stablehlo.elementwise import plain, widened


def _iota(body: Body, *, extent: int, dtype: str) -> Value:
    return body.iota((extent,), 0, dtype)


def _windows(
    body: Body, x: Value, *, axes: Sequence[int], sizes: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> Value:
    rank = x.rank
    for k, (axis, size, stride, dilation) in enumerate(zip(axes, sizes, strides, dilations, strict=True)):
        count = (x.shape[axis] - dilation * (size - 1) - 1) // stride + 1
        grid = (count, size)
        found = x.take(body.iota(grid, 0) * stride + body.iota(grid, 1) * dilation, axis)
        inside = [i for i in range(found.rank) if i != axis + 1]
        inside.insert(rank + k, axis + 1)
        x = found.transpose(*inside)
    return x


def wrapped(indices: Value, size: int) -> Value:
    """Indices int32 where those from -size count from the end."""
    at = indices.astype("int32")
    return at if indices.dtype == "uint8" else (at < 0).select(at + size, at)


def take(x: Value, indices: Value, *, axis: int, wrap: bool = True) -> Value:
    """`jisu.compiler.ops.take`."""
    return x.take(wrapped(indices, x.shape[axis]) if wrap else indices.astype("int32"), axis)


def _places(x: Value, indices: Value, axis: int) -> Value:
    """int32 [..., rank]: where each index of `gather` and `scatter` points."""
    shape = indices.shape
    at = [wrapped(indices, x.shape[axis]) if i == axis else x.body.iota(shape, i) for i in range(x.rank)]
    return x.body.stack(at, -1)


def _scatter(x: Value, indices: Value, updates: Value, *, axis: int, mode: str) -> Value:
    kind = {"set": "", "add": "add", "mul": "multiply", "min": "minimum", "max": "maximum"}[mode]
    return x.scatter(_places(x, indices, axis), updates, range(x.rank), kind)


def sort(body: Body, x: Value, *, axis: int, descending: bool) -> tuple[Value, Value]:
    def before(a: Value, b: Value, i: Value, j: Value) -> list[Value]:
        first, second = (b, a) if descending else (a, b)
        found = first < second
        return [found | (second.isnan() & ~first.isnan()) if is_float(a.dtype) else found]

    types = [TensorType((), x.dtype)] * 2 + [TensorType((), "int32")] * 2
    block = body.region(types, before)
    order = body.iota(x.shape, axis)
    text = (
        f'"stablehlo.sort"({x.name}, {order.name}) <{{dimension = {axis} : i64, is_stable = true}}> ({{\n{block}\n'
        f"{body.indent}}}) : ({x.type}, {order.type}) -> ({x.type}, {order.type})"
    )
    values, places = body.several(text, [TensorType(x.shape, x.dtype), TensorType(x.shape, "int32")])
    return values, places.astype("int64")


def _reduction(kind: str) -> Callable[..., Value]:
    def emitter(x: Value, *, axes: Sequence[int], keepdims: bool) -> Value:
        return x.reduce(kind, axes, keepdims)

    return emitter


def _arg(kind: str) -> Callable[..., Value]:
    def emitter(x: Value, *, axis: int) -> Value:
        extreme = x.reduce(kind, [axis], keepdims=True)
        found = x.equals(extreme)
        if is_float(x.dtype):
            found = found | x.isnan()  # the extreme is NaN where there is one, and equals nothing then
        return found.select(x.body.iota(x.shape, axis), x.shape[axis]).min(axis).astype("int64")

    return emitter


def _scan(x: Value, *, axis: int, kind: str) -> Value:
    return x.scan({"sum": "add", "prod": "multiply", "max": "maximum", "min": "minimum"}[kind], axis)


def softmax(x: Value, *, axis: int) -> Value:
    """exp(x) normalised to sum 1; a row of -inf gives NaN."""
    e = (x - x.max(axis, keepdims=True)).unary("exponential")
    return e / e.sum(axis, keepdims=True)


EMITTERS: Mapping[Op, Callable[..., Any]] = {
    ops.reshape: lambda body, x, *, shape: x.reshape(*shape),
    ops.transpose: lambda body, x, *, perm: x.transpose(*perm),
    ops.broadcast_to: lambda body, x, *, shape: x.broadcast(shape),
    ops.slice_: lambda body, x, *, starts, stops, steps: x.slice(starts, stops, steps),
    ops.concat: lambda body, *xs, axis: body.concat(xs, axis),
    ops.pad: lambda body, x, value, *, low, high, interior: x.pad(low, high, interior, value),
    ops.flip: lambda body, x, *, axes: x.reverse(axes),
    ops.iota: _iota,
    ops.dim_value: lambda body, *, value: body.full(value, (), "int64"),
    ops.windows: _windows,
    ops.get: lambda body, xs, *, index: xs[index],
    ops.take: plain(take),
    ops.gather: plain(lambda x, indices, *, axis: x.at(_places(x, indices, axis))),
    ops.scatter: widened(_scatter),
    ops.sort: sort,
    ops.sum_: widened(_reduction("add")),
    ops.prod: widened(_reduction("multiply")),
    ops.reduce_max: plain(_reduction("maximum")),
    ops.reduce_min: plain(_reduction("minimum")),
    ops.any_: plain(_reduction("or")),
    ops.all_: plain(_reduction("and")),
    ops.argmax: plain(_arg("maximum")),
    ops.argmin: plain(_arg("minimum")),
    ops.scan: widened(_scan),
    ops.softmax: widened(softmax),
}
