"""How an entry function of a compiled library is called: what it reads and writes, in which order."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import attrs

from jisu.compiler.graph import CONSTANT, WEIGHT, ArrayStorage, Graph, Node, Storage
from jisu.compiler.text import parse_type
from jisu.compiler.types import TensorType


@attrs.frozen
class Entry:
    """An entry function `name(addresses int64[n], sizes int64[s])` and its `name_arena(sizes, bytes int64[1])`.

    addresses: of the inputs, the weights, the outputs and the arena, in this order, each aligned to 64 bytes; sizes: the
    values of `symbols` (s is at least 1). The arena is memory for intermediate values, of which `name_arena` says how many bytes it
    takes. inputs: (name, type). weights: (name, type). outputs: types. aliases: per output, the number of the input
    whose memory it is (its address is not read), or None.
    """

    inputs: tuple[tuple[str, TensorType], ...]
    weights: tuple[tuple[str, TensorType], ...]
    outputs: tuple[TensorType, ...]
    aliases: tuple[int | None, ...]
    symbols: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """As JSON has it; types are text."""
        return {
            "inputs": [[name, str(t)] for name, t in self.inputs],
            "weights": [[name, str(t)] for name, t in self.weights],
            "outputs": [str(t) for t in self.outputs],
            "aliases": list(self.aliases),
            "symbols": list(self.symbols),
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Entry:
        """What `to_json` wrote; raises KeyError, TypeError or ValueError for anything else."""
        entry = cls(
            inputs=tuple((str(name), parse_type(t)) for name, t in data["inputs"]),
            weights=tuple((str(name), parse_type(t)) for name, t in data["weights"]),
            outputs=tuple(parse_type(t) for t in data["outputs"]),
            aliases=tuple(None if a is None else int(a) for a in data["aliases"]),
            symbols=tuple(map(str, data["symbols"])),
        )
        named = frozenset().union(*(t.symbols for _, t in entry.inputs))
        used = frozenset().union(*(t.symbols for t in entry.outputs))
        if len(entry.aliases) != len(entry.outputs) or not used | set(entry.symbols) <= named:
            raise ValueError("an entry's outputs or symbols don't follow from its inputs")
        if any(a is not None and not 0 <= a < len(entry.inputs) for a in entry.aliases):
            raise ValueError("an entry's output is no input of it")
        return entry


def constant_name(node: Node) -> str:
    """Under which name a constant that stands in memory lies among the weights: by content, so that equal ones are one."""
    array = node.value.array
    digest = hashlib.sha256(f"{node.type}".encode() + array.tobytes()).hexdigest()
    return f"constant.{digest[:16]}"


def stored(graph: Graph) -> dict[str, Storage]:
    """What an entry made from `graph` may name as its weights: the graph's weights, and its constants."""
    found: dict[str, Storage] = {}
    for node in graph.nodes:
        if node.op is WEIGHT:
            found[node.name] = graph.weights[node.name]
        elif node.op is CONSTANT:
            found[constant_name(node)] = ArrayStorage(node.value.array)
    return found
