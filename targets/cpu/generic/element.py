"""Values pulled element by element: what a node holds at an index, computed from tensors in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tvm import tirx

from jisu.compiler import ops
from jisu.compiler.graph import CONSTANT, Node, Op
from jisu.compiler.ops import ELEMENTWISE
from jisu.compiler.ops.shape import windows
from jisu.compiler.types import Dim, same_dim
from jisu.targets.cpu.generic.build import Builder, Expr, Flat, Index, i64, literal
from jisu.targets.cpu.generic.scalar import apply, convert, widen

ZERO = i64(0)


class Pull:
    """Computes elements of nodes inside one scope of a kernel, each at most once per index.

    `leaves` are the nodes that stand in memory; every other node that is asked for must be in `PULLED`.
    """

    def __init__(self, b: Builder, leaves: Mapping[Node, Flat], parent: Pull | None = None) -> None:
        self.b, self.leaves = b, leaves
        self.known: dict[tuple[Any, ...], tuple[Expr, tuple[Expr, ...]]] = dict(parent.known) if parent else {}

    def __call__(self, node: Node, index: Index) -> Expr:
        """The element of `node` at `index`, in the node's own dtype."""
        key = (node, *map(id, index))
        if key not in self.known:
            # The indices are kept with the value, so that their ids stay theirs.
            self.known[key] = (self._compute(node, index), tuple(index))
        return self.known[key][0]

    def wide(self, node: Node, index: Index) -> Expr:
        """The element in the dtype that arithmetic on it is done in."""
        return widen(self.b, self(node, index))

    def fresh(self) -> Pull:
        """For a nested scope: values computed there don't outlive it."""
        return Pull(self.b, self.leaves, self)

    def _compute(self, node: Node, index: Index) -> Expr:
        if node in self.leaves:
            return self.b.let(self.leaves[node][list(index)], "v")
        if node.op in ELEMENTWISE:
            operands = [self(o, aligned(index, o.shape, node.shape)) for o in node.parents]
            return apply(self.b, node.op, operands, node.attributes, node.dtype)
        return PULLED[node.op](self, node, index)


def aligned(index: Index, shape: Sequence[Dim], result: Sequence[Dim]) -> list[Expr]:
    """The index into an operand of `shape` that broadcasts to `result`."""
    shift = len(result) - len(shape)
    return [ZERO if n == 1 and result[k + shift] != 1 else index[k + shift] for k, n in enumerate(shape)]


def _constant(pull: Pull, node: Node, index: Index) -> Expr:
    return literal(node.value.array.reshape(-1)[0], node.dtype)


def _iota(pull: Pull, node: Node, index: Index) -> Expr:
    return pull.b.let(convert(pull.b, index[0], node.attributes["dtype"]))


def _broadcast(pull: Pull, node: Node, index: Index) -> Expr:
    (x,) = node.parents
    return pull(x, aligned(index, x.shape, node.shape))


def _transpose(pull: Pull, node: Node, index: Index) -> Expr:
    inside: list[Expr] = [ZERO] * len(index)
    for k, p in enumerate(node.perm):
        inside[p] = index[k]
    return pull(node.parents[0], inside)


def _slice(pull: Pull, node: Node, index: Index) -> Expr:
    b = pull.b
    inside = [
        i if start == 0 and step == 1 else b.let(b.dim(start) + i * i64(step), "s")
        for i, start, step in zip(index, node.starts, node.steps, strict=True)
    ]
    return pull(node.parents[0], inside)


def _flip(pull: Pull, node: Node, index: Index) -> Expr:
    b = pull.b
    inside = [
        b.let(b.dim(n) - i64(1) - i, "s") if k in node.axes else i
        for k, (i, n) in enumerate(zip(index, node.shape, strict=True))
    ]
    return pull(node.parents[0], inside)


def _windows(pull: Pull, node: Node, index: Index) -> Expr:
    (x,) = node.parents
    inside = list(index[: x.rank])
    for k, (axis, stride, dilation) in enumerate(zip(node.axes, node.strides, node.dilations, strict=True)):
        inside[axis] = pull.b.let(index[axis] * i64(stride) + index[x.rank + k] * i64(dilation), "s")
    return pull(x, inside)


def _axes_of_reshape(node: Node) -> tuple[list[tuple[int, int]], list[int], list[int]]:
    """How a reshape changes axes: pairs (old, new) of those that stay, and old and new ones of more than one element between them."""
    (x,) = node.parents
    old, new = ([k for k, n in enumerate(t.shape) if n != 1] for t in (x, node))
    kept = []
    for end in (0, -1):
        while old and new and same_dim(x.shape[old[end]], node.shape[new[end]]):
            kept.append((old.pop(end), new.pop(end)))
    return kept, old, new


def splits_known_axes(node: Node) -> bool:
    """Whether a reshape's index comes from the result's without dividing by sizes that only a call knows."""
    _, old, _ = _axes_of_reshape(node)
    return all(isinstance(node.parents[0].shape[k], int) for k in old[1:])


def _reshape(pull: Pull, node: Node, index: Index) -> Expr:
    b = pull.b
    (x,) = node.parents
    if x in pull.leaves:
        position = b.let(Flat(None, [b.dim(d) for d in node.shape], node.dtype).offset(index), "at")
        return b.let(pull.leaves[x][position], "v")
    kept, old, new = _axes_of_reshape(node)
    inside: list[Expr] = [ZERO] * x.rank
    for before, after in kept:
        inside[before] = index[after]
    if old:
        sizes = [b.dim(node.shape[k]) for k in new]
        position = b.let(Flat(None, sizes, node.dtype).offset([index[k] for k in new]), "at")
        for before, i in zip(old, b.unravel(position, [b.dim(x.shape[k]) for k in old]), strict=True):
            inside[before] = i
    return pull(x, inside)


def _concat(pull: Pull, node: Node, index: Index) -> Expr:
    """One operand's element; only that is computed."""
    b, axis = pull.b, node.axis
    if len(set(node.parents)) == 1:  # the same again and again
        x = node.parents[0]
        inside = list(index)
        inside[axis] = b.let(tirx.floormod(index[axis], b.dim(x.shape[axis])), "s")
        return pull(x, inside)
    # TVM's legalisation of bfloat16 loses memory of a kernel's own.
    kind = "int16" if node.dtype == "bfloat16" else node.dtype
    cell = b.scratch(1, kind)
    begin: Expr = ZERO
    for x in node.parents:
        end = b.let(begin + b.dim(x.shape[axis]), "end")
        with b.when(tirx.all(index[axis] >= begin, index[axis] < end)):
            inside = list(index)
            inside[axis] = b.let(index[axis] - begin, "s")
            value = pull.fresh()(x, inside)
            b.store(cell, ZERO, value if kind == node.dtype else tirx.reinterpret(kind, value))
        begin = end
    value = b.let(cell[ZERO], "v")
    return value if kind == node.dtype else tirx.reinterpret(node.dtype, value)


def _unpack_bits(pull: Pull, node: Node, index: Index) -> Expr:
    b, (x,) = pull.b, node.parents
    bits, width = node.attributes["bits"], 8 * x.tensor.itemsize
    bit = b.let(index[-1] * i64(bits), "bit")
    at, shift = b.let(tirx.floordiv(bit, i64(width)), "word"), b.let(tirx.floormod(bit, i64(width)), "shift")

    def word(where: Expr) -> Expr:
        return tirx.bitwise_and(tirx.Cast("int64", pull(x, [*index[:-1], where])), i64(2**width - 1))

    code = word(at) >> shift
    if width % bits:  # a code may go on in the next integer
        code = tirx.bitwise_or(
            code, word(b.let(tirx.min(at + i64(1), b.dim(x.shape[-1]) - i64(1)))) << (i64(width) - shift)
        )
    return b.let(tirx.Cast("uint8", tirx.bitwise_and(code, i64(2**bits - 1))))


def _pack_bits(pull: Pull, node: Node, index: Index) -> Expr:
    b, (x,) = pull.b, node.parents
    bits, k = node.attributes["bits"], b.dim(x.shape[-1])
    first = b.let(tirx.floordiv(index[-1] * i64(8), i64(bits)), "first")
    byte: Expr = i64(0)
    for i in range(1 if bits == 8 else -(-8 // bits) + (8 % bits != 0)):  # the codes that may have bits in this byte
        where = b.let(first + i64(i), "code")
        code = tirx.Cast("int64", pull(x, [*index[:-1], b.let(tirx.min(where, k - i64(1)))]))
        code = tirx.Select(where < k, tirx.bitwise_and(code, i64(2**bits - 1)), i64(0))
        # Its lowest bit lies at most bits - 1 below the byte.
        byte = tirx.bitwise_or(byte, code << (where * i64(bits) - index[-1] * i64(8) + i64(8)))
    return b.let(tirx.Cast("uint8", tirx.bitwise_and(byte >> i64(8), i64(255))))


PULLED: Mapping[Op, Callable[[Pull, Node, Index], Expr]] = {
    CONSTANT: _constant,
    ops.iota: _iota,
    ops.dim_value: lambda pull, node, index: pull.b.let(pull.b.dim(node.attributes["value"])),
    ops.broadcast_to: _broadcast,
    ops.transpose: _transpose,
    ops.slice_: _slice,
    ops.flip: _flip,
    windows: _windows,
    ops.reshape: _reshape,
    ops.concat: _concat,
    ops.unpack_bits: _unpack_bits,
    ops.pack_bits: _pack_bits,
}
"""How ops that move elements, or bits of them, find them (elementwise ops: see `scalar`)."""


def is_literal(node: Node) -> bool:
    """Whether a constant is one number, which stands in the code; a larger one is a tensor in memory."""
    return node.op is CONSTANT and node.value.array.size == 1


def always_pulled(node: Node) -> bool:
    """Whether a node costs nothing to compute wherever it is used."""
    return is_literal(node) or node.op in (ops.iota, ops.dim_value)
