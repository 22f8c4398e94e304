"""AWQ (Lin et al., 2024): factors per channel that quantization errs least with, and clipped ranges."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from jisu.compiler import ops
from jisu.compiler.graph import Graph, Node
from jisu.compiler.recipe import QuantizeRecipe
from jisu.compiler.schemes import SCHEMES, Scheme
from jisu.passes.compression.gptq import Grid, choose_grid, in_groups

RATIOS = 20
"""Points of the grid of exponents, from 0 up to, not including, 1."""


def normalised(factors: np.ndarray) -> np.ndarray:
    """Factors with the geometric mean of their extremes at 1."""
    factors = np.maximum(factors, 1e-4)
    return np.asarray(factors / np.sqrt(factors.max() * factors.min()))


def search_factors(
    matrices: Sequence[tuple[np.ndarray, QuantizeRecipe]], magnitude: np.ndarray, h: np.ndarray, classes: np.ndarray
) -> np.ndarray:
    """Factors float64 [k], magnitude^r with the r of least error in the layers' outputs.

    matrices: float32 [n, k], of layers that read one value x, and how they are quantized. magnitude: mean |x| per channel. h: the sum
    of x xᵀ. classes int [k]: channels of one class share a factor.
    """
    size = np.bincount(classes)
    magnitude = (np.bincount(classes, magnitude) / np.maximum(size, 1))[classes]
    best, least = np.ones(len(magnitude)), np.inf
    for i in range(RATIOS):
        factors = normalised(np.maximum(magnitude, 1e-30) ** (i / RATIOS))
        error = sum(_error(w, rule, h, factors) for w, rule in matrices)
        if error < least:
            best, least = factors, error
    return best


def _error(w: np.ndarray, rule: QuantizeRecipe, h: np.ndarray, factors: np.ndarray) -> float:
    """What rounding w * factors to the nearest costs in the outputs: tr(E H Eᵀ)."""
    scaled = (w * factors).astype(np.float32)
    grid = choose_grid(scaled, SCHEMES[rule.scheme], rule.inputs_per_scale, symmetric=rule.symmetric)
    e = grid.values(grid.nearest(scaled)) / factors - w
    return float(np.einsum("nk,nk->", e @ h, e))


def clipped_grid(w: np.ndarray, scheme: Scheme, group: int, h: np.ndarray, *, symmetric: bool, steps: int) -> Grid:
    """The grid of a matrix float32 [n, k] with, per group, the range of least error in the group's part of the outputs.

    steps: ranges that are tried, from the whole one in twentieths of it downwards.
    """
    parts = in_groups(w, group)
    size, groups = parts.shape[2], parts.shape[1]
    short = groups * size - h.shape[0]
    padded = np.pad(h, ((0, short), (0, short))) if short else h
    blocks = np.stack([padded[i : i + size, i : i + size] for i in range(0, groups * size, size)])
    low, high = parts.min(-1, keepdims=True), parts.max(-1, keepdims=True)
    reach = np.maximum(high, -low)
    best, zeros = scheme.grid(low[..., 0], high[..., 0], symmetric)
    least = np.full(parts.shape[:2], np.inf)
    for i in range(steps):
        limit = reach * np.float32(1 - i / 20)
        s, z = scheme.grid(np.maximum(low, -limit)[..., 0], np.minimum(high, limit)[..., 0], symmetric)
        wide = (s[..., None], None if z is None else z[..., None])
        e = (scheme.decode(scheme.encode(parts, *wide), *wide) - parts).transpose(1, 0, 2)
        error = np.einsum("gnk,gnk->ng", e @ blocks, e)
        better = error < least
        least = np.where(better, error, least)
        best = np.where(better, s, best)
        zeros = None if zeros is None or z is None else np.where(better, z, zeros)
    return Grid(scheme, group, scheme.stored(best), zeros)


def score_layers(graph: Graph) -> set[Node]:
    """Layers whose outputs become attention's scores, as queries or keys: AWQ doesn't clip them."""
    found: set[Node] = set()
    stack = [p for n in graph.nodes if n.op is ops.attention for p in n.operands[:2] if p is not None]
    seen: set[Node] = set()
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op in (ops.linear, ops.gated_linear):
            found.add(node)
        else:
            stack += node.parents
    return found
