"""Every CPU kernel against NumPy float64, over drawn shapes, on this machine's target and on the generic one.

Each PrimFunc is compiled once; what hypothesis draws are its symbolic dimensions.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import attrs
import ml_dtypes
import numpy as np
import pytest
import tvm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jisu.compiler.errors import InputError, TargetError
from jisu.compiler.rows import ROW_BITS, decode, encode
from jisu.compiler.schemes import SCHEMES
from jisu.compiler.types import TypeRuleError
from jisu.targets.cpu import isa
from jisu.targets.cpu.kernels import attention, codes, embedding, matmul, moe, norm, rotary
from jisu.targets.target import Target, known_targets

TARGETS = ("cpu", "cpu:generic")
DTYPES = ("float32", "bfloat16")
both = pytest.mark.parametrize("dtype", DTYPES)
everywhere = pytest.mark.parametrize("where", TARGETS)
few = settings(max_examples=6, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
Array = np.ndarray[Any, Any]


@functools.cache
def target(where: str) -> Target:
    return Target.resolve(where)


@functools.cache
def compiled(build: Callable[..., Any], where: str, *sizes: Any, **options: Any) -> Callable[..., None]:
    """The kernel as a function of NumPy arrays (the last ones are written)."""
    func = build(*sizes, target(where), **options).with_attr("global_symbol", "main")
    run = tvm.compile(tvm.IRModule({"main": func}), target=isa.tvm_target(target(where)))["main"]

    def call(*arrays: Array) -> None:
        tensors = [tvm.runtime.empty(a.shape, str(a.dtype)).copyfrom(a) for a in arrays]
        run(*tensors)
        for array, tensor in zip(arrays, tensors, strict=True):
            if array.flags.writeable:
                array[...] = tensor.numpy().view(array.dtype).reshape(array.shape)

    return call


def draw(seed: int, *shape: int, dtype: str = "float32", scale: float = 1.0) -> Array:
    """Normal random numbers, read-only so that only outputs are copied back."""
    values = (np.random.default_rng(seed).standard_normal(shape) * scale).astype(
        ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype
    )
    values.flags.writeable = False
    return values


def empty(*shape: int, dtype: str) -> Array:
    return np.full(shape, 77, ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def close(got: Array, expected: Array, dtype: str) -> None:
    tolerance = 2e-5 if dtype == "float32" else 4e-2
    np.testing.assert_allclose(got.astype(np.float64), expected, rtol=tolerance, atol=tolerance)


def f64(*arrays: Array) -> list[Array]:
    return [a.astype(np.float64) for a in arrays]


rows = st.sampled_from([0, 1, 2, 3, 5, 8, 13, 17, 70, 250])
erf = np.vectorize(math.erf, otypes=[np.float64])
MEANING: dict[str, Callable[[Array], Array]] = {
    "none": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "gelu": lambda x: x * 0.5 * (1 + erf(x / np.sqrt(2))),
    "gelu_tanh": lambda x: x * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "quick_gelu": lambda x: x / (1 + np.exp(-1.702 * x)),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "tanh": np.tanh,
}


@pytest.mark.skipif(not Target.resolve("cpu").has("avx512bf16"), reason="this machine has no bfloat16 dot product")
def test_pairs_of_bfloat16_are_multiplied_at_once_where_that_is_faster() -> None:
    """Also on a machine where it isn't, and which therefore widens them."""
    faster = attrs.evolve(target("cpu"), peak={"float32": 1.0, "bfloat16": 2.0})
    slower = attrs.evolve(target("cpu"), peak={"float32": 2.0, "bfloat16": 1.0})
    assert matmul.uses_dot("bfloat16", faster) and not matmul.uses_dot("bfloat16", slower)
    assert faster.fingerprint() != slower.fingerprint()
    n, k = 50, 33
    w = draw(1, n, k, dtype="bfloat16", scale=k**-0.5)
    for machine in (faster, slower):
        func = matmul.linear(n, k, "bfloat16", machine).with_attr("global_symbol", "main")
        run = tvm.compile(tvm.IRModule({"main": func}), target=isa.tvm_target(machine))["main"]
        for m in (1, 2, 13, 30):
            x, y = draw(3, m, k, dtype="bfloat16"), empty(m, n, dtype="bfloat16")
            given = [tvm.runtime.empty(a.shape, "bfloat16").copyfrom(a) for a in (x, matmul.pack(w, machine), y)]
            run(*given)
            x64, w64 = f64(x, w)
            close(given[2].numpy().view(ml_dtypes.bfloat16).reshape(m, n), x64 @ w64.T, "bfloat16")


@everywhere
@both
@pytest.mark.parametrize(
    ("n", "k", "options"),
    [
        (50, 33, {"bias": True, "activation": "gelu", "residual": True}),
        (64, 96, {"scale": 0.5, "softcap": 3.0, "out_dtype": "float32"}),
        (7, 1, {}),
    ],
)
def test_linear(n: int, k: int, options: dict[str, Any], dtype: str, where: str) -> None:
    run = compiled(matmul.linear, where, n, k, dtype, **options)
    w, b = draw(1, n, k, dtype=dtype, scale=k**-0.5), draw(2, n, dtype=dtype)
    packed = matmul.pack(w, target(where))
    assert packed.shape == matmul.pack_shape(n, k, dtype, target(where))
    packed.flags.writeable = False

    @few
    @given(rows)
    def check(m: int) -> None:
        x, r = draw(3, m, k, dtype=dtype), draw(4, m, n, dtype=dtype)
        y = empty(m, n, dtype=options.get("out_dtype", dtype))
        run(x, packed, *([b] if options.get("bias") else []), *([r] if options.get("residual") else []), y)
        x64, w64, b64, r64 = f64(x, w, b, r)
        expected = x64 @ w64.T + (b64 if options.get("bias") else 0)
        if "softcap" in options:
            expected = 3 * np.tanh(expected * options["scale"] / 3)
        expected = MEANING[options.get("activation", "none")](expected) + (r64 if options.get("residual") else 0)
        close(y, expected, dtype)

    check()


@everywhere
@both
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("widths", [(64, 16, 16), (33, 7)], ids=str)
def test_projections(widths: tuple[int, ...], bias: bool, dtype: str, where: str) -> None:
    """Several layers in one region give, to the bit, what each gives by itself."""
    k = 50
    run = compiled(matmul.projections, where, widths, k, dtype, bias=bias)
    alone = {n: compiled(matmul.linear, where, n, k, dtype, bias=bias) for n in widths}
    packed = [matmul.pack(draw(i, n, k, dtype=dtype, scale=k**-0.5), target(where)) for i, n in enumerate(widths)]
    biases = [draw(9 + i, n, dtype=dtype) for i, n in enumerate(widths)] if bias else []

    @few
    @given(rows)
    def check(m: int) -> None:
        x = draw(3, m, k, dtype=dtype)
        got = [empty(m, n, dtype=dtype) for n in widths]
        run(x, *packed, *biases, *got)
        for i, n in enumerate(widths):
            want = empty(m, n, dtype=dtype)
            alone[n](x, packed[i], *biases[i : i + 1], want)
            np.testing.assert_array_equal(got[i], want)

    check()


@everywhere
@pytest.mark.parametrize("name", isa.ACTIVATIONS)
def test_activations_are_accurate_everywhere(name: str, where: str) -> None:
    run = compiled(matmul.linear, where, 8, 1, "float32", activation=name)
    x = np.concatenate([np.linspace(-20, 20, 997), [-1e30, -200, -90, 0.0, 1e-6, 90, 200]]).astype(np.float32)[:, None]
    w = matmul.pack(np.ones((8, 1), np.float32), target(where))
    y = empty(len(x), 8, dtype="float32")
    run(x, w, y)
    with np.errstate(over="ignore"):
        expected = MEANING[name](x[:, 0].astype(np.float64))
        finite = np.isfinite(expected.astype(np.float32))
    np.testing.assert_allclose(y[finite, 0], expected[finite], rtol=2e-6, atol=1e-6)
    nan = empty(1, 8, dtype="float32")
    run(np.full((1, 1), np.nan, np.float32), w, nan)
    assert np.isnan(nan).all()


@everywhere
@both
def test_gated_mlp_up(dtype: str, where: str) -> None:
    f, k = 50, 40
    run = compiled(matmul.gated_mlp_up, where, f, k, dtype, activation="silu", bias=True)
    wg, wu = (draw(s, f, k, dtype=dtype, scale=k**-0.5) for s in (1, 2))
    bg, bu = (draw(s, f, dtype=dtype) for s in (3, 4))
    packed = matmul.pack_gated(wg, wu, target(where))

    @few
    @given(rows)
    def check(m: int) -> None:
        x, y = draw(5, m, k, dtype=dtype), empty(m, f, dtype=dtype)
        run(x, packed, bg, bu, y)
        x64, g, u, b, c = f64(x, wg, wu, bg, bu)
        close(y, MEANING["silu"](x64 @ g.T + b) * (x64 @ u.T + c), dtype)

    check()


@everywhere
@both
@pytest.mark.parametrize("transpose_b", [False, True])
def test_matmul(transpose_b: bool, dtype: str, where: str) -> None:
    run = compiled(matmul.matmul, where, dtype, transpose_b=transpose_b)

    @few
    @given(st.integers(1, 3), st.booleans(), st.integers(1, 120), st.integers(1, 40), st.integers(1, 300))
    def check(batch: int, shared: bool, m: int, n: int, k: int) -> None:
        a = draw(1, batch, m, k, dtype=dtype)
        b = draw(2, 1 if shared else batch, k, n, dtype=dtype, scale=k**-0.5)
        y = empty(batch, m, n, dtype=dtype)
        run(a, np.ascontiguousarray(b.swapaxes(1, 2)) if transpose_b else b, y)
        a64, b64 = f64(a, b)
        close(y, a64 @ b64, dtype)

    check()


def attend(q: Array, k: Array, v: Array, scale: float, visible: Array, **more: Any) -> Array:
    """softmax(scale q k + bias) v in float64; visible is [B or 1, 1, S, T]."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.astype(np.float64).swapaxes(1, 2) for x in (q, k, v))
    k, v = (np.repeat(x, group, 1) for x in (k, v))
    scores = q @ k.swapaxes(2, 3) * scale
    if more.get("softcap"):
        scores = more["softcap"] * np.tanh(scores / more["softcap"])
    scores = np.where(visible, scores + more.get("bias", 0), -np.inf)
    sinks = more.get("sinks")
    low = (
        np.full((*scores.shape[:3], 1), -np.inf)
        if sinks is None
        else np.broadcast_to(sinks[None, :, None, None], (*scores.shape[:3], 1))
    )
    top = np.maximum(scores.max(-1, keepdims=True, initial=-np.inf), low)
    top = np.where(np.isinf(top), 0, top)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True) + np.exp(low - top)
    return np.asarray((weights @ v / np.where(total == 0, 1, total)).swapaxes(1, 2))


def interval(s: int, t: int, causal: bool = True, window: int | None = None) -> Array:
    p, j = t - s + np.arange(s)[:, None], np.arange(t)
    return np.asarray(((j <= p) | (not causal)) & (True if window is None else (j <= p) & (j > p - window)))[None, None]


@everywhere
@both
@pytest.mark.parametrize(
    ("heads", "kv", "d", "dv", "options"),
    [
        (12, 4, 64, 64, {}),
        (4, 4, 80, 40, {"window": 9}),
        (6, 2, 8, 20, {"softcap": 5.0, "sinks": True}),
        (4, 2, 16, 16, {"causal": False, "bias": "float"}),
        (2, 1, 96, 33, {"causal": False, "bias": "bool"}),
    ],
)
def test_attention(heads: int, kv: int, d: int, dv: int, options: dict[str, Any], dtype: str, where: str) -> None:
    run = compiled(attention.attention, where, heads, kv, d, dv, dtype, scale=d**-0.5, **options)

    @few
    @given(st.integers(1, 2), st.sampled_from([1, 2, 7, 40]), st.sampled_from([0, 1, 5, 100, 700]))
    def check(batch: int, s: int, past: int) -> None:
        t = s + past
        q, k, v = (
            draw(1, batch, s, heads, d, dtype=dtype),
            draw(2, batch, t, kv, d, dtype=dtype),
            draw(3, batch, t, kv, dv, dtype=dtype),
        )
        out, more, extra = empty(batch, s, heads, dv, dtype=dtype), {}, []
        visible = interval(s, t, options.get("causal", True), options.get("window"))
        if "sinks" in options:
            extra.append(draw(4, heads, dtype=dtype))
            more["sinks"] = extra[-1].astype(np.float64)
        if options.get("bias") == "float":
            extra.append(draw(5, batch, 1, s, t, dtype=dtype))
            more["bias"] = extra[-1].astype(np.float64)
        if options.get("bias") == "bool":
            extra.append(draw(6, 1, heads, s, t) > 0.5)
            visible = visible & extra[-1]
        run(q, k, v, *extra, out)
        close(out, attend(q, k, v, d**-0.5, visible, softcap=options.get("softcap"), **more), dtype)

    check()


@everywhere
@pytest.mark.parametrize("nan_rows", [False, True])
def test_rows_that_see_nothing(nan_rows: bool, where: str) -> None:
    run = compiled(
        attention.attention, where, 2, 2, 8, 8, "float32", scale=1.0, bias="bool", causal=False, nan_rows=nan_rows
    )
    q, out = draw(1, 1, 3, 2, 8), empty(1, 3, 2, 8, dtype="float32")
    mask = np.ones((1, 1, 3, 3), bool)
    mask[0, 0, 1] = False
    run(q, q, q, mask, out)
    assert np.isfinite(out[:, [0, 2]]).all()
    assert np.isnan(out[:, 1]).all() if nan_rows else (out[:, 1] == 0).all()


@everywhere
@both
@pytest.mark.parametrize(("layout", "page", "window"), [("contiguous", 0, None), ("ring", 0, 10), ("paged", 8, None)])
def test_attention_cached_equals_the_whole_sequence(
    layout: str, page: int, window: int | None, dtype: str, where: str
) -> None:
    heads, kv, d, batch, total = 6, 2, 20, 2, 40
    run = compiled(
        attention.attention_cached, where, heads, kv, d, d, dtype, scale=0.3, layout=layout, page=page, window=window
    )
    append = compiled(attention.cache_append, where, kv, d, dtype, layout=layout, page=page)
    q, k, v = (draw(s, batch, total, n, d, dtype=dtype) for s, n in ((1, heads), (2, kv), (3, kv)))
    start = np.array([0, 7])
    visible = interval(total, total, window=window) & (np.arange(total) >= start[:, None, None, None])
    expected = attend(q, k, v, 0.3, visible)

    @few
    @given(st.lists(st.integers(1, 15), min_size=3, max_size=8))
    def check(chunks: list[int]) -> None:
        shape = (12, kv, page, d) if page else (batch, kv, 24 if layout == "ring" else total, d)
        caches = [np.full(shape, np.nan).astype(k.dtype) for _ in range(2)]
        table = [np.random.default_rng(0).permutation(12)[:10].reshape(2, 5).astype(np.int32)] if page else []
        at = 0
        for count in chunks:
            part = slice(at, min(at + count, total))
            count, length = part.stop - at, np.array([at])
            if not count:
                break
            for cache, new in zip(caches, (k, v), strict=True):
                append(cache, *table, length, np.ascontiguousarray(new[:, part]))
            out = empty(batch, count, heads, d, dtype=dtype)
            run(np.ascontiguousarray(q[:, part]), *caches, *table, length, start, out)
            close(out, expected[:, part], dtype)
            at = part.stop

    check()


@everywhere
@pytest.mark.parametrize("scheme", list(ROW_BITS))
def test_attention_over_records(scheme: str, where: str) -> None:
    """What the kernel decodes in tiles is what the records stand for; heads fill no whole vectors, records start at odd addresses."""
    heads, kv, d, e, batch, total = 6, 2, 22, 14, 2, 150
    run = compiled(attention.attention_cached, where, heads, kv, d, e, "float32", scale=0.3, scheme=scheme)
    q, k, v = (draw(s, batch, total, n, w) for s, n, w in ((1, heads, d), (2, kv, d), (3, kv, e)))
    records = [encode(x, scheme) for x in (k, v)]
    append = [compiled(attention.cache_append, where, kv, r.shape[3], "uint8") for r in records]
    caches = [np.full((batch, kv, total, r.shape[3]), 255, np.uint8) for r in records]
    start = np.array([0, 7])
    visible = interval(total, total) & (np.arange(total) >= start[:, None, None, None])
    keys, values = (decode(r, scheme) for r in records)
    expected = attend(q, keys, values, 0.3, visible)
    at = 0
    for count in (1, 3, 120, 26):
        part = slice(at, at + count)
        for write, cache, new in zip(append, caches, records, strict=True):
            write(cache, np.array([at]), np.ascontiguousarray(new[:, part]))
        out = empty(batch, count, heads, e, dtype="float32")
        run(np.ascontiguousarray(q[:, part]), *caches, np.array([at]), start, out)
        close(out, expected[:, part], "float32")
        at += count
    for cache, new in zip(caches, records, strict=True):
        np.testing.assert_array_equal(cache, new.transpose(0, 2, 1, 3))


@pytest.mark.parametrize(("layout", "page", "length", "says"), [
    ("contiguous", 0, 20, "cache is full"), ("ring", 0, 0, "ring cache is too small"), ("paged", 8, 20, "page table is full"),
    ("contiguous", 0, -1, "negative"),
])  # fmt: skip
def test_append_refuses_to_write_outside_the_cache(layout: str, page: int, length: int, says: str) -> None:
    append = compiled(attention.cache_append, "cpu", 2, 20, "float32", layout=layout, page=page)
    cache = np.zeros((3, 2, page, 20) if page else (1, 2, 24, 20), np.float32)
    table = [np.zeros((1, 3), np.int32)] if page else []
    with pytest.raises(RuntimeError, match=says):
        append(cache, *table, np.array([length]), draw(1, 1, 30, 2, 20))
    assert not cache.any()


def test_a_page_number_outside_the_pages_is_refused() -> None:
    append = compiled(attention.cache_append, "cpu", 2, 20, "float32", layout="paged", page=8)
    with pytest.raises(RuntimeError, match="page that doesn't exist"):
        append(np.zeros((3, 2, 8, 20), np.float32), np.full((1, 3), 3, np.int32), np.array([0]), draw(1, 1, 2, 2, 20))


@everywhere
@both
@pytest.mark.parametrize("d", [33, 768])
def test_norms(d: int, dtype: str, where: str) -> None:
    llama = compiled(norm.rms_norm, where, d, dtype, eps=1e-6, residual=True)
    gemma = compiled(norm.rms_norm, where, d, dtype, eps=1e-6, offset=1.0, round_first=False)
    layer = compiled(norm.layer_norm, where, d, dtype, eps=1e-5)
    w, b = draw(1, d, dtype=dtype), draw(2, d, dtype=dtype)

    @few
    @given(rows)
    def check(m: int) -> None:
        x, r = draw(3, m, d, dtype=dtype), draw(4, m, d, dtype=dtype)
        total, y = empty(m, d, dtype=dtype), empty(m, d, dtype=dtype)
        x64, w64, b64 = f64(x, w, b)
        llama(x, r, w, total, y)
        s64 = (x + r).astype(np.float64)
        np.testing.assert_array_equal(total, x + r)
        close(y, s64 / np.sqrt((s64**2).mean(-1, keepdims=True) + 1e-6) * w64, dtype)
        gemma(x, w, y)
        close(y, x64 / np.sqrt((x64**2).mean(-1, keepdims=True) + 1e-6) * (1 + w64), dtype)
        layer(x, w, b, y)
        centred = x64 - x64.mean(-1, keepdims=True)
        close(y, centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * w64 + b64, dtype)

    check()


@everywhere
@both
def test_softmax(dtype: str, where: str) -> None:
    run = compiled(norm.softmax, where, dtype)

    @few
    @given(rows, st.integers(1, 100))
    def check(m: int, n: int) -> None:
        x, y = draw(1, m, n, dtype=dtype, scale=30), empty(m, n, dtype=dtype)
        run(x, y)
        e = np.exp(x.astype(np.float64) - x.astype(np.float64).max(-1, keepdims=True, initial=-np.inf))
        close(y, e / e.sum(-1, keepdims=True), dtype)

    check()


@everywhere
@both
@pytest.mark.parametrize(
    ("h", "d", "r", "pairs"), [(3, 64, 64, False), (2, 80, 20, False), (4, 8, 8, True), (2, 96, 24, True)]
)
def test_rotary(h: int, d: int, r: int, pairs: bool, dtype: str, where: str) -> None:
    run = compiled(rotary.rotary, where, h, d, r, dtype, interleaved=pairs)

    @few
    @given(st.integers(1, 3), st.integers(0, 9), st.booleans())
    def check(batch: int, s: int, shared: bool) -> None:
        x, y = draw(1, batch, s, h, d, dtype=dtype), empty(batch, s, h, d, dtype=dtype)
        cos, sin = (draw(n, 1 if shared else batch, s, r, dtype=dtype) for n in (2, 3))
        run(x, cos, sin, y)
        x64, c, t = f64(x, cos, sin)
        a = x64[..., :r]
        turned = np.concatenate([-a[..., r // 2 :], a[..., : r // 2]], -1)
        if pairs:
            turned = np.stack([-a[..., 1::2], a[..., ::2]], -1).reshape(a.shape)
        close(y, np.concatenate([a * c[:, :, None] + turned * t[:, :, None], x64[..., r:]], -1), dtype)

    check()


@everywhere
@both
def test_embedding(dtype: str, where: str) -> None:
    run = compiled(embedding.embedding, where, 20, dtype, scale=3.0)

    @few
    @given(st.lists(st.integers(0, 6), max_size=40))
    def check(ids: list[int]) -> None:
        table, out = draw(1, 7, 20, dtype=dtype), empty(len(ids), 20, dtype=dtype)
        run(table, np.array(ids, np.int64), out)
        np.testing.assert_array_equal(out, (table[np.array(ids, np.int64)].astype(np.float32) * 3).astype(table.dtype))

    check()
    for wrong in (-1, 7, 1 << 60):
        with pytest.raises(RuntimeError, match=embedding.OUT_OF_RANGE):
            run(draw(1, 7, 20, dtype=dtype), np.array([0, wrong]), empty(2, 20, dtype=dtype))


@everywhere
@both
def test_experts(dtype: str, where: str) -> None:
    count, hidden, inner, chosen = 5, 40, 24, 2
    run = compiled(moe.experts, where, count, hidden, inner, chosen, dtype)
    gate, up = (draw(s, count, inner, hidden, dtype=dtype, scale=hidden**-0.5) for s in (1, 2))
    down = draw(3, count, hidden, inner, dtype=dtype, scale=inner**-0.5)
    packed = [moe.pack_gated_experts(gate, up, target(where)), moe.pack_experts(down, target(where))]

    @few
    @given(rows, st.integers(0, 99))
    def check(m: int, seed: int) -> None:
        x, w = draw(4, m, hidden, dtype=dtype), draw(5, m, chosen, dtype=dtype)
        idx = np.random.default_rng(seed).integers(0, count, (m, chosen))
        y = empty(m, hidden, dtype=dtype)
        run(x, idx, w, *packed, y)
        x64, w64, g, u, d = f64(x, w, gate, up, down)
        inner_value = MEANING["silu"](np.einsum("th,tjih->tji", x64, g[idx])) * np.einsum("th,tjih->tji", x64, u[idx])
        close(y, np.einsum("tj,tji,tjhi->th", w64, inner_value, d[idx]), dtype)

    check()
    with pytest.raises(RuntimeError, match=moe.OUT_OF_RANGE):
        run(
            draw(4, 1, hidden, dtype=dtype),
            np.array([[0, count]]),
            draw(5, 1, chosen, dtype=dtype),
            *packed,
            empty(1, hidden, dtype=dtype),
        )


@pytest.mark.parametrize(
    ("scheme", "group", "k"), [("int8", 0, 2500), ("int4", 64, 3200), ("nf4", 64, 1600), ("fp8", 0, 40)]
)
def test_rows_of_decoded_weights_do_not_show_their_neighbours(scheme: str, group: int, k: int) -> None:
    """Also where inputs are multiplied in parts, and codes are decoded once for many rows."""
    n, kind, random = 40, SCHEMES[scheme], np.random.default_rng(0)
    panel = matmul.panel_width(target("cpu"))
    panels, words = -(-n // panel), kind.panel_words(k, 1)
    packed = random.integers(0, 120, (panels, words, panel, 1), np.uint8)
    scales = random.uniform(0.01, 0.02, (panels, kind.groups(k, group), panel)).astype(np.float16)
    run = compiled(codes.quantized_linear, "cpu", n, k, "float32", scheme=scheme, group=group)
    x = draw(1, 30, k)
    whole = empty(30, n, dtype="float32")
    run(x, packed, scales, whole)
    shape = (panels, words, panel, kind.per_byte)
    # fp8 has no number 127
    both = packed if kind.per_byte == 1 else np.concatenate([packed & 15, packed >> 4], -1)
    assert both.shape == shape
    levels = kind.levels.astype(np.float64) - (kind.middle if kind.uniform else 0)
    by_input = levels[both].transpose(0, 2, 1, 3).reshape(panels * panel, -1)[:n, :k]
    spread = np.repeat(scales.astype(np.float64).transpose(0, 2, 1).reshape(panels * panel, -1)[:n], group or k, 1)[
        :, :k
    ]
    np.testing.assert_allclose(whole, x.astype(np.float64) @ (by_input * spread).T, rtol=1e-4, atol=1e-2)
    for m in (1, 2, 7, 12, 13):
        some = empty(m, n, dtype="float32")
        run(x[:m].copy(), packed, scales, some)
        np.testing.assert_array_equal(some, whole[:m], err_msg=str(m))


def test_results_do_not_depend_on_the_thread_count() -> None:
    run = compiled(matmul.linear, "cpu", 512, 300, "float32")
    w, x = matmul.pack(draw(1, 512, 300), target("cpu")), draw(2, 200, 300)
    threads = tvm.get_global_func("runtime.config_threadpool")
    results = []
    for count in (1, 2):
        threads(1, count)
        y = empty(200, 512, dtype="float32")
        run(x, w, y)
        results.append(y)
    np.testing.assert_array_equal(results[0], results[1])


def test_targets_are_known_comparable_and_checked() -> None:
    here = Target.resolve("cpu")
    assert Target.resolve(here) is here
    assert not here.check_host()
    assert not Target.resolve("cpu:generic").required_features
    assert here.lanes("int8") == here.vector_bytes
    with pytest.raises(TypeRuleError, match="float8_e4m3fn"):
        here.lanes("float8_e4m3fn")
    for name in known_targets():
        described = Target.describe(name)
        assert Target.from_json(described.to_json()) == described
    assert here.fingerprint() != Target.resolve("cpu:generic").fingerprint()
    foreign = Target.from_json({**here.to_json(), "features": [*here.features, "amx-tile2"]})
    assert foreign.check_host() == ["amx-tile2"]
    with pytest.raises(TargetError, match="unknown target 'cudaa'; known: cpu, .*did you mean 'cuda'"):
        Target.resolve("cudaa")
    chips = [Target.resolve(name) for name in known_targets() if name.startswith("tpu")]
    assert len({chip.fingerprint() for chip in chips}) == len({chip.name for chip in chips}) > 3
    assert not any(chip.check_host() for chip in chips)  # they are simulated here
    with pytest.raises(TargetError, match="no NPU lowering yet.*use target='cpu'"):
        Target.resolve(attrs.evolve(here, kind="npu"))
    with pytest.raises(TargetError, match="unknown fields colour"):
        Target.from_json({**here.to_json(), "colour": 1})


def test_builders_refuse_what_they_cannot_compute() -> None:
    here = target("cpu")
    with pytest.raises(TargetError, match="no activation 'swishh'"):
        matmul.linear(8, 8, "float32", here, activation="swishh")
    with pytest.raises(TargetError, match="not in int8"):
        norm.rms_norm(8, "int8", here, eps=1e-6)
    with pytest.raises(TargetError, match="can't share"):
        attention.attention(5, 2, 8, 8, "float32", here, scale=1.0)
    with pytest.raises(TargetError, match="no cache layout"):
        attention.cache_append(2, 8, "float32", here, layout="tree")
    with pytest.raises(TargetError, match="even, positive"):
        rotary.rotary(2, 8, 5, "float32", here)
    with pytest.raises(InputError, match="a weight to pack is a matrix"):
        matmul.pack(np.zeros(3, np.float32), here)
