"""Products of integers: records of levels, and linear layers whose codes are multiplied by them, against the interpreter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
from conftest import DEMO
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from test_quantization import coded

import jisu
from jisu.compiler import axes, levels, ops
from jisu.compiler.entry import stored
from jisu.compiler.graph import ArrayStorage, Graph, Node, Storage, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import Pipeline, relative_error
from jisu.compiler.schemes import SCHEMES
from jisu.compiler.text import parse
from jisu.compiler.types import TensorType, TypeRuleError, numpy_dtype, symbol
from jisu.compiler.verify import verify
from jisu.passes import layout_passes
from jisu.runtime.executable import Executable
from jisu.targets.compile import compile_graphs
from jisu.targets.cpu import packing
from jisu.targets.target import Target

INTEGERS = [name for name, kind in SCHEMES.items() if kind.uniform]
FLOATS = hnp.arrays(np.float32, (3, 70), elements=st.floats(-1e6, 1e6, width=32))


@given(FLOATS, st.sampled_from([0, 1, 7, 35, 70]), st.booleans(), st.sampled_from(["int8", "int4", "fp8"]))
def test_a_record_means_what_fake_quantize_rounds_to(x: np.ndarray, group: int, own: bool, scheme: str) -> None:
    records = levels.encode(x, SCHEMES[scheme], group, own)
    assert records.shape == (3, levels.record_bytes(70, group, own)) and records.shape[-1] % 128 == 64
    node = ops.fake_quantize(placeholder("x", TensorType(x.shape, "float32")), scheme=scheme, group=group if own else 0)
    (want,) = interpret(Graph(tuple(node.parents), (node,)), [x])
    np.testing.assert_array_equal(levels.decode(records, 70, group, own, SCHEMES[scheme]), want)
    size, at = group or 70, levels.sum_offset(70, group, own)
    for i in range(70 // size):
        total = np.ascontiguousarray(records[:, at + 4 * i : at + 4 * i + 4]).view(np.int32)[:, 0]
        part = records[:, i * size : (i + 1) * size].view(np.int8)
        np.testing.assert_array_equal(total, part.sum(1, dtype=np.int32) if scheme != "fp8" else 0)


def test_records_cost_what_their_numbers_do() -> None:
    """Work per number, not per number and byte."""
    x = placeholder("x", TensorType((3, 64), "float32"))
    records = ops.encode_rows(x, scheme="int8")
    levelled = ops.encode_levels(x, scheme="int8", group=16, own=False)
    assert axes.flops(records) == axes.flops(levelled) == 8 * 3 * 64
    assert axes.flops(ops.decode_rows(records, scheme="int8")) == 2 * 3 * 64


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_no_number_stays_none(bad: float) -> None:
    x = np.ones((2, 5), np.float32)
    x[1, 3] = bad
    back = levels.decode(levels.encode(x, SCHEMES["int8"], 0, False), 5, 0, False, SCHEMES["int8"])
    assert np.isfinite(back[0]).all() and np.isnan(back[1]).all()


@pytest.mark.parametrize("scheme", ["nf4", "mxfp4", "nvfp4"])
def test_other_schemes_have_no_levels_of_a_byte(scheme: str) -> None:
    with pytest.raises(TypeRuleError, match="no levels of 8 bits"):
        ops.encode_levels(placeholder("x", TensorType((2, 32), "float32")), scheme=scheme, group=0, own=False)


def graphs(
    target: Target, dtype: str, k: int, activations: str, x_scales: str, names: tuple[str, ...]
) -> dict[str, Graph]:
    """Layers of integer schemes, symmetric and not, that read rounded values: with their epilogue, gated, gated of unlike halves, and
    two of one form at once.

    x_scales: "token", "group" or "static".
    """
    panel, pair = packing(target)
    made: dict[str, Graph] = {}
    for name in names:
        for symmetric in (True, False):
            held: dict[str, Storage] = {}
            kind, shape = SCHEMES[name], (50, k)
            group = 24 if kind.group or x_scales == "group" else 0
            x: Node = placeholder("x", TensorType((symbol("m"), k), dtype))
            scale = None
            if x_scales == "static":
                scale = weight("scale", TensorType((), "float32"))
                held["scale"] = ArrayStorage(np.array(0.02, np.float32))
            read = ops.fake_quantize(x, scale, scheme=activations, group=group if x_scales == "group" else 0)
            w, v = (coded(n, kind, shape, group, symmetric, dtype, held) for n in "wv")
            u = coded("u", SCHEMES["int8"], shape, group, not symmetric, dtype, held)
            bias = weight("b", TensorType((50,), dtype))
            held["b"] = ArrayStorage(np.linspace(-1, 1, 50).astype(numpy_dtype(dtype)))
            outputs = (
                ops.linear(read, w, bias, ops.linear(read, u, bias), activation="relu"),
                ops.linear(read, w),
                ops.linear(read, v),
                ops.gated_linear(read, w, v, activation="silu"),
                ops.gated_linear(read, w, u, activation="silu"),
            )
            graph = verify(Graph((x,), outputs, held))
            laid_out, _ = Pipeline(layout_passes(panel, pair)).run(graph)
            assert laid_out.count(ops.levels_linear) == 5 and laid_out.count(ops.levels_projections) == 1
            assert laid_out.count(ops.encode_levels) == 1
            assert not laid_out.count(ops.fake_quantize, ops.quantized_linear)
            made[f"{name}_{'even' if symmetric else 'odd'}"] = laid_out
    return made


def test_layout_of_integers(golden: Any) -> None:
    """Rounding becomes records; queries, keys and values one op; a tied embedding is looked up in the head's panels."""
    held: dict[str, Storage] = {}
    x, ids = placeholder("x", TensorType((symbol("m"), 16), "float32")), placeholder("ids", TensorType((2,), "int64"))
    q, k = (coded(name, SCHEMES["int4"], (n, 16), 8, False, "float32", held) for name, n in (("q", 8), ("k", 4)))
    head = coded("head", SCHEMES["int8"], (6, 16), 0, True, "float32", held)
    groups, token = ops.fake_quantize(x, scheme="int8", group=8), ops.fake_quantize(x, scheme="int8")
    outputs = (
        ops.linear(groups, q),
        ops.linear(groups, k),
        ops.linear(token, head),
        ops.take(head, ids, axis=0, wrap=False),
    )
    graph = verify(Graph((x, ids), outputs, held))
    golden("integers-before", graph)
    golden("integers-laid-out", verify(Pipeline(layout_passes(4, {"float32": 1})).run(graph)[0]))


def run_all(made: dict[str, Graph], target: Target, folder: Path, dtype: str, k: int) -> None:
    info = compile_graphs(made, target, out=folder)
    run = Executable.load(info.library, info.entries, num_threads=2)
    for name, graph in made.items():
        weights = {n: s.numpy() for n, s in stored(graph).items()}
        whole: list[np.ndarray] = []
        for m in (30, 1, 2, 3, 7):
            x = np.random.default_rng(0).standard_normal((30, k)).astype(numpy_dtype(dtype))[:m]
            got = [np.asarray(v) for v in run.call(name, [x], weights)]
            for one, want in zip(got, interpret(graph, [x]), strict=True):
                error = relative_error(one.astype(np.float64), want.astype(np.float64))
                assert error < {"float32": 2e-6, "bfloat16": 1e-2, "float16": 1e-3}[dtype], (name, m, error)
            whole = whole or got
            for one, all_ in zip(got, whole, strict=True):  # a row's result doesn't depend on those beside it
                np.testing.assert_array_equal(one, all_[:m], err_msg=f"{name} {m}")


@pytest.mark.parametrize(
    ("dtype", "k", "activations", "x_scales", "where", "names"),
    [
        ("float32", 144, "int8", "token", "cpu", ("int4", "int8")),
        ("bfloat16", 144, "int8", "static", "cpu", ("int4",)),
        ("float32", 144, "int8", "group", "cpu", ("int4",)),
        pytest.param("float32", 1008, "int4", "group", "cpu", tuple(INTEGERS), marks=pytest.mark.slow),
        pytest.param("float16", 144, "int8", "token", "cpu", ("int4", "int8"), marks=pytest.mark.slow),
        pytest.param("float32", 144, "int8", "group", "cpu:x86-64-v3", ("int4", "int8"), marks=pytest.mark.slow),
        pytest.param("float32", 144, "int8", "token", "cpu:generic", ("int4", "int8"), marks=pytest.mark.slow),
    ],
)
def test_kernels_multiply_integers_as_the_interpreter_does(
    dtype: str, k: int, activations: str, x_scales: str, where: str, names: tuple[str, ...], tmp_path: Path
) -> None:
    run_all(
        graphs(Target.resolve(where), dtype, k, activations, x_scales, names), Target.resolve(where), tmp_path, dtype, k
    )


def test_kernels_round_rows_of_any_size(tmp_path: Path) -> None:
    """Zeros, numbers at both ends of float32's range, and what is no number: row by row as the interpreter."""
    k, target = 72, Target.resolve("cpu")
    panel, pair = packing(target)
    held: dict[str, Storage] = {}
    x: Node = placeholder("x", TensorType((symbol("m"), k), "float32"))
    w = coded("w", SCHEMES["int4"], (40, k), 24, True, "float32", held)
    outputs = [ops.linear(ops.fake_quantize(x, scheme="int8", group=group), w) for group in (0, 24)]
    graph, _ = Pipeline(layout_passes(panel, pair)).run(verify(Graph((x,), tuple(outputs), held)))
    assert graph.count(ops.encode_levels) == graph.count(ops.levels_linear) == 2
    sizes = np.array([0, 1e-44, 1e-38, 1e-30, 1e-19, 1, 1e19, 1e30, 1e36], np.float32)
    rows = np.random.default_rng(0).uniform(-1, 1, (len(sizes) + 2, k)).astype(np.float32)
    rows[: len(sizes)] *= sizes[:, None]
    rows[-2, 30], rows[-1, 30] = np.nan, np.inf
    info = compile_graphs({"main": graph}, target, out=tmp_path)
    weights = {n: s.numpy() for n, s in stored(graph).items()}
    got = Executable.load(info.library, info.entries).call("main", [rows], weights)
    for one, want in zip(got, interpret(graph, [rows]), strict=True):
        np.testing.assert_array_equal(np.isnan(one), np.isnan(want))
        assert np.isnan(want[-2:]).all() and np.isfinite(want[:-2]).all() and not want[0].any()
        for i in range(1, len(sizes)):
            # Smaller numbers have fewer digits.
            np.testing.assert_allclose(
                one[i], want[i], rtol=1e-5, atol=1e-5 * np.abs(want[i]).max() + 1e-44, err_msg=str(sizes[i])
            )


@pytest.mark.parametrize("recipe", ["int4", *(pytest.param(r, marks=pytest.mark.slow) for r in ("int8", "w4a16"))])
def test_the_bundled_models_loss_through_kernels_is_the_interpreters(recipe: str, tmp_path: Path) -> None:
    """Text that the model was not trained on, in windows, each token scored; the difference is noise of rounding, not a bias."""
    program = jisu.compile(DEMO, recipe=recipe, cache_dir=tmp_path)
    text = (Path(__file__).parent.parent / "CONTRIBUTING.md").read_text(encoding="utf-8")
    ids = np.array(program.tokenizer.encode(text)[: 4 * 96]).reshape(4, 96)
    session = program.session(capacity=96)
    got = session.append(ids)
    graph = parse(program.ir("append"))
    held = {name: ArrayStorage(array) for name, array in program._parts.weights.items()}
    assert program.decoder is not None
    state = [
        np.zeros([int(d) for d in t.at(program.decoder.sizes(4, 96)).shape], numpy_dtype(t.dtype))
        for _, t, *_ in program.decoder.state
    ]
    want = interpret(attrs.evolve(graph, weights=held), [ids, np.array([0]), np.zeros(4, np.int64), *state])[0]

    def losses(logits: np.ndarray) -> np.ndarray:
        values = logits[:, :-1].astype(np.float64)
        spread = np.log(np.exp(values - values.max(-1, keepdims=True)).sum(-1)) + values.max(-1)
        return spread - np.take_along_axis(values, ids[:, 1:, None], 2)[..., 0]

    difference = losses(got) - losses(want)
    error = difference.std() / np.sqrt(difference.size)
    assert abs(difference.mean()) < max(4 * error, 1e-4) and abs(difference.mean()) < 5e-3
