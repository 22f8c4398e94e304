"""Index notation: how an op's output axes relate to its inputs' axes.

    "*b m k, *b k n -> *b m n"        a matrix product over broadcast leading axes
    "*b d! -> *b d!"                  softmax over the last axis: each output index depends on the whole input axis
    "*b t< -> *b t<"                  a running sum: each output index depends on the input's prefix up to it

Letters (or words) name axes. `*name` stands for any number of leading axes that broadcast as in NumPy. An axis that is
missing on the right is reduced. `!` marks an axis whose indices mix, `<` one that mixes only from earlier to later.
An axis of size 1 that only pads is written `1`. Operands that are absent are skipped.

From the notation come shapes (`infer_from_axes`), the relation of axes (`relate`), and the iteration space, hence FLOPs
(`flops`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import attrs

from jisu.compiler.types import Dim, TensorType, TupleType, Type, broadcast, dim, product, require, same_dim

if TYPE_CHECKING:
    from jisu.compiler.graph import Node, Op


@attrs.frozen
class Axis:
    """One token of the notation."""

    name: str
    star: bool = False
    mark: str = ""  # "", "!" (mixes) or "<" (mixes causally)


@attrs.frozen
class Notation:
    """A parsed index notation: axes per operand, axes per result."""

    operands: tuple[tuple[Axis, ...], ...]
    results: tuple[tuple[Axis, ...], ...]


@functools.cache
def parse(text: str) -> Notation:
    """Parse a notation such as "*b m k, *b k n -> *b m n"; several results are separated by commas."""
    left, arrow, right = text.partition("->")
    require(arrow, f"axis notation {text!r} has no '->'")

    def side(part: str) -> tuple[tuple[Axis, ...], ...]:
        return (
            tuple(tuple(_axis(token) for token in item.split()) for item in part.split(",")) if part.strip() else ((),)
        )

    return Notation(side(left), side(right))


def _axis(token: str) -> Axis:
    mark = token[-1] if token[-1] in "!<" else ""
    body = token[: len(token) - len(mark)]
    return Axis(body.lstrip("*"), body.startswith("*"), mark)


@attrs.frozen
class Relation:
    """How one operand axis reaches a result axis.

    `axis` is the result's axis (None where the axis is reduced), `kind` is "same" (result index i reads operand index i
    only), "whole" (any index may be read), "prefix" (indices up to i) or "broadcast" (operand axis of size 1).
    """

    axis: int | None
    kind: str


def notation(op: Op, types: list[Type | None], attributes: Mapping[str, Any]) -> Notation | None:
    """The notation of an op for these operands, or None where the op has none."""
    if op.axes is None:
        return None
    text = op.axes if isinstance(op.axes, str) else op.axes(*types, **attributes)
    return parse(text) if text is not None else None


def _expand(axes: tuple[Axis, ...], rank: int) -> list[tuple[str, str]]:
    """(name, mark) per axis of a tensor of this rank; a starred group of k axes becomes name.-k … name.-1."""
    stars = [a for a in axes if a.star]
    require(len(stars) <= 1, "one starred group per operand")
    spread = rank - (len(axes) - len(stars))
    require(
        spread >= 0 and (stars or spread == 0),
        f"expected {'at least ' if stars else ''}{len(axes) - len(stars)} axes, got {rank}",
    )
    result: list[tuple[str, str]] = []
    for a in axes:
        result += [(f"{a.name}.{k}", a.mark) for k in range(-spread, 0)] if a.star else [(a.name, a.mark)]
    return result


def _present(found: Notation, types: list[Type | None]) -> list[tuple[tuple[Axis, ...], TensorType]]:
    present = [t for t in types if t is not None]
    operands = found.operands
    if len(operands) == len(types):
        return [(a, t) for a, t in zip(operands, types, strict=True) if isinstance(t, TensorType)]
    require(len(operands) == len(present), f"notation has {len(operands)} operands, got {len(present)}")
    return [(a, t) for a, t in zip(operands, present, strict=True) if isinstance(t, TensorType)]


def _sizes(found: Notation, types: list[Type | None]) -> dict[str, Dim]:
    sizes: dict[str, Dim] = {"1": 1}
    for axes, t in _present(found, types):
        for (name, _), size in zip(_expand(axes, t.rank), t.shape, strict=True):
            if name == "1":
                require(size == 1, f"expected an axis of size 1, got {size} in {t}")
            elif name not in sizes:
                sizes[name] = size
            elif "." in name:
                (sizes[name],) = broadcast((sizes[name],), (size,))
            else:
                require(same_dim(sizes[name], size), f"axis {name} is {sizes[name]} and {size}")
    return sizes


def infer_from_axes(op: Op, types: list[Type | None], attributes: Mapping[str, Any]) -> Type:
    """The result's type by the notation: its axes' sizes, and the first operand's dtype."""
    found = notation(op, types, attributes)
    require(found is not None, f"{op.name} has neither a type rule nor an axis notation")
    assert found is not None
    sizes = _sizes(found, types)
    present = [t for t in types if isinstance(t, TensorType)]
    for t in present:
        require(t.dtype == present[0].dtype, f"operands' dtypes differ: {', '.join(map(str, present))}")
    shapes = []
    for axes in found.results:
        names: list[str] = []
        for a in axes:
            if a.star:
                group = {n for n in sizes if n.startswith(a.name + ".")}
                names += sorted(group, key=lambda n: int(n.rpartition(".")[2]))
            else:
                names.append(a.name)
        for n in names:
            require(n in sizes, f"axis {n} of {op.name}'s result stands in no operand")
        shapes.append(tuple(sizes[n] for n in names))
    results = tuple(TensorType(s, present[0].dtype) for s in shapes)
    return results[0] if len(results) == 1 else TupleType(results)


Named = tuple[tuple[str, str], ...]
"""(name, mark) of each axis of a tensor."""


def named_axes(node: Node) -> tuple[tuple[Named | None, ...], Named] | None:
    """The names and marks of each operand's axes (None: absent) and of the first result's; None for an op without notation.

    Axes with one name have one size, but for operands' axes of size 1 in a starred group. Raises TypeRuleError where notation and
    operands disagree.
    """
    types = [o.type if o is not None else None for o in node.operands]
    found = notation(node.op, types, node.attributes)
    if found is None:
        return None
    first = node.type.items[0] if isinstance(node.type, TupleType) else node.type
    present = iter(_present(found, types))
    rows: list[Named | None] = []
    for operand in node.operands:
        if operand is None:
            rows.append(None)
        else:
            axes, t = next(present)
            rows.append(tuple(_expand(axes, t.rank)))
    return tuple(rows), tuple(_expand(found.results[0], first.rank))


def relate(node: Node) -> tuple[tuple[Relation, ...] | None, ...] | None:
    """For each operand of `node`, how each of its axes reaches the first result; None for an op without notation.

    Absent operands give None. Raises TypeRuleError where notation and operands disagree.
    """
    found = named_axes(node)
    if found is None:
        return None
    operands, out = found
    first = node.type.items[0] if isinstance(node.type, TupleType) else node.type
    position = {name: i for i, (name, _) in enumerate(out) if name != "1"}
    rows: list[tuple[Relation, ...] | None] = []
    for operand, axes in zip(node.operands, operands, strict=True):
        if operand is None or axes is None:
            rows.append(None)
            continue
        row = []
        for (name, mark), size in zip(axes, operand.tensor.shape, strict=True):
            axis = position.get(name)
            if axis is not None and size == 1 and first.shape[axis] != 1:
                row.append(Relation(axis, "broadcast"))
            elif axis is None:
                row.append(Relation(None, {"<": "prefix"}.get(mark, "whole")))
            else:
                row.append(Relation(axis, {"!": "whole", "<": "prefix"}.get(mark, "same")))
        rows.append(tuple(row))
    return tuple(rows)


def flops(node: Node) -> Dim:
    """Floating-point operations of a node: points of its iteration space times the op's FLOPs per point."""
    if node.op.leaf or not node.op.flops:
        return 0
    types = tuple(o.type if o is not None else None for o in node.operands)
    return _flops(node.op, types, tuple(node.attributes.items()), node.type)


@functools.lru_cache(1 << 14)
def _flops(op: Op, operands: tuple[Type | None, ...], attributes: tuple[tuple[str, Any], ...], result: Type) -> Dim:
    if callable(op.flops):
        return dim(op.flops(result, *operands, **dict(attributes)))
    types = list(operands)
    found = notation(op, types, dict(attributes))
    first = result.items[0] if isinstance(result, TupleType) else result
    points = first.size
    if found is not None:
        sizes = _sizes(found, types)
        for (name, _), size in zip(_expand(found.results[0], first.rank), first.shape, strict=True):
            sizes[name] = size
        points = product(sizes.values())
    return dim(points * int(op.flops))


def nbytes(node: Node) -> Dim:
    """Bytes that a node reads and writes when nothing is fused."""
    results = node.type.items if isinstance(node.type, TupleType) else (node.type,)
    total: Dim = sum((t.nbytes for t in results), start=0)
    for operand in node.parents:
        if isinstance(operand.type, TensorType):
            total = total + operand.type.nbytes
    return dim(total)
