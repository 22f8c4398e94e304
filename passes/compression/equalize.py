"""Equalisation: factors per channel that move between a layer's weights and whatever makes its input; the function stays.

If layers read x, their columns may be multiplied by s and the channels of x divided by it. `find_sites` follows the channels of x back
through the graph to where the division can be folded: a norm's gain, or rows of the matrix that computes it, also through what keeps
channels apart (a gated product, attention's values, reshapes). SmoothQuant (Xiao et al., 2023) and AWQ (Lin et al., 2024) choose s.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import attrs
import numpy as np

from jisu.compiler import ops
from jisu.compiler.errors import RecipeError
from jisu.compiler.graph import ArrayStorage, Graph, Node, weight
from jisu.compiler.recipe import QuantizeRecipe
from jisu.compiler.types import TensorType, numpy_dtype, product
from jisu.passes.compression.awq import search_factors
from jisu.passes.compression.calibrate import Samples, Values, observe
from jisu.passes.compression.layers import MATRICES, Layer, choose_quantized
from jisu.passes.layout import Derived, is_stored


class Fixed(Exception):
    """Why a value's channels can't be divided."""


@attrs.frozen(eq=False)
class Fold:
    """A stored operand of a node, to be divided: element i of its first axis by the factor of channel index[i]."""

    node: Node
    position: int
    index: np.ndarray


@attrs.frozen(eq=False)
class Site:
    """A value with the layers that read it, and what is to be divided in front of it.

    classes int [k]: channels of one class must get one factor (values of grouped-query attention serve several heads).
    """

    value: Node
    layers: tuple[Node, ...]
    folds: tuple[Fold, ...]
    classes: np.ndarray

    @property
    def matrices(self) -> tuple[Node, ...]:
        """The matrices [n, k] that multiply the value."""
        return tuple(m for layer in self.layers for p in MATRICES[layer.op] if (m := layer.operands[p]) is not None)

    @property
    def behind_norm(self) -> bool:
        """Whether a norm makes the value."""
        return self.value.op in (ops.rms_norm, ops.layer_norm)


def find_sites(graph: Graph, matrices: set[Node]) -> tuple[list[Site], dict[Node, str]]:
    """The values that layers with these matrices read and whose channels can be divided; and, for the others, why not."""
    sites: list[Site] = []
    refused: dict[Node, str] = {}
    for node in graph.nodes:
        users = graph.users[node]
        if not any(u.op in MATRICES and u.operands[0] is node and matrices.intersection(u.parents) for u in users):
            continue
        try:
            sites.append(_site(graph, node))
        except Fixed as reason:
            refused[node] = str(reason)
    return sites, refused


def _site(graph: Graph, value: Node) -> Site:
    layers = tuple(dict.fromkeys(graph.users[value]))
    for user in layers:
        if user.op not in MATRICES or user.operands[0] is not value or value in user.operands[1:]:
            raise Fixed(f"{user.op.name} reads it, too{_at(user)}")
        for position in MATRICES[user.op]:
            _own(graph, user.operands[position], user)
    if value in graph.outputs:
        raise Fixed("it is an output of the model")
    channels = np.arange(int(value.shape[-1]))
    folds, classes = _follow(graph, value, channels, channels)
    return Site(value, layers, tuple(folds), classes)


def _own(graph: Graph, stored: Node | None, user: Node) -> None:
    """Raises Fixed for what can't be scaled for one user."""
    assert stored is not None
    if not is_stored(stored) or stored.op is ops.dequantize:
        raise Fixed(f"{user.op.name} multiplies by no stored matrix{_at(user)}")
    if set(graph.users[stored]) != {user}:
        raise Fixed(f"its weight is used elsewhere, too{_at(user)}")


def _at(node: Node) -> str:
    return f" at {node.source}" if node.source else ""


Found = tuple[list[Fold], np.ndarray]


def _follow(graph: Graph, node: Node, index: np.ndarray, classes: np.ndarray) -> Found:
    """Where the node's channels (channel index[i, …] at place i, … of its last axes) can be divided, and the classes of all channels.

    A step is right for an op that, with its other operands as they are, gives c f(x) for c x, c a positive factor per channel.
    """
    if node.op in (ops.rms_norm, ops.layer_norm) and index.ndim == 1:
        shifted = node.op is ops.layer_norm and node.operands[2] is not None
        return [Fold(node, position, index) for position in ((1, 2) if shifted else (1,))], classes
    if node.op is ops.linear and index.ndim == 1 and node.operands[3] is None and node.activation in ("none", "relu"):
        _own(graph, node.operands[1], node)
        shifted = node.operands[2] is not None
        return [Fold(node, position, index) for position in ((1, 2) if shifted else (1,))], classes
    if node.op is ops.gated_linear and index.ndim == 1:
        _own(graph, node.operands[2], node)
        return [Fold(node, 2, index)], classes
    if node.op is ops.mul:
        return _either(graph, node, index, classes)
    if node.op is ops.reshape:
        return _step(graph, node, 0, index.reshape(_suffix(node.parents[0], index.size)), classes)
    if node.op is ops.attention and index.ndim == 2:
        groups = node.parents[2].shape[2]
        heads = index.reshape(groups, -1, index.shape[1])  # those of one group read the same values
        first = np.arange(len(classes))
        first[heads] = heads[:, :1]
        return _step(graph, node, 2, heads[:, 0], first[classes])
    why = " with a residual" if node.op is ops.linear and node.operands[3] is not None else ""
    if node.op in MATRICES and node.activation != "none":
        why = f" with {node.activation}"
    raise Fixed(f"{node.op.name}{why} makes it{_at(node)}")


def _step(graph: Graph, node: Node, position: int, index: np.ndarray, classes: np.ndarray) -> Found:
    operand = node.operands[position]
    assert operand is not None
    if graph.users[operand] != (node,) or operand in graph.outputs:
        raise Fixed(f"{operand.op.name}, which makes it, is used elsewhere, too{_at(operand)}")
    return _follow(graph, operand, index, classes)


def _either(graph: Graph, node: Node, index: np.ndarray, classes: np.ndarray) -> Found:
    """Through a product: one of its operands is divided."""
    reasons = []
    for position in (1, 0):
        operand = node.operands[position]
        assert operand is not None
        if operand.shape[-index.ndim :] == node.shape[-index.ndim :]:
            try:
                return _step(graph, node, position, index, classes)
            except Fixed as reason:
                reasons.append(str(reason))
    raise Fixed(" and ".join(reasons) or f"{node.op.name} makes it{_at(node)}")


def _suffix(node: Node, size: int) -> tuple[int, ...]:
    """The last axes of a value that hold `size` elements together."""
    for cut in range(node.rank - 1, -1, -1):
        tail = node.shape[cut:]
        if all(isinstance(d, int) for d in tail) and product(tail) == size:
            return tail  # type: ignore[return-value]
    raise Fixed(f"a reshape takes its channels apart{_at(node)}")


def apply(graph: Graph, factors: Sequence[tuple[Site, np.ndarray]]) -> Graph:
    """The same function, with the layers' columns multiplied by factors [k] and what they read divided by them."""
    weights = dict(graph.weights)
    changes: dict[Node, list[tuple[int, Node, bool]]] = {}  # node -> (operand, factors, whether along columns)

    def stored(site: Site, what: str, array: np.ndarray, dtype: str) -> Node:
        label = f"{_name(site)}.{what}"
        while label in weights:
            label += "'"
        weights[label] = ArrayStorage(array.astype(numpy_dtype(dtype)))
        return weight(label, TensorType(array.shape, dtype))

    for site, values in factors:
        columns = stored(site, "factors", values, site.value.dtype)
        for layer in site.layers:
            for position in MATRICES[layer.op]:
                changes.setdefault(layer, []).append((position, columns, True))
        for fold in site.folds:
            rows = stored(site, "divisors", 1 / values[fold.index], site.value.dtype)
            changes.setdefault(fold.node, []).append((fold.position, rows, False))

    def transform(old: Node, new: Node) -> Node:
        for position, by, columns in changes.get(old, ()):
            new = _scaled(new, position, by, columns)
        return new

    return attrs.evolve(graph.map(transform), weights=weights).replace()


def _name(site: Site) -> str:
    matrix = site.matrices[0]
    while matrix.parents:
        matrix = matrix.parents[0]
    return str(matrix.name).removesuffix(".weight")


def _scaled(node: Node, position: int, by: Node, columns: bool) -> Node:
    """A node with an operand multiplied by factors along its first axis, or a matrix along its columns."""
    operand = node.operands[position]
    attributes = dict(node.attributes)
    if operand is None:  # a norm without gain
        found = by
    elif columns:
        found = ops.mul(operand, by)
    else:
        if attributes.get("offset"):
            operand, attributes["offset"] = ops.add(operand, attributes["offset"]), 0.0
        found = ops.mul(operand, by if operand.rank == 1 else ops.reshape(by, shape=(by.shape[0], 1)))
    operands = [found if i == position else o for i, o in enumerate(node.operands)]
    return node.op.make(operands, attributes, node.source)


@attrs.frozen
class Equalize:
    """Choose factors on calibration text and fold them, for the layers whose rules say `smooth` or AWQ.

    samples: calibration data. Values whose channels can't be divided are left as they are; `notes` says which, and why.
    """

    rules: tuple[QuantizeRecipe, ...]
    samples: Samples | None = attrs.field(default=None, eq=False, repr=False)
    progress: Callable[[float], None] = attrs.field(default=lambda done: None, eq=False, repr=False)
    name: str = "equalize"
    exact: bool = True
    notes: dict[str, str] = attrs.field(factory=dict, eq=False, repr=False)

    def __call__(self, graph: Graph) -> Graph:
        every = choose_quantized(graph, self.rules)
        chosen = {m: found for m, found in every.items() if found[1].smooth or found[1].algorithm == "awq"}
        if not chosen:
            return graph
        sites, refused = find_sites(graph, set(chosen))
        smoothing = {s.value: a for s in sites if s.behind_norm and (a := _alpha(s, every))}
        wanted = [s for s in sites if s.value in smoothing or _searched(s, chosen)]
        self.notes.update({f"{n.op.name}{_at(n)}": reason for n, reason in refused.items()})
        first, rule = next(iter(chosen.values()))
        method = "smooth" if rule.smooth else "awq"
        if not wanted:
            why = next(iter(refused.values()), "no norm makes what they read")
            raise RecipeError(
                f"quantize: {method} finds no layer whose input's channels can be divided; {first.names[0]}: {why}"
            )
        if self.samples is None:
            raise RecipeError(f"quantize: {method} needs calibration text for {first.names[0]}; give calibration=…")
        by_value = {site.value: site for site in wanted}
        factors: list[tuple[Site, np.ndarray]] = []

        def look(x: Node, values: Values) -> None:
            site = by_value[x]
            matrices = {m: Derived(m, graph.weights).wide() for m in site.matrices}
            if x in smoothing:
                found = smooth_factors(list(matrices.values()), _largest(values), smoothing[x])
            else:
                coded = [(matrices[m], chosen[m][1]) for m in site.matrices if m in chosen]
                found = search_factors(coded, *_spread(values), site.classes)
            if not np.array_equal(found, np.ones(len(found))):
                factors.append((site, found))

        observe(graph, self.samples, {site.layers[0] for site in wanted}, look, self.progress)
        return apply(graph, factors)


def _alpha(site: Site, chosen: Mapping[Node, tuple[Layer, QuantizeRecipe]]) -> float:
    """How far the layers of a site are smoothed; raises RecipeError where they differ in it."""
    found: dict[float, str] = {}
    for matrix in site.matrices:
        if matrix in chosen:
            layer, rule = chosen[matrix]
            found.setdefault(rule.smooth, layer.names[0])
    if len(found) > 1:
        (a, first), (b, second) = list(found.items())[:2]
        raise RecipeError(
            f"quantize: {first} and {second} read one value, so smooth can't be {a} for one and {b} for the other"
        )
    return next(iter(found), 0.0)


def _searched(site: Site, chosen: Mapping[Node, tuple[Layer, QuantizeRecipe]]) -> bool:
    return any(chosen[m][1].algorithm == "awq" for m in site.matrices if m in chosen)


def _largest(values: Values) -> np.ndarray:
    """The largest magnitude per channel."""
    return np.max([np.abs(v).reshape(-1, v.shape[-1]).max(0) for v in values], 0)  # type: ignore[no-any-return]


def _spread(values: Values) -> tuple[np.ndarray, np.ndarray]:
    """The mean magnitude per channel, and the sum of x xᵀ, float64."""
    k, count = values[0].shape[-1], 0
    mean, h = np.zeros(k), np.zeros((k, k))
    for v in values:
        x = v.reshape(-1, k)
        mean += np.abs(x).sum(0, dtype=np.float64)
        h += x.T @ x
        count += len(x)
    return mean / max(count, 1), h


def smooth_factors(matrices: Sequence[np.ndarray], largest: np.ndarray, alpha: float) -> np.ndarray:
    """SmoothQuant's factors float64 [k]: max |x|^alpha / max |w|^(1 - alpha) per channel, w over all matrices [n, k]."""
    columns = np.maximum(np.max([np.abs(w).max(0) for w in matrices], 0), 1e-5).astype(np.float64)
    return np.asarray(np.maximum(np.maximum(largest, 1e-5).astype(np.float64) ** alpha / columns ** (1 - alpha), 1e-5))
