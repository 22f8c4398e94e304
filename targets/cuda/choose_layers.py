"""Which kernels linear layers get, and what is made of rows of their results: a table from ops to choosers, see `jisu.targets.cuda.choose`."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import attrs
import sympy

from jisu.compiler import ops
from jisu.compiler.errors import TargetError
from jisu.compiler.graph import Node
from jisu.compiler.launches import TensorMap
from jisu.compiler.levels import WORD
from jisu.compiler.ops.quantize import layer_parts
from jisu.compiler.types import Dim, fixed, product
from jisu.targets.cpu.isa import require_activation
from jisu.targets.cuda.device import PAIRS, DeviceKernel
from jisu.targets.cuda.kernels import hopper, levels, products, semi_structured, single, thin
from jisu.targets.cuda.kernels.layers import Layer
from jisu.targets.cuda.kernels.levels import Levels
from jisu.targets.cuda.kernels.tails import Tail, tailed
from jisu.targets.cuda.lowering import DeviceCall, DeviceFunction
from jisu.targets.steps import Argument, Choosers, Kernel
from jisu.targets.target import Target

Arguments = tuple[int | TensorMap | tuple[str, Dim], ...]
"""Of a `DeviceCall`."""


def ceiling(value: Dim, step: int) -> Dim:
    """value / step, rounded up."""
    return -(-value // step) if isinstance(value, int) else sympy.ceiling(value / step)


def least(a: Dim, b: int) -> Dim:
    """The smaller one."""
    return min(a, b) if isinstance(a, int) else sympy.Min(a, b)


@attrs.frozen
class Then:
    """What is made of a node's results: `tail` of `rows` of them. cut: where these aren't all: `kept` of each `whole` ones, from `first` on."""

    tail: Tail
    rows: Dim
    cut: tuple[Dim, Dim, Dim] | None = None

    def call(self, arguments: tuple[int, ...], target: Target) -> DeviceCall:
        """A launch for that alone. arguments: x, then `Tail.pointers`."""
        kernel = tailed(self.tail, target, cut=self.cut is not None)
        return DeviceCall(kernel, (self.rows, 1, 1), (*arguments, *(("size", n) for n in self.cut or ())))


@functools.lru_cache(maxsize=256)
def _layer(layer: Layer, rows: Dim, operands: tuple[int, ...], target: Target, then: Then | None = None) -> Kernel:
    """A linear layer: few rows by streaming weights, many in tiles. operands: of the node, in the order of the layer's parameters.

    then: what is made of the results, whose operands follow the layer's, and whose results the layer's.
    """
    require_activation(layer.activation)
    reader = _reader(layer, target)
    count = len(operands)
    given = tuple(range(count, count + len(then.tail.operands))) if then is not None else ()
    first = count + len(given)  # of the results
    results = tuple(range(first, first + len(layer.outputs)))
    arguments: tuple[int | tuple[str, Dim], ...] = (*range(count), *results, ("size", rows))
    behind: tuple[DeviceCall, ...] = ()
    variants: list[tuple[tuple[tuple[Dim, int], ...], tuple[DeviceCall, ...]]] = []
    if then is not None:
        made = tuple(range(first + 1, first + 1 + len(then.tail.results)))
        behind = (then.call((first, *given, *made), target),)
        if reader.tailed is not None:
            blocks = layer.tiles(thin.outputs(layer, thin.ROWS[0], target))
            call = DeviceCall(reader.tailed(then.tail), (blocks, 1, 1), (*arguments, *given, *made, made[-1] + 1))
            variants.append((((rows, 1),), (call,)))
    for most in reader.rows:
        kernel, outputs = reader.few(most)
        call = DeviceCall(kernel, (layer.tiles(outputs), ceiling(rows, most), 1), arguments)
        variants.append((((rows, most),), (call, *behind)))
    for call, most in _products(reader, layer, rows, arguments, target):
        variants.append((((rows, most),) if most else (), (call, *behind)))
    if variants[-1][0]:  # no product reads the layer: few rows at a time
        variants.append(((), variants[-1][1]))
    function = DeviceFunction(tuple(variants), counters=0 if then is None else 1)
    return Kernel(function, tuple(Argument(i) for i in operands))


@attrs.frozen(eq=False)
class _Reader:
    """What multiplies a layer. few: the kernel for up to so many rows of x, one of `rows`, and the rows of W of a block. tailed: the kernel for one
    row that does its tail, too. many: in tiles, `small` or `large`; groups: by Hopper's warp groups, which are given `besides` behind the rest. Each
    raises TargetError for a layer that it can't read."""

    few: Callable[[int], tuple[DeviceKernel, int]]
    rows: tuple[int, ...]
    many: Callable[[products.Tile], DeviceKernel]
    small: products.Tile
    large: products.Tile
    groups: Callable[[hopper.Tile], DeviceKernel] | None = None
    besides: tuple[int, ...] = ()
    tailed: Callable[[Tail], DeviceKernel] | None = None


def _reader(layer: Layer, target: Target) -> _Reader:
    if isinstance(layer, Levels):
        return _Reader(
            lambda rows: (levels.few(layer, rows, target), thin.outputs(layer, rows, target)), thin.ROWS,
            lambda tile: levels.many(layer, tile, target), products.SMALL, products.LARGE,
            lambda tile: levels.many_hopper(layer, tile, target), (0,),  # records' scales, which the map doesn't show
            lambda then: levels.few(layer, thin.ROWS[0], target, then),
        )  # fmt: skip
    if layer.halves:
        return _Reader(
            lambda rows: (semi_structured.thin_halves(layer, rows, target), thin.OUTPUTS), semi_structured.THIN_ROWS,
            lambda tile: semi_structured.product_halves(layer, tile, target), semi_structured.SMALL,
            semi_structured.CODED if layer.scheme else semi_structured.LARGE,
        )  # fmt: skip
    if layer.dtype == "float32":
        return _Reader(
            lambda rows: (single.thin_single(layer, rows, target), single.OUTPUTS), single.ROWS,
            lambda tile: single.product_single(layer, tile, target), single.SMALL, single.LARGE,
        )  # fmt: skip
    return _Reader(
        lambda rows: (thin.thin(layer, rows, target), thin.outputs(layer, rows, target)), thin.ROWS,
        lambda tile: products.product(layer, tile, target), products.SMALL, products.LARGE,
        lambda tile: hopper.product_hopper(layer, tile, target),
        tailed=lambda then: thin.thin(layer, thin.ROWS[0], target, then),
    )  # fmt: skip


def _products(
    reader: _Reader, layer: Layer, rows: Dim, arguments: Arguments, target: Target
) -> Iterator[tuple[DeviceCall, int]]:
    """The products that can read the layer, each with the rows up to which it is taken (0 for any): the first that is in the code that a GPU
    loads is."""
    small, large = reader.small, reader.large
    on_hopper = list(_on_hopper(reader, layer, rows, arguments, target))
    # So many large tiles as there are multiprocessors keep all of them busy; on half of them, warp groups should still be faster than small tiles
    # on all: by peak rates, `wgmma` does about twice what `mma` does.
    few = target.cores // (2 if on_hopper else 1) // max(1, layer.tiles(large.outputs)) * large.rows

    def call(tile: products.Tile) -> DeviceCall:
        grid = (ceiling(rows, tile.rows), layer.tiles(tile.outputs), 1)
        return DeviceCall(reader.many(tile), grid, arguments)

    with contextlib.suppress(TargetError):  # not for this layer
        if few >= small.rows:
            yield call(small), few
        yield from on_hopper
        yield call(large), 0


def _on_hopper(
    reader: _Reader, layer: Layer, rows: Dim, arguments: Arguments, target: Target
) -> Iterator[tuple[DeviceCall, int]]:
    """The same of Hopper's warp groups, if they can."""
    if reader.groups is None:
        return
    with contextlib.suppress(TargetError):  # not for this layer, or not on this machine
        narrow, wide = hopper.tiles_of(layer)
        few = target.cores // max(1, layer.tiles(wide.outputs)) * wide.rows
        for tile, most in ((narrow, few), (wide, 0)) if few and narrow is not wide else ((wide, 0),):
            kernel = reader.groups(tile)
            matrices = layer.outputs * 2 if layer.apart else [n * layer.per_weight_row for n in layer.outputs]
            maps = [hopper.map_of_x(layer, tile, ("step", 0), rows)]
            maps += [hopper.map_of_w(layer, tile, ("step", i), n) for i, n in enumerate(matrices, 1)]
            grid = (least(ceiling(rows, tile.rows) * layer.tiles(tile.outputs), target.cores), 1, 1)
            yield DeviceCall(kernel, grid, (*maps, *arguments[len(maps) :], *reader.besides)), most


def present(node: Node, *indices: int) -> tuple[int, ...]:
    """Those of a node's operands, by number, that are there."""
    return tuple(i for i in indices if node.operands[i] is not None)


def one_output_per_panel(packed: Node | None, axis: int) -> bool:
    """Whether weights lie row by row."""
    return packed is not None and all(d == 1 for d in packed.shape[axis:])


def _levels_in_rows(codes: Node | None) -> bool:
    """Whether codes that levels are multiplied by lie row by row, in words as kernels take them apart."""
    return codes is not None and codes.dtype == "uint8" and codes.shape[-2:] == (1, WORD)


def _linear(node: Node, target: Target, then: Then | None = None) -> Kernel | None:
    x, w = node.operands[:2]
    assert x is not None
    if not one_output_per_panel(w, 2):
        return None
    layer = Layer(
        fixed(x.shape[-1]), (node.outputs,), node.dtype, activation=node.activation,
        bias=node.operands[2] is not None, residual=node.operands[3] is not None,
    )  # fmt: skip
    return _layer(layer, product(x.shape[:-1]), (0, 1, *present(node, 2, 3)), target, then)


def _gated(node: Node, target: Target) -> Kernel | None:
    x, gate, _ = node.operands
    assert x is not None and gate is not None
    outputs, k = gate.shape
    if not isinstance(outputs, int) or not isinstance(k, int):
        return None
    layer = Layer(k, (outputs,), node.dtype, gated=True, apart=True, activation=node.activation)
    return _layer(layer, product(x.shape[:-1]), (0, 1, 2), target)


def _projections(node: Node, target: Target) -> Kernel | None:
    x, w = node.operands[:2]
    assert x is not None
    if not one_output_per_panel(w, 2):
        return None
    layer = Layer(fixed(x.shape[-1]), tuple(node.outputs), x.dtype, bias=node.biased)
    return _layer(layer, product(x.shape[:-1]), tuple(range(len(node.operands))), target)


def together(nodes: Sequence[Node], target: Target) -> Kernel | None:
    """Layers of codes of one input, alike but for their outputs, with neither activation nor residual: the kernel's arguments are numbers of x,
    then all codes, all scales, all zeros and all biases."""
    x, codes, scales, zeros, bias, _ = nodes[0].operands
    assert x is not None and scales is not None
    if not all(one_output_per_panel(node.operands[1], -2) for node in nodes):
        return None
    layer = Layer(
        fixed(x.shape[-1]), tuple(node.outputs for node in nodes), x.dtype, bias=bias is not None,
        scheme=nodes[0].scheme, group=nodes[0].group, scales=scales.dtype, zeros=zeros is not None,
    )  # fmt: skip
    given = sum(operand is not None for operand in (codes, scales, zeros, bias))
    return _layer(layer, product(x.shape[:-1]), tuple(range(1 + given * len(nodes))), target)


def _quantized(node: Node, target: Target, then: Then | None = None) -> Kernel | None:
    x, codes, scales, zeros, bias, residual = node.operands
    assert x is not None and scales is not None
    if not one_output_per_panel(codes, -2):
        return None
    layer = Layer(
        fixed(x.shape[-1]), (node.outputs,), node.dtype, node.gated, False, node.activation, bias is not None, residual is not None,
        node.scheme, node.group, scales.dtype, zeros is not None,
    )  # fmt: skip
    return _layer(layer, product(x.shape[:-1]), (0, 1, 2, *present(node, 3, 4, 5)), target, then)


def _levels(node: Node, target: Target, then: Then | None = None) -> Kernel | None:
    x, codes, scales, zeros, bias, residual = node.operands
    assert x is not None and codes is not None and scales is not None
    if not _levels_in_rows(codes):
        return None
    layer = Levels(
        node.k, (node.outputs,), node.dtype, node.gated, False, node.activation, bias is not None, residual is not None,
        node.scheme, node.group, scales.dtype, zeros is not None, levels=node.records, own=node.own,
    )  # fmt: skip
    return _layer(layer, product(x.shape[:-1]), (0, 1, 2, *present(node, 3, 4, 5)), target, then)


def _levels_projections(node: Node, target: Target) -> Kernel | None:
    x, *given = node.operands
    assert x is not None
    parts = layer_parts(given, len(node.outputs), node.offset, node.biased)
    codes, scales, zeros, biases = zip(*parts, strict=True)
    if not all(map(_levels_in_rows, codes)):
        return None
    layer = Levels(
        node.k, tuple(node.outputs), node.attributes["dtype"], bias=node.biased, scheme=node.scheme, group=node.group, scales=scales[0].dtype,
        zeros=node.offset, levels=node.records, own=node.own,
    )  # fmt: skip
    return _layer(layer, product(x.shape[:-1]), tuple(range(len(node.operands))), target)


def _semi_structured(node: Node, target: Target) -> Kernel | None:
    x, values, _, scales, zeros, bias, residual = node.operands
    assert x is not None and values is not None
    if x.dtype not in PAIRS:
        return None
    layer = Layer(
        fixed(x.shape[-1]), (node.outputs,), node.dtype, node.gated, False, node.activation, bias is not None, residual is not None,
        "" if scales is None else node.scheme, node.group, "float16" if scales is None else scales.dtype, zeros is not None, True,
    )  # fmt: skip
    return _layer(layer, product(x.shape[:-1]), (0, 1, 2, *present(node, 3, 4, 5, 6)), target)


TAILED = {ops.packed_linear: _linear, ops.quantized_linear: _quantized, ops.levels_linear: _levels}
"""Choosers that take what is made of the node's results, too: its operands follow the node's own."""

LAYERS: Choosers = {
    **TAILED,
    ops.gated_linear: _gated,
    ops.packed_projections: _projections,
    ops.levels_projections: _levels_projections,
    ops.semi_structured_linear: _semi_structured,
}
"""Choosers of linear layers."""
