"""Where something can be removed: attention's groups of heads, the channels between two layers, the experts of a router."""

from __future__ import annotations

from collections.abc import Iterable

import attrs
import numpy as np

from jisu.compiler import ops
from jisu.compiler.axes import named_axes
from jisu.compiler.graph import WEIGHT, Graph, Node
from jisu.passes.layout import is_stored
from jisu.passes.structured.coupling import Coupling


@attrs.frozen(eq=False)
class Consumer:
    """A layer that contracts the channels of a value `x` (axis `x_axis`) with those of a stored operand.

    position: of that operand in `node`; axis: its axis; labels int64 [k]: of that axis' indices.
    """

    node: Node
    x: Node
    x_axis: int
    position: int
    axis: int
    labels: np.ndarray

    @property
    def matrix(self) -> Node:
        """The stored operand."""
        found = self.node.operands[self.position]
        assert found is not None
        return found


@attrs.frozen(eq=False)
class Site:
    """Units that can be removed one by one, all of one kind.

    names: the weights that lose something, without ".weight". node: the op that the site belongs to. units: int64, a label each.
    total: how many there are with those that can't go. limit: how many may go at most. consumers: the layers that read what the
    units hold. refusal: why nothing can be removed, else "".
    """

    names: tuple[str, ...]
    node: Node
    units: np.ndarray
    total: int
    limit: int
    consumers: tuple[Consumer, ...] = ()
    refusal: str = ""


def find_consumers(graph: Graph, coupling: Coupling) -> list[Consumer]:
    """Every contraction of a computed value with a stored one."""
    found = []
    for node in graph.nodes:
        names = None if node.op.leaf else named_axes(node)
        if names is None:
            continue
        rows, out = names
        kept = {name for name, _ in out}
        places: dict[str, list[tuple[int, int]]] = {}
        for position, row in enumerate(rows):
            for axis, (name, mark) in enumerate(row or ()):
                if name not in kept and not mark:
                    places.setdefault(name, []).append((position, axis))
        stored = {p: is_stored(o) for p, o in enumerate(node.operands) if o is not None}
        for users in places.values():
            computed = [(p, axis) for p, axis in users if not stored[p]]
            for position, axis in users:
                operand = node.operands[position]
                if len(computed) != 1 or not stored[position] or operand is None:
                    continue
                labels, x = coupling.axes[operand][axis], node.operands[computed[0][0]]
                if labels is not None and x is not None:
                    found.append(Consumer(node, x, computed[0][1], position, axis, labels))
    return found


def find_sites(graph: Graph, coupling: Coupling, what: str) -> list[Site]:
    """The sites of `what`: "heads", "channels" or "experts", in the graph's order; those where nothing can go say why."""
    consumers = find_consumers(graph, coupling)
    owners = _owners(coupling)
    if what == "heads":
        spots = list(coupling.heads.items())
    elif what == "experts":
        spots = [(n, labels) for n, labels in coupling.experts.items() if n.op is ops.experts]
    else:
        others = np.concatenate([np.empty(0, np.int64), *coupling.heads.values(), *coupling.experts.values()])
        spots = [(c.node, c.labels[~np.isin(c.labels, others)]) for c in consumers]
    found = []
    for node, units in _merged(spots):
        names = tuple(dict.fromkeys(name for unit in units.tolist() for name in owners.get(unit, ())))
        reasons = dict(coupling.pins) if what == "experts" else {**coupling.ranked, **coupling.pins}
        free = np.array([k for k in units.tolist() if k not in reasons], np.int64)
        refusal = "" if free.size else reasons[int(units[0])]
        limit = min(len(free), len(units) - 1)
        for places, ordered in coupling.sorts:
            if np.isin(ordered, free).any():
                used = [i for i, k in enumerate(places.tolist()) if k in coupling.pins]
                limit = min(limit, len(places) - 1 - max(used, default=-1))
                refusal = refusal or ("" if limit else f"all {len(units)} are used for each token")
        if not limit:
            refusal = refusal or f"there is one {_ONE[what]} only"
        readers = tuple(c for c in consumers if np.isin(c.labels, free).any())
        found.append(Site(names or (node.source,), node, free, len(units), max(limit, 0), readers, refusal))
    return found


_ONE = {"heads": "group of heads", "channels": "channel", "experts": "expert"}


def _owners(coupling: Coupling) -> dict[int, list[str]]:
    """The stored tensors that hold each label, by name without ".weight"."""
    found: dict[int, list[str]] = {}
    for name, node in coupling.weights.items():
        for axis in coupling.axes[node]:
            if axis is not None:
                for k in np.unique(axis).tolist():
                    found.setdefault(k, []).append(name.removesuffix(".weight"))
    return found


def _merged(spots: Iterable[tuple[Node, np.ndarray]]) -> list[tuple[Node, np.ndarray]]:
    """Each label once, in order; places that share a label are one."""
    merged: list[tuple[Node, dict[int, None]]] = []
    for node, axis in spots:
        labels = dict.fromkeys(axis.tolist())
        for other in [m for m in merged if not labels.keys().isdisjoint(m[1])]:
            merged.remove(other)
            node, labels = other[0], {**other[1], **labels}
        if labels:
            merged.append((node, labels))
    return [(node, np.array(list(labels), np.int64)) for node, labels in merged]


def weights_of(coupling: Coupling, units: np.ndarray) -> list[tuple[str, int, np.ndarray]]:
    """(name, axis, labels of the axis) of every stored tensor that has some of `units`."""
    return [
        (name, axis, labels)
        for name, node in coupling.weights.items()
        for axis, labels in enumerate(coupling.axes[node])
        if labels is not None and np.isin(labels, units).any()
    ]


def is_sole(graph: Graph, consumer: Consumer) -> bool:
    """Whether the stored operand is of one weight that serves nothing else, so that its values are free to change."""
    nodes = Graph((), (consumer.matrix,)).nodes
    names = [n.name for n in nodes if n.op is WEIGHT]
    uses = sum(n.op is WEIGHT and n.name in names for n in graph.nodes)
    return len(names) == 1 == uses and all(len(graph.users[n]) == 1 for n in nodes) and consumer.matrix.rank == 2
