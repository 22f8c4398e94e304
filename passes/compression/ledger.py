"""The ledger: what each lossy pass and each compressed matrix costs, in its layer's output and in the model's."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import attrs
import numpy as np

from jisu.compiler import ops
from jisu.compiler.graph import WEIGHT, Graph, Node
from jisu.passes.compression.calibrate import Run, Samples, calls_of, stream
from jisu.passes.compression.layers import MATRICES, find_layers
from jisu.passes.compression.sensitivity import Yardstick
from jisu.passes.layout import Derived, kept_share


@attrs.frozen(kw_only=True)
class Entry:
    """A compressed matrix.

    form: how it is stored. bytes: its size so, int8_bytes and dense_bytes in int8 with a scale per row, and as it was. output_error: of the
    layer's output, the squared error relative to its square, given the same input. loss: what the model would regain if this
    matrix alone were as it was (leave-one-out), in the ledger's unit; share: of the whole loss. Errors of several matrices may undo
    each other, so shares needn't sum to 1, and may be negative.
    """

    layer: str
    form: str
    bytes: int
    int8_bytes: int
    dense_bytes: int
    output_error: float
    loss: float
    share: float


@attrs.frozen(kw_only=True)
class Ledger:
    """What compression costs a model. unit: of all losses; passes: name of each lossy pass and the loss behind it."""

    unit: str
    loss: float
    passes: tuple[tuple[str, float], ...]
    layers: tuple[Entry, ...]

    def as_dict(self) -> dict[str, Any]:
        """Plain values, layers by falling loss."""
        found = attrs.asdict(self)
        found["layers"] = sorted(found["layers"], key=lambda e: -e["loss"])
        found["passes"] = [{"name": name, "loss": loss} for name, loss in self.passes]
        return found


def keep_ledger(
    dense: Graph, steps: Sequence[tuple[str, Graph, Graph]], samples: Samples, progress: Callable[[float], None] = lambda done: None
) -> Ledger:  # fmt: skip
    """The ledger of lossy passes. dense: the model as it was. steps: of each pass its name, the graph before and behind it."""
    yardstick = Yardstick(dense, samples)
    last = steps[-1][2]
    passes = tuple((name, _loss(after, yardstick, samples)) for name, _, after in steps)
    total = passes[-1][1]
    found: dict[Node, Entry] = {}
    matrices: dict[Node, tuple[Node, Graph]] = {}
    for _, before, after in steps:
        if after is last:
            matrices |= {new: (old, before) for old, new in _changed(before, after)}
    names = {node: layer.names[0] for _, (node, graph) in matrices.items() for layer in [find_layers(graph)[node]]}

    def visit(layer: Node, now: Run, then: Run) -> dict[int, np.ndarray]:
        for position in MATRICES[layer.op]:
            matrix = layer.operands[position]
            if matrix is None or matrix not in matrices or matrix in found:
                continue
            old, before = matrices[matrix]
            w, q = Derived(old, before.weights).wide(), Derived(matrix, last.weights).wide()
            x = layer.operands[0]
            assert x is not None
            error = size = 0.0
            for value in now[x]:
                flat = value.reshape(-1, w.shape[1])
                error += float(np.square(flat @ (w - q).T, dtype=np.float64).sum())
                size += float(np.square(flat @ w.T, dtype=np.float64).sum())
            regained = total - yardstick.of(now, layer, {position: w})
            n, k = w.shape
            found[matrix] = Entry(
                layer=names[old],
                form=form_of(matrix),
                bytes=sum(p.tensor.nbytes for p in Graph((), (matrix,)).nodes if p.op is WEIGHT),
                int8_bytes=n * k + 2 * n,
                dense_bytes=int(old.tensor.nbytes),
                output_error=error / max(size, 1e-30),
                loss=regained,
                share=regained / total if total > 0 else 0.0,
            )
        return {}

    users = {u for u in last.nodes if u.op in MATRICES and any(p in matrices for p in u.parents)}
    if users:
        stream(last, samples, users, visit, whole=True, progress=progress)
    return Ledger(unit=yardstick.unit, loss=total, passes=passes, layers=tuple(found.values()))


def _loss(graph: Graph, yardstick: Yardstick, samples: Samples) -> float:
    return yardstick.of(Run(graph, calls_of(graph, samples)), None, {})


def _changed(before: Graph, after: Graph) -> Iterable[tuple[Node, Node]]:
    """Matrices of `before` and what a pass put in their places, where it did."""
    layers = [[n for n in graph.nodes if n.op in MATRICES] for graph in (before, after)]
    for old, new in zip(*layers, strict=True):
        for position in MATRICES[old.op]:
            a, b = old.operands[position], new.operands[position]
            if a is not None and b is not None and b.op in (ops.dequantize, ops.expand) and a.op is not b.op:
                yield a, b


def form_of(matrix: Node) -> str:
    """How a compressed matrix is stored, in words."""
    zeros = f"{1 - kept_share(matrix):.0%} zeros" if matrix.operands[-1] is not None else ""
    if matrix.op is ops.expand:
        return zeros
    codes = f"{matrix.scheme} g{matrix.group}" if matrix.group else f"{matrix.scheme} per row"
    return f"{zeros}, {codes}" if zeros else codes
