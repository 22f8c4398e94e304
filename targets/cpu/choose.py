"""Which nodes get a hot kernel: a table from ops to choosers. A chooser returns None where the generic kernel has to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jisu.compiler import ops
from jisu.compiler.graph import Node, Op
from jisu.compiler.levels import WORD
from jisu.compiler.types import Dim, product, same_dim
from jisu.targets.cpu.isa import FLOATS
from jisu.targets.cpu.kernels import attention, codes, embedding, integer, matmul, moe, norm, rotary, sparse
from jisu.targets.steps import Argument, Kernel
from jisu.targets.target import Target


def _rows(node: Node) -> tuple[Dim, Dim]:
    """A value seen as rows of its last axis."""
    return (product(node.shape[:-1]), node.shape[-1])


def _present(node: Node, *indices: int) -> list[Argument]:
    return [Argument(i) for i in indices if node.operands[i] is not None]


def _computes(node: Node, target: Target) -> bool:
    """Whether hot kernels compute in the node's dtype."""
    return node.dtype in FLOATS and (node.dtype != "float16" or target.architecture != "x86_64" or target.has("f16c"))


def _operand(node: Node, index: int) -> Node:
    found = node.operands[index]
    assert found is not None
    return found


def _linear(node: Node, target: Target) -> Kernel | None:
    x = _operand(node, 0)
    function = matmul.linear(
        node.outputs,
        int(x.shape[-1]),
        node.dtype,
        target,
        bias=node.operands[2] is not None,
        activation=node.activation,
        residual=node.operands[3] is not None,
    )
    arguments = [Argument(0, _rows(x)), Argument(1), *_present(node, 2)]
    if node.operands[3] is not None:
        arguments.append(Argument(3, _rows(node)))
    return Kernel(function, tuple(arguments), (_rows(node),))


def _projections(node: Node, target: Target) -> Kernel | None:
    x = _operand(node, 0)
    function = matmul.projections(node.outputs, int(x.shape[-1]), x.dtype, target, bias=node.biased)
    rows = _rows(x)
    arguments = (Argument(0, rows), *(Argument(i) for i in range(1, len(node.operands))))
    return Kernel(function, arguments, tuple((rows[0], n) for n in node.outputs))


def _quantized(node: Node, target: Target) -> Kernel | None:
    x, packed = _operand(node, 0), _operand(node, 1)
    if not _computes(node, target) or packed.shape[-2:] != (matmul.panel_width(target), 1):
        return None
    function = codes.quantized_linear(
        node.outputs, int(x.shape[-1]), node.dtype, target, scheme=node.scheme, group=node.group, **_scales(node, 2),
        gated=node.gated, bias=node.operands[4] is not None, activation=node.activation,
        residual=node.operands[5] is not None,
    )  # fmt: skip
    return Kernel(function, _coded_arguments(node), (_rows(node),))


def _integer(node: Node, target: Target) -> Kernel | None:
    packed = _operand(node, 1)
    if not _computes(node, target) or packed.shape[-2:] != (matmul.panel_width(target), WORD):
        return None
    function = integer.levels_linear(
        node.outputs, node.k, node.dtype, target, scheme=node.scheme, group=node.group, own=node.own, **_scales(node, 2),
        gated=node.gated, bias=node.operands[4] is not None, activation=node.activation,
        residual=node.operands[5] is not None,
    )  # fmt: skip
    return Kernel(function, _coded_arguments(node), (_rows(node),))


def _levels_projections(node: Node, target: Target) -> Kernel | None:
    x, packed = _operand(node, 0), _operand(node, 1)
    if node.attributes["dtype"] not in FLOATS or packed.shape[-2:] != (matmul.panel_width(target), WORD):
        return None
    count = len(node.outputs)
    function = integer.levels_projections(
        node.outputs, node.k, node.attributes["dtype"], target, scheme=node.scheme, group=node.group, own=node.own,
        scales=_operand(node, 1 + count).dtype, zeros=node.offset, bias=node.biased,
    )  # fmt: skip
    rows = _rows(x)
    arguments = (Argument(0, rows), *(Argument(i) for i in range(1, len(node.operands))))
    return Kernel(function, arguments, tuple((rows[0], n) for n in node.outputs))


def _scales(node: Node, first: int) -> dict[str, Any]:
    """The dtype of scales (operand `first`), and whether there are zeros behind them."""
    scales = node.operands[first]
    return {} if scales is None else {"scales": scales.dtype, "zeros": node.operands[first + 1] is not None}


def _coded_arguments(node: Node) -> tuple[Argument, ...]:
    arguments = [Argument(0, _rows(_operand(node, 0))), Argument(1), Argument(2), *_present(node, 3, 4)]
    return (*arguments, Argument(5, _rows(node))) if node.operands[5] is not None else tuple(arguments)


def _levels(node: Node, target: Target) -> Kernel | None:
    x = _operand(node, 0)
    if not _computes(x, target):
        return None
    function = integer.encode_levels(
        int(x.shape[-1]), x.dtype, target, scheme=node.scheme, group=node.group, own=node.own,
        given=node.operands[1] is not None,
    )  # fmt: skip
    return Kernel(function, (Argument(0, _rows(x)), *_present(node, 1)), (_rows(node),))


def _sparse(node: Node, target: Target) -> Kernel | None:
    x, _, mask, _, _, _, bias, residual = node.operands
    assert x is not None and mask is not None
    if not _computes(node, target) or mask.shape[-1] * 4 != matmul.panel_width(target):
        return None
    function = sparse.sparse_linear(
        node.outputs, int(x.shape[-1]), node.dtype, target, scheme=node.scheme, group=node.group, **_scales(node, 4),
        gated=node.gated, bias=bias is not None, activation=node.activation, residual=residual is not None,
    )  # fmt: skip
    arguments = [Argument(0, _rows(x)), *(Argument(i) for i in (1, 2, 3)), *_present(node, 4, 5, 6)]
    if residual is not None:
        arguments.append(Argument(7, _rows(node)))
    return Kernel(function, tuple(arguments), (_rows(node),))


def _gated(node: Node, target: Target) -> Kernel | None:
    x = _operand(node, 0)
    function = matmul.gated_mlp_up(node.outputs, int(x.shape[-1]), node.dtype, target, activation=node.activation)
    return Kernel(function, (Argument(0, _rows(x)), Argument(1)), (_rows(node),))


def _matmul(node: Node, target: Target) -> Kernel | None:
    a, b = _operand(node, 0), _operand(node, 1)
    if not _computes(node, target) or any(isinstance(d, int) and d == 0 for n in (a, b) for d in n.shape):
        return None
    shared = all(d == 1 for d in b.shape[:-2])
    same = len(a.shape) == len(b.shape) and all(same_dim(p, q) for p, q in zip(a.shape[:-2], b.shape[:-2], strict=True))
    if not shared and not same:
        return None
    batch = product(node.shape[:-2])
    if not same_dim(product(a.shape[:-2]), batch):
        return None
    arguments = (Argument(0, (batch, *a.shape[-2:])), Argument(1, (1 if shared else batch, *b.shape[-2:])))
    return Kernel(matmul.matmul(node.dtype, target), arguments, ((batch, *node.shape[-2:]),))


def _attention(node: Node, target: Target) -> Kernel | None:
    q, k, v, bias, sinks = node.operands
    assert q is not None and k is not None and v is not None
    if not _computes(node, target) or (bias is not None and not same_dim(bias.shape[2], q.shape[1])):
        return None
    kind = None if bias is None else "bool" if bias.dtype == "bool" else "float"
    function = attention.attention(
        int(q.shape[2]), int(k.shape[2]), int(q.shape[3]), int(v.shape[3]), node.dtype, target,
        scale=node.scale, causal=node.causal, window=node.window or None, softcap=node.softcap or None,
        sinks=sinks is not None, bias=kind, nan_rows=kind == "float",
    )  # fmt: skip
    return Kernel(function, (Argument(0), Argument(1), Argument(2), *_present(node, 4, 3)))


def _cached(node: Node, target: Target) -> Kernel | None:
    q, keys = _operand(node, 0), _operand(node, 1)
    if not _computes(node, target):
        return None
    paged = node.operands[5] is not None
    # A contiguous cache is a ring that is never full.
    contiguous = keys.op is ops.cache_append and not keys.attributes["ring"]
    function = attention.attention_cached(
        int(q.shape[2]), int(keys.shape[1]), int(q.shape[3]), int(node.shape[3]), node.dtype, target,
        scale=node.scale, layout="paged" if paged else "contiguous" if contiguous else "ring",
        page=int(keys.shape[2]) if paged else 0, window=node.window or None, softcap=node.softcap or None,
        sinks=node.operands[6] is not None, scheme=node.scheme,
    )  # fmt: skip
    return Kernel(function, (Argument(0), Argument(1), Argument(2), *_present(node, 5, 3, 4, 6)))


def _append(node: Node, target: Target) -> Kernel | None:
    cache, new = _operand(node, 0), _operand(node, 1)
    if node.dtype != "uint8" and not _computes(node, target):
        return None
    paged = node.operands[3] is not None
    layout = "paged" if paged else "ring" if node.ring else "contiguous"
    page = int(cache.shape[2]) if paged else 0
    function = attention.cache_append(
        int(new.shape[2]), int(new.shape[3]), node.dtype, target, layout=layout, page=page
    )
    return Kernel(function, (Argument(0), *_present(node, 3), Argument(2), Argument(1)))


def _fixed_rows(node: Node, target: Target) -> bool:
    """Whether a norm over the last axis has a hot kernel: a float of the kernels, a last axis of known size."""
    return _computes(node, target) and isinstance(node.shape[-1], int) and node.shape[-1] > 0


def _rms_norm(node: Node, target: Target) -> Kernel | None:
    if not _fixed_rows(node, target):
        return None
    function = norm.rms_norm(
        int(node.shape[-1]), node.dtype, target, eps=node.eps, offset=node.offset, round_first=node.round_first,
        weight=node.operands[1] is not None,
    )  # fmt: skip
    return Kernel(function, (Argument(0, _rows(node)), *_present(node, 1)), (_rows(node),))


def _layer_norm(node: Node, target: Target) -> Kernel | None:
    if not _fixed_rows(node, target):
        return None
    weight, bias = node.operands[1] is not None, node.operands[2] is not None
    function = norm.layer_norm(int(node.shape[-1]), node.dtype, target, eps=node.eps, weight=weight, bias=bias)
    return Kernel(function, (Argument(0, _rows(node)), *_present(node, 1, 2)), (_rows(node),))


def _softmax(node: Node, target: Target) -> Kernel | None:
    if not _computes(node, target) or node.axis != node.rank - 1 or node.shape[-1] == 0:
        return None
    return Kernel(norm.softmax(node.dtype, target), (Argument(0, _rows(node)),), (_rows(node),))


def _rotary(node: Node, target: Target) -> Kernel | None:
    cos = _operand(node, 1)
    if not _computes(node, target):
        return None
    function = rotary.rotary(
        int(node.shape[2]), int(node.shape[3]), int(cos.shape[2]), node.dtype, target, interleaved=node.interleaved
    )
    return Kernel(function, (Argument(0), Argument(1), Argument(2)))


def _take(node: Node, target: Target) -> Kernel | None:
    table, indices = _operand(node, 0), _operand(node, 1)
    fits = node.axis == 0 and table.rank == 2 and indices.dtype == "int64" and not node.attributes.get("wrap", True)
    if not fits or not _computes(node, target) or not isinstance(table.shape[1], int) or table.shape[1] == 0:
        return None
    function = embedding.embedding(int(table.shape[1]), node.dtype, target)
    return Kernel(
        function, (Argument(0), Argument(1, (indices.tensor.size,))), ((indices.tensor.size, table.shape[1]),)
    )


def _experts(node: Node, target: Target) -> Kernel | None:
    x, index, _, up, _ = node.operands
    assert x is not None and index is not None and up is not None
    function = moe.experts(
        int(up.shape[0]),
        int(x.shape[1]),
        node.inner,
        int(index.shape[1]),
        node.dtype,
        target,
        activation=node.activation,
    )
    return Kernel(function, tuple(Argument(i) for i in range(5)))


CHOOSERS: Mapping[Op, Callable[[Node, Target], Kernel | None]] = {
    ops.packed_linear: _linear,
    ops.packed_gated_linear: _gated,
    ops.packed_projections: _projections,
    ops.quantized_linear: _quantized,
    ops.levels_linear: _integer,
    ops.levels_projections: _levels_projections,
    ops.encode_levels: _levels,
    ops.sparse_linear: _sparse,
    ops.packed_experts: _experts,
    ops.matmul: _matmul,
    ops.attention: _attention,
    ops.attention_cached: _cached,
    ops.cache_append: _append,
    ops.rms_norm: _rms_norm,
    ops.layer_norm: _layer_norm,
    ops.softmax: _softmax,
    ops.rotary: _rotary,
    ops.take: _take,
}
"""Choosers by op; see `jisu.targets.lowering.lower`."""
