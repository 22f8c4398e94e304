"""Pruning and quantization of weights as one declared, lossy pass: which layers, into what, by which algorithm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import attrs
import numpy as np

from jisu.compiler.errors import RecipeError
from jisu.compiler.graph import Graph, Node
from jisu.compiler.recipe import PruneRecipe, QuantizeRecipe
from jisu.passes.compression import awq
from jisu.passes.compression.allocation import allocate
from jisu.passes.compression.calibrate import Run, Samples, Visit, stream
from jisu.passes.compression.curvature import Differentiate, curvatures
from jisu.passes.compression.layers import MATRICES, Layer, choose_pruned, choose_quantized, mask_of, matrix_of
from jisu.passes.compression.matrix import Choice, Cut, Solved, Statistics, gather, solve
from jisu.passes.compression.unfinished import Unfinished


@attrs.frozen
class Compress:
    """Prune the matrices of linear layers, and store what is left as codes.

    prune, quantize: which layers and how; the last rule that matches wins. A layer with both is done in one go: codes are found for what its
    mask leaves, and make up for both. samples: calibration data; without, the smallest numbers become 0 and codes are the nearest.
    folder: where finished layers are kept until all are, so that an interrupted run goes on there; the result is the same. differentiate:
    computes what the objective "loss" needs; without, it is as "output".
    """

    prune: tuple[PruneRecipe, ...] = ()
    quantize: tuple[QuantizeRecipe, ...] = ()
    samples: Samples | None = attrs.field(default=None, eq=False, repr=False)
    progress: Callable[[float], None] = attrs.field(default=lambda done: None, eq=False, repr=False)
    folder: Path | None = attrs.field(default=None, eq=False, repr=False)
    name: str = "compress"
    differentiate: Differentiate | None = attrs.field(default=None, eq=False, repr=False)
    exact: bool = False

    def __call__(self, graph: Graph) -> Graph:
        kept = None
        if self.folder is not None and self.samples is not None:
            kept = Unfinished(self.folder, graph, self.samples, (self.prune, self.quantize))
        first = 0.1 if self.differentiate is not None else 0.0  # of the time, for gradients
        share = 0.7 if any(rule.allocation in ("owl", "optimal") for rule in self.prune) else first  # and for shares
        counts = self.curvatures(graph, kept, _part(self.progress, 0, first))
        layers, choices = self.choose(graph, kept, _part(self.progress, first, share), counts)
        if choices:
            graph = compress(graph, layers, choices, self.samples, _part(self.progress, share, 1), kept, counts)
        if kept is not None:
            kept.done()
        return graph

    def curvatures(
        self, graph: Graph, kept: Unfinished | None = None, progress: Callable[[float], None] = lambda done: None
    ) -> Mapping[Node, np.ndarray]:
        """How errors in the outputs of matrices count, of those whose rules ask for it. Raises RecipeError as `choose`."""
        chosen = (choose_pruned(graph, self.prune), choose_quantized(graph, self.quantize))
        matrices = {
            node: layer for found in chosen for node, (layer, rule) in found.items() if _objective(rule) == "loss"
        }
        if self.differentiate is None or self.samples is None or not matrices:
            return {}
        for node, layer in matrices.items():
            matrix_of(node, layer.names[0], graph.weights)  # its errors come before those of gradients
        return curvatures(graph, matrices, self.samples, self.differentiate, kept, progress)

    def choose(
        self, graph: Graph, kept: Unfinished | None = None, progress: Callable[[float], None] = lambda done: None,
        curvatures: Mapping[Node, np.ndarray] | None = None,
    ) -> tuple[dict[Node, Layer], dict[Node, Choice]]:  # fmt: skip
        """What is done to each matrix that the rules change. Raises RecipeError for rules that don't fit the graph or need samples."""
        pruned, coded = choose_pruned(graph, self.prune), choose_quantized(graph, self.quantize)
        layers = {node: layer for chosen in (pruned, coded) for node, (layer, _) in chosen.items()}
        if self.samples is None:
            self._check_uncalibrated(pruned, coded)
        methods = {
            node: rule.method or ("magnitude" if self.samples is None else "alps") for node, (_, rule) in pruned.items()
        }
        shares = allocate(graph, pruned, self.samples, progress, kept, curvatures)
        scores = awq.score_layers(graph)
        choices = {}
        for node in graph.nodes:
            if node not in layers:
                continue
            cut = None
            if node in pruned and shares[node] > 0:
                cut = Cut(shares[node], pruned[node][1].shape, methods[node])
            codes = coded[node][1] if node in coded else None
            rule = pruned[node][1] if node in pruned else coded[node][1]
            if cut is not None or codes is not None:
                clip = not scores.issuperset(layers[node].users)
                choices[node] = Choice(cut, codes, rule.match, clip, _objective(rule))
        return layers, choices

    @staticmethod
    def _check_uncalibrated(
        pruned: Mapping[Node, tuple[Layer, PruneRecipe]], coded: Mapping[Node, tuple[Layer, QuantizeRecipe]]
    ) -> None:
        for layer, rule in pruned.values():
            if rule.method not in (None, "magnitude"):
                raise RecipeError(
                    f'prune: {rule.method} needs calibration data for {layer.names[0]}; give calibration=…, or algorithm = "magnitude"'
                )
            if rule.allocation in ("owl", "optimal"):
                raise RecipeError(
                    f"prune: allocation = {rule.allocation!r} needs calibration data for {layer.names[0]}; "
                    'give calibration=…, or allocation = "uniform" or "global"'
                )
        for layer, code in coded.values():
            if code.algorithm in ("gptq", "awq", "autoround"):
                raise RecipeError(
                    f'quantize: {code.algorithm} needs calibration data for {layer.names[0]}; give calibration=…, or algorithm = "rtn"'
                )


def _objective(rule: PruneRecipe | QuantizeRecipe) -> str:
    """What is kept: other algorithms than ALPS and those that begin with GPTQ know outputs only."""
    return rule.objective if rule.algorithm in ("auto", "alps", "gptq", "autoround") else "output"


def _part(progress: Callable[[float], None], begin: float, end: float) -> Callable[[float], None]:
    return lambda done: progress(begin + (end - begin) * done)


def compress(
    graph: Graph, layers: Mapping[Node, Layer], choices: Mapping[Node, Choice], samples: Samples | None,
    progress: Callable[[float], None] = lambda done: None, kept: Unfinished | None = None,
    curvatures: Mapping[Node, np.ndarray] | None = None,
) -> Graph:  # fmt: skip
    """The graph with each matrix as chosen, one after the other, each with the inputs that those before it then give.

    kept: holds the matrices of an interrupted run. curvatures: how errors in the outputs of matrices count.
    """
    solved: dict[Node, Solved] = {}
    if samples is None or not any(choice.calibrated for choice in choices.values()):
        for done, (node, choice) in enumerate(choices.items(), 1):
            w = matrix_of(node, layers[node].names[0], graph.weights, wide=False)
            solved[node] = solve(w, choice, None, node.dtype, mask_of(node, graph.weights))
            progress(done / len(choices))
    else:
        users = {u for node in choices for u in layers[node].users}
        unchanged = any(choice.match for choice in choices.values())
        visit = _visit(graph, layers, choices, solved, kept, curvatures or {})
        stream(graph, samples, users, visit, unchanged=unchanged, progress=progress)
    return with_solved(graph, layers, solved)


def _visit(
    graph: Graph, layers: Mapping[Node, Layer], choices: Mapping[Node, Choice], solved: dict[Node, Solved],
    kept: Unfinished | None, curvatures: Mapping[Node, np.ndarray],
) -> Visit:  # fmt: skip
    """What to do at each layer: compress its matrices, and go on with what they then compute."""
    last: list[tuple[tuple[Node | None, ...], Statistics]] = []  # layers of one input and residual share them

    def stored(matrix: Node) -> Solved | None:
        arrays = None if kept is None else kept.get(str(graph.nodes.index(matrix)))
        return None if arrays is None else Solved.from_arrays(arrays)

    def compute(matrix: Node, layer: Node, now: Run, then: Run) -> Solved:
        name, choice = layers[matrix].names[0], choices[matrix]
        w = matrix_of(matrix, name, graph.weights)
        key = (layer.operands[0], *layer.operands[3:])
        if choice.calibrated and (not last or last[0][0] != key):
            last[:] = [(key, gather(layer, now, then))]
        statistics = last[0][1] if choice.calibrated else None
        mask = mask_of(matrix, graph.weights)
        found = solve(w, choice, statistics, matrix.dtype, mask, curvatures.get(matrix))
        if kept is not None:
            kept.put(str(graph.nodes.index(matrix)), found.arrays())
        return found

    def visit(layer: Node, now: Run, then: Run) -> dict[int, np.ndarray]:
        replaced = {}
        for position in MATRICES[layer.op]:
            matrix = layer.operands[position]
            if matrix is None or matrix not in choices:
                continue
            if matrix not in solved:
                solved[matrix] = stored(matrix) or compute(matrix, layer, now, then)
            replaced[position] = solved[matrix].values
        return replaced

    return visit


def with_solved(graph: Graph, layers: Mapping[Node, Layer], solved: Mapping[Node, Solved]) -> Graph:
    """The graph with compressed matrices in place of those that they were made of."""
    weights = dict(graph.weights)
    made = {node: found.nodes(node, layers[node].names[0], weights) for node, found in solved.items()}
    new = graph.map(lambda old, rebuilt: made.get(old, rebuilt))
    return attrs.evolve(new, weights=weights).replace()
