"""What compressing one matrix costs the model: measured in its outputs, the other matrices being as they are in the graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jisu.compiler.graph import Graph, Node
from jisu.passes.compression.calibrate import Run, Samples, calls_of, stream
from jisu.passes.compression.layers import MATRICES, Layer, mask_of, matrix_of
from jisu.passes.compression.matrix import Choice, Statistics, gather, solve
from jisu.passes.compression.unfinished import Unfinished

MOST_BYTES = 512 << 20
"""How much of the unchanged model's outputs is kept to compare with."""


class Yardstick:
    """How far outputs are from those of the unchanged model.

    Of a language model the Kullback-Leibler divergence of the next token in nats, the mean over tokens; of others the squared error of
    all outputs relative to their squares. Compares the first calls of `samples`, up to `windows` of tokens and `MOST_BYTES`.
    """

    def __init__(self, graph: Graph, samples: Samples, windows: int = 8) -> None:
        self.language = isinstance(samples, np.ndarray)
        calls = calls_of(graph, samples[:windows] if self.language else samples)
        self.wanted: list[list[np.ndarray]] = []

        def keep(_: int, outputs: Sequence[np.ndarray]) -> int:
            self.wanted.append([_log_softmax(o) if self.language else np.asarray(o) for o in outputs])
            return sum(o.nbytes for o in self.wanted[-1])

        run = Run(graph, calls)
        (size,) = run.outputs(None, {}, keep, 1)
        count = min(len(calls), MOST_BYTES // max(size, 1))
        if count > 1:
            self.wanted.clear()
            run.outputs(None, {}, keep, count)

    @property
    def calls(self) -> int:
        """How many calls are compared."""
        return len(self.wanted)

    def distance(self, call: int, outputs: Sequence[np.ndarray]) -> tuple[float, float]:
        """(error, what it is relative to): sum both over calls, and divide."""
        error, size = 0.0, 0.0
        for want, got in zip(self.wanted[call], outputs, strict=True):
            if self.language:
                error += float((np.exp(want) * (want - _log_softmax(got))).sum(dtype=np.float64))
                size += want[..., 0].size
            elif want.dtype.kind not in "biu":
                error += float(np.square(got - want, dtype=np.float64).sum())
                size += float(np.square(want, dtype=np.float64).sum())
        return error, size

    @property
    def unit(self) -> str:
        """What distances are, in words."""
        return "KL divergence, nats per token" if self.language else "relative squared error"

    def of(self, run: Run, layer: Node | None, replaced: Mapping[int, np.ndarray]) -> float:
        """The distance of a run from the unchanged model if `layer` computed with other matrices (None: of its graph as it is)."""
        pairs = run.outputs(layer, replaced, self.distance, self.calls)
        return sum(e for e, _ in pairs) / max(sum(s for _, s in pairs), 1e-30)


def _log_softmax(x: np.ndarray) -> np.ndarray:
    x = np.asarray(x, np.float32)
    x = x - x.max(-1, keepdims=True)
    return np.asarray(x - np.log(np.exp(x).sum(-1, keepdims=True)))


def sensitivities(
    graph: Graph, layers: Mapping[Node, Layer], options: Mapping[Node, Sequence[Choice]], samples: Samples,
    progress: Callable[[float], None] = lambda done: None, kept: Unfinished | None = None,
    curvatures: Mapping[Node, np.ndarray] | None = None,
) -> dict[Node, np.ndarray]:  # fmt: skip
    """Per matrix, float64 [options]: the model's distance from itself (see `Yardstick`) with that matrix alone compressed so.

    curvatures: how errors in a matrix' outputs count. kept: holds what an interrupted run measured.
    """
    yardstick = Yardstick(graph, samples)
    found: dict[Node, np.ndarray] = {}
    last: list[tuple[Node, Statistics]] = []

    def visit(layer: Node, now: Run, then: Run) -> dict[int, np.ndarray]:
        x = layer.operands[0]
        assert x is not None
        for position in MATRICES[layer.op]:
            matrix = layer.operands[position]
            if matrix is None or matrix not in options or matrix in found:
                continue
            name = f"{graph.nodes.index(matrix)} {options[matrix]}"
            arrays = None if kept is None else kept.get(name)
            if arrays is not None:
                found[matrix] = arrays["losses"]
                continue
            if not last or last[0][0] is not x:
                last[:] = [(x, gather(layer, now, then))]
            w = matrix_of(matrix, layers[matrix].names[0], graph.weights)
            mask, counts = mask_of(matrix, graph.weights), (curvatures or {}).get(matrix)
            losses = []
            for choice in options[matrix]:
                values = solve(w, choice, last[0][1], matrix.dtype, mask, counts).values
                losses.append(yardstick.of(now, layer, {position: values}))
            found[matrix] = np.array(losses)
            if kept is not None:
                kept.put(name, {"losses": found[matrix]})
        return {}

    stream(graph, samples, {u for node in options for u in layers[node].users}, visit, whole=True, progress=progress)
    return found
