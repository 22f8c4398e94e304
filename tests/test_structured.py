"""Structured removal: which channels are coupled, what the smaller graph computes, and the whole way through a program."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from decoders import VOCABULARY, make
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import jisu
from jisu.compiler import ops
from jisu.compiler.graph import ArrayStorage, Graph, Node, constant, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import Pipeline
from jisu.compiler.recipe import Recipe, RemoveRecipe
from jisu.compiler.types import TensorType, symbol
from jisu.compiler.verify import verify
from jisu.frontends.huggingface import trace_decoder
from jisu.frontends.torch_export import capture
from jisu.passes import default_passes
from jisu.passes.structured import Remove, loss
from jisu.passes.structured.blocks import find_blocks, remove_block
from jisu.passes.structured.coupling import couple
from jisu.passes.structured.refit import activity, cheapest, collect, solve
from jisu.passes.structured.sites import Site, find_sites, weights_of
from jisu.passes.structured.surgery import without


@cache
def decoder(name: str, fuse: bool = True) -> Graph:
    return Pipeline(default_passes(fuse)).run(trace_decoder(make(name)).graph)[0]


def module(model: nn.Module, *inputs: Any) -> Graph:
    return Pipeline(default_passes()).run(capture(model.eval(), inputs, {}, None).graph)[0]


def tokens(windows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (windows, length))


def run(graph: Graph, seed: int = 0) -> np.ndarray:
    """Logits of a decoder's graph on 2 prompts of 11 tokens."""
    ids = tokens(2, 11, seed)
    places = np.ascontiguousarray(np.broadcast_to(np.arange(11), ids.shape))
    return interpret(graph, [ids, places][: len(graph.inputs)])[0]


def emptied(graph: Graph, labels: np.ndarray, names: Callable[[str], bool] = lambda name: True) -> Graph:
    """The graph with zeros in all weights that hold one of the labels."""
    coupling = couple(graph)
    weights = dict(graph.weights)
    for name, axis, of_axis in weights_of(coupling, labels):
        if names(name):
            array = np.array(weights[name].numpy())
            array[(slice(None),) * axis + (np.isin(of_axis, labels),)] = 0
            weights[name] = ArrayStorage(array)
    return attrs.evolve(graph, weights=weights)


def some(site: Site, seed: int, at_most: int = 1000) -> np.ndarray:
    """A random half of a site's units."""
    rng = np.random.default_rng(seed)
    return np.sort(rng.permutation(site.units)[: max(1, min(site.limit, len(site.units) // 2, at_most))])


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(got - want).max() <= 1e-5 * max(1.0, float(np.abs(want).max()))


MODELS = [
    "llama",
    "llama_tied",
    "qwen3",
    "gemma2",
    "gemma3",
    "phi3",
    "gpt2",
    "gpt_neox",
    "opt",
    "cohere2",
    "mixtral",
    "qwen3_moe",
]
MIXTURES = ["mixtral", "qwen3_moe"]


# --- What is coupled, and that removing it removes nothing else ------------------------------------------------------------


@pytest.mark.parametrize("fuse", [True, pytest.param(False, marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "name, what", [(n, w) for n in MODELS for w in ("heads", "channels") if (n, w) not in ((m, "channels") for m in MIXTURES)]
)  # fmt: skip
def test_units_without_weights_can_go(name: str, what: str, fuse: bool) -> None:
    """Magnitude finds the units whose weights are all zero, and the model without them is the same function."""
    graph = decoder(name, fuse)
    sites = [site for site in find_sites(graph, couple(graph), what) if not site.refusal]
    assert len(sites) == 2  # one per layer
    units = [some(site, i) for i, site in enumerate(sites)]
    empty = emptied(graph, np.concatenate(units))
    step = Remove((RemoveRecipe(what=what, count=len(units[0])),))
    small = verify(step(empty))
    assert [(entry["removed"], entry["of"]) for entry in step.notes["removed"]] == [(len(units[0]), sites[0].total)] * 2
    assert sum(s.numpy().size for s in small.weights.values()) < sum(s.numpy().size for s in graph.weights.values())
    assert np.abs(run(empty) - run(graph)).max() > 1e-3
    assert_close(run(small), run(empty))


@pytest.mark.parametrize("name", ["llama", "gpt2", "phi3", "gpt_neox", "opt", "deepseek_v3"])
@pytest.mark.parametrize("what", ["heads", "channels"])
def test_units_that_nothing_reads_can_go(name: str, what: str) -> None:
    """Zeros in the columns of the layers that read them are enough: whatever makes them doesn't matter, nor its bias."""
    graph = decoder(name)
    coupling = couple(graph)
    sites = [site for site in find_sites(graph, coupling, what) if not site.refusal]
    units = np.concatenate([some(site, i) for i, site in enumerate(sites)])
    readers = {
        n.name for site in sites for c in site.consumers for n in Graph((), (c.matrix,)).nodes if n.op.name == "weight"
    }
    empty = emptied(graph, units, lambda name: name in readers)
    small = verify(without(couple(empty), units.tolist(), {}))
    assert_close(run(small), run(empty))


@pytest.mark.parametrize("name", MIXTURES)
@pytest.mark.parametrize("calibrated", [True, False])
def test_experts_that_go_are_never_chosen(name: str, calibrated: bool) -> None:
    """The model without some experts is the one whose router never scores them."""
    graph = decoder(name)
    step = Remove((RemoveRecipe(what="experts", count=2),), tokens(4, 16) if calibrated else None)
    small = verify(step(graph))
    never: dict[Node, Node] = {}
    for i, router in enumerate(n for n in graph.nodes if n.op is ops.softmax):
        rows = f"model.layers.{i}.mlp.gate.weight"
        kept = small.weights[rows].numpy()
        gone = np.array([not (row == kept).all(1).any() for row in graph.weights[rows].numpy()])
        assert gone.sum() == 2
        never[router] = constant(np.where(gone, -np.inf, 0).astype(np.float32))
    masked = graph.map(
        lambda old, new: new.with_operands([ops.add(new.parents[0], never[old])]) if old in never else new
    )
    assert_close(run(small), run(masked))


def test_experts_by_what_they_do() -> None:
    """An expert that the router never chooses goes first, and never more than leave the router its choice."""
    graph = decoder("mixtral")
    weights = dict(graph.weights)
    for i in range(2):
        rows = np.array(weights[f"model.layers.{i}.mlp.gate.weight"].numpy())
        rows[1 + i] = 0
        rows[3] *= 10  # chosen, for good or bad, or not at all: the largest score or the smallest
        weights[f"model.layers.{i}.mlp.gate.weight"] = ArrayStorage(rows)
    changed = attrs.evolve(graph, weights=weights)
    small = Remove((RemoveRecipe(what="experts", count=1),), tokens(4, 16))(changed)
    for i in range(2):
        assert small.weights[f"model.layers.{i}.mlp.gate.weight"].shape == (3, 32)
        assert small.weights[f"model.layers.{i}.mlp.experts.gate_up_proj"].shape == (3, 96, 32)
    with pytest.raises(
        jisu.RecipeError, match="3 of 4 are too many .* at most 2 can go, since each token uses the others"
    ):
        Remove((RemoveRecipe(what="experts", count=3),))(graph)


class Perceptron(nn.Module):
    def __init__(self, sizes: list[int], seed: int, skip: bool) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in zip(sizes, sizes[1:], strict=False))
        self.skip = skip

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for i, layer in enumerate(self.layers):
            new = layer(x)
            x = x + new if self.skip and new.shape == x.shape else torch.relu(new) if i + 1 < len(self.layers) else new
        return x


@given(
    sizes=st.lists(st.integers(2, 9), min_size=3, max_size=6), seed=st.integers(0, 99), skip=st.booleans(), data=st.data()
)  # fmt: skip
def test_drawn_perceptrons(sizes: list[int], seed: int, skip: bool, data: st.DataObject) -> None:
    """Whatever is removable is removable in any combination; a sum couples what it adds, to the input that pins it."""
    x = torch.randn(3, sizes[0])
    graph = module(Perceptron(sizes, seed, skip), x)
    coupling = couple(graph)
    sites = find_sites(graph, coupling, "channels")
    if not skip:
        assert [len(s.units) for s in sites if not s.refusal] == sizes[1:-1]
    labels: list[int] = []
    for site in sites:
        if site.limit:
            labels += data.draw(st.lists(st.sampled_from(site.units.tolist()), unique=True, max_size=site.limit))
    readers = {
        n.name for s in sites for c in s.consumers for n in Graph((), (c.matrix,)).nodes if n.op.name == "weight"
    }
    empty = emptied(graph, np.array(labels, np.int64), lambda name: name in readers)
    small = verify(without(couple(empty), labels, {}))
    assert_close(interpret(small, [x.numpy()])[0], interpret(empty, [x.numpy()])[0])


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.deep, self.b = nn.Conv2d(2, 12, 3), nn.Conv2d(12, 12, 3, groups=6), nn.Conv2d(12, 4, 1)
        self.c = nn.Linear(2 * 4 * 4 * 4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = torch.relu(self.deep(torch.relu(self.a(x))))
        z = torch.cat([self.b(y), self.b(y.flip(2))], 1)
        return self.c(torch.relu(z).flatten(1))


def test_convolutions() -> None:
    """Channels through grouped convolutions go group by group, through a flattening with all their pixels."""
    x = torch.randn(2, 2, 8, 8)
    graph = module(Convolutions(), x)
    sites = {len(s.units): s for s in find_sites(graph, couple(graph), "channels") if not s.refusal}
    assert sorted(sites) == [4, 6]
    for site in sites.values():
        units = site.units[::2]
        empty = emptied(graph, units)
        small = verify(without(couple(empty), units.tolist(), {}))
        assert_close(interpret(small, [x.numpy()])[0], interpret(empty, [x.numpy()])[0])
    assert {n.groups for n in small.nodes if n.op is ops.conv} <= {1, 3, 6}
    small = verify(Remove((RemoveRecipe(what="channels", share=0.5),))(graph))
    assert [n.groups for n in small.nodes if n.op is ops.conv][1] == 3
    assert small.weights["c.weight"].shape == (3, 64)


def test_golden(golden: Callable[[str, object], None]) -> None:
    """Head groups and channels of a fused projection, before and after."""
    b, s = symbol("b"), symbol("s")
    x = placeholder("x", TensorType((b, s, 6), "float32"))
    sizes = {"qkv": (16, 6), "o": (6, 8), "gate_up": (10, 6), "down": (6, 5)}
    nodes = {name: weight(f"{name}.weight", TensorType(shape, "float32")) for name, shape in sizes.items()}
    rng = np.random.default_rng(0)
    weights = {f"{n}.weight": ArrayStorage(rng.standard_normal(shape).astype(np.float32)) for n, shape in sizes.items()}

    def rows(name: str, start: int, stop: int) -> Node:
        return ops.slice_(nodes[name], starts=(start, 0), stops=(stop, 6), steps=(1, 1))

    q, k, v = (
        ops.reshape(ops.linear(x, rows("qkv", start, stop)), shape=(b, s, heads, 2))
        for start, stop, heads in ((0, 8, 4), (8, 12, 2), (12, 16, 2))
    )
    read = ops.attention(q, k, v, scale=0.5, causal=True)
    y = ops.linear(ops.reshape(read, shape=(b, s, 8)), nodes["o"], None, x)
    inner = ops.mul(ops.silu(ops.linear(y, rows("gate_up", 0, 5))), ops.linear(y, rows("gate_up", 5, 10)))
    graph = verify(Graph((x,), (ops.linear(inner, nodes["down"], None, y),), weights))
    golden("structured-before", graph)
    rules = (RemoveRecipe(what="heads", count=1), RemoveRecipe(what="channels", share=0.4))
    golden("structured-after", verify(Remove(rules)(graph)))


# --- Refitting -------------------------------------------------------------------------------------------------------------


def problem(seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """A matrix, and inputs that go together, as those of real layers do."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((8, 24))
    parts = [rng.standard_normal((4, 30, 8)) @ mix + 0.3 * rng.standard_normal((4, 30, 24)) + 0.5 for _ in range(3)]
    return rng.standard_normal((10, 24)), parts


def left_over(w: np.ndarray, new: np.ndarray, parts: list[np.ndarray]) -> float:
    return float(sum(np.square(x @ (w - new).T).sum() for x in parts))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("block", [1, 4])
def test_each_way_is_better_than_the_one_before(seed: int, block: int) -> None:
    """Smallest weights; least activity; least error after the rest has made up for it. And making up for it helps each."""
    w, parts = problem(seed)
    found = collect(parts, parts, 2, constant=False)
    units = [np.arange(i, i + block) for i in range(0, 24, block)]
    count = len(units) // 3
    sizes = np.array([np.square(w[:, b]).sum() for b in units])
    ways: list[Any] = [
        np.argsort(sizes)[:count],
        np.argsort(activity(w, found, units))[:count],
        cheapest(w, found, units, count),
    ]
    plain, solved = [], []
    for gone in ways:
        kept = np.ones(24, bool)
        kept[np.concatenate([units[i] for i in gone])] = False
        plain.append(left_over(w, w * kept, parts))
        solved.append(left_over(w, solve(w, found, kept), parts))
    assert all(s < 0.8 * p for s, p in zip(solved, plain, strict=True))
    assert plain[1] <= plain[0] and solved[2] <= 1.02 * min(solved[:2])
    best = min(left_over(w, solve(w, found, ~np.isin(np.arange(24), units[i])), parts) for i in range(len(units)))
    (first,) = cheapest(w, found, units, 1)
    assert left_over(w, solve(w, found, ~np.isin(np.arange(24), units[first])), parts) <= 1.02 * best


def test_a_bias_makes_up_for_means() -> None:
    """With the constant input, what an input contributes on average isn't lost."""
    w, parts = problem(0)
    kept = np.ones(25, bool)
    kept[[1, 5]] = False
    wide = np.concatenate([w, np.zeros((10, 1))], 1)
    with_bias = solve(wide, collect(parts, parts, 2, constant=True), kept)
    ones = [np.concatenate([x, np.ones((*x.shape[:2], 1))], 2) for x in parts]
    without_bias = np.concatenate([solve(w, collect(parts, parts, 2, constant=False), kept[:-1]), np.zeros((10, 1))], 1)
    assert left_over(wide, with_bias, ones) < left_over(wide, without_bias, ones)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_refit_keeps_the_outputs_nearer(name: str) -> None:
    graph, ids = decoder(name), tokens(16, 24)
    errors = []
    for refit in (True, False):
        rule = RemoveRecipe(what="channels", share=0.3, importance="magnitude", refit=refit, multiple=8)
        small = verify(Remove((rule,), ids)(graph))
        assert {n.shape[-1] for n in small.nodes if n.op in (ops.gated_linear,)} <= {40}
        errors.append(np.square(run(small, 5) - run(graph, 5)).mean())
    assert errors[0] < 0.9 * errors[1]


def test_heads_by_what_they_do() -> None:
    """A group whose values nobody can tell from zero goes, though its weights are the largest."""
    graph = decoder("llama")
    weights = dict(graph.weights)
    for i in range(2):
        for part, factor in (("v_proj", 1e-4), ("k_proj", 30.0)):
            array = np.array(weights[f"model.layers.{i}.self_attn.{part}.weight"].numpy())
            array[:8] *= factor
            weights[f"model.layers.{i}.self_attn.{part}.weight"] = ArrayStorage(array)
    graph = attrs.evolve(graph, weights=weights)
    for importance in ("auto", "activation"):
        small = Remove((RemoveRecipe(what="heads", count=1, importance=importance),), tokens(4, 16))(graph)
        for i in range(2):
            kept = small.weights[f"model.layers.{i}.self_attn.v_proj.weight"].numpy()
            np.testing.assert_array_equal(kept, weights[f"model.layers.{i}.self_attn.v_proj.weight"].numpy()[8:])


# --- Layers ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fuse", [True, False])
@pytest.mark.parametrize("name", [*MODELS, "olmo2", "starcoder2", "deepseek_v3"])
def test_a_layer_that_adds_nothing_can_go(name: str, fuse: bool) -> None:
    graph = decoder(name, fuse)
    blocks = find_blocks(graph)
    assert len(blocks) == 2
    assert all(any(f"{i}." in weight for weight in b.names) for i, b in enumerate(blocks))
    small = verify(remove_block(graph, blocks[1]))
    assert small.count(ops.attention) == 1 and not any(n in small.weights for b in blocks[1:] for n in b.names)
    silent = dict(graph.weights)
    for name in blocks[0].names:
        stored = name if name in silent else f"{name}.weight"
        array = np.array(silent[stored].numpy())
        if array.ndim >= 2 and "norm" not in name:
            silent[stored] = ArrayStorage(np.zeros_like(array))
        if "bias" in name:
            silent[stored] = ArrayStorage(np.zeros_like(array))
    silenced = attrs.evolve(graph, weights=silent)
    small = verify(Remove((RemoveRecipe(what="layers", count=1),))(silenced))
    assert_close(run(small), run(silenced))


def test_layers_by_loss() -> None:
    """With text, the layer without which the loss is least goes; by activation, the one that turns the stream least."""
    graph, ids = decoder("llama"), tokens(4, 16)
    losses = [loss(remove_block(graph, block), ids).mean() for block in find_blocks(graph)]
    step = Remove((RemoveRecipe(what="layers", count=1),), ids)
    assert loss(step(graph), ids).mean() == pytest.approx(min(losses))
    (note,) = step.notes["removed"]
    assert note["layers"] == list(find_blocks(graph)[int(np.argmin(losses))].names)
    weights = dict(graph.weights)
    for part in ("self_attn.o_proj", "mlp.down_proj"):
        stored = weights[f"model.layers.1.{part}.weight"].numpy()
        weights[f"model.layers.1.{part}.weight"] = ArrayStorage(stored * np.float32(0.01))
    step = Remove((RemoveRecipe(what="layers", count=1, importance="activation"),), ids)
    step(attrs.evolve(graph, weights=weights))
    assert all(".1." in name for name in step.notes["removed"][0]["layers"])


# --- Through a program -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mixtral", *(pytest.param(n, marks=pytest.mark.slow) for n in ("llama", "gpt2"))])
def test_steps_equal_the_whole_after_removal(name: str, tmp_path: Path) -> None:
    """The cache has fewer heads by itself; generation agrees with the whole sequence, before and after saving."""
    rules = [{"what": "heads", "count": 1}, {"what": "layers", "count": 1}]
    rules += [{"what": "experts", "count": 1}] if name == "mixtral" else [{"what": "channels", "share": 0.25}]
    dense = jisu.compile(make(name))
    program = jisu.compile(make(name), recipe={"remove": rules}, calibration=tokens(8, 16))
    assert program.weights_bytes < dense.weights_bytes
    ids = tokens(2, 12)
    whole = np.asarray(program(input_ids=ids).logits)
    session = program.session()
    parts = [np.asarray(session.append(part)) for part in (ids[:, :5], ids[:, 5:6], ids[:, 6:])]
    np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-4, atol=1e-4)
    program.save(tmp_path / "small.jisu")
    again = jisu.load(tmp_path / "small.jisu")
    np.testing.assert_array_equal(np.asarray(again(input_ids=ids).logits), whole)
    assert program.generate(ids[:1], max_new_tokens=4) is not None


def test_removed_then_quantized() -> None:
    rules = {"remove": [{"what": "channels", "share": 0.25, "multiple": 4}], "quantize": "int8"}
    program = jisu.compile(make("llama"), recipe=rules, calibration=tokens(8, 16))
    only = jisu.compile(make("llama"), recipe={"remove": rules["remove"]}, calibration=tokens(8, 16))
    ids = tokens(1, 12)
    a, b = (np.asarray(p(input_ids=ids).logits) for p in (program, only))
    assert program.weights_bytes < only.weights_bytes and np.abs(a - b).max() < 0.1 * np.abs(b).max()


# --- Recipes -----------------------------------------------------------------------------------------------------------------


def test_recipes_come_back() -> None:
    recipe = Recipe.resolve(
        {"remove": [{"what": "heads", "count": 1}, {"what": "layers", "share": 0.2, "layers": "*.3.*"}]}
    )
    assert Recipe.from_toml(recipe.to_toml()) == recipe
    assert Recipe.resolve({"remove": {"what": "channels", "share": 0.25}}).remove[0].share == 0.25


@pytest.mark.parametrize(
    "entry, words",
    [
        ({"what": "head", "count": 1}, "did you mean 'heads'"),
        ({"count": 1}, "what is missing; known: heads"),
        ({"what": "heads"}, "give share .* or count"),
        ({"what": "heads", "share": 0.5, "count": 1}, "give share .* or count"),
        ({"what": "channels", "share": 1.0}, "at least 0 and below 1"),
        ({"what": "channels", "share": -0.1}, "at least 0 and below 1"),
        ({"what": "channels", "share": True}, "at least 0 and below 1"),
        ({"what": "channels", "shares": 0.5}, "did you mean 'share'"),
        ({"what": "channels", "share": 0.5, "importance": "magnitud"}, "did you mean 'magnitude'"),
        ({"what": "channels", "count": 1.5}, "integer"),
        ({"what": "layers", "count": 1, "multiple": 8}, "multiple and refit are for"),
        ("channels", "expected a table"),
    ],
)
def test_bad_entries(entry: Any, words: str) -> None:
    with pytest.raises(jisu.RecipeError, match=words):
        Recipe.resolve({"remove": [entry]})


@pytest.mark.parametrize(
    "name, entry, words",
    [
        ("olmo2", {"what": "heads", "count": 1}, r"layers.0.self_attn.q_proj: rms_norm .* mixes axis 2 of operand 0"),
        ("deepseek_v3", {"what": "experts", "count": 1}, r"mlp.gate: scatter"),
        ("llama", {"what": "experts", "count": 1}, "the model has none"),
        ("llama", {"what": "heads", "count": 2}, "2 of 2 are too many .* at most 1"),
        ("llama", {"what": "layers", "count": 2}, "2 are too many"),
        ("llama", {"what": "channels", "count": 1, "layers": "*.down_porj"}, "nothing matches .* near: model.layers"),
        ("llama", {"what": "channels", "count": 1, "layers": "model.embed_tokens"}, "rms_norm .* mixes axis 2"),
        ("llama", {"what": "heads", "count": 1, "importance": "activation"}, "needs calibration text"),
    ],
)
def test_what_cannot_be_removed(name: str, entry: Any, words: str) -> None:
    with pytest.raises(jisu.RecipeError, match=words):
        Remove((RemoveRecipe(**entry),))(decoder(name))


def test_what_a_module_cannot_lose() -> None:
    with pytest.raises(jisu.RecipeError, match="no residual stream"):
        jisu.compile(
            nn.Linear(4, 4), example_inputs=(torch.randn(2, 4),), recipe={"remove": {"what": "layers", "count": 1}}
        )
    with pytest.raises(jisu.RecipeError, match="part of the model's input"):
        jisu.compile(
            nn.Linear(4, 4), example_inputs=(torch.randn(2, 4),), recipe={"remove": {"what": "channels", "count": 1}}
        )
    magnitude = {"remove": {"what": "channels", "count": 1, "importance": "magnitude", "refit": False}}
    with pytest.raises(jisu.InputError, match="removes by magnitude"):
        jisu.compile(make("llama"), recipe=magnitude, calibration=tokens(2, 8))
