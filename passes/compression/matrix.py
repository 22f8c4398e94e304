"""One matrix compressed: its mask, and what is left as numbers or as codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import attrs
import numpy as np

from jisu.compiler import masks, ops, schemes
from jisu.compiler.graph import ArrayStorage, Node, Storage, weight
from jisu.compiler.interpret import widen
from jisu.compiler.parallel import in_parts
from jisu.compiler.pattern import Pattern
from jisu.compiler.recipe import QuantizeRecipe
from jisu.compiler.types import TensorType, numpy_dtype
from jisu.passes.compression import awq, prune
from jisu.passes.compression.calibrate import Run
from jisu.passes.compression.curvature import in_turn
from jisu.passes.compression.gptq import Grid, choose_grid, damped, feedback, gptq, refine, row_blocks

DAMPING = 0.01
"""Of H's mean diagonal, added to all of it."""

SAMPLED = 8
"""Of how many tokens one tells how large errors in front of a layer are; what they have in common with its inputs is from all."""


@attrs.frozen
class Cut:
    """What becomes 0 in a matrix: a share of its numbers in a pattern, found by an algorithm of `PRUNINGS` other than "auto"."""

    sparsity: float
    pattern: Pattern = Pattern()
    algorithm: str = "alps"


@attrs.frozen
class Choice:
    """What is done to a matrix. match: how far it makes up for changes in front of it, 0 to 1. clip: AWQ may narrow its ranges.
    objective: one of `recipe.OBJECTIVES`."""

    cut: Cut | None = None
    codes: QuantizeRecipe | None = None
    match: float = 1.0
    clip: bool = True
    objective: str = "loss"

    @property
    def calibrated(self) -> bool:
        """Whether statistics change what is done."""
        pruned = self.cut is not None and self.cut.algorithm != "magnitude"
        return pruned or (self.codes is not None and self.codes.algorithm != "rtn")


@attrs.frozen(eq=False)
class Statistics:
    """What is known of a layer that computes y = W x + r, sums over all tokens, float64.

    h: x xᵀ [k, k]. tokens: their number. d = u - x and e = v - r say how x and r were in the unchanged model. cross: d xᵀ [k, k] and square:
    d dᵀ [k, k]; None where x is unchanged. rest: e xᵀ [n, k], both: e dᵀ [n, k] and own: e² [n]; None where r is unchanged or there is none. square, both and
    own are of a sample of the tokens, scaled.
    """

    h: np.ndarray
    tokens: int
    cross: np.ndarray | None = None
    square: np.ndarray | None = None
    rest: np.ndarray | None = None
    both: np.ndarray | None = None
    own: np.ndarray | None = None

    def of_rows(self, rows: np.ndarray) -> Statistics:
        """Those of some of the outputs."""
        rest, both, own = (None if v is None else v[rows] for v in (self.rest, self.both, self.own))
        return attrs.evolve(self, rest=rest, both=both, own=own)

    def aim(self, w: np.ndarray, solid: np.ndarray, match: float) -> np.ndarray:
        """The matrix float64 [n, k] that, reading x and added to r, comes nearest to the unchanged outputs W u + v. solid: H, damped.

        What is missing is regressed on x. A regression on k inputs explains k / tokens of pure noise, too, so that each row is shrunk by
        the share of what it explains that noise would account for.
        """
        w = w.astype(np.float64)
        missing, size = np.zeros_like(w), np.zeros(len(w))
        if self.cross is not None and self.square is not None:
            missing += w @ self.cross
            size += np.einsum("nk,nk->n", w @ self.square, w)
        if self.rest is not None and self.own is not None:
            missing += self.rest
            size += self.own
            if self.both is not None:
                size += 2 * np.einsum("nk,nk->n", self.both, w)
        if not match or not missing.any():
            return w
        step = np.linalg.solve(solid, missing.T).T
        explained = np.maximum(np.einsum("nk,nk->n", step, missing), 1e-300)
        noise = w.shape[1] / self.tokens * np.maximum(size - explained, 0)
        return w + match * np.maximum(1 - noise / explained, 0)[:, None] * step


def gather(layer: Node, now: Run, then: Run) -> Statistics:
    """The statistics of a layer in a run, beside that of the unchanged model."""
    x, residual = layer.operands[0], layer.operands[3] if layer.op is ops.linear else None
    assert x is not None
    n, k = int(layer.shape[-1]), int(x.shape[-1])
    moved = now[x] is not then[x]
    shifted = residual is not None and now[residual] is not then[residual]
    h, cross, square = (np.zeros((k, k)) for _ in range(3))
    rest, both, own = np.zeros((n, k)), np.zeros((n, k)), np.zeros(n)
    tokens = 0
    for call, whole in enumerate(now[x]):
        a = whole.reshape(-1, k)
        h += a.T @ a
        tokens += len(a)
        d = then[x][call].reshape(-1, k) - a if moved else None
        if d is not None:
            cross += d.T @ a
            square += SAMPLED * (d[::SAMPLED].T @ d[::SAMPLED])
        if shifted and residual is not None:
            e = np.broadcast_to(then[residual][call] - now[residual][call], (*whole.shape[:-1], n)).reshape(-1, n)
            rest += e.T @ a
            own += SAMPLED * np.einsum("tn,tn->n", e[::SAMPLED], e[::SAMPLED])
            if d is not None:
                both += SAMPLED * (e[::SAMPLED].T @ d[::SAMPLED])
    return Statistics(
        h, tokens, *((cross, square) if moved else (None, None)),
        *((rest, both if moved else None, own) if shifted else (None, None, None)),
    )  # fmt: skip


@attrs.frozen(eq=False)
class Solved:
    """A compressed matrix. mask: bool [n, k], what stays. Numbers [n, k] in the dtype of storage, or codes of k inputs, packed as the scheme
    does it (uint8 [n, bytes]), and their grid."""

    mask: np.ndarray | None = None
    numbers: np.ndarray | None = None
    grid: Grid | None = None
    codes: np.ndarray | None = None
    k: int = 0

    @property
    def values(self) -> np.ndarray:
        """What the matrix is in computing, float32 [n, k]."""
        if self.grid is not None and self.codes is not None:
            return self.grid.values(self.grid.scheme.unpack(self.codes, self.k), self.mask)
        assert self.numbers is not None
        return self.numbers.astype(np.float32)

    def arrays(self) -> dict[str, np.ndarray]:
        """All of it as arrays."""
        found = {} if self.mask is None else {"mask": self.mask}
        if self.numbers is not None:
            found["numbers"] = self.numbers
        if self.grid is not None and self.codes is not None:
            found |= {"codes": self.codes, "scales": self.grid.scales, "scheme": np.array(self.grid.scheme.name)}
            found |= {"group": np.array(self.grid.group), "k": np.array(self.k)} | (
                {} if self.grid.zeros is None else {"zeros": self.grid.zeros}
            )
        return found

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Solved:
        """What `arrays` gave."""
        grid = None
        if "codes" in arrays:
            kind = schemes.scheme(str(arrays["scheme"]))
            grid = Grid(kind, int(arrays["group"]), arrays["scales"], arrays.get("zeros"))
        return cls(arrays.get("mask"), arrays.get("numbers"), grid, arrays.get("codes"), int(arrays.get("k", 0)))

    def nodes(self, matrix: Node, name: str, weights: dict[str, Storage]) -> Node:
        """The node that takes the matrix' place; what it stores is added to `weights` under names that begin with `name`."""

        def stored(what: str, array: np.ndarray) -> Node:
            label = f"{name}.{what}"
            while label in weights:  # one stored tensor may give several matrices
                label += "'"
            weights[label] = ArrayStorage(np.ascontiguousarray(array))
            return weight(label, TensorType(array.shape, str(array.dtype)), matrix.source)

        if self.grid is None or self.codes is None:
            assert self.mask is not None and self.numbers is not None
            values, bits = masks.compress(self.numbers, self.mask)
            operands: Sequence[Node | None] = (stored("values", values), stored("mask", bits))
            return ops.expand.make(operands, {"k": self.mask.shape[1]}, matrix.source)
        kind = self.grid.scheme
        scales, whole = schemes.encode_scales(self.grid.scales, kind.scale)
        zeros = None if self.grid.zeros is None else stored("zeros", self.grid.zeros.astype(np.uint8))
        packed, present = self.codes, None
        if self.mask is not None:
            packed, present = masks.compress_codes(kind.unpack(self.codes, self.k), self.mask, kind.name)
        attributes = {
            "scheme": kind.name,
            "k": self.k,
            "group": self.grid.group,
            "whole": whole,
            "dtype": matrix.dtype,
        }
        operands = (
            stored("codes", packed),
            stored("scales", scales),
            zeros,
            None if present is None else stored("mask", present),
        )
        return ops.dequantize.make(operands, attributes, matrix.source)


def solve(
    w: np.ndarray, choice: Choice, statistics: Statistics | None, dtype: str, mask: np.ndarray | None = None,
    curvature: np.ndarray | None = None,
) -> Solved:  # fmt: skip
    """Compress w [n, k], float32 or without statistics, by its numbers alone, floats of any width. dtype: of numbers that aren't stored as codes. mask: of a
    matrix that is pruned already, and only becomes codes. curvature: how errors in outputs count [n, n], if not alike."""
    if statistics is None or not choice.calibrated:
        if choice.cut is not None:
            mask = prune.magnitude(widen(w, "float32"), choice.cut.pattern, choice.cut.sparsity)
        kept = w if mask is None else np.where(mask, w, w.dtype.type(0))
        if choice.codes is None:
            return _in_floats(kept, mask, dtype)
        grid = choose_grid(
            kept,
            schemes.scheme(choice.codes.scheme),
            choice.codes.inputs_per_scale,
            symmetric=choice.codes.symmetric,
        )
        return _in_codes(grid, grid.nearest(kept), mask)
    solid = damped(statistics.h, DAMPING)
    counts = curvature.astype(np.float64) if curvature is not None and choice.objective == "loss" else None
    original = w
    if choice.cut is not None:
        aim = statistics.aim(w, solid, choice.match)
        found, mask = _pruned(w, aim, solid, choice.cut, counts)
        kept = np.where(mask, found, 0)
        if choice.codes is None:
            return _in_floats(kept, mask, dtype)
        w = kept.astype(np.float32)
        del aim, found, kept
    return _quantized(w, original, statistics, solid, mask, choice, counts)


def _pruned(
    w: np.ndarray, aim: np.ndarray, solid: np.ndarray, cut: Cut, curvature: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """A mask, and a matrix float64 that holds what stays there (and of algorithms that only choose a mask, everything)."""
    if cut.algorithm == "magnitude":
        return w.astype(np.float64), prune.magnitude(w, cut.pattern, cut.sparsity)
    if cut.algorithm == "wanda":
        return w.astype(np.float64), prune.wanda(w, solid, cut.pattern, cut.sparsity)
    if cut.algorithm == "sparsegpt":
        start, mask = prune.sparsegpt(aim, solid, cut.pattern, cut.sparsity)
        return (start if curvature is None else prune.solve_on(aim, solid, mask, curvature, tolerance=1e-4)), mask
    mask = prune.admm(aim, solid, cut.pattern, cut.sparsity, curvature)
    return prune.solve_on(aim, solid, mask, curvature), mask


def _quantized(
    w: np.ndarray, original: np.ndarray, statistics: Statistics, solid: np.ndarray, mask: np.ndarray | None, choice: Choice,
    curvature: np.ndarray | None,
) -> Solved:  # fmt: skip
    """Codes for a matrix w, 0 outside of the mask: by GPTQ and its refinement, towards what the original one should become; or the
    nearest."""
    rule = choice.codes
    assert rule is not None
    kind, group, h = schemes.scheme(rule.scheme), rule.inputs_per_scale, statistics.h
    if rule.algorithm == "rtn":
        grid = choose_grid(w, kind, group, symmetric=rule.symmetric)
        return _in_codes(grid, grid.nearest(w), mask)
    if rule.algorithm == "awq":
        grid = awq.clipped_grid(w, kind, group, h, symmetric=rule.symmetric, steps=10 if choice.clip else 1)
        return _in_codes(grid, grid.nearest(w), mask)
    grid = choose_grid(w, kind, group, symmetric=rule.symmetric, importance=np.diag(h), steps=rule.search)
    order, factor = feedback(h, DAMPING)
    scales, codes = grid.scales.copy(), np.empty(w.shape, np.uint8)

    def solve_rows(rows: np.ndarray, aims: np.ndarray) -> np.ndarray:
        kept = None if mask is None else mask[rows]
        begin = aims if kept is None else prune.solve_on(aims, solid, kept, tolerance=1e-6)
        part = grid.rows(rows)
        part, codes[rows] = refine(aims, solid, part, gptq(begin, order, factor, part, kept), kept, sweeps=rule.refine)
        scales[rows] = part.scales
        return part.values(codes[rows], kept)

    if curvature is not None:
        in_turn(statistics.aim(original, solid, choice.match), curvature, solve_rows)
    else:
        for rows in row_blocks(*w.shape):
            solve_rows(rows, statistics.of_rows(rows).aim(original[rows], solid, choice.match))
    return _in_codes(attrs.evolve(grid, scales=scales), codes, mask)


def _in_floats(w: np.ndarray, mask: np.ndarray | None, dtype: str) -> Solved:
    return Solved(mask, w.astype(numpy_dtype(dtype)))


def _in_codes(grid: Grid, codes: np.ndarray, mask: np.ndarray | None) -> Solved:
    kind, (n, k) = grid.scheme, codes.shape
    packed = np.empty((n, kind.row_bytes(k)), np.uint8)

    def pack(rows: slice) -> None:
        packed[rows] = kind.pack(codes[rows])

    in_parts(n, k, pack)
    return Solved(mask, None, grid, packed, k)
