"""The recipe that costs least under a budget: sparsity, bits and groups chosen layer by layer.

Every option of every matrix is measured alone (`sensitivities`); a knapsack over all matrices gives, for a budget, the choice of least
total loss if losses add up; and each such choice is then made and measured as a whole, on data that it wasn't made with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np

from jisu.compiler import ops
from jisu.compiler.cost import weight_bytes
from jisu.compiler.errors import InputError
from jisu.compiler.graph import Graph, Node, Storage, placeholder
from jisu.compiler.recipe import PruneRecipe, QuantizeRecipe, Recipe
from jisu.compiler.types import TensorType
from jisu.passes.compression import compress
from jisu.passes.compression.allocation import knapsack
from jisu.passes.compression.calibrate import Run, Samples, calls_of
from jisu.passes.compression.curvature import Differentiate, curvatures
from jisu.passes.compression.layers import HEAD, Layer, choose_pruned, choose_quantized, find_layers, matrix_of
from jisu.passes.compression.matrix import Choice, Cut, solve
from jisu.passes.compression.sensitivity import Yardstick, sensitivities
from jisu.passes.compression.unfinished import Unfinished

Latency = Callable[[Graph], float]
"""Seconds that a target's cost model predicts for a graph that isn't laid out yet."""


@attrs.frozen
class Option:
    """One way to store a matrix; neither entry: as it is."""

    prune: PruneRecipe | None = None
    quantize: QuantizeRecipe | None = None

    def fits(self, node: Node) -> bool:
        """Whether its groups and runs divide a matrix."""
        n, k = map(int, node.shape)
        group = self.quantize.inputs_per_scale if self.quantize else 0
        return not (group and k % group) and (self.prune is None or self.prune.shape.misfit(n, k) is None)

    def quick(self) -> Choice:
        """What is measured in its place: the same form, found by one sweep instead of many."""
        cut = None if self.prune is None else Cut(self.prune.share, self.prune.shape, "sparsegpt")
        return Choice(cut, self.quantize and attrs.evolve(self.quantize, refine=0, search=8))

    def nearest(self) -> Choice:
        """The same form, found by the numbers alone."""
        cut = None if self.prune is None else Cut(self.prune.share, self.prune.shape, "magnitude")
        return Choice(cut, self.quantize and attrs.evolve(self.quantize, algorithm="rtn"))


def _codes(scheme: str, group: int) -> QuantizeRecipe:
    return QuantizeRecipe(scheme=scheme, group=group, symmetric=group == 0)


_HALF, _MOST = PruneRecipe(sparsity=0.5), PruneRecipe(sparsity=0.7)

OPTIONS: tuple[Option, ...] = (
    *(Option(quantize=_codes("int2", group)) for group in (32, 64)),
    *(Option(quantize=_codes(scheme, group)) for scheme in ("int3", "int4") for group in (32, 64, 128)),
    *(Option(quantize=_codes(scheme, group)) for scheme in ("int5", "int6") for group in (64, 128)),
    Option(quantize=_codes("int8", 0)),
    Option(_HALF, _codes("int4", 128)),
    Option(_HALF, _codes("int8", 0)),
    Option(_MOST, _codes("int8", 0)),
    Option(_HALF),
    Option(),
)
"""What is tried on each matrix unless told otherwise."""


@attrs.frozen(kw_only=True)
class Point:
    """A recipe that was made and measured.

    bytes: of all weights in storage. predicted_s: seconds of one token, by the target's cost model. loss, in the front's unit, with its
    standard error over windows (NaN for models that aren't language models); expected: what the losses of single matrices add up to.
    """

    recipe: Recipe
    bytes: int
    predicted_s: float
    loss: float
    stderr: float
    expected: float
    on_front: bool = True

    def as_dict(self) -> dict[str, Any]:
        """Plain values; the recipe as TOML."""
        return {**attrs.asdict(self, recurse=False), "recipe": self.recipe.to_toml()}


@attrs.frozen(kw_only=True)
class Front:
    """The points that a search made and measured, by falling size. unit: of losses. dense_bytes: of the model as it was."""

    points: tuple[Point, ...]
    unit: str
    dense_bytes: int

    def as_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {"unit": self.unit, "dense_bytes": self.dense_bytes, "points": [p.as_dict() for p in self.points]}


def search(
    graph: Graph, base: Recipe, samples: Samples, held_out: Samples, budgets: Sequence[tuple[float, float]], *,
    latency: Latency, options: Sequence[Option] = OPTIONS, count: int = 8, differentiate: Differentiate | None = None,
    kept: Unfinished | None = None, progress: Callable[[float], None] = lambda done: None,
) -> Front:  # fmt: skip
    """Recipes of least loss within budgets, each made and measured.

    base: what is done to matrices that are not searched: the head, and those that its entries name. samples: what options are
    measured and made with; held_out: what the results are measured on. budgets: (bytes of all weights, predicted seconds of a token), inf
    for none; without any, `count` budgets of bytes between the smallest and the largest choice. kept: holds what an interrupted run
    measured. differentiate: as in `Compress`. Raises InputError for a budget that nothing fits, with the least there is.
    """
    space = _Space(graph, base, options, latency)
    choices = {node: [o.quick() for o in found] for node, found in space.options.items()}
    counts: Mapping[Node, np.ndarray] = {}
    if differentiate is not None:
        counts = curvatures(graph, space.layers, samples, differentiate, kept, lambda done: progress(0.1 * done))
    losses = sensitivities(graph, space.layers, choices, samples, lambda done: progress(0.1 + 0.5 * done), kept, counts)
    wanted = list(budgets) or [(float(b), np.inf) for b in space.spread(count)]
    picks = [space.pick(losses, *budget) for budget in wanted]
    yardstick = Yardstick(graph, held_out, windows=64)
    points = []
    for i, pick in enumerate(dict.fromkeys(picks)):
        points.append(space.made(pick, losses, samples, yardstick, held_out, counts))
        progress(0.6 + 0.4 * (i + 1) / len(picks))
    points.sort(key=lambda p: -p.bytes)
    on_front = [
        not any(q.bytes <= p.bytes and q.predicted_s <= p.predicted_s and q.loss < p.loss for q in points)
        for p in points
    ]
    return Front(
        points=tuple(attrs.evolve(p, on_front=good) for p, good in zip(points, on_front, strict=True)),
        unit=yardstick.unit,
        dense_bytes=weight_bytes(graph),
    )


class _Space:
    """What can be chosen for each matrix, and what it takes."""

    def __init__(self, graph: Graph, base: Recipe, options: Sequence[Option], latency: Latency) -> None:
        self.graph, self.base = graph, base
        fixed = choose_quantized(graph, base.quantize).keys() | choose_pruned(graph, base.prune).keys()
        self.layers: dict[Node, Layer] = find_layers(graph)
        self.options = {
            node: [o for o in options if o.fits(node)]
            for node, layer in self.layers.items()
            if HEAD not in layer.names and node not in fixed
        }
        names = [self.layers[node].names[0] for node in self.options]
        self.options = {
            node: o for node, o in self.options.items() if o and names.count(self.layers[node].names[0]) == 1
        }
        if not self.options:
            raise InputError("search: there is no matrix to choose for: the recipe settles all that there are")
        self.sizes: dict[Node, np.ndarray] = {}
        self.times: dict[Node, np.ndarray] = {}
        for node, found in self.options.items():
            forms = [_form(graph, node, o, latency) for o in found]
            self.sizes[node], self.times[node] = (np.array(v) for v in zip(*forms, strict=True))
        rest = _settled(graph, base)
        shown = [_form(graph, node, Option(), latency) for node in self.options]
        self.other_bytes = weight_bytes(rest) - sum(b for b, _ in shown)
        self.other_s = latency(rest) - sum(s for _, s in shown)

    def spread(self, count: int) -> np.ndarray:
        """Budgets of bytes, in equal ratios of what is searched, from just above the smallest to the largest choice."""
        low, high = (float(sum(f(s) for s in self.sizes.values())) for f in (np.min, np.max))
        return np.asarray(self.other_bytes + np.geomspace(low * 1.02, high, count))

    def pick(self, losses: Mapping[Node, np.ndarray], most_bytes: float, most_s: float) -> tuple[int, ...]:
        """The options of least loss within a budget, one per matrix: the price of a second is raised until the time fits."""
        sizes, times = list(self.sizes.values()), list(self.times.values())
        room = min(most_bytes - self.other_bytes, float(sum(s.max() for s in sizes)))
        if sum(s.min() for s in sizes) > room:
            least = self.other_bytes + sum(float(s.min()) for s in sizes)
            raise InputError(f"search: nothing fits into {most_bytes:.0f} bytes; the least is {least:.0f}")

        def best(price: float) -> list[int]:
            return knapsack([losses[n] + price * t for n, t in zip(self.sizes, times, strict=True)], sizes, room)

        def seconds(picked: Sequence[int]) -> float:
            return self.other_s + sum(float(t[i]) for t, i in zip(times, picked, strict=True))

        low, high = 0.0, 1e12
        if seconds(best(low)) <= most_s:
            return tuple(best(low))
        if seconds(best(high)) > most_s:
            raise InputError(
                f"search: nothing is predicted to take {most_s:.3g} s per token; the least is {seconds(best(high)):.3g}"
            )
        for _ in range(50):
            middle = 1.0 if not low and high > 1 else (low or high * 1e-6) ** 0.5 * high**0.5
            low, high = (low, middle) if seconds(best(middle)) <= most_s else (middle, high)
            if low and high / low < 1.001:
                break
        return tuple(best(high))

    def recipe(self, pick: Sequence[int]) -> Recipe:
        """The recipe that makes a choice: the base's entries, and one or two per matrix."""
        prune, codes = list(self.base.prune), list(self.base.quantize)
        for node, i in zip(self.options, pick, strict=True):
            name, option = self.layers[node].names[0], self.options[node][i]
            if option.prune is not None:
                prune.append(attrs.evolve(option.prune, layers=name))
            if option.quantize is not None:
                codes.append(attrs.evolve(option.quantize, layers=name))
        return attrs.evolve(self.base, prune=tuple(prune), quantize=tuple(codes))

    def made(
        self, pick: Sequence[int], losses: Mapping[Node, np.ndarray], samples: Samples, yardstick: Yardstick, held_out: Samples,
        curvatures: Mapping[Node, np.ndarray],
    ) -> Point:  # fmt: skip
        """A choice, made and measured."""
        from jisu.passes.compression import Compress

        recipe = self.recipe(pick)
        layers, choices = Compress(recipe.prune, recipe.quantize, samples).choose(self.graph, curvatures=curvatures)
        made = compress(self.graph, layers, choices, samples, curvatures=curvatures)
        pairs = Run(made, calls_of(made, held_out)).outputs(None, {}, yardstick.distance, yardstick.calls)
        loss = sum(e for e, _ in pairs) / max(sum(s for _, s in pairs), 1e-30)
        each = np.array([e / max(s, 1e-30) for e, s in pairs])
        chosen = [(node, i) for node, i in zip(self.options, pick, strict=True)]
        return Point(
            recipe=recipe,
            bytes=weight_bytes(made),
            predicted_s=self.other_s + sum(float(self.times[node][i]) for node, i in chosen),
            loss=loss,
            stderr=float(each.std(ddof=1) / len(each) ** 0.5) if len(each) > 1 else float("nan"),
            expected=sum(float(losses[node][i]) for node, i in chosen),
        )


def _settled(graph: Graph, base: Recipe) -> Graph:
    """The graph with the base's entries done by the numbers alone: what they take doesn't depend on how they are found."""
    from jisu.passes.compression import Compress

    layers, choices = Compress(base.prune, base.quantize).choose(graph)
    return compress(graph, layers, choices, None)


def _form(graph: Graph, node: Node, option: Option, latency: Latency) -> tuple[float, float]:
    """Bytes of a matrix stored so, and predicted seconds of a layer that multiplies one token by it."""
    n, k = map(int, node.shape)
    weights: dict[str, Storage] = dict(graph.weights)
    stored = node
    if option != Option():
        w = matrix_of(node, "", graph.weights, wide=False)
        stored = solve(w, option.nearest(), None, node.dtype).nodes(node, "option", weights)
    x = placeholder("x", TensorType((1, k), node.dtype))
    layer = Graph((x,), (ops.linear(x, stored),), weights).replace()
    assert n == layer.outputs[0].shape[1]
    return float(weight_bytes(layer)), latency(layer)
