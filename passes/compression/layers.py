"""The matrices that are compressed, and which entry of a recipe each belongs to."""

from __future__ import annotations

import difflib
import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

import attrs
import numpy as np

from jisu.compiler import ops
from jisu.compiler.errors import InputError, RecipeError
from jisu.compiler.graph import CONSTANT, WEIGHT, Graph, Node, Storage
from jisu.compiler.interpret import widen
from jisu.compiler.masks import unpack_mask
from jisu.compiler.parallel import in_parts
from jisu.compiler.recipe import SMALLEST_GROUP, PruneRecipe, QuantizeRecipe
from jisu.compiler.schemes import SCHEMES
from jisu.passes.layout import Derived, is_stored

HEAD = "head"
"""A name by which patterns find the layer that makes a language model's logits, whatever the model calls it."""

MATRICES = {ops.linear: (1,), ops.gated_linear: (1, 2)}
"""Where layers hold the matrices [n, k] that multiply their first operand."""

Rule = TypeVar("Rule", PruneRecipe, QuantizeRecipe)


@attrs.frozen(eq=False)
class Layer:
    """A matrix of weights: its names, its node, and the layers that multiply by it."""

    names: tuple[str, ...]
    node: Node
    users: tuple[Node, ...]


def find_layers(graph: Graph) -> dict[Node, Layer]:
    """The matrices that linear layers multiply by and that aren't codes yet, by their nodes, in the graph's order."""
    users: dict[Node, list[Node]] = {}
    for node in graph.nodes:
        for position in MATRICES.get(node.op, ()):
            matrix = node.operands[position]
            assert matrix is not None
            if is_stored(matrix) and matrix.op is not ops.dequantize and not matrix.tensor.symbols:
                users.setdefault(matrix, []).append(node)
    found, last = {}, _last(graph)
    for matrix, layers in users.items():
        name = next(n.name for n in Graph((), (matrix,)).nodes if n.op is WEIGHT)
        name = name.removesuffix(".values" if matrix.op is ops.expand else ".weight")
        is_head = not last.isdisjoint(layers)
        found[matrix] = Layer((name, *([HEAD] if is_head else [])), matrix, tuple(layers))
    return found


_ORDERED = frozenset({ops.cast, ops.add, ops.sub, ops.mul, ops.div, ops.tanh})
"""What logits may go through on their way out: scales, caps and biases keep the order in which they rank."""


def _last(graph: Graph) -> set[Node]:
    """The graph's outputs, and what alone they are made of by ops that keep its order."""
    found = set(graph.outputs)
    for node in reversed(graph.nodes):
        if node not in found or node.op not in _ORDERED:
            continue
        moving = {p for p in node.parents if p.op is not CONSTANT and not is_stored(p)}
        if len(moving) == 1:
            found |= {p for p in moving if p.op is not ops.linear or p.operands[3] is None}
    return found


def choose_quantized(graph: Graph, rules: Iterable[QuantizeRecipe]) -> dict[Node, tuple[Layer, QuantizeRecipe]]:
    """The last rule that matches each matrix, with groups that divide its inputs; those that stay as they are are left out.

    Raises RecipeError for a pattern that matches nothing and for groups that don't divide a layer's inputs.
    """
    found = _choose(graph, rules, "quantize", lambda layer, rule: _matches(layer, rule.layers))
    kept = {n: (layer, rule) for n, (layer, rule) in found.items() if rule.scheme != "none"}
    for node, (layer, rule) in kept.items():
        k, group = int(node.shape[1]), rule.inputs_per_scale
        if not group or k % group == 0:
            continue
        fitting = math.gcd(k, group)
        if rule.group >= 0 or not SCHEMES[rule.scheme].uniform or fitting < SMALLEST_GROUP:
            raise RecipeError(
                f"quantize: groups of {group} don't divide the {k} inputs of {layer.names[0]}; take a divisor, or 0 for whole rows"
            )
        kept[node] = (layer, attrs.evolve(rule, group=fitting))
    return kept


def choose_pruned(graph: Graph, rules: Iterable[PruneRecipe]) -> dict[Node, tuple[Layer, PruneRecipe]]:
    """As `choose_quantized`; raises RecipeError also for a pattern of sparsity that doesn't divide a matrix."""

    def matches(layer: Layer, rule: PruneRecipe) -> bool:
        return _matches(layer, rule.layers) and not (rule.layers == "*" and HEAD in layer.names)

    kept = {n: (layer, rule) for n, (layer, rule) in _choose(graph, rules, "prune", matches).items() if rule.share > 0}
    for node, (layer, rule) in kept.items():
        n, k = map(int, node.shape)
        if node.op is ops.expand:
            raise RecipeError(f"prune: {layer.names[0]} is pruned already; leave it out by an entry with sparsity = 0")
        misfit = rule.shape.misfit(n, k)
        if misfit is not None:
            raise RecipeError(f"prune: {layer.names[0]}: {misfit}; leave it out by an entry with sparsity = 0")
    return kept


def learned_codes(graph: Graph, rules: Iterable[QuantizeRecipe]) -> frozenset[str]:
    """The names of stored codes whose last matching rule has algorithm = "autoround"."""
    found, final = set(), _last(graph)
    for node in graph.nodes:
        if node.op is ops.dequantize and node.parents[0].op is WEIGHT:
            name, users = str(node.parents[0].name), graph.users[node]
            names = (name.removesuffix(".codes"), *([HEAD] if not final.isdisjoint(users) else []))
            last = [r for r in rules if _matches(Layer(names, node, users), r.layers)][-1:]
            if last and last[0].algorithm == "autoround":
                found.add(name)
    return frozenset(found)


def _matches(layer: Layer, pattern: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for name in layer.names)


def _choose(
    graph: Graph, rules: Iterable[Rule], verb: str, matches: Callable[[Layer, Rule], bool]
) -> dict[Node, tuple[Layer, Rule]]:
    layers = find_layers(graph)
    names = [name for layer in layers.values() for name in layer.names]
    chosen: dict[Node, tuple[Layer, Rule]] = {}
    for rule in rules:
        matched = [n for n, layer in layers.items() if matches(layer, rule)]
        if not matched:
            near = difflib.get_close_matches(rule.layers, names, n=3, cutoff=0.3)
            raise RecipeError(
                f"{verb}: no layer matches {rule.layers!r}; near: {', '.join(near or names[:3]) or 'the model has no linear layer'}"
            )
        chosen |= {n: (layers[n], rule) for n in matched}
    return {n: chosen[n] for n in layers if n in chosen}


def mask_of(node: Node, weights: Mapping[str, Storage]) -> np.ndarray | None:
    """The mask bool [n, k] of a matrix that is pruned already; None of another."""
    if node.op is not ops.expand:
        return None
    return unpack_mask(Derived(node.parents[1], weights).numpy(), node.k)


def matrix_of(node: Node, name: str, weights: Mapping[str, Storage], *, wide: bool = True) -> np.ndarray:
    """The values float32 [n, k] of a matrix, or unless `wide` those of a stored one as they are; raises InputError for NaN and infinities,
    which can't be compressed."""
    w = weights[node.name].numpy() if node.op is WEIGHT and not wide else Derived(node, weights).wide()
    lost = []

    def count(rows: slice) -> None:
        there = np.isfinite(widen(w[rows], "float32"))
        if not there.all():
            lost.append(int((~there).sum()))

    in_parts(len(w), w.shape[1], count)
    if lost:
        raise InputError(f"{name}: the weight has {sum(lost)} NaN or infinite numbers; it can't be compressed")
    return w
