"""Weights in few bits: schemes, the algorithms that choose codes, the pass, the kernels, and the whole way through a program."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import attrs
import ml_dtypes
import numpy as np
import pytest
import torch
from decoders import VOCABULARY, make
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import jisu
from jisu.compiler import ops, parallel, schemes
from jisu.compiler.entry import stored
from jisu.compiler.graph import ArrayStorage, Graph, Node, Storage, placeholder, weight
from jisu.compiler.interpret import evaluate_node, interpret
from jisu.compiler.pipeline import Pipeline, relative_error
from jisu.compiler.recipe import QuantizeRecipe, Recipe
from jisu.compiler.schemes import SCHEMES, Scheme, decode_scales, encode_scales
from jisu.compiler.types import TensorType, numpy_dtype, symbol
from jisu.compiler.verify import verify
from jisu.passes import layout_passes
from jisu.passes.compression.gptq import Grid, choose_grid, damped, feedback, gptq, refine
from jisu.runtime.executable import Executable
from jisu.targets.compile import compile_graphs
from jisu.targets.cpu import packing
from jisu.targets.target import Target

CPU = Target.resolve("cpu")
every_scheme = pytest.mark.parametrize("kind", SCHEMES.values(), ids=lambda s: s.name)
sizes = st.tuples(st.integers(1, 4), st.integers(1, 40))
numbers = st.floats(-100, 100, width=32, allow_subnormal=False)


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """Small matrices, of moderate, tiny or huge numbers, some of them all zero or constant."""
    w = draw(hnp.arrays(np.float32, draw(sizes), elements=numbers))
    return np.asarray(w * np.float32(draw(st.sampled_from([1.0, 1.0, 1e-12, 1e12, 0.0]))), np.float32)


# --- Schemes -------------------------------------------------------------------------------------------------------------


@every_scheme
@settings(max_examples=60, deadline=None)
@given(w=matrices(), group=st.sampled_from([0, 4, 16]), symmetric=st.booleans())
def test_numbers_come_back_within_a_step(kind: Scheme, w: np.ndarray, group: int, symmetric: bool) -> None:
    """Within half the distance between neighbouring levels, plus what a scale loses in storage; and again exactly."""
    grid = choose_grid(w, kind, group, symmetric=symmetric)
    codes = grid.nearest(w)
    back = grid.values(codes)
    assert codes.dtype == np.uint8 and codes.max() < 2**kind.bits and np.isfinite(back).all()
    scales, _ = grid.at(w.shape[1])
    ranked = np.sort(kind.levels)
    widest = float(np.diff(ranked).max())
    loss = {"float16": 2.0**-10, "e8m0": 1 / 3, "e4m3": 1.0}[
        kind.scale
    ]  # e8m0 clips 7 to 6; small e4m3 scales have few bits
    reach = np.repeat(np.abs(w).max(1, keepdims=True), w.shape[1], 1)
    room = widest / 2 if symmetric or not kind.uniform else widest  # a zero is rounded, too
    assert (np.abs(back - w) <= scales * room * 1.01 + loss * reach + 1e-30).all()
    assert np.array_equal(grid.values(grid.nearest(back)), back)
    short = kind.on_grid(w.astype(np.float64), *grid.at(w.shape[1]))
    assert np.array_equal(grid.nearest(short.astype(np.float32)), grid.nearest(back))
    np.testing.assert_allclose(np.abs(short - w), np.abs(back - w), atol=float(scales.max()) * 1e-5)


@every_scheme
@given(data=st.data())
def test_packing_loses_nothing(kind: Scheme, data: st.DataObject) -> None:
    n, k = data.draw(sizes)
    codes = data.draw(hnp.arrays(np.uint8, (n, k), elements=st.integers(0, 2**kind.bits - 1)))
    packed = kind.pack(codes)
    assert packed.shape == (n, kind.row_bytes(k)) and packed.dtype == np.uint8
    for ordered in (packed, np.asfortranarray(packed)):
        np.testing.assert_array_equal(kind.unpack(ordered, k), codes)
    np.testing.assert_array_equal(kind.pack(np.asfortranarray(codes)), packed)


@every_scheme
@given(data=st.data(), panel=st.integers(1, 5), word=st.sampled_from([1, 4]), near=st.sampled_from([1, 40, 1 << 17]))
def test_codes_lie_in_panels_as_kernels_read_them(
    kind: Scheme, data: st.DataObject, panel: int, word: int, near: int
) -> None:
    n, k = data.draw(sizes)
    codes = data.draw(hnp.arrays(np.uint8, (n, k), elements=st.integers(0, 2**kind.bits - 1)))
    with mock.patch.object(parallel, "NEAR", near):
        packed = evaluate_node(
            ops.pack_codes(
                placeholder("codes", TensorType((n, kind.row_bytes(k)), "uint8")),
                scheme=kind.name, k=k, panel=panel, word=word,
            ),
            [kind.pack(codes)],
            {},
        )  # fmt: skip
    own = np.zeros((-(-n // panel), kind.panel_words(k, word), panel, word), np.uint8)
    for row in range(n):
        for i in range(k):
            at, inside = divmod(i, kind.per_byte * word)
            half, place = divmod(inside, word)
            own[row // panel, at, row % panel, place] |= codes[row, i] << (4 * half)
    np.testing.assert_array_equal(packed, own)


@every_scheme
@given(w=matrices(), group=st.sampled_from([0, 4, 16]), narrow=st.booleans())
def test_parts_of_a_matrix_are_rounded_as_the_whole(kind: Scheme, w: np.ndarray, group: int, narrow: bool) -> None:
    given_ = w.astype(ml_dtypes.bfloat16) if narrow else w
    whole = choose_grid(given_.astype(np.float32), kind, group)
    with mock.patch.object(parallel, "NEAR", 40):
        grid = choose_grid(given_, kind, group)
        codes = grid.nearest(given_)
    np.testing.assert_array_equal(grid.scales, whole.scales)
    np.testing.assert_array_equal(codes, whole.nearest(given_.astype(np.float32)))


@pytest.mark.parametrize("kind", schemes.SCALES)
@given(scales=hnp.arrays(np.float32, (3, 4), elements=st.floats(2**-12, 2**12, width=32)))
def test_stored_scales_stay_what_they_are(kind: str, scales: np.ndarray) -> None:
    stored, whole = encode_scales(scales, kind)
    once = decode_scales(stored, kind, whole)
    again, whole = encode_scales(once, kind)
    np.testing.assert_array_equal(decode_scales(again, kind, whole), once)
    assert (once > 0).all()


def test_formats_mean_what_their_standards_say() -> None:
    assert sorted(SCHEMES["mxfp4"].levels)[-8:] == [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    assert SCHEMES["fp8"].levels.max() == 448 and SCHEMES["fp8"].levels[0x38] == 1.0
    scale, _ = SCHEMES["mxfp4"].grid(np.ones((3, 1), np.float32), np.array([[5.0], [7.0], [8.0]], np.float32))
    np.testing.assert_array_equal(scale[:, 0], [1.0, 1.0, 2.0])  # the power of two below the largest number, over 4


# --- Algorithms ----------------------------------------------------------------------------------------------------------


def problem(seed: int, n: int = 24, k: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """A matrix, and H of inputs that go together, as those of real layers do."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((500, 12)) @ rng.standard_normal((12, k)) + 0.3 * rng.standard_normal((500, k))
    return rng.standard_normal((n, k)).astype(np.float32), x.T @ x


def cost(w: np.ndarray, h: np.ndarray, grid: Grid, codes: np.ndarray) -> float:
    e = (w - grid.values(codes)).astype(np.float64)
    return float(((e @ h) * e).sum())


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("name", ["int4", "int3", "mxfp4", "nf4"])
def test_each_algorithm_is_better_than_the_one_before(name: str, symmetric: bool) -> None:
    kind = SCHEMES[name]
    for seed in range(3):
        w, h = problem(seed)
        grid = choose_grid(w, kind, 16, symmetric=symmetric)
        nearest, found = grid.nearest(w), gptq(w, *feedback(h, 0.01), grid)
        solid = damped(h, 0.01)
        better = refine(w, solid, grid, found, sweeps=4)
        costs = [cost(w, solid, grid, nearest), cost(w, solid, grid, found), cost(w, solid, *better)]
        assert costs[1] < 0.8 * costs[0] and costs[2] < costs[1], costs


def test_independent_inputs_are_rounded_to_the_nearest() -> None:
    w, _ = problem(0)
    grid = choose_grid(w, SCHEMES["int4"], 16)
    np.testing.assert_array_equal(gptq(w, *feedback(np.diag(np.arange(1.0, 49)), 0.01), grid), grid.nearest(w))


def test_dead_inputs_do_no_harm() -> None:
    w, h = problem(1)
    h[5], h[:, 5] = 0, 0
    grid = choose_grid(w, SCHEMES["int4"], 0, importance=np.diag(h), steps=8)
    codes = gptq(w, *feedback(h, 0.01), grid)
    assert np.isfinite(cost(w, h, *refine(w, damped(h, 0.01), grid, codes, sweeps=2)))


# --- Kernels -------------------------------------------------------------------------------------------------------------


def coded(
    name: str, kind: Scheme, shape: tuple[int, int], group: int, symmetric: bool, dtype: str, held: dict[str, Storage]
) -> Node:
    """A matrix of random codes as a node; its parts go into `held`."""
    w = np.random.default_rng(len(held)).standard_normal(shape).astype(np.float32)
    grid = choose_grid(w, kind, group, symmetric=symmetric)
    stored, whole = encode_scales(grid.scales, kind.scale)
    parts = {"codes": kind.pack(grid.nearest(w)), "scales": stored}
    if grid.zeros is not None:
        parts["zeros"] = grid.zeros.astype(np.uint8)
    nodes = []
    for what, array in parts.items():
        held[f"{name}.{what}"] = ArrayStorage(array)
        nodes.append(weight(f"{name}.{what}", TensorType(array.shape, str(array.dtype))))
    return ops.dequantize(*nodes, scheme=kind.name, k=shape[1], group=group, whole=whole, dtype=dtype)


@pytest.mark.parametrize(
    "dtype",
    ["float32", pytest.param("bfloat16", marks=pytest.mark.slow), pytest.param("float64", marks=pytest.mark.slow)],
)
def test_kernels_read_codes_as_the_interpreter_does(dtype: str, tmp_path: Path) -> None:
    """Every scheme, symmetric and not: linear with its epilogue, gated, gated of unlike halves, looked up, and as a plain value."""
    panel, pair = packing(CPU)
    entries: dict[str, Graph] = {}
    for kind in SCHEMES.values():
        for symmetric in (True, False):
            held: dict[str, Storage] = {}
            shape, group = (50, 136), 16 if kind.group else 0
            x = placeholder("x", TensorType((symbol("m"), 136), dtype))
            ids = placeholder("ids", TensorType((3,), "int64"))
            w, v = (coded(name, kind, shape, group, symmetric, dtype, held) for name in "wv")
            unlike = coded("u", SCHEMES["int8"], shape, 0, True, dtype, held)
            bias = weight("b", TensorType((50,), dtype))
            held["b"] = ArrayStorage(np.linspace(-1, 1, 50).astype(numpy_dtype(dtype)))
            outputs = (
                ops.linear(x, w),
                ops.linear(x, w, bias, ops.linear(x, v), activation="relu"),
                ops.gated_linear(x, w, v, activation="silu"),
                ops.gated_linear(x, w, unlike, activation="silu"),
                ops.take(w, ids, axis=0, wrap=False),
                ops.add(w, 1.0),
            )
            graph = verify(Graph((x, ids), outputs, held))
            laid_out, _ = Pipeline(layout_passes(panel, pair)).run(graph)
            assert laid_out.count(ops.quantized_linear) and not laid_out.count(ops.linear, ops.packed_linear)
            entries[f"{kind.name}_{'even' if symmetric else 'odd'}"] = laid_out
    info = compile_graphs(entries, CPU, out=tmp_path)
    run = Executable.load(info.library, info.entries, num_threads=2)
    for name, graph in entries.items():
        weights = {n: s.numpy() for n, s in stored(graph).items()}
        for m in (1, 2, 7, 30):
            x_value = np.random.default_rng(m).standard_normal((m, 136)).astype(numpy_dtype(dtype))
            given = [x_value, np.array([0, 49, 7])]
            for got, want in zip(run.call(name, given, weights), interpret(graph, given, float64=True), strict=True):
                tolerance = {"float32": 2e-5, "bfloat16": 2e-2, "float64": 1e-6}[dtype]
                assert relative_error(np.asarray(got).astype(np.float64), want) < tolerance, (name, m)


# --- The pass ------------------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """Two layers, one matrix of them used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.relu(self.second(torch.relu(self.first(x))))
        return self.second(h)  # type: ignore[no-any-return]


def small(**options: Any) -> jisu.Program:
    torch.manual_seed(0)
    return jisu.compile(Small().eval(), example_inputs=(torch.ones(2, 16),), **options)


def test_plain_modules_are_quantized_too() -> None:
    torch.manual_seed(0)
    model, x = Small().eval(), torch.randn(2, 16)
    program = small(recipe="w8a16")
    torch.testing.assert_close(program(x), model(x), atol=2e-2, rtol=2e-2)
    assert not torch.equal(program(x), model(x))
    assert program.ir().count("quantized_linear(") == 3 and program.ir().count("pack_codes(second") == 1
    assert not any(p["exact"] for p in program.explain()["passes"] if p["name"] == "quantize")


def test_usual_groups_shrink_to_what_divides_a_layer() -> None:
    """Of 16 inputs the usual groups of 128 become groups of 16; groups that were asked for stay an error."""
    program = small(recipe="w4a16")
    assert "group=16" in program.ir() and "group=128" not in program.ir()
    with pytest.raises(jisu.RecipeError, match="groups of 128 don't divide the 16 inputs of first"):
        small(recipe={"quantize": {"scheme": "int4", "group": 128}})


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"quantize": {"scheme": "int4", "group": 24}}, r"groups of 24 don't divide the 16 inputs of first"),
        ({"quantize": {"layers": "*.frist", "scheme": "int4"}}, r"no layer matches '\*.frist'; near: first"),
        ({"quantize": {"bits": 3.5}}, r"bits must be one of 2, 3, 4, 5, 6, 8, not 3.5"),
        ({"quantize": {"bits": 0}}, "bits must be one of"),
        ({"quantize": {"bits": 64}}, "bits must be one of"),
        ({"quantize": "int7"}, "unknown scheme 'int7'"),
        ({"quantize": {"scheme": "nf4", "symmetric": False}}, "nf4 has no zeros"),
        ({"quantize": [{"shceme": "int4"}]}, "did you mean 'scheme'"),
        ({"quantize": {"algorithm": "gtpq"}}, "did you mean 'gptq'"),
        ({"quantize": {"scheme": "int4", "group": 8, "algorithm": "gptq"}}, "gptq needs calibration data for first"),
    ],
    ids=str,
)
def test_recipes_that_do_not_fit(recipe: dict[str, Any], words: str) -> None:
    with pytest.raises(jisu.RecipeError, match=words):
        small(recipe=recipe)


def test_numbers_without_a_code_are_named() -> None:
    model = Small().eval()
    with torch.no_grad():
        model.second.weight[3, 4] = float("nan")
    with pytest.raises(jisu.InputError, match="second.*1 NaN"):
        jisu.compile(model, example_inputs=(torch.ones(2, 16),), recipe="int8")


def test_later_entries_win_and_none_leaves_alone() -> None:
    rules = {"quantize": [{"scheme": "int8"}, {"layers": "first", "scheme": "none"}]}
    text = small(recipe=rules).ir()
    assert "packed_linear(" in text and text.count("quantized_linear(") == 2


def test_a_recipe_comes_back_from_its_text() -> None:
    recipe = Recipe(
        quantize=(QuantizeRecipe(scheme="int4", group=32), QuantizeRecipe(layers='a"b', scheme="none", match=0.25))
    )
    assert Recipe.from_toml(recipe.to_toml()) == recipe


# --- Language models -----------------------------------------------------------------------------------------------------


def ids(windows: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (windows, length))


def test_calibration_lowers_the_error_and_is_reproducible() -> None:
    model = make("llama_tied")
    tokens, probe = ids(16, 24, 0), ids(4, 24, 1)
    rules = {"quantize": [{"scheme": "int4", "group": 16}, {"layers": "head", "scheme": "none"}]}
    dense = jisu.compile(model)(probe).logits
    nearest, found, again = (jisu.compile(model, recipe=rules, calibration=c) for c in (None, tokens, tokens))
    errors = [float(np.square(p(probe).logits - dense).mean()) for p in (nearest, found)]
    assert errors[1] < 0.8 * errors[0], errors
    for name, array in found._parts.weights.items():
        assert array.tobytes() == again._parts.weights[name].tobytes(), name
    assert found.weights_bytes < 0.6 * jisu.compile(model).weights_bytes


@pytest.mark.parametrize(
    "name", ["llama_tied", pytest.param("gpt2", marks=pytest.mark.slow), pytest.param("phi3", marks=pytest.mark.slow)]
)
def test_steps_of_a_quantized_model_equal_the_whole(name: str, tmp_path: Path) -> None:
    """Also with a tied embedding in codes, and after saving and loading."""
    program = jisu.compile(make(name), recipe="w8a16")
    whole = program(ids(2, 20, 2)).logits
    program.save(tmp_path / "p.jisu")
    session = jisu.load(tmp_path / "p.jisu").session()
    parts = [session.append(ids(2, 20, 2)[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 20))]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-4)


@pytest.mark.parametrize(
    ("calibration", "words"),
    [
        (ids(2, 8, 0).astype(np.float32), "expected a text file or token ids"),
        (ids(2, 8, 0) + VOCABULARY, "not in the vocabulary of 99"),
        ("some.txt", "no tokenizer"),
        (ids(2, 161, 0), "windows of 161 tokens exceed the model's 160 positions"),
    ],
    ids=["dtype", "range", "text", "length"],
)
def test_calibration_that_does_not_fit(calibration: Any, words: str) -> None:
    with pytest.raises(jisu.InputError, match=words):
        jisu.compile(make("llama_tied"), recipe="int4", calibration=calibration)
    with pytest.raises(jisu.InputError, match="compresses nothing"):
        jisu.compile(make("llama_tied"), calibration=ids(2, 8, 0))
    with pytest.raises(jisu.InputError, match="only rounds to the nearest"):
        jisu.compile(make("llama_tied"), recipe={"quantize": {"algorithm": "rtn"}}, calibration=ids(2, 8, 0))


def test_planted_faults_are_caught() -> None:
    """The checks above bite: a grid with swapped scales, and codes with halves exchanged, are far outside of what they allow."""
    w, h = problem(3)
    grid = choose_grid(w, SCHEMES["int4"], 16)
    codes = grid.nearest(w)
    wrong: list[Callable[[], np.ndarray]] = [
        lambda: attrs.evolve(grid, scales=grid.scales[:, ::-1] * 1.5).values(codes),
        lambda: grid.values((codes >> 2) | ((codes & 3) << 2)),
    ]
    for fault in wrong:
        assert np.abs(fault() - w).max() > 2 * grid.scales.max()


@pytest.mark.slow
def test_command_line(tmp_path: Path) -> None:
    from importlib.resources import files

    from test_cli import jisu as command
    from test_cli import result

    model = str(files("jisu") / "demo")
    text = tmp_path / "text.txt"
    text.write_text((Path(__file__).parent.parent / "CONTRIBUTING.md").read_text())
    (tmp_path / "r.toml").write_text(
        '[[quantize]]\nscheme = "int4"\ngroup = 32\nsymmetric = false\n\n[calibration]\nwindows = 8\nlength = 32\n'
    )
    out = tmp_path / "q.jisu"
    cache: list[str | Path] = ["--cache-dir", tmp_path / "cache"]
    made = result(
        command("compile", model, "-o", out, "--recipe", tmp_path / "r.toml", "--calibration", text, *cache, "--json")
    )
    dense = result(command("eval", model, "--text", text, "--window", "64", "--limit", "8", *cache, "--json"))
    found = result(
        command("eval", out, "--text", text, "--window", "64", "--limit", "8", "--reference", model, "--json")
    )
    assert made["weights_bytes"] < dense["weights_bytes"]
    assert dense["tokens"] == found["tokens"] == 8 * 63 and dense["stderr"] > 0
    assert abs(found["bits_per_byte"] - dense["bits_per_byte"]) < 0.1 and 0 < found["kl_per_token"] < 0.2
    text.write_bytes(b"caf\xe9" * 400)
    wrong: list[list[str | Path]] = [
        ["eval", out, "--text", text],
        ["compile", model, "-o", out, "--recipe", "int4", "--calibration", text, *cache],
    ]
    for arguments in wrong:
        refused = command(*arguments)
        assert refused.returncode == 1 and "not UTF-8" in refused.stderr
