"""The emitter that chooses tokens; see `jisu.compiler.ops.sampling`, whose arithmetic this is."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jisu.compiler import ops
from jisu.compiler.graph import Op
from jisu.compiler.ops.sampling import FARTHEST, FINE, LOG2_E, ONE, PARTS, POWERS
from jisu.targets.tpu.stablehlo.build import Body, Value
from jisu.targets.tpu.stablehlo.moves import sort

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
    body: Body, logits: Value, uniform: Value, temperature: Value, top_k: Value, top_p: Value, min_p: Value
) -> tuple[Value, Value]:
    shape, last = logits.shape, logits.rank - 1
    size = shape[last]

    def along(x: Value) -> Value:
        return x.expand(last).broadcast(shape)

    logits = logits.astype("float32")
    place = body.iota(shape, last, "int64")
    ordered, order = sort(body, logits, axis=last, descending=True)
    highest = ordered.pick(last, 0)

    def weights(x: Value) -> Value:
        return x.equals(along(highest)).select(1 << ONE, _masses((along(highest) - x) / along(temperature)))

    def at(where: Value) -> Value:
        """The ordered logit at a place of each row: one number, of which no sum changes a bit."""
        return along(place.equals(along(where)).select(ordered, 0.0).sum(last))

    limited = (top_k > 0) & (top_k < size)
    least = at(limited.select(top_k, size) - 1)
    mass = (ordered >= least).select(weights(ordered), 0)
    nucleus = _share(mass.sum(last), _units(top_p, PARTS)).maximum(1)
    least_likely = at((mass.scan("add", last) < along(nucleus)).astype("int64").sum(last))
    mass = weights(logits)
    counts = (logits >= least) & (logits >= least_likely) & (mass >= along(_units(min_p, ONE)))
    mass = counts.select(mass, 0)
    aim = _share(mass.sum(last), uniform & _MASK)
    passed = (mass.scan("add", last) <= along(aim)).astype("int64").sum(last)
    greedy, finite = temperature.equals(0), highest.isfinite()
    return (finite & ~greedy).select(passed, order.pick(last, 0)), finite | greedy


EMITTERS: Mapping[Op, Callable[..., Any]] = {ops.draw: _draw}
