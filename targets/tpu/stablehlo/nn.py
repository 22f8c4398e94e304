"""Emitters of norms, rotary embedding, attention and the KV cache.

A cache's rows that were never written must hold finite numbers (zeros, say): they are multiplied by probabilities of 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from jisu.compiler import ops
from jisu.compiler.errors import InputError
from jisu.compiler.graph import Op
from jisu.targets.tpu.stablehlo.build import Body, Value
from jisu.targets.tpu.stablehlo.contract import rounded, summed
from jisu.targets.tpu.stablehlo.elementwise import plain
from jisu.targets.tpu.stablehlo.rows import decode


def _rms_norm(x: Value, w: Value | None, *, eps: float, offset: float, round_first: bool) -> Value:
    v = x.wide()
    normed = v / ((v * v).mean(-1, keepdims=True) + eps).unary("sqrt")
    if w is None:
        return normed.astype(x.dtype)
    gain = w.wide() + offset if offset else w.wide()
    return ((rounded(normed, x.dtype) if round_first else normed) * gain).astype(x.dtype)


def _layer_norm(x: Value, w: Value | None, b: Value | None, *, eps: float) -> Value:
    v = x.wide()
    centred = v - v.mean(-1, keepdims=True)
    normed = centred / ((centred * centred).mean(-1, keepdims=True) + eps).unary("sqrt")
    normed = normed if w is None else normed * w.wide()
    return (normed if b is None else normed + b.wide()).astype(x.dtype)


def _rotary(x: Value, cos: Value, sin: Value, *, interleaved: bool) -> Value:
    body, width = x.body, cos.shape[-1]
    c, s = (v.wide().expand(2) for v in (cos, sin))
    v = x.wide()
    turned = v.part(-1, 0, width)
    if interleaved:
        pairs = turned.reshape(*turned.shape[:-1], width // 2, 2)
        even, odd = pairs.part(-1, 0, 1), pairs.part(-1, 1, 2)
        other = body.concat([-odd, even], pairs.rank - 1).reshape(*turned.shape)
    else:
        other = body.concat([-turned.part(-1, width // 2, width), turned.part(-1, 0, width // 2)], 3)
    found = rounded(turned * c, x.dtype) + rounded(other * s, x.dtype)
    parts = [found, v.part(-1, width, v.shape[-1])] if width < v.shape[-1] else [found]
    return body.concat(parts, 3).astype(x.dtype)


# --- Attention --------------------------------------------------------------------------------------------------------------
# Queries are [b, g, r, s, d] for r queries per key and value head, scores [b, g, r, s, t]; keys and values stay as they lie.


def _scores(q: Value, k: Value, heads: int, scale: float, softcap: float) -> Value:
    """[b, g, r, s, t] of q [b, s, h, d] and k with the batch at axis 0, heads at axis `heads` and channels last."""
    b, s, h, d = q.shape
    g = k.shape[heads]
    queries = q.reshape(b, s, g, h // g, d).transpose(0, 2, 3, 1, 4)
    if k.dtype != q.dtype:
        queries = queries.astype(k.dtype)
    found = queries.dot(k, (-1, -1), [(0, 0), (1, heads)], to=summed(k.dtype), exact=q.dtype != "bfloat16") * scale
    return (found / softcap).unary("tanh") * softcap if softcap else found


def _attend(
    scores: Value, v: Value, heads: int, sinks: Value | None, visible: Value | None, dtype: str, empty_nan: bool
) -> Value:
    """[b, s, h, e] of scores [b, g, r, s, t] and values with heads at axis `heads`."""
    b, g, r, s, _ = scores.shape
    if visible is not None:
        scores = visible.select(scores, float("-inf"))
    peak = scores.max(-1, keepdims=True)
    sink = None if sinks is None else sinks.wide().reshape(1, g, r, 1, 1)
    if sink is not None:
        peak = peak.maximum(sink)
    if not empty_nan:
        peak = peak.equals(float("-inf")).select(0, peak)
    e = (scores - peak).unary("exponential")
    total = e.sum(-1, keepdims=True)
    if sink is not None:
        total = total + (sink - peak).unary("exponential")
    if not empty_nan:
        total = total.equals(0).select(1, total)  # a row that sees nothing: all e are 0
    p = e / total
    rows = v.rank - 2 if heads == 1 else 1
    found = p.dot(v.wide().astype(p.dtype), (-1, rows), [(0, 0), (1, heads)], to=p.dtype, exact=dtype != "bfloat16")
    return found.transpose(0, 3, 1, 2, 4).reshape(b, s, g * r, found.shape[-1]).astype(dtype)


def _attention(
    q: Value, k: Value, v: Value, bias: Value | None, sinks: Value | None, *, scale: float, causal: bool, window: int, softcap: float
) -> Value:  # fmt: skip
    s, t, g = q.shape[1], k.shape[1], k.shape[2]
    scores = _scores(q, k, 2, scale, softcap)
    visible = None
    if causal:
        i, j = q.body.iota((s, t), 0) + (t - s), q.body.iota((s, t), 1)
        visible = (j <= i) & (j > i - window) if window else j <= i
    added = bias is not None and bias.dtype != "bool"
    if bias is not None:
        n, h, *rest = bias.shape
        spread = bias.reshape(n, g, h // g, *rest) if h > 1 else bias.reshape(n, 1, 1, *rest)
        if added:
            scores = scores + spread.wide()
        else:
            visible = spread if visible is None else visible & spread
    return _attend(scores, v, 2, sinks, visible, q.dtype, added)


# --- The KV cache -----------------------------------------------------------------------------------------------------------


def _append(cache: Value, new: Value, length: Value, table: Value | None, *, ring: bool) -> Value:
    """A block that is written where it lies; in a ring, and behind a table, rows that are written each at its place.

    Beyond the capacity, which the interpreter refuses, a block moves back to the last rows.
    """
    body, page = cache.body, cache.shape[2]
    first = length.astype("int32").reshape()
    batch, chunk = new.shape[:2]
    capacity = page * (table.shape[1] if table is not None else 1)
    if not ring and chunk > capacity:
        raise InputError(f"a chunk of {chunk} tokens doesn't fit into a cache of {capacity}; choose a smaller bucket")
    if table is None and (not ring or chunk == 1):
        zero = body.full(0, (), "int32")
        at = first % capacity if ring else first
        return cache.dynamic_update(new.transpose(0, 2, 1, 3), [zero, zero, at, zero])
    if ring and chunk > capacity:  # of rows that fall onto one place the last one stays
        new = new.part(1, chunk - capacity, chunk)
        first = first + (chunk - capacity)
        chunk = capacity
    slots = body.iota((chunk,), 0) + first
    slots = slots % capacity if ring else slots
    if table is None:
        return cache.scatter(slots.expand(-1), new.transpose(1, 0, 2, 3), [2], unique=True)
    pages = table.transpose(1, 0).take(slots / page, 0)  # [chunk, b]
    inside = (slots % page).expand(-1).broadcast((chunk, batch))
    if cache.dtype != "uint8":
        return cache.scatter(body.stack([pages, inside], -1), new.transpose(1, 0, 2, 3), [0, 2])
    # Row by row: XLA brings bytes that are written across a page's heads into another layout first, all that there are.
    where, heads = (chunk, batch, cache.shape[1]), body.iota((cache.shape[1],), 0)
    places = [pages.expand(-1).broadcast(where), heads.broadcast(where), inside.expand(-1).broadcast(where)]
    return cache.scatter(body.stack(places, -1), new.transpose(1, 0, 2, 3), [0, 1, 2])


def _cached_rows(cache: Value, table: Value | None) -> Value:
    """A cache as [b, g, rows, d], read through the table of pages where there is one."""
    if table is None:
        return cache
    found = cache.take(table, 0).transpose(0, 2, 1, 3, 4)  # [b, g, pages, page, d]
    b, g, pages, page, d = found.shape
    return found.reshape(b, g, pages * page, d)


def _attention_cached(
    body: Body, q: Value, keys: Value, values: Value, length: Value, start: Value, table: Value | None, sinks: Value | None, *,
    scale: float, window: int, softcap: float, scheme: str,
) -> Value:  # fmt: skip
    keys, values = _cached_rows(keys, table), _cached_rows(values, table)
    b, c, rows = q.shape[0], q.shape[1], keys.shape[2]
    if scheme != "none":
        keys, values = decode(keys, scheme), decode(values, scheme)
        if q.dtype == "float64":
            keys, values = keys.astype("float64"), values.astype("float64")
    first = length.astype("int32").reshape()
    last = first + (c - 1)
    # Row r holds the newest slot n with n % rows == r; where that is negative, nothing.
    slots = last - ((last - body.iota((rows,), 0)) % rows + rows) % rows
    i, j = (body.iota((c,), 0) + first).expand(-1), slots.expand(0)
    visible = (j <= i) & (j >= 0)
    visible = visible & (j > i - window) if window else visible
    visible = visible.expand(0) & (slots.expand(0).expand(0) >= start.astype("int32").reshape(b, 1, 1))
    scores = _scores(q, keys, 1, scale, softcap)
    return _attend(scores, values, 1, sinks, visible.reshape(b, 1, 1, c, rows), q.dtype, empty_nan=False)


EMITTERS: Mapping[Op, Callable[..., Any]] = {
    ops.rms_norm: plain(_rms_norm),
    ops.layer_norm: plain(_layer_norm),
    ops.rotary: plain(_rotary),
    ops.attention: plain(_attention),
    ops.cache_append: plain(_append),
    ops.attention_cached: _attention_cached,
}
