"""Which nodes a simulated TPU computes by its own kernels: their TIR, with loops for the chip's instructions, inside functions for this machine.

Rows of a program vary, a chip's shapes don't: products are made for two numbers of rows, and so many are done at a time, the last ones padded,
as a program for the chip is made for buckets of lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
from tvm import tirx

from jisu.compiler import levels, ops
from jisu.compiler.graph import Node
from jisu.compiler.types import Dim, TensorType, product, symbol
from jisu.targets.cpu.generic.build import Builder, Expr, Flat, i64
from jisu.targets.cpu.generic.scalar import dtype_of
from jisu.targets.steps import Argument, Choosers, Kernel
from jisu.targets.target import Target
from jisu.targets.tpu.chip import Chip
from jisu.targets.tpu.functional import inlined
from jisu.targets.tpu.product import lower
from jisu.targets.tpu.spec import ACTIVATIONS, Product

BLOCKS = (128, 16)
"""Rows at a time: many, and what is left."""

ROWS = symbol("rows")
"""How many rows a function is given."""

Fill = Callable[[Expr, Expr], Expr]
"""An operand's element [i, j], as this machine keeps it, from what the function is given."""

Fills = Callable[[Expr], dict[str, Fill]]
"""How operands are filled, given a block's first row."""


def _function(spec: Product, chip: Chip, b: Builder, fills: Fills) -> Any:
    """The function that computes the product of all rows, a block at a time."""
    rows = b.dim(ROWS)
    many = b.let(tirx.floordiv(rows, i64(BLOCKS[0])), "many")
    done = b.let(many * i64(BLOCKS[0]), "done")
    left = b.let(tirx.floordiv(rows - done + i64(BLOCKS[1] - 1), i64(BLOCKS[1])), "left")
    for size, count, first in ((BLOCKS[0], many, i64(0)), (BLOCKS[1], left, done)):
        lowered = lower(attrs.evolve(spec, m=size), chip)
        with b.when(count > i64(0)):
            buffers, body = inlined(lowered)
            for buffer in buffers:
                b.emit(tirx.AllocBuffer(buffer))
            held = {o.name: (o, buffer) for o, buffer in zip(lowered.operands, buffers, strict=True)}
            _fill(b, *held["w"], fills(i64(0))["w"], None)
            with b.loop(count) as block:
                begin = b.let(first + block * i64(size), "begin")
                here = b.let(tirx.min(i64(size), rows - begin), "here")
                for name, fill in fills(begin).items():
                    if name in held and name != "w":
                        _fill(b, *held[name], fill, here if held[name][0].shape[0] == size else None)
                b.emit(body)
                with b.loops([here, i64(spec.n)]) as (i, j):
                    value = tirx.BufferLoad(held["result"][1], [_small(i), _small(j)])
                    value = tirx.reinterpret("int16", value) if dtype_of(value) == "uint16" else value
                    b.store(b.outputs[0], [begin + i, j], value)
    return b.finish()


def _small(index: Expr) -> Expr:
    return tirx.Cast("int32", index)


def _fill(b: Builder, operand: Any, buffer: Any, fill: Fill, rows: Expr | None) -> None:
    """An operand's elements, and zeros behind them; rows: how many there are, if not all."""
    height, width = (i64(n) for n in operand.shape)
    with b.loops([i64(n) for n in operand.padded]) as (i, j):
        inside = tirx.all(i < (height if rows is None else rows), j < width)
        b.emit(tirx.BufferStore(buffer, tirx.const(0, str(buffer.dtype)), [_small(i), _small(j)]))
        with b.when(inside):
            b.emit(tirx.BufferStore(buffer, fill(i, j), [_small(i), _small(j)]))


def _bits(number: Expr) -> Expr:
    """bfloat16, which is int16 in the functions' parameters, as the bits that kernels keep; other numbers are themselves."""
    return tirx.reinterpret("uint16", number) if dtype_of(number) == "int16" else number


def _wide(number: Expr) -> Expr:
    """As float32."""
    if dtype_of(number) != "int16":
        return tirx.Cast("float32", number)
    return tirx.reinterpret("float32", tirx.Cast("uint32", _bits(number)) << tirx.const(16, "uint32"))


def _kernel(
    node: Node, target: Target, spec: Product, given: Mapping[int, tuple[tuple[Dim, ...], str]], last: tuple[int, int],
    fills: Callable[[Mapping[int, Flat], Expr], dict[str, Fill]],
) -> Kernel:  # fmt: skip
    """A node's kernel. given: shapes and dtypes of what its operands are to the function, by their numbers, of `ROWS` rows; last: the
    numbers of bias and residual; fills: how the other operands are filled."""
    stored = "int16" if node.dtype == "bfloat16" else node.dtype
    given = {**given, last[0]: ((spec.n,), stored), last[1]: ((ROWS, spec.n), stored)}
    given = {i: kind for i, kind in given.items() if node.operands[i] is not None}
    types = [TensorType(shape, dtype) for shape, dtype in given.values()]
    b = Builder(node.op.name, types, [TensorType((ROWS, spec.n), stored)], {str(ROWS)})
    flats: dict[int, Flat] = dict(zip(given, b.inputs, strict=True))

    def all_fills(first: Expr) -> dict[str, Fill]:
        found = fills(flats, first)
        if last[0] in flats:
            found["bias"] = lambda i, j: _wide(flats[last[0]][[j]])
        if last[1] in flats:
            found["residual"] = lambda i, j: _bits(flats[last[1]][[first + i, j]])
        return found

    function = _function(spec, Chip.named(target.name), b, all_fills)
    rows = product(node.shape[:-1])
    views = {i: tuple(rows if d == ROWS else d for d in shape) for i, (shape, _) in given.items()}
    return Kernel(function, tuple(Argument(i, view) for i, view in views.items()), ((rows, spec.n),))


def _linear_product(node: Node) -> Product | None:
    x, w, bias, residual = node.operands
    assert x is not None and w is not None
    sizes = (w.shape[0], x.shape[-1])
    if node.dtype != "bfloat16" or w.dtype != "bfloat16" or not all(isinstance(n, int) for n in sizes):
        return None
    n, k = map(int, sizes)  # type: ignore[call-overload]
    if node.activation not in ACTIVATIONS:
        return None
    return Product(1, n, k, bias=bias is not None, activation=node.activation, residual=residual is not None)


def _integer_product(node: Node) -> Product | None:
    _, codes, _, zeros, bias, residual = node.operands
    assert codes is not None
    if node.group or node.own or zeros is not None or node.gated or node.scheme != "int8":
        return None
    if codes.tensor.size != node.outputs * node.k:
        return None
    if node.dtype not in ("bfloat16", "float32") or node.activation not in ACTIVATIONS:
        return None
    return Product(
        1, int(node.outputs), int(node.k), "int8", node.dtype, channel_scale=True, row_scale=True, bias=bias is not None,
        activation=node.activation, residual=residual is not None,
    )  # fmt: skip


_PRODUCTS = {ops.linear: _linear_product, ops.integer_linear: _integer_product}


def product_of(node: Node) -> Product | None:
    """The product, with one row, that a node is and a chip's kernel computes; None where there is no such kernel."""
    return _PRODUCTS[node.op](node) if node.op in _PRODUCTS else None


def _linear(node: Node, target: Target) -> Kernel | None:
    """`linear` of bfloat16."""
    spec = product_of(node)
    if spec is None:
        return None

    def fills(flats: Mapping[int, Flat], first: Expr) -> dict[str, Fill]:
        return {
            "x": lambda i, j: _bits(flats[0][[first + i, j]]),
            "w": lambda i, j: _bits(flats[1][[j, i]]),
        }

    given = {0: ((ROWS, spec.k), "int16"), 1: ((spec.n, spec.k), "int16")}
    return _kernel(node, target, spec, given, (2, 3), fills)


def _integer(node: Node, target: Target) -> Kernel | None:
    """`integer_linear` with a scale per token and per output."""
    records, _, scales, *_ = node.operands
    spec = product_of(node)
    if spec is None:
        return None
    assert records is not None and scales is not None
    at = levels.scale_offset(spec.k)

    def fills(flats: Mapping[int, Flat], first: Expr) -> dict[str, Fill]:
        def row_scale(i: Expr, j: Expr) -> Expr:
            parts = [
                tirx.Cast("uint32", flats[0][[first + i, i64(at + n)]]) << tirx.const(8 * n, "uint32") for n in range(4)
            ]
            return tirx.reinterpret("float32", parts[0] | parts[1] | parts[2] | parts[3])

        def code(i: Expr, j: Expr) -> Expr:
            return tirx.Cast("int8", tirx.Cast("int32", flats[1][[j, i]]) - tirx.const(128, "int32"))

        return {
            "x": lambda i, j: tirx.reinterpret("int8", flats[0][[first + i, j]]), "w": code,
            "channel_scale": lambda i, j: _wide(flats[2][[j]]), "row_scale": row_scale,
        }  # fmt: skip

    given = {
        0: ((ROWS, records.shape[-1]), "uint8"), 1: ((spec.n, spec.k), "uint8"), 2: ((spec.n,), scales.dtype)
    }  # fmt: skip
    return _kernel(node, target, spec, given, (4, 5), fills)


CHOOSERS: Choosers = {ops.linear: _linear, ops.integer_linear: _integer}
"""Choosers by op; see `jisu.targets.lowering.lower`."""
