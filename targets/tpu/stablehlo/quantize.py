"""Emitters of weights in few bits: the matrices that codes stand for, their packing, and layers that read them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jisu.compiler import levels, ops
from jisu.compiler.graph import Op
from jisu.compiler.ops.quantize import layer_parts
from jisu.compiler.schemes import SCHEMES, Scheme, groups_of
from jisu.targets.tpu.stablehlo.build import HALF, Body, Value
from jisu.targets.tpu.stablehlo.contract import finish, gate
from jisu.targets.tpu.stablehlo.elementwise import plain
from jisu.targets.tpu.stablehlo.moves import wrapped


def unpack_bits(packed: Value, bits: int, k: int) -> Value:
    """`jisu.compiler.schemes.unpack_bits`: the first k codes uint8 [..., k] of bytes [..., n]."""
    body, (*lead, n) = packed.body, packed.shape
    if bits == 8:
        return packed.part(-1, 0, k)
    if 8 % bits == 0:
        shifts = body.iota((*lead, n, 8 // bits), packed.rank, "uint8") * bits
        codes = packed.expand(-1).broadcast(shifts.shape).binary("shift_right_logical", shifts)
        return (codes & (2**bits - 1)).reshape(*lead, n * (8 // bits)).part(-1, 0, k)
    parts = -(-k // 8)  # eight codes take `bits` bytes
    short = packed.part(-1, 0, min(n, parts * bits)).padded(-1, parts * bits)
    eights = short.reshape(*lead, parts, bits)
    found = []
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = eights.pick(-1, byte) >> shift
        if shift + bits > 8:
            code = code | eights.pick(-1, byte + 1) << (8 - shift)
        found.append(code & (2**bits - 1))
    return body.stack(found, -1).reshape(*lead, parts * 8).part(-1, 0, k)


def pack_bits(codes: Value, bits: int) -> Value:
    """`jisu.compiler.schemes.pack_bits`: bytes [..., ceil(k * bits / 8)] of codes [..., k]."""
    if bits == 8:
        return codes
    body, (*lead, k) = codes.body, codes.shape
    eights = (codes & (2**bits - 1)).padded(-1, -(-k // 8) * 8).reshape(*lead, -(-k // 8), 8)
    found = [body.full(0, eights.shape[:-1], "uint8")] * bits
    for i in range(8):
        byte, shift = divmod(i * bits, 8)
        code = eights.pick(-1, i)
        found[byte] = found[byte] | code << shift
        if shift + bits > 8:
            found[byte + 1] = found[byte + 1] | code >> (8 - shift)
    return body.stack(found, -1).reshape(*lead, -1).part(-1, 0, -(-k * bits // 8))


def _small_float(codes: Value, bits: int, mantissa: int, bias: int) -> Value:
    """float32 of codes uint8 of sign, exponent, mantissa."""
    word = codes.astype("int32")
    size, fraction = word & (2 ** (bits - 1) - 1), word & (2**mantissa - 1)
    normal = ((size << (23 - mantissa)) + ((127 - bias) << 23)).bits("float32")
    found = (size < 2**mantissa).select(fraction.astype("float32") * 2.0 ** (1 - bias - mantissa), normal)
    return (word >= 2 ** (bits - 1)).select(-found, found)


def _chosen(codes: Value, table: np.ndarray) -> Value:
    """table[codes] for a small table, by the codes' bits."""
    found: list[Value | float] = [float(v) for v in table]
    bit = 1
    while len(found) > 1:
        odd = (codes & bit).differs(0)
        zero = codes.body.full(0, (), "float32")
        found = [
            odd.select(b, a if isinstance(a, Value) or isinstance(b, Value) else zero + a)
            for a, b in zip(found[::2], found[1::2], strict=True)
        ]
        bit *= 2
    (result,) = found
    assert isinstance(result, Value)
    return result


def level(codes: Value, kind: Scheme) -> Value:
    """float32: what codes mean before scaling; int8 are levels about the middle."""
    if codes.dtype == "int8":
        return codes.astype("float32") + kind.middle
    if kind.uniform:
        return codes.astype("float32")
    if not kind.mantissa:
        return _chosen(codes, kind.levels)
    found = _small_float(codes, kind.bits, kind.mantissa, kind.bias)
    return ((codes & 127).equals(127)).select(0, found) if kind.bits == 8 else found  # e4m3's codes for NaN


def scale_values(scales: Value, kind: str, whole: float) -> Value:
    """`jisu.compiler.schemes.decode_scales`: float32 scales."""
    if scales.dtype != "uint8":
        return scales.astype("float32")
    if kind == "e8m0":
        word = scales.astype("int32")
        return word.equals(0).select(2.0**-127, (word << 23).bits("float32"))
    found = _small_float(scales, 8, 3, 7)
    return (scales & 127).equals(127).select(float("nan"), found) * float(np.float32(whole))


def spread(values: Value, k: int, group: int) -> Value:
    """Per group [*n, groups] as per input [*n, k]."""
    *lead, groups = values.shape
    size = group or k
    return values.expand(-1).broadcast((*lead, groups, size)).reshape(*lead, groups * size).part(-1, 0, k)


def relative(codes: Value, kind: Scheme, zeros: Value | None) -> Value:
    """float32 levels, relative to the zeros [n, k] or the middle."""
    found = level(codes, kind)
    return found - zeros if zeros is not None else found - kind.middle if kind.uniform else found


def weight_values(codes: Value, scales: Value, zeros: Value | None, kind: Scheme, group: int) -> Value:
    """float32 [*n, k] of codes [*n, k], scales float32 [*n, groups] and zeros uint8 [*n, groups]."""
    k = codes.shape[-1]
    z = None if zeros is None else spread(zeros.astype("float32"), k, group)
    return relative(codes, kind, z) * spread(scales, k, group)


def flat_codes(codes: Value, kind: Scheme) -> Value:
    """A run of codes uint8 [bytes] as one code per byte."""
    return unpack_bits(codes, kind.bits, codes.shape[0] * 8 // kind.bits)


def mask_bits(mask: Value, k: int) -> Value:
    """bool [n, k] of a mask uint8 [n, ceil(k / 8)]."""
    return unpack_bits(mask, 1, k).astype("bool")


def before(keep: Value, axis: int = -1) -> Value:
    """int32: how many are kept before each place along an axis."""
    one = keep.astype("int32")
    return one.scan("add", axis) - one


def spread_kept(values: Value, mask: Value, k: int) -> tuple[Value, Value]:
    """(the matrix [n, k] of values [nnz], 0 elsewhere; where there is a value)."""
    keep = mask_bits(mask, k).reshape(-1)
    places = before(keep)
    if values.shape[0] == 0:
        nothing = values.body.full(0, (mask.shape[0], k), values.dtype)
        return nothing, nothing.body.full(False, nothing.shape, "bool")
    there = keep & (places < values.shape[0])
    found = there.select(values.take(places, 0), 0)
    return found.reshape(mask.shape[0], k), there.reshape(mask.shape[0], k)


def _dequantize(
    codes: Value, scales: Value, zeros: Value | None, mask: Value | None, *, scheme: str, k: int, group: int, whole: float, dtype: str
) -> Value:  # fmt: skip
    kind = SCHEMES[scheme]
    s = scale_values(scales, kind.scale, whole)
    if mask is None:
        return weight_values(unpack_bits(codes, kind.bits, k), s, zeros, kind, group).astype(dtype)
    single, there = spread_kept(flat_codes(codes, kind), mask, k)
    return there.select(weight_values(single, s, zeros, kind, group), 0).astype(dtype)


def _unpack_bits(x: Value, *, bits: int) -> Value:
    stream = x.bits("uint8").reshape(*x.shape[:-1], -1)
    return unpack_bits(stream, bits, stream.shape[-1] * 8 // bits)


# --- Packed for kernels -----------------------------------------------------------------------------------------------------


def in_panels(rows: Value, panel: int) -> Value:
    """[n, words, …] as [panels, words, panel, …], padded with zeros."""
    n, words, *rest = rows.shape
    whole = rows.padded(0, -(-n // panel) * panel).reshape(-(-n // panel), panel, words, *rest)
    return whole.transpose(0, 2, 1, *range(3, whole.rank))


def out_of_panels(packed: Value, n: int) -> Value:
    """The first n rows [n, words, …] of what `in_panels` made."""
    panels, words, panel, *rest = packed.shape
    whole = packed.transpose(0, 2, 1, *range(3, packed.rank)).reshape(panels * panel, words, *rest)
    return whole.part(0, 0, n)


def _pack_codes(codes: Value, *, scheme: str, k: int, panel: int, word: int) -> Value:
    kind = SCHEMES[scheme]
    single = unpack_bits(codes, kind.bits, k).padded(-1, kind.panel_words(k, word) * kind.per_byte * word)
    parts = single.reshape(single.shape[0], -1, kind.per_byte, word)
    low = parts.pick(2, 0)
    return in_panels(low | parts.pick(2, 1) << 4 if kind.per_byte == 2 else low, panel)


def _row_codes(rows: Value, kind: Scheme, k: int) -> Value:
    """Codes uint8 [*n, k] of rows [*n, words, word] out of panels."""
    *lead, words, word = rows.shape
    parts = rows.body.stack([rows & 15, rows >> 4], -2) if kind.per_byte == 2 else rows
    flat = parts.reshape(*lead, words * word * kind.per_byte).part(-1, 0, k)
    return flat if kind.bits == 8 else flat & (2**kind.bits - 1)


def unpack_codes(packed: Value, kind: Scheme, n: int, k: int) -> Value:
    """Codes uint8 [n, k] of what `pack_codes` made."""
    return _row_codes(out_of_panels(packed, n), kind, k)


def _pack_scales(scales: Value, *, scheme: str, whole: float, panel: int) -> Value:
    floats = scales if scales.dtype != "uint8" else scale_values(scales, SCHEMES[scheme].scale, whole)
    return in_panels(floats, panel)


# --- Layers -----------------------------------------------------------------------------------------------------------------


def coded_product(
    x: Value, codes: Value, scales: Value, zeros: Value | None, kind: Scheme, group: int, n: int
) -> Value:
    """x [*b, k] times codes, scales and zeros in panels: [*b, n] in float32 (float64 for x of that).

    Where a row has one scale, levels are multiplied, which bfloat16 holds exactly, and the sums are scaled.
    """
    k, wide = x.shape[-1], "float64" if x.dtype == "float64" else "float32"
    c, s = unpack_codes(codes, kind, n, k), out_of_panels(scales, n).astype("float32")
    z = None if zeros is None else out_of_panels(zeros, n)
    if x.dtype in HALF and s.shape[1] == 1 and kind.computes:
        shift = None if z is None else spread(z.astype("float32"), k, group)
        found = x.dot(relative(c, kind, shift).astype(x.dtype), (-1, 1), to=wide)
        return found * s.reshape(n)
    w = weight_values(c, s, z, kind, group).astype(wide)
    return x.wide().dot(w, (-1, 1), to=wide, exact=x.dtype != "bfloat16")


Product = Callable[[Value, Value, "Value | None", int], Value]


def _layer(
    product: Product, codes: Value, scales: Value, zeros: Value | None, b: Value | None, r: Value | None, outputs: int, gated: bool,
    activation: str, dtype: str,
) -> Value:  # fmt: skip
    if not gated:
        return finish(product(codes, scales, zeros, outputs), b, r, activation, dtype)
    first, second = (
        product(codes.pick(1, i), scales.pick(1, i), None if zeros is None else zeros.pick(1, i), outputs)
        for i in (0, 1)
    )
    return gate(first, second, activation, dtype)


def _quantized_linear(
    x: Value, codes: Value, scales: Value, zeros: Value | None, b: Value | None, r: Value | None, *, outputs: int, scheme: str,
    group: int, gated: bool, activation: str,
) -> Value:  # fmt: skip
    def product(c: Value, s: Value, z: Value | None, n: int) -> Value:
        return coded_product(x, c, s, z, SCHEMES[scheme], group, n)

    return _layer(product, codes, scales, zeros, b, r, outputs, gated, activation, x.dtype)


def code_levels(codes: Value, kind: Scheme, n: int, k: int) -> Value:
    """int8 [n, k]: what codes in panels mean before scaling, relative to the middle; codes of int8 are levels."""
    single = unpack_codes(codes, kind, n, k)
    return single if codes.dtype == "int8" else (single.astype("int32") - int(kind.middle)).astype("int8")


def integer_product(
    x: Value, codes: Value, scales: Value, zeros: Value | None, kind: Scheme, group: int, own: bool, n: int, k: int
) -> Value:
    """Records of levels x uint8 [*b, bytes] times codes in panels: float32 [*b, n]. Sums of integers within a group are exact; small floats
    are multiplied as the bfloat16 that they are."""
    lead, size, count = x.shape[:-1], group or k, groups_of(k, group)
    rows = math.prod(lead)
    records = x.reshape(rows, x.shape[-1])

    def numbers(offset: int, number: int, dtype: str) -> Value:
        return records.part(-1, offset, offset + 4 * number).reshape(rows, number, 4).bits(dtype)

    bytes_ = records.part(-1, 0, k)
    if kind.uniform:
        left, right, to = bytes_.bits("int8"), code_levels(codes, kind, n, k), "int32"
    else:
        left, right = (level(v, kind).astype("bfloat16") for v in (bytes_, unpack_codes(codes, kind, n, k)))
        to = "float32"
    a = left.padded(-1, count * size).reshape(rows, count, size)
    c = right.padded(-1, count * size).reshape(n, count, size)
    sums = a.dot(c, (-1, -1), [(1, 1)], to=to)  # [count, rows, n]
    if zeros is not None:  # code - zero is (code - middle) + (middle - zero)
        shift = out_of_panels(zeros, n).astype("int32") * -1 + int(kind.middle)
        total = a.astype("int32").sum(-1)
        sums = sums + total.transpose(1, 0).expand(-1) * shift.transpose(1, 0).expand(1)
    found = sums.astype("float32") * out_of_panels(scales, n).astype("float32").transpose(1, 0).expand(1)
    steps = numbers(levels.scale_offset(k), count if own else 1, "float32").transpose(1, 0).expand(-1)
    return (found * steps).sum(0).reshape(*lead, n)


def _levels_linear(
    x: Value, codes: Value, scales: Value, zeros: Value | None, b: Value | None, r: Value | None, *, outputs: int, k: int, scheme: str,
    group: int, own: bool, gated: bool, activation: str, dtype: str, records: str = "int8",
) -> Value:  # fmt: skip
    def product(c: Value, s: Value, z: Value | None, n: int) -> Value:
        found = integer_product(x, c, s, z, SCHEMES[scheme], group, own, n, k)
        return found.astype("float64") if dtype == "float64" else found

    return _layer(product, codes, scales, zeros, b, r, outputs, gated, activation, dtype)


def _levels_projections(
    body: Body, x: Value, *operands: Value, outputs: tuple[int, ...], offset: bool, biased: bool, **how: Any
) -> tuple[Value, ...]:
    parts = layer_parts(operands, len(outputs), offset, biased)
    return tuple(
        _levels_linear(x, c, s, z, b, None, outputs=n, gated=False, activation="none", **how)
        for (c, s, z, b), n in zip(parts, outputs, strict=True)
    )


def _quantized_take(
    codes: Value, indices: Value, scales: Value, zeros: Value | None, *, rows: int, width: int, scheme: str, group: int, dtype: str
) -> Value:  # fmt: skip
    kind, panel = SCHEMES[scheme], codes.shape[2]
    at = wrapped(indices, rows)
    places = codes.body.stack([at / panel, at % panel], -1)
    c, s, z = (None if v is None else v.at(places, [0, 2]) for v in (codes, scales, zeros))
    assert c is not None and s is not None
    return weight_values(_row_codes(c, kind, width), s.astype("float32"), z, kind, group).astype(dtype)


EMITTERS: Mapping[Op, Callable[..., Any]] = {
    ops.dequantize: plain(_dequantize),
    ops.unpack_bits: plain(_unpack_bits),
    ops.pack_bits: plain(lambda x, *, bits: pack_bits(x, bits)),
    ops.pack_codes: plain(_pack_codes),
    ops.pack_scales: plain(_pack_scales),
    ops.pack_zeros: plain(lambda zeros, *, panel: in_panels(zeros, panel)),
    ops.quantized_linear: plain(_quantized_linear),
    ops.levels_linear: plain(_levels_linear),
    ops.levels_projections: _levels_projections,
    ops.quantized_take: plain(_quantized_take),
}
