"""How errors in a layer's outputs count for the model: the curvature of its loss there, estimated from gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Protocol

import numpy as np

from jisu.compiler import ops
from jisu.compiler.errors import InputError
from jisu.compiler.graph import Graph, Node
from jisu.compiler.types import TensorType
from jisu.passes.compression.calibrate import Samples, calls_of
from jisu.passes.compression.layers import MATRICES, Layer, find_layers
from jisu.passes.compression.unfinished import Unfinished

WINDOWS = 64
"""How many windows of tokens, or calls of another model, gradients are taken on."""

MOST_OUTPUTS = 4096
"""Matrices with more outputs are compressed as if all of them counted alike."""

LEAST_BYTES = 1 << 28
"""What the estimates of a model may take together: so much, or half of what its weights take if that is more."""

DAMPING = 0.05
"""Of the mean diagonal, added to all of it."""


Moments = tuple[np.ndarray, float, int]
"""Of the gradients g [n] at a layer's outputs, sums over tokens: g gᵀ float32 [n, n], |g|⁴, and their number."""


class Differentiate(Protocol):
    """What computes gradients: given by whoever runs the pass, since passes know no framework; `frontends.gradients` has the one there is.

    layers: with the positions of their matrices among their operands. The result is by both, at the products with these matrices.
    """

    def __call__(
        self, graph: Graph, calls: Sequence[Sequence[np.ndarray]], layers: Mapping[Node, Sequence[int]], *, language: bool,
        progress: Callable[[float], None],
    ) -> Mapping[tuple[Node, int], Moments]: ...  # fmt: skip


def curvatures(
    graph: Graph, matrices: Mapping[Node, Layer], samples: Samples, differentiate: Differentiate, kept: Unfinished | None = None,
    progress: Callable[[float], None] = lambda done: None,
) -> Mapping[Node, np.ndarray]:  # fmt: skip
    """Per matrix [n, k] the float32 [n, n] by which errors in its outputs count: error eᵀ C e. Its mean diagonal is 1.

    After YAQA (Tseng et al., 2025), whose other factor is the layer's H. Matrices that have too many outputs, or no gradient, are left out;
    which ones have too many depends on the graph alone. kept: where estimates lie while they are needed, and those of an interrupted run.
    """
    affordable = _affordable(graph)
    wanted = {node: layer for node, layer in matrices.items() if node in affordable}
    if kept is None:
        return dict(_estimated(graph, wanted, samples, differentiate, progress))
    places = {node: graph.nodes.index(node) for node in wanted}
    done = kept.get("curvatures")
    if done is None:
        found = dict(_estimated(graph, wanted, samples, differentiate, progress))
        for node, estimate in found.items():
            kept.put(_name(places[node]), {"curvature": estimate})
        done = {"places": np.array([places[node] for node in found], np.int64)}
        kept.put("curvatures", done)  # last: what it lists is there
    there = set(done["places"].tolist())
    return _Kept(kept, {node: place for node, place in places.items() if place in there})


def _name(place: int) -> str:
    return f"curvature {place}"


class _Kept(Mapping[Node, np.ndarray]):
    """Estimates on disk, each read when it is asked for."""

    def __init__(self, kept: Unfinished, places: Mapping[Node, int]) -> None:
        self._kept, self._places = kept, places

    def __getitem__(self, node: Node) -> np.ndarray:
        found = self._kept.get(_name(self._places[node]))
        if found is None:
            raise InputError(f"{self._kept.folder}: a file of this compression is gone; start again")
        return found["curvature"]

    def __iter__(self) -> Iterator[Node]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def _estimated(
    graph: Graph, wanted: Mapping[Node, Layer], samples: Samples, differentiate: Differentiate, progress: Callable[[float], None]
) -> Iterator[tuple[Node, np.ndarray]]:  # fmt: skip
    if not wanted:
        return
    smooth, places = _without_roundings(graph, {user for layer in wanted.values() for user in layer.users})
    language = isinstance(samples, np.ndarray)
    calls = calls_of(smooth, samples[:WINDOWS], _batch(smooth, len(samples[0])) if language else 1)
    watched = {place: MATRICES[place.op] for place in places.values()}
    moments = differentiate(smooth, calls, watched, language=language, progress=progress)
    for node, layer in wanted.items():
        parts = [
            moments[places[user], position]
            for user in layer.users
            for position in MATRICES[user.op]
            if user.operands[position] is node and (places[user], position) in moments
        ]
        shrunk = _shrunk(parts)
        if shrunk is not None:
            yield node, shrunk


def _affordable(graph: Graph) -> set[Node]:
    """The matrices of which an estimate fits into memory: those with the fewest outputs first."""
    left = max(LEAST_BYTES, sum(math.prod(w.shape) * np.dtype(w.dtype).itemsize for w in graph.weights.values()) // 2)
    found = set()
    for node in sorted(find_layers(graph), key=lambda node: int(node.shape[0])):
        n = int(node.shape[0])
        left -= 4 * n * n
        if n > MOST_OUTPUTS or left < 0:
            break
        found.add(node)
    return found


def _batch(graph: Graph, length: int) -> int:
    """Windows at a time, so that logits don't fill the memory."""
    last = graph.outputs[0].type
    width = int(last.shape[-1]) if isinstance(last, TensorType) else 1
    return max(1, min(8, (1 << 22) // (width * length)))


def _without_roundings(graph: Graph, layers: Collection[Node]) -> tuple[Graph, dict[Node, Node]]:
    """The graph without what it rounds, through which no gradient would pass, and its nodes that took the places of `layers`."""
    places: dict[Node, Node] = {}

    def passed(old: Node, new: Node) -> Node:
        if old.op in (ops.fake_quantize, ops.decode_rows):
            rounded = new if old.op is ops.fake_quantize else new.operands[0]
            assert rounded is not None and rounded.operands[0] is not None
            return rounded.operands[0]
        if old in layers:
            places[old] = new
        return new

    return graph.map(passed), places


def _shrunk(parts: Sequence[Moments]) -> np.ndarray | None:
    """The mean of g gᵀ, shrunk towards a multiple of the identity as far as its own noise asks for (Ledoit & Wolf, 2004), and damped."""
    count = sum(n for _, _, n in parts)
    if not count:
        return None
    mean = np.asarray(sum(square.astype(np.float64) for square, _, _ in parts)) / count
    n = len(mean)
    level = float(np.trace(mean)) / n
    if not np.isfinite(level) or level <= 0:
        return None
    mean = (mean + mean.T) / (2 * level)
    noise = max(sum(fourth for _, fourth, _ in parts) / level**2 / count - float(np.square(mean).sum()), 0) / count
    spread = float(np.square(mean).sum()) - n
    share = min(noise / spread, 1.0) if spread > 0 else 1.0
    mean *= 1 - share
    mean[np.diag_indices(n)] += share + DAMPING
    return np.asarray(mean / (1 + DAMPING), np.float32)


def in_turn(
    aim: np.ndarray,
    curvature: np.ndarray,
    solve: Callable[[np.ndarray, np.ndarray], np.ndarray],
    *,
    groups: int = 16,
) -> None:
    """Solve the rows of a matrix group by group, each making up for errors of those before it.

    aim: float64 [n, k]. curvature: [n, n]. solve(rows, aims): takes the places of a group's rows and where they should come to, and
    returns where they come to, both [r, k]. GPTQ's feedback between inputs, but
    between outputs; within a group there is none. Rows are dealt to groups at random, since neighbours (of a head) depend on each other most.
    """
    n = len(aim)
    order = np.random.default_rng(0).permutation(n)
    inverse = np.linalg.inv(curvature[np.ix_(order, order)].astype(np.float64))
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T
    rest = aim[order]
    edges = np.linspace(0, n, min(groups, n) + 1).astype(int)
    for begin, end in zip(edges, edges[1:], strict=False):
        errors = rest[begin:end] - solve(order[begin:end], rest[begin:end])
        within, behind = factor[begin:end, begin:end], factor[begin:end, end:]
        rest[end:] -= np.linalg.solve(within, behind).T @ errors
