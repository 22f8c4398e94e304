"""The cost model: a roofline over the ops' declared FLOPs and bytes (Williams et al., 2009).

A node takes the longer of its arithmetic at the machine's peak and its traffic at the machine's bandwidth. All figures are
predictions from the machine's description, never measurements.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import attrs

from jisu.compiler import axes, ops
from jisu.compiler.graph import WEIGHT, Graph, Node
from jisu.compiler.types import TupleType, substitute


class Machine(Protocol):
    """What the cost model reads of a target's description."""

    @property
    def memory_bandwidth(self) -> float:
        """Bytes per second from main memory."""
        ...

    def peak_flops(self, dtype: str) -> float:
        """FLOP/s of the whole machine in `dtype`."""
        ...


VIEWS = frozenset({ops.reshape, ops.get})
"""Ops that only look at their operand in another way."""

INTEGER = frozenset({ops.levels_linear, ops.levels_projections})
"""Ops whose products are those of 8 bits: of integers, or of fp8."""

PARTIAL = frozenset({ops.take, ops.gather, *ops.LOOKUPS})
"""Ops that read only as much of their first operand as they return."""


@attrs.frozen
class Cost:
    """What running a graph once costs: flops, bytes moved, kernels launched, predicted seconds."""

    flops: int = 0
    bytes: int = 0
    launches: int = 0
    seconds: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.flops + other.flops,
            self.bytes + other.bytes,
            self.launches + other.launches,
            self.seconds + other.seconds,
        )


def node_cost(node: Node, env: Mapping[str, int], machine: Machine) -> Cost:
    """The cost of one node with every symbol fixed by `env`; nothing for leaves and views."""
    if node.op.leaf or node.op in VIEWS:
        return Cost()
    flops = substitute(axes.flops(node), env)
    types = node.type.items if isinstance(node.type, TupleType) else (node.type,)
    written = sum(substitute(t.nbytes, env) for t in types)
    if node.op is ops.cache_append:
        new = node.operands[1]
        assert new is not None
        written = substitute(new.tensor.nbytes, env)
        moved = 2 * written
    elif node.op in PARTIAL:
        moved = 2 * written
    else:
        read = [substitute(p.tensor.nbytes, env) for p in node.parents if not isinstance(p.type, TupleType)]
        moved = written + sum(read)
    dtype = ("float8_e4m3fn" if node.records == "fp8" else "int8") if node.op in INTEGER else types[0].dtype
    peak, bandwidth = machine.peak_flops(dtype), machine.memory_bandwidth
    seconds = max(flops / peak if peak else 0.0, moved / bandwidth if bandwidth else 0.0)
    return Cost(flops, moved, 1, seconds)


def graph_cost(graph: Graph, env: Mapping[str, int], machine: Machine) -> Cost:
    """The cost of running `graph` once, kernels one after another."""
    total = Cost()
    for node in graph.nodes:
        total = total + node_cost(node, env, machine)
    return total


def weight_bytes(graph: Graph) -> int:
    """Bytes of all weights that the graph uses, each counted once."""
    sizes = {n.name: n.tensor.nbytes for n in graph.nodes if n.op is WEIGHT}
    return int(sum(sizes.values()))
