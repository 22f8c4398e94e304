"""Calibration: tokens streamed through a graph, node by node, so that each layer is seen with the inputs that it will have.

Every value is a list of arrays, one per batch of windows, kept only as long as something needs it. A layer that was compressed
gives its compressed outputs to all that come behind it ("true sequential").
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from jisu.compiler import ops
from jisu.compiler.graph import CONSTANT, INPUT, WEIGHT, Graph, Node
from jisu.compiler.interpret import evaluate_node, widen
from jisu.compiler.types import TupleType, numpy_dtype

Values = Sequence[np.ndarray]
"""A value, one array per batch of windows."""

Visit = Callable[[Node, Mapping[Node, Values], Mapping[Node, Values]], Mapping[int, np.ndarray]]
"""visit(layer, its operands' values, those in the unchanged model): matrices that take the place of operands of the layer, by position."""

_ROUNDINGS = (ops.fake_quantize, ops.encode_rows, ops.decode_rows)
"""Ops that are not there in the unchanged model: their operand takes their place."""


def stream(
    graph: Graph, tokens: np.ndarray, layers: set[Node], visit: Visit, *, unchanged: bool = False, batch: int = 8,
    progress: Callable[[float], None] = lambda done: None,
) -> None:  # fmt: skip
    """Run a language model's graph over tokens int64 [windows, length] in float32, stopping at `layers`.

    graph: takes token ids and perhaps positions, [batch, sequence]. layers: nodes to visit. unchanged: also
    run the model as it was (twice the time and memory); without, the same inputs are given twice. batch: windows at a time.
    """
    parts = [np.ascontiguousarray(tokens[i : i + batch]) for i in range(0, len(tokens), batch)]
    left = {node: len(users) for node, users in graph.users.items()}
    for output in graph.outputs:
        left[output] += 1
    now, then = _Run(graph, parts), _Run(graph, parts)
    for i, node in enumerate(graph.nodes):
        now.compute(node)
        if not unchanged or node.op not in _ROUNDINGS and all(now.values[p] is then.values[p] for p in node.parents):
            then.values[node] = now.values[node]
        elif node.op in _ROUNDINGS:
            x = node.operands[0]
            assert x is not None
            then.values[node] = then.values[x]
        else:
            then.compute(node)
        if node in layers:
            replaced = visit(node, now.values, then.values)
            if replaced:
                now.compute(node, replaced)
                if not unchanged:
                    then.values[node] = now.values[node]
        for parent in node.parents:
            left[parent] -= 1
            if not left[parent]:
                del now.values[parent], then.values[parent]
        progress((i + 1) / len(graph.nodes))


class _Run:
    """The values of one run over all batches."""

    def __init__(self, graph: Graph, parts: Sequence[np.ndarray]) -> None:
        self.graph, self.parts = graph, parts
        self.values: dict[Node, list[Any]] = {}
        self.fixed: set[Node] = set()  # what no input reaches, computed once
        batch, sequence = graph.inputs[0].shape
        self.env = [{str(batch): p.shape[0], str(sequence): p.shape[1]} for p in parts]

    def compute(self, node: Node, replaced: Mapping[int, np.ndarray] | None = None) -> None:
        """The node's value for every batch."""
        if node.op is INPUT:
            self.values[node] = [self.input(node, ids) for ids in self.parts]
        elif node.op in (WEIGHT, CONSTANT):
            array = node.value.array if node.op is CONSTANT else self.graph.weights[node.name].numpy()
            self.fixed.add(node)
            self.values[node] = [widen(array, "float32")] * len(self.parts)
        elif node.parents and all(p in self.fixed for p in node.parents) and not _symbolic(node):
            self.fixed.add(node)
            self.values[node] = [self.value(node, 0, replaced)] * len(self.parts)
        else:
            self.values[node] = [self.value(node, i, replaced) for i in range(len(self.parts))]

    def input(self, node: Node, ids: np.ndarray) -> np.ndarray:
        """Token ids, or positions that count them."""
        if node is self.graph.inputs[0]:
            return ids
        return np.ascontiguousarray(np.broadcast_to(np.arange(ids.shape[1]), ids.shape), numpy_dtype(node.dtype))

    def value(self, node: Node, part: int, replaced: Mapping[int, np.ndarray] | None) -> Any:
        """The node's value for one batch."""
        operands = [None if o is None else self.values[o][part] for o in node.operands]
        for position, matrix in (replaced or {}).items():
            operands[position] = matrix
        found = evaluate_node(node, operands, self.env[part], "float32")
        if isinstance(node.type, TupleType):
            return tuple(widen(np.asarray(v), "float32") for v in found)
        want = numpy_dtype(node.dtype)
        array = np.asarray(found)
        return widen(array, "float32") if want.kind not in "biu" else array.astype(want, copy=False)


def _symbolic(node: Node) -> bool:
    types = node.type.items if isinstance(node.type, TupleType) else (node.type,)
    return any(t.symbols for t in types) or any(
        hasattr(v, "free_symbols") or isinstance(v, tuple) and any(hasattr(d, "free_symbols") for d in v)
        for v in node.attributes.values()
    )
