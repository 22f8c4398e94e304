"""Rows in few bits (`jisu.compiler.rows`) on NVIDIA GPUs: keys and values of a cache, written a warp per row, read eight numbers at a time."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from jisu.compiler.errors import TargetError
from jisu.compiler.rows import ROW_BITS, record_bytes
from jisu.compiler.schemes import SCHEMES
from jisu.targets.cpu.isa import FLOATS, Val
from jisu.targets.cuda.device import WARP, Device, DeviceKernel
from jisu.targets.cuda.kernels.rounding import by_warps
from jisu.targets.target import Target, capability


def words_of_record(f: Device, records: Val, number: Val, first: Val, k: int, scheme: str) -> list[Val]:
    """What is read of record `number` of rows of k numbers for its numbers `first` (a multiple of 8) to `first + 7`: i32 [3].

    A record's bytes are a multiple of four (k is one of eight), so that codes come four at a time, and scale and offset together.
    """
    size = record_bytes(scheme, k)
    begin = number * size
    byte = begin + (first % (k // 2) if ROW_BITS[scheme] == 4 else first)
    return [f.load("i32", f.at(records, at, "i8")) for at in (begin + (size - 4), byte, byte + 4)]


def numbers_of_record(f: Device, words: list[Val], first: Val, k: int, scheme: str) -> list[Val]:
    """The eight numbers, float32, of what `words_of_record` read."""
    tail, *codes = words
    scale, offset = f.cast("bitcast", tail << 16, "float"), f.cast("bitcast", tail & -65536, "float")
    if not SCHEMES[scheme].uniform:
        return [level * scale for word in codes for level in _small_floats(f, word)]
    found = []
    for word in codes:
        if ROW_BITS[scheme] == 4:
            word = f.select(first.cmp("sge", k // 2), word >> 4, word)
        for i in range(4):
            # A code as the lowest bits of 2^23 is 2^23 plus the code.
            bits = ((word >> (8 * i)) & (0xFF if ROW_BITS[scheme] == 8 else 0xF)) | 0x4B000000
            found.append(f.fma(f.cast("bitcast", bits, "float") - 8388608.0, scale, offset))
    return found


def _converts(f: Device) -> bool:
    """Whether the GPU has instructions from and to e4m3."""
    return capability(f.target.mcpu) >= (8, 9)


def _small_floats(f: Device, word: Val) -> list[Val]:
    """The four numbers, float32, of e4m3 in an i32."""
    if _converts(f):
        return [number for half in (word, word >> 16) for number in f.from_e4m3(f.cast("trunc", half, "i16"))]
    # Exponent and mantissa lie as in float32, moved, subnormal numbers included; what the exponent's bias lacks is made up for.
    kind = SCHEMES["fp8"]
    bytes_ = [word >> (8 * i) for i in range(4)]
    bits = [((b & 0x80) << 24) | ((b & 0x7F) << (23 - kind.mantissa)) for b in bytes_]
    return [f.cast("bitcast", b, "float") * 2.0 ** (127 - kind.bias) for b in bits]


def _small_float(f: Device, value: Val) -> Val:
    """The code, i32, of the e4m3 nearest to a float32 (0 for NaN)."""
    kind = SCHEMES["fp8"]
    value = f.select(value < -kind.top, f.const(-kind.top, "float"), value)
    value = f.select(value > kind.top, f.const(kind.top, "float"), value)
    value = f.select(value.cmp("uno", value), f.const(0.0, "float"), value)
    if _converts(f):
        return f.cast("zext", f.to_e4m3(value, f.const(0.0, "float")), "i32") & 0xFF
    bits = f.cast("bitcast", value, "i32")
    # Adding and taking off a power of two leaves as many bits behind it as the level has; so much is a step of subnormal ones.
    power = f.maximum(bits & 0x7F800000, f.const((128 - kind.bias) << 23, "i32")) + ((23 - kind.mantissa) << 23)
    magnet = f.cast("bitcast", power, "float")
    size = (f.call("float", "llvm.fabs.f32", value) + magnet) - magnet
    normal = (f.cast("bitcast", size, "i32") >> (23 - kind.mantissa)) - ((127 - kind.bias) << kind.mantissa)
    least = f.cast("fptosi", size * 2.0 ** (kind.bias + kind.mantissa - 1), "i32")
    code = f.select(size < 2.0 ** (1 - kind.bias), least, normal)
    return code | ((bits >> 24) & 0x80)


def encoded_rows(k: int, dtype: str, scheme: str, target: Target) -> DeviceKernel:
    """`encode_rows` without feedback: records of rows of k numbers (a multiple of 32, for 4 bits of 64), one behind the other.

    Parameters: x, the records, the number of rows. Grid: ceil(rows / `rounding.WARPS`). A row that holds NaN or an infinity becomes one that
    decodes to NaN. Raises TargetError for other rows.
    """
    if k % (WARP * 8 // ROW_BITS[scheme]) or dtype not in FLOATS:
        raise TargetError(f"no kernel for GPUs makes records of {k} numbers of {dtype}")
    f, x, y, count, lane, wanted = by_warps(f"records_{scheme}_{k}_{dtype}", target)
    row = f.minimum(wanted, count - 1)  # all threads of a warp act together
    values = [f.load_f32(x, row * k + (lane + i), dtype, lanes=1) for i in range(0, k, WARP)]
    f.when(wanted < count, lambda: store_record(f, values, y, row * record_bytes(scheme, k), lane, scheme))
    return f.built()


def store_record(f: Device, values: Sequence[Val], to: Val, begin: Val, lane: Val, scheme: str) -> None:
    """Write the record of a row, of which this thread of the warp has numbers lane, lane + 32 and so on, from byte `begin` on."""
    kind, k = SCHEMES[scheme], len(values) * WARP
    top = float(2**kind.bits - 1) if kind.uniform else kind.top
    # A comparison drops NaN: 0 x makes NaN of it and of infinities, and a sum keeps that.
    unsound = functools.reduce(lambda a, b: a + b, [v * 0.0 for v in values])
    sizes = values if kind.uniform else [f.call("float", "llvm.fabs.f32", v) for v in values]
    low = functools.reduce(f.minimum, sizes) if kind.uniform else f.const(0.0, "float")
    high = functools.reduce(f.maximum, sizes)
    for distance in (16, 8, 4, 2, 1):
        low = f.minimum(low, f.other(low, distance)) if kind.uniform else low
        high = f.maximum(high, f.other(high, distance))
    unsound = f.sum_of_warp(unsound)
    offset = f.rounded(low, "bfloat16")
    scale = f.rounded((high - offset) / top, "bfloat16")
    offset, scale = offset + unsound, scale + unsound
    step = f.select(scale.cmp("oeq", 0.0), f.const(1.0, "float"), scale)

    def code(value: Val) -> Val:
        level = (value - offset) / step
        if not kind.uniform:
            return _small_float(f, level)
        level = f.call("float", "llvm.rint.f32", level)
        level = f.select(level.cmp("olt", 0.0), f.const(0.0, "float"), level)
        level = f.select(level.cmp("ogt", top), f.const(top, "float"), level)
        sound = level.cmp("oeq", level)
        return f.cast("fptoui", f.select(sound, level, 0.0), "i32")

    codes = [code(v) for v in values]
    if ROW_BITS[scheme] == 4:
        half = len(codes) // 2
        codes = [low | (high << 4) for low, high in zip(codes[:half], codes[half:], strict=True)]
    for i, byte in enumerate(codes):
        f.store(f.cast("trunc", byte, "i8"), f.at(to, begin + (lane + i * WARP), "i8"))
    tail = f.pair(scale, offset, "bfloat16")
    f.when(lane.cmp("eq", 0), lambda: f.store(tail, f.at(to, begin + (record_bytes(scheme, k) - 4), "i8")))
