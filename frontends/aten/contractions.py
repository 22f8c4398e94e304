"""Matrix products, linear layers, convolutions and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from jisu.compiler import ops
from jisu.compiler.graph import Node
from jisu.compiler.types import Dim, broadcast, dim, product
from jisu.frontends.aten.table import (
    HALF,
    Call,
    cast,
    cut,
    expand,
    filled,
    lowering,
    operand,
    pad,
    permute,
    positions,
    refuse,
    unsqueeze,
    view,
    wide,
)

aten = torch.ops.aten


def _product(a: Node, b: Node) -> Node:
    """a @ b for matrices with leading axes."""
    if a.dtype == "bool":
        refuse("a product of bools")
    return ops.matmul(a, b)


@lowering(aten.mm.default, aten.bmm.default)
def _mm(call: Call, a: Node, b: Node) -> Node:
    return _product(a, b)


@lowering(aten.matmul.default)
def _matmul(call: Call, a: Node, b: Node) -> Node:
    left = view(a, (1, *a.shape)) if a.rank == 1 else a
    right = unsqueeze(b, 1) if b.rank == 1 else b
    return view(_product(left, right), call.shape)


@lowering(aten.mv.default)
def _mv(call: Call, a: Node, b: Node) -> Node:
    return view(_product(a, unsqueeze(b, 1)), call.shape)


@lowering(aten.dot.default, aten.vdot.default)
def _dot(call: Call, a: Node, b: Node) -> Node:
    return view(_product(view(a, (1, *a.shape)), unsqueeze(b, 1)), ())


@lowering(aten.addmm.default, aten.baddbmm.default)
def _addmm(call: Call, c: Node, a: Node, b: Node, *, beta: Any = 1, alpha: Any = 1) -> Node:
    return _affine(call, c, a, b, beta, alpha)


def _affine(call: Call, c: Node, a: Node, b: Node, beta: Any, alpha: Any) -> Node:
    def fused(v: Node | None, x: Node, y: Node) -> Node:
        result = _product(x, y)
        if alpha != 1:
            result = ops.mul(result, operand(alpha, result.dtype))
        if v is None:
            return result
        return ops.add(v if beta == 1 else ops.mul(v, operand(beta, v.dtype)), result)

    if alpha == 1 and beta == 1 and call.dtype in HALF:
        return wide(fused, call.dtype, c, a, b)
    return wide(fused, call.dtype, None if beta == 0 else c, a, b)  # beta 0 ignores NaN in c


@lowering(aten.addmv.default)
def _addmv(call: Call, c: Node, a: Node, b: Node, *, beta: Any = 1, alpha: Any = 1) -> Node:
    column = unsqueeze(c, 1) if c.rank == 1 else c
    return view(_affine(call, column, a, unsqueeze(b, 1), beta, alpha), call.shape)


@lowering(aten.addbmm.default)
def _addbmm(call: Call, c: Node, a: Node, b: Node, *, beta: Any = 1, alpha: Any = 1) -> Node:
    batch, rows, inner = a.shape
    left = view(permute(a, (1, 0, 2)), (rows, dim(batch * inner)))
    right = view(b, (dim(batch * inner), b.shape[2]))
    return expand(_affine(call, c, left, right, beta, alpha), call.shape)


@lowering(aten.addr.default)
def _addr(call: Call, c: Node, a: Node, b: Node, *, beta: Any = 1, alpha: Any = 1) -> Node:
    if call.dtype == "bool":
        outer = ops.logical_and(unsqueeze(cast(a, "bool"), 1), cast(b, "bool"))
        return ops.logical_or(cast(c, "bool"), outer) if beta else outer
    return expand(_affine(call, cast(c, call.dtype), cast(unsqueeze(a, 1), call.dtype),
                          cast(view(b, (1, *b.shape)), call.dtype), beta, alpha), call.shape)  # fmt: skip


@lowering(aten.linear.default)
def _linear(call: Call, x: Node, w: Node, b: Node | None = None) -> Node:
    if w.rank == 1:
        y = view(_product(view(x, (1, *x.shape)) if x.rank == 1 else x, unsqueeze(w, 1)), call.shape)
        return y if b is None else ops.add(y, b)
    if call.dtype not in ("float16", "bfloat16", "float32", "float64"):
        y = view(_product(view(x, (1, *x.shape)) if x.rank == 1 else x, permute(w, (1, 0))), call.shape)
        return y if b is None else ops.add(y, b)
    if b is not None and b.shape != (w.shape[0],):
        b = expand(b, (w.shape[0],))
    return ops.linear(x, w, b, None, activation="none")


# ---------------------------------------------------------------------------------------------------- convolution


@lowering(aten.convolution.default)
def _convolution(
    call: Call, x: Node, w: Node, b: Node | None, stride: Sequence[int], padding: Sequence[Dim],
    dilation: Sequence[int], transposed: bool, output_padding: Sequence[int], groups: int,
) -> Node:  # fmt: skip
    n = x.rank - 2
    stride, padding, dilation, extra = (
        tuple(v) * n if len(v) == 1 else tuple(v) for v in (stride, padding, dilation, output_padding)
    )
    if 0 in call.shape:
        return filled(0, call.type)

    def fused(v: Node, k: Node, bias: Node | None) -> Node:
        if transposed:
            y = _transposed(v, k, stride, padding, dilation, extra, groups)
        else:
            v = pad(v, 0, (0, 0, *padding), (0, 0, *padding))
            y = ops.conv(v, k, strides=stride, dilations=dilation, groups=groups)
        return y if bias is None else ops.add(y, view(bias, (1, bias.shape[0], *(1,) * n)))

    if b is None:
        return fused(x, w, None)
    return wide(fused, call.dtype, x, w, b)


def _transposed(
    x: Node,
    w: Node,
    stride: Sequence[int],
    padding: Sequence[Dim],
    dilation: Sequence[int],
    extra: Sequence[int],
    groups: int,
) -> Node:
    """The gradient of a convolution: space the input out, pad it, and correlate with the flipped kernel."""
    n = x.rank - 2
    inputs, outputs, *kernel = w.shape
    low = [dim(d * (k - 1) - p) for d, k, p in zip(dilation, kernel, padding, strict=True)]
    high = [dim(before + e) for before, e in zip(low, extra, strict=True)]
    spaced = pad(x, 0, (0, 0, *low), (0, 0, *high), (0, 0, *(s - 1 for s in stride)))
    flipped = ops.flip(w, axes=tuple(range(2, 2 + n)))
    grouped = view(flipped, (groups, inputs // groups, outputs, *kernel))
    swapped = view(permute(grouped, (0, 2, 1, *range(3, 3 + n))), (groups * outputs, inputs // groups, *kernel))
    return ops.conv(spaced, swapped, strides=(1,) * n, dilations=tuple(dilation), groups=groups)


@lowering(aten._trilinear.default)
def _trilinear(
    call: Call, a: Node, b: Node, c: Node, expand_a: Sequence[int], expand_b: Sequence[int], expand_c: Sequence[int],
    summed: Sequence[int], unroll_dim: int = 1,
) -> Node:  # fmt: skip
    def fused(*factors: Node) -> Node:
        parts = []
        for x, axes in zip(factors, (expand_a, expand_b, expand_c), strict=True):
            for axis in sorted(axes):
                x = unsqueeze(x, axis)
            parts.append(x)
        return ops.sum_(ops.mul(ops.mul(parts[0], parts[1]), parts[2]), axes=tuple(sorted(summed)), keepdims=False)

    return wide(fused, call.dtype, a, b, c)


# ------------------------------------------------------------------------------------------------------ attention


@lowering(aten.scaled_dot_product_attention.default)
def _attention(
    call: Call, q: Node, k: Node, v: Node, mask: Node | None = None, dropout: float = 0.0, causal: bool = False, *,
    scale: float | None = None, enable_gqa: bool = False,
) -> Node:  # fmt: skip
    if dropout:
        refuse("dropout in attention is random; call model.eval() first")
    if not isinstance(q.shape[-1], int):
        refuse("attention over heads of a dynamic size")
    width = q.shape[-1]
    factor = float(scale) if scale is not None else 1 / math.sqrt(max(width, 1))
    s, t = q.shape[-2], k.shape[-2]
    if t == 0 or s == 0 or 0 in call.shape:
        return filled(0, call.type)
    lead = broadcast(q.shape[:-2], *([] if enable_gqa else [k.shape[:-2], v.shape[:-2]]))
    q4, k4, v4 = (_heads_first(x, lead, enable_gqa) for x in (q, k, v))
    bias = None if mask is None else _mask4(mask, (*lead, s, t))
    if causal and s != t:  # PyTorch aligns the triangle with the first key, the op with the last
        rows, columns = positions((s, t), 0), positions((s, t), 1)
        bias, causal = view(ops.le(columns, rows), (1, 1, s, t)), False
    if q4.shape[1] != k4.shape[1] and not _divides(k4.shape[1], q4.shape[1]):
        refuse(f"{k4.shape[1]} KV heads for {q4.shape[1]} heads")
    if bias is not None and bias.dtype not in ("bool", q.dtype):
        bias = cast(bias, q.dtype)
    swap = (0, 2, 1, 3)
    y = ops.attention(
        *(permute(x, swap) for x in (q4, k4, v4)), bias, None, scale=factor, causal=causal, window=0, softcap=0.0
    )
    y = permute(y, swap)
    if bias is not None and bias.dtype != "bool":  # a row without keys gives 0 here, NaN in the op
        hidden = ops.all_(ops.eq(bias, -float("inf")), axes=(3,), keepdims=True)
        y = ops.where(hidden, operand(0.0, y.dtype), y)
    return view(y, call.shape)


def _divides(a: Dim, b: Dim) -> bool:
    return isinstance(a, int) and isinstance(b, int) and a > 0 and b % a == 0


def _heads_first(x: Node, lead: Sequence[Dim], grouped: bool) -> Node:
    """[batch, heads, length, width] from any rank; `lead` are the broadcast leading axes."""
    if not grouped:
        x = expand(x, (*lead, *x.shape[-2:]))
    *batch, heads = x.shape[:-2] if x.rank > 2 else (1,)
    if x.rank == 4:
        return x
    return view(x, (product(batch), heads, *x.shape[-2:]))


def _mask4(mask: Node, full: Sequence[Dim]) -> Node:
    """A mask of any rank as [batch or 1, heads or 1, s or 1, t]."""
    mask = view(mask, (*(1,) * (max(len(full), 4) - mask.rank), *mask.shape))
    if mask.shape[-1] == 1:
        mask = expand(mask, (*mask.shape[:-1], full[-1]))
    if mask.rank <= 4:
        return mask
    if all(n == 1 for n in mask.shape[:-3]):
        return view(mask, (1, *mask.shape[-3:]))
    batch = full[:-3]
    mask = expand(mask, (*batch, *mask.shape[-3:]))
    return view(mask, (product(batch), *mask.shape[-3:]))


@lowering("transformers.grouped_mm_fallback.default", "aten._grouped_mm.default")
def _grouped_mm(call: Call, x: Node, w: Node, offs: Node | None = None, *rest: Any, **_: Any) -> Node:
    """Rows sorted by group times their group's matrix: x [rows, k], w [groups, k, n], cumulative offs [groups]."""
    if x.rank != 2 or w.rank != 3 or offs is None or any(r is not None for r in rest):
        refuse("a grouped product of another form than [rows, k] by [groups, k, n]")
    row = ops.reshape(ops.iota(extent=x.shape[0], dtype=offs.dtype), shape=(x.shape[0], 1))
    group = ops.sum_(cast(ops.ge(row, offs), "int64"), axes=(1,), keepdims=False)
    last = operand(dim(w.shape[0] - 1), "int64")
    beyond = ops.gt(group, last)  # rows behind the last group hold nothing
    matrices = ops.take(w, ops.minimum(group, last), axis=0)
    y = view(_product(unsqueeze(x, 1), matrices), call.shape)
    return ops.where(unsqueeze(beyond, 1), operand(0, y.dtype), cut(y, 0, 0, y.shape[0]))
