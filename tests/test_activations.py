"""Activations in few bits: what rounding means, its kernels, where it is placed, what calibration sees of it, and programs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import VOCABULARY, make
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from torch import nn

import jisu
from jisu.compiler import ops
from jisu.compiler.graph import Graph, placeholder
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import Pipeline
from jisu.compiler.recipe import QuantizeRecipe, Recipe
from jisu.compiler.schemes import SCHEMES
from jisu.compiler.types import TensorType, numpy_dtype, symbol
from jisu.frontends.huggingface import trace_decoder
from jisu.passes import default_passes
from jisu.passes.compression import Compress
from jisu.passes.compression.activations import QuantizeActivations
from jisu.runtime.executable import Executable
from jisu.targets.compile import compile_graphs
from jisu.targets.target import Target

KINDS = {"int8": 0, "int4": 0, "fp8": 0, "mxfp4": 32, "nvfp4": 16}
every_kind = pytest.mark.parametrize("kind", KINDS)


def rounded(x: np.ndarray, kind: str, scale: float | None = None) -> np.ndarray:
    """x float32 [m, 64] by the interpreter."""
    node = ops.fake_quantize(
        placeholder("x", TensorType(x.shape, "float32")),
        None if scale is None else placeholder("s", TensorType((), "float32")),
        scheme=kind,
        group=KINDS[kind],
    )
    given = [x] if scale is None else [x, np.array(scale, np.float32)]
    return interpret(Graph(tuple(node.parents), (node,)), given)[0]


def expected(x: np.ndarray, kind: str) -> np.ndarray:
    """The same by PyTorch's own rounding, token by token."""
    v = torch.from_numpy(x)
    if kind in ("int8", "int4"):
        top = 127 if kind == "int8" else 7
        rows = [
            torch.fake_quantize_per_tensor_affine(row, float(row.abs().max() / top) or 1.0, 0, -top - 1, top)
            for row in v
        ]
        return torch.stack(rows).numpy()
    if kind == "fp8":
        scale = v.abs().amax(-1, keepdim=True) / 448
        scale[scale == 0] = 1
        return ((v / scale).to(torch.float8_e4m3fn).float() * scale).numpy()
    parts = v.reshape(len(v), -1, KINDS[kind])
    largest = parts.abs().amax(-1, keepdim=True)
    if kind == "mxfp4":
        scale = torch.where(largest > 0, torch.exp2(torch.floor(torch.log2(largest)) - 2), 1.0)
    else:
        step = v.abs().amax(-1)[:, None, None] / (6 * 448)
        step[step == 0] = 1
        scale = (largest / 6 / step).to(torch.float8_e4m3fn).float().clamp_min(2.0**-9) * step
    levels = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    levels = torch.cat([-levels, levels])
    nearest = ((parts / scale)[..., None] - levels).abs().argmin(-1)
    return (levels[nearest] * scale).reshape(v.shape).numpy()


@every_kind
def test_rounding_is_what_torch_does(kind: str) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((40, 64)) * 10.0 ** rng.integers(-3, 4, (40, 1))).astype(np.float32)
    x[0] = 0
    x[1, 5] *= 100
    got, want = rounded(x, kind), expected(x, kind)
    # PyTorch multiplies by the inverse of the scale: a number between two levels may go to the other one.
    assert (got != want).mean() < 2e-3
    step = np.abs(x).max(-1, keepdims=True) / SCHEMES[kind].top
    assert (np.abs(got - want) <= step * (1.01 if kind.startswith("int") else 64)).all()


@every_kind
@settings(max_examples=60, deadline=None)
@given(
    x=hnp.arrays(np.float32, (3, 64), elements=st.floats(-100, 100, width=32, allow_subnormal=False)),
    exponent=st.integers(-30, 30),
)
def test_error_is_bounded_and_tokens_stand_alone(kind: str, x: np.ndarray, exponent: int) -> None:
    x = np.ldexp(x, exponent)
    got = rounded(x, kind)
    largest = np.abs(x).max(-1, keepdims=True)
    widest = float(np.diff(np.sort(SCHEMES[kind].levels)).max())
    loss = {"float16": 0.0, "e8m0": 1 / 4, "e4m3": 1 / 16}[
        SCHEMES[kind].scale
    ]  # 8 clips to 6; the scale's own rounding
    bound = largest * (widest / 2 / SCHEMES[kind].top * 4 / 3 + loss)
    assert (np.abs(got - x) <= bound + 1e-30).all()
    for i in range(len(x)):
        np.testing.assert_array_equal(rounded(x[i : i + 1], kind)[0], got[i])


def test_a_given_scale_clips() -> None:
    x = np.linspace(-2, 2, 64, dtype=np.float32)[None]
    np.testing.assert_allclose(rounded(x, "int8", 1 / 127), np.clip(np.rint(x * 127), -128, 127) / 127, rtol=1e-6)
    assert np.abs(rounded(x, "fp8", 1 / 448)).max() == 1.0
    assert np.abs(rounded(x, "nvfp4", 1 / (6 * 448))).max() == pytest.approx(1.0)


def test_kernels_round_as_the_interpreter_does(tmp_path: Path) -> None:
    """To the bit, in every dtype; also zeros, NaN, infinities, subnormal numbers and halves."""
    entries: dict[str, Graph] = {}
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        x, s = placeholder("x", TensorType((symbol("m"), 64), dtype)), placeholder("s", TensorType((), "float32"))
        outputs = [ops.fake_quantize(x, scheme=kind, group=group) for kind, group in [*KINDS.items(), ("int3", 16)]]
        outputs += [ops.fake_quantize(x, s, scheme=kind, group=KINDS[kind]) for kind in ("int8", "fp8", "nvfp4")]
        entries[dtype] = Graph((x, s), tuple(outputs))
    info = compile_graphs(entries, Target.resolve("cpu"), out=tmp_path)
    run = Executable.load(info.library, info.entries, num_threads=2)
    rng = np.random.default_rng(0)
    for dtype, graph in entries.items():
        for m in (1, 6, 600):
            values = rng.standard_normal((m, 64)) * 10.0 ** rng.integers(-3, 3, (m, 1))
            if m == 6:
                values[0], values[1, 3], values[2, 4], values[3] = 0, np.nan, np.inf, 1e-40
                values[4] = np.rint(values[4] * 8) / 2
            arrays = [values.astype(np.float32).astype(numpy_dtype(dtype)), np.array(0.03, np.float32)]
            for got, want in zip(run.call(dtype, arrays), interpret(graph, arrays), strict=True):
                np.testing.assert_array_equal(np.asarray(got).astype(np.float64), want.astype(np.float64))


# --- The pass ------------------------------------------------------------------------------------------------------------


class Gated(nn.Module):
    """Two layers of one input, a product, and a layer behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(64, 64), nn.Linear(64, 64), nn.Linear(64, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(torch.relu(self.a(x)) * self.b(x))  # type: ignore[no-any-return]


def gated(**options: Any) -> jisu.Program:
    torch.manual_seed(0)
    return jisu.compile(Gated().eval(), example_inputs=(torch.ones(4, 64),), **options)


@every_kind
def test_a_program_computes_on_rounded_values(kind: str) -> None:
    """Against the same in PyTorch: rounded inputs, weights as they come back from int8."""
    program = gated(recipe={"quantize": {"scheme": "int8", "activations": kind}})
    torch.manual_seed(0)
    model = Gated().eval()
    x = torch.randn(4, 64)

    def layer(linear: nn.Linear, v: torch.Tensor) -> torch.Tensor:
        w = linear.weight.detach()
        scale = (w.abs().amax(1, keepdim=True) / 127).half().float()
        return torch.from_numpy(rounded(v.numpy(), kind)) @ (torch.round(w / scale) * scale).T + linear.bias.detach()

    want = layer(model.c, torch.relu(layer(model.a, x)) * layer(model.b, x))
    torch.testing.assert_close(program(x), want, atol=1e-4, rtol=1e-4)
    made = "encode_levels(" if SCHEMES[kind].uniform else "fake_quantize("
    assert program.ir().count(made) == 2  # one for both layers of x


def decoder(name: str, rules: tuple[QuantizeRecipe, ...], tokens: np.ndarray | None = None) -> Graph:
    """A small model's graph with activations rounded."""
    steps = (*default_passes(), QuantizeActivations(rules, tokens))
    return Pipeline(steps).run(trace_decoder(make(name)).graph)[0]


def ids(windows: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (windows, length))


@pytest.mark.parametrize(("name", "inputs"), [("llama", 4), ("gpt2", 4), ("phi3", 4), ("gemma2", 4)])
def test_layers_of_one_input_share_its_rounding(name: str, inputs: int) -> None:
    """Per layer of the model: what queries, keys and values read, what is projected back, and twice for the MLP."""
    graph = decoder(name, (QuantizeRecipe(activations="int8"), QuantizeRecipe(layers="lm_head")))
    assert graph.count(ops.fake_quantize) == 2 * inputs
    for node in graph.nodes:
        if node.op is ops.fake_quantize:
            assert all(u.op in (ops.linear, ops.gated_linear) and u.operands[0] is node for u in graph.users[node])


def test_static_scales_span_what_calibration_gave() -> None:
    tokens = ids(3, 12, 0)
    rules = (QuantizeRecipe(activations="int8", activation_range="static"), QuantizeRecipe(layers="*.down_proj"))
    graph = decoder("llama", rules, tokens)
    before, _ = Pipeline(default_passes()).run(trace_decoder(make("llama")).graph)
    positions = np.broadcast_to(np.arange(12), tokens.shape)
    values = interpret(before, [tokens, positions.astype(np.int64)], keep=True)
    assert isinstance(values, dict)
    first = next(n for n in before.nodes if n.op is ops.rms_norm)
    scale = graph.weights["model.layers.0.self_attn.q_proj.input_scale"].numpy()
    assert scale.shape == () and float(scale) == pytest.approx(np.abs(values[first]).max() / 127, rel=1e-5)
    assert sum(name.endswith("input_scale") for name in graph.weights) == 7  # three per layer, and the head's


def test_calibrated_weights_make_up_for_rounded_inputs() -> None:
    """Codes found for rounded inputs bring a layer's outputs nearer to the unchanged ones than codes found for exact inputs do."""
    tokens = ids(24, 24, 0)
    rules = (QuantizeRecipe(scheme="int4", group=16, activations="int4"), QuantizeRecipe(layers="head", scheme="none"))
    round_inputs, quantize = QuantizeActivations(rules), Compress((), rules, tokens)
    before, _ = Pipeline(default_passes()).run(trace_decoder(make("llama")).graph)
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(24), tokens.shape))

    def first(graph: Graph) -> tuple[Any, Any]:
        """What the first layer reads, and its matrix."""
        values = interpret(graph, [tokens, positions], keep=True)
        layer = next(n for n in graph.nodes if n.op is ops.linear)
        return values[layer.parents[0]], values[layer.parents[1]]

    u, w = first(before)
    errors = []
    for graph in (quantize(round_inputs(before)), _rounding_last(quantize(before), rules)):
        x, q = first(graph)
        errors.append(float(np.square(u @ w.T - x @ q.T).sum()))
    assert errors[0] < errors[1], errors


def _rounding_last(graph: Graph, rules: tuple[QuantizeRecipe, ...]) -> Graph:
    """Round the inputs of layers whose weights are codes already."""

    def transform(old: Any, new: Any) -> Any:
        if new.op not in (ops.linear, ops.gated_linear) or new.operands[1].op is not ops.dequantize:
            return new
        x = ops.fake_quantize(new.operands[0], scheme=rules[0].activations)
        return new.with_operands((x, *new.operands[1:]))

    return graph.map(transform)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"activations": "int7"}, "unknown activations 'int7'; did you mean 'int"),
        ({"activations": "nf4"}, "unknown activations 'nf4'"),
        ({"activation": "int8"}, "did you mean 'activations'"),
        ({"activations": "int8", "activation_range": "statics"}, "did you mean 'static'"),
        ({"activation_range": "static"}, "activation_range needs activations"),
        ({"activations": "mxfp4", "activation_range": "static"}, "mxfp4 takes its scales from the values"),
        ({"scheme": "none", "activations": "int8"}, "activations is for layers whose weights are quantized"),
        ({"activations": "int8", "activation_range": "static"}, "static ranges need calibration text for a"),
    ],
    ids=str,
)
def test_recipes_that_do_not_fit(recipe: dict[str, Any], words: str) -> None:
    with pytest.raises(jisu.RecipeError, match=words):
        gated(recipe={"quantize": recipe})


def test_rules_that_do_not_fit_the_model() -> None:
    rules = [{"activations": "int8"}, {"layers": "*.up_proj", "activations": "int4"}]
    with pytest.raises(jisu.RecipeError, match="gate_proj and .*up_proj read one value"):
        jisu.compile(make("llama"), recipe={"quantize": rules})
    with pytest.raises(
        jisu.RecipeError, match="a scale per 32 channels, which don't divide the 48 inputs of .*down_proj"
    ):
        jisu.compile(make("llama"), recipe={"quantize": {"scheme": "int8", "activations": "mxfp4"}})


def test_a_recipe_comes_back_from_its_text() -> None:
    recipe = Recipe(
        quantize=(QuantizeRecipe(activations="fp8", activation_range="static"), QuantizeRecipe(smooth=0.85))
    )
    assert Recipe.from_toml(recipe.to_toml()) == recipe


# --- Language models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("llama_tied", {"activations": "int8"}),
        pytest.param("gpt2", {"activations": "nvfp4"}, marks=pytest.mark.slow),
        pytest.param("phi3", {"activations": "fp8", "activation_range": "static"}, marks=pytest.mark.slow),
    ],
)
def test_steps_with_rounded_activations_equal_the_whole(name: str, entry: dict[str, Any], tmp_path: Path) -> None:
    """Also after saving and loading. Sums in another order may send a number to the level beside it: most logits are the same."""
    tokens = ids(4, 16, 0) if "activation_range" in entry else None
    program = jisu.compile(make(name), recipe={"quantize": entry}, calibration=tokens)
    assert program.explain()["cache"] == "derived" and (
        "fake_quantize" in program.ir() or "encode_levels" in program.ir()
    )
    exact = jisu.compile(make(name), recipe="w8a16")
    whole, reference = (np.asarray(p(ids(2, 20, 2)).logits) for p in (program, exact))
    program.save(tmp_path / "p.jisu")
    session = jisu.load(tmp_path / "p.jisu").session()
    parts = [session.append(ids(2, 20, 2)[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 20))]
    off = np.abs(np.concatenate(parts, 1) - whole).max(-1)
    assert np.median(off) < 1e-4 and off.max() < 0.5 * np.abs(whole - reference).max()
