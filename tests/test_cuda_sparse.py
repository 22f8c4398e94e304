"""Layers of weights that keep two of each four inputs, for NVIDIA GPUs: kernels on an emulated GPU, the layout pass, and whole models."""

# ruff: noqa: F401, F811 (fixtures)
from __future__ import annotations

import re
from pathlib import Path

import attrs
import numpy as np
import pytest
import torch
import transformers as hf
from hypothesis import given, settings
from hypothesis import strategies as st
from test_cuda import GPU, RACES, REAL, Launch, drawn, emulator, launch
from test_sparse import matrix, n_of_m, stored

import jisu
from jisu.compiler import entry, masks, ops
from jisu.compiler.cost import weight_bytes
from jisu.compiler.errors import TargetError
from jisu.compiler.graph import Graph, Node, Storage, placeholder
from jisu.compiler.interpret import interpret
from jisu.compiler.ops.semi_structured import fours
from jisu.compiler.pipeline import Pipeline, relative_error
from jisu.compiler.types import TensorType, fixed, numpy_dtype, symbol
from jisu.passes import layout_passes
from jisu.passes.layout import sparse_matrices
from jisu.runtime.cuda import DeviceExecutable
from jisu.targets import cuda
from jisu.targets.compile import compile_graphs
from jisu.targets.cuda import device, ptx
from jisu.targets.cuda.kernels import semi_structured
from jisu.targets.cuda.kernels.layers import Layer
from jisu.targets.target import Target, known_targets

TOLERANCE = {"bfloat16": 2e-2, "float16": 3e-3}


def halved(seed: int, n: int, k: int, dtype: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A matrix [n, k] that keeps two of each four, its values and its places."""
    rng = np.random.default_rng(seed)
    keep = n_of_m(rng.random((n, k)), 2, 4)
    w = drawn(seed, n, k, dtype=dtype)
    w[~keep] = 0
    values = drawn(seed, n, k // 2, dtype=dtype)
    values[...] = w[keep].reshape(n, -1)
    places = ops.pack_places.meaning(masks.pack_mask(keep), k=k, fours=fours(dtype))  # type: ignore[misc]
    return w, values, places


@pytest.mark.parametrize(
    ("rows", "m", "n", "k"), [(8, 1, 70, 512), (8, 3, 33, 64), (8, 8, 16, 2368), (16, 11, 40, 4096)]
)
@RACES
def test_few_rows(rows: int, m: int, n: int, k: int, late: bool, order: int, launch: Launch) -> None:
    dtype = "bfloat16" if late else "float16"
    layer = Layer(k, (n,), dtype, halves=True)
    w, values, places = halved(k, n, k, dtype)
    x, y = drawn(0, m, k, dtype=dtype), drawn(1, m + 1, n, dtype=dtype)
    guard = y[-1].copy()
    kernel = semi_structured.thin_halves(layer, rows, GPU)
    launch(kernel, (layer.tiles(16), -(-m // rows)), x, values, places, y, m, late=late, order=order)
    want = x.astype(np.float64) @ w.astype(np.float64).T
    np.testing.assert_allclose(y[:m].astype(np.float64), want, rtol=1e-2, atol=1e-2 * np.sqrt(k))
    np.testing.assert_array_equal(y[-1], guard)


@pytest.mark.parametrize(("m", "n", "k"), [(128, 128, 256), (1, 1, 64), (130, 70, 320), (70, 200, 1088)])
@RACES
def test_many_rows(m: int, n: int, k: int, late: bool, order: int, launch: Launch) -> None:
    dtype = "bfloat16" if late else "float16"
    layer = Layer(k, (n,), dtype, halves=True)
    w, values, places = halved(k, n, k, dtype)
    x, y = drawn(0, m, k, dtype=dtype), drawn(1, m + 1, n, dtype=dtype)
    for tile in (semi_structured.LARGE, semi_structured.SMALL):
        guard = y[-1].copy()
        kernel = semi_structured.product_halves(layer, tile, GPU)
        grid = (-(-m // tile.rows), layer.tiles(tile.outputs))
        launch(kernel, grid, x, values, places, y, m, late=late, order=order)
        want = x.astype(np.float64) @ w.astype(np.float64).T
        np.testing.assert_allclose(y[:m].astype(np.float64), want, rtol=1e-2, atol=1e-2 * np.sqrt(k))
        np.testing.assert_array_equal(y[-1], guard)
        y[:m] = 0


@pytest.mark.parametrize("missing", ["copies_done", "barrier", "commit_copies"])
@pytest.mark.parametrize("few", [False, True])
def test_what_is_missing_shows(missing: str, few: bool, launch: Launch, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.Device, missing, lambda self, *_: None)
    k = 2048 if few else 512
    layer = Layer(k, (128,), halves=True)
    w, values, places = halved(0, 128, k, "bfloat16")
    x, y = drawn(0, 8, k), drawn(1, 8, 128)
    kernel = (
        semi_structured.thin_halves(layer, 8, GPU)
        if few
        else semi_structured.product_halves(layer, semi_structured.LARGE, GPU)
    )
    with pytest.raises((RuntimeError, AssertionError) if missing == "barrier" else RuntimeError):
        launch(kernel, (8, 1) if few else (1, 1), x, values, places, y, 8, order=-1)
        want = x.astype(np.float64) @ w.astype(np.float64).T
        np.testing.assert_allclose(y.astype(np.float64), want, rtol=1e-2, atol=1e-2 * np.sqrt(k))


def test_places_of_the_other_pair_show(launch: Launch) -> None:
    """Words are those of the threads that an instruction names: with two of a tile exchanged, results are others."""
    layer = Layer(256, (16,), halves=True)
    w, values, places = halved(0, 16, 256, "bfloat16")
    places = places.copy()
    places[:, :, [0, 2]] = places[:, :, [2, 0]]
    x, y = drawn(0, 8, 256), drawn(1, 8, 16)
    launch(semi_structured.thin_halves(layer, 8, GPU), (1, 1), x, values, places, y, 8)
    right = np.isclose(y.astype(np.float64), x.astype(np.float64) @ w.astype(np.float64).T, rtol=1e-2, atol=0.2)
    assert [i for i, outputs in enumerate(right.T) if not outputs.all()] == [0, 8]


@pytest.mark.parametrize("per", [4, 8, 16])
def test_places_are_those_that_torch_gives_its_kernels(per: int) -> None:
    """torch brings places into the order in which CUTLASS' kernels, which run on GPUs, load them for the same instruction: words of rows r and r + 8,
    and of r + 16 and r + 24, for 16 columns and the next 16. There an instruction's inputs are neighbours; ours are `per` fours apart."""
    convert = pytest.importorskip("torch.sparse._semi_structured_conversions").sparse_semi_structured_from_dense_cutlass
    keep = keep_of(32, 512, per)
    # Fours (unit, step, a, p) in the order of instructions (step, p / 2), in which thread a has that of p % 2 = 0, and behind all of those of 1.
    apart = keep.reshape(32, 2, 16 // per, 4, per // 2, 2, 4).transpose(0, 1, 2, 4, 5, 3, 6)
    _, theirs = convert(torch.from_numpy(np.ascontiguousarray(apart.reshape(32, 512)).astype(np.float16)))
    words = (
        theirs.numpy().reshape(-1).view(np.uint32).reshape(16, 8, 2, 2)
    )  # instruction, row, tile, half of the columns
    ours = ops.pack_places.meaning(masks.pack_mask(keep), k=512, fours=per)  # type: ignore[misc]
    own = ours.view(np.uint32).reshape(2, 2, 8, 2, 2, 4)  # tile, unit, row, i % 2, half of the columns, i / 2
    np.testing.assert_array_equal(own.transpose(1, 5, 3, 2, 0, 4).reshape(16, 8, 2, 2), words)


def test_layers_that_do_not_fit_are_refused() -> None:
    for layer in (Layer(96, (8,), halves=True), Layer(128, (8,), scheme="int4", halves=True), Layer(128, (8,))):
        with pytest.raises(TargetError, match="no multiple"):
            semi_structured.thin_halves(layer, 8, GPU)


# --- The layout pass ----------------------------------------------------------------------------------------------------


def keep_of(n: int, k: int, seed: int) -> np.ndarray:
    return n_of_m(np.random.default_rng(seed).random((n, k)), 2, 4)


def laid_out(graph: Graph, target: Target = REAL) -> Graph:
    panel, pair = cuda.packing(target)
    return Pipeline(layout_passes(panel, pair, levels=cuda.levels(target), halves=cuda.halves(target))).run(graph)[0]


def every_use(k: int, n: int, dtype: str, scheme: str, group: int, symmetric: bool, seed: int = 0) -> Graph:
    """Linear with its epilogue, and gated."""
    held: dict[str, Storage] = {}
    w, v = (matrix(c, keep_of(n, k, seed + i), dtype, held, scheme, group, symmetric) for i, c in enumerate("wv"))
    x = placeholder("x", TensorType((symbol("m"), k), dtype))
    bias = stored(held, "b", np.linspace(-1, 1, n).astype(numpy_dtype(dtype)))
    outputs = (
        ops.linear(x, w), ops.linear(x, w, bias, ops.linear(x, v), activation="gelu_tanh"),
        ops.gated_linear(x, w, v, activation="silu"),
    )  # fmt: skip
    return Graph((x,), outputs, held)


FORMS = st.sampled_from(
    [
        ("none", 0, True), ("int8", 0, True), ("int8", 32, False), ("int6", 128, True), ("int4", 64, True), ("int4", 32, False),
        ("int4", 0, True), ("int3", 128, False), ("int2", 64, True), ("nf4", 64, True), ("fp8", 0, True), ("mxfp4", 32, True),
        ("nvfp4", 16, True),
    ]
)  # fmt: skip


@settings(max_examples=25)
@given(st.integers(1, 3), st.integers(1, 40), st.sampled_from(["bfloat16", "float16"]), FORMS, st.integers(0, 99))
def test_what_is_packed_means_the_same(steps: int, n: int, dtype: str, form: tuple[str, int, bool], seed: int) -> None:
    scheme, group, symmetric = form
    k = steps * cuda.halves(REAL)[dtype if scheme == "none" else scheme]
    if group and k % group:
        return
    graph = every_use(k, n, dtype, scheme, group, symmetric, seed)
    packed = laid_out(graph)
    assert packed.count(ops.semi_structured_linear) == 4 and not packed.count(ops.linear, ops.gated_linear, ops.expand)
    told = {"form": dtype if scheme == "none" else scheme, "kept": 0.5, "stored": "2:4"}
    assert sorted(sparse_matrices(packed), key=lambda m: m["name"]) == [{"name": name, **told} for name in "vw"]
    x = np.random.default_rng(seed).standard_normal((3, k)).astype(numpy_dtype(dtype))
    for got, want in zip(interpret(packed, [x]), interpret(graph, [x]), strict=True):
        assert relative_error(got, want) < TOLERANCE[dtype]


def test_only_two_of_four_are_halved() -> None:
    """Not: other masks of a half, rows that end within a step, float32, and what is looked up; gate and up of which one is."""
    held: dict[str, Storage] = {}
    rng = np.random.default_rng(0)
    x = placeholder("x", TensorType((symbol("m"), 128), "bfloat16"))
    z = placeholder("z", TensorType((symbol("m"), 96), "bfloat16"))
    f = placeholder("f", TensorType((symbol("m"), 128), "float32"))
    ids = placeholder("ids", TensorType((3,), "int64"))
    half = keep_of(20, 128, 0)
    other = rng.permuted(half.reshape(-1)).reshape(half.shape)
    tied = matrix("t", half, "bfloat16", held)
    w = matrix("w", half, "bfloat16", held)
    outputs: list[Node] = [
        ops.linear(x, matrix("o", other, "bfloat16", held)),
        ops.linear(z, matrix("z", half[:, :96], "bfloat16", held)),
        ops.linear(f, matrix("f", half, "float32", held)),
        ops.linear(x, tied),
        ops.take(tied, ids, axis=0, wrap=False),
        ops.gated_linear(x, w, matrix("u", other, "bfloat16", held), activation="silu"),
        ops.gated_linear(x, *(matrix(n, k, "bfloat16", held, "int8") for n, k in (("g", half), ("h", other))), activation="silu"),
    ]  # fmt: skip
    graph = Graph((x, z, f, ids), outputs, held)
    packed = laid_out(graph)
    kinds = {m["name"]: m["stored"] for m in sparse_matrices(packed)}
    assert kinds == {n: "2:4" if n == "g" else "dense with zeros" for n in "ozftwugh"}
    assert packed.count(ops.semi_structured_linear) == packed.count(ops.quantized_linear) == 1
    given_ = [rng.standard_normal((2, s)).astype(numpy_dtype(d)) for s, d in ((128, "bfloat16"), (96, "bfloat16"), (128, "float32"))]  # fmt: skip
    for got, want in zip(
        interpret(packed, [*given_, np.arange(3)]), interpret(graph, [*given_, np.arange(3)]), strict=True
    ):
        assert relative_error(np.asarray(got, np.float64), np.asarray(want, np.float64)) < 2e-2


def test_bytes_and_gains() -> None:
    """Nine sixteenths of the bytes in bfloat16; what is predicted to be gained is at most the ratio of bytes, on all machines."""
    graph = every_use(512, 64, "bfloat16", "none", 0, True)
    dense = Pipeline(layout_passes(1, {"bfloat16": 1})).run(graph)[0]
    assert weight_bytes(laid_out(graph)) / weight_bytes(dense) == pytest.approx(9 / 16, rel=0.01)
    for name in known_targets():
        if name.startswith(("cuda", "nvidia")):
            target = Target.describe(name)
            for form, ratio in (("bfloat16", 16 / 9), ("int8", 8 / 5), ("int4", 4 / 3)):
                gain = cuda.sparse_gain(form, 0.5, target, "2:4")
                assert gain is not None and 0.5 < gain <= ratio + 1e-9, (name, form, gain)
                assert (form in cuda.halves(target)) == (gain > 1.0), (name, form, gain)
            assert cuda.sparse_gain("bfloat16", 0.5, target) is None is cuda.sparse_gain("float32", 0.5, target, "2:4")
    assert cuda.sparse_gain("bfloat16", 0.5, REAL, "2:4") == pytest.approx(16 / 9)
    slow = attrs.evolve(REAL, caches=[attrs.evolve(REAL.caches[0], bandwidth=REAL.memory_bandwidth / 4)])
    assert not cuda.halves(slow).keys() & {"int4", "int8"}  # where inputs are what takes the time


# --- Whole programs on an emulated GPU ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float16", marks=pytest.mark.slow)])
def test_layers(dtype: str, emulated_gpu: Target, tmp_path: Path) -> None:
    target = attrs.evolve(emulated_gpu, cores=1)
    plain = {
        f"{scheme}{group}": every_use(k, n, dtype, scheme, group, symmetric)
        for scheme, group, symmetric, k, n in (
            ("none", 0, True, 320, 70), ("int8", 32, False, 384, 70), ("int4", 64, True, 256, 40), ("int4", 32, False, 512, 24),
            ("fp8", 0, True, 128, 24), ("nf4", 64, True, 256, 24), ("nvfp4", 16, True, 256, 24),
        )
    }  # fmt: skip
    graphs = {name: laid_out(graph, target) for name, graph in plain.items()}
    info = compile_graphs(graphs, target, out=tmp_path / "out", cache_dir=tmp_path / "cache")
    assert all("2of4" in name for _, op, _, names in info.kernels if op == "semi_structured_linear" for name in names)
    run = DeviceExecutable(info.code(), info.entries)
    for name, graph in graphs.items():
        weights = {n: s.numpy() for n, s in entry.stored(graph).items()}
        for m in (1, 12, 40, 130):
            x = (
                np.random.default_rng(m)
                .standard_normal((m, fixed(graph.inputs[0].shape[1])))
                .astype(numpy_dtype(dtype))
            )
            for got, want in zip(run.call(name, [x], weights), interpret(plain[name], [x]), strict=True):
                assert relative_error(np.asarray(got), want) < TOLERANCE[dtype], (name, m)


@pytest.mark.parametrize("recipe", ["2:4+int4", pytest.param("2:4", marks=pytest.mark.slow)])
def test_a_pruned_model(recipe: str, emulated_gpu: Target) -> None:
    """Logits as those of the CPU's program, whose matrices are the same ones."""
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        vocab_size=96, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, head_dim=64,
        num_key_value_heads=2, max_position_embeddings=256,
    )  # fmt: skip
    model = hf.LlamaForCausalLM(config).eval().bfloat16()
    program, on_cpu = (jisu.compile(model, target=t, recipe=recipe) for t in (emulated_gpu, "cpu"))
    told = program.explain()["sparse"]
    assert len(told) == 14 and all(m["stored"] == "2:4" and 1.0 < m["predicted_gain"] < 2.0 for m in told)
    used = {name for k in program.explain()["kernels"] if k["op"] == "semi_structured_linear" for name in k["choices"]}
    assert any("thin8" in name for name in used) and any("product" in name for name in used)
    ids = np.random.default_rng(1).integers(0, 96, (1, 20))
    got, want = (np.asarray(p(ids).logits, np.float32) for p in (program, on_cpu))
    assert np.abs(got - want).max() <= 3e-2 * np.abs(want).max()
    sessions = [p.session() for p in (program, on_cpu)]
    for part in (ids[:, :12], ids[:, 12:13], ids[:, 13:]):
        got, want = (np.asarray(s.append(part), np.float32) for s in sessions)
        assert np.abs(got - want).max() <= 3e-2 * np.abs(want).max()


@pytest.mark.parametrize("mcpu", ["sm_80", "sm_90a", "sm_120"])
def test_ptx_has_the_instructions(mcpu: str) -> None:
    target = attrs.evolve(REAL, mcpu=mcpu)
    made = {}
    for name, how in {
        "floats": {}, "gated": {"gated": True, "activation": "silu"}, "int8": {"scheme": "int8"},
        "int4": {"scheme": "int4", "group": 32, "zeros": True}, "table": {"scheme": "nf4", "group": 64},
    }.items():  # fmt: skip
        layer = Layer(4096, (4096,), halves=True, **how)  # type: ignore[arg-type]
        for rows in semi_structured.THIN_ROWS:
            made[f"few {name} {rows}"] = semi_structured.thin_halves(layer, rows, target)
        large = semi_structured.CODED if layer.scheme else semi_structured.LARGE
        for tile in (large, semi_structured.SMALL):
            made[f"many {name} {tile.outputs}"] = semi_structured.product_halves(layer, tile, target)
    text = ptx.to_ptx(list(made.values()), target)
    bodies = {k: text.partition(f".entry {ptx.entry_name(v)}(")[2].partition("\n}")[0] for k, v in made.items()}
    word = f"mma.sp{'::ordered_metadata' if mcpu == 'sm_120' else ''}.sync.aligned.m16n8k32.row.col.f32.bf16.bf16.f32"
    for kind, body in bodies.items():
        assert word in body and "cp.async.cg.shared.global" in body and "ld.shared.v4" in body, kind
        assert ("ldmatrix.sync.aligned.m8n8.x4" in body) == kind.startswith("many"), kind
    assert not re.search(r"\.local\b|call\.uni", text)
    if ptx.find_assembler() is None:
        pytest.skip("there is no ptxas here")
    _, usage = ptx.assemble(text, target)
    assert usage and all(u.spilled_bytes == u.stack_bytes == 0 for u in usage.values())
    assert all(usage[ptx.entry_name(k)].registers <= 96 for name, k in made.items() if name.startswith("few"))
    assert all(k.shared_bytes <= 99 << 10 for k in made.values())  # what consumers' GPUs have
