"""Pruning: patterns, masks, what is left, shares per layer, and pruned programs."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from decoders import VOCABULARY, make
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from typer.testing import CliRunner

import jisu
from jisu.cli import app
from jisu.compiler import masks, ops
from jisu.compiler.errors import InputError, RecipeError
from jisu.compiler.graph import ArrayStorage, Graph, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.pattern import Pattern
from jisu.compiler.recipe import PruneRecipe, QuantizeRecipe, Recipe
from jisu.compiler.schemes import SCHEMES
from jisu.compiler.types import TensorType
from jisu.frontends.gradients import output_gradients
from jisu.frontends.huggingface import trace_decoder
from jisu.passes.compression import Compress, calibrate
from jisu.passes.compression.allocation import allocate, knapsack
from jisu.passes.compression.gptq import choose_grid, damped, feedback, gptq, refine
from jisu.passes.compression.layers import choose_pruned, find_layers
from jisu.passes.compression.matrix import Choice, Cut, Statistics, solve
from jisu.passes.compression.prune import admm, magnitude, solve_on, sparsegpt, wanda

PATTERNS = ("unstructured", "2:4", "4:8", "4x1", "2x4")


def ids(windows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (windows, length))


def correlated(tokens: int, k: int, seed: int = 0) -> np.ndarray:
    """Inputs float64 [tokens, k] whose channels go together and differ in size."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((tokens, k)) @ (np.eye(k) + 0.4 * rng.standard_normal((k, k)))
    return np.asarray(mixed * rng.uniform(0.2, 3, k))


def is_in(mask: np.ndarray, pattern: Pattern, sparsity: float) -> bool:
    """Whether a mask has the pattern, with as many zeros as there can be of it."""
    n, k = mask.shape
    if pattern.of:
        return bool((mask.reshape(n, -1, pattern.of).sum(-1) == pattern.keep).all())
    blocks = mask.reshape(n // pattern.rows, pattern.rows, k // pattern.columns, pattern.columns)
    whole = blocks.all((1, 3))
    gone = np.count_nonzero(~whole)
    return bool((whole == blocks.any((1, 3))).all()) and gone == int(whole.size * sparsity)


# --- Masks -----------------------------------------------------------------------------------------------------------


@given(text=st.sampled_from(PATTERNS), sparsity=st.floats(0, 0.99), seed=st.integers(0, 99))
def test_patterns_keep_the_best_numbers_that_they_allow(text: str, sparsity: float, seed: int) -> None:
    pattern, score = Pattern.parse(text), np.random.default_rng(seed).uniform(0.1, 1, (8, 16))
    mask = pattern.choose(score, sparsity)
    assert is_in(mask, pattern, sparsity)
    if text == "unstructured" and 0 < mask.sum() < mask.size:
        assert score[mask].min() >= score[~mask].max()
    assert (pattern.choose(np.where(mask, score, 0), sparsity) == mask).all()
    rows = pattern.choose(score, sparsity, by_row=True)
    if not pattern.of:
        assert len({int(r.sum()) for r in rows}) == 1


@pytest.mark.parametrize("text", ["", "4:2", "2:2", "0:4", "1x1", "2:4:8", "half", "2:128"])
def test_patterns_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match="a pattern is"):
        PruneRecipe(pattern=text, sparsity=0.5)


@pytest.mark.parametrize("text", PATTERNS)
def test_each_algorithm_keeps_outputs_better_than_the_one_before(text: str) -> None:
    pattern, x = Pattern.parse(text), correlated(400, 32)
    w = np.random.default_rng(1).standard_normal((16, 32))
    h = damped(x.T @ x, 0.01)

    def cost(q: np.ndarray) -> float:
        return float(np.einsum("nk,nk->", (w - q) @ h, w - q))

    swept, mask = sparsegpt(w, h, pattern, 0.5)
    drawn = admm(w, h, pattern, 0.5)
    for found in (magnitude(w, pattern, 0.5), mask, drawn):
        assert is_in(found, pattern, 0.5)
    assert not swept[~mask].any()
    costs = [
        cost(w * magnitude(w, pattern, 0.5)),
        cost(w * wanda(w, h, pattern, 0.5)),
        cost(swept),
        cost(solve_on(w, h, drawn)),
    ]
    assert costs == sorted(costs, reverse=True), costs
    assert cost(solve_on(w, h, mask)) <= costs[2]


@given(seed=st.integers(0, 99), share=st.floats(0, 1))
@settings(max_examples=30)
def test_what_stays_is_the_least_squares_solution(seed: int, share: float) -> None:
    rng = np.random.default_rng(seed)
    x, w = correlated(60, 12, seed), rng.standard_normal((5, 12))
    h, mask = damped(x.T @ x, 0.01), rng.uniform(size=(5, 12)) < share
    found = solve_on(w, h, mask)
    for row, kept, target in zip(found, mask, w, strict=True):
        want = np.zeros(12)
        want[kept] = np.linalg.solve(h[np.ix_(kept, kept)], (h @ target)[kept])
        np.testing.assert_allclose(row, want, rtol=1e-3, atol=1e-3 * np.abs(w).max())


@pytest.mark.parametrize("kind", SCHEMES.values(), ids=lambda s: str(s.name))
def test_codes_on_a_mask_make_up_for_it(kind: Any) -> None:
    x, w = correlated(300, 32), np.random.default_rng(2).standard_normal((8, 32)).astype(np.float32)
    h, mask = x.T @ x, np.random.default_rng(3).uniform(size=(8, 32)) < 0.5
    solid = damped(h, 0.01)

    def cost(q: np.ndarray) -> float:
        return float(np.einsum("nk,nk->", (w - q) @ solid, w - q))

    start = solve_on(w, solid, mask)
    grid = choose_grid(start.astype(np.float32), kind, 16, importance=np.diag(h), steps=8)
    nearest = grid.values(grid.nearest(start.astype(np.float32)), mask)
    codes = gptq(start, *feedback(h, 0.01), grid, mask)
    swept = grid.values(codes, mask)
    best, codes = refine(w, solid, grid, codes, mask, sweeps=4)
    refined = best.values(codes, mask)
    assert not refined[~mask].any() and not swept[~mask].any()
    assert cost(refined) <= cost(swept)
    assert cost(refined) < cost(nearest) or kind.bits == 8
    assert cost(start) <= cost(refined) * (1 + 1e-9)


@pytest.mark.parametrize("case", ["zero", "constant", "huge", "one input", "dead inputs"])
@pytest.mark.parametrize("algorithm", ["magnitude", "wanda", "sparsegpt", "alps"])
def test_unusual_matrices(case: str, algorithm: str) -> None:
    rng = np.random.default_rng(0)
    x, w = correlated(100, 16), rng.standard_normal((8, 16)).astype(np.float32)
    if case == "zero":
        w[:] = 0
    if case == "constant":
        w[:] = 0.25
    if case == "huge":
        w *= np.float32(1e30)
    if case == "one input":
        x[:, 1:] = 0
    if case == "dead inputs":
        x[:] = 0
    for codes in (None, QuantizeRecipe(scheme="int4", group=8)):
        found = solve(w, Choice(Cut(0.5, Pattern(keep=2, of=4), algorithm), codes), Statistics(x.T @ x, 100), "float32")
        assert found.mask is not None and is_in(found.mask, Pattern(keep=2, of=4), 0.5)
        assert np.isfinite(found.values).all() and not found.values[~found.mask].any()


def test_an_error_in_front_is_made_up_for_as_far_as_it_can_be_seen() -> None:
    """Where the input is a distorted one, the aim undoes the distortion; where it is only noisy, it stays."""
    rng = np.random.default_rng(0)
    u, w = rng.standard_normal((4000, 8)), rng.standard_normal((4, 8))
    for x, undone in ((u * np.linspace(0.5, 2, 8), w / np.linspace(0.5, 2, 8)), (u, w)):
        d = u - x
        seen = Statistics(x.T @ x, 4000, d.T @ x, d.T @ d)
        np.testing.assert_allclose(seen.aim(w, seen.h, 1.0), undone, atol=1e-6)
        np.testing.assert_allclose(seen.aim(w, seen.h, 0.0), w)
    few = rng.standard_normal((20, 8)), rng.standard_normal((20, 8))
    cross = few[1].T @ few[0]
    noisy = Statistics(few[0].T @ few[0], 20, cross, few[1].T @ few[1])
    moved = [
        np.abs(attempt - w).sum() for attempt in (noisy.aim(w, noisy.h, 1.0), w + w @ cross @ np.linalg.inv(noisy.h))
    ]
    assert moved[0] < 0.6 * moved[1]


# --- Shares ----------------------------------------------------------------------------------------------------------


@given(st.data())
@settings(max_examples=50)
def test_the_knapsack_is_the_best_of_all_choices(data: st.DataObject) -> None:
    count, options = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 4))
    numbers = st.lists(st.integers(0, 20), min_size=options, max_size=options)
    losses = [np.array(data.draw(numbers), float) for _ in range(count)]
    sizes = [np.array(data.draw(numbers), float) for _ in range(count)]
    least = sum(s.min() for s in sizes)
    budget = least + data.draw(st.integers(0, 40))
    steps = max(int(budget - least), 1)  # sizes are whole steps
    picked = knapsack(losses, sizes, budget, steps)
    assert sum(s[i] for s, i in zip(sizes, picked, strict=True)) <= budget + 1e-9
    every = itertools.product(range(options), repeat=count)
    best = min(
        sum(v[i] for v, i in zip(losses, way, strict=True))
        for way in every
        if sum(s[i] for s, i in zip(sizes, way, strict=True)) <= budget
    )
    assert sum(v[i] for v, i in zip(losses, picked, strict=True)) == best


def test_a_budget_that_nothing_fits() -> None:
    with pytest.raises(ValueError, match="the smallest options together take 3 of 2"):
        knapsack([np.zeros(1)], [np.array([3.0])], 2)


@pytest.mark.parametrize("allocation", ["uniform", "global", "owl", "optimal"])
def test_shares_of_all_layers_are_the_share_asked_for(allocation: str) -> None:
    graph = trace_decoder(make("llama")).graph
    rule = PruneRecipe(sparsity=0.6, allocation=allocation)
    chosen = choose_pruned(graph, (rule,))
    shares = allocate(graph, chosen, ids(8, 16))
    sizes = {node: node.tensor.size for node in chosen}
    total = sum(shares[n] * sizes[n] for n in chosen) / sum(sizes.values())
    assert total == pytest.approx(0.6, abs=0.01) and all(0 <= s < 1 for s in shares.values())
    assert (len(set(shares.values())) == 1) == (allocation == "uniform")


def test_a_layer_that_matters_more_stays_denser() -> None:
    """Two layers of one shape; what the first gives is hardly used."""
    a, b = nn.Linear(32, 32, bias=False), nn.Linear(32, 32, bias=False)

    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = a, b

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return (0.05 * self.a(x) + self.b(x)).tanh()

    torch.manual_seed(0)
    calls = [(torch.randn(64, 32),) for _ in range(3)]
    recipe = {"prune": {"sparsity": 0.5, "allocation": "optimal"}}
    program = jisu.compile(Sum().eval(), example_inputs=calls[0], recipe=recipe, calibration=calls)
    kept = {entry["name"]: entry["kept"] for entry in program.explain()["sparse"]}
    assert kept["a"] < 0.3 < 0.7 < kept["b"]


# --- Programs --------------------------------------------------------------------------------------------------------


def pruned(name: str, recipe: dict[str, Any], tokens: np.ndarray | None) -> Graph:
    graph = trace_decoder(make(name)).graph
    given = Recipe.from_dict(recipe)
    return Compress(given.prune, given.quantize, tokens, differentiate=output_gradients)(graph)


@pytest.mark.parametrize(
    ("text", "coded"),
    [
        pytest.param(text, coded, marks=[] if coded == n % 2 and n < 4 else pytest.mark.slow)
        for n, text in enumerate(PATTERNS)
        for coded in (False, True)
    ],
)
def test_masks_survive_every_later_pass(text: str, coded: bool) -> None:
    """The program computes what the interpreter does on the pruned graph, whose matrices have exactly the pattern."""
    pattern = {"pattern": text} | ({} if ":" in text else {"sparsity": 0.5})
    recipe: dict[str, Any] = {"prune": pattern}
    if coded:
        recipe["quantize"] = {"scheme": "int4", "group": 16}
    tokens, probe = ids(8, 16), ids(2, 12, 1)
    graph = pruned("llama_tied", recipe, tokens)
    found = 0
    for node in graph.nodes:
        if (node.op is ops.expand or node.op is ops.dequantize) and node.operands[-1] is not None:
            keep = masks.unpack_mask(graph.weights[node.parents[-1].name].numpy(), node.k)
            assert is_in(keep, Pattern.parse(text), 0.5)
            found += 1
    assert found == 2 * 7
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(12), probe.shape))
    want = interpret(graph, [probe, positions][: len(graph.inputs)])[0]
    program = jisu.compile(make("llama_tied"), recipe={**recipe, "fuse": False}, calibration=tokens)
    np.testing.assert_allclose(program(probe).logits, want, atol=2e-3 * np.abs(want).max())
    zeros = [entry["kept"] for entry in program.explain()["sparse"]]
    assert zeros and all(kept == pytest.approx(0.5, abs=0.02) for kept in zeros)
    module = jisu.to_torch(make("llama_tied"), recipe=recipe, calibration=tokens)
    for n, p in module.named_parameters():
        p.data.add_(torch.randn_like(p) * 0.01) if n.endswith(".values") else None
    for node in module.graph.nodes:
        if node.op is ops.expand:
            keep = masks.unpack_mask(module.graph.weights[node.parents[1].name].numpy(), node.k)
            assert is_in(keep, Pattern.parse(text), 0.5)


def test_both_in_one_go_beat_one_after_the_other() -> None:
    tokens, probe = ids(160, 24), ids(6, 24, 1)
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(24), probe.shape))
    dense = interpret(trace_decoder(make("llama")).graph, [probe, positions])[0]

    def error(recipe: dict[str, Any], tokens: np.ndarray | None) -> float:
        return float(np.square(interpret(pruned("llama", recipe, tokens), [probe, positions])[0] - dense).mean())

    cut, codes = {"pattern": "2:4"}, {"scheme": "int3", "group": 16}
    both = error({"prune": cut, "quantize": codes}, tokens)
    assert both < error({"prune": cut, "quantize": {**codes, "algorithm": "rtn"}}, tokens)
    assert both < error({"prune": cut, "quantize": codes}, None)


@pytest.mark.parametrize("name", ["llama", "gemma2", "cohere2"])
def test_the_head_stays_dense_unless_named(name: str) -> None:
    """Also where its logits are scaled or capped."""
    graph = trace_decoder(make(name)).graph
    head = {n for n, layer in find_layers(graph).items() if "head" in layer.names}
    assert head and not head & choose_pruned(graph, (PruneRecipe(sparsity=0.5),)).keys()
    assert head == choose_pruned(graph, (PruneRecipe(layers="head", sparsity=0.5),)).keys()
    rules = (PruneRecipe(sparsity=0.5), PruneRecipe(layers="*.down_proj", sparsity=0))
    names = {layer.names[0] for layer, _ in choose_pruned(graph, rules).values()}
    assert names and not any("down_proj" in n for n in names)


def test_a_module_is_calibrated_with_calls() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    mixing = torch.randn(48, 48) * torch.linspace(0.1, 2, 48)
    calls = [(torch.randn(32, 48) @ mixing,) for _ in range(4)]
    probe = torch.randn(32, 48) @ mixing
    want = model(probe).detach().numpy()
    recipe = {"prune": {"sparsity": 0.6}, "quantize": {"scheme": "int8"}}
    errors = []
    for calibration in (None, calls):
        program = jisu.compile(model, example_inputs=(probe,), recipe=recipe, calibration=calibration)
        errors.append(np.square(np.asarray(program(probe)) - want).mean())
    assert errors[1] < 0.7 * errors[0], errors


@pytest.mark.parametrize("stop", [0.2, 0.8, 0.95])
def test_an_interrupted_run_goes_on_and_gives_the_same_bytes(stop: float, tmp_path: Path) -> None:
    graph, tokens = trace_decoder(make("llama")).graph, ids(8, 16)
    rules = ((PruneRecipe(sparsity=0.5, allocation="optimal"),), (QuantizeRecipe(scheme="int4", group=16),))
    want = Compress(*rules, tokens)(graph)

    def interrupt(done: float) -> None:
        if done >= stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Compress(*rules, tokens, interrupt, tmp_path)(graph)
    (folder,) = tmp_path.iterdir()
    files = {f: f.stat().st_mtime_ns for f in folder.iterdir()}
    assert files
    seen: list[dict[Path, int]] = []
    found = Compress(
        *rules, tokens, lambda done: seen.append({f: f.stat().st_mtime_ns for f in folder.iterdir()}), tmp_path
    )(graph)
    assert all(seen[-1][f] == time for f, time in files.items()) and len(seen[-1]) > len(files)
    assert not any(tmp_path.iterdir())
    assert str(found) == str(want)
    for name, storage in want.weights.items():
        assert storage.numpy().tobytes() == found.weights[name].numpy().tobytes(), name


def test_values_in_files_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calibration data that doesn't fit into memory gives the same bytes."""
    graph, tokens = trace_decoder(make("llama")).graph, ids(20, 16)
    rules = ((PruneRecipe(sparsity=0.5),), (QuantizeRecipe(scheme="int4", group=16),))
    want = Compress(*rules, tokens)(graph)
    monkeypatch.setattr(calibrate.Room.__init__, "__defaults__", (0,))
    found = Compress(*rules, tokens)(graph)
    assert all(w.numpy().tobytes() == found.weights[n].numpy().tobytes() for n, w in want.weights.items())


def test_a_damaged_file_of_an_interrupted_run_is_made_anew(tmp_path: Path) -> None:
    graph, tokens = trace_decoder(make("llama")).graph, ids(4, 16)
    rules = (PruneRecipe(sparsity=0.5),)

    def interrupt(done: float) -> None:
        if done > 0.5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Compress(rules, (), tokens, interrupt, tmp_path)(graph)
    for file in next(tmp_path.iterdir()).iterdir():
        file.write_bytes(file.read_bytes()[:100])
    found, want = Compress(rules, (), tokens, folder=tmp_path)(graph), Compress(rules, (), tokens)(graph)
    assert all(w.numpy().tobytes() == found.weights[n].numpy().tobytes() for n, w in want.weights.items())


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ({"prune": {"layers": "*.k_proj"}}, "sparsity is missing"),
        ({"prune": {"sparsity": 1.0}}, "sparsity must be at least 0 and below 1"),
        ({"prune": {"sparsity": True}}, "sparsity must be at least 0"),
        ({"prune": 1.5}, "sparsity must be at least 0"),
        ({"prune": {"pattern": "2:4", "sparsity": 0.6}}, "2:4 removes 0.5 of the numbers, not 0.6"),
        ({"prune": {"pattern": "2:4", "allocation": "owl"}}, "the same share everywhere"),
        ({"prune": {"sparsity": 0.5, "algorithm": "wnda"}}, "did you mean 'wanda'"),
        ({"prune": {"sparsity": 0.5, "allocation": "global", "algorithm": "alps"}}, "goes with algorithm"),
        ({"prune": {"sparsity": 0.5, "sparsty": 1}}, "did you mean 'sparsity'"),
        ({"prune": {"sparsity": 0.5, "layers": "*.down_prj"}}, "near: .*down_proj"),
        ({"prune": {"sparsity": 0.5, "pattern": "7x1"}}, "blocks of 7x1 don't divide"),
        ({"prune": {"pattern": "3:7"}}, "runs of 7 don't divide"),
        ({"prune": {"sparsity": 0.5, "algorithm": "wanda"}}, "wanda needs calibration data"),
        ({"prune": {"sparsity": 0.5, "allocation": "optimal"}}, "'optimal' needs calibration data"),
    ],
)
def test_recipes_that_do_not_fit(recipe: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        jisu.compile(make("llama"), recipe=recipe)


def test_calibration_of_modules_that_does_not_fit() -> None:
    model = nn.Linear(8, 4).eval()
    for calibration, words in (
        ("text.txt", "a list of calls"),
        ([], "a list of calls"),
        ([(), ()], r"calibration\[0\].*missing"),
    ):
        with pytest.raises(InputError, match=words):
            jisu.compile(
                model,
                example_inputs=(torch.zeros(2, 8),),
                recipe={"prune": {"sparsity": 0.5, "layers": "head"}},
                calibration=calibration,
            )


def test_weights_that_are_no_numbers() -> None:
    w = np.zeros((4, 4), np.float32)
    w[1, 2] = np.nan
    x, node = placeholder("x", TensorType((2, 4), "float32")), weight("layer.weight", TensorType((4, 4), "float32"))
    graph = Graph((x,), (ops.relu(ops.linear(x, node)),), {"layer.weight": ArrayStorage(w)})
    with pytest.raises(InputError, match="layer: the weight has 1 NaN"):
        Compress((PruneRecipe(sparsity=0.5),))(graph)


@given(
    st.builds(
        PruneRecipe, layers=st.sampled_from(["*", "*.down_proj", "head"]), sparsity=st.floats(0, 0.99),
        pattern=st.sampled_from(["unstructured", "16x1"]), algorithm=st.sampled_from(["auto", "alps", "wanda"]),
        allocation=st.sampled_from(["uniform", "owl", "optimal"]), match=st.floats(0, 1),
    )
)  # fmt: skip
def test_recipes_survive_their_text(rule: PruneRecipe) -> None:
    recipe = Recipe(prune=(rule, PruneRecipe(pattern="2:4")))
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe.from_dict({"prune": 0.5}) == Recipe(prune=(PruneRecipe(sparsity=0.5),))
    assert Recipe.from_dict({"prune": "2:4"}) == Recipe(prune=(PruneRecipe(pattern="2:4"),))


def test_a_folder_is_pruned_by_the_command_line(tmp_path: Path) -> None:
    """With a preset and with a file; sparse weights take less room."""
    from transformers import AutoModelForCausalLM

    model = make("llama")
    assert isinstance(model, nn.Module) and AutoModelForCausalLM is not None
    model.save_pretrained(tmp_path / "model")
    (tmp_path / "r.toml").write_text("[[prune]]\nsparsity = 0.75\n")
    (tmp_path / "both.toml").write_text('prune = "2:4"\n[[quantize]]\nscheme = "int4"\ngroup = 16\n')
    run = CliRunner()
    for recipe, out in (
        (str(tmp_path / "r.toml"), "sparse"),
        (str(tmp_path / "both.toml"), "both"),
        ("default", "dense"),
    ):
        done = run.invoke(app, ["compile", str(tmp_path / "model"), "--recipe", recipe, "--out", str(tmp_path / out)])
        assert done.exit_code == 0, done.output
    sizes = [jisu.load(tmp_path / out).weights_bytes for out in ("both", "sparse", "dense")]
    assert sizes == sorted(sizes) and sizes[1] < 0.8 * sizes[2]
    (tmp_path / "r.toml").write_text("[[prune]]\nsparsity = 1.5\n")
    done = run.invoke(
        app, ["compile", str(tmp_path / "model"), "--recipe", str(tmp_path / "r.toml"), "--out", str(tmp_path / "x")]
    )
    assert done.exit_code and "below 1" in done.output
