"""The graph without some labels: weights cut, shapes and slices rewritten, everything else inferred anew."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import attrs
import numpy as np

from jisu.compiler import ops
from jisu.compiler.graph import CONSTANT, WEIGHT, ArrayStorage, Graph, Node, Storage, constant, weight
from jisu.compiler.types import TensorType, numpy_dtype, same_dim
from jisu.passes.structured.coupling import Coupling, shape_of

Cut = tuple[np.ndarray | None, ...]
"""Which indices of each axis stay: bool [n], None for a symbolic axis."""


@attrs.define(eq=False)
class Part:
    """A stored tensor without some indices of its axes; cut at each read, never kept."""

    whole: Storage
    keep: Cut

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(int(np.count_nonzero(mask)) for mask in self.keep if mask is not None)

    @property
    def dtype(self) -> Any:
        return self.whole.dtype

    def numpy(self) -> np.ndarray:
        """The part, copied out now."""
        return np.ascontiguousarray(cut(self.whole.numpy(), self.keep))

    def release(self) -> None:
        """Let go of pages of a memory-mapped source that reading touched."""
        release = getattr(self.whole, "release", None)
        if release is not None:
            release()


def cut(array: np.ndarray, keep: Cut) -> np.ndarray:
    """`array` at the indices that stay."""
    for axis, mask in enumerate(keep):
        if mask is not None and not mask.all():
            array = np.compress(mask, array, axis)
    return array


Matrices = Mapping[tuple[Node, int], np.ndarray]
"""New values of stored operands, by node and position, in the operand's old shape."""


def without(coupling: Coupling, labels: Iterable[int], matrices: Matrices) -> Graph:
    """The graph without `labels` (none of which is pinned); `matrices` take the place of operands, cut likewise."""
    graph = coupling.graph
    gone = np.zeros(coupling.count, bool)
    gone[list(_with_places(coupling, set(labels)))] = True

    def stays(node: Node) -> Cut:
        return tuple(None if axis is None else ~gone[axis] for axis in coupling.axes[node])

    weights: dict[str, Storage] = dict(graph.weights)
    done: dict[Node, Node] = {}
    for node in graph.nodes:
        keep = stays(node)
        operands = [None if o is None else done[o] for o in node.operands]
        for position, operand in enumerate(node.operands):
            if operand is not None and (node, position) in matrices:
                operands[position] = _stored(operand, cut(matrices[node, position], stays(operand)), weights)
        if node.op is WEIGHT and not _whole(keep):
            done[node] = weight(node.name, TensorType(_sizes(node, keep), node.dtype), node.source)
            weights[node.name] = Part(graph.weights[node.name], keep)
        elif node.op is CONSTANT and not _whole(keep):
            done[node] = constant(cut(node.value.array, keep))
        elif node.op.leaf:
            done[node] = node
        else:
            attributes = _attributes(node, keep, [stays(o) if o is not None else () for o in node.operands])
            if attributes == node.attributes:
                done[node] = node.with_operands(operands)
            else:
                done[node] = node.op.make(operands, attributes, node.source)
        have, want = shape_of(done[node]), _sizes(node, keep)
        assert all(map(same_dim, have, want)), f"{node.op.name} became {have}, not {want}"
    return graph.replace(
        inputs=tuple(done[i] for i in graph.inputs), outputs=tuple(done[o] for o in graph.outputs), weights=weights
    )


def _with_places(coupling: Coupling, labels: set[int]) -> set[int]:
    """With the last places of every sort that has fewer to order."""
    found = set(labels)
    for places, ordered in coupling.sorts:
        fewer = sum(k in labels for k in ordered.tolist())
        found |= set(places[len(places) - fewer :].tolist())
    return found


def _whole(keep: Cut) -> bool:
    return all(mask is None or bool(mask.all()) for mask in keep)


def _sizes(node: Node, keep: Cut) -> tuple[Any, ...]:
    return tuple(
        d if mask is None else int(np.count_nonzero(mask)) for d, mask in zip(shape_of(node), keep, strict=True)
    )


def _attributes(node: Node, keep: Cut, operands: list[Cut]) -> Mapping[str, Any]:
    """The node's attributes where they speak of sizes: of a reshape, of a slice, of a convolution's groups."""
    if node.op in (ops.reshape, ops.broadcast_to):
        return {**node.attributes, "shape": _sizes(node, keep)}
    if node.op is ops.slice_:
        ends = {
            name: tuple(
                at if mask is None or not isinstance(at, int) else int(np.count_nonzero(mask[:at]))
                for at, mask in zip(node.attributes[name], operands[0], strict=True)
            )
            for name in ("starts", "stops")
        }
        return (
            node.attributes if all(mask is None or mask.all() for mask in operands[0]) else {**node.attributes, **ends}
        )
    if node.op is ops.conv and node.groups > 1:
        mask = keep[1]
        assert mask is not None
        return {**node.attributes, "groups": node.groups * int(np.count_nonzero(mask)) // len(mask)}
    return node.attributes


def _stored(operand: Node, array: np.ndarray, weights: dict[str, Storage]) -> Node:
    """A new stored tensor under the name of the one weight that gave `operand`."""
    (name,) = {n.name for n in Graph((), (operand,)).nodes if n.op is WEIGHT}
    weights[name] = ArrayStorage(np.ascontiguousarray(array, numpy_dtype(operand.dtype)))
    return weight(name, TensorType(array.shape, operand.dtype), operand.source)
