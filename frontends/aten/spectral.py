"""Complex numbers as pairs of real tensors, and Fourier transforms as products with cosines and sines.

The IR has no complex dtypes. Inside a model complex values are `Complex` pairs; at its inputs, outputs and weights they
are refused. `COMPLEX` holds the lowerings for calls that take or give complex tensors; what only moves elements is
lowered on both parts alike by the ordinary table.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import attrs
import torch

from jisu.compiler import ops
from jisu.compiler.graph import Node
from jisu.compiler.types import Dim
from jisu.frontends.aten.table import (
    LOWERINGS,
    Call,
    Lowering,
    axes_of,
    axis_of,
    cast,
    cut,
    filled,
    move_axis,
    operand,
    pick,
    refuse,
    unsqueeze,
)

aten = torch.ops.aten


@attrs.frozen(eq=False)
class Complex:
    """A complex tensor: two real ones of one type."""

    re: Node
    im: Node


COMPLEX: dict[Any, Lowering] = {}
"""Lowerings of calls that take or give complex tensors. Types in `Call` are those of the parts."""


def _complex(*targets: Any) -> Callable[[Lowering], Lowering]:
    def enter(function: Lowering) -> Lowering:
        for target in targets:
            COMPLEX[target] = function
        return function

    return enter


def _pair(x: Any, dtype: str) -> Complex:
    """Any operand as a pair."""
    if isinstance(x, Complex):
        return Complex(cast(x.re, dtype), cast(x.im, dtype))
    if isinstance(x, complex):
        return Complex(operand(x.real, dtype), operand(x.imag, dtype))
    return Complex(operand(x, dtype), operand(0.0, dtype))


def _plane(x: Node, index: int) -> Node:
    return pick(x, x.rank - 1, index)


@_complex(aten.view_as_complex.default)
def _view_as_complex(call: Call, x: Node) -> Complex:
    return Complex(_plane(x, 0), _plane(x, 1))


@_complex(aten.view_as_real.default)
def _view_as_real(call: Call, x: Complex) -> Node:
    rank = x.re.rank
    return ops.concat(unsqueeze(x.re, rank), unsqueeze(x.im, rank), axis=rank)


@_complex(aten.complex.default)
def _from_parts(call: Call, re: Node, im: Node) -> Complex:
    return Complex(re, im)


@_complex(aten.polar.default)
def _polar(call: Call, length: Node, angle: Node) -> Complex:
    return Complex(ops.mul(length, ops.cos(angle)), ops.mul(length, ops.sin(angle)))


@_complex(aten.real.default)
def _real(call: Call, x: Complex) -> Node:
    return x.re


@_complex(aten.imag.default)
def _imag(call: Call, x: Complex) -> Node:
    return x.im


@_complex(aten._conj.default, aten.conj.default, aten.conj_physical.default)
def _conjugate(call: Call, x: Complex) -> Complex:
    return Complex(x.re, ops.neg(x.im))


@_complex(aten._to_copy.default, aten.to.dtype)
def _to_copy(call: Call, x: Any, *_: Any, **__: Any) -> Any:
    if call.node.meta["val"].is_complex():
        pair = _pair(x, call.dtype)
        return pair if isinstance(x, Complex) else Complex(pair.re, filled(0.0, call.type))
    return cast(x.re, call.dtype)


@_complex(aten.mul.Tensor, aten.mul.Scalar)
def _mul(call: Call, a: Any, b: Any) -> Complex:
    x, y = _pair(a, call.dtype), _pair(b, call.dtype)
    if not isinstance(b, (Complex, complex)):
        return Complex(ops.mul(x.re, y.re), ops.mul(x.im, y.re))
    if not isinstance(a, (Complex, complex)):
        return Complex(ops.mul(x.re, y.re), ops.mul(x.re, y.im))
    return Complex(ops.sub(ops.mul(x.re, y.re), ops.mul(x.im, y.im)), ops.add(ops.mul(x.re, y.im), ops.mul(x.im, y.re)))


@_complex(aten.div.Tensor, aten.div.Scalar)
def _div(call: Call, a: Any, b: Any) -> Complex:
    x = _pair(a, call.dtype)
    if not isinstance(b, (Complex, complex)):
        by = operand(b, call.dtype)
        return Complex(ops.div(x.re, by), ops.div(x.im, by))
    y = _pair(b, call.dtype)
    size = ops.add(ops.square(y.re), ops.square(y.im))
    re = ops.add(ops.mul(x.re, y.re), ops.mul(x.im, y.im))
    im = ops.sub(ops.mul(x.im, y.re), ops.mul(x.re, y.im))
    return Complex(ops.div(re, size), ops.div(im, size))


@_complex(aten.add.Tensor, aten.sub.Tensor)
def _add(call: Call, a: Any, b: Any, *, alpha: Any = 1) -> Complex:
    op = ops.add if call.node.target is aten.add.Tensor else ops.sub
    x, y = _pair(a, call.dtype), _pair(b, call.dtype)
    if alpha != 1:
        y = Complex(ops.mul(y.re, operand(alpha, call.dtype)), ops.mul(y.im, operand(alpha, call.dtype)))
    return Complex(op(x.re, y.re), op(x.im, y.im))


@_complex(aten.abs.default)
def _abs(call: Call, x: Complex) -> Node:
    return ops.sqrt(ops.add(ops.square(x.re), ops.square(x.im)))


@_complex(aten.angle.default)
def _angle(call: Call, x: Complex) -> Node:
    return ops.atan2(x.im, x.re)


@_complex(aten.exp.default)
def _exp(call: Call, x: Complex) -> Complex:
    length = ops.exp(x.re)
    return Complex(ops.mul(length, ops.cos(x.im)), ops.mul(length, ops.sin(x.im)))


_ALIKE = (
    "view.default", "_unsafe_view.default", "reshape.default", "unsqueeze.default", "squeeze.dim", "squeeze.dims",
    "squeeze.default", "expand.default", "permute.default", "transpose.int", "t.default", "select.int", "slice.Tensor",
    "clone.default", "alias.default", "detach.default", "contiguous.default", "repeat.default", "flip.default",
    "roll.default", "index_select.default", "embedding.default", "index.Tensor", "gather.default", "neg.default",
    "sum.dim_IntList", "sum.default", "mean.dim", "mean.default", "lift_fresh_copy.default", "cumsum.default",
    "diagonal.default", "unfold.default", "as_strided.default",
)  # fmt: skip
_LISTS = ("cat.default", "stack.default")
_ZERO_FILL = ("constant_pad_nd.default",)


def _alike(target: Any) -> Lowering:
    def lower(call: Call, x: Any, *rest: Any, **keywords: Any) -> Complex:
        function = LOWERINGS[target]
        parts: list[Any]
        if isinstance(x, (list, tuple)):
            pairs = [_pair(v, call.dtype) for v in x]
            parts = [[p.re for p in pairs], [p.im for p in pairs]]
        else:
            parts = [x.re, x.im]
        return Complex(*(function(call, part, *rest, **keywords) for part in parts))

    return lower


for _name in (*_ALIKE, *_LISTS, *_ZERO_FILL):
    _packet, _overload = _name.split(".")
    _target = getattr(getattr(aten, _packet), _overload)
    COMPLEX[_target] = _alike(_target)


# ------------------------------------------------------------------------------------------------ Fourier transforms


def _waves(rows: int, columns: int, period: int, dtype: str) -> tuple[Node, Node]:
    """cos and sin of 2 pi i k / period, [rows, columns]; the product is reduced exactly before it becomes an angle."""
    i = ops.reshape(ops.iota(extent=rows), shape=(rows, 1))
    turn = ops.remainder(ops.mul(i, ops.iota(extent=columns)), period)
    angle = ops.mul(cast(turn, "float64"), 2 * math.pi / period)
    return cast(ops.cos(angle), dtype), cast(ops.sin(angle), dtype)


def _static(n: Dim) -> int:
    return n if isinstance(n, int) else refuse("a Fourier transform over an axis of a dynamic size")


def _norm(x: Node, mode: int, size: int) -> Node:
    if mode == 0 or size == 0:
        return x
    return ops.mul(x, 1 / math.sqrt(size) if mode == 1 else 1 / size)


def _applied(x: Node, matrix: Node, axis: int) -> Node:
    """x with the vectors along `axis` multiplied by `matrix` [from, to]."""
    last = move_axis(x, axis, x.rank - 1)
    if last.rank == 1:
        last = ops.reshape(last, shape=(1, last.shape[0]))
        return ops.reshape(ops.matmul(last, matrix), shape=(matrix.shape[1],))
    return move_axis(ops.matmul(last, matrix), last.rank - 1, axis)


def _transformed(x: Complex, axis: int, forward: bool) -> Complex:
    n = _static(x.re.shape[axis])
    cos, sin = _waves(n, n, n, x.re.dtype)
    if forward:
        sin = ops.neg(sin)
    re = ops.sub(_applied(x.re, cos, axis), _applied(x.im, sin, axis))
    im = ops.add(_applied(x.re, sin, axis), _applied(x.im, cos, axis))
    return Complex(re, im)


@_complex(aten._fft_c2c.default)
def _c2c(call: Call, x: Complex, axes: Sequence[int], mode: int, forward: bool) -> Complex:
    size = 1
    for axis in axes_of(axes, x.re.rank):
        size *= _static(x.re.shape[axis])
        x = _transformed(x, axis, forward)
    return Complex(_norm(x.re, mode, size), _norm(x.im, mode, size))


@_complex(aten._fft_r2c.default)
def _r2c(call: Call, x: Node, axes: Sequence[int], mode: int, onesided: bool) -> Complex:
    along = [axis_of(a, x.rank) for a in axes]
    last = along[-1]
    n = _static(x.shape[last])
    columns = n // 2 + 1 if onesided else n
    cos, sin = _waves(n, columns, n, x.dtype)
    found = Complex(_applied(x, cos, last), _applied(x, ops.neg(sin), last))
    size = n
    for axis in along[:-1]:
        size *= _static(x.shape[axis])
        found = _transformed(found, axis, True)
    return Complex(_norm(found.re, mode, size), _norm(found.im, mode, size))


@_complex(aten._fft_c2r.default)
def _c2r(call: Call, x: Complex, axes: Sequence[int], mode: int, length: Dim) -> Node:
    along = [axis_of(a, x.re.rank) for a in axes]
    last = along[-1]
    n = _static(length)
    size = n
    for axis in along[:-1]:
        size *= _static(x.re.shape[axis])
        x = _transformed(x, axis, False)
    half = n // 2 + 1
    re, im = cut(x.re, last, 0, half), cut(x.im, last, 0, half)
    cos, sin = _waves(half, n, n, re.dtype)
    # Every frequency but 0 and n/2 stands for its mirror image as well.
    k = ops.reshape(ops.iota(extent=half), shape=(half, 1))
    once = ops.logical_or(ops.eq(k, 0), ops.eq(ops.mul(k, 2), n))
    weight = ops.where(once, operand(1.0, re.dtype), operand(2.0, re.dtype))
    y = ops.sub(_applied(re, ops.mul(cos, weight), last), _applied(im, ops.mul(sin, weight), last))
    return _norm(y, mode, size)
