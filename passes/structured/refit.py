"""Which units cost a layer's outputs least, and the weights that make up for them: least squares on calibration statistics.

A layer maps inputs x to W x. With H = sum of x xᵀ over tokens and C = sum of y xᵀ, y being what it read in the unchanged model, the
weights on the inputs S that stay which give its old outputs best are W C[:, S] H[S, S]^-1. Which units go is decided as in ZipLM
(Kurtic et al., 2023): removing the inputs B from the best weights costs tr(W_B (H^-1[B, B])^-1 W_Bᵀ), where what is left has made up
for it already. All arrays are NumPy's float64: W [n, k], H and C [k, k].
"""

from __future__ import annotations

from collections.abc import Sequence

import attrs
import numpy as np

DAMPING = 1e-2
"""Of H's mean diagonal: how much the old weights count beside what the tokens say."""

ROUNDS = 64
"""Steps in which units are removed, the order being computed anew after each."""


@attrs.frozen(eq=False)
class Statistics:
    """h, cross: H and C. constant: whether the last input is always 1 (its weight is the bias) and always stays."""

    h: np.ndarray
    cross: np.ndarray
    constant: bool

    @property
    def damping(self) -> np.ndarray:
        """float64 [k]: what is added to the diagonal of H."""
        diagonal = np.diag(self.h)
        size = len(diagonal) - self.constant
        mean = float(diagonal[:size].mean())
        found = np.full(len(diagonal), DAMPING * mean if mean > 0 else 1.0)
        found[size:] = 0.0
        return found


def collect(now: Sequence[np.ndarray], then: Sequence[np.ndarray], axis: int, *, constant: bool) -> Statistics:
    """Statistics of inputs that lie along `axis` of each array; `then`: those in the unchanged model."""

    def rows(x: np.ndarray) -> np.ndarray:
        found = np.moveaxis(x, axis, -1).reshape(-1, x.shape[axis]).astype(np.float64)
        return np.concatenate([found, np.ones((len(found), 1))], 1) if constant else found

    k = now[0].shape[axis] + constant
    h, cross = np.zeros((k, k)), np.zeros((k, k))
    for x, y in zip(now, then, strict=True):
        a = rows(x)
        product = a.T @ a
        h += product
        cross += product if y is x else rows(y).T @ a
    return Statistics(h, cross, constant)


def solve(w: np.ndarray, found: Statistics, kept: np.ndarray) -> np.ndarray:
    """The weights [n, k], zero outside of `kept` (bool [k]), that give the old outputs best."""
    extra = found.damping[kept]
    right = w @ found.cross[:, kept] + w[:, kept] * extra
    result = np.zeros_like(w)
    result[:, kept] = np.linalg.solve(found.h[np.ix_(kept, kept)] + np.diag(extra), right.T).T
    return result


def activity(w: np.ndarray, found: Statistics, units: Sequence[np.ndarray]) -> np.ndarray:
    """What each unit (the positions of its inputs) adds to the outputs, squared: tr(W_B H[B, B] W_Bᵀ), as Wanda (Sun et al., 2023)."""
    return np.array([np.einsum("nb,bc,nc->", w[:, b], found.h[np.ix_(b, b)], w[:, b], optimize=True) for b in units])


def cheapest(w: np.ndarray, found: Statistics, units: Sequence[np.ndarray], count: int) -> list[int]:
    """`count` units whose removal costs the outputs least, taken one after the other."""
    everything = np.ones(w.shape[1], bool)
    w = solve(w, found, everything)
    inverse = np.linalg.inv(found.h + np.diag(found.damping))
    alive, gone = list(range(len(units))), list[int]()
    while len(gone) < count:
        costs = _costs(w, inverse, [units[i] for i in alive])
        step = min(-(-count // ROUNDS), count - len(gone))
        chosen = [alive[i] for i in np.argsort(costs, kind="stable")[:step]]
        b = np.concatenate([units[i] for i in chosen])
        left = np.linalg.solve(inverse[np.ix_(b, b)], inverse[b])
        w = w - w[:, b] @ left
        inverse = inverse - inverse[:, b] @ left
        gone += chosen
        alive = [i for i in alive if i not in set(chosen)]
    return gone


def _costs(w: np.ndarray, inverse: np.ndarray, units: Sequence[np.ndarray]) -> np.ndarray:
    if all(len(b) == 1 for b in units):
        single = np.concatenate(units)
        return np.square(w[:, single]).sum(0) / np.diag(inverse)[single]
    return np.array([np.sum(np.linalg.solve(inverse[np.ix_(b, b)], w[:, b].T) * w[:, b].T) for b in units])
