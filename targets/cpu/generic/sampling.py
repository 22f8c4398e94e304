"""Choosing tokens; see `jisu.compiler.ops.sampling`, whose arithmetic this is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from tvm import tirx

from jisu.compiler import ops
from jisu.compiler.graph import Node, Op
from jisu.compiler.ops.sampling import FARTHEST, FINE, LOG2_E, ONE, PARTS, POWERS
from jisu.targets.cpu.generic.build import Builder, Expr, Flat, i64
from jisu.targets.cpu.generic.element import Pull
from jisu.targets.cpu.generic.scalar import f32, select


def _mass(b: Builder, distance: Expr) -> Expr:
    near = b.let(select(distance < f32(FARTHEST), distance, f32(FARTHEST)), "near")
    near = b.let(select(near > f32(0), near, f32(0)), "near")
    power = b.let((tirx.Cast("int64", near * f32(2.0**FINE)) * i64(LOG2_E)) >> i64(FINE), "power")
    part = b.let(power & i64(2**PARTS - 1), "part")
    total: Expr = i64(POWERS[-1])
    for term in POWERS[-2::-1]:
        total = b.let(i64(term) - ((total * part) >> i64(PARTS)), "total")
    return b.let((total << i64(ONE - PARTS)) >> (power >> i64(PARTS)), "mass")


def _share(b: Builder, total: Expr, parts: Expr) -> Expr:
    low = b.let(total & i64(2**PARTS - 1), "low")
    return b.let((total >> i64(PARTS)) * parts + ((low * parts) >> i64(PARTS)), "share")


def _units(b: Builder, value: Expr, bits: int) -> Expr:
    inside = b.let(select(value < f32(1), value, f32(1)), "inside")
    inside = b.let(select(value > f32(0), inside, f32(0)), "inside")
    return b.let(tirx.Cast("int64", inside * f32(2.0**bits)), "units")


def _draw(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    values, tokens, uniform, temperature, top_k, top_p, min_p = node.parents
    chosen, whole = targets
    size, zero = b.dim(values.shape[-1]), i64(0)

    def row(at: list[Expr]) -> None:
        here = pull.fresh()
        kept, sums = b.scratch(values.shape[-1], "int64"), b.scratch(2, "int64")
        first = b.let(here.wide(values, [*at, zero]), "first")
        heat = b.let(here.wide(temperature, at), "heat")
        limit = b.let(here.wide(top_k, at), "limit")
        limited = b.let(tirx.all(limit > zero, limit <= size), "limited")
        least = b.let(here.wide(values, [*at, b.let(select(limited, limit - i64(1), size - i64(1)), "k")]), "least")
        share, smallest = _units(b, here.wide(top_p, at), PARTS), _units(b, here.wide(min_p, at), ONE)

        def total(into: Expr, weight: Callable[[Expr], Expr]) -> Expr:
            b.store(sums, into, zero)
            with b.loop(size) as i:
                found = b.let(weight(i), "weight")
                b.store(sums, into, sums[into] + found)
                b.store(kept, i, found)
            return b.let(sums[into], "sum")

        def of_top(i: Expr) -> Expr:
            value = b.let(pull.fresh().wide(values, [*at, i]), "value")
            mass = b.let(select(tirx.EQ(i, zero), i64(1 << ONE), _mass(b, b.let((first - value) / heat))), "mass")
            out = b.let(tirx.all(limited, i > zero, value < least), "out")
            # The last one is the last to say.
            b.store(whole, at, tirx.any(out, tirx.EQ(mass, zero)))
            return select(out, zero, mass)

        nucleus = _share(b, total(zero, of_top), share)
        b.store(sums, i64(1), zero)

        def of_nucleus(i: Expr) -> Expr:
            mass, before = b.let(kept[i], "mass"), b.let(sums[i64(1)], "before")
            b.store(sums, i64(1), before + mass)
            inside = tirx.all(tirx.any(tirx.EQ(i, zero), before < nucleus), mass >= smallest)
            return select(inside, mass, zero)

        aim = _share(b, total(zero, of_nucleus), b.let(here.wide(uniform, at) & i64(2**PARTS - 1), "uniform"))
        greedy = b.let(tirx.EQ(heat, f32(0)), "greedy")
        finite = b.let(tirx.EQ(first - first, f32(0)), "finite")
        b.store(whole, at, tirx.any(greedy, tirx.all(finite, whole[at])))
        b.store(chosen, at, here.wide(tokens, [*at, zero]))
        b.store(sums, zero, zero)
        with b.loop(size) as i:
            before = b.let(sums[zero], "before")
            after = b.let(before + kept[i], "after")
            b.store(sums, zero, after)
            with b.when(tirx.all(tirx.Not(greedy), before <= aim, after > aim)):
                b.store(chosen, at, pull.fresh().wide(tokens, [*at, i]))

    b.spread(values.shape[:-1], values.tensor.size * 64, row)


BODIES: Mapping[Op, Callable[[Builder, Pull, Node, Sequence[Flat]], None]] = {ops.draw: _draw}
