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


def _key(value: Expr) -> Expr:
    """A float32's bits in the order of numbers, NaN being the greatest, int64 from 0 to 2^32 - 1; both zeros are one."""
    bits = tirx.Cast("int64", tirx.reinterpret("int32", select(tirx.EQ(value, f32(0)), f32(0), value)))
    key = select(bits < i64(0), i64(-1) - bits, bits + i64(1 << 31))
    return select(tirx.EQ(value, value), key, i64((1 << 32) - 1))


def _draw(b: Builder, pull: Pull, node: Node, targets: Sequence[Flat]) -> None:
    logits, uniform, temperature, top_k, top_p, min_p = node.parents
    token, sound = targets
    size, zero, one = b.dim(logits.shape[-1]), i64(0), i64(1)

    def row(at: list[Expr]) -> None:
        here = pull.fresh()
        keys, mass = (b.scratch(logits.shape[-1], "int64") for _ in range(2))
        best, least, sums, top = (
            b.scratch(1, "int64"),
            b.scratch(1, "int64"),
            b.scratch(1, "int64"),
            b.scratch(1, "float32"),
        )

        def logit(i: Expr) -> Expr:
            return b.let(pull.fresh().wide(logits, [*at, i]), "value")

        b.store(best, zero, i64(-1))
        with b.loop(size) as i:
            value = logit(i)
            key = b.let(_key(value), "key")
            b.store(keys, i, key)
            with b.when(key > best[zero]):
                b.store(best, zero, key)
                b.store(top, zero, value)
                b.store(token, at, i)
        highest, heat = b.let(top[zero], "highest"), b.let(here.wide(temperature, at), "heat")
        greedy, finite = tirx.EQ(heat, f32(0)), tirx.EQ(highest - highest, f32(0))
        b.store(sound, at, tirx.any(greedy, finite))

        def total(counts: Callable[[Expr], Expr], weight: Callable[[Expr], Expr]) -> Expr:
            b.store(sums, zero, zero)
            with b.loop(size) as i:
                b.store(sums, zero, sums[zero] + select(counts(i), weight(i), zero))
            return b.let(sums[zero], "sum")

        def narrow(goal: Expr, weight: Callable[[Expr], Expr]) -> None:
            """To the greatest key such that the weight of all that aren't less reaches a goal, bit by bit."""
            found = b.scratch(1, "int64")
            b.store(found, zero, zero)
            with b.loop(i64(32)) as bit:
                candidate = b.let(found[zero] + (one << (i64(31) - bit)), "candidate")
                reached = total(lambda i: keys[i] >= candidate, weight)
                with b.when(reached >= goal):
                    b.store(found, zero, candidate)
            b.store(least, zero, found[zero])

        with b.when(tirx.all(tirx.Not(greedy), finite)):
            b.store(least, zero, zero)
            limit = b.let(here.wide(top_k, at), "limit")
            with b.when(tirx.all(limit > zero, limit < size)):
                narrow(limit, lambda i: one)
            with b.loop(size) as i:
                value = logit(i)
                found = _mass(b, b.let((highest - value) / heat))
                found = select(tirx.EQ(value, highest), i64(1 << ONE), found)
                b.store(mass, i, select(keys[i] >= least[zero], found, zero))
            nucleus = _units(b, here.wide(top_p, at), PARTS)
            with b.when(nucleus < i64(1 << PARTS)):
                share = _share(b, total(lambda i: tirx.IntImm("bool", 1), lambda i: mass[i]), nucleus)
                narrow(b.let(tirx.max(share, one), "goal"), lambda i: mass[i])
            smallest = _units(b, here.wide(min_p, at), ONE)

            def counts(i: Expr) -> Expr:
                return tirx.all(keys[i] >= least[zero], mass[i] >= smallest)

            parts = b.let(here.wide(uniform, at) & i64(2**PARTS - 1), "uniform")
            aim = _share(b, total(counts, lambda i: mass[i]), parts)
            b.store(sums, zero, zero)
            with b.loop(size) as i, b.when(counts(i)):
                before = b.let(sums[zero], "before")
                after = b.let(before + mass[i], "after")
                b.store(sums, zero, after)
                with b.when(tirx.all(before <= aim, after > aim)):
                    b.store(token, at, i)

    b.spread(logits.shape[:-1], logits.tensor.size * 64, row)


BODIES: Mapping[Op, Callable[[Builder, Pull, Node, Sequence[Flat]], None]] = {ops.draw: _draw}
