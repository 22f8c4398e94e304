"""Choosing tokens by arithmetic of integers, which every machine does alike: the same logits and numbers give the same tokens everywhere.

A token's probability, before all are divided by their sum, is its mass: 2^40 e^-d for a logit that lies d below the highest one, rounded to an
integer, so that sums don't depend on their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, cast

import numpy as np

from jisu.compiler.graph import defop
from jisu.compiler.types import TensorType, TupleType, is_float, require, same_dim

Array = np.ndarray

PARTS = 31
"""Bits of a share of one: `uniform` is a number of so many."""
ONE = 40
"""Bits of the highest mass, 2^40."""
MOST = 1 << 22
"""Tokens of a row, so that the sum of their masses may be multiplied."""
FARTHEST = 32.0
"""How far below the highest a logit may lie before its mass is 0 (it is from 27.8 on)."""
FINE = 26
"""Bits behind the point of that distance."""
LOG2_E = round(math.log2(math.e) * 2**PARTS)
POWERS = tuple(round(math.log(2) ** k / math.factorial(k) * 2**PARTS) for k in range(10))
"""The series of 2^-x for x from 0 to 1, whose terms alternate."""


_PIECE = 1 << 14  # distances, whose sums are near the processor while they are worked on


def masses(distance: Array) -> Array:
    """2^40 e^-d, int64, of distances float32; NaN has none."""
    flat = distance.reshape(-1)
    found = np.empty(flat.size, np.int64)
    for begin in range(0, flat.size, _PIECE):
        found[begin : begin + _PIECE] = _masses(flat[begin : begin + _PIECE])
    return found.reshape(distance.shape)


def _masses(distance: Array) -> Array:
    near = np.where(distance < FARTHEST, distance, np.float32(FARTHEST))
    near = np.where(near > 0, near, np.float32(0))
    power = ((near * np.float32(2**FINE)).astype(np.int64) * LOG2_E) >> FINE
    part = power & (2**PARTS - 1)
    total = np.full_like(part, POWERS[-1])
    for term in POWERS[-2::-1]:
        total *= part
        total >>= PARTS
        np.subtract(term, total, out=total)
    return (total << (ONE - PARTS)) >> (power >> PARTS)


def share(total: Any, parts: Any) -> Any:
    """floor(total * parts / 2^31) of arrays or numbers int64 total < 2^62 and 0 <= parts <= 2^31."""
    low = total & (2**PARTS - 1)
    return (total >> PARTS) * parts + ((low * parts) >> PARTS)


def units(value: Any, bits: int) -> Any:
    """A float32 from 0 to 1 in parts of 2^-bits; what lies outside becomes 0 or 1."""
    inside = np.where(value > 0, np.minimum(value, np.float32(1)), np.float32(0))
    return (inside * np.float32(2**bits)).astype(np.int64)


def candidates(
    logits: Array, temperature: np.float32, top_k: int, top_p: np.float32, min_p: np.float32
) -> tuple[Array, Array]:
    """The tokens that may be chosen, int64 [n] in order, with their masses, int64 [n]; see `draw`. logits: float32 [V], the highest one finite.

    Top-p: Holtzman et al., 2019, https://arxiv.org/abs/1904.09751. Min-p: Nguyen et al., 2024, https://arxiv.org/abs/2407.01082.
    """
    kept, tokens = logits, np.arange(logits.size)
    if 0 < top_k < logits.size:
        tokens = np.flatnonzero(logits >= _kth_largest(logits, top_k))
        kept = logits[tokens]
    highest = kept.max()
    with np.errstate(all="ignore"):
        mass = np.where(kept == highest, np.int64(1 << ONE), masses((highest - kept) / temperature))
    nucleus = units(top_p, PARTS)
    if nucleus < 1 << PARTS:
        inside = kept >= _reaching(kept, mass, max(int(share(mass.sum(), nucleus)), 1))
        tokens, mass = tokens[inside], mass[inside]
    likely = mass >= units(min_p, ONE)
    return tokens[likely], mass[likely]


def _kth_largest(values: Array, k: int) -> np.float32:
    """The k-th largest of values [V]."""
    groups = values.size // 128
    if groups > 4 * k:  # k groups have a maximum that is no less than the k-th largest maximum: all below it is out
        peaks = values[: groups * 128].reshape(128, groups).max(axis=0)
        values = values[values >= np.partition(peaks, groups - k)[groups - k]]
    return cast(np.float32, np.partition(values, values.size - k)[values.size - k])


def _reaching(logits: Array, mass: Array, goal: int) -> np.float32:
    """The highest of logits [n] such that the mass of all that aren't lower reaches a goal."""
    count = 256
    while True:
        best = np.arange(logits.size)
        if count < logits.size:
            best = np.flatnonzero(logits >= _kth_largest(logits, count))
        best = best[np.argsort(-logits[best])]
        reached = np.cumsum(mass[best])
        if reached[-1] >= goal:
            return cast(np.float32, logits[best[np.searchsorted(reached, goal)]])
        count *= 16


def choose(
    logits: Array, uniform: int, temperature: np.float32, top_k: int, top_p: np.float32, min_p: np.float32
) -> int:
    """The token of one row; see `draw`. logits: [V], the highest one finite; temperature > 0."""
    tokens, mass = candidates(logits.astype(np.float32, copy=False), temperature, top_k, top_p, min_p)
    reached = np.cumsum(mass)
    aim = share(reached[-1], np.int64(uniform) & (2**PARTS - 1))
    return int(tokens[np.searchsorted(reached, aim, side="right")])


def _draw(
    logits: Array, uniform: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array
) -> tuple[Array, Array]:
    rows = logits.reshape(-1, logits.shape[-1]).astype(np.float32)
    chosen = rows.argmax(-1)
    greedy = temperature.reshape(-1) == 0
    finite = np.isfinite(rows.max(-1))
    options = [x.reshape(-1) for x in (uniform, temperature, top_k, top_p, min_p)]
    for row in np.flatnonzero(finite & ~greedy):
        chosen[row] = choose(rows[row], *(x[row] for x in options))
    return chosen.astype(np.int64).reshape(uniform.shape), (finite | greedy).reshape(uniform.shape)


def _axes(logits: TensorType, *rest: TensorType, **attributes: Any) -> str:
    rows = " ".join(f"a{i}" for i in range(logits.rank - 1))
    return f"{rows} k, {rows}, {rows}, {rows}, {rows}, {rows} -> {rows}, {rows}"


def _samples() -> Iterator[tuple[tuple[str | None, ...], dict[str, Any]]]:
    for rows in ("2", "2, 1", "3, 2"):
        whole, real = f"int64[{rows}]", f"float32[{rows}]"
        yield (f"float32[{rows}, 5]", whole, real, whole, real, real), {}


@defop(meaning=_draw, axes=_axes, flops=40, samples=_samples)
def draw(
    logits: TensorType,
    uniform: TensorType,
    temperature: TensorType,
    top_k: TensorType,
    top_p: TensorType,
    min_p: TensorType,
) -> TupleType:
    """A token of each row, int64 [*b], drawn by its logits [*b, V], and whether they are a distribution, bool [*b]: where the highest isn't finite
    none can be drawn, and the token is the first of the highest (NaN counts as such).

    Per row: uniform int64, 31 random bits, takes the token in whose part of the sum of all masses it falls, tokens being in order. temperature
    float32 divides logits; 0 takes the first of the highest. top_k int64: tokens whose logits are less than the k-th don't count; 0 for no such
    limit. top_p float32: nor those of which so much of the mass has higher logits (one always counts); then min_p float32: nor those less likely
    than so much of the likeliest. Equal logits count alike.
    """
    require(is_float(logits.dtype) and logits.dtype != "float64", f"logits must be float32 or shorter, got {logits}")
    require(logits.rank > 1 and logits.shape[-1] != 0, f"there is nothing to choose from in {logits}")
    size = logits.shape[-1]
    require(not isinstance(size, int) or size <= MOST, f"at most {MOST} tokens can be chosen from, got {logits}")
    for x, dtype in (
        *((x, "int64") for x in (uniform, top_k)),
        *((x, "float32") for x in (temperature, top_p, min_p)),
    ):
        fits = x.rank == logits.rank - 1 and all(same_dim(a, b) for a, b in zip(x.shape, logits.shape, strict=False))
        require(fits and x.dtype == dtype, f"got {x} beside logits {logits}")
    return TupleType((uniform, uniform.with_dtype("bool")))
