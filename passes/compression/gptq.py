"""Codes of one matrix that keep a layer's output: GPTQ, and a refinement by coordinate descent.

A layer maps inputs x to W x. With H = sum of x xᵀ over calibration tokens, replacing W by Q costs the layer tr((W - Q) H (W - Q)ᵀ)
in its outputs. All arrays here are NumPy's: W [n, k] float32, H [k, k] float64; masks bool [n, k], where Q is 0 if False.
"""

from __future__ import annotations

import attrs
import numpy as np

from jisu.compiler.interpret import widen
from jisu.compiler.parallel import in_parts
from jisu.compiler.schemes import Scheme, groups_of


@attrs.frozen(eq=False)
class Grid:
    """Where the numbers of a matrix may go: per input a scale and, on an asymmetric grid, a zero (float32 [n, k])."""

    scheme: Scheme
    group: int
    scales: np.ndarray  # [n, groups]
    zeros: np.ndarray | None

    def at(self, k: int) -> tuple[np.ndarray, np.ndarray | None]:
        """Scales and zeros [n, k], one per input."""
        spread = [
            None if v is None else np.repeat(v, self.group or k, axis=1)[:, :k] for v in (self.scales, self.zeros)
        ]
        assert spread[0] is not None
        return spread[0], spread[1]

    def nearest(self, w: np.ndarray) -> np.ndarray:
        """Codes of the nearest points; w: floats of any width."""
        n, k = w.shape
        codes = np.empty((n, k), np.uint8)

        def round_rows(rows: slice) -> None:
            parts = in_groups(widen(w[rows], "float32"), self.group)
            zeros = None if self.zeros is None else self.zeros[rows, :, None]
            found = self.scheme.encode(parts, self.scales[rows, :, None], zeros)
            codes[rows] = found.reshape(len(found), -1)[:, :k]

        in_parts(n, k, round_rows)
        return codes

    def rows(self, rows: np.ndarray | slice) -> Grid:
        """The grid of some rows of the matrix."""
        return attrs.evolve(self, scales=self.scales[rows], zeros=None if self.zeros is None else self.zeros[rows])

    def values(self, codes: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """The points of codes, float32; 0 outside of the mask."""
        found = self.scheme.decode(codes, *self.at(codes.shape[1]))
        return found if mask is None else np.where(mask, found, np.float32(0))


def row_blocks(n: int, k: int) -> list[np.ndarray]:
    """The rows of a matrix [n, k] in parts that take little memory."""
    return np.array_split(np.arange(n), max(1, -(-n * k // _BLOCK)))


_BLOCK = 1 << 21
"""Numbers of a matrix that are worked on at once where rows don't depend on each other."""


def in_groups(w: np.ndarray, group: int) -> np.ndarray:
    """[n, k] as [n, groups, group]; what the last group lacks is 0."""
    n, k = w.shape
    size = group or k
    short = -k % size
    return (np.pad(w, ((0, 0), (0, short))) if short else w).reshape(n, -1, size)


def ranges(w: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """The least and the greatest number of each group, float32 [n, groups], what the last group lacks being 0; w: floats of any width."""
    n, k = w.shape
    low, high = np.empty((2, n, groups_of(k, group)), np.float32)

    def find(rows: slice) -> None:
        parts = in_groups(widen(w[rows], "float32"), group)
        low[rows], high[rows] = parts.min(-1), parts.max(-1)

    in_parts(n, k, find)
    return low, high


def choose_grid(
    w: np.ndarray,
    scheme: Scheme,
    group: int,
    *,
    symmetric: bool = True,
    importance: np.ndarray | None = None,
    steps: int = 0,
) -> Grid:
    """The grid of a matrix: over each group's whole range, or of `steps` smaller ranges the one with the least squared error.

    w: without `steps` floats of any width, else float32. importance: how much an error at each input costs, [k] (the diagonal of H).
    """
    low, high = ranges(w, group)
    best, zeros = scheme.grid(low, high, symmetric)
    if not steps:
        return Grid(scheme, group, best, zeros)
    parts = in_groups(w, group)
    weight = np.ones(w.shape[1]) if importance is None else importance / max(float(importance.mean()), 1e-30)
    weight = in_groups(weight[None].astype(np.float32), group)
    blocks = row_blocks(*w.shape)
    least: np.ndarray | None = None
    for shrink in np.linspace(1.0, 0.5, steps):
        s, z = scheme.grid(low, high, symmetric, float(shrink))
        error = np.concatenate([_error(parts[r], weight, scheme, s[r], None if z is None else z[r]) for r in blocks])
        better = np.ones_like(error, bool) if least is None else error < least
        least = error if least is None else np.where(better, error, least)
        best = np.where(better, s, best)
        if zeros is not None and z is not None:
            zeros = np.where(better, z, zeros)
    return Grid(scheme, group, scheme.stored(best), zeros)


def _error(
    parts: np.ndarray, weight: np.ndarray, scheme: Scheme, scales: np.ndarray, zeros: np.ndarray | None
) -> np.ndarray:
    """The squared error per group of rounding to the nearest."""
    wide = (scales[..., None], None if zeros is None else zeros[..., None])
    return np.asarray((weight * (scheme.decode(scheme.encode(parts, *wide), *wide) - parts) ** 2).sum(-1))


def damped(h: np.ndarray, damping: float) -> np.ndarray:
    """H with `damping` times its mean diagonal added; inputs that never differ from 0 get 1."""
    h = h.copy()
    diagonal = np.einsum("ii->i", h)
    diagonal[diagonal <= 0] = 1.0
    diagonal += damping * float(diagonal.mean())
    return h


def feedback(h: np.ndarray, damping: float) -> tuple[np.ndarray, np.ndarray]:
    """The order in which inputs are rounded, by falling importance, and how an error at each is best made up for by those behind it: rows
    of the upper Cholesky factor of H^-1 in that order."""
    order = np.argsort(-np.diag(h), kind="stable")
    inverse = np.linalg.inv(damped(h, damping)[np.ix_(order, order)])
    return order, np.linalg.cholesky((inverse + inverse.T) / 2).T


def gptq(
    w: np.ndarray,
    order: np.ndarray,
    factor: np.ndarray,
    grid: Grid,
    mask: np.ndarray | None = None,
    *,
    block: int = 128,
) -> np.ndarray:
    """Codes [n, k] by GPTQ (Frantar et al., 2023): inputs in order of falling importance, each one's rounding error made up for by
    the inputs still to come. Groups are static: scales are those of the unchanged matrix. What the mask leaves out becomes 0, with the
    same feedback (SparseGPT's joint sweep); its codes mean nothing. order, factor: from `feedback`.
    """
    n, k = w.shape
    rest = np.ascontiguousarray(w[:, order].T, np.float64)  # inputs first: what is touched together lies together
    scales, zeros, kept = _by_input(grid, mask, order)
    found = np.empty((k, n), np.float64)
    for begin in range(0, k, block):
        end = min(begin + block, k)
        errors = np.empty((end - begin, n))
        for j in range(begin, end):
            value = grid.scheme.on_grid(rest[j], scales[j], None if zeros is None else zeros[j])
            if kept is not None:
                value = value * kept[j]
            found[j] = value
            errors[j - begin] = (rest[j] - value) / factor[j, j]
            rest[j + 1 : end] -= factor[j, j + 1 : end, None] * errors[j - begin]
        rest[end:] -= factor[begin:end, end:].T @ errors
    values = np.empty((n, k), np.float32)
    values[:, order] = found.T
    return grid.nearest(values)


def _by_input(
    grid: Grid, mask: np.ndarray | None, order: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Scales, zeros and the mask float64 [k, n], inputs in the given order."""
    k = len(order)
    scales, zeros = grid.at(k)
    wanted = [None if v is None else np.ascontiguousarray(v[:, order].T, np.float64) for v in (scales, zeros, mask)]
    assert wanted[0] is not None
    return wanted[0], wanted[1], wanted[2]


def refine(
    w: np.ndarray, h: np.ndarray, grid: Grid, codes: np.ndarray, mask: np.ndarray | None = None, *, sweeps: int
) -> tuple[Grid, np.ndarray]:
    """Lower tr((W - Q) H (W - Q)ᵀ) from given codes: coordinate descent over the codes (Behdin et al., "QuantEase", 2023), scales
    refitted by least squares in between. Never makes it larger.
    """
    best, least = (grid, codes), _cost(w, h, grid.values(codes, mask))
    for _ in range(sweeps):
        before = least
        codes = _descend(w, h, grid, codes, mask)
        cost = _cost(w, h, grid.values(codes, mask))
        if cost < least:
            best, least = (grid, codes), cost
        grid = _refitted(w, h, grid, codes, mask)
        cost = _cost(w, h, grid.values(codes, mask))
        if cost < least:
            best, least = (grid, codes), cost
        if least > (1 - _WORTHWHILE) * before:
            break
    return best


_WORTHWHILE = 0.01
"""By how much a sweep must lower the cost for another one to follow."""


def _cost(w: np.ndarray, h: np.ndarray, q: np.ndarray) -> float:
    e = w - q.astype(np.float64)
    return float(np.vdot(e @ h, e))


def _descend(
    w: np.ndarray, h: np.ndarray, grid: Grid, codes: np.ndarray, mask: np.ndarray | None, block: int = 64
) -> np.ndarray:
    """One sweep: every code in turn becomes the best one while all others stay."""
    k = w.shape[1]
    scales, zeros, kept = _by_input(grid, mask, np.arange(k))
    q = np.ascontiguousarray(grid.values(codes, mask).T, np.float64)  # inputs first, as in `gptq`
    gradient = h @ (q - w.T)  # half the cost's gradient
    diagonal = np.maximum(np.diag(h), 1e-12)
    for begin in range(0, k, block):
        end = min(begin + block, k)
        here, moved = gradient[begin:end].copy(), np.empty((end - begin, len(w)))
        for j in range(begin, end):
            i = j - begin
            aim = q[j] - here[i] / diagonal[j]
            step = grid.scheme.on_grid(aim, scales[j], None if zeros is None else zeros[j]) - q[j]
            if kept is not None:
                step *= kept[j]
            q[j] += step
            moved[i] = step
            here[i + 1 :] += h[j + 1 : end, j, None] * step
        gradient += h[:, begin:end] @ moved
    return grid.nearest(np.ascontiguousarray(q.T, np.float32))


def _refitted(w: np.ndarray, h: np.ndarray, grid: Grid, codes: np.ndarray, mask: np.ndarray | None) -> Grid:
    """The scales that suit given codes best (all groups of a row together), as they can be stored."""
    n, k = w.shape
    ones = Grid(grid.scheme, grid.group, np.ones_like(grid.scales), grid.zeros)
    levels = ones.values(codes, mask).astype(np.float64)
    size = grid.group or k
    edges = np.arange(0, k, size)
    groups = len(edges)
    right = np.add.reduceat((w.astype(np.float64) @ h) * levels, edges, 1)
    left = np.empty((n, groups, groups))
    for i, e in enumerate(edges.tolist()):
        left[:, i] = np.add.reduceat((levels[:, e : e + size] @ h[e : e + size]) * levels, edges, 1)
    left += 1e-6 * np.einsum("nii->n", left)[:, None, None] / groups * np.eye(groups) + 1e-20 * np.eye(groups)
    scales = np.linalg.solve(left, right[..., None])[..., 0]
    sensible = (scales > 0.25 * grid.scales) & (scales < 4 * grid.scales) & np.isfinite(scales)
    return attrs.evolve(grid, scales=grid.scheme.stored(np.where(sensible, scales, grid.scales)))
