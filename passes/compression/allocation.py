"""How a share of zeros is spread over layers, and choices under a budget in general."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from jisu.compiler.graph import Graph, Node
from jisu.compiler.recipe import PruneRecipe
from jisu.passes.compression.calibrate import Samples, Values, observe
from jisu.passes.compression.layers import Layer, matrix_of
from jisu.passes.compression.matrix import Choice, Cut
from jisu.passes.compression.sensitivity import sensitivities
from jisu.passes.compression.unfinished import Unfinished

MEASURED = (0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 0.95)
"""The shares of zeros at which a layer's loss is measured; those in between are interpolated."""

OWL_SPREAD, OWL_OUTLIER = 0.08, 5.0
"""OWL's lambda and M."""

Chosen = Mapping[Node, tuple[Layer, PruneRecipe]]


def allocate(
    graph: Graph, chosen: Chosen, samples: Samples | None, progress: Callable[[float], None] = lambda done: None,
    kept: Unfinished | None = None, curvatures: Mapping[Node, np.ndarray] | None = None,
) -> dict[Node, float]:  # fmt: skip
    """The share of zeros of each matrix: over all matrices of one rule the rule's share, weighted by their sizes. curvatures: how errors
    in a matrix' outputs count."""
    shares: dict[Node, float] = {}
    for rule in dict.fromkeys(rule for _, rule in chosen.values()):
        part = {node: found for node, found in chosen.items() if found[1] == rule}
        if rule.allocation == "uniform":
            shares |= dict.fromkeys(part, rule.share)
        elif rule.allocation == "global":
            shares |= _by_threshold(graph, part, rule.share)
        else:
            assert samples is not None
            if rule.allocation == "owl":
                shares |= _by_outliers(graph, part, rule.share, samples, progress)
            else:
                shares |= _by_loss(graph, part, rule, samples, progress, kept, curvatures)
    return shares


def _size(node: Node) -> int:
    return int(node.shape[0]) * int(node.shape[1])


def _by_threshold(graph: Graph, chosen: Chosen, share: float) -> dict[Node, float]:
    """One threshold of magnitudes for all matrices."""
    numbers = {
        node: np.sort(np.abs(matrix_of(node, layer.names[0], graph.weights)), axis=None)
        for node, (layer, _) in chosen.items()
    }
    everything = np.concatenate(list(numbers.values()))
    drop = int(len(everything) * share)
    if not drop:
        return dict.fromkeys(chosen, 0.0)
    threshold = np.partition(everything, drop - 1)[drop - 1]
    return {node: float(np.searchsorted(n, threshold, "right")) / len(n) for node, n in numbers.items()}


def _by_outliers(
    graph: Graph, chosen: Chosen, share: float, samples: Samples, progress: Callable[[float], None]
) -> dict[Node, float]:
    """OWL: the more of a layer's |w| * |x| stand out, the fewer become 0, within `OWL_SPREAD` of the common share."""
    users = {layer.users[0]: node for node, (layer, _) in chosen.items()}
    norms: dict[Node, np.ndarray] = {}

    def look(x: Node, values: Values) -> None:
        k = values[0].shape[-1]
        norms[x] = np.sqrt(sum(np.square(v.reshape(-1, k), dtype=np.float64).sum(0) for v in values))

    observe(graph, samples, users, look, progress)
    outliers = {}
    for user, node in users.items():
        x = user.operands[0]
        assert x is not None
        score = np.abs(matrix_of(node, chosen[node][0].names[0], graph.weights)) * norms[x]
        outliers[node] = float((score > OWL_OUTLIER * score.mean()).mean())
    values = np.array(list(outliers.values()))
    spread = np.ptp(values)
    moved = (values - values.min()) / spread * 2 * OWL_SPREAD if spread else np.zeros_like(values)
    sizes = np.array([_size(node) for node in outliers], float)
    kept = 1 - share + moved - (moved * sizes).sum() / sizes.sum()
    return {node: float(np.clip(1 - keep, 0, 0.999)) for node, keep in zip(outliers, kept, strict=True)}


def _by_loss(
    graph: Graph,
    chosen: Chosen,
    rule: PruneRecipe,
    samples: Samples,
    progress: Callable[[float], None],
    kept: Unfinished | None,
    curvatures: Mapping[Node, np.ndarray] | None,
) -> dict[Node, float]:
    """The shares of least loss, if the losses of single layers add up: each is measured at some shares and interpolated."""
    layers = {node: layer for node, (layer, _) in chosen.items()}
    options = [Choice(Cut(share, rule.shape, "sparsegpt"), objective=rule.objective) for share in MEASURED]
    measured = sensitivities(graph, layers, dict.fromkeys(chosen, options), samples, progress, kept, curvatures)
    shares = np.arange(0, 0.9501, 0.0125)
    losses = [_interpolated(measured[node], shares) for node in chosen]
    sizes = [np.round((1 - shares) * _size(node)) for node in chosen]
    picked = knapsack(losses, sizes, sum(map(_size, chosen)) * (1 - rule.share))
    return {node: float(shares[i]) for node, i in zip(chosen, picked, strict=True)}


def _interpolated(losses: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Losses at other shares: their logarithms linearly, also beyond the ends; 0 at 0."""
    known, logs = np.array(MEASURED), np.log(np.maximum.accumulate(np.maximum(losses, 1e-12)))
    slope = (logs[1] - logs[0]) / (known[1] - known[0])
    found = np.where(shares < known[0], logs[0] + slope * (shares - known[0]), np.interp(shares, known, logs))
    return np.where(shares > 0, np.exp(found), 0)


def knapsack(losses: Sequence[np.ndarray], sizes: Sequence[np.ndarray], budget: float, steps: int = 20000) -> list[int]:
    """One option per item, of least total loss among those whose sizes sum to at most `budget`: dynamic programming.

    losses, sizes: one array [options] per item. steps: the budget's resolution; sizes are rounded up to it. Raises ValueError where even the
    smallest options are too large.
    """
    if sum(float(s.min()) for s in sizes) > budget:
        raise ValueError(f"the smallest options together take {sum(float(s.min()) for s in sizes):.6g} of {budget:.6g}")
    base = np.array([s.min() for s in sizes])
    free = budget - float(base.sum())
    unit = free / steps or 1.0
    best = np.zeros(steps + 1)  # the least loss with at most so many units
    picks = []
    for loss, size, least in zip(losses, sizes, base, strict=True):
        units = np.ceil((size - least) / unit * (1 - 1e-12)).astype(np.int64)
        new, pick = np.full(steps + 1, np.inf), np.zeros(steps + 1, np.int32)
        for option, u in enumerate(units.tolist()):
            if u > steps:
                continue
            candidate = best[: steps + 1 - u] + loss[option]
            better = candidate < new[u:]
            new[u:][better] = candidate[better]
            pick[u:][better] = option
        best = new
        picks.append((pick, units))
    found, left = [], steps
    for pick, units in reversed(picks):
        option = int(pick[left])
        found.append(option)
        left -= int(units[option])
    return found[::-1]
