"""Activations in few bits: what linear layers read is rounded to a scheme's grid, in front of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import attrs
import numpy as np

from jisu.compiler import ops
from jisu.compiler.errors import RecipeError
from jisu.compiler.graph import ArrayStorage, Graph, Node, Storage, weight
from jisu.compiler.recipe import QuantizeRecipe
from jisu.compiler.schemes import SCHEMES
from jisu.compiler.types import TensorType
from jisu.passes.compression.calibrate import Samples, Values, observe
from jisu.passes.compression.layers import Layer, choose_quantized


@attrs.frozen(eq=False)
class Rounding:
    """How the input of a layer is rounded: by which rule, and the name under which the layer is known."""

    rule: QuantizeRecipe
    name: str


def find_roundings(graph: Graph, chosen: Mapping[Node, tuple[Layer, QuantizeRecipe]]) -> dict[Node, Rounding]:
    """The layers whose inputs are rounded.

    Raises RecipeError where groups don't divide a layer's inputs, and for matrices of one layer whose rules differ in this.
    """
    found: dict[Node, Rounding] = {}
    for layer, rule in chosen.values():
        for user in layer.users:
            found.setdefault(user, Rounding(rule, layer.names[0]))
    for node, (layer, rule) in chosen.items():
        for user in layer.users:
            other = found[user]
            if _grid(other.rule) != _grid(rule):
                raise RecipeError(
                    f"quantize: {other.name} and {layer.names[0]} read one value in one kernel, so their activations must be the same"
                )
        group = rule.channels_per_scale
        if group and int(node.shape[1]) % group:
            raise RecipeError(
                f"quantize: {rule.activations} activations have a scale per {group} channels, which don't divide "
                f"the {node.shape[1]} inputs of {layer.names[0]}"
            )
    return {user: rounding for user, rounding in found.items() if rounding.rule.activations != "none"}


def _grid(rule: QuantizeRecipe) -> tuple[str, str, int]:
    return rule.activations, rule.activation_range, rule.channels_per_scale


@attrs.frozen
class QuantizeActivations:
    """Round what linear layers read, as their weights' rules say; layers of one input share what is rounded.

    rules: as for `Quantize`, which runs behind this pass and so calibrates weights for the inputs that they will have. samples:
    calibration data, needed for static ranges: these span the largest number that the model as it is gives on it.
    """

    rules: tuple[QuantizeRecipe, ...]
    samples: Samples | None = attrs.field(default=None, eq=False, repr=False)
    progress: Callable[[float], None] = attrs.field(default=lambda done: None, eq=False, repr=False)
    name: str = "quantize activations"
    exact: bool = False

    def __call__(self, graph: Graph) -> Graph:
        found = find_roundings(graph, choose_quantized(graph, self.rules))
        if not found:
            return graph
        reach = self._reach(graph, found)
        weights = dict(graph.weights)
        made: dict[tuple[Any, ...], Node] = {}

        def transform(old: Node, new: Node) -> Node:
            if old not in found:
                return new
            rounding, read = found[old], old.operands[0]
            x = new.operands[0]
            assert read is not None and x is not None
            key = (read, *_grid(rounding.rule))
            if key not in made:
                static = rounding.rule.activation_range == "static"
                scale = _stored_scale(rounding, reach[read], weights) if static else None
                attributes = {"scheme": rounding.rule.activations, "group": rounding.rule.channels_per_scale}
                made[key] = ops.fake_quantize.make((x, scale), attributes, new.source)
            return new.with_operands((made[key], *new.operands[1:]))

        new = graph.map(transform)
        return attrs.evolve(new, weights=weights).replace()

    def _reach(self, graph: Graph, found: Mapping[Node, Rounding]) -> dict[Node, float]:
        """The largest magnitude of each value that gets a static scale."""
        layers = {node: r for node, r in found.items() if r.rule.activation_range == "static"}
        if layers and self.samples is None:
            raise RecipeError(
                f"quantize: static ranges need calibration text for {next(iter(layers.values())).name}; give calibration=…, "
                'or activation_range = "dynamic"'
            )
        reach: dict[Node, float] = {}

        def look(x: Node, values: Values) -> None:
            reach[x] = max(float(np.abs(v).max()) for v in values)

        if layers:
            assert self.samples is not None
            observe(graph, self.samples, layers, look, self.progress)
        return reach


def _stored_scale(rounding: Rounding, reach: float, weights: dict[str, Storage]) -> Node:
    """The scale float32 [] that covers numbers up to `reach`, as a new stored tensor."""
    kind = SCHEMES[rounding.rule.activations]
    steps = kind.top * (448 if kind.scale == "e4m3" else 1)
    label = f"{rounding.name}.input_scale"
    while label in weights:
        label += "'"
    weights[label] = ArrayStorage(np.array(reach / steps or 1.0, np.float32))
    return weight(label, TensorType((), "float32"))
