"""The largest numbers of long rows on NVIDIA GPUs, in order: blocks sort their parts of a row, and the first of all parts are sorted again."""

from __future__ import annotations

from jisu.compiler.errors import TargetError
from jisu.targets.cpu.isa import FLOATS, Val
from jisu.targets.cuda.device import Device, DeviceKernel
from jisu.targets.target import Target

PART = 2048
"""Numbers that a block sorts, at most."""
MOST = 256
"""Numbers that a row keeps, at most."""
_THREADS = 256
_SIGN = -(1 << 31)


def kept(first: int) -> int:
    """How many numbers of a part go on, where `first` are wanted."""
    return max(32, 1 << (first - 1).bit_length())


def part_of(size: int, first: int) -> int:
    """How many numbers a block sorts of rows of `size`."""
    return max(2 * kept(first), min(PART, 1 << (size - 1).bit_length()))


def largest(size: int, first: int, dtype: str, coded: bool, last: bool, target: Target) -> DeviceKernel:
    """The first of each part of rows of `size` numbers, from the largest on; equal ones in their order, NaN before all.

    Parameters: x [rows, size] of `dtype`, or with `coded` keys int64 that another call left; with `last`, where a row is one part, values
    of `dtype` and positions int64 [rows, first], else keys [rows, parts * kept]; parts per row. Grid: rows * parts. A key is a number's bits in
    the order of numbers, above those of its position, turned so that earlier ones are larger: no two are equal, and the order in which
    threads compare (a bitonic sort; Batcher, 1968) doesn't show. Raises TargetError for more than `MOST` numbers.
    """
    if dtype not in FLOATS or not 0 < first <= MOST:
        raise TargetError(f"no kernel for GPUs finds the {first} largest of {dtype}")
    part, keep = part_of(size, first), kept(first)
    threads = min(_THREADS, part // 2)
    names = ["x", "values", "positions"] if last else ["x", "keys"]
    label = f"largest_{first}_of_{size}_{dtype}{'_again' if coded else ''}{'_last' if last else ''}"
    f = Device(label, [*(("ptr", n) for n in names), ("i64", "parts")], target, threads)
    *pointers, parts = f.params()
    x, *results = (f.memory(p) for p in pointers)
    row, begin, thread = f.block() / parts, f.block() % parts * part, f.thread()
    held = f.shared(8 * part)

    def key(place: Val) -> Val:
        at = row * size + place
        if coded:
            return f.load("i64", f.at(x, at, "int64"))
        return _key(f, f.load_f32(x, at, dtype, lanes=1), place)

    for i in range(0, part, threads):
        place = begin + (thread + i)
        inside = place < size
        found = f.select(inside, key(f.minimum(place, size - 1)), f.i64(0))  # less than any number's
        f.store(found, f.at(held, thread + i, "int64"))
    f.barrier()
    width = 2
    while width <= part:
        stride = width // 2
        while stride:
            for i in range(0, part // 2, threads):
                _exchange(f, held, thread + i, width, stride)
            f.barrier()
            stride //= 2
        width *= 2
    for i in range(0, first if last else keep, threads):
        number = thread + i

        def leave(number: Val = number) -> None:
            found = f.load("i64", f.at(held, number, "int64"))
            if last:
                f.store_f32(_value(f, found), results[0], row * first + number, dtype)
                f.store(_position(f, found), f.at(results[1], row * first + number, "int64"))
            else:
                f.store(found, f.at(results[0], f.block() * keep + number, "int64"))

        f.when(number < (first if last else keep), leave)
    return f.built()


def _exchange(f: Device, held: Val, pair: Val, width: int, stride: int) -> None:
    """One pair's step: the larger key goes to the front in even runs of `width`, to the back in odd ones."""
    i = pair / stride * (2 * stride) + pair % stride
    first, second = f.at(held, i, "int64"), f.at(held, i + stride, "int64")
    a, b = f.load("i64", first), f.load("i64", second)
    falling = (i & width).cmp("eq", 0)
    swap = f.op(f"icmp eq i1 {a.cmp('ult', b).name}, {falling.name}", "i1")
    f.store(f.select(swap, b, a), first)
    f.store(f.select(swap, a, b), second)


def _key(f: Device, value: Val, place: Val) -> Val:
    value = value + 0.0  # -0 is 0
    bits = f.cast("bitcast", value, "i32")
    negative = bits < 0
    ordered = f.op(f"xor i32 {bits.name}, {f.select(negative, f.const(-1, 'i32'), f.const(_SIGN, 'i32')).name}", "i32")
    ordered = f.select(value.cmp("uno", value), f.const(-1, "i32"), ordered)
    turned = f.op(f"xor i64 {place.name}, 4294967295", "i64")
    return (f.cast("zext", ordered, "i64") << 32) | turned


def _value(f: Device, key: Val) -> Val:
    ordered = f.cast("trunc", key >> 32, "i32")
    positive = ordered < 0
    bits = f.op(f"xor i32 {ordered.name}, {f.select(positive, f.const(_SIGN, 'i32'), f.const(-1, 'i32')).name}", "i32")
    return f.cast("bitcast", bits, "float")


def _position(f: Device, key: Val) -> Val:
    return f.op(f"xor i64 {(key & 0xFFFFFFFF).name}, 4294967295", "i64")
