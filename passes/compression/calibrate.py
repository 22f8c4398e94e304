"""Calibration: inputs streamed through a graph, node by node, so that each layer is seen with the inputs that it will have.

Every value is a list of arrays, one per call of the model, kept only as long as something needs it. A layer that was compressed
gives its compressed outputs to all that come behind it ("true sequential").
"""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

from jisu.compiler import ops
from jisu.compiler.graph import CONSTANT, INPUT, WEIGHT, Graph, Node
from jisu.compiler.interpret import bind_symbols, evaluate_node, widen
from jisu.compiler.types import TupleType, numpy_dtype

T = TypeVar("T")

Values = Sequence[np.ndarray]
"""A value, one array per call."""

Samples = np.ndarray | Sequence[Sequence[np.ndarray]]
"""Calibration data: token ids int64 [windows, length] of a language model, or for each call of another one its inputs."""

Visit = Callable[[Node, "Run", "Run"], Mapping[int, np.ndarray]]
"""visit(layer, the run, the run of the unchanged model): matrices that take the place of operands of the layer, by position."""

_ROUNDINGS = (ops.fake_quantize, ops.encode_rows, ops.decode_rows)
"""Ops that are not there in the unchanged model: their operand takes their place."""


def calls_of(graph: Graph, samples: Samples, batch: int = 8) -> list[tuple[np.ndarray, ...]]:
    """The graph's inputs, call by call: `batch` windows of tokens, with positions that count them where the graph asks for these."""
    if not isinstance(samples, np.ndarray):
        return [tuple(call) for call in samples]
    found = []
    for begin in range(0, len(samples), batch):
        ids = np.ascontiguousarray(samples[begin : begin + batch])
        counted = np.broadcast_to(np.arange(ids.shape[1]), ids.shape)
        found.append(
            tuple(
                ids if node is graph.inputs[0] else np.ascontiguousarray(counted, numpy_dtype(node.dtype))
                for node in graph.inputs
            )
        )
    return found


def stream(
    graph: Graph, samples: Samples, layers: set[Node], visit: Visit, *, unchanged: bool = False, whole: bool = False, batch: int = 8,
    progress: Callable[[float], None] = lambda done: None,
) -> None:  # fmt: skip
    """Run samples through a graph in float32, stopping at `layers`.

    layers: nodes to visit; what comes behind the last of them is not computed. unchanged: also run the model as it was (twice the time
    and memory); without, the same run is given twice. whole: keep what the graph's outputs need, for `Run.outputs`. batch: windows of
    tokens at a time.
    """
    needed = up_to(graph, {*layers, *graph.outputs} if whole else layers)
    calls = calls_of(graph, samples, batch)
    now = Run(graph, calls)
    then = Run(graph, calls, now.room) if unchanged else now
    left = {node: sum(user in needed for user in graph.users[node]) for node in needed}
    last = max(i for i, node in enumerate(needed) if node in layers)
    for i, node in enumerate(list(needed)[: last + 1]):
        if node not in layers:
            now.compute(node)
        if unchanged and left[node]:
            _follow(node, now, then)
        if node in layers:
            replaced = visit(node, now, then)
            if left[node] and (replaced or node not in now.values):
                now.compute(node, replaced)
        for parent in (*node.parents, node):
            left[parent] -= parent is not node
            if not left[parent]:
                now.values.pop(parent, None)
                then.values.pop(parent, None)
        progress((i + 1) / (last + 1))


def up_to(graph: Graph, layers: set[Node]) -> dict[Node, None]:
    """The nodes that lead to some of `layers`, in the graph's order."""
    wanted = set(layers)
    for node in reversed(graph.nodes):
        if node in wanted:
            wanted.update(node.parents)
    return {node: None for node in graph.nodes if node in wanted}


def _follow(node: Node, now: Run, then: Run) -> None:
    """The node's value in the unchanged model, which is that of the run as long as nothing in front of it was changed."""
    if node.op in _ROUNDINGS:
        x = node.operands[0]
        assert x is not None
        then.values[node] = then.values[x]
    elif all(now.values[p] is then.values[p] for p in node.parents):
        then.values[node] = now[node]
    else:
        then.compute(node)


class Room:
    """How many bytes of values may stay in memory; what goes beyond lies in files."""

    def __init__(self, size: int = 256 << 20) -> None:
        self.left = size

    def keep(self, arrays: Iterable[Any], count: int) -> Values:
        """A value of `count` arrays; given back when it is no longer used."""
        found: list[Any] | _Spooled | None = None
        for array in arrays:
            if found is None:
                size = array.nbytes * count if isinstance(array, np.ndarray) else 0
                found = _Held() if size <= self.left else _Spooled()
                if isinstance(found, _Held):
                    self.left -= size
                    weakref.finalize(found, self._give_back, size)
            found.append(array)
        return found if found is not None else []

    def _give_back(self, size: int) -> None:
        self.left += size


class _Held(list[Any]):
    """A list that tells when it goes."""


class _Spooled(Sequence[np.ndarray]):
    """Arrays in a file without a name, each read when it is asked for."""

    def __init__(self) -> None:
        self.file = tempfile.TemporaryFile()
        self.places: list[tuple[int, tuple[int, ...], np.dtype]] = []

    def append(self, array: np.ndarray) -> None:
        self.places.append((self.file.seek(0, 2), array.shape, array.dtype))
        self.file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, i: Any) -> Any:
        begin, shape, dtype = self.places[i]
        self.file.seek(begin)
        return np.fromfile(self.file, dtype, math.prod(shape)).reshape(shape)


class Run:
    """The values that a graph has on several calls, as far as they are needed still; beyond `room`, in files."""

    def __init__(self, graph: Graph, calls: Sequence[Sequence[np.ndarray]], room: Room | None = None) -> None:
        self.graph, self.calls, self.room = graph, calls, room or Room()
        self.values: dict[Node, Values] = {}
        self.fixed: dict[Node, Any] = {}  # those of `constant` nodes that `outputs` needed
        self.constant: set[Node] = set()
        for node in graph.nodes:
            made = bool(node.parents) and self.constant.issuperset(node.parents) and not _symbolic(node)
            if made or node.op in (WEIGHT, CONSTANT):
                self.constant.add(node)
        self.env = [bind_symbols(graph, [x.shape for x in call]) for call in calls]

    def __getitem__(self, node: Node) -> Values:
        """The node's value; of one whose operands are there still, computed now."""
        if node not in self.values:
            self.compute(node)
        return self.values[node]

    def compute(self, node: Node, replaced: Mapping[int, np.ndarray] | None = None) -> None:
        """The node's value for every call."""
        if node in self.constant:
            self.values[node] = [self._value(node, 0, {}, replaced)] * len(self.calls)
        else:
            made = (self._value(node, i, {}, replaced) for i in range(len(self.calls)))
            self.values[node] = self.room.keep(made, len(self.calls))

    def outputs(
        self,
        node: Node | None,
        replaced: Mapping[int, np.ndarray],
        look: Callable[[int, Sequence[np.ndarray]], T],
        calls: int,
    ) -> list[T]:
        """What `look(call, the graph's outputs)` makes of the first `calls` calls if `node` computed with other matrices; the run stays
        as it is. None: of the graph as it is.

        Only `node` and what depends on it is computed anew, one call at a time.
        """
        nodes = self.graph.nodes
        behind = nodes if node is None else nodes[nodes.index(node) :]
        wanted = set(self.graph.outputs)
        for later in reversed(behind):
            if later in wanted and (later is node or later not in self.values):
                wanted.update(later.parents)
        found = []
        for i in range(min(calls, len(self.calls))):
            made: dict[Node, Any] = {} if node is None else {node: self._value(node, i, {}, replaced)}
            for later in behind:
                if later in wanted and later not in made and later not in self.values:
                    made[later] = self._kept(later, i) if later in self.constant else self._value(later, i, made)
            found.append(look(i, [made[o] if o in made else self.values[o][i] for o in self.graph.outputs]))
        return found

    def _kept(self, node: Node, call: int) -> Any:
        if node not in self.fixed:
            self.fixed[node] = self._value(node, call, self.fixed)
        return self.fixed[node]

    def _value(
        self, node: Node, call: int, made: Mapping[Node, Any], replaced: Mapping[int, np.ndarray] | None = None
    ) -> Any:
        """The node's value for one call, of operands in `made` or in the run."""
        if node.op is INPUT:
            return self.calls[call][self.graph.inputs.index(node)]
        if node.op is CONSTANT:
            return widen(node.value.array, "float32")
        if node.op is WEIGHT:
            return widen(self.graph.weights[node.name].numpy(), "float32")
        operands = [None if o is None else made[o] if o in made else self.values[o][call] for o in node.operands]
        for position, matrix in (replaced or {}).items():
            operands[position] = matrix
        found = evaluate_node(node, operands, self.env[call], "float32")
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


def observe(
    graph: Graph, samples: Samples, layers: Iterable[Node], look: Callable[[Node, Values], None],
    progress: Callable[[float], None] = lambda done: None,
) -> None:  # fmt: skip
    """look(x, values) once for each x that some of the layers read, in the model as it is."""
    seen: set[Node] = set()

    def visit(layer: Node, now: Run, then: Run) -> dict[int, np.ndarray]:
        x = layer.operands[0]
        assert x is not None
        if x not in seen:
            seen.add(x)
            look(x, now[x])
        return {}

    stream(graph, samples, set(layers), visit, progress=progress)
