"""Sparse matrices: their form in storage, kernels that read it, the layout pass, and the whole way through a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import transformers as hf
from decoders import DECODERS, VOCABULARY, make
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import jisu
from jisu.compiler import entry, masks, ops
from jisu.compiler.cost import weight_bytes
from jisu.compiler.graph import WEIGHT, ArrayStorage, Graph, Node, Storage, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import Pipeline, relative_error
from jisu.compiler.schemes import SCHEMES, encode_scales
from jisu.compiler.types import TensorType, numpy_dtype, symbol
from jisu.compiler.verify import verify
from jisu.frontends.huggingface import trace_decoder
from jisu.passes import default_passes, layout_passes
from jisu.passes.compression.gptq import choose_grid
from jisu.passes.layout import sparse_matrices
from jisu.runtime.executable import Executable
from jisu.targets.compile import compile_graphs
from jisu.targets.cpu import packing, sparse_gain, sparse_limits
from jisu.targets.cpu.choose import CHOOSERS
from jisu.targets.target import Target

CPU = Target.resolve("cpu")
FLOATS = ("float32", "bfloat16", "float16")
ALWAYS = dict.fromkeys((*FLOATS, "float64", *SCHEMES), 1.0)
"""Limits with which every sparse matrix stays sparse."""
TOLERANCE = {"float32": 2e-5, "bfloat16": 2e-2, "float16": 3e-3}
needs_expand = pytest.mark.skipif(
    "bfloat16" not in sparse_limits(CPU), reason="this machine reads dense weights faster"
)


@st.composite
def keeps(draw: st.DrawFn) -> np.ndarray:
    """Which numbers of a small matrix are kept: none, all, some, whole rows without, blocks, or N of every M."""
    n, k = draw(st.integers(1, 70)), draw(st.integers(1, 40))
    rng = np.random.default_rng(draw(st.integers(0, 2**16)))
    kind = draw(st.sampled_from(["none", "all", "some", "rows", "blocks", "n:m"]))
    if kind == "rows":
        return np.asarray(np.broadcast_to(rng.random((n, 1)) < 0.5, (n, k)))
    if kind == "blocks":
        return np.repeat(np.repeat(rng.random((-(-n // 16), -(-k // 4))) < 0.5, 16, 0), 4, 1)[:n, :k]
    if kind == "n:m":
        return n_of_m(rng.random((n, k + -k % 4)), 2, 4)[:, :k]
    return np.asarray(rng.random((n, k)) < {"none": 0.0, "all": 1.0, "some": draw(st.floats(0.1, 0.9))}[kind])


def n_of_m(score: np.ndarray, n: int, m: int) -> np.ndarray:
    """The n of every m consecutive numbers of a row with the largest scores."""
    groups = score.reshape(len(score), -1, m)
    rank = np.argsort(np.argsort(-groups, -1), -1)
    return np.asarray((rank < n).reshape(score.shape))


# --- Storage -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*FLOATS, "float64", "uint8"])
@given(keep=keeps())
def test_what_is_kept_comes_back(dtype: str, keep: np.ndarray) -> None:
    w = (np.arange(keep.size).reshape(keep.shape) % 100 + 1).astype(numpy_dtype(dtype))
    values, mask = masks.compress(w, keep)
    assert values.size == keep.sum() and mask.shape == (len(keep), -(-keep.shape[1] // 8))
    np.testing.assert_array_equal(masks.unpack_mask(mask, keep.shape[1]), keep)
    back = ops.expand.meaning(values, mask, k=keep.shape[1])  # type: ignore[misc]
    assert back.dtype == w.dtype
    np.testing.assert_array_equal(back, np.where(keep, w, 0).astype(w.dtype))


@pytest.mark.parametrize("name", SCHEMES)
@given(keep=keeps(), data=st.data())
def test_kept_codes_come_back(name: str, keep: np.ndarray, data: st.DataObject) -> None:
    """Alone, and among codes that mean 0."""
    kind, (n, k) = SCHEMES[name], keep.shape
    codes = data.draw(hnp.arrays(np.uint8, (n, k), elements=st.integers(0, 2**kind.bits - 1)))
    flat, mask = masks.compress_codes(codes, keep, name)
    assert flat.shape == (-(-int(keep.sum()) * kind.bits // 8),)
    found, there = masks.expand_codes(flat, mask, name, k)
    np.testing.assert_array_equal(there, keep)
    np.testing.assert_array_equal(found[keep], codes[keep])
    scales = np.full((n, 1), 0.5, np.float16 if kind.scale == "float16" else np.float32)
    stored, whole = encode_scales(scales.astype(np.float32), kind.scale)
    zeros = np.full((n, 1), 3, np.uint8) if kind.uniform and data.draw(st.booleans()) else None
    options: dict[str, Any] = {"scheme": name, "k": k, "group": 0}
    sparse = ops.dequantize.meaning(flat, stored, zeros, mask, **options, whole=whole, dtype="float32")  # type: ignore[misc]
    filled = ops.fill_codes.meaning(flat, mask, zeros, **options)  # type: ignore[misc]
    dense = ops.dequantize.meaning(filled, stored, zeros, None, **options, whole=whole, dtype="float32")  # type: ignore[misc]
    np.testing.assert_array_equal(sparse, dense)
    assert (sparse[~keep] == 0).all()


def test_a_mask_of_another_shape_is_refused() -> None:
    with pytest.raises(jisu.InputError, match=r"float32\[2, 3\] and bool\[3, 2\]"):
        masks.compress(np.ones((2, 3), np.float32), np.ones((3, 2), bool))


# --- Kernels -------------------------------------------------------------------------------------------------------------


def stored(held: dict[str, Storage], name: str, array: np.ndarray) -> Node:
    held[name] = ArrayStorage(array)
    return weight(name, TensorType(array.shape, str(array.dtype)))


def matrix(
    name: str, keep: np.ndarray, dtype: str, held: dict[str, Storage], scheme: str = "none", group: int = 0, symmetric: bool = True,
) -> Node:  # fmt: skip
    """A matrix of random numbers, of which `keep` stay, as a node; its parts go into `held`."""
    w, k = np.random.default_rng(len(held)).standard_normal(keep.shape).astype(np.float32), keep.shape[1]
    if scheme == "none":
        values, mask = masks.compress(w.astype(numpy_dtype(dtype)), keep)
        return ops.expand(stored(held, f"{name}.values", values), stored(held, f"{name}.mask", mask), k=k)
    kind = SCHEMES[scheme]
    grid = choose_grid(w * keep, kind, group, symmetric=symmetric)
    scales, whole = encode_scales(grid.scales, kind.scale)
    codes, mask = masks.compress_codes(grid.nearest(w), keep, scheme)
    zeros = None if grid.zeros is None else stored(held, f"{name}.zeros", grid.zeros.astype(np.uint8))
    operands = (stored(held, f"{name}.codes", codes), stored(held, f"{name}.scales", scales), zeros)
    return ops.dequantize(
        *operands, stored(held, f"{name}.mask", mask), scheme=scheme, k=k, group=group, whole=whole, dtype=dtype
    )


def run_and_compare(entries: dict[str, Graph], rows: tuple[int, ...], folder: Path) -> None:
    """Compiled entries (x [m, k], ids) against the interpreter in float64."""
    info = compile_graphs(entries, CPU, out=folder)
    run = Executable.load(info.library, info.entries, num_threads=2)
    for name, graph in entries.items():
        weights = {n: s.numpy() for n, s in entry.stored(graph).items()}
        dtype, k = graph.inputs[0].dtype, graph.inputs[0].shape[1]
        for m in rows:
            x = np.random.default_rng(m).standard_normal((m, k)).astype(numpy_dtype(dtype))
            given = [x, np.array([0, 7, 49])][: len(graph.inputs)]
            for got, want in zip(run.call(name, given, weights), interpret(graph, given, float64=True), strict=True):
                assert relative_error(np.asarray(got).astype(np.float64), want) < TOLERANCE[dtype], (name, m)


def every_use(k: int, dtype: str, scheme: str, group: int, symmetric: bool) -> Graph:
    """Linear with its epilogue, gated, and looked up, over matrices [50, k] of which about half is kept."""
    held: dict[str, Storage] = {}
    rng = np.random.default_rng(k)
    w, v = (matrix(name, rng.random((50, k)) < p, dtype, held, scheme, group, symmetric) for name, p in (("w", 0.5), ("v", 0.4)))  # fmt: skip
    x, ids = placeholder("x", TensorType((symbol("m"), k), dtype)), placeholder("ids", TensorType((3,), "int64"))
    bias = stored(held, "b", np.linspace(-1, 1, 50).astype(numpy_dtype(dtype)))
    outputs = (
        ops.linear(x, w, bias, ops.linear(x, v), activation="relu"),
        ops.gated_linear(x, w, v, activation="silu"),
        ops.take(w, ids, axis=0, wrap=False),
    )
    return verify(Graph((x, ids), outputs, held))


CASES = {
    "floats": ("none", 0, True),
    "int8": ("int8", 0, True),
    "int8_odd": ("int8", 8, False),
    "int4": ("int4", 16, True),
    "int4_odd": ("int4", 0, False),
    "int3": ("int3", 8, False),
    "int2": ("int2", 8, True),
    "nf4": ("nf4", 16, True),
    "fp8": ("fp8", 0, True),
    "mxfp4": ("mxfp4", 32, True),
    "nvfp4": ("nvfp4", 16, True),
}


@pytest.mark.parametrize(
    "dtype", ["float32", *(pytest.param(d, marks=pytest.mark.slow) for d in ("bfloat16", "float16"))]
)
def test_every_form_is_read_as_the_interpreter_does(dtype: str, tmp_path: Path) -> None:
    """Sparse, and dense with zeros; one row, and several."""
    entries = {}
    for name, (scheme, group, symmetric) in CASES.items():
        graph = every_use(135 if not group else 160, dtype, scheme, group, symmetric)
        for form, limits in (("sparse", ALWAYS), ("dense", {})):
            laid_out, _ = Pipeline(layout_passes(*packing(CPU), limits)).run(graph)
            assert laid_out.count(ops.sparse_linear, ops.sparse_take) == (4 if form == "sparse" else 0), laid_out
            assert not laid_out.count(ops.expand, ops.linear, ops.gated_linear)
            assert {m["stored"] for m in sparse_matrices(laid_out)} == {"sparse" if form == "sparse" else "dense with zeros"}  # fmt: skip
            entries[f"{name}_{form}"] = laid_out
            for node in laid_out.nodes:
                if node.op is ops.sparse_linear and (dtype if scheme == "none" else scheme) in sparse_limits(CPU):
                    assert CHOOSERS[node.op](node, CPU) is not None, "the generic kernel is slower than dense ones"
    run_and_compare(entries, (1, 2, 7, 40), tmp_path)


@settings(max_examples=8, deadline=None)
@given(
    kept=st.lists(keeps(), min_size=6, max_size=6),
    kinds=st.lists(st.sampled_from([*FLOATS, "int8", "int4", "nf4"]), min_size=6, max_size=6),
    rows=st.integers(2, 40),
)
def test_kernels_of_drawn_matrices(
    kept: list[np.ndarray], kinds: list[str], rows: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    entries = {}
    for i, (keep, kind) in enumerate(zip(kept, kinds, strict=True)):
        held: dict[str, Storage] = {}
        dtype, scheme = (kind, "none") if kind in FLOATS else ("float32", kind)
        x = placeholder("x", TensorType((symbol("m"), keep.shape[1]), dtype))
        graph = Graph((x,), (ops.linear(x, matrix("w", keep, dtype, held, scheme)),), held)
        entries[f"e{i}"], _ = Pipeline(layout_passes(*packing(CPU), ALWAYS)).run(graph)
        assert entries[f"e{i}"].count(ops.sparse_linear) == 1
    run_and_compare(entries, (1, rows), tmp_path_factory.mktemp("drawn"))


def test_gate_and_up_of_unlike_kinds(tmp_path: Path) -> None:
    """Sparse beside dense, floats and codes: each half as it is stored."""
    held: dict[str, Storage] = {}
    rng = np.random.default_rng(0)
    x = placeholder("x", TensorType((symbol("m"), 64), "float32"))
    keep = rng.random((48, 64)) < 0.5
    plain = stored(held, "u", rng.standard_normal((48, 64)).astype(np.float32))
    few, many = (matrix(n, rng.random((48, 64)) < p, "float32", held, "int8") for n, p in (("f", 0.3), ("m", 0.95)))
    outputs = (
        ops.gated_linear(x, matrix("w", keep, "float32", held), plain, activation="silu"),
        ops.gated_linear(x, few, many, activation="silu"),
    )
    laid_out, _ = Pipeline(layout_passes(*packing(CPU), {"float32": 1.0, "int8": 0.5})).run(Graph((x,), outputs, held))
    assert laid_out.count(ops.sparse_linear) == laid_out.count(ops.quantized_linear) == 1
    run_and_compare({"main": laid_out}, (1, 5), tmp_path)


@pytest.mark.parametrize("name", ["cpu:generic", "cpu:x86-64-v3"])
def test_machines_that_cannot_expand_store_dense(name: str) -> None:
    assert sparse_limits(Target.describe(name)) == {}
    assert sparse_gain("float32", 0.5, Target.describe(name)) is None


def test_what_is_gained_follows_from_the_machine() -> None:
    """Floats gain where memory is slow; codes of 4 bits are read faster dense on usual machines, and stored so on all."""
    machine = Target.describe("cpu:sapphire-rapids")
    slow, fast = (attrs.evolve(machine, memory_bandwidth=rate * machine.cores) for rate in (5e9, 1e12))
    for form in ("float32", "bfloat16", "int8"):
        gains = [sparse_gain(form, kept, slow) or 0.0 for kept in (0.8, 0.5, 0.25)]
        assert 1.0 < gains[0] < gains[1] < gains[2] < 4.0, (form, gains)
    assert (sparse_gain("float32", 0.5, fast) or 2.0) < 1.0 and "float32" not in sparse_limits(fast)
    assert all((sparse_gain("int4", kept, m) or 2.0) < 1.0 for kept in (0.5, 0.1) for m in (machine, fast))
    assert "float32" in sparse_limits(slow) and not any("int4" in sparse_limits(m) for m in (slow, machine, fast))


# --- Programs ------------------------------------------------------------------------------------------------------------


def larger_half(w: np.ndarray) -> np.ndarray:
    """What magnitude pruning keeps."""
    size = np.abs(w.astype(np.float32))
    return np.asarray(size > np.median(size))


@attrs.frozen
class Prune:
    """Keep the larger half of each matrix that a layer multiplies by."""

    name: str = "prune"
    exact: bool = False

    def __call__(self, graph: Graph) -> Graph:
        held = dict(graph.weights)
        found: dict[Node, Node] = {}
        for node in graph.nodes:
            for w in node.operands[1 : 3 if node.op is ops.gated_linear else 2]:
                if node.op in (ops.linear, ops.gated_linear) and w is not None and w.op is WEIGHT and w not in found:
                    array = graph.weights[w.name].numpy()
                    values, mask = masks.compress(array, larger_half(array))
                    found[w] = ops.expand(stored(held, f"{w.name}.values", values), stored(held, f"{w.name}.mask", mask), k=w.shape[1])  # fmt: skip
        new = graph.map(lambda old, rebuilt: found.get(old, rebuilt))
        return attrs.evolve(new, weights=held).replace()


def zeroed(model: hf.PreTrainedModel) -> hf.PreTrainedModel:
    """The model with what `Prune` leaves out set to 0."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, torch.nn.Linear):
                keep = larger_half(module.weight.float().numpy())
                module.weight *= torch.from_numpy(keep).to(module.weight.dtype)
    return model


def ids(length: int) -> np.ndarray:
    return np.random.default_rng(length).integers(0, VOCABULARY, (2, length))


@pytest.mark.parametrize("name", ["llama", "llama_tied"])
def test_masks_survive_every_pass(name: str) -> None:
    """Also where matrices are sparse before canonicalization and fusion."""
    decoder = trace_decoder(make(name))
    graph = Prune()(decoder.graph)
    sparse = graph.count(ops.expand)
    fused, _ = Pipeline(default_passes()).run(graph)
    assert fused.count(ops.expand) == sparse == 15 and fused.count(ops.gated_linear) == 2
    given = [ids(9), np.broadcast_to(np.arange(9), (2, 9))]
    want = interpret(graph, given)
    np.testing.assert_allclose(interpret(fused, given)[0], want[0], atol=1e-4)
    laid_out, _ = Pipeline(layout_passes(*packing(CPU), ALWAYS)).run(fused)
    assert laid_out.count(ops.sparse_linear) == 13 and not laid_out.count(ops.expand, ops.packed_linear)
    lookup, other = (ops.sparse_take, ops.take) if name == "llama_tied" else (ops.take, ops.sparse_take)
    assert laid_out.count(lookup) == 1 and not laid_out.count(other)
    np.testing.assert_allclose(interpret(laid_out, given)[0], want[0], atol=1e-4)
    assert [m["stored"] for m in sparse_matrices(laid_out)] == ["sparse"] * 15


@pytest.mark.parametrize("name", ["llama_tied", "gpt2"])
def test_a_pruned_program_equals_the_dense_one_with_zeros(name: str, tmp_path: Path) -> None:
    """Whole and in steps, also after saving and loading."""
    program = jisu.compile(make(name), passes=(Prune(),))
    want = jisu.compile(zeroed(make(name)))(ids(20)).logits
    np.testing.assert_allclose(program(ids(20)).logits, want, atol=2e-4)
    told = program.explain()["sparse"]
    assert told and all(m["kept"] == pytest.approx(0.5, abs=0.01) for m in told)
    assert {m["stored"] for m in told} <= {"sparse" if "float32" in sparse_limits(CPU) else "dense with zeros"}
    program.save(tmp_path / "p.jisu")
    session = jisu.load(tmp_path / "p.jisu").session()
    parts = [session.append(ids(20)[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 20))]
    np.testing.assert_allclose(np.concatenate(parts, 1), want, atol=2e-4)


@needs_expand
def test_half_of_the_numbers_take_nine_sixteenths(tmp_path: Path) -> None:
    """Of the layers' weights in bfloat16, in memory and in the artifact."""
    config = DECODERS["llama_tied"]()
    config.update({"hidden_size": 256, "intermediate_size": 512})
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).to(torch.bfloat16).eval()
    dense, sparse = jisu.compile(model), jisu.compile(model, passes=(Prune(),))
    assert sparse.weights_bytes / dense.weights_bytes == pytest.approx(9 / 16, abs=0.02)
    for name, program in (("dense", dense), ("sparse", sparse)):
        program.save(tmp_path / f"{name}.jisu")
    sizes = [(tmp_path / f"{name}.jisu").stat().st_size for name in ("dense", "sparse")]
    assert sizes[0] - sizes[1] > 0.3 * dense.weights_bytes  # the kernels' code is longer


def test_bytes_of_a_sparse_layer_are_counted_as_stored() -> None:
    held: dict[str, Storage] = {}
    x = placeholder("x", TensorType((1, 512), "bfloat16"))
    keep = np.random.default_rng(0).random((256, 512)) < 0.5
    graph = Graph((x,), (ops.linear(x, matrix("w", keep, "bfloat16", held)),), held)
    sizes = []
    for limits in (ALWAYS, {}):
        laid_out, _ = Pipeline(layout_passes(32, {"bfloat16": 2}, limits)).run(graph)
        sizes.append(weight_bytes(laid_out))
    assert sizes[0] / sizes[1] == pytest.approx(9 / 16, abs=0.01)
