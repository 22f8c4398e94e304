"""Emitters of numbers in few bits that a program makes by itself: rounded values, records of rows, records of levels.

See `jisu.compiler.schemes`, `jisu.compiler.rows` and `jisu.compiler.levels` for the forms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from jisu.compiler import levels, ops
from jisu.compiler.graph import Op
from jisu.compiler.rows import TAIL
from jisu.compiler.schemes import SCHEMES, Scheme, exponent, groups_of
from jisu.targets.tpu.stablehlo.build import Value
from jisu.targets.tpu.stablehlo.elementwise import plain
from jisu.targets.tpu.stablehlo.quantize import level


def clip(x: Value, low: float, high: float) -> Value:
    """x between low and high; NaN stays."""
    return x.maximum(low).minimum(high)


def _power(e: Value) -> Value:
    """2 to the int32 e, from -126 to 127, as float32."""
    return ((e + 127) << 23).bits("float32")


def _exponent(v: Value) -> Value:
    """`jisu.compiler.schemes.exponent`: int32."""
    return ((v.bits("int32") >> 23) & 255) - 127


def _positive(scales: Value) -> Value:
    return scales.equals(0).select(1, scales)


def nearest(v: Value, kind: Scheme) -> Value:
    """`Scheme.rounded`: the nearest levels relative to the middle."""
    if kind.uniform:
        return clip(v.unary("round_nearest_even"), -kind.middle, kind.top)
    step = _power(_exponent(v).maximum(1 - kind.bias) - kind.mantissa)
    return clip((v / step).unary("round_nearest_even") * step, -kind.top, kind.top)


def running_scales(groups: Value, kind: Scheme, given: Value | None) -> Value:
    """`Scheme.running_scales`: float32 [*b, groups, 1] of [*b, groups, g]."""
    reach = groups.unary("abs").max(-1, keepdims=True)
    if kind.scale == "e8m0":
        top = int(exponent(np.float32(kind.top)))
        return _power((_exponent(reach) - top).maximum(-126).minimum(127))
    if kind.scale == "e4m3":
        step = given if given is not None else _positive(reach.max(-2, keepdims=True) / (kind.top * 448))
        codes = nearest(reach / kind.top / step, SCHEMES["fp8"])
        return codes.maximum(2.0**-9) * step
    return _positive(reach / kind.top) if given is None else given.broadcast(reach.shape)


def _fake_quantize(x: Value, scale: Value | None, *, scheme: str, group: int) -> Value:
    kind, k = SCHEMES[scheme], x.shape[-1]
    groups = x.astype("float32").reshape(*x.shape[:-1], k // (group or k), group or k)
    scales = running_scales(groups, kind, scale)
    return (nearest(groups / scales, kind) * scales).reshape(*x.shape).astype(x.dtype)


# --- Records of rows --------------------------------------------------------------------------------------------------------


def _row_levels(steps: Value, kind: Scheme) -> Value:
    return clip(steps.unary("round_nearest_even"), 0, 2**kind.bits - 1) if kind.uniform else nearest(steps, kind)


def _encode_rows(x: Value, feedback: Value | None, *, scheme: str) -> Value:
    body, w, kind = x.body, x.astype("float32"), SCHEMES[scheme]
    if kind.uniform:
        low, high = w.min(-1, keepdims=True), w.max(-1, keepdims=True)
        offset = low.rounded("bfloat16")
        scale = ((high - offset) / (2**kind.bits - 1)).rounded("bfloat16")
    else:
        scale = (w.unary("abs").max(-1, keepdims=True) / kind.top).rounded("bfloat16")
        offset = body.full(0, scale.shape, "float32")
    steps = (w - offset) / _positive(scale)
    found = _row_levels(steps if feedback is None else _fed_back(steps, kind, feedback), kind)
    found = found.isnan().select(0, found)
    codes = found.astype("int32").astype("uint8") if kind.uniform else _small_float(found).astype("int8").bits("uint8")
    k = codes.shape[-1]
    if kind.bits == 4:
        codes = codes.part(-1, 0, k // 2) | codes.part(-1, k // 2, k) << 4
    tail = body.concat([scale, offset], x.rank - 1).astype("bfloat16").bits("uint8").reshape(*x.shape[:-1], TAIL)
    return body.concat([codes, tail], x.rank - 1)


def _fed_back(steps: Value, kind: Scheme, feedback: Value) -> Value:
    """What numbers are to be rounded from, each behind the errors of those before it."""
    *lead, g, k = steps.shape

    def step(j: Value, wanted: Value, steps: Value, feedback: Value) -> list[Value]:
        zero, sizes = j.body.full(0, (), "int32"), (*lead, g, 1)
        at = [zero] * (steps.rank - 1) + [j]
        error = _row_levels(wanted.dynamic_slice(at, sizes), kind) - steps.dynamic_slice(at, sizes)
        row = feedback.dynamic_slice([zero, j, zero], (g, 1, k)).reshape(g, k)
        row = (j.body.iota((g, k), 1) > j).select(row, 0)
        return [wanted - row * error, steps, feedback]

    return steps.body.loop(k, [steps, steps, feedback], step)[0]


def decode(records: Value, scheme: str) -> Value:
    """`jisu.compiler.rows.decode`: float32 [*b, k] of records uint8 [*b, bytes]."""
    n = records.shape[-1] - TAIL
    codes = records.part(-1, 0, n)
    if SCHEMES[scheme].bits == 4:
        codes = records.body.concat([codes & 15, codes >> 4], codes.rank - 1)
    tail = records.part(-1, n, n + TAIL).reshape(*records.shape[:-1], 2, 2).bits("bfloat16").wide()
    return level(codes, SCHEMES[scheme]) * tail.part(-1, 0, 1) + tail.part(-1, 1, 2)


# --- Records of levels ------------------------------------------------------------------------------------------------------


def _small_float(value: Value) -> Value:
    """The code int32, from -128 to 127, of float32 that e4m3 holds."""
    bits = value.bits("int32")
    size = (bits & 0x7FFFFFFF) >> 20
    code = (size < (121 << 3)).select((value.unary("abs") * 2.0**9).astype("int32"), size - (120 << 3))
    return (bits < 0).select(code - 128, code)


def _encode_levels(x: Value, scale: Value | None, *, scheme: str, group: int, own: bool) -> Value:
    body, kind, (*lead, k) = x.body, SCHEMES[scheme], x.shape
    size, count = group or k, groups_of(k, group)
    shared = x.astype("float32").padded(-1, count * size).reshape(*lead, count if own else 1, -1)
    scales = running_scales(shared, kind, scale)
    found = nearest(shared / scales, kind)
    lost = shared.isnan().reduce("or", [-1], keepdims=True) | ~scales.isfinite()
    scales = lost.select(float("nan"), scales).reshape(*lead, -1)
    found = found.isnan().select(0, found)
    whole = (found.astype("int32") if kind.uniform else _small_float(found)).astype("int8").reshape(*lead, count, size)
    sums = whole.astype("int32").sum(-1) if kind.uniform else body.full(0, (*lead, count), "int32")
    records = levels.record_bytes(k, group, own)
    first = whole.reshape(*lead, count * size).part(-1, 0, k).bits("uint8").padded(-1, levels.scale_offset(k))
    parts = [first, *(v.bits("uint8").reshape(*lead, -1) for v in (scales, sums))]
    return body.concat(parts, x.rank - 1).padded(-1, records)


EMITTERS: Mapping[Op, Callable[..., Any]] = {
    ops.fake_quantize: plain(_fake_quantize),
    ops.encode_rows: plain(_encode_rows),
    ops.decode_rows: plain(lambda records, *, scheme, dtype: decode(records, scheme).astype(dtype)),
    ops.encode_levels: plain(_encode_levels),
}
