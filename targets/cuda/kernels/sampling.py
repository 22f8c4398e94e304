"""Choosing tokens on NVIDIA GPUs: a block per row, a thread per token; see `jisu.compiler.ops.sampling`, whose arithmetic this is."""

from __future__ import annotations

from jisu.compiler.errors import TargetError
from jisu.compiler.ops.sampling import FARTHEST, FINE, LOG2_E, ONE, PARTS, POWERS
from jisu.targets.cpu.isa import FLOATS, Val
from jisu.targets.cuda.device import WARP, Device, DeviceKernel
from jisu.targets.target import Target

MOST = 1024
"""Tokens of a row, at most."""


def drawn(size: int, dtype: str, target: Target) -> DeviceKernel:
    """`draw` from rows of `size` logits of `dtype`. Parameters: the op's operands, then its results. Grid: rows. Raises TargetError for more than
    `MOST` tokens."""
    if dtype not in FLOATS or not 0 < size <= MOST:
        raise TargetError(f"no kernel for GPUs draws from {size} tokens' {dtype}")
    threads = max(WARP, 1 << (size - 1).bit_length())
    names = ("values", "tokens", "uniform", "temperature", "top_k", "top_p", "min_p", "chosen", "whole")
    f = Device(f"drawn_of_{size}_{dtype}", [("ptr", n) for n in names], target, threads)
    values, tokens, uniform, temperature, top_k, top_p, min_p, chosen, whole = (f.memory(p) for p in f.params())
    row, thread = f.block(), f.thread()
    at, inside = row * size + f.minimum(thread, size - 1), thread < size
    value, highest = (f.load_f32(values, i, dtype, lanes=1) for i in (at, row * size))
    heat, nucleus, likely = (f.load("float", f.at(p, row, "float32")) for p in (temperature, top_p, min_p))
    limit, part = (f.load("i64", f.at(p, row, "int64")) for p in (top_k, uniform))
    limited = (limit > 0) & (limit <= size)
    least = f.load_f32(values, row * size + (f.select(limited, limit, f.i64(size)) - 1), dtype, lanes=1)

    first = thread.cmp("eq", 0)
    mass = f.select(first, f.i64(1 << ONE), _mass(f, (highest - value) / heat))
    out = limited & (thread > 0) & (value < least)
    kept = f.select(inside, f.select(out, f.i64(0), mass), 0)
    before, total = _before(f, kept, threads)
    counts = first | (before < _share(f, total, _units(f, nucleus, PARTS)))
    kept = f.select(counts & (kept >= _units(f, likely, ONE)), kept, 0)
    before, total = _before(f, kept, threads)
    aim = _share(f, total, part & ((1 << PARTS) - 1))
    greedy = heat.cmp("oeq", 0.0)

    def choose() -> None:
        f.store(f.load("i64", f.at(tokens, at, "int64")), f.at(chosen, row, "int64"))

    def tell() -> None:
        ends = (highest - highest).cmp("oeq", 0.0) & (out | mass.cmp("eq", 0))
        f.store(f.cast("zext", greedy | ends, "i8"), f.at(whole, row, "i8"))

    f.when(f.select(greedy, first, (before <= aim) & (before + kept > aim)), choose)
    f.when(thread.cmp("eq", size - 1), tell)
    return f.built()


def _mass(f: Device, distance: Val) -> Val:
    near = f.select(distance < FARTHEST, distance, FARTHEST)
    near = f.select(near > 0.0, near, 0.0)
    power = (f.cast("fptosi", near * 2.0**FINE, "i64") * LOG2_E) >> FINE
    part, total = power & ((1 << PARTS) - 1), f.i64(POWERS[-1])
    for term in POWERS[-2::-1]:
        total = f.i64(term) - ((total * part) >> PARTS)
    return (total << (ONE - PARTS)) >> (power >> PARTS)


def _share(f: Device, total: Val, parts: Val) -> Val:
    return (total >> PARTS) * parts + (((total & ((1 << PARTS) - 1)) * parts) >> PARTS)


def _units(f: Device, value: Val, bits: int) -> Val:
    inside = f.select(value < 1.0, value, 1.0)
    return f.cast("fptosi", f.select(value > 0.0, inside, 0.0) * 2.0**bits, "i64")


def _before(f: Device, value: Val, threads: int) -> tuple[Val, Val]:
    """The sums of an i64 over the threads before this one, and over all."""
    held, thread, reached = f.shared(8 * threads), f.thread(), value
    distance = 1
    while True:
        f.store(reached, f.at(held, thread, "int64"))
        f.barrier()
        if distance == threads:
            return reached - value, f.load("i64", f.at(held, threads - 1, "int64"))
        other = f.load("i64", f.at(held, f.maximum(thread - distance, 0), "int64"))
        reached = f.select(thread >= distance, reached + other, reached)
        distance *= 2
        f.barrier()
