"""Which nodes get a kernel written for GPUs: a table from ops to choosers. A chooser returns None where the generic kernel has to do."""

from __future__ import annotations

import sympy

from jisu.compiler import ops
from jisu.compiler.errors import TargetError
from jisu.compiler.graph import Node
from jisu.compiler.types import Dim, product
from jisu.targets.cpu.isa import require_activation
from jisu.targets.cuda.kernels import products, thin
from jisu.targets.cuda.kernels.layers import Layer
from jisu.targets.cuda.lowering import DeviceCall, DeviceFunction
from jisu.targets.steps import Argument, Choosers, Kernel
from jisu.targets.target import Target


def _ceiling(value: Dim, step: int) -> Dim:
    """value / step, rounded up."""
    return -(-value // step) if isinstance(value, int) else sympy.ceiling(value / step)


def _layer(layer: Layer, rows: Dim, operands: tuple[int, ...], target: Target) -> Kernel:
    """A linear layer: few rows by streaming weights, many in tiles. operands: of the node, in the order of the layer's parameters."""
    layer.require()
    require_activation(layer.activation)
    numbers: tuple[int | tuple[str, Dim], ...] = tuple(range(len(layer.parameters) - 1))
    arguments = (*numbers, ("size", rows))
    variants = []
    for most in thin.ROWS:
        kernel = thin.thin(layer, most, target)
        call = DeviceCall(kernel, (layer.tiles(thin.OUTPUTS), _ceiling(rows, most), 1), arguments)
        variants.append((((rows, most),), (call,)))
    largest = variants[-1][1]
    tiles = (_ceiling(rows, products.ROWS), layer.tiles(products.OUTPUTS), 1)
    for build in (products.product_hopper, products.product):
        try:
            variants.append(((), (DeviceCall(build(layer, target), tiles, arguments),)))
            break
        except TargetError:  # not on this machine, or not for this layer
            continue
    else:
        variants.append(((), largest))
    return Kernel(DeviceFunction(tuple(variants)), tuple(Argument(i) for i in operands))


def _present(node: Node, *indices: int) -> tuple[int, ...]:
    return tuple(i for i in indices if node.operands[i] is not None)


def _one_output_per_panel(packed: Node | None, axis: int) -> bool:
    """Whether weights lie row by row."""
    return packed is not None and all(d == 1 for d in packed.shape[axis:])


def _linear(node: Node, target: Target) -> Kernel | None:
    x, w = node.operands[:2]
    assert x is not None
    if not _one_output_per_panel(w, 2):
        return None
    layer = Layer(
        int(x.shape[-1]), (node.outputs,), node.dtype, activation=node.activation,
        bias=node.operands[2] is not None, residual=node.operands[3] is not None,
    )  # fmt: skip
    return _layer(layer, product(x.shape[:-1]), (0, 1, *_present(node, 2, 3)), target)


def _gated(node: Node, target: Target) -> Kernel | None:
    x, w = node.operands[:2]
    assert x is not None
    if not _one_output_per_panel(w, 3):
        return None
    layer = Layer(int(x.shape[-1]), (node.outputs,), node.dtype, gated=True, activation=node.activation)
    return _layer(layer, product(x.shape[:-1]), (0, 1), target)


def _projections(node: Node, target: Target) -> Kernel | None:
    x, w = node.operands[:2]
    assert x is not None
    if not _one_output_per_panel(w, 2):
        return None
    layer = Layer(int(x.shape[-1]), tuple(node.outputs), x.dtype, bias=node.biased)
    return _layer(layer, product(x.shape[:-1]), tuple(range(len(node.operands))), target)


def _quantized(node: Node, target: Target) -> Kernel | None:
    x, codes, scales, zeros, bias, residual = node.operands
    assert x is not None and scales is not None
    if not _one_output_per_panel(codes, -2):
        return None
    layer = Layer(
        int(x.shape[-1]), (node.outputs,), node.dtype, node.gated, node.activation, bias is not None, residual is not None,
        node.scheme, node.group, scales.dtype, zeros is not None,
    )  # fmt: skip
    return _layer(layer, product(x.shape[:-1]), (0, 1, 2, *_present(node, 3, 4, 5)), target)


CHOOSERS: Choosers = {
    ops.packed_linear: _linear,
    ops.packed_gated_linear: _gated,
    ops.packed_projections: _projections,
    ops.quantized_linear: _quantized,
}
"""Choosers by op; see `jisu.targets.cuda.lowering.lower`."""
