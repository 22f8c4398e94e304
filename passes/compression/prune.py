"""Masks of one matrix, and the numbers that are left: magnitude, Wanda, SparseGPT, and reconstruction by ADMM.

A layer maps inputs x to W x. With H = sum of x xᵀ over calibration tokens, replacing W by Q costs the layer tr((W - Q) H (W - Q)ᵀ)
in its outputs, and the model tr(C (W - Q) H (W - Q)ᵀ) if errors in outputs count as C says (see `curvature`). All arrays here are
NumPy's: W [n, k] float32 or float64, H [k, k] and C [n, n] float64, masks bool [n, k] (True: kept).
"""

from __future__ import annotations

import numpy as np

from jisu.compiler.pattern import Pattern


def magnitude(w: np.ndarray, pattern: Pattern, sparsity: float) -> np.ndarray:
    """The mask that keeps the largest numbers."""
    return pattern.choose(np.abs(w), sparsity)


def wanda(w: np.ndarray, h: np.ndarray, pattern: Pattern, sparsity: float) -> np.ndarray:
    """The mask of Wanda (Sun et al., 2023): |w| times the norm of its input, compared within each output."""
    return pattern.choose(np.abs(w) * np.sqrt(np.diag(h)), sparsity, by_row=True)


def sparsegpt(
    w: np.ndarray, h: np.ndarray, pattern: Pattern, sparsity: float, *, block: int = 128
) -> tuple[np.ndarray, np.ndarray]:
    """The matrix float64 [n, k] of SparseGPT (Frantar & Alistarh, 2023) and its mask: inputs from first to last, each one's error made
    up for by those still to come; what stays is chosen block by block (N:M: run by run) from w² / [H^-1]². h: damped.
    """
    n, k = w.shape
    inverse = np.linalg.inv(h)
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T
    spread = np.diag(factor)
    rest = w.astype(np.float64)
    found, mask = np.zeros((n, k)), np.empty((n, k), bool)
    step = block - block % np.lcm(max(pattern.of, 1), pattern.columns) or pattern.columns
    for begin in range(0, k, step):
        end = min(begin + step, k)
        errors = np.empty((n, end - begin))
        if not pattern.of:
            mask[:, begin:end] = pattern.choose((rest[:, begin:end] / spread[begin:end]) ** 2, sparsity)
        for j in range(begin, end):
            if pattern.of and j % pattern.of == 0:
                run = slice(j, j + pattern.of)
                mask[:, run] = pattern.choose((rest[:, run] / spread[run]) ** 2, sparsity)
            found[:, j] = np.where(mask[:, j], rest[:, j], 0)
            errors[:, j - begin] = (rest[:, j] - found[:, j]) / factor[j, j]
            rest[:, j + 1 : end] -= np.outer(errors[:, j - begin], factor[j, j + 1 : end])
        rest[:, end:] -= errors @ factor[begin:end, end:]
    return found, mask


def admm(
    w: np.ndarray, h: np.ndarray, pattern: Pattern, sparsity: float, curvature: np.ndarray | None = None, *,
    growth: float = 1.1, rounds: int = 300,
) -> np.ndarray:  # fmt: skip
    """The mask of ALPS (Meng et al., 2024): the matrix nearest in outputs and its nearest sparse one are drawn together by ADMM, the
    harder the less the mask still changes. h: damped. curvature: C; without, all outputs count alike.
    """
    scale = np.sqrt(np.diag(h))
    values, vectors = np.linalg.eigh(h / np.outer(scale, scale))
    costs = np.maximum(values, 1e-12)
    aim = w * scale  # in the basis in which every input, and every output, has norm 1
    turned: np.ndarray | None = None
    if curvature is not None:
        size = np.sqrt(np.diag(curvature))
        values, turned = np.linalg.eigh(curvature / np.outer(size, size))
        costs = np.maximum(values, 1e-12)[:, None] * costs
        aim = size[:, None] * aim

    def turn(x: np.ndarray) -> np.ndarray:
        """To the eigenvectors of H and C."""
        return x @ vectors if turned is None else turned.T @ (x @ vectors)

    def back(x: np.ndarray) -> np.ndarray:
        return x @ vectors.T if turned is None else turned @ (x @ vectors.T)

    target = turn(aim) * costs
    sparse, dual, rho = aim.copy(), np.zeros_like(aim), 0.1
    mask = np.ones(w.shape, bool)
    for i in range(rounds):
        free = back((target + turn(rho * sparse - dual)) / (costs + rho))
        moved = free + dual / rho
        before, mask = mask, pattern.choose(moved**2, sparsity)
        sparse = np.where(mask, moved, 0)
        dual += rho * (free - sparse)
        if i % 3 == 2:
            changed = np.count_nonzero(mask != before) / mask.size
            if not changed and i > 20:
                break
            rho *= growth if changed < 0.1 else growth**2
    return mask


def solve_on(
    w: np.ndarray, h: np.ndarray, mask: np.ndarray, curvature: np.ndarray | None = None, *, rounds: int = 200, tolerance: float = 1e-10
) -> np.ndarray:  # fmt: skip
    """The matrix float64 [n, k], zero outside of the mask, of least cost: conjugate gradients, on each row by itself or, with C, on
    all rows together.

    h: damped. Stops when the gradient's norm has fallen by `tolerance` (squared).
    """
    diagonal = np.diag(h) if curvature is None else np.outer(np.diag(curvature), np.diag(h))
    axis = 1 if curvature is None else None

    def masked(x: np.ndarray) -> np.ndarray:
        x = x @ h
        return np.where(mask, x if curvature is None else curvature @ x, 0)

    def dot(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return np.asarray((a * b).sum(axis, keepdims=True))

    q = np.where(mask, w, 0).astype(np.float64)
    residual = masked(w - q)
    z = residual / diagonal
    direction = z.copy()
    rz = dot(residual, z)
    start = np.maximum(rz, 1e-300)
    for _ in range(rounds):
        spread = masked(direction)
        bend = dot(direction, spread)
        step = np.where(bend > 0, rz / np.maximum(bend, 1e-300), 0)
        q += step * direction
        residual -= step * spread
        z = residual / diagonal
        new = dot(residual, z)
        if (new <= tolerance * start).all():
            break
        direction = z + (new / np.maximum(rz, 1e-300)) * direction
        rz = new
    return q
