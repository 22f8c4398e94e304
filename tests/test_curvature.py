"""How errors in outputs count: gradients, their estimate, and what solvers make of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import VOCABULARY, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import jisu
from jisu.compiler import ops
from jisu.compiler.graph import ArrayStorage, Graph, placeholder, weight
from jisu.compiler.pattern import Pattern
from jisu.compiler.pipeline import Pipeline
from jisu.compiler.recipe import PruneRecipe, QuantizeRecipe
from jisu.compiler.types import TensorType
from jisu.frontends.gradients import output_gradients
from jisu.frontends.huggingface import trace_decoder
from jisu.passes import default_passes
from jisu.passes.compression import Compress, curvature
from jisu.passes.compression.activations import QuantizeActivations
from jisu.passes.compression.cached import QuantizeCache
from jisu.passes.compression.calibrate import Run, calls_of
from jisu.passes.compression.curvature import curvatures, in_turn
from jisu.passes.compression.layers import MATRICES, find_layers
from jisu.passes.compression.matrix import Choice, Cut, Statistics, solve
from jisu.passes.compression.prune import admm, solve_on
from jisu.passes.compression.sensitivity import Yardstick

CODES = QuantizeRecipe(scheme="int3", group=16, symmetric=False)
NOT_HEAD = QuantizeRecipe(layers="head", scheme="none")


def ids(windows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (windows, length))


def fused(name: str) -> Graph:
    return Pipeline(default_passes()).run(trace_decoder(make(name)).graph)[0]


def positive(n: int, seed: int, tokens: int = 200) -> np.ndarray:
    """A covariance whose channels go together and differ in size."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((tokens, n)) @ (np.eye(n) + 0.4 * rng.standard_normal((n, n))) * rng.uniform(0.3, 3, n)
    return np.asarray(x.T @ x / tokens)


def cost(e: np.ndarray, h: np.ndarray, c: np.ndarray) -> float:
    return float(np.einsum("nk,nk->", c @ (e @ h), e))


# --- Gradients -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "modules"),
    [
        ("llama", ("self_attn.q_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")),
        ("gpt2", ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")),
    ],
)
def test_gradients_are_those_at_the_modules_products(name: str, modules: tuple[str, ...]) -> None:
    """Through fused layers, before bias and activation, as hooks on the model see them."""
    graph, model, tokens = fused(name), make(name), ids(2, 12)
    layers = {n: MATRICES[n.op] for n in graph.nodes if n.op in MATRICES}
    found = output_gradients(graph, calls_of(graph, tokens), layers, language=False, seed=3)
    gradients: dict[str, torch.Tensor] = {}

    def watch(label: str) -> Any:
        def hook(module: nn.Module, inputs: Any, out: torch.Tensor) -> None:
            out.register_hook(lambda g: gradients.update({label: g}))

        return hook

    for label, module in model.named_modules():
        if label.endswith(modules):
            module.register_forward_hook(watch(label))
    logits = model(torch.from_numpy(tokens)).logits
    signs = torch.randint(0, 2, logits.shape, generator=torch.Generator().manual_seed(3)) * 2 - 1
    (logits * signs).sum().backward()
    assert len(gradients) == 2 * len(modules)
    names = {node: layer.names[0] for node, layer in find_layers(graph).items()}
    compared = 0
    for (layer, position), (square, fourth, count) in found.items():
        matrix = layer.operands[position]
        assert matrix is not None
        label = names[matrix]
        if label not in gradients:
            continue
        g = gradients[label].flatten(0, -2).numpy().astype(np.float64)
        np.testing.assert_allclose(square, g.T @ g, atol=1e-4 * np.abs(g.T @ g).max())
        assert fourth == pytest.approx((np.square(g).sum(1) ** 2).sum(), rel=1e-3)
        assert count == tokens.size
        compared += 1
    assert compared == len(gradients)


def test_a_language_models_gradients_give_the_fisher_information() -> None:
    """Of logits it is diag(p) - p pᵀ."""
    rng = np.random.default_rng(0)
    w, x = rng.standard_normal((6, 4)).astype(np.float32), rng.standard_normal((1, 1, 4)).astype(np.float32)
    node = placeholder("x", TensorType((1, 4000, 4), "float32"))
    model = Graph((node,), (ops.linear(node, weight("w", TensorType((6, 4), "float32"))),), {"w": ArrayStorage(w)})
    (layer,) = model.outputs
    found = output_gradients(model, [(np.repeat(x, 4000, 1),)], {layer: (1,)}, language=True)
    square, _, count = found[layer, 1]
    p = np.exp(x[0, 0] @ w.T) / np.exp(x[0, 0] @ w.T).sum()
    np.testing.assert_allclose(square / count, np.diag(p) - np.outer(p, p), atol=0.03)


# --- The estimate --------------------------------------------------------------------------------------------------


def test_few_tokens_say_little() -> None:
    """The estimate is symmetric and positive, and is shrunk towards alike outputs the more, the fewer tokens there are."""
    truth = positive(24, 0)
    distances = []
    for tokens in (8, 64, 4096):
        g = np.random.default_rng(1).multivariate_normal(np.zeros(24), truth, tokens)
        made = curvature._shrunk([((g.T @ g).astype(np.float32), float((np.square(g).sum(1) ** 2).sum()), tokens)])
        assert made is not None
        assert np.linalg.eigvalsh(made.astype(np.float64)).min() > 0.01
        np.testing.assert_array_equal(made, made.T)
        assert np.trace(made) / 24 == pytest.approx(1, rel=1e-5)
        distances.append(float(np.abs(made - np.eye(24)).max()))
    assert distances[0] < distances[1] < distances[2]
    want = truth / np.trace(truth) * 24
    assert made is not None
    np.testing.assert_allclose(made.astype(float) * 1.05 - 0.05 * np.eye(24), want, atol=0.1 * want.max())


def test_no_gradient_no_estimate() -> None:
    zeros = np.zeros((4, 4), np.float32)
    assert curvature._shrunk([]) is None
    assert curvature._shrunk([(zeros, 0.0, 5)]) is None
    assert curvature._shrunk([(zeros + np.nan, np.nan, 5)]) is None


def test_large_layers_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, tokens = fused("llama"), ids(4, 12)
    layers = find_layers(graph)
    assert len(curvatures(graph, layers, tokens, output_gradients)) == len(layers)
    monkeypatch.setattr(curvature, "MOST_OUTPUTS", 48)
    assert all(n.shape[0] <= 48 for n in curvatures(graph, layers, tokens, output_gradients))
    # Of wide layers what half of the weights' bytes leaves room for, and always the same ones.
    monkeypatch.setattr(curvature, "MOST_OUTPUTS", 1 << 20)
    monkeypatch.setattr(curvature, "LEAST_BYTES", 0)
    wide = Pipeline(default_passes()).run(trace_decoder(make("llama", vocab_size=2000)).graph)[0]
    found = curvatures(wide, find_layers(wide), tokens, output_gradients)
    assert len(found) == len(find_layers(wide)) - 1 and max(int(n.shape[0]) for n in found) == 48
    some = {node: layer for node, layer in find_layers(wide).items() if int(node.shape[0]) != 32}
    assert curvatures(wide, some, tokens, output_gradients).keys() == found.keys() & some.keys()


def test_a_rounded_cache_and_rounded_inputs_let_gradients_pass() -> None:
    graph, tokens = fused("llama"), ids(4, 12)
    rules = (QuantizeRecipe(activations="int8"),)
    coded = QuantizeActivations(rules)(QuantizeCache("int4", "hadamard")(graph))
    assert coded.count(ops.fake_quantize) and coded.count(ops.decode_rows)
    found = curvatures(coded, find_layers(coded), tokens, output_gradients)
    assert len(found) == len(find_layers(coded))


# --- Solvers -------------------------------------------------------------------------------------------------------


@given(seed=st.integers(0, 2**31), n=st.integers(1, 24), groups=st.integers(1, 24))
@settings(max_examples=25)
def test_rows_still_to_come_make_up_for_those_before(seed: int, n: int, groups: int) -> None:
    """If the first group errs and all others come where they should, that is the least cost for that error."""
    rng = np.random.default_rng(seed)
    c, h, aim = positive(n, seed % 1000) + 0.01 * np.eye(n), np.eye(5), rng.standard_normal((n, 5))
    found, first = np.empty_like(aim), list[np.ndarray]()

    def solve_rows(rows: np.ndarray, aims: np.ndarray) -> np.ndarray:
        if not first:
            np.testing.assert_array_equal(aims, aim[rows])
            first.append(rows)
            aims = aims + 1
        found[rows] = aims
        return aims

    in_turn(aim, c, solve_rows, groups=groups)
    rest = np.setdiff1d(np.arange(n), first[0])
    best = aim.copy()
    best[first[0]] += 1
    if len(rest):
        pull = c[np.ix_(rest, first[0])] @ np.ones((len(first[0]), 5))
        best[rest] -= np.linalg.solve(c[np.ix_(rest, rest)], pull)
    np.testing.assert_allclose(found, best, atol=1e-6)
    assert cost(found - aim, h, c) == pytest.approx(cost(best - aim, h, c))


@given(seed=st.integers(0, 2**31))
@settings(max_examples=15)
def test_what_stays_under_a_mask_costs_least(seed: int) -> None:
    rng = np.random.default_rng(seed)
    w, mask = rng.standard_normal((12, 16)), rng.uniform(size=(12, 16)) < 0.5
    h, c = positive(16, seed % 1000) + 0.05 * np.eye(16), positive(12, seed % 999) + 0.05 * np.eye(12)
    alike = solve_on(w, h, mask)
    np.testing.assert_allclose(solve_on(w, h, mask, np.eye(12)), alike, atol=1e-3)
    found = solve_on(w, h, mask, c)
    assert not found[~mask].any()
    slope = c @ ((found - w) @ h)
    assert np.abs(slope[mask]).max() <= 1e-3 * np.abs(c @ (w @ h)).max()
    assert cost(found - w, h, c) <= cost(alike - w, h, c) * (1 + 1e-9)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4", "4x1"])
def test_masks_that_know_how_errors_count_cost_less(pattern: str) -> None:
    shape = Pattern.parse(pattern)
    for seed in range(3):
        w = np.random.default_rng(seed).standard_normal((24, 32))
        h, c = positive(32, seed) + 0.01 * np.eye(32), positive(24, seed + 9) + 0.05 * np.eye(24)
        blind, knowing = admm(w, h, shape, 0.5), admm(w, h, shape, 0.5, c)
        assert np.count_nonzero(blind) == np.count_nonzero(knowing) == w.size // 2
        costs = [
            cost(solve_on(w, h, blind) - w, h, c),
            cost(solve_on(w, h, blind, c) - w, h, c),
            cost(solve_on(w, h, knowing, c) - w, h, c),
        ]
        assert costs[1] < 0.9 * costs[0] and costs[2] < costs[1], costs


@pytest.mark.parametrize("cut", [None, Cut(0.5), Cut(0.5, Pattern(keep=2, of=4))], ids=str)
def test_codes_that_know_how_errors_count_cost_less(cut: Cut | None) -> None:
    for seed in range(3):
        w = np.random.default_rng(seed).standard_normal((24, 32)).astype(np.float32)
        h, c = positive(32, seed) + 0.01 * np.eye(32), positive(24, seed + 9) + 0.05 * np.eye(24)
        costs = []
        for objective in ("output", "loss"):
            choice = Choice(cut, CODES, objective=objective)
            found = solve(w, choice, Statistics(h * 1000, 1000), "float32", curvature=c.astype(np.float32))
            assert (found.mask is None) == (cut is None)
            if found.mask is not None:
                assert not found.values[~found.mask].any() and found.mask.mean() == 0.5
            costs.append(cost(found.values - w, h, c))
        assert costs[1] < 0.95 * costs[0], costs


# --- The pass ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "prune", "codes"),
    [("llama", (PruneRecipe(sparsity=0.3),), ()), ("gpt2", (), (CODES, NOT_HEAD)), ("qwen3", (PruneRecipe(sparsity=0.5),), (CODES, NOT_HEAD))],
)  # fmt: skip
def test_the_model_loses_less(name: str, prune: Any, codes: Any) -> None:
    graph, tokens, probe = fused(name), ids(128, 24), ids(32, 24, 1)
    yardstick = Yardstick(graph, probe, windows=32)
    losses = []
    for differentiate in (None, output_gradients):
        made = Compress(prune, codes, tokens, differentiate=differentiate)(graph)
        losses.append(yardstick.of(Run(made, calls_of(made, probe)), None, {}))
    assert losses[1] < 0.93 * losses[0], losses


def test_objective_output_asks_for_no_gradients() -> None:
    graph, tokens = fused("llama"), ids(4, 12)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError

    rules = (PruneRecipe(sparsity=0.5, objective="output"),), (QuantizeRecipe(objective="output"),)
    plain = Compress(*rules, tokens)(graph)
    found = Compress(*rules, tokens, differentiate=refuse)(graph)
    assert {k: v.numpy().tobytes() for k, v in plain.weights.items()} == {
        k: v.numpy().tobytes() for k, v in found.weights.items()
    }
    wanda = (PruneRecipe(sparsity=0.5, algorithm="wanda"),)
    Compress(wanda, (), tokens, differentiate=refuse)(graph)


def test_an_interrupted_run_goes_on_with_what_it_found(tmp_path: Path) -> None:
    graph, tokens = fused("llama"), ids(8, 12)
    rules = ((PruneRecipe(sparsity=0.5),), (CODES, NOT_HEAD))
    want = Compress(*rules, tokens, differentiate=output_gradients)(graph)
    calls = 0

    def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return output_gradients(*args, **options)

    def interrupt(done: float) -> None:
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Compress(*rules, tokens, interrupt, tmp_path, differentiate=counted)(graph)
    found = Compress(*rules, tokens, folder=tmp_path, differentiate=counted)(graph)
    assert calls == 1 and not any(tmp_path.iterdir())
    assert {k: v.numpy().tobytes() for k, v in want.weights.items()} == {
        k: v.numpy().tobytes() for k, v in found.weights.items()
    }


def test_a_module_that_is_no_language_model() -> None:
    """Squared errors of its outputs are what counts."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 48), nn.GELU(), nn.Linear(48, 48), nn.ReLU(), nn.Linear(48, 6)).eval()
    mix = torch.eye(32) + 0.4 * torch.randn(32, 32)
    calls = [(torch.randn(16, 32) @ mix,) for _ in range(64)]
    probe = torch.randn(256, 32) @ mix
    want = model(probe).detach().numpy()
    errors = []
    for objective in ("output", "loss"):
        recipe = {"prune": {"sparsity": 0.6, "objective": objective}}
        program = jisu.compile(
            model, example_inputs=(torch.randn(16, 32),), dynamic_shapes=({0: torch.export.Dim("rows")},), recipe=recipe,
            calibration=calls,
        )  # fmt: skip
        errors.append(float(np.square(np.asarray(program(probe)) - want).sum()))
    assert errors[1] < 0.95 * errors[0], errors


def test_the_recipe_names_what_there_is() -> None:
    with pytest.raises(jisu.RecipeError, match="objective.*loss"):
        jisu.Recipe.resolve({"quantize": {"scheme": "int4", "objective": "los"}})
    recipe = jisu.Recipe.resolve({"prune": {"sparsity": 0.5, "objective": "output"}})
    assert recipe.prune[0].objective == "output" and recipe.quantize == ()
    assert 'objective = "output"' in recipe.to_toml()
