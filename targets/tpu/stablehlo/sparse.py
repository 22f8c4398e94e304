"""Emitters of sparse matrices: kept numbers and a mask, in storage or in panels (see `jisu.compiler.ops.sparse`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jisu.compiler import ops
from jisu.compiler.graph import Op
from jisu.compiler.ops.semi_structured import INPUTS, PLACES, ROWS, fours, places_shape
from jisu.compiler.ops.sparse import disordered, ordered
from jisu.compiler.schemes import SCHEMES
from jisu.targets.tpu.stablehlo.build import Value
from jisu.targets.tpu.stablehlo.contract import finish, gate
from jisu.targets.tpu.stablehlo.elementwise import plain
from jisu.targets.tpu.stablehlo.moves import take
from jisu.targets.tpu.stablehlo.quantize import (
    before,
    flat_codes,
    mask_bits,
    out_of_panels,
    pack_bits,
    spread,
    spread_kept,
    unpack_bits,
    weight_values,
)


def _fill_codes(codes: Value, mask: Value, zeros: Value | None, *, scheme: str, k: int, group: int) -> Value:
    kind = SCHEMES[scheme]
    single, there = spread_kept(flat_codes(codes, kind), mask, k)
    nothing = int(abs(kind.levels - kind.middle).argmin())
    return pack_bits(there.select(single, nothing if zeros is None else spread(zeros, k, group)), kind.bits)


def _ordered(rows: Value, panel: int, pair: int) -> Value:
    """[n, k] as [panels, words, 2 * panel], in the order in which kernels read it."""
    n, k = rows.shape
    found: Value = ordered(rows.padded(0, -(-n // panel) * panel).padded(1, -(-k // 2) * 2), panel, pair)
    return found


def _disordered(whole: Value, pair: int, n: int, k: int) -> Value:
    """[n, k] of what `_ordered` made."""
    found: Value = disordered(whole, pair).slice((0, 0), (n, k))
    return found


def _pack_mask(mask: Value, *, k: int, panel: int, pair: int) -> Value:
    return pack_bits(_ordered(mask_bits(mask, k).astype("uint8"), panel, pair), 1)


def _pack_starts(mask: Value, *, k: int, panel: int) -> Value:
    counts = mask_bits(mask, k).astype("int32").sum(1)
    return (counts.scan("add", 0) - counts).part(0, 0, mask.shape[0], panel).astype("int64")


def _pack_values(values: Value, mask: Value, *, k: int, panel: int, pair: int, scheme: str) -> Value:
    single = values if scheme == "none" else flat_codes(values, SCHEMES[scheme])
    size = single.shape[0]
    dense, _ = spread_kept(single, mask, k)
    keep = _ordered(mask_bits(mask, k).astype("uint8"), panel, pair).reshape(-1).astype("bool")
    places = keep.select(before(keep), size)  # what is not kept, or too many, falls outside
    out = values.body.full(0, (size,), single.dtype)
    out = out.scatter(places.expand(-1), _ordered(dense, panel, pair).reshape(-1), [0], unique=False)
    if scheme != "none" and SCHEMES[scheme].per_byte == 2:
        out = out.padded(0, size + size % 2)
        out = out.part(0, 0, out.shape[0], 2) | out.part(0, 1, out.shape[0], 2) << 4
    return out.padded(0, out.shape[0] + 2 * panel)


def _unpack(
    values: Value, mask: Value, starts: Value, scales: Value | None, zeros: Value | None, *, n: int, k: int, pair: int, scheme: str,
    group: int,
) -> Value:  # fmt: skip
    """The matrix [n, k] of values in panels; of codes float32."""
    kind = SCHEMES.get(scheme)
    panels, words, size = mask.shape
    bits = unpack_bits(mask, 1, size * 8).astype("bool").reshape(panels, -1)
    at = before(bits) + starts.astype("int32").expand(-1)
    single = unpack_bits(values, 4, values.shape[0] * 2) if kind is not None and kind.per_byte == 2 else values
    there = bits & (at >= 0) & (at < single.shape[0])
    found = there.select(single.take(at, 0), 0)
    dense = _disordered(found.reshape(panels, words, size * 8), pair, n, k)
    if kind is None or scales is None:
        return dense
    keep = _disordered(there.astype("uint8").reshape(panels, words, size * 8), pair, n, k).astype("bool")
    codes = dense if kind.bits == 8 else dense & (2**kind.bits - 1)
    s, z = (None if v is None else out_of_panels(v, n) for v in (scales, zeros))
    assert s is not None
    return keep.select(weight_values(codes, s.astype("float32"), z, kind, group), 0)


def _sparse_linear(
    x: Value, values: Value, mask: Value, starts: Value, scales: Value | None, zeros: Value | None, b: Value | None, r: Value | None, *,
    outputs: int, pair: int, scheme: str, group: int, gated: bool, activation: str,
) -> Value:  # fmt: skip
    def product(i: int) -> Value:
        m, t, s, z = (v if v is None or not gated else v.pick(1, i) for v in (mask, starts, scales, zeros))
        assert m is not None and t is not None
        w = _unpack(values, m, t, s, z, n=outputs, k=x.shape[-1], pair=pair, scheme=scheme, group=group)
        wide = "float64" if x.dtype == "float64" else "float32"
        if w.dtype == x.dtype:
            return x.dot(w, (-1, 1), to=wide)
        return x.wide().dot(w.astype(wide), (-1, 1), to=wide, exact=x.dtype != "bfloat16")

    if gated:
        return gate(product(0), product(1), activation, x.dtype)
    return finish(product(0), b, r, activation, x.dtype)


def _sparse_take(
    values: Value, mask: Value, starts: Value, indices: Value, scales: Value | None, zeros: Value | None, *, rows: int, width: int,
    pair: int, scheme: str, group: int, dtype: str,
) -> Value:  # fmt: skip
    table = _unpack(values, mask, starts, scales, zeros, n=rows, k=width, pair=pair, scheme=scheme, group=group)
    return take(table.astype(dtype), indices, axis=0)


def _pack_places(mask: Value, *, k: int, fours: int) -> Value:
    tiles, units, *_ = places_shape(mask.shape[0], k)
    table = mask.body.array(PLACES, "uint8")
    found = table.take(unpack_bits(mask, 4, k // 4).astype("int32"), 0) - int(PLACES[0])
    found = found.padded(0, tiles * ROWS).padded(1, units * INPUTS // 4) + int(PLACES[0])
    apart = found.reshape(tiles, 2, 8, units, 16 // fours, 4, fours // 2, 2).transpose(0, 3, 2, 4, 6, 7, 1, 5)
    by_step = apart.reshape(tiles, units, 8, 4, 2, 2, 8).transpose(0, 1, 2, 4, 5, 3, 6)
    return pack_bits(by_step.reshape(tiles, units, 32, 32), 4)


def _unpack_places(places: Value, n: int, k: int, per: int) -> Value:
    """uint8 [n, k / 4]: the bits of each four, of what `_pack_places` made."""
    tiles, units = places.shape[:2]
    bits = unpack_bits(places, 4, 32).reshape(tiles, units, 8, 2, 2, 4, 8).transpose(0, 1, 2, 5, 3, 4, 6)
    apart = bits.reshape(tiles, units, 8, 16 // per, per // 2, 2, 2, 4).transpose(0, 6, 2, 1, 3, 7, 4, 5)
    return apart.reshape(tiles * ROWS, units * INPUTS // 4).part(0, 0, n).part(1, 0, k // 4)


def _semi_structured(
    x: Value, values: Value, places: Value, scales: Value | None, zeros: Value | None, b: Value | None, r: Value | None, *, outputs: int,
    scheme: str, group: int, gated: bool, activation: str,
) -> Value:  # fmt: skip
    k, n, kind = x.shape[-1], values.shape[0], SCHEMES.get(scheme)
    wide = "float64" if x.dtype == "float64" else "float32"
    if kind is None or scales is None:
        pairs = values.astype(wide).reshape(n, k // 4, 2)
    else:
        per = kind.per_byte
        single = unpack_bits(values, 8 // per, values.shape[1] * per).reshape(n, -1, 2, 2 * per).transpose(0, 1, 3, 2)
        codes = single.reshape(n, k // 2)
        s, z = (None if v is None else v.reshape(n, -1) for v in (scales, zeros))
        assert s is not None
        codes = codes if kind.bits == 8 else codes & (2**kind.bits - 1)
        found = weight_values(codes, s.astype("float32"), z, kind, (group or k) // 2)
        pairs = found.astype(wide).reshape(n, k // 4, 2)
    bits = _unpack_places(places, n, k, fours(x.dtype, scheme))
    place = x.body.iota((n, k // 4, 4), 2, "uint8")
    parts = [
        at.expand(-1).broadcast(place.shape).equals(place).select(pairs.pick(2, i).expand(-1).broadcast(place.shape), 0)
        for i, at in enumerate((bits & 3, bits >> 2))
    ]
    w = (parts[0] + parts[1]).reshape(n, k)

    def product(rows: Value) -> Value:
        return x.wide().dot(rows, (-1, 1), to=wide, exact=x.dtype != "bfloat16")

    if gated:
        return gate(product(w.part(0, 0, n, 2)), product(w.part(0, 1, n, 2)), activation, x.dtype)
    return finish(product(w), b, r, activation, x.dtype)


EMITTERS: Mapping[Op, Callable[..., Any]] = {
    ops.expand: plain(lambda values, mask, *, k: spread_kept(values, mask, k)[0]),
    ops.fill_codes: plain(_fill_codes),
    ops.pack_mask: plain(_pack_mask),
    ops.pack_starts: plain(_pack_starts),
    ops.pack_places: plain(_pack_places),
    ops.pack_values: plain(_pack_values),
    ops.semi_structured_linear: plain(_semi_structured),
    ops.sparse_linear: plain(_sparse_linear),
    ops.sparse_take: plain(_sparse_take),
}
