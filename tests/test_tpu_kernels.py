"""Our Pallas kernels inside exported programs: values through Pallas' interpreter, and libtpu's word for the chips."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import pytest
from decoders import make
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from ml_dtypes import bfloat16

from jisu.compiler import ops, schemes
from jisu.compiler.errors import CompileError
from jisu.compiler.graph import ArrayStorage, Graph, Node, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import Pipeline, relative_error
from jisu.compiler.recipe import QuantizeRecipe
from jisu.compiler.rows import TAIL, decode, encode, record_bytes, row_length
from jisu.compiler.types import TensorType, fixed, numpy_dtype, symbol
from jisu.passes import default_passes
from jisu.passes.cache import CacheLayout, Step, derive_step, keep_last_token
from jisu.passes.compression import Compress
from jisu.passes.compression.activations import QuantizeActivations
from jisu.passes.compression.cached import QuantizeCache
from jisu.passes.layout import FoldWeights, PackWeights
from jisu.targets.tpu import attention, export, judges, kernels
from jisu.targets.tpu.attention import Attention
from jisu.targets.tpu.chip import Chip
from jisu.targets.tpu.choose import product_of
from jisu.targets.tpu.layout import lay_out
from jisu.targets.tpu.stablehlo import emit, signature

V5E, V6E = Chip.named("v5e"), Chip.named("v6e")
needs_jax = pytest.mark.skipif(not export.has_jax(), reason='needs JAX: pip install "jisu[tpu]"')
needs_libtpu = pytest.mark.skipif(
    not (export.has_jax() and export.has_libtpu()), reason='needs JAX and libtpu: pip install "jisu[tpu-aot]"'
)
pytestmark = needs_jax


def tensor(name: str, *shape: Any, dtype: str = "bfloat16") -> Node:
    return placeholder(name, TensorType(shape, dtype))  # type: ignore[arg-type]


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(bfloat16)


def run(graph: Graph, arrays: Sequence[np.ndarray], sizes: Mapping[str, int] | None = None) -> tuple[list[Any], str]:
    """Results of the program whose kernels are interpreted, and the text of the one for a TPU."""
    sizes = sizes or {}
    entry = signature(graph, sizes)
    chosen = [kernels.chooser(V5E, smallest=0, platform=platform) for platform in ("cpu", "tpu")]
    weights = [graph.weights[name].numpy() for name, _ in entry.weights]
    return export.runner(emit(graph, sizes, chosen[0]), entry)(*arrays, *weights), emit(graph, sizes, chosen[1])


def assert_close(got: np.ndarray, want: np.ndarray, tolerance: float = 1e-2) -> None:
    assert got.shape == want.shape and got.dtype == want.dtype
    assert relative_error(got, want) <= tolerance


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "n", "k", "activation"), [(5, 70, 96, "none"), (40, 256, 128, "silu")])
def test_linear(rows: int, n: int, k: int, activation: str, bias: bool, residual: bool) -> None:
    x, w = tensor("x", 1, symbol("rows"), k), tensor("w", n, k)
    b = tensor("b", n) if bias else None
    r = tensor("r", 1, symbol("rows"), n) if residual else None
    inputs = [i for i in (x, w, b, r) if i is not None]
    graph = Graph(inputs, (ops.linear(x, w, b, r, activation=activation),))
    shapes = [tuple(rows if not isinstance(s, int) else s for s in i.shape) for i in inputs]
    arrays = [normal(*shape, seed=i, scale=0.2 if i == 1 else 1) for i, shape in enumerate(shapes)]
    (got,), text = run(graph, arrays, {"rows": rows})
    assert_close(got, interpret(graph, arrays)[0])
    assert text.count("@tpu_custom_call") == 1 and "dot_general" not in text


@pytest.mark.parametrize("kind", ["gated", "laid out", "gated, laid out", "panels", "gated panels", "projections"])
def test_forms_of_layers(kind: str) -> None:
    """Weights by rows, in panels of a CPU's kernels, and as `lay_out` stores them."""
    rows, n, k = 24, 200, 128
    x, w, u = tensor("x", rows, k), tensor("w", n, k), tensor("u", n, k)
    arrays = [normal(rows, k), normal(n, k, seed=1, scale=0.2), normal(n, k, seed=2, scale=0.2)]
    wide, other = (ops.pack(m, panel=16, pair=2) for m in (w, u))
    out = {
        "gated": lambda: ops.gated_linear(x, w, u, activation="silu"),
        "laid out": lambda: ops.packed_linear(x, ops.pack(w, panel=256, pair=1), outputs=n, activation="relu"),
        "gated, laid out": lambda: ops.packed_gated_linear(
            x, ops.pack_gated(w, u, panel=256, pair=1), outputs=n, activation="silu"
        ),
        "panels": lambda: ops.packed_linear(x, wide, outputs=n, activation="none"),
        "gated panels": lambda: ops.packed_gated_linear(
            x, ops.pack_gated(w, u, panel=16, pair=2), outputs=n, activation="gelu_tanh"
        ),
        "projections": lambda: ops.get(ops.packed_projections(x, wide, other, outputs=(n, n), biased=False), index=1),
    }[kind]()
    graph = Graph((x, w, u), (out,))
    (got,), text = run(graph, arrays)
    assert_close(got, interpret(graph, arrays)[0])
    assert text.count("@tpu_custom_call") == (2 if kind == "projections" else 1)


def test_gates_that_do_not_fit_stay_stablehlo() -> None:
    """Columns of two matrices, 8192 long, in float32: v4 has 16 MiB of VMEM."""
    x, w, u = (tensor(n, m, 8192, dtype="float32") for n, m in (("x", 8), ("w", 256), ("u", 256)))
    gated = ops.gated_linear(x, w, u, activation="silu")
    for chip, fits in ((V5E, True), (Chip.named("v4"), False)):
        assert (kernels.chooser(chip)(gated, {}) is not None) == (product_of(gated, chip) is not None) == fits


def test_weights_are_laid_out_once() -> None:
    """`lay_out` and folding: the program has no transposition left, and a table that is looked up in stays as it is."""
    rng = np.random.default_rng(0)
    held = {n: ArrayStorage((rng.standard_normal((200, 128)) * 0.1).astype(bfloat16)) for n in ("a", "g", "u", "table")}
    a, g, u, table = (weight(n, TensorType((200, 128), "bfloat16")) for n in held)
    x, ids = tensor("x", 8, 128), tensor("ids", 8, dtype="int64")
    gated = ops.gated_linear(x, g, u, activation="silu")
    out = (ops.linear(x, a), gated, ops.linear(ops.take(table, ids, axis=0), table))
    graph = Graph((x, ids), out, held)
    laid = FoldWeights()(lay_out(graph, V5E))
    arrays = [normal(8, 128), rng.integers(0, 200, 8)]
    got, text = run(laid, arrays)
    for value, want in zip(got, interpret(graph, arrays), strict=True):
        assert_close(value, want)
    assert text.count("@tpu_custom_call") == 3
    assert text.count("stablehlo.transpose") == 1


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["plain", "gated", "int4", "other rows"])
def test_layers_of_codes(kind: str, dtype: str) -> None:
    """x in floats, weights as codes with a scale per output; the product reads their levels."""
    rows, n, k, panel = 9, 80, 192, 16 if kind != "other rows" else 1
    scheme = "int4" if kind == "int4" else "int8"
    bits = schemes.SCHEMES[scheme].bits
    rng = np.random.default_rng(0)
    x, b, r = tensor("x", rows, k, dtype=dtype), tensor("b", n, dtype=dtype), tensor("r", rows, n, dtype=dtype)
    codes = [tensor(f"c{i}", n, k * bits // 8, dtype="uint8") for i in range(2)]
    scales = [tensor(f"s{i}", n, 1, dtype="float16") for i in range(2)]
    packed = [ops.pack_codes(c, scheme=scheme, k=k, panel=panel, word=1) for c in codes]
    steps = [ops.pack_scales(s, scheme=scheme, whole=1.0, panel=panel) for s in scales]
    how = {"outputs": n, "scheme": scheme, "group": 0, "activation": "silu"}
    if kind == "gated":
        both = (ops.concat(*(ops.reshape(v, shape=(5, 1, *v.shape[1:])) for v in vs), axis=1) for vs in (packed, steps))
        out = ops.quantized_linear(x, *both, gated=True, **how)
    else:
        out = ops.quantized_linear(x, packed[0], steps[0], None, b, r, **how)
    graph = Graph((x, b, r, *codes, *scales), (out,))
    to = bfloat16 if dtype == "bfloat16" else dtype
    arrays = [
        *(rng.standard_normal(i.shape).astype(to) for i in (x, b, r)),
        *(rng.integers(0, 256, c.shape).astype(np.uint8) for c in codes),
        *((rng.random((n, 1)) * 0.01).astype(np.float16) for _ in scales),
    ]
    (got,), text = run(graph, arrays)
    assert_close(got, interpret(graph, arrays)[0], 1e-2 if dtype == "bfloat16" else 1e-5)
    assert text.count("@tpu_custom_call") == 1 and "dot_general" not in text


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", ["plain", "gated", "projections", "int4"])
def test_integer_layers(kind: str, dtype: str) -> None:
    rows, n, k, panel, word = 9, 80, 192, 16, 4
    scheme = "int4" if kind == "int4" else "int8"
    bits = schemes.SCHEMES[scheme].bits
    rng = np.random.default_rng(0)
    x, b = tensor("x", rows, k, dtype=dtype), tensor("b", n, dtype=dtype)
    codes = [tensor(f"c{i}", n, k * bits // 8, dtype="uint8") for i in range(2)]
    scales = [tensor(f"s{i}", n, 1, dtype="float16") for i in range(2)]
    packed = [ops.pack_codes(c, scheme=scheme, k=k, panel=panel, word=word) for c in codes]
    steps = [ops.pack_scales(s, scheme=scheme, whole=1.0, panel=panel) for s in scales]
    records = ops.encode_levels(x, scheme="int8", group=0, own=False)
    how = {"k": k, "scheme": scheme, "group": 0, "own": False, "dtype": dtype}
    if kind == "projections":
        many = ops.levels_projections(records, *packed, *steps, outputs=(n, n), offset=False, biased=False, **how)
        outs = [ops.get(many, index=i) for i in range(2)]
    elif kind == "gated":
        side = [
            ops.concat(*(ops.reshape(v, shape=(v.shape[0], 1, *v.shape[1:])) for v in vs), axis=1)
            for vs in (packed, steps)
        ]
        outs = [ops.levels_linear(records, *side, outputs=n, gated=True, activation="silu", **how)]
    else:
        outs = [ops.levels_linear(records, packed[0], steps[0], None, b, outputs=n, activation="relu", **how)]
    graph = Graph((x, b, *codes, *scales), outs)
    arrays = [
        rng.standard_normal((rows, k)).astype(bfloat16 if dtype == "bfloat16" else dtype),
        rng.standard_normal(n).astype(bfloat16 if dtype == "bfloat16" else dtype),
        *(rng.integers(0, 256, (n, k * bits // 8)).astype(np.uint8) for _ in codes),
        *((rng.random((n, 1)) * 0.001).astype(np.float16) for _ in scales),
    ]
    got, text = run(graph, arrays)
    for value, want in zip(got, interpret(graph, arrays), strict=True):
        assert_close(value, want, 1e-2 if dtype == "bfloat16" else 1e-3)  # a level of x between two may go either way
    assert text.count("@tpu_custom_call") == (2 if kind == "projections" else 1)


@pytest.mark.parametrize("stored", [False, True], ids=["packed here", "stored packed"])
@pytest.mark.parametrize("integers", [False, True], ids=["floats", "integers"])
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
def test_levels_are_laid_out_once(gated: bool, integers: bool, stored: bool) -> None:
    """Codes become levels int8, transposed, when weights are stored: the program has no step for them."""
    rows, n, k = 9, 80, 192
    rng = np.random.default_rng(0)
    held: dict[str, Any] = {}
    packed, steps = [], []
    for i in range(1 + gated):
        held[f"c{i}"] = ArrayStorage(rng.integers(0, 256, (n, k)).astype(np.uint8))
        held[f"s{i}"] = ArrayStorage((rng.random((n, 1)) * 0.001).astype(np.float16))
        c, s = weight(f"c{i}", TensorType((n, k), "uint8")), weight(f"s{i}", TensorType((n, 1), "float16"))
        packed.append(ops.pack_codes(c, scheme="int8", k=k, panel=16, word=4 if integers else 1))
        steps.append(ops.pack_scales(s, scheme="int8", whole=1.0, panel=16))
    both = [ops.concat(*(ops.reshape(v, shape=(5, 1, *v.shape[1:])) for v in vs), axis=1) for vs in (packed, steps)]
    codes, scales = both if gated else (packed[0], steps[0])
    x = tensor("x", rows, k)
    how: dict[str, Any] = {"outputs": n, "scheme": "int8", "group": 0, "gated": gated, "activation": "silu"}
    if integers:
        records = ops.encode_levels(x, scheme="int8", group=0, own=False)
        out = ops.levels_linear(records, codes, scales, k=k, own=False, dtype="bfloat16", **how)
    else:
        out = ops.quantized_linear(x, codes, scales, **how)
    graph = Graph((x,), (out,), held)
    laid = FoldWeights()(lay_out(FoldWeights()(graph) if stored else graph, V5E))
    arrays = [normal(rows, k)]
    (want,) = interpret(graph, arrays)
    assert_close(interpret(laid, arrays)[0], want)
    (got,), text = run(laid, arrays)
    assert_close(got, want)
    weights = [laid.weights[name].numpy() for name, _ in signature(laid, {}).weights]
    assert_close(export.runner(emit(laid, {}), signature(laid, {}))(*arrays, *weights)[0], want)
    assert "transpose" not in text and text.count("@tpu_custom_call") == 1
    assert f"tensor<1x{'2x' * gated}192x128x1xi8>" in text


# --- Attention ------------------------------------------------------------------------------------------------------------


def draw_inputs(a: Attention, seed: int = 0) -> list[np.ndarray]:
    """Ragged: sequences have lengths and paddings of their own, a contiguous cache may have gone around."""
    rng = np.random.default_rng(seed)
    found: list[np.ndarray] = []
    for name, t in a.inputs:
        shape = tuple(fixed(n) for n in t.shape)
        if name == "first":
            most = a.keys - a.queries + (0 if a.page else a.keys // 2)
            found.append(
                (rng.integers(0, most + 1, shape) if a.cached else np.full(shape, a.keys - a.queries)).astype(np.int32)
            )
        elif name == "start":
            found.append((rng.integers(0, 4, shape) if a.cached else np.zeros(shape)).astype(np.int32))
        elif name == "table":
            found.append(rng.permutation(a.pages)[: shape[0] * shape[1]].reshape(shape).astype(np.int32))
        elif t.dtype == "uint8":  # codes or tails of records
            width = a.d if name.startswith("k") else a.e
            records = np.random.default_rng(seed + width + (name[0] == "v")).standard_normal(
                (shape[0], a.groups, a.page or a.keys, width)
            )
            codes, tails = apart(encode(records.astype(np.float32), f"int{a.records}"), a.heads_of(width))
            found.append(codes if name in "kv" else tails)
        else:
            found.append(rng.standard_normal(shape).astype(numpy_dtype(a.dtype)))
    return found


def in_lanes(rows: np.ndarray, heads: int, wide: int) -> np.ndarray:
    """[b, g / heads, slots, heads * wide] of [b, g, slots, n]: heads beside each other, zeros behind each."""
    b, g, slots, n = rows.shape
    rows = np.concatenate([rows, np.zeros((b, g, slots, wide - n), rows.dtype)], -1)
    return rows.reshape(b, g // heads, heads, slots, wide).swapaxes(2, 3).reshape(b, g // heads, slots, -1)


def out_of_lanes(rows: np.ndarray, g: int, n: int) -> np.ndarray:
    """What `in_lanes` was given."""
    b, count, slots, _ = rows.shape
    return rows.reshape(b, count, slots, g // count, -1).swapaxes(2, 3).reshape(b, g, slots, -1)[..., :n]


def apart(records: np.ndarray, heads: int, wide: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Codes as `in_lanes` says, and tails [b, rows, g * 4 and zeros] of records [b, g, rows, n + 4]."""
    b, g, slots, size = records.shape
    codes, tails = np.split(records, [size - TAIL], axis=-1)
    single = in_lanes(tails.swapaxes(1, 2).reshape(b, 1, slots, g * TAIL), 1, attention.padded(g * TAIL))
    return in_lanes(codes, heads, wide or size - TAIL), single[:, 0]


def records_of(codes: np.ndarray, tails: np.ndarray, g: int, n: int) -> np.ndarray:
    """What `apart` took apart, of n bytes of codes."""
    b, slots, _ = tails.shape
    single = tails[..., : g * TAIL].reshape(b, slots, g, TAIL).swapaxes(1, 2)
    return np.concatenate([out_of_lanes(codes, g, n), single], -1)


def meaning(a: Attention, arrays: Sequence[np.ndarray]) -> np.ndarray:
    """What the ops mean, one sequence after the other."""
    given = dict(zip([name for name, _ in a.inputs], arrays, strict=True))
    q, k, v = given["q"], given["k"], given["v"]
    if a.records:
        sizes = (n * a.records // 8 for n in (a.d, a.e))
        k, v = (records_of(given[n], given[f"{n}_tails"], a.groups, size) for n, size in zip("kv", sizes, strict=True))
    how: dict[str, Any] = {"scale": a.scale, "window": a.window, "softcap": a.softcap}
    attend, cached = ops.attention.meaning, ops.attention_cached.meaning
    assert attend is not None and cached is not None
    if not a.cached:
        return np.asarray(attend(q, k, v, None, None, causal=a.causal, **how))
    found = []
    for i in range(a.batch):
        one = slice(i, i + 1)
        table = given["table"][one] if a.page else None
        keys, values = (k, v) if a.page else (k[one], v[one])
        where = (given[n][one].astype(np.int64) for n in ("first", "start"))
        scheme = f"int{a.records}" if a.records else "none"
        found.append(cached(q[one], keys, values, *where, table, None, scheme=scheme, **how))
    return np.concatenate(found)


@st.composite
def attentions(draw: Any) -> Attention:
    """Small ones of all kinds."""
    kind = draw(st.sampled_from(["prefill", "cache", "pages"]))
    groups, repeats = draw(st.sampled_from([1, 2, 3, 4])), draw(st.sampled_from([1, 2, 3, 8]))
    d, e = draw(st.sampled_from([16, 64, 128])), draw(st.sampled_from([32, 64, 128]))
    batch, window = draw(st.integers(1, 3)), draw(st.sampled_from([0, 0, 5, 40]))
    dtype = draw(st.sampled_from(["bfloat16", "bfloat16", "float32"]))
    queries = draw(st.integers(1, 90) if kind == "prefill" else st.sampled_from([1, 1, 1, 6]))
    how: dict[str, Any] = {"window": window, "softcap": draw(st.sampled_from([0.0, 0.0, 5.0])), "dtype": dtype}
    if kind == "prefill":
        causal = bool(window) or draw(st.booleans())
        return Attention(batch, queries, groups, repeats, d, e, queries + draw(st.integers(0, 700)), 0.1, causal, **how)
    how["records"] = draw(st.sampled_from([0, 8, 4]))
    native = 32 if how["records"] else 16
    page = draw(st.sampled_from([native, 64, 128])) if kind == "pages" else 0
    keys = page * draw(st.integers(1, 20)) if page else native * draw(st.integers(1, 30))
    pages = batch * keys // page + 1 if page else 0
    how["window"] = min(window, max(keys - queries + 1, 1))
    return Attention(batch, queries, groups, repeats, d, e, keys, 0.1, cached=True, page=page, pages=pages, **how)


def assert_attends(a: Attention, seed: int = 0) -> None:
    """The TPU interpreter in both modes: values, no race, no semaphore left."""
    arrays = draw_inputs(a, seed)
    want, text = meaning(a, arrays), attention.source(a, V5E)
    for dma in judges.DMA:
        found = judges.interpret(text, *arrays, dma=dma)
        assert found.clean, (a, dma, found.left)
        assert_close(found.result, want, 1e-2 if a.dtype == "bfloat16" else 1e-5)


EXAMPLES = [
    Attention(1, 300, 2, 1, 128, 128, 700, 0.1, window=150, softcap=20.0),
    Attention(1, 40, 2, 3, 64, 32, 70, 0.125, causal=False),
    Attention(2, 5, 4, 3, 64, 64, 96, 0.1, cached=True, window=20),
    Attention(3, 1, 2, 4, 128, 128, 1024, 0.1, cached=True, page=64, pages=50),
    Attention(2, 1, 16, 1, 128, 128, 1536, 0.1, cached=True, page=64, pages=60, window=700),
    Attention(2, 1, 8, 4, 128, 128, 1024, 0.1, cached=True, page=64, pages=40, records=8),
    Attention(1, 12, 16, 1, 128, 64, 768, 0.1, cached=True, softcap=20.0, records=8),
    Attention(3, 1, 3, 2, 96, 96, 160, 0.1, cached=True, window=30, records=8),
    Attention(2, 1, 8, 4, 128, 128, 512, 0.1, cached=True, page=64, pages=20, records=4),
    Attention(1, 12, 4, 1, 128, 64, 768, 0.1, cached=True, softcap=20.0, records=4),
    Attention(2, 90, 4, 2, 64, 64, 128, 0.1, cached=True, window=30, records=4),
    Attention(1, 1, 3, 2, 256, 96, 64, 0.1, cached=True, records=4),
    Attention(1, 1, 12, 1, 64, 64, 64, 0.1, cached=True, records=4),
    Attention(2, 1, 4, 2, 64, 32, 64, 0.1, cached=True, page=32, pages=5, records=8),
    Attention(1, 20, 2, 2, 64, 32, 60, 0.1, window=15, dtype="float32"),
    Attention(2, 1, 2, 4, 64, 64, 64, 0.1, cached=True, page=8, pages=20, dtype="float32"),
]


@pytest.mark.parametrize("a", EXAMPLES, ids=lambda a: attention._title(a)[:40])
def test_attention(a: Attention) -> None:
    assert_attends(a)


@pytest.mark.slow
@settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))
@given(attentions(), st.integers(0, 9))
def test_drawn_attention(a: Attention, seed: int) -> None:
    assert_attends(a, seed)


@pytest.mark.parametrize(
    ("right", "wrong", "records"),
    [
        ("c.wait()", "pass", 0),
        ("c.wait()", "pass", 8),
        ("step + 1, 1 - slot)", "step + 1, slot)", 0),
        ("step + 1, 1 - slot)", "step + 1, slot)", 4),
        ("v_tails.at[slot, piece]", "v_tails.at[0, piece]", 8),
    ],
)
def test_faults_on_purpose_are_seen(right: str, wrong: str, records: int) -> None:
    """A dropped wait; two tiles in one slot."""
    a = Attention(1, 1, 1, 2, 64, 64, 1536, 0.1, cached=True, page=64, pages=30, records=records)
    arrays, text = draw_inputs(a), attention.source(a, V5E)
    arrays[0][:] = 1500
    assert text.count(right) == 1
    fault = [judges.interpret(text.replace(right, wrong), *arrays, dma=dma) for dma in judges.DMA]
    assert not any(f.clean and relative_error(f.result, meaning(a, arrays)) <= 1e-2 for f in fault)


def test_ragged_sequences_cost_what_they_hold() -> None:
    """Keys behind a sequence's length and before its window may hold anything: no step reads them."""
    a = EXAMPLES[4]
    arrays = draw_inputs(a)
    arrays[0] = np.array([1500, 20], np.int32)
    want, table = meaning(a, arrays), arrays[2]
    for operand in arrays[4:]:
        operand[table[1, 8:]] = np.nan  # a step has 8 pages
    found = judges.interpret(attention.source(a, V5E), *arrays)
    assert_close(found.result, want)


@pytest.mark.parametrize("records", [0, 8])
@pytest.mark.parametrize("kind", ["cache", "pages"])
def test_sequences_that_see_nothing(kind: str, records: int) -> None:
    """Blocks without a step, between others and at both ends: zeros, and the copies of the next block are still started."""
    page = 64 if kind == "pages" else 0
    pages = 80 if page else 0
    a = Attention(5, 1, 1, 2, 64, 64, 1024, 0.1, cached=True, page=page, pages=pages, records=records)
    arrays = draw_inputs(a)
    arrays[0] = np.array([5, 1000, 9, 8, 600], np.int32)
    for starts in ([900, 3, 700, 1000, 0], [0, 3, 700, 0, 1000]):
        arrays[1] = np.array(starts, np.int32)
        want, text = meaning(a, arrays), attention.source(a, V5E)
        assert (want[2] == 0).all() and (want[1] != 0).any()
        for dma in judges.DMA:
            found = judges.interpret(text, *arrays, dma=dma)
            assert found.clean
            assert_close(found.result, want)


def test_what_attention_refuses() -> None:
    with pytest.raises(
        CompileError, match="a cache of 4 rows per page isn't made of whole tiles of 16 rows of bfloat16"
    ):
        attention.source(Attention(1, 1, 1, 1, 64, 64, 16, 1.0, cached=True, page=4, pages=9), V5E)
    with pytest.raises(CompileError, match="not in int8"):
        attention.source(Attention(1, 1, 1, 1, 64, 64, 16, 1.0, dtype="int8"), V5E)


@pytest.mark.parametrize("kind", ["causal", "all", "cache", "float32", "ring", "pages", "bias", "small pages"])
def test_attention_in_programs(kind: str) -> None:
    """The nodes' operands as the kernel takes them; what it doesn't do stays StableHLO."""
    rng, dtype = np.random.default_rng(0), "float32" if kind == "float32" else "bfloat16"
    q = tensor("q", 2, 3, 4, 64, dtype=dtype)
    if kind in ("causal", "all", "bias"):
        k, v = tensor("k", 2, 50, 2, 64), tensor("v", 2, 50, 2, 32)
        bias = tensor("bias", 1, 1, 3, 50) if kind == "bias" else None
        inputs = [i for i in (q, k, v, bias) if i is not None]
        graph = Graph(
            inputs, (ops.attention(q, k, v, bias, scale=0.1, causal=kind != "all", window=9 * (kind == "causal")),)
        )
        arrays = [rng.standard_normal(i.shape).astype(bfloat16) for i in inputs]
    else:
        page = {"pages": 16, "small pages": 4}.get(kind, 0)
        lead = (9, 2, page) if page else (2, 2, 48)
        k, v = tensor("k", *lead, 64, dtype=dtype), tensor("v", *lead, 32, dtype=dtype)
        table = tensor("table", 2, 3, dtype="int32") if page else None
        length, start = tensor("length", 1, dtype="int64"), tensor("start", 2, dtype="int64")
        inputs = [i for i in (q, k, v, length, start, table) if i is not None]
        graph = Graph(inputs, (ops.attention_cached(q, k, v, length, start, table, scale=0.1, window=20),))
        arrays = [rng.standard_normal(i.shape).astype(numpy_dtype(dtype)) for i in inputs[:3]]
        arrays += [np.array([70 if kind == "ring" else 8]), np.array([0, 5])]
        arrays += [rng.permutation(9)[:6].reshape(2, 3).astype(np.int32)] if page else []
    (got,), text = run(graph, arrays)
    assert_close(got, interpret(graph, arrays)[0])
    assert text.count("@tpu_custom_call") == (0 if kind in ("bias", "small pages") else 1)


def over_records(page: int, keys: int, scheme: str, d: int = 64, e: int = 32, chunk: int = 3) -> Graph:
    """A step of attention that appends to caches of records."""
    q, new = tensor("q", 2, chunk, 4, d), [tensor(n, 2, chunk, 2, size) for n, size in (("k", d), ("v", e))]
    lead = (2 * keys // page + 1, 2, page) if page else (2, 2, keys)
    sizes = [record_bytes(scheme, size) for size in (d, e)]
    caches = [tensor(f"{n.name}.cache", *lead, size, dtype="uint8") for n, size in zip(new, sizes, strict=True)]
    length, start = tensor("length", 1, dtype="int64"), tensor("start", 2, dtype="int64")
    table = tensor("table", 2, keys // page, dtype="int32") if page else None
    pairs = zip(caches, new, strict=True)
    k, v = (ops.cache_append(c, ops.encode_rows(n, scheme=scheme), length, table, ring=not page) for c, n in pairs)
    seen = ops.attention_cached(q, k, v, length, start, table, scale=0.1, window=20, scheme=scheme)
    where = [length, start, *([] if table is None else [table])]
    return Graph((q, *new, *where, *caches), (seen, k, v))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize(("page", "keys", "length"), [(32, 96, 40), (0, 96, 40), (0, 64, 150), (16, 96, 40)])
def test_records_in_programs(page: int, keys: int, length: int, scheme: str) -> None:
    """Caches in two parts hold what whole ones do, and kernels read them as they lie; pages that aren't whole tiles of bytes stay StableHLO."""
    rng = np.random.default_rng(0)
    graph = over_records(page, keys, scheme)
    laid = lay_out(graph, V5E)
    arrays: list[np.ndarray] = []
    for node in graph.inputs:
        shape = tuple(int(n) for n in node.shape)
        if node.dtype == "bfloat16":
            arrays.append(rng.standard_normal(shape).astype(bfloat16))
        elif node.dtype == "uint8":
            arrays.append(encode(rng.standard_normal((*shape[:-1], row_length(scheme, shape[-1]))), scheme))
    where = [np.array([length]), np.array([0, 5])]
    where += [rng.permutation(2 * keys // page)[: 2 * (keys // page)].reshape(2, -1).astype(np.int32)] if page else []
    *numbers, first, second = arrays
    split = []
    for cache in (first, second):
        codes, tails = apart(cache, 2, 64)
        split += [codes, tails[:, None]]
    want = interpret(graph, [*numbers, *where, first, second])
    laid_out = page != 16
    given = [*numbers, *where, *(split if laid_out else (first, second))]
    for values in (interpret(laid, given), run(laid, given)[0]):
        seen, *state = (np.asarray(v) for v in values)
        assert_close(seen, want[0])
        if laid_out:
            sizes = (c.shape[-1] - TAIL for c in (first, second))
            parts = zip(state[::2], state[1::2], sizes, strict=True)
            state = [records_of(c, t[:, 0], 2, size) for c, t, size in parts]
        for value, whole in zip(state, want[1:], strict=True):
            np.testing.assert_array_equal(value, whole)
    text = emit(laid, {}, kernels.chooser(V5E, smallest=0))
    assert text.count("@tpu_custom_call") == laid_out and ("_apart" in text) == laid_out
    assert [i.name for i in laid.inputs][-2 - 2 * laid_out :] == (
        ["k.cache.codes", "k.cache.tails", "v.cache.codes", "v.cache.tails"] if laid_out else ["k.cache", "v.cache"]
    )


@pytest.mark.parametrize(
    ("groups", "d", "e", "page", "length", "heads", "wide"),
    [
        (4, 64, 64, 0, 40, 2, (64, 64)),
        (4, 64, 64, 16, 40, 2, (64, 64)),
        (2, 64, 32, 0, 150, 2, (64, 64)),  # a ring
        (3, 64, 64, 0, 40, 1, (128, 128)),
        (2, 80, 96, 16, 40, 1, (128, 128)),
        (4, 64, 128, 0, 40, 1, (128, 128)),
    ],
)
def test_caches_of_floats_fill_the_lanes(
    groups: int, d: int, e: int, page: int, length: int, heads: int, wide: tuple[int, int]
) -> None:
    """Caches hold what they did, several heads in a row or zeros behind one, and attention gives what it gave."""
    rng, keys, repeats = np.random.default_rng(0), 96, 2
    q, new = tensor("q", 2, 3, groups * repeats, d), [tensor(n, 2, 3, groups, s) for n, s in (("k", d), ("v", e))]
    lead = (2 * keys // page + 1, groups, page) if page else (2, groups, keys)
    caches = [tensor(f"{n.name}.cache", *lead, size) for n, size in zip(new, (d, e), strict=True)]
    at, start = tensor("length", 1, dtype="int64"), tensor("start", 2, dtype="int64")
    table = tensor("table", 2, keys // page, dtype="int32") if page else None
    k, v = (ops.cache_append(c, n, at, table, ring=not page) for c, n in zip(caches, new, strict=True))
    seen = ops.attention_cached(q, k, v, at, start, table, scale=0.1, window=20)
    graph = Graph((q, *new, at, start, *([] if table is None else [table]), *caches), (seen, k, v))
    laid = lay_out(graph, V5E)
    assert [i.shape[1::2] for i in laid.inputs[-2:]] == [(groups // heads, heads * w) for w in wide]
    numbers = [rng.standard_normal(tuple(map(fixed, n.shape))).astype(bfloat16) for n in (q, *new, *caches)]
    where = [np.array([length]), np.array([0, 5])]
    where += [rng.permutation(2 * keys // page)[: 2 * (keys // page)].reshape(2, -1).astype(np.int32)] if page else []
    want = interpret(graph, [*numbers[:3], *where, *numbers[3:]])
    held = [in_lanes(c, heads, w) for c, w in zip(numbers[3:], wide, strict=True)]
    given = [*numbers[:3], *where, *held]
    for values in (interpret(laid, given), run(laid, given)[0]):
        got, *state = (np.asarray(value) for value in values)
        assert_close(got, want[0])
        for value, whole, size in zip(state, want[1:], (d, e), strict=True):
            np.testing.assert_array_equal(out_of_lanes(value, groups, size), whole)
    assert emit(laid, {}, kernels.chooser(V5E, smallest=0)).count("@tpu_custom_call") == 1


def test_records_of_small_floats_stay_whole() -> None:
    """Kernels read records of integers; those of fp8 are StableHLO."""
    graph = over_records(32, 96, "fp8")
    assert str(lay_out(graph, V5E)) == str(graph)
    assert "@tpu_custom_call" not in emit(graph, {}, kernels.chooser(V5E, smallest=0))


AOT = judges.aot_python()


@pytest.mark.skipif(AOT is None, reason='needs libtpu: pip install "jisu[tpu-aot]"')
@pytest.mark.slow
@settings(max_examples=1, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(attentions(), min_size=12, max_size=12))
def test_libtpu_compiles_drawn_attention(drawn: list[Attention]) -> None:
    judges.compile_ahead([attention.source(a, V5E) for a in drawn], ["v5e"])
    judges.compile_ahead([attention.source(a, V6E) for a in drawn], ["v6e"])


@pytest.mark.skipif(AOT is None, reason='needs libtpu: pip install "jisu[tpu-aot]"')
@pytest.mark.slow
def test_libtpu_compiles_attention() -> None:
    accepted = judges.compile_ahead([attention.source(a, V5E) for a in EXAMPLES], ["v5e"])
    accepted += judges.compile_ahead([attention.source(a, V6E) for a in EXAMPLES], ["v6e"])
    assert all(row[0].code_bytes > 0 for row in accepted)


# --- Models ---------------------------------------------------------------------------------------------------------------


def decoder(layout: CacheLayout | None = None, integers: bool = False) -> Step:
    """The step of a tiny decoder in bfloat16, its weights laid out; integers: weights, what layers read, and the cache are int8."""
    from jisu.frontends.huggingface import trace_decoder

    found = trace_decoder(make("llama").bfloat16())
    rules = (QuantizeRecipe(scheme="int8", group=0, activations="int8"),)
    compress = (
        (QuantizeActivations(rules, None), Compress((), rules), QuantizeCache("int8", "none", None)) if integers else ()
    )
    graph, _ = Pipeline((*default_passes(), *compress)).run(found.graph)
    step = keep_last_token(derive_step(graph, sequence=found.sequence, layout=layout), found.sequence)
    packed = PackWeights(16, {})(step.graph) if integers else step.graph
    return attrs.evolve(step, graph=FoldWeights()(lay_out(packed, V5E)))


def floats(results: Sequence[Any]) -> list[np.ndarray]:
    """Results of a step, caches of records of two key heads decoded."""
    arrays = [np.asarray(r) for r in results]
    if all(a.dtype != np.uint8 for a in arrays):
        return arrays
    pairs = zip(arrays[1::2], arrays[2::2], strict=True)
    return [arrays[0], *(decode(records_of(c, t[:, 0], 2, 16), "int8") for c, t in pairs)]


def bucket(step: Step, rows: int, capacity: int, page: int = 16) -> dict[str, int]:
    sizes = {"batch": 2, "sequence": rows, "pages": 2 * capacity // page + 1, "sequence_pages": capacity // page}
    return {s: sizes.get(s, capacity) for s in step.graph.symbols}


def chunk(step: Step, sizes: Mapping[str, int], length: int) -> list[np.ndarray]:
    """Inputs of a step: tokens, the cache's length, padding in front of the second sequence, perhaps pages, and a filled cache."""
    rng = np.random.default_rng(0)
    named = {n.name: n.tensor.at(sizes) for n in step.graph.inputs}
    arrays = [rng.integers(0, 99, (2, sizes["sequence"])), np.array([length]), np.array([0, 3])]
    if "table" in named:
        pages = rng.permutation(sizes["pages"])[: 2 * sizes["sequence_pages"]]
        arrays.append(pages.reshape(2, -1).astype(np.int32))
    for name, t in list(named.items())[len(arrays) :]:
        shape = tuple(fixed(n) for n in t.shape)
        if name.endswith(".codes"):
            arrays.append(rng.integers(0, 256, shape).astype(np.uint8))
        elif name.endswith(".tails"):
            arrays.append(
                np.broadcast_to(np.array([0.01, -1], bfloat16).view(np.uint8), (shape[3] // TAIL, TAIL)).reshape(-1)
                + np.zeros(shape, np.uint8)
            )
        else:
            arrays.append(rng.standard_normal(shape).astype(bfloat16))
    return arrays


@pytest.mark.parametrize(
    ("rows", "length", "page", "integers"),
    [
        (12, 0, 0, False),
        (1, 20, 16, False),
        (1, 20, 32, True),
        *(pytest.param(*p, marks=pytest.mark.slow) for p in [(12, 8, 16, False), (1, 20, 0, False), (12, 0, 0, True)]),
    ],
)
def test_a_model_with_kernels_equals_the_one_without(rows: int, length: int, page: int, integers: bool) -> None:
    """Both round to bfloat16 at many places; float64 is the yardstick."""
    step = decoder(CacheLayout(page=page) if page else None, integers)
    sizes = bucket(step, rows, 64)
    arrays = chunk(step, sizes, length)
    got, text = run(step.graph, arrays, sizes)
    entry = signature(step.graph, sizes)
    weights = [step.graph.weights[name].numpy() for name, _ in entry.weights]
    plain = export.runner(emit(step.graph, sizes), entry)(*arrays, *weights)
    exact = interpret(step.graph, arrays, float64=True)
    for value, other, want in zip(*(floats(v) for v in (got, plain, exact)), strict=True):
        truth = want.astype(np.float64)
        assert value.shape == other.shape and value.dtype == other.dtype
        assert relative_error(value, truth) <= max(1e-2, 1.5 * relative_error(other, truth))
    assert text.count("@tpu_custom_call") >= 7 and "call @attention_" in text


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize(("page", "integers"), [(0, False), (16, False), (16, True)])
@pytest.mark.parametrize("chip", [V5E, V6E], ids=lambda c: c.short)
def test_models_with_kernels_compile_for_chips(chip: Chip, page: int, integers: bool) -> None:
    step = decoder(CacheLayout(page=page) if page else None, integers)
    for rows in (128, 1):
        sizes = bucket(step, rows, 256)
        text = emit(step.graph, sizes, kernels.chooser(chip, smallest=0))
        made = export.compile_for(chip.short, text, signature(step.graph, sizes))
        assert made.hlo.count("tpu_custom_call") >= 6 and made.memory["code"] > 0


def copied(hlo: str) -> list[str]:
    """What libtpu's program brings from one layout into another, of a MiB and more: in HBM, and in VMEM, where it keeps what is small."""
    found = re.findall(r"= (\w+\[[\d,]+\])\S* (?:copy|transpose)\(", hlo)
    return [t for t in found if math.prod(map(int, re.findall(r"\d+", t.partition("[")[2]))) >= 1 << 20]


def over_cache(scheme: str, page: int, groups: int, d: int, batch: int = 4, keys: int = 4096) -> Graph:
    """A step of attention alone, its caches appended to."""
    q, new = tensor("q", batch, 1, 16, d), [tensor(n, batch, 1, groups, d) for n in "kv"]
    lead = (batch * keys // page, groups, page) if page else (batch, groups, keys)
    kind = ("bfloat16", d) if scheme == "none" else ("uint8", record_bytes(scheme, d))
    caches = [tensor(f"{n.name}.cache", *lead, kind[1], dtype=kind[0]) for n in new]
    length, start = tensor("length", 1, dtype="int64"), tensor("start", batch, dtype="int64")
    table = tensor("table", batch, keys // page, dtype="int32") if page else None
    rows = new if scheme == "none" else [ops.encode_rows(n, scheme=scheme) for n in new]
    k, v = (ops.cache_append(c, n, length, table) for c, n in zip(caches, rows, strict=True))
    seen = ops.attention_cached(q, k, v, length, start, table, scale=0.1, scheme=scheme)
    return lay_out(Graph((q, *new, length, start, *([] if table is None else [table]), *caches), (seen, k, v)), V5E)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("d", [64, 80, 128])
@pytest.mark.parametrize("page", [0, 64])
@pytest.mark.parametrize("scheme", ["none", "int8", "int4"])
def test_no_cache_is_copied(scheme: str, page: int, d: int) -> None:
    """Of heads that don't fill the lanes neither, and not the tails of records."""
    graph = over_cache(scheme, page, 8, d)
    made = export.compile_for("v5e", emit(graph, {}, kernels.chooser(V5E)), signature(graph, {}))
    assert made.hlo.count('custom_call_target="tpu_custom_call"') == 1
    assert copied(made.hlo) == []


def large_layer(batch: int, narrow: bool) -> Graph:
    """Decoding in a layer of 8 billion weights' model: laid out weights, a paged cache that is updated in place; narrow: both of int8."""
    heads, groups, d, page, pages = 32, 8, 128, 64, 32
    x = tensor("x", batch, 1, 4096)
    sizes = {"q": (4096, 4096), "k": (4096, 1024), "v": (4096, 1024), "o": (4096, 4096), "gate": (4096, 14336)}
    sizes |= {"down": (14336, 4096)}
    w = {name: tensor(name, 1, *size) for name, size in sizes.items()}
    w["gate"] = tensor("gate", 1, 2, *sizes["gate"])
    scales = {
        name: tensor(f"{name}.scale", *v.shape[:-2], 1, v.shape[-1], dtype="float16") for name, v in w.items() if narrow
    }
    if narrow:
        w = {name: tensor(name, *v.shape, 1, dtype="int8") for name, v in w.items()}
    kind = {"dtype": "uint8" if narrow else "bfloat16"}
    caches = [tensor(name, batch * pages, groups, page, d + TAIL * narrow, **kind) for name in ("keys", "values")]
    length, start = tensor("length", 1, dtype="int64"), tensor("start", batch, dtype="int64")
    table = tensor("table", batch, pages, dtype="int32")

    def layer(x: Node, name: str, r: Node | None = None, activation: str = "none") -> Node:
        how = {"outputs": sizes[name][1], "activation": activation}
        if narrow:
            gated = name == "gate"
            return ops.quantized_linear(
                x, w[name], scales[name], None, None, r, scheme="int8", group=0, gated=gated, **how
            )
        if name == "gate":
            return ops.packed_gated_linear(x, w[name], **how)
        return ops.packed_linear(x, w[name], None, r, **how)

    q = ops.reshape(layer(x, "q"), shape=(batch, 1, heads, d))
    new = [ops.reshape(layer(x, name), shape=(batch, 1, groups, d)) for name in ("k", "v")]
    new = [ops.encode_rows(n, scheme="int8") for n in new] if narrow else new
    keys, values = (ops.cache_append(c, n, length, table) for c, n in zip(caches, new, strict=True))
    scheme = "int8" if narrow else "none"
    attended = ops.attention_cached(q, keys, values, length, start, table, scale=d**-0.5, scheme=scheme)
    y = layer(ops.reshape(attended, shape=(batch, 1, heads * d)), "o", x)
    out = layer(layer(y, "gate", activation="silu"), "down", y)
    graph = Graph((x, length, start, table, *caches, *w.values(), *scales.values()), (out, keys, values))
    return lay_out(graph, V5E)


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("chip", [V5E, V6E], ids=lambda c: c.short)
def test_no_weight_or_cache_is_copied(chip: Chip, narrow: bool) -> None:
    """libtpu's program has seven custom calls on the weights and caches as they lie, and next to no memory of its own."""
    graph = large_layer(8, narrow)
    made = export.compile_for(chip.short, emit(graph, {}, kernels.chooser(chip)), signature(graph, {}))
    assert made.hlo.count('custom_call_target="tpu_custom_call"') == 7
    assert made.memory["temporary"] <= 1 << 20 and copied(made.hlo) == []
