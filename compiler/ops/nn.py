"""The ops that models of language are made of: norms, rotary embedding, attention, experts, and the KV cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from jisu.compiler import rows
from jisu.compiler.errors import InputError
from jisu.compiler.graph import defop
from jisu.compiler.ops.contract import ACTIVATIONS, _activate, _linear, _round, _wide
from jisu.compiler.types import TensorType, dim, is_float, is_integer, product, require, same_dim, same_shape

Samples = Iterator[tuple[tuple[str | None, ...], dict[str, Any]]]


def _rms_norm(x: np.ndarray, w: np.ndarray | None, *, eps: float, offset: float, round_first: bool) -> np.ndarray:
    v = _wide(x)
    normed = v / np.sqrt(np.mean(np.square(v), -1, keepdims=True) + eps)
    if w is None:
        return np.asarray(normed).astype(x.dtype)
    gain = _wide(w) + offset  # type: ignore[operator]
    if round_first:
        return np.asarray(_round(normed, x.dtype) * gain).astype(x.dtype)
    return np.asarray(normed * gain).astype(x.dtype)


def _rms_samples() -> Samples:
    yield ("float32[2, 4]", "float32[4]"), {"eps": 1e-6, "offset": 1.0, "round_first": False}
    yield ("float32[2, 4]", None), {"eps": 1e-6}


@defop(meaning=_rms_norm, axes="*b d!, d -> *b d!", flops=6, samples=_rms_samples)
def rms_norm(
    x: TensorType, w: TensorType | None = None, *, eps: float, offset: float = 0.0, round_first: bool = True
) -> TensorType:
    """x / sqrt(mean(x²) + eps) * (w + offset) over the last axis, computed in float32 (Zhang and Sennrich, 2019).

    `round_first`: round to x's dtype before the gain (as Llama does) instead of behind it (as Gemma does).
    """
    require(x.rank >= 1 and is_float(x.dtype), f"needs floats with a last axis, got {x}")
    require(
        w is None or w == TensorType((x.shape[-1],), x.dtype), f"the gain must be {x.dtype}[{x.shape[-1]}], got {w}"
    )
    return x


def _layer_norm(x: np.ndarray, w: np.ndarray | None, b: np.ndarray | None, *, eps: float) -> np.ndarray:
    v = _wide(x)
    centred = v - np.mean(v, -1, keepdims=True)
    normed = centred / np.sqrt(np.mean(np.square(centred), -1, keepdims=True) + eps)
    if w is not None:
        normed = normed * _wide(w)
    if b is not None:
        normed = normed + _wide(b)
    return np.asarray(normed).astype(x.dtype)


def _layer_samples() -> Samples:
    yield ("float32[2, 4]", "float32[4]", "float32[4]"), {"eps": 1e-5}
    yield ("float32[2, 4]", None, None), {"eps": 1e-5}


@defop(meaning=_layer_norm, axes="*b d!, d, d -> *b d!", flops=9, samples=_layer_samples)
def layer_norm(x: TensorType, w: TensorType | None = None, b: TensorType | None = None, *, eps: float) -> TensorType:
    """(x - mean) / sqrt(variance + eps) * w + b over the last axis, computed in float32 (Ba et al., 2016)."""
    require(x.rank >= 1 and is_float(x.dtype), f"needs floats with a last axis, got {x}")
    for name, v in (("gain", w), ("bias", b)):
        require(
            v is None or v == TensorType((x.shape[-1],), x.dtype),
            f"the {name} must be {x.dtype}[{x.shape[-1]}], got {v}",
        )
    return x


def _rotary(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, *, interleaved: bool) -> np.ndarray:
    width = cos.shape[-1]
    v, c, s = _wide(x), _wide(cos), _wide(sin)
    turned, rest = v[..., :width], v[..., width:]
    c, s = c[:, :, None, :], s[:, :, None, :]
    if interleaved:
        rotated = np.stack([-turned[..., 1::2], turned[..., ::2]], -1).reshape(turned.shape)
    else:
        rotated = np.concatenate([-turned[..., width // 2 :], turned[..., : width // 2]], -1)
    result = _round(turned * c, x.dtype) + _round(rotated * s, x.dtype)
    return np.concatenate([result, rest], -1).astype(x.dtype)


def _rotary_samples() -> Samples:
    yield ("float32[2, 3, 2, 6]", "float32[2, 3, 4]", "float32[2, 3, 4]"), {"interleaved": False}
    yield ("float32[1, 3, 2, 4]", "float32[1, 3, 4]", "float32[1, 3, 4]"), {"interleaved": True}


def _rotary_axes(x: TensorType, cos: TensorType, sin: TensorType, **_: Any) -> str:
    angles = "1 s r!" if cos.shape[0] == 1 else "b s r!"
    return f"b s h d!, {angles}, {angles} -> b s h d!"


@defop(meaning=_rotary, axes=_rotary_axes, flops=3, samples=_rotary_samples)
def rotary(x: TensorType, cos: TensorType, sin: TensorType, *, interleaved: bool = False) -> TensorType:
    """Rotary embedding of x [batch, sequence, heads, d] by cos, sin [batch or 1, sequence, r] (Su et al., 2021).

    The first r <= d channels turn: channel i with i + r/2, or, interleaved, 2i with 2i + 1. The rest passes through.
    """
    require(x.rank == 4 and cos.rank == 3 and is_float(x.dtype), f"needs [b, s, h, d] and [b, s, r], got {x} and {cos}")
    require(cos == sin and cos.dtype == x.dtype, f"cos and sin must be of one type with x's dtype, got {cos} and {sin}")
    require(
        (cos.shape[0] == 1 or same_dim(cos.shape[0], x.shape[0])) and same_dim(cos.shape[1], x.shape[1]),
        f"cos {cos} doesn't fit {x}",
    )
    r, d = cos.shape[2], x.shape[3]
    require(
        isinstance(r, int) and isinstance(d, int) and r % 2 == 0 and r <= d, f"turned width {r} must be even and <= {d}"
    )
    return x


def _scores(q: np.ndarray, k: np.ndarray, scale: float, softcap: float) -> np.ndarray:
    """[b, h, s, t] in float32 or float64 from q [b, s, h, d] and k [b, t, g, d] (g divides h)."""
    repeat = q.shape[2] // max(k.shape[2], 1)
    keys = np.repeat(_wide(k), repeat, axis=2)
    scores = _wide(q).transpose(0, 2, 1, 3) @ keys.transpose(0, 2, 3, 1) * scale
    return softcap * np.tanh(scores / softcap) if softcap else scores


def _attend(
    scores: np.ndarray, v: np.ndarray, sinks: np.ndarray | None, visible: np.ndarray | None, dtype: Any, empty_nan: bool
) -> np.ndarray:
    if visible is not None:
        scores = np.where(visible, scores, -np.inf)
    peak = np.max(scores, -1, keepdims=True, initial=-np.inf)
    if sinks is not None:
        sink = _wide(sinks)[None, :, None, None]  # type: ignore[index]
        peak = np.maximum(peak, sink)
    if not empty_nan:
        peak = np.where(np.isneginf(peak), 0, peak)
    with np.errstate(invalid="ignore", divide="ignore"):
        e = np.exp(scores - peak)
        total = e.sum(-1, keepdims=True)
        if sinks is not None:
            total = total + np.exp(sink - peak)
        p = e / total
    if not empty_nan:
        p = np.where(total == 0, 0, p)
    repeat = scores.shape[1] // max(v.shape[2], 1)
    found = p @ np.repeat(_wide(v), repeat, axis=2).transpose(0, 2, 1, 3)
    return found.transpose(0, 2, 1, 3).astype(dtype, order="C")


def _attention(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    bias: np.ndarray | None,
    sinks: np.ndarray | None,
    *,
    scale: float,
    causal: bool,
    window: int,
    softcap: float,
) -> np.ndarray:
    s, t = q.shape[1], k.shape[1]
    scores = _scores(q, k, scale, softcap)
    visible = None
    if causal:
        i, j = np.arange(t - s, t)[:, None], np.arange(t)[None, :]
        visible = (j <= i) & (j > i - window) if window else j <= i
    if bias is not None and bias.dtype == np.bool_:
        visible = bias if visible is None else visible & bias
    elif bias is not None:
        scores = scores + _wide(bias)
    return _attend(scores, v, sinks, visible, q.dtype, empty_nan=bias is not None and bias.dtype != np.bool_)


def _attention_axes(
    q: TensorType, k: TensorType, v: TensorType, bias: Any, sinks: Any, *, causal: bool, **_: Any
) -> str:
    t = "t<" if causal and bias is None else "t"
    bias_axes = (
        ""
        if bias is None
        else " ".join(["1" if n == 1 else a for n, a in zip(bias.shape, ("b", "h", "s", "t"), strict=True)])
    )
    return f"b s h d, b {t} g d, b {t} g e, {bias_axes}, {'h' if sinks is not None else ''} -> b s h e"


def _attention_samples() -> Samples:
    plain = {"scale": 0.5}
    yield (
        ("float32[2, 3, 4, 2]", "float32[2, 3, 2, 2]", "float32[2, 3, 2, 3]", None, None),
        {**plain, "causal": True, "window": 2},
    )
    yield (
        ("float32[1, 2, 2, 2]", "float32[1, 3, 1, 2]", "float32[1, 3, 1, 2]", "float32[1, 1, 2, 3]", "float32[2]"),
        plain,
    )
    yield (
        ("float32[1, 2, 2, 2]", "float32[1, 3, 1, 2]", "float32[1, 3, 1, 2]", None, "float32[2]"),
        {**plain, "softcap": 5.0},
    )


def _attention_flops(result: TensorType, q: TensorType, k: TensorType, v: TensorType, *_: Any, **__: Any) -> Any:
    b, s, h, d = q.shape
    return 2 * b * s * h * k.shape[1] * (d + v.shape[3])


@defop(meaning=_attention, axes=_attention_axes, flops=_attention_flops, samples=_attention_samples)
def attention(
    q: TensorType,
    k: TensorType,
    v: TensorType,
    bias: TensorType | None = None,
    sinks: TensorType | None = None,
    *,
    scale: float,
    causal: bool = False,
    window: int = 0,
    softcap: float = 0.0,
) -> TensorType:
    """softmax(softcap·tanh(scale·q·k / softcap) + bias) v: q [b, s, h, d], k [b, t, g, d], v [b, t, g, e] -> [b, s, h, e].

    g divides h (grouped queries). `causal`: query i sees keys up to t - s + i, and with `window` > 0 only the last
    `window` of those. `bias` [b or 1, h or 1, s or 1, t] is added (float: a row of -inf gives NaN, as softmax does) or
    selects keys (bool: a row without keys gives 0). `sinks` [h] join the denominator only.
    """
    require(q.rank == k.rank == v.rank == 4 and is_float(q.dtype), f"needs [b, s, h, d] floats, got {q}, {k} and {v}")
    require(q.dtype == k.dtype == v.dtype, f"dtypes differ: {q}, {k} and {v}")
    require(
        same_shape(k.shape[:3], v.shape[:3]) and same_dim(q.shape[3], k.shape[3]),
        f"{q}, {k} and {v} don't fit together",
    )
    require(same_dim(q.shape[0], k.shape[0]), f"batches differ: {q} and {k}")
    h, g = q.shape[2], k.shape[2]
    require(isinstance(h, int) and isinstance(g, int) and g > 0 and h % g == 0, f"{g} KV heads don't divide {h} heads")
    require(window >= 0 and (causal or not window), "a window needs causal=True and at least one key")
    full = (q.shape[0], h, q.shape[1], k.shape[1])
    if bias is not None:
        require(
            bias.dtype in ("bool", q.dtype) and bias.rank == 4, f"bias must be bool or {q.dtype} of rank 4, got {bias}"
        )
        fits = all(n == 1 or same_dim(n, m) for n, m in zip(bias.shape, full, strict=True))
        require(fits, f"bias {bias} doesn't broadcast to {full}")
    require(sinks is None or sinks == TensorType((h,), q.dtype), f"sinks must be {q.dtype}[{h}], got {sinks}")
    return q.with_shape(*q.shape[:3], v.shape[3])


def _experts(
    x: np.ndarray, index: np.ndarray, scores: np.ndarray, gate_up: np.ndarray, down: np.ndarray, *, activation: str
) -> np.ndarray:
    result = np.zeros(x.shape, _wide(x).dtype)  # type: ignore[union-attr]
    for t in range(x.shape[0]):
        for e, s in zip(index[t], _wide(scores)[t], strict=True):  # type: ignore[index]
            if not 0 <= e < gate_up.shape[0]:
                continue
            both = _round(np.matmul(_wide(gate_up)[e], _wide(x)[t]), x.dtype)  # type: ignore[index]
            gate, up = np.split(both, 2)
            inner = _round(_round(_activate(gate, activation), x.dtype) * up, x.dtype)
            out = _round(np.matmul(_wide(down)[e], inner), x.dtype)  # type: ignore[index]
            result[t] += _round(out * s, x.dtype)
    return result.astype(x.dtype)


def _experts_flops(result: TensorType, x: TensorType, index: TensorType, *weights: TensorType, **_: Any) -> Any:
    return 6 * index.size * weights[-1].shape[2] * x.shape[1]


def _experts_samples() -> Samples:
    yield (
        ("float32[3, 4]", "int64[3, 2] < 5", "float32[3, 2]", "float32[5, 6, 4]", "float32[5, 4, 3]"),
        {"activation": "silu"},
    )


@defop(meaning=_experts, axes="t c, t k, t k, e i c, e h j -> t h", flops=_experts_flops, samples=_experts_samples)
def experts(
    x: TensorType, index: TensorType, scores: TensorType, gate_up: TensorType, down: TensorType, *, activation: str
) -> TensorType:
    """A mixture of gated MLPs: for token t the sum over its k experts e = index[t, j] of
    scores[t, j] * (activation(g) * u) @ down[e].T with g, u = halves of x @ gate_up[e].T (Shazeer et al., 2017).

    x [tokens, h], index [tokens, k] integers, scores [tokens, k], gate_up [e, 2i, h], down [e, h, i]. An index outside
    0..e-1 contributes nothing.
    """
    require(
        x.rank == 2 and gate_up.rank == down.rank == 3,
        f"needs x [t, h] and weights of rank 3, got {x}, {gate_up}, {down}",
    )
    require(
        is_integer(index.dtype) and same_shape(index.shape, scores.shape),
        f"index {index} and scores {scores} don't fit",
    )
    require(x.dtype == scores.dtype == gate_up.dtype == down.dtype, f"dtypes differ: {x}, {scores}, {gate_up}, {down}")
    e, two_i, h = gate_up.shape
    require(
        not isinstance(two_i, int) or two_i % 2 == 0, f"gate_up {gate_up} must hold gate and up, an even number of rows"
    )
    require(
        same_shape(down.shape, (e, h, dim(two_i // 2))) and same_dim(x.shape[1], h),
        f"{gate_up}, {down} and {x} don't fit",
    )
    require(activation in ACTIVATIONS, f"unknown activation {activation!r}; known: {', '.join(ACTIVATIONS)}")
    return x


def _expert_linear(x: np.ndarray, index: np.ndarray, w: np.ndarray, b: np.ndarray | None) -> np.ndarray:
    result = np.zeros((*index.shape, w.shape[1]), x.dtype)
    rows = np.broadcast_to(x, (*index.shape, x.shape[-1]))
    for place in np.ndindex(index.shape):  # one by one: what a row gives depends on no other
        e = index[place]
        if 0 <= e < w.shape[0]:
            result[place] = _linear(rows[place], w[e], None if b is None else b[e], None, activation="none")
    return result


def _expert_linear_axes(x: TensorType, index: TensorType, w: TensorType, b: TensorType | None = None) -> str:
    return f"t {'1' if x.shape[1] == 1 else 'k'} c, t k, e n c, {'e n' if b is not None else ''} -> t k n"


def _expert_linear_samples() -> Samples:
    yield ("float32[3, 2, 4]", "int64[3, 2] < 5", "float32[5, 6, 4]", "float32[5, 6]"), {}
    yield ("float32[3, 1, 4]", "int32[3, 2] < 5", "float32[5, 6, 4]", None), {}


def _expert_linear_flops(result: TensorType, x: TensorType, *_: Any, **__: Any) -> Any:
    return 2 * result.size * x.shape[2]


@defop(meaning=_expert_linear, axes=_expert_linear_axes, flops=_expert_linear_flops, samples=_expert_linear_samples)
def expert_linear(x: TensorType, index: TensorType, w: TensorType, b: TensorType | None = None) -> TensorType:
    """A linear layer of the experts that tokens choose: x[t, j] @ w[e].T + b[e] with e = index[t, j].

    What `experts` is made of where it isn't the common form: biases, other gates, none, or norms behind it. x [tokens, k, inputs], or
    [tokens, 1, inputs] for all k choices of a token, index [tokens, k] integers, w [e, outputs, inputs], b [e, outputs]:
    [tokens, k, outputs]. An index outside 0..e-1 gives zeros.
    """
    require(
        x.rank == w.rank == 3 and is_float(x.dtype), f"needs floats x [t, k, c] and weights [e, n, c], got {x}, {w}"
    )
    require(index.rank == 2 and is_integer(index.dtype), f"index must be integers [t, k], got {index}")
    require(
        same_dim(x.shape[0], index.shape[0]) and (x.shape[1] == 1 or same_dim(x.shape[1], index.shape[1])),
        f"{x} and index {index} don't fit",
    )
    require(x.dtype == w.dtype and same_dim(x.shape[2], w.shape[2]), f"{x} and weights {w} don't fit")
    want = TensorType(w.shape[:2], x.dtype)
    require(b is None or b == want, f"the bias must be {want}, got {b}")
    return x.with_shape(*index.shape, w.shape[1])


# --- The KV cache --------------------------------------------------------------------------------------------------
# Slot n of a sequence lives at row n % capacity (a ring where capacity is smaller than the sequence), in a paged cache
# behind a table of pages. `start[b]` counts the padding slots in front of sequence b: they are never read.


def _rows(cache: np.ndarray, table: np.ndarray | None, slots: np.ndarray) -> np.ndarray:
    """cache rows [b, slots, g, d] of every sequence, read through the page table where there is one."""
    if table is None:
        return np.transpose(cache[:, :, slots % cache.shape[2]], (0, 2, 1, 3))
    page = cache.shape[2]
    ring = table.shape[1] * page
    slots = slots % ring
    pages = table[:, slots // page]  # [b, slots]
    return cache[pages, :, slots % page]


def _cache_append(
    cache: np.ndarray, new: np.ndarray, length: np.ndarray, table: np.ndarray | None, *, ring: bool
) -> np.ndarray:
    result = cache.copy()
    slots = int(length[0]) + np.arange(new.shape[1])
    page = cache.shape[2]
    capacity = page if table is None else table.shape[1] * page
    if not ring and slots.size and slots[-1] >= capacity:
        raise InputError(f"slot {slots[-1]} is beyond the cache's capacity of {capacity}")
    for i, slot in enumerate(slots % capacity):
        for b in range(new.shape[0]):
            where = b if table is None else table[b, slot // page]
            result[where, :, slot % page] = new[b, i]
    return result


def _append_samples() -> Samples:
    yield ("float32[2, 2, 9, 3]", "float32[2, 2, 2, 3]", "int64[1] < 7", None), {"ring": False}
    yield ("float32[4, 2, 3, 3]", "float32[2, 2, 2, 3]", "int64[1] < 4", "int32[2, 2] < 4"), {"ring": True}


@defop(meaning=_cache_append, axes=None, flops=0, samples=_append_samples)
def cache_append(
    cache: TensorType, new: TensorType, length: TensorType, table: TensorType | None = None, *, ring: bool = False
) -> TensorType:
    """The cache with `new` [b, c, g, d] written to slots length … length + c - 1; targets write in place.

    cache: contiguous [b, g, capacity, d], or pages [pages, g, page, d] behind `table` int32 [b, pages per sequence].
    length: int64 [1], slots filled before. With `ring` slot n lives at row n % capacity; else a slot beyond the
    capacity is an error.
    """
    require(
        cache.rank == new.rank == 4 and cache.dtype == new.dtype, f"needs rank 4 and one dtype, got {cache} and {new}"
    )
    require(
        same_dim(cache.shape[1], new.shape[2]) and same_dim(cache.shape[3], new.shape[3]), f"{new} doesn't fit {cache}"
    )
    require(table is not None or same_dim(cache.shape[0], new.shape[0]), f"batches differ: {cache} and {new}")
    require(length == TensorType((1,), "int64"), f"length must be int64[1], got {length}")
    require(
        table is None or (table.rank == 2 and table.dtype == "int32"),
        f"the page table must be int32[b, n], got {table}",
    )
    return cache


def _attention_cached(
    q: np.ndarray,
    k_cache: np.ndarray,
    v_cache: np.ndarray,
    length: np.ndarray,
    start: np.ndarray,
    table: np.ndarray | None,
    sinks: np.ndarray | None,
    *,
    scale: float,
    window: int,
    softcap: float,
    scheme: str,
) -> np.ndarray:
    first, c = int(length[0]), q.shape[1]
    total = first + c
    capacity = k_cache.shape[2] * (1 if table is None else table.shape[1])
    slots = np.arange(max(0, total - capacity), total)
    keys, values = (_rows(cache, table, slots) for cache in (k_cache, v_cache))
    if scheme != "none":
        keys, values = rows.decode(keys, scheme), rows.decode(values, scheme)
    i, j = first + np.arange(c)[:, None], slots[None, :]
    visible = (j <= i) & (j > i - window) if window else j <= i
    visible = visible[None] & (slots[None, None, :] >= start[:, None, None])
    return _attend(_scores(q, keys, scale, softcap), values, sinks, visible[:, None], q.dtype, empty_nan=False)


def _cached_samples() -> Samples:
    yield (
        (
            "float32[2, 2, 4, 3]",
            "float32[2, 2, 9, 3]",
            "float32[2, 2, 9, 3]",
            "int64[1] < 7",
            "int64[2] < 2",
            None,
            None,
        ),
        {"scale": 0.5, "window": 3},
    )
    yield (
        (
            "float32[2, 2, 4, 3]",
            "float32[6, 2, 3, 3]",
            "float32[6, 2, 3, 3]",
            "int64[1] < 7",
            "int64[2] < 2",
            "int32[2, 3] < 6",
            "float32[4]",
        ),
        {"scale": 0.5, "softcap": 4.0},
    )
    yield (
        ("float32[1, 2, 4, 6]", "uint8[1, 2, 9, 7]", "uint8[1, 2, 9, 6]", "int64[1] < 7", "int64[1] < 2", None, None),
        {"scale": 0.5, "scheme": "int4"},
    )


def _cached_flops(
    result: TensorType, q: TensorType, keys: TensorType, values: TensorType, length: Any, start: Any, table: Any, *_: Any, **__: Any
) -> Any:  # fmt: skip
    slots = keys.shape[2] * (table.shape[1] if table is not None else 1)
    return 2 * product(q.shape[:3]) * slots * (q.shape[3] + result.shape[3])


def _cached_axes(*_: Any, scheme: str, **__: Any) -> str:
    keys, values = ("d", "e") if scheme == "none" else ("k", "v")  # records have other sizes than their rows
    return f"b s h d, c g r {keys}, c g r {values}, one, b, b p, h -> b s h e"


@defop(
    meaning=_attention_cached,
    axes=_cached_axes,
    flops=_cached_flops,
    samples=_cached_samples,
)
def attention_cached(
    q: TensorType,
    k_cache: TensorType,
    v_cache: TensorType,
    length: TensorType,
    start: TensorType,
    table: TensorType | None = None,
    sinks: TensorType | None = None,
    *,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    scheme: str = "none",
) -> TensorType:
    """Causal attention of the queries in slots length … length + c - 1 over a cache that already holds their keys.

    q [b, c, h, d]; caches as in `cache_append`; start int64 [b]: slots before it are padding. A row that sees no key
    gives 0. A ring cache must have at least window + c - 1 rows. With a scheme the caches hold records of `encode_rows`
    instead of rows.
    """
    require(q.rank == k_cache.rank == v_cache.rank == 4, f"needs rank 4, got {q}, {k_cache} and {v_cache}")
    stored = q.dtype if scheme == "none" else "uint8"
    require(
        is_float(q.dtype) and k_cache.dtype == v_cache.dtype == stored,
        f"caches for {q} must be {stored}, got {k_cache} and {v_cache}",
    )
    require(same_shape(k_cache.shape[:3], v_cache.shape[:3]), f"caches differ: {k_cache} and {v_cache}")
    d, e = (c.shape[3] if scheme == "none" else rows.row_length(scheme, int(c.shape[3])) for c in (k_cache, v_cache))
    require(same_dim(q.shape[3], d), f"head sizes differ: {q} and {k_cache}")
    h, g = q.shape[2], k_cache.shape[1]
    require(isinstance(h, int) and isinstance(g, int) and h % g == 0, f"{g} KV heads don't divide {h} heads")
    require(length == TensorType((1,), "int64"), f"length must be int64[1], got {length}")
    require(
        start.rank == 1 and start.dtype == "int64" and same_dim(start.shape[0], q.shape[0]),
        f"start must be int64[b], got {start}",
    )
    require(
        table is None or (table.rank == 2 and table.dtype == "int32"),
        f"the page table must be int32[b, n], got {table}",
    )
    require(sinks is None or sinks == TensorType((h,), q.dtype), f"sinks must be {q.dtype}[{h}], got {sinks}")
    return q.with_shape(*q.shape[:3], e)
