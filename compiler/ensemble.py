"""Several models answer as one: a graph made of the members' graphs over shared inputs, with a weighted mean at its end.

The result is a graph like any other. Its cache is derived from all members' attention, its weights are the members' under
prefixed names, and how each member was compressed stands in its own part.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import sympy

from jisu.compiler import ops
from jisu.compiler.errors import InputError
from jisu.compiler.graph import INPUT, WEIGHT, Graph, Node, Storage, placeholder, weight
from jisu.compiler.types import TensorType, is_float, same_type, symbol

AVERAGES = ("log", "probability")
"""Of what the mean is taken; see `join`."""


def prefix(member: int) -> str:
    """In front of the names of a member's weights."""
    return f"members.{member}."


def join(graphs: Sequence[Graph], weights: Sequence[float], average: str, names: Sequence[str]) -> Graph:
    """The graph whose outputs are the weighted means of the members' outputs (logits along the last axis).

    weights: one per member, with the sum 1. average: "log" is the mean of the logits, which is that of log-probabilities but for a
    constant per token: the product of experts ∏ p_i^w_i, normalised. "probability" is the mixture ∑ w_i p_i, as log-probabilities.
    Means are taken in float32 (of float64 outputs in float64), which is the outputs' dtype. Inputs are those of all members, by name.

    Raises InputError, naming the members, where inputs or outputs don't fit together.
    """
    if average not in AVERAGES:
        raise InputError(f"average is one of {', '.join(AVERAGES)}, not {average!r}")
    if not all(weights):
        raise InputError("a member of weight 0 would be computed for nothing; leave it out of the ensemble")
    inputs: dict[str, Node] = {}
    ranges: dict[str, tuple[int, int | None]] = {}
    stored: dict[str, Storage] = {}
    outputs: list[tuple[Node, ...]] = []
    for i, graph in enumerate(graphs):
        symbols = _matched(graph, inputs, (names[0], names[i]))
        for name, bounds in graph.ranges.items():
            shared = str(symbols.get(symbol(name), name))
            ranges[shared] = _both(ranges.get(shared, (0, None)), bounds, shared, names[i])
        found = _rebuilt(graph, inputs, symbols, prefix(i))
        outputs.append(tuple(found[o] for o in graph.outputs))
        stored |= {prefix(i) + name: storage for name, storage in graph.weights.items()}
    for name, own in zip(names, outputs, strict=True):
        shown, wanted = ([str(o.type.with_dtype("float32")) for o in group] for group in (own, outputs[0]))
        if shown != wanted or not all(is_float(o.dtype) for o in own):
            raise InputError(
                f"an ensemble averages float outputs of the same shapes: {names[0]} gives {', '.join(str(o.type) for o in outputs[0])}, "
                f"{name} gives {', '.join(str(o.type) for o in own)}"
            )
    means = [_mean(group, weights, average) for group in zip(*outputs, strict=True)]
    return Graph(tuple(inputs.values()), tuple(means), stored, ranges)


def _matched(graph: Graph, inputs: dict[str, Node], names: tuple[str, str]) -> dict[Any, Any]:
    """A member's symbols -> those of the inputs that are there already; inputs that aren't there yet are added."""
    symbols: dict[Any, Any] = {}
    for node in graph.inputs:
        if node.name in inputs:
            for mine, shared in zip(node.shape, inputs[node.name].shape, strict=False):
                if isinstance(mine, sympy.Symbol):
                    symbols.setdefault(mine, shared)
    for node in graph.inputs:
        own = TensorType(tuple(_with(d, symbols) for d in node.shape), node.dtype)
        shared_node = inputs.setdefault(node.name, placeholder(node.name, own, node.source))
        if not same_type(shared_node.type, own):
            raise InputError(
                f"{names[0]} takes {node.name} as {shared_node.type}, {names[1]} as {own}; members of an ensemble share their inputs"
            )
    return symbols


def _both(a: tuple[int, int | None], b: tuple[int, int | None], name: str, member: str) -> tuple[int, int | None]:
    """The range that both allow."""
    highs = [high for high in (a[1], b[1]) if high is not None]
    low, high = max(a[0], b[0]), min(highs, default=None)
    if high is not None and low > high:
        raise InputError(f"no size of {name} fits {member} and the members before it")
    return low, high


def _with(value: Any, symbols: Mapping[Any, Any]) -> Any:
    """`value` (a dimension, or tuples of them and of other things) with other symbols."""
    if isinstance(value, tuple):
        return tuple(_with(v, symbols) for v in value)
    return value.xreplace(symbols) if isinstance(value, sympy.Expr) else value


def _rebuilt(graph: Graph, inputs: Mapping[str, Node], symbols: Mapping[Any, Any], name: str) -> dict[Node, Node]:
    """A member's nodes, over the shared inputs and under prefixed names."""
    done: dict[Node, Node] = {}
    for node in graph.nodes:
        source = name + node.source if node.source else ""
        if node.op is INPUT:
            done[node] = inputs[node.name]
        elif node.op is WEIGHT:
            done[node] = weight(name + node.name, node.tensor, source)
        elif node.op.leaf:
            done[node] = node
        else:
            operands = [done[o] if o is not None else None for o in node.operands]
            attributes = {k: _with(v, symbols) for k, v in node.attributes.items()}
            done[node] = node.op.make(operands, attributes, source)
    return done


def _mean(values: Sequence[Node], weights: Sequence[float], average: str) -> Node:
    dtype = "float64" if any(v.dtype == "float64" for v in values) else "float32"
    wide = [value if value.dtype == dtype else ops.cast(value, dtype=dtype) for value in values]
    if average == "log":
        return _sum([ops.mul(value, share) for value, share in zip(wide, weights, strict=True)])
    # log ∑ w_i p_i without leaving the logarithms, in which no probability is too small.
    parts = [ops.add(_log_softmax(value), math.log(share)) for value, share in zip(wide, weights, strict=True)]
    top = functools.reduce(ops.maximum, parts)
    return ops.add(ops.log(_sum([ops.exp(ops.sub(part, top)) for part in parts])), top)


def _log_softmax(x: Node) -> Node:
    shifted = ops.sub(x, ops.reduce_max(x, axes=(x.rank - 1,), keepdims=True))
    return ops.sub(shifted, ops.log(ops.sum_(ops.exp(shifted), axes=(x.rank - 1,), keepdims=True)))


def _sum(terms: Sequence[Node]) -> Node:
    return functools.reduce(ops.add, terms)
