"""The verifier: each complaint names the node, its op and the reason."""

from __future__ import annotations

from collections.abc import Iterator

from jisu.compiler.errors import VerifyError
from jisu.compiler.graph import CONSTANT, INPUT, WEIGHT, Graph, Node
from jisu.compiler.types import TensorType, TupleType, TypeRuleError, dtype_name, same_type


def complaints(graph: Graph) -> Iterator[str]:
    """Every broken rule of the IR, as a sentence."""
    cycle = _cycle(graph)
    if cycle is not None:
        yield f"{cycle.op.name} takes part in a cycle: {cycle!r} reaches itself through its operands"
        return
    names: set[str] = set()
    weight_types: dict[str, TensorType] = {}
    for i, node in enumerate(graph.nodes):
        where = f"%{i} = {node.op.name}"
        if node.type is None:
            yield f"{where}: has no type (a pattern got into the graph)"
        elif node.op is INPUT:
            if node.name in names:
                yield f"{where}: a second input is called {node.name!r}"
            names.add(node.name)
            if node not in graph.inputs:
                yield f"{where}: {node.name!r} is not among the graph's inputs"
        elif node.op is WEIGHT:
            yield from _check_weight(graph, node, where, weight_types)
        elif node.op is not CONSTANT:
            yield from _check_type(node, where)
    for i, node in enumerate(graph.inputs):
        if node.op is not INPUT:
            yield f"input {i} is a {node.op.name} node; inputs are made with placeholder(…)"
    for i, node in enumerate(graph.outputs):
        if isinstance(node.type, TupleType):
            yield f"output {i}: {node.op.name} has several results; return get(…, index=…) of it"
    if all(node.type is not None for node in graph.nodes):
        yield from _check_ranges(graph)


def _check_ranges(graph: Graph) -> Iterator[str]:
    for name in graph.symbols:
        low, high = graph.ranges.get(name, (1, None))
        if high is not None and high < low:
            yield f"symbol {name}: its range {low}..{high} is empty"


def _check_weight(graph: Graph, node: Node, where: str, seen: dict[str, TensorType]) -> Iterator[str]:
    name = node.name
    if name in seen and seen[name] != node.type:
        yield f"{where}: weight {name!r} is used as {node.type} and as {seen[name]}"
    seen[name] = node.tensor
    if name not in graph.weights:
        yield f"{where}: weight {name!r} has no storage"
        return
    stored = TensorType(tuple(graph.weights[name].shape), dtype_name(graph.weights[name].dtype))
    if stored != node.type:
        yield f"{where}: weight {name!r} is {node.type} in the graph but {stored} in storage"


def _check_type(node: Node, where: str) -> Iterator[str]:
    try:
        found = node.op.infer([o.type if o is not None else None for o in node.operands], node.attributes)
    except TypeRuleError as error:
        yield f"{where}: {error}"
        return
    if not same_type(found, node.type):
        yield f"{where}: has type {node.type}, its rule says {found}"


def _cycle(graph: Graph) -> Node | None:
    """A node that reaches itself, found without recursion (an immutable graph can't have one, a forged one can)."""
    state: dict[Node, bool] = {}  # False while open, True when done
    for root in graph.outputs:
        stack = [(root, iter(root.parents))] if root not in state else []
        state.setdefault(root, False)
        while stack:
            node, parents = stack[-1]
            for parent in parents:
                if parent not in state:
                    state[parent] = False
                    stack.append((parent, iter(parent.parents)))
                    break
                if state[parent] is False:
                    return parent
            else:
                stack.pop()
                state[node] = True
    return None


def verify(graph: Graph, after: str = "") -> Graph:
    """Return `graph` if it keeps all rules; else raise VerifyError with every complaint (`after` names the pass)."""
    found = list(complaints(graph))
    if found:
        when = f"after {after} " if after else ""
        raise VerifyError("\n".join([f"the graph {when}breaks {len(found)} rule(s):", *found]))
    return graph
