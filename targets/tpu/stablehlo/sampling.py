"""The emitter that chooses tokens; see `jisu.compiler.ops.sampling`, whose arithmetic this is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jisu.compiler import ops
from jisu.compiler.graph import Op
from jisu.compiler.ops.sampling import FARTHEST, FINE, LOG2_E, ONE, PARTS, POWERS
from jisu.targets.tpu.stablehlo.build import Body, Value

_MASK = (1 << PARTS) - 1


def _masses(distance: Value) -> Value:
    near = (distance < FARTHEST).select(distance, FARTHEST)
    near = (near > 0).select(near, 0)
    power = ((near * 2.0**FINE).astype("int64") * LOG2_E) >> FINE
    part = power & _MASK
    total = part * 0 + POWERS[-1]
    for term in POWERS[-2::-1]:
        total = -((total * part) >> PARTS) + term
    return (total << (ONE - PARTS)).binary("shift_right_arithmetic", power >> PARTS)


def _share(total: Value, parts: Value) -> Value:
    return (total >> PARTS) * parts + (((total & _MASK) * parts) >> PARTS)


def _units(value: Value, bits: int) -> Value:
    inside = (value < 1).select(value, 1)
    return ((value > 0).select(inside, 0) * 2.0**bits).astype("int64")


def _draw(
    body: Body,
    values: Value,
    tokens: Value,
    uniform: Value,
    temperature: Value,
    top_k: Value,
    top_p: Value,
    min_p: Value,
) -> tuple[Value, Value]:
    shape, last = values.shape, values.rank - 1
    size = shape[last]

    def along(x: Value) -> Value:
        return x.expand(last).broadcast(shape)

    values = values.astype("float32")
    place = body.iota(shape, last, "int64")
    highest = values.part(last, 0, 1)
    mass = _masses((highest.broadcast(shape) - values) / along(temperature))
    first = place.equals(0)
    mass = first.select(1 << ONE, mass)
    limited = (top_k > 0) & (top_k <= size)
    at_limit = place.equals(along(limited.select(top_k, size) - 1))
    # The one number at the limit, of which no sum changes a bit.
    least = at_limit.select(values, 0.0).sum(last)
    out = along(limited) & ~first & (values < along(least))
    ends = (out | mass.equals(0)).pick(last, size - 1)
    whole = highest.pick(last, 0).isfinite() & ends
    kept = out.select(0, mass)
    nucleus = _share(kept.sum(last), _units(top_p, PARTS))
    inside = first | ((kept.scan("add", last) - kept) < along(nucleus))
    kept = (inside & (kept >= along(_units(min_p, ONE)))).select(kept, 0)
    reached = kept.scan("add", last)
    aim = _share(kept.sum(last), uniform & _MASK)
    greedy = temperature.equals(0)
    passed = (reached <= along(aim)).astype("int64").sum(last)
    chosen = place.equals(along(greedy.select(0, passed))).select(tokens, 0).sum(last)
    return chosen, whole | greedy


EMITTERS: Mapping[Op, Callable[..., Any]] = {ops.draw: _draw}
