"""Reconstruction, block by block: each block of the residual stream is trained, on what those before it now give, until it gives what
the unchanged model's block gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import attrs

from jisu.compiler.errors import RecipeError
from jisu.compiler.graph import CONSTANT, INPUT, Graph, Node, placeholder
from jisu.compiler.recipe import QuantizeRecipe, RecoverRecipe
from jisu.passes.compression.calibrate import Run, Samples, Values, calls_of, up_to
from jisu.passes.compression.layers import learned_codes
from jisu.passes.layout import is_stored
from jisu.passes.structured.blocks import Block, between, find_blocks

ITERATIONS = 200
"""Steps of training per block where a recipe names none (AutoRound's)."""


class Fitter(Protocol):
    """What trains a block: given by whoever runs the pass, since passes know no framework."""

    def __call__(
        self, block: Graph, inputs: Sequence[Values], wanted: Values, rule: RecoverRecipe, *, steps: int, moving: frozenset[str]
    ) -> Graph: ...  # fmt: skip


@attrs.frozen
class Reconstruct:
    """Train each block of a compressed graph on `samples`, against that of `dense`, the model as it was.

    rule: seed and learning rate. steps: per block. quantize: whose matrices with algorithm = "autoround" get new codes, too; all
    other codes, and masks, stay. One block's inputs and outputs are held at a time.
    """

    rule: RecoverRecipe
    steps: int
    quantize: tuple[QuantizeRecipe, ...]
    dense: Graph = attrs.field(eq=False, repr=False)
    samples: Samples = attrs.field(eq=False, repr=False)
    fit: Fitter = attrs.field(eq=False, repr=False)
    progress: Callable[[float], None] = attrs.field(default=lambda done: None, eq=False, repr=False)
    name: str = "reconstruct"
    exact: bool = False

    def __call__(self, graph: Graph) -> Graph:
        old, new = find_blocks(self.dense), find_blocks(graph)
        if not old or len(old) != len(new):
            raise RecipeError(
                f"blocks of the residual stream are trained one by one, but the model has {len(old)} of them, compressed {len(new)}; "
                'leave out recover.blocks and algorithm = "autoround"'
            )
        moving, calls = learned_codes(graph, self.quantize), calls_of(graph, self.samples)
        reads = [_reads(graph, block) for block in new]
        then = _Walk(Run(self.dense, calls), [(block.end,) for block in old])
        now = _Walk(Run(graph, calls, then.run.room), reads)
        for i, (before, after) in enumerate(zip(old, new, strict=True)):
            wanted = then.reach((before.end,))[0]
            inputs = now.reach(reads[i])
            block = self.fit(
                _cut(now.run.graph, after, reads[i]), inputs, wanted, self.rule, steps=self.steps, moving=moving
            )
            now.run.graph = attrs.evolve(now.run.graph, weights={**now.run.graph.weights, **block.weights})
            del inputs, wanted
            then.leave((before.end,))
            now.leave(reads[i])
            self.progress((i + 1) / len(new))
        return now.run.graph


class _Walk:
    """A run that goes from place to place, with what lies between computed in order and forgotten when nothing needs it.

    stops: the nodes that are asked for at once, in order.
    """

    def __init__(self, run: Run, stops: Sequence[Sequence[Node]]) -> None:
        self.run = run
        needed = up_to(run.graph, {node for stop in stops for node in stop})
        self.left = {node: sum(user in needed for user in run.graph.users[node]) for node in needed}
        for stop in stops:
            for node in stop:
                self.left[node] += 1
        self.ahead = list(needed)

    def reach(self, nodes: Sequence[Node]) -> list[Values]:
        """The values of the next stop."""
        wanted = up_to(self.run.graph, set(nodes))
        for node in [n for n in self.ahead if n in wanted]:
            self.run.compute(node)
            self.ahead.remove(node)
            self.leave(node.parents)
        return [self.run[node] for node in nodes]

    def leave(self, nodes: Sequence[Node]) -> None:
        """Forget what nothing needs any more."""
        for node in nodes:
            self.left[node] -= 1
            if not self.left[node]:
                self.run.values.pop(node, None)


def _reads(graph: Graph, block: Block) -> tuple[Node, ...]:
    """What a block is computed from: the stream, and values that are made outside of it (positions, masks)."""
    inside = between(block.begin, block.end)
    parents = {p: None for n in graph.nodes if n in inside for p in n.parents}
    outside = {p for p in parents if p not in inside or p.op is INPUT} - {block.begin}
    others = [p for p in parents if p in outside and not _is_fixed(p)]
    return (block.begin, *others)


def _cut(graph: Graph, block: Block, reads: Sequence[Node]) -> Graph:
    """The block as a graph of its own, with what it reads as its inputs."""
    inside = between(block.begin, block.end)
    inputs = {node: placeholder(f"x{i}", node.tensor) for i, node in enumerate(reads)}
    done: dict[Node, Node] = dict(inputs)
    for node in graph.nodes:
        if node not in done and (node in inside or _is_fixed(node)):
            done[node] = node.with_operands(None if o is None else done[o] for o in node.operands)
    return Graph(tuple(inputs.values()), (done[block.end],), graph.weights, graph.ranges).replace()


def _is_fixed(node: Node) -> bool:
    return node.op is CONSTANT or is_stored(node)
