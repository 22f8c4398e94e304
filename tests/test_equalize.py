"""Equalisation and rotation: foldings that keep the function, on many architectures, and what they are good for."""

from __future__ import annotations

from typing import Any

import attrs
import numpy as np
import pytest
from decoders import DECODERS, VOCABULARY, make

import jisu
from jisu.compiler import ops
from jisu.compiler.graph import Graph
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import Pass, Pipeline, relative_error
from jisu.compiler.recipe import QuantizeRecipe, Recipe
from jisu.compiler.schemes import SCHEMES
from jisu.compiler.verify import verify
from jisu.frontends.gradients import output_gradients
from jisu.frontends.huggingface import trace_decoder
from jisu.passes import default_passes
from jisu.passes.compression import Compress
from jisu.passes.compression.activations import QuantizeActivations
from jisu.passes.compression.awq import clipped_grid, search_factors
from jisu.passes.compression.equalize import Equalize, apply, find_sites, smooth_factors
from jisu.passes.compression.gptq import choose_grid
from jisu.passes.compression.layers import find_layers
from jisu.passes.compression.rotate import Rotate, find_heads, find_stream, hadamard, rotation

HEAD = QuantizeRecipe(layers="lm_head", scheme="none")


def decoder(name: str) -> Graph:
    return Pipeline(default_passes()).run(trace_decoder(make(name)).graph)[0]


def ids(windows: int, length: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (windows, length))


def logits(graph: Graph, tokens: np.ndarray) -> np.ndarray:
    return interpret(graph, _inputs(graph, tokens))[0]


def planted(graph: Graph) -> Graph:
    """The same function with outlier channels: some channels behind every norm are 30 times as large."""
    rng = np.random.default_rng(0)
    factors = []
    for site in find_sites(graph, set(find_layers(graph)))[0]:
        if site.behind_norm:
            size = np.ones(len(site.classes))
            size[rng.choice(len(size), 3, replace=False)] = 1 / 30
            factors.append((site, size))
    return apply(graph, factors)


# --- Folding factors -----------------------------------------------------------------------------------------------------

SITES = {
    "llama": 9, "llama_tied": 8, "qwen2": 9, "qwen3": 9, "gemma2": 8, "gemma3": 8, "phi3": 9, "gpt2": 6, "opt": 8, "gpt_neox": 5,
    "olmo2": 5, "cohere2": 6, "mixtral": 5, "deepseek_v3": 10,
}  # fmt: skip
"""Values whose channels can be divided, in two layers and in front of the head."""
_FAST = ("llama_tied", "gpt2", "gemma2", "phi3", "qwen3")


@pytest.mark.parametrize("name", [n if n in _FAST else pytest.param(n, marks=pytest.mark.slow) for n in SITES])
def test_factors_are_folded_without_a_change(name: str) -> None:
    graph = decoder(name)
    sites, refused = find_sites(graph, set(find_layers(graph)))
    assert len(sites) == SITES[name] and all(refused.values()), refused
    rng = np.random.default_rng(0)
    factors = [(s, np.exp(rng.standard_normal(len(s.classes)))[s.classes]) for s in sites]
    changed = verify(apply(graph, factors))
    tokens = ids(2, 12, 1)
    assert relative_error(logits(changed, tokens), logits(graph, tokens)) < 1e-5
    one_wrong = [(s, f * (1 + (np.arange(len(f)) == 3) * (i == 0))) for i, (s, f) in enumerate(factors)]
    broken = apply(
        graph, [(attrs.evolve(s, folds=s.folds[1:]) if i == 0 else s, f) for i, (s, f) in enumerate(one_wrong)]
    )
    assert relative_error(logits(broken, tokens), logits(graph, tokens)) > 1e-3


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("llama_tied", "its weight is used elsewhere, too"),
        ("gpt2", "linear with gelu_tanh makes it"),
        ("olmo2", "add reads it, too"),
        ("mixtral", "reshape reads it, too"),
    ],
)
def test_what_cannot_be_divided_says_why(name: str, words: str) -> None:
    graph = decoder(name)
    _, refused = find_sites(graph, set(find_layers(graph)))
    assert any(words in reason for reason in refused.values()), refused


def test_values_of_grouped_heads_share_factors() -> None:
    graph = decoder("llama")  # 4 heads of 8 channels, 2 groups of values
    site = next(s for s in find_sites(graph, set(find_layers(graph)))[0] if s.value.op is ops.reshape)
    heads = site.classes.reshape(2, 2, 8)
    assert (heads[:, 0] == heads[:, 1]).all() and len(np.unique(heads)) == 16


# --- Choosing factors ----------------------------------------------------------------------------------------------------


def test_smooth_factors_are_those_of_the_paper() -> None:
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal((n, 6)).astype(np.float32) for n in (4, 5))
    x = rng.standard_normal((30, 6)) * [1, 1, 50, 1, 1, 0.1]
    found = smooth_factors([a, b], np.abs(x).max(0), 0.5)
    want = [np.sqrt(abs(x[:, j]).max() / max(abs(a[:, j]).max(), abs(b[:, j]).max())) for j in range(6)]
    np.testing.assert_allclose(found, want, rtol=1e-6)
    # Half of the spread is in either: |x| / s and |w| s have the same largest number.
    np.testing.assert_allclose(
        abs(x / found).max(0), np.maximum(abs(a * found).max(0), abs(b * found).max(0)), rtol=1e-5
    )


def test_search_lowers_the_error_of_the_outputs() -> None:
    rng = np.random.default_rng(1)
    w = rng.standard_normal((24, 32)).astype(np.float32)
    x = rng.standard_normal((400, 32)) * np.where(np.arange(32) % 11 == 0, 30, 1)
    rule = QuantizeRecipe(scheme="int3", group=16)
    classes = np.arange(32) // 2
    factors = search_factors([(w, rule)], np.abs(x).mean(0), x.T @ x, classes)
    np.testing.assert_array_equal(factors[::2], factors[1::2])

    def error(s: np.ndarray) -> float:
        scaled = (w * s).astype(np.float32)
        grid = choose_grid(scaled, SCHEMES["int3"], 16)
        return float(np.square(x @ (grid.values(grid.nearest(scaled)) / s - w).T).sum())

    assert error(factors) < 0.5 * error(np.ones(32))
    assert factors.max() * factors.min() == pytest.approx(1)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [0, 16, 24])
def test_clipping_lowers_the_error_of_each_group(group: int, symmetric: bool) -> None:
    rng = np.random.default_rng(2)
    w = rng.standard_normal((10, 64)).astype(np.float32)
    w[:, ::13] *= 3
    x = rng.standard_normal((300, 64)) * np.where(np.arange(64) % 13 == 0, 0.05, 1)
    found = [clipped_grid(w, SCHEMES["int3"], group, x.T @ x, symmetric=symmetric, steps=n) for n in (1, 10)]
    plain = choose_grid(w, SCHEMES["int3"], group, symmetric=symmetric)
    np.testing.assert_array_equal(found[0].scales, plain.scales)
    errors = []
    for grid in found:
        e = grid.values(grid.nearest(w)) - w
        edges = range(0, 64, group or 64)
        errors.append(
            np.array([np.square(x[:, i : i + (group or 64)] @ e[:, i : i + (group or 64)].T).sum(0) for i in edges])
        )
    assert (errors[1] <= errors[0] * 1.02).all() and errors[1].sum() < 0.8 * errors[0].sum()


@pytest.mark.parametrize(
    ("entry", "gain"),
    [
        (
            {"scheme": "int8", "activations": "int8", "activation_range": "static", "smooth": 0.85, "algorithm": "rtn"},
            0.2,
        ),
        (
            {"scheme": "int8", "activations": "int8", "activation_range": "static", "smooth": 0.5, "algorithm": "rtn"},
            0.2,
        ),
        ({"scheme": "int4", "group": 16, "algorithm": "awq"}, 0.7),
    ],
    ids=["smooth 0.85", "smooth 0.5", "awq"],
)
def test_outlier_channels_are_made_up_for(entry: dict[str, Any], gain: float) -> None:
    """The error with outliers planted, relative to that of rounding to the nearest without equalisation."""
    graph = planted(decoder("llama"))
    tokens, probe = ids(16, 24, 0), ids(6, 24, 1)
    want = logits(graph, probe)

    def error(fields: dict[str, Any]) -> float:
        rules = (QuantizeRecipe(**fields), HEAD)
        steps = (Equalize(rules, tokens), QuantizeActivations(rules, tokens), Compress((), rules, tokens))
        return float(np.square(logits(Pipeline(steps).run(graph)[0], probe) - want).mean())

    plain = {**entry, "smooth": 0.0, "algorithm": "rtn"}
    assert error(entry) < gain * error(plain), (error(entry), error(plain))


def test_a_whole_program_is_equalized() -> None:
    """By the recipe, with the numeric check of the exact pass; the program equals the interpreter on what was made."""
    model, tokens, probe = make("llama"), ids(8, 24, 0), ids(2, 16, 1)
    rules = (QuantizeRecipe(activations="int8", activation_range="static", smooth=0.8),)
    program = jisu.compile(model, recipe=Recipe(quantize=rules), calibration=tokens, check="numeric")
    names = [p["name"] for p in program.explain()["passes"]]
    assert names.index("equalize") < names.index("quantize activations") < names.index("compress")
    steps = (
        Equalize(rules, tokens),
        QuantizeActivations(rules, tokens),
        Compress((), rules, tokens, differentiate=output_gradients),
    )
    want = logits(Pipeline(steps).run(decoder("llama"))[0], probe)
    off = np.abs(np.asarray(program(probe).logits) - want).max(-1)  # a few numbers go to the level beside theirs
    assert np.median(off) < 1e-4 and off.max() < 0.2


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ({"smooth": 1.5}, "smooth must be a number from 0 to 1"),
        ({"smoth": 0.5}, "did you mean 'smooth'"),
        ({"algorithm": "awg"}, "did you mean 'awq'"),
        ({"scheme": "none", "smooth": 0.5}, "smooth is for layers whose weights are quantized"),
        ({"smooth": 0.5, "algorithm": "awq"}, "smooth and awq both scale channels"),
        ({"smooth": 0.5}, "smooth needs calibration text for model.layers.0"),
        ({"scheme": "int4", "group": 8, "algorithm": "awq"}, "awq needs calibration text for model.layers.0"),
        ({"layers": "*.down_proj", "smooth": 0.5}, "smooth finds no layer.*no norm makes what they read"),
        ({"layers": "*.q_proj", "smooth": 0.5}, "q_proj and .*k_proj read one value, so smooth can't be"),
    ],
    ids=str,
)
def test_recipes_that_do_not_fit(entry: dict[str, Any], words: str) -> None:
    with pytest.raises(jisu.RecipeError, match=words):
        jisu.compile(make("llama"), recipe={"quantize": [{"scheme": "int8"}, entry]})


def test_every_architecture_above_is_known() -> None:
    assert set(SITES) <= set(DECODERS)


# --- Rotations -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 12, 20, 28, 36, 48, 64, 80, 96, 128, 576, 768, 896])
def test_hadamard_matrices(n: int) -> None:
    found = hadamard(n).astype(int)
    assert (np.abs(found) == 1).all()
    np.testing.assert_array_equal(found @ found.T, n * np.eye(n))
    turn = rotation(n, 3).astype(np.float64)
    np.testing.assert_allclose(turn @ turn.T, np.eye(n), atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "llama_tied", "qwen3", "phi3", "qwen2", "mistral"])
def test_a_rotated_model_gives_the_same_logits(name: str) -> None:
    graph, tokens = decoder(name), ids(2, 16, 0)
    rotated = verify(Rotate()(graph))
    np.testing.assert_allclose(logits(rotated, tokens), logits(graph, tokens), atol=1e-4)
    assert len(find_heads(graph)) == 4  # values and what reads them, in two layers
    stream = find_stream(graph)
    assert len(stream.norms) == 5 and all(
        n.operands[1] is None for n in rotated.nodes if n.op is ops.rms_norm and n.rank == 3
    )
    residual = {n: i for i, n in enumerate(graph.nodes)}
    values, turned = (interpret(g, _inputs(g, tokens), keep=True) for g in (graph, rotated))
    assert isinstance(values, dict) and isinstance(turned, dict)
    first = min(stream.nodes, key=residual.__getitem__)
    other = next(n for n in rotated.nodes if n.op is ops.take)
    np.testing.assert_allclose(turned[other], values[first] @ rotation(32, 0), atol=1e-5)


def _inputs(graph: Graph, tokens: np.ndarray) -> list[np.ndarray]:
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape))
    return [tokens, positions][: len(graph.inputs)]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt2", "layer_norm .*subtracts the mean"),
        ("gemma2", "rms_norm writes to the residual stream: its gain scales channels"),
        ("olmo2", "rms_norm writes to the residual stream"),
        ("cohere2", "layer_norm reads the residual stream"),
        ("mixtral", "reshape .*reads a norm of the residual stream"),
    ],
)
def test_what_cannot_be_rotated_says_why(name: str, words: str) -> None:
    with pytest.raises(jisu.RecipeError, match=f"rotate: {words}"):
        Rotate()(decoder(name))


def test_rotated_outliers_cost_less() -> None:
    """Gains are folded first, so outliers that norms make end in the weights' columns, and those are mixed."""
    graph, probe = planted(decoder("llama")), ids(6, 24, 1)
    rules = (QuantizeRecipe(scheme="int4", group=0, activations="int4"), HEAD)
    steps = (QuantizeActivations(rules), Compress((), rules))

    def error(*before: Pass) -> float:
        found = logits(Pipeline((*before, *steps)).run(graph)[0], probe)
        return float(np.square(found - logits(graph, probe)).mean())

    assert error(Rotate()) < 0.5 * error(), (error(Rotate()), error())


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"rotate": "hadamart", "quantize": "int8"}, "did you mean 'hadamard'"),
        ({"rotate": "hadamard"}, "rotate is for models that are quantized"),
    ],
    ids=str,
)
def test_rotations_that_do_not_fit(recipe: dict[str, Any], words: str) -> None:
    with pytest.raises(jisu.RecipeError, match=words):
        jisu.compile(make("llama"), recipe=recipe)


@pytest.mark.parametrize("name", ["llama_tied", pytest.param("phi3", marks=pytest.mark.slow)])
def test_a_rotated_program_steps_as_the_whole(name: str) -> None:
    program = jisu.compile(make(name), recipe={"rotate": "hadamard", "quantize": "int8"}, check="numeric")
    whole = program(ids(2, 20, 2)).logits
    session = program.session()
    parts = [session.append(ids(2, 20, 2)[:, a:b]) for a, b in ((0, 7), (7, 8), (8, 20))]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, atol=1e-4)
