"""What layers read on calibration text, in the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import numpy as np

from jisu.compiler.graph import Graph, Node
from jisu.passes.compression.calibrate import Values, stream


def observe(
    graph: Graph, tokens: np.ndarray, layers: Iterable[Node], look: Callable[[Node, Values], None],
    progress: Callable[[float], None] = lambda done: None,
) -> None:  # fmt: skip
    """Run tokens int64 [windows, length] through a language model's graph; look(x, values) once for each x that a layer reads."""
    seen: set[Node] = set()

    def visit(layer: Node, now: Mapping[Node, Values], then: Mapping[Node, Values]) -> dict[int, np.ndarray]:
        x = layer.operands[0]
        assert x is not None
        if x not in seen:
            seen.add(x)
            look(x, now[x])
        return {}

    stream(graph, tokens, set(layers), visit, progress=progress)
