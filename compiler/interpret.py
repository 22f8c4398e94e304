"""The reference interpreter: a graph's meaning in NumPy, node by node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, overload

import numpy as np
import sympy

from jisu.compiler.errors import InputError
from jisu.compiler.graph import CONSTANT, INPUT, WEIGHT, Graph, Node
from jisu.compiler.types import Dim, TensorType, numpy_dtype, substitute, symbol


def bind_symbols(graph: Graph, shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """The value of every symbol, solved from the inputs' concrete shapes.

    Raises InputError naming the input, what was expected and what came, also for values outside the declared ranges.
    """
    env = bind_types([(node.name, node.tensor) for node in graph.inputs], shapes)
    for name, value in env.items():
        low, high = graph.ranges.get(name, (1, None))
        if value < low or (high is not None and value > high):
            shown = f"[{low}, {high}]" if high is not None else f"at least {low}"
            raise InputError(f"dimension {name!r} must be in {shown}, got {value}")
    return env


def bind_types(inputs: Sequence[tuple[str, TensorType]], shapes: Sequence[Sequence[int]]) -> dict[str, int]:
    """The value of every symbol in the types of named inputs that have these shapes; raises InputError as `bind_symbols` does."""
    env: dict[str, int] = {}
    if len(shapes) != len(inputs):
        raise InputError(f"expected {len(inputs)} inputs, got {len(shapes)}")
    pending: list[tuple[str, TensorType, Dim, int]] = []
    for (name, kind), shape in zip(inputs, shapes, strict=True):
        if len(shape) != kind.rank:
            raise InputError(f"input {name!r}: expected rank {kind.rank}, {kind}, got shape {tuple(shape)}")
        for want, have in zip(kind.shape, shape, strict=True):
            if not isinstance(want, int) and want.is_Symbol and want.name not in env:
                env[want.name] = int(have)
            pending.append((name, kind, want, int(have)))
    for name, kind, want, have in pending:
        _solve(name, kind, want, have, env)
        value = substitute(want, env)
        if value != have:
            raise InputError(f"input {name!r}: expected {kind}, got a dimension of {have} where {want} = {value}")
    return env


def _solve(name: str, kind: TensorType, want: Dim, have: int, env: dict[str, int]) -> None:
    """Bind the one symbol of `want` that stands nowhere by itself; raises InputError where there are several."""
    unknown = [] if isinstance(want, int) else sorted(s.name for s in want.free_symbols if s.name not in env)
    if not unknown:
        return
    solutions = (
        sympy.solve(want.subs({symbol(k): v for k, v in env.items()}) - have, symbol(unknown[0]))  # type: ignore[union-attr]
        if len(unknown) == 1
        else []
    )
    whole = [int(s) for s in solutions if s.is_Integer and s > 0]
    if len(whole) != 1:
        raise InputError(f"input {name!r}: expected {kind}, got a dimension of {have}, which doesn't settle {want}")
    env[unknown[0]] = whole[0]


def widen(array: np.ndarray, floats: str = "float64") -> np.ndarray:
    """Floating-point numbers of at most the width of `floats` in that dtype; others as they are."""
    narrow = array.dtype.name == "bfloat16" or (
        array.dtype.kind == "f" and array.dtype.itemsize <= int(floats[-2:]) // 8
    )
    return array.astype(floats, copy=False) if narrow else array


def evaluate_node(node: Node, operands: Sequence[Any], env: Mapping[str, int], floats: str = "") -> Any:
    """The value of one node on concrete operands; `floats`: the dtype in which all narrower floats are computed instead."""
    assert node.op.meaning is not None, node.op.name
    attributes = {k: substitute(v, env) for k, v in node.attributes.items()}
    narrow = {"float32": ("float16", "bfloat16"), "float64": ("float16", "bfloat16", "float32")}.get(floats, ())
    if attributes.get("dtype") in narrow:
        attributes["dtype"] = floats
    with np.errstate(all="ignore"):
        return node.op.meaning(*operands, **attributes)


@overload
def interpret(
    graph: Graph, inputs: Sequence[np.ndarray], *, float64: bool = False, keep: Literal[False] = False
) -> tuple[np.ndarray, ...]: ...
@overload
def interpret(
    graph: Graph, inputs: Sequence[np.ndarray], *, float64: bool = False, keep: Literal[True]
) -> dict[Node, Any]: ...
def interpret(
    graph: Graph, inputs: Sequence[np.ndarray], *, float64: bool = False, keep: bool = False
) -> tuple[np.ndarray, ...] | dict[Node, Any]:
    """The outputs of `graph` on `inputs` (arrays in the graph's order).

    `float64` computes every floating-point value in float64, as a yardstick for rounding. `keep` returns the value of
    every node instead. Raises InputError where inputs don't fit.
    """
    arrays = [np.asarray(a) for a in inputs]
    env = bind_symbols(graph, [a.shape for a in arrays])
    values: dict[Node, Any] = {}
    for node, array in zip(graph.inputs, arrays, strict=True):
        if array.dtype != numpy_dtype(node.dtype):
            raise InputError(f"input {node.name!r}: expected {node.dtype}, got {array.dtype}")
        values[node] = widen(array) if float64 else array
    left = {node: len(users) for node, users in graph.users.items()}
    wanted = set(graph.outputs)
    for node in graph.nodes:
        if node.op is INPUT:
            continue
        if node.op is CONSTANT:
            values[node] = widen(node.value.array) if float64 else node.value.array
        elif node.op is WEIGHT:
            array = graph.weights[node.name].numpy()
            values[node] = widen(array) if float64 else array
        else:
            operands = [values[o] if o is not None else None for o in node.operands]
            values[node] = _settled(node, evaluate_node(node, operands, env, "float64" if float64 else ""), float64)
        for parent in node.parents:
            left[parent] -= 1
            if not left[parent] and not keep and parent not in wanted:
                del values[parent]
    return values if keep else tuple(values[o] for o in graph.outputs)


def _settled(node: Node, value: Any, float64: bool) -> Any:
    """`value` in the dtype that the type promises (NumPy widens some results)."""
    if not isinstance(node.type, TensorType):
        return tuple(np.asarray(v) for v in value)
    value = np.asarray(value)
    want = numpy_dtype(node.dtype)
    if float64 and (want.kind == "f" or want.name == "bfloat16"):
        want = np.dtype(np.float64)
    return value if value.dtype == want else value.astype(want)
