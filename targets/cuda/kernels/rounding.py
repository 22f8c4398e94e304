"""Activations rounded to integers on NVIDIA GPUs: a warp per group of a row."""

from __future__ import annotations

from jisu.compiler.errors import TargetError
from jisu.compiler.schemes import SCHEMES
from jisu.targets.cpu.isa import FLOATS, Val
from jisu.targets.cuda.device import WARP, Device, DeviceKernel
from jisu.targets.target import Target

WARPS = 4
"""Groups of a block."""


def by_warps(name: str, target: Target) -> tuple[Device, Val, Val, Val, Val, Val]:
    """A kernel whose warps make one piece each, `WARPS` of a block: it, x, y, how many pieces there are (its third parameter), this thread's number
    in its warp, and that of the warp's piece, which may be none."""
    f = Device(name, [("ptr", "x"), ("ptr", "y"), ("i64", "count")], target, WARPS * WARP)
    x, y, count = f.params()
    x, y = f.memory(x), f.memory(y)
    thread = f.thread()
    return f, x, y, count, thread % WARP, f.block() * WARPS + thread / WARP


def rounded_rows(size: int, dtype: str, scheme: str, target: Target) -> DeviceKernel:
    """`fake_quantize` of groups of `size` numbers, one behind the other: level times scale, the scale from each group's largest number.

    Parameters: x, y, the number of groups. Grid: ceil(groups / `WARPS`). Raises TargetError for other schemes than integers.
    """
    kind = SCHEMES[scheme]
    if not kind.uniform or kind.scale not in ("float16", "float32") or dtype not in FLOATS:
        raise TargetError(f"no kernel for GPUs rounds {dtype} to {scheme}")
    f, x, y, count, lane, number = by_warps(f"rounded_{scheme}_{size}_{dtype}", target)
    base = f.minimum(number, count - 1) * size  # all threads of a block go on together

    def largest(i: Val, carried: list[Val]) -> list[Val]:
        value = f.load_f32(x, base + i, dtype, lanes=1)
        return [f.maximum(carried[0], f.call("float", "llvm.fabs.f32", value))]

    reach, _ = f.loop(lane, size, WARP, [f.const(0.0, "float")], largest)
    for distance in (16, 8, 4, 2, 1):
        reach = f.maximum(reach, f.other(reach, distance))
    scale = reach / kind.top
    scale = f.select(scale.cmp("oeq", 0.0), f.const(1.0, "float"), scale)

    def write(i: Val, _: list[Val]) -> list[Val]:
        value = f.load_f32(x, base + i, dtype, lanes=1)
        level = f.call("float", "llvm.rint.f32", value / scale)
        level = f.select(level < -kind.middle, f.const(-kind.middle, "float"), level)
        level = f.select(level > kind.top, f.const(kind.top, "float"), level)
        f.store_f32(level * scale, y, base + i, dtype)
        return []

    def write_all() -> None:
        f.loop(lane, size, WARP, [], write)

    f.when(number < count, write_all)
    return f.built()
