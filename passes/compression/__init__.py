"""Quantization of weights as a declared, lossy pass: which layers, in which scheme, by which algorithm."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping

import attrs
import numpy as np

from jisu.compiler import ops, schemes
from jisu.compiler.errors import InputError, RecipeError
from jisu.compiler.graph import WEIGHT, ArrayStorage, Graph, Node, Storage, weight
from jisu.compiler.recipe import QuantizeRecipe
from jisu.compiler.types import TensorType
from jisu.passes.compression import awq
from jisu.passes.compression.calibrate import Values, Visit, stream
from jisu.passes.compression.gptq import Grid, choose_grid, damped, gptq, refine
from jisu.passes.layout import Derived, is_stored

HEAD = "head"
"""A name by which patterns find the layer that makes a language model's logits, whatever the model calls it."""

_POSITIONS = {ops.linear: (1,), ops.gated_linear: (1, 2)}
"""Where layers hold their matrices [n, k]."""


@attrs.frozen(eq=False)
class Layer:
    """A matrix of weights: its names, its node, and the layers that multiply by it."""

    names: tuple[str, ...]
    node: Node
    users: tuple[Node, ...]


def find_layers(graph: Graph) -> dict[Node, Layer]:
    """The matrices that linear layers multiply by, by their nodes, in the graph's order."""
    users: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        for position in _POSITIONS.get(node.op, ()):
            matrix = node.operands[position]
            assert matrix is not None
            if is_stored(matrix) and matrix.op is not ops.dequantize and not matrix.tensor.symbols:
                users.setdefault(matrix, []).append(node)
    found = {}
    for matrix, layers in users.items():
        name = next(n.name for n in Graph((), (matrix,)).nodes if n.op is WEIGHT).removesuffix(".weight")
        is_head = any(layer in graph.outputs for layer in layers)
        found[matrix] = Layer((name, *([HEAD] if is_head else [])), matrix, tuple(layers))
    return found


def choose(graph: Graph, rules: Iterable[QuantizeRecipe]) -> dict[Node, tuple[Layer, QuantizeRecipe]]:
    """The last rule that matches each matrix; those that stay as they are are left out.

    Raises RecipeError for a pattern that matches nothing and for groups that don't divide a layer's inputs.
    """
    layers = find_layers(graph)
    names = [name for layer in layers.values() for name in layer.names]
    chosen: dict[Node, tuple[Layer, QuantizeRecipe]] = {}
    for rule in rules:
        matched = [
            n for n, layer in layers.items() if any(fnmatch.fnmatchcase(name, rule.layers) for name in layer.names)
        ]
        if not matched:
            near = difflib.get_close_matches(rule.layers, names, n=3, cutoff=0.3)
            raise RecipeError(
                f"quantize: no layer matches {rule.layers!r}; near: {', '.join(near or names[:3]) or 'the model has no linear layer'}"
            )
        chosen |= {n: (layers[n], rule) for n in matched}
    kept = {n: (layer, rule) for n, (layer, rule) in chosen.items() if rule.scheme != "none"}
    for node, (layer, rule) in kept.items():
        k, group = int(node.shape[1]), rule.inputs_per_scale
        if group and k % group:
            raise RecipeError(
                f"quantize: groups of {group} don't divide the {k} inputs of {layer.names[0]}; take a divisor, or 0 for whole rows"
            )
    return {n: kept[n] for n in layers if n in kept}


@attrs.frozen
class Quantize:
    """Store the weights of linear layers as codes.

    rules: which layers and how; the last that matches wins. tokens: int64 [windows, length] for calibration; without, all
    codes are the nearest.
    """

    rules: tuple[QuantizeRecipe, ...]
    tokens: np.ndarray | None = attrs.field(default=None, eq=False, repr=False)
    progress: Callable[[float], None] = attrs.field(default=lambda done: None, eq=False, repr=False)
    name: str = "quantize"
    exact: bool = False

    def __call__(self, graph: Graph) -> Graph:
        chosen = choose(graph, self.rules)
        if not chosen:
            return graph
        eager = sorted(
            (layer.names[0], rule.algorithm) for layer, rule in chosen.values() if rule.algorithm in ("gptq", "awq")
        )
        if eager and self.tokens is None:
            name, algorithm = eager[0]
            raise RecipeError(
                f'quantize: {algorithm} needs calibration text for {name}; give calibration=…, or algorithm = "rtn"'
            )
        scores = awq.score_layers(graph)
        weights = dict(graph.weights)
        made: dict[Node, Node] = {}
        values: dict[Node, np.ndarray] = {}

        def quantize(matrix: Node, statistics: Statistics | None) -> np.ndarray:
            layer, rule = chosen[matrix]
            w = _matrix(matrix, layer.names[0], graph.weights)
            clip = not scores.issuperset(layer.users)
            grid, codes = _solve(w, rule, statistics, clip)
            made[matrix] = _as_nodes(matrix, layer.names[0], grid, codes, weights)
            return grid.values(codes)

        if self.tokens is None or all(rule.algorithm == "rtn" for _, rule in chosen.values()):
            for matrix in chosen:
                quantize(matrix, None)
        else:
            stream(graph, self.tokens, {u for layer, _ in chosen.values() for u in layer.users},
                   self._visit(chosen, values, quantize), unchanged=any(rule.match for _, rule in chosen.values()),
                   progress=self.progress)  # fmt: skip
        new = graph.map(lambda old, rebuilt: made.get(old, rebuilt))
        return attrs.evolve(new, weights=weights).replace()

    @staticmethod
    def _visit(
        chosen: Mapping[Node, tuple[Layer, QuantizeRecipe]], values: dict[Node, np.ndarray],
        quantize: Callable[[Node, Statistics | None], np.ndarray],
    ) -> Visit:  # fmt: skip
        """What to do at each layer: quantize its matrices with the inputs that the layers before it give after theirs."""
        last: list[tuple[Values, Statistics]] = []  # of the inputs seen last, which several layers may share

        def visit(node: Node, run: Mapping[Node, Values], unchanged: Mapping[Node, Values]) -> dict[int, np.ndarray]:
            x = node.operands[0]
            assert x is not None
            now, then = run[x], unchanged[x]
            replaced = {}
            for position in _POSITIONS[node.op]:
                matrix = node.operands[position]
                if matrix is None or matrix not in chosen:
                    continue
                if matrix not in values:
                    if not last or last[0][0] is not now:
                        last[:] = [(now, _statistics(now, then))]
                    values[matrix] = quantize(matrix, last[0][1])
                replaced[position] = values[matrix]
            return replaced

        return visit


Statistics = tuple[np.ndarray, np.ndarray]


def _statistics(now: Values, then: Values) -> Statistics:
    """Sums over tokens float64 [k, k] of x xᵀ and (y - x) xᵀ: x is what a layer reads, y what it read in the unchanged model."""
    k = now[0].shape[-1]
    h, cross = np.zeros((k, k)), np.zeros((k, k))
    for x, y in zip(now, then, strict=True):
        a = x.reshape(-1, k)
        h += a.T @ a
        if y is not x:
            cross += (y.reshape(-1, k) - a).T @ a
    return h, cross


def _solve(w: np.ndarray, rule: QuantizeRecipe, statistics: Statistics | None, clip: bool) -> tuple[Grid, np.ndarray]:
    """Grid and codes of one matrix: the nearest (of a clipped grid, with `clip` and AWQ), or those that keep the layer's outputs."""
    kind, group = schemes.scheme(rule.scheme), rule.inputs_per_scale
    if statistics is None or rule.algorithm == "rtn":
        grid = choose_grid(w, kind, group, symmetric=rule.symmetric)
        return grid, grid.nearest(w)
    h, cross = statistics
    if rule.algorithm == "awq":
        grid = awq.clipped_grid(w, kind, group, h, symmetric=rule.symmetric, steps=10 if clip else 1)
        return grid, grid.nearest(w)
    grid = choose_grid(w, kind, group, symmetric=rule.symmetric, importance=np.diag(h), steps=rule.search)
    solid = damped(h, 0.01)
    # The matrix that gives the unchanged outputs from the changed inputs best, before any rounding.
    aim = w + rule.match * np.linalg.solve(solid, (w.astype(np.float64) @ cross).T).T
    return refine(aim, solid, grid, gptq(aim, h, grid), sweeps=rule.refine)


def _matrix(node: Node, name: str, weights: Mapping[str, Storage]) -> np.ndarray:
    """The values float32 [n, k] of a matrix; raises InputError for NaN and infinities, which have no code."""
    w = Derived(node, weights).wide()
    if not np.isfinite(w).all():
        raise InputError(
            f"{name}: the weight has {int((~np.isfinite(w)).sum())} NaN or infinite numbers; it can't be quantized"
        )
    return w


def _as_nodes(matrix: Node, name: str, grid: Grid, codes: np.ndarray, weights: dict[str, Storage]) -> Node:
    """`dequantize` of newly stored codes, scales and zeros."""
    kind = grid.scheme
    scales, whole = schemes.encode_scales(grid.scales, kind.scale)

    def stored(what: str, array: np.ndarray) -> Node:
        label = f"{name}.{what}"
        while label in weights:  # one stored tensor may give several matrices
            label += "'"
        weights[label] = ArrayStorage(array)
        return weight(label, TensorType(array.shape, str(array.dtype)), matrix.source)

    attributes = {"scheme": kind.name, "k": codes.shape[1], "group": grid.group, "whole": whole, "dtype": matrix.dtype}
    zeros = None if grid.zeros is None else stored("zeros", grid.zeros.astype(np.uint8))
    operands = (stored("codes", kind.pack(codes)), stored("scales", scales), zeros, None)
    return ops.dequantize.make(operands, attributes, matrix.source)
