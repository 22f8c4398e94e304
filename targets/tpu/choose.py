"""Which nodes a simulated TPU computes by its own kernels: their TIR, with loops for the chip's instructions, inside functions for this machine.

Rows of a program vary, a chip's shapes don't: products are made for two numbers of rows, and so many are done at a time, the last ones padded,
as a program for the chip is made for buckets of lengths.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import attrs
from tvm import tirx

from jisu.compiler import levels, ops
from jisu.compiler.errors import CompileError
from jisu.compiler.graph import Node
from jisu.compiler.schemes import SCHEMES, groups_of
from jisu.compiler.types import Dim, TensorType, fixed, product, symbol
from jisu.targets.cpu.generic.build import Builder, Expr, Flat, i64
from jisu.targets.cpu.generic.scalar import dtype_of
from jisu.targets.steps import Argument, Choosers, Kernel
from jisu.targets.target import Target
from jisu.targets.tpu import grouped
from jisu.targets.tpu.chip import Chip
from jisu.targets.tpu.functional import inlined
from jisu.targets.tpu.product import lower
from jisu.targets.tpu.spec import ACTIVATIONS, MIDDLE, RESULTS, Product
from jisu.targets.tpu.tiles import choose_tiles

BLOCKS = (128, 16)
"""Rows at a time: many, and what is left."""
_STORED = {"bfloat16": "int16", "float32": "float32"}
"""How this machine's functions take floats."""

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
            weights = [name for name in held if name[0] in "wu" and name != "up_scale"]
            for name in weights:
                _fill(b, *held[name], fills(i64(0))[name], None)
            with b.loop(count) as block:
                begin = b.let(first + block * i64(size), "begin")
                here = b.let(tirx.min(i64(size), rows - begin), "here")
                for name, fill in fills(begin).items():
                    if name in held and name not in weights:
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


def _byte(i: Expr, word: int) -> Expr:
    """Which byte of a row holds input i, of codes of 4 bits."""
    return tirx.floordiv(i, i64(2 * word)) * i64(word) + tirx.floormod(i, i64(word))


def _wide(number: Expr) -> Expr:
    """As float32."""
    if dtype_of(number) != "int16":
        return tirx.Cast("float32", number)
    return tirx.reinterpret("float32", tirx.Cast("uint32", _bits(number)) << tirx.const(16, "uint32"))


def _kernel(
    node: Node, target: Target, spec: Product, given: Mapping[int, tuple[tuple[Dim, ...], str]], last: tuple[int, ...],
    fills: Callable[[Mapping[int, Flat], Expr], dict[str, Fill]],
) -> Kernel:  # fmt: skip
    """A node's kernel. given: shapes and dtypes of what its operands are to the function, by their numbers, of `ROWS` rows; last: the
    numbers of bias and residual, if the op has such; fills: how the other operands are filled."""
    stored = _STORED[node.dtype]
    given = {**given, **dict(zip(last, (((spec.n,), stored), ((ROWS, spec.n), stored)), strict=False))}
    given = {i: kind for i, kind in given.items() if node.operands[i] is not None}
    types = [TensorType(shape, dtype) for shape, dtype in given.values()]
    b = Builder(node.op.name, types, [TensorType((ROWS, spec.n), stored)], {str(ROWS)})
    flats: dict[int, Flat] = dict(zip(given, b.inputs, strict=True))

    def all_fills(first: Expr) -> dict[str, Fill]:
        found = fills(flats, first)
        if spec.bias:
            found["bias"] = lambda i, j: _wide(flats[last[0]][[j]])
        if spec.residual:
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
    if node.dtype not in RESULTS or w.dtype != node.dtype or not all(isinstance(n, int) for n in sizes):
        return None
    n, k = map(fixed, sizes)
    if node.activation not in ACTIVATIONS:
        return None
    return Product(
        1, n, k, node.dtype, node.dtype, bias=bias is not None, activation=node.activation, residual=residual is not None
    )  # fmt: skip


def _gated_product(node: Node) -> Product | None:
    x, w, u = node.parents
    n, k = w.shape[0], x.shape[-1]
    dtypes = {m.dtype for m in (x, w, u)}
    if not isinstance(n, int) or not isinstance(k, int) or dtypes != {node.dtype} or node.dtype not in RESULTS:
        return None
    if node.activation not in ACTIVATIONS:
        return None
    return Product(1, n, k, node.dtype, node.dtype, activation=node.activation, gated=True)


def _coded_product(node: Node) -> Product | None:
    """Of levels of codes, and of x in floats or rounded to levels, too."""
    x, codes, scales, zeros, bias, residual = node.operands
    assert x is not None and codes is not None and scales is not None
    rounded = node.op is ops.levels_linear
    k = node.k if rounded else x.shape[-1]
    if (rounded and node.own) or node.dtype not in RESULTS or node.activation not in ACTIVATIONS:
        return None
    if not grouped.reads(node) and (node.group or zeros is not None or node.scheme != "int8"):
        return None
    if (
        codes.tensor.nbytes * 8 != node.outputs * k * (1 + node.gated) * SCHEMES[node.scheme].bits
        or codes.dtype != "uint8"
    ):
        return None
    groups = {"group": node.group, "zeros": zeros is not None, "scales": scales.dtype} if node.group else {}
    return Product(
        1, int(node.outputs), int(k), "int8" if rounded else node.dtype, node.dtype, channel_scale=not node.group, row_scale=rounded,
        bias=bias is not None, activation=node.activation, residual=residual is not None, weights=node.scheme, gated=bool(node.gated),
        **groups,
    )  # fmt: skip


_PRODUCTS = {
    ops.linear: _linear_product,
    ops.gated_linear: _gated_product,
    ops.quantized_linear: _coded_product,
    ops.levels_linear: _coded_product,
}


def product_of(node: Node, chip: Chip) -> Product | None:
    """The product, with one row, that a node is and a chip's kernel computes; None where there is no such kernel, or its tiles don't fit."""
    spec = _PRODUCTS[node.op](node) if node.op in _PRODUCTS else None
    return spec if spec is not None and _fits(attrs.evolve(spec, m=BLOCKS[0]), chip) else None


@functools.lru_cache(256)
def _fits(spec: Product, chip: Chip) -> bool:
    try:
        choose_tiles(spec, chip)
    except CompileError:  # a gated product needs two matrices' columns whole
        return False
    return True


def _floats(node: Node, target: Target) -> Kernel | None:
    """`linear` and `gated_linear` of bfloat16 or float32."""
    spec = product_of(node, Chip.named(target.name))
    if spec is None:
        return None

    def fills(flats: Mapping[int, Flat], first: Expr) -> dict[str, Fill]:
        found: dict[str, Fill] = {
            "x": lambda i, j: _bits(flats[0][[first + i, j]]),
            "w": lambda i, j: _bits(flats[1][[j, i]]),
        }
        if spec.gated:
            found["u"] = lambda i, j: _bits(flats[2][[j, i]])
        return found

    stored = _STORED[node.dtype]
    given = {0: ((ROWS, spec.k), stored), **{1 + i: ((spec.n, spec.k), stored) for i in range(spec.matrices)}}
    return _kernel(node, target, spec, given, () if spec.gated else (2, 3), fills)


def _coded(node: Node, target: Target) -> Kernel | None:
    """`quantized_linear` with a scale per output or group, and `levels_linear` with one per token, too."""
    x, codes, scales, *_ = node.operands
    spec = product_of(node, Chip.named(target.name))
    if spec is None:
        return None
    assert x is not None and codes is not None and scales is not None
    word, row = fixed(codes.shape[-1]), spec.k * SCHEMES[node.scheme].bits // 8
    at = levels.scale_offset(spec.k)
    # Gate and up lie side by side, output by output.
    halves: tuple[Dim, ...] = (2,) if spec.gated else ()
    groups = (groups_of(spec.k, spec.group),) if spec.group else ()

    def fills(flats: Mapping[int, Flat], first: Expr) -> dict[str, Fill]:
        def row_scale(i: Expr, j: Expr) -> Expr:
            parts = [
                tirx.Cast("uint32", flats[0][[first + i, i64(at + n)]]) << tirx.const(8 * n, "uint32") for n in range(4)
            ]
            return tirx.reinterpret("float32", parts[0] | parts[1] | parts[2] | parts[3])

        def code(*half: Expr) -> Fill:
            def level(i: Expr, j: Expr) -> Expr:
                number = tirx.Cast("int32", flats[1][[j, *half, _byte(i, word) if spec.weights == "int4" else i]])
                if spec.weights == "int4":  # the upper half of a byte belongs to the input `word` further on
                    upper = tirx.Cast("int32", tirx.floormod(tirx.floordiv(i, i64(word)), i64(2)))
                    number = (number >> (upper * 4)) & tirx.const(15, "int32")
                return tirx.Cast("int8", number - tirx.const(MIDDLE[spec.weights], "int32"))

            return level

        def scale(*half: Expr) -> Fill:
            return lambda i, j: _wide(flats[2][[j, *half]])

        def grid(operand: int, *half: Expr) -> Fill:
            def stored(i: Expr, j: Expr) -> Expr:
                value = flats[operand][[j, *half, i]]
                return tirx.reinterpret("uint16", value) if dtype_of(value) == "float16" else value

            return stored

        found: dict[str, Fill] = {"x": lambda i, j: _bits(flats[0][[first + i, j]])}
        if spec.row_scale:
            found |= {"x": lambda i, j: tirx.reinterpret("int8", flats[0][[first + i, j]]), "row_scale": row_scale}
        for number, (w, channel_scale) in enumerate((("w", "channel_scale"), ("u", "up_scale"))[: spec.matrices]):
            half = [i64(number)] if spec.gated else []
            found[w] = code(*half)
            if spec.group:
                found |= {f"{w}_scale": grid(2, *half)} | ({f"{w}_zero": grid(3, *half)} if spec.zeros else {})
            else:
                found[channel_scale] = scale(*half)
        return found

    given = {
        0: ((ROWS, x.shape[-1]), "uint8" if spec.row_scale else _STORED[node.dtype]),
        1: ((spec.n, *halves, row), "uint8"),
        2: ((spec.n, *halves, *groups), scales.dtype),
        3: ((spec.n, *halves, *groups), "uint8"),  # zeros, where there are such
    }
    return _kernel(node, target, spec, given, (4, 5), fills)


CHOOSERS: Choosers = {
    ops.linear: _floats,
    ops.gated_linear: _floats,
    ops.quantized_linear: _coded,
    ops.levels_linear: _coded,
}
"""Choosers by op; see `jisu.targets.lowering.lower`."""
