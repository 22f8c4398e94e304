"""Kernels for every op, right for any dtype and shape: the fallback behind the hot kernels of `targets/cpu/kernels`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy

from jisu.compiler import ops
from jisu.compiler.graph import Node, Op
from jisu.compiler.types import TensorType, TupleType
from jisu.targets.cpu.generic import contract, index, moves, nn, reduce, rounding, sampling, sparse
from jisu.targets.cpu.generic.build import Builder, Flat
from jisu.targets.cpu.generic.element import PULLED, Pull

Body = Callable[[Builder, Pull, Node, Sequence[Flat]], None]


def _single(body: Callable[[Builder, Pull, Node, Flat], None]) -> Body:
    return lambda b, pull, node, targets: body(b, pull, node, targets[0])


BODIES: Mapping[Op, Body] = {
    ops.concat: _single(moves.concat),
    ops.pad: _single(moves.pad),
    **{op: _single(body) for op, body in reduce.BODIES.items()},
    **{op: _single(body) for op, body in contract.BODIES.items()},
    **{op: _single(body) for op, body in rounding.BODIES.items()},
    **contract.SEVERAL,
    **index.BODIES,
    **nn.BODIES,
    **sampling.BODIES,
    **{op: _single(body) for op, body in sparse.BODIES.items()},
}
"""Ops with loops of their own; all others are computed element by element."""


STORED = frozenset(
    {
        *contract.BODIES,
        *contract.SEVERAL,
        *nn.BODIES,
        *rounding.BODIES,
        *sampling.BODIES,
        *sparse.BODIES,
        index.packed_take,
        ops.quantized_take,
    }
)
"""Ops that read their operands in memory: nothing is pulled into their kernels."""

MULTIPLE = frozenset({ops.sort, *sampling.BODIES, *contract.SEVERAL})
"""Ops with several results."""


def results_of(node: Node) -> tuple[TensorType, ...]:
    """The types of a node's results."""
    return node.type.items if isinstance(node.type, TupleType) else (node.tensor,)


def symbols_of(nodes: Iterable[Node]) -> set[str]:
    """Names of the symbols in the nodes' types and attributes."""
    found: set[str] = set()

    def scan(value: Any) -> None:
        if isinstance(value, tuple):
            for v in value:
                scan(v)
        elif isinstance(value, sympy.Expr):
            found.update(s.name for s in value.free_symbols)

    for node in nodes:
        for t in results_of(node):
            found |= t.symbols
        for value in node.attributes.values():
            scan(value)
    return found


def region_symbols(results: Sequence[Node], leaves: Sequence[Node]) -> set[str]:
    """The symbols that the kernel of a region names."""
    found: dict[Node, None] = dict.fromkeys(leaves)
    stack = list(results)
    while stack:
        node = stack.pop()
        if node not in found:
            found[node] = None
            stack += node.parents
    return symbols_of(found)


def kernel(
    name: str, results: Sequence[Node], leaves: Sequence[Node], builder: Callable[..., Builder] = Builder
) -> Any:
    """A PrimFunc that computes `results` from `leaves`, pulling every node between.

    Parameters are the leaves' tensors, one int64 per symbol that no leaf's shape gives alone, then the results' tensors
    (several for an op with several results, none for an op that writes in place). `results` is one node with a body of its own, or elementwise nodes and moves
    of one shape. builder: makes the function from its name, the types of inputs and outputs, and symbols.
    """
    types = [t for node in results for t in results_of(node)]
    if results[0].op is ops.cache_append:
        types = []  # written in place
    b = builder(name, [leaf.tensor for leaf in leaves], types, region_symbols(results, leaves))
    pull = Pull(b, dict(zip(leaves, b.inputs, strict=True)))
    if len(results) == 1 and results[0].op in BODIES:
        BODIES[results[0].op](b, pull, results[0], b.outputs)
    else:
        moves.elementwise(b, pull, results, b.outputs)
    return b.finish()


__all__ = ["BODIES", "PULLED", "kernel", "results_of", "symbols_of"]
