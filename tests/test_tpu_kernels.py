"""Our Pallas kernels inside exported programs: values through Pallas' interpreter, and libtpu's word for the chips."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from decoders import make
from ml_dtypes import bfloat16

from jisu.compiler import ops, schemes
from jisu.compiler.graph import ArrayStorage, Graph, Node, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import Pipeline, relative_error
from jisu.compiler.types import TensorType, symbol
from jisu.passes import default_passes
from jisu.passes.cache import CacheLayout, Step, derive_step, keep_last_token
from jisu.passes.layout import FoldWeights
from jisu.targets.tpu import export, kernels
from jisu.targets.tpu.chip import Chip
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
        "gated, laid out": lambda: ops.gated_linear(x, w, u, activation="silu"),
        "panels": lambda: ops.packed_linear(x, wide, outputs=n, activation="none"),
        "gated panels": lambda: ops.packed_gated_linear(
            x, ops.pack_gated(w, u, panel=16, pair=2), outputs=n, activation="gelu_tanh"
        ),
        "projections": lambda: ops.get(
            ops.packed_projections(x, wide, other, outputs=(n, n), biased=False), index=1
        ),
    }[kind]()
    graph = Graph((x, w, u), (out,))
    (got,), text = run(graph, arrays)
    assert_close(got, interpret(graph, arrays)[0])
    assert text.count("@tpu_custom_call") == (1 if kind in ("laid out", "panels") else 2)


def test_weights_are_laid_out_once() -> None:
    """`lay_out` and folding: the program has no transposition left, and a table that is looked up in stays as it is."""
    rng = np.random.default_rng(0)
    held = {n: ArrayStorage((rng.standard_normal((200, 128)) * 0.1).astype(bfloat16)) for n in ("a", "g", "u", "table")}
    a, g, u, table = (weight(n, TensorType((200, 128), "bfloat16")) for n in held)
    x, ids = tensor("x", 8, 128), tensor("ids", 8, dtype="int64")
    gated = ops.gated_linear(x, g, u, activation="silu")
    out = (ops.linear(x, a), gated, ops.linear(ops.take(table, ids, axis=0), table))
    graph = Graph((x, ids), out, held)
    laid = FoldWeights()(kernels.lay_out(graph, V5E))
    arrays = [normal(8, 128), rng.integers(0, 200, 8)]
    got, text = run(laid, arrays)
    for value, want in zip(got, interpret(graph, arrays), strict=True):
        assert_close(value, want)
    assert text.count("@tpu_custom_call") == 3  # two layers share one
    assert text.count("stablehlo.transpose") == 1


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
        many = ops.integer_projections(
            records, *packed, *steps, outputs=(n, n), offset=False, biased=False, **how
        )
        outs = [ops.get(many, index=i) for i in range(2)]
    elif kind == "gated":
        side = [ops.concat(*(ops.reshape(v, shape=(v.shape[0], 1, *v.shape[1:])) for v in vs), axis=1) for vs in (packed, steps)]
        outs = [ops.integer_linear(records, *side, outputs=n, gated=True, activation="silu", **how)]
    else:
        outs = [ops.integer_linear(records, packed[0], steps[0], None, b, outputs=n, activation="relu", **how)]
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
    assert text.count("@tpu_custom_call") == (1 if kind in ("plain", "int4") else 2)


# --- Models ---------------------------------------------------------------------------------------------------------------


def decoder(layout: CacheLayout | None = None) -> Step:
    """The step of a tiny decoder in bfloat16, its weights laid out."""
    from jisu.frontends.huggingface import trace_decoder

    found = trace_decoder(make("llama").to(torch.bfloat16))
    graph, _ = Pipeline(default_passes()).run(found.graph)
    step = keep_last_token(derive_step(graph, sequence=found.sequence, layout=layout), found.sequence)
    return attrs.evolve(step, graph=FoldWeights()(kernels.lay_out(step.graph, V5E)))


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
    return [*arrays, *(rng.standard_normal(named[s.name].shape).astype(bfloat16) for s in step.state)]


@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize(("rows", "length"), [(12, 0), (1, 20)])
def test_a_model_with_kernels_equals_the_one_without(rows: int, length: int, page: int) -> None:
    step = decoder(CacheLayout(page=page) if page else None)
    sizes = bucket(step, rows, 64)
    arrays = chunk(step, sizes, length)
    got, text = run(step.graph, arrays, sizes)
    entry = signature(step.graph, sizes)
    weights = [step.graph.weights[name].numpy() for name, _ in entry.weights]
    plain = export.runner(emit(step.graph, sizes), entry)(*arrays, *weights)
    for value, want in zip(got, plain, strict=True):
        assert_close(value, want, 2e-2)
    assert text.count("@tpu_custom_call") >= 6


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("page", [0, 16])
@pytest.mark.parametrize("chip", [V5E, V6E], ids=lambda c: c.short)
def test_models_with_kernels_compile_for_chips(chip: Chip, page: int) -> None:
    step = decoder(CacheLayout(page=page) if page else None)
    for rows in (128, 1):
        sizes = bucket(step, rows, 256)
        text = emit(step.graph, sizes, kernels.chooser(chip, smallest=0))
        made = export.compile_for(chip.short, text, signature(step.graph, sizes))
        assert made.hlo.count("tpu_custom_call") >= 6 and made.memory["code"] > 0
