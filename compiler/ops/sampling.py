"""Choosing tokens by arithmetic of integers, which every machine does alike: the same logits and numbers give the same tokens everywhere.

A token's probability, before all are divided by their sum, is its mass: 2^40 e^-d for a logit that lies d below the highest one, rounded to an
integer, so that sums don't depend on their order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from jisu.compiler.graph import defop
from jisu.compiler.types import TensorType, TupleType, is_float, require, same_dim

Array = np.ndarray

PARTS = 31
"""Bits of a share of one: `uniform` is a number of so many."""
ONE = 40
"""Bits of the highest mass, 2^40, so that the sum of 2^22 of them may be multiplied."""
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


def weigh(values: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array) -> tuple[Array, Array]:
    """The masses int64 [*b, k] of tokens that may be chosen, 0 of others, and whether no token behind them may be: see `draw`."""
    size, place = values.shape[-1], np.arange(values.shape[-1])
    first = place == 0
    with np.errstate(all="ignore"):
        values = values.astype(np.float32)
        mass = masses((values[..., :1] - values) / temperature[..., None])
        mass = np.where(first, np.int64(1 << ONE), mass)
        limited = (top_k > 0) & (top_k <= size)
        at = np.where(limited, top_k - 1, size - 1)[..., None]
        out = limited[..., None] & ~first & (values < np.take_along_axis(values, at, -1))
        whole = np.isfinite(values[..., 0]) & (out[..., -1] | (mass[..., -1] == 0))
        kept = np.where(out, 0, mass)
        before = np.cumsum(kept, -1) - kept
        nucleus = share(kept.sum(-1), units(top_p, PARTS))[..., None]
        kept = np.where(first | (before < nucleus), kept, 0)
        return np.where(kept >= units(min_p, ONE)[..., None], kept, 0), whole


def _draw(
    values: Array, tokens: Array, uniform: Array, temperature: Array, top_k: Array, top_p: Array, min_p: Array
) -> tuple[Array, Array]:
    weights, whole = weigh(values, temperature, top_k, top_p, min_p)
    reached = np.cumsum(weights, -1)
    aim = share(reached[..., -1], uniform & (2**PARTS - 1))
    greedy = temperature == 0
    place = np.where(greedy, 0, np.argmax(reached > aim[..., None], -1))
    return np.take_along_axis(tokens, place[..., None], -1)[..., 0], whole | greedy


def _axes(values: TensorType, *rest: TensorType, **attributes: Any) -> str:
    rows = " ".join(f"a{i}" for i in range(values.rank - 1))
    return f"{rows} k, {rows} k, {rows}, {rows}, {rows}, {rows}, {rows} -> {rows}, {rows}"


def _samples() -> Iterator[tuple[tuple[str | None, ...], dict[str, Any]]]:
    for rows in ("2", "2, 1", "3, 2"):
        whole, real = f"int64[{rows}]", f"float32[{rows}]"
        yield (f"float32[{rows}, 5]", f"int64[{rows}, 5]", whole, real, whole, real, real), {}


@defop(meaning=_draw, axes=_axes, flops=40, samples=_samples)
def draw(
    values: TensorType,
    tokens: TensorType,
    uniform: TensorType,
    temperature: TensorType,
    top_k: TensorType,
    top_p: TensorType,
    min_p: TensorType,
) -> TupleType:
    """A token of each row, int64 [*b], chosen from the highest logits [*b, k], from the highest on, and their tokens int64 [*b, k]; and whether
    those behind them could not have been chosen, bool [*b]: where they could, the choice means nothing.

    Per row: uniform int64, 31 random bits, takes the token in whose part of the sum of all masses it falls. temperature float32 divides logits;
    0 takes the first one. top_k int64: tokens whose logits are less than the k-th don't count; 0 for no such limit. top_p float32: nor those
    before which so much of the mass lies; then min_p float32: nor those less likely than so much of the likeliest.
    """
    require(is_float(values.dtype) and values.dtype != "float64", f"values must be float32 or shorter, got {values}")
    for x, like, dtype in (
        (tokens, values.shape, "int64"),
        *((x, values.shape[:-1], "int64") for x in (uniform, top_k)),
        *((x, values.shape[:-1], "float32") for x in (temperature, top_p, min_p)),
    ):
        fits = x.rank == len(like) and all(same_dim(a, b) for a, b in zip(x.shape, like, strict=True))
        require(fits and x.dtype == dtype, f"got {x} beside values {values}")
    require(values.rank > 1 and values.shape[-1] != 0, f"there is nothing to choose from in {values}")
    row = tokens.with_shape(*values.shape[:-1])
    return TupleType((row, row.with_dtype("bool")))
