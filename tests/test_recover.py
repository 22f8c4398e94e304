"""Recovery: a compressed model trained against the unchanged one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from decoders import VOCABULARY, make
from torch import nn

import jisu
from jisu.compiler import masks, ops
from jisu.compiler.errors import InputError, RecipeError
from jisu.compiler.graph import Graph
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import Pipeline
from jisu.compiler.recipe import PruneRecipe, QuantizeRecipe, RecoverRecipe
from jisu.frontends.huggingface import trace_decoder
from jisu.frontends.training import distil, fit_block
from jisu.passes import default_passes
from jisu.passes.compression import Compress
from jisu.passes.compression.blocks import Reconstruct
from jisu.passes.compression.calibrate import Run, calls_of
from jisu.passes.compression.recover import Recover, _batches
from jisu.passes.compression.sensitivity import Yardstick
from jisu.passes.structured.blocks import find_blocks


def ids(windows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (windows, length))


def divergence(dense: Graph, graph: Graph, tokens: np.ndarray) -> float:
    return Yardstick(dense, tokens).of(Run(graph, calls_of(graph, tokens)), None, {})


def block_errors(dense: Graph, graph: Graph, tokens: np.ndarray) -> np.ndarray:
    """The squared error at the end of each block of the residual stream, relative to the unchanged model's values."""
    runs = [Run(g, calls_of(g, tokens)) for g in (dense, graph)]
    for run in runs:
        for node in run.graph.nodes:
            run.compute(node)
    errors = []
    for old, new in zip(find_blocks(dense), find_blocks(graph), strict=True):
        want, got = np.concatenate(runs[0][old.end]), np.concatenate(runs[1][new.end])
        errors.append(float(np.square(got - want).sum() / np.square(want).sum()))
    return np.array(errors)


def stored(graph: Graph, op: Any, position: int) -> dict[str, bytes]:
    """The bytes of one stored operand of all nodes of an op."""
    names = [str(n.operands[position].name) for n in graph.nodes if n.op is op and n.operands[position] is not None]  # type: ignore[union-attr]
    return {name: graph.weights[name].numpy().tobytes() for name in names}


def test_training_lowers_the_loss_and_keeps_masks_and_codes() -> None:
    dense, tokens, probe = trace_decoder(make("llama")).graph, ids(256, 16), ids(4, 16, 1)
    rules = (
        (PruneRecipe(sparsity=0.6), PruneRecipe(layers="*.o_proj", sparsity=0)),
        (QuantizeRecipe(layers="*.o_proj", scheme="int3", group=16),),
    )
    graph = Compress(*rules, tokens)(dense)
    rule = RecoverRecipe(steps=60, batch=16, learning_rate=0.01)
    found, again = (Recover(rule, dense, tokens, distil)(graph) for _ in range(2))
    assert divergence(dense, found, probe) < 0.75 * divergence(dense, graph, probe)
    for op, position in ((ops.expand, 1), (ops.dequantize, 0)):
        assert stored(graph, op, position) and stored(graph, op, position) == stored(found, op, position)
    assert stored(graph, ops.expand, 0) != stored(found, ops.expand, 0) == stored(again, ops.expand, 0)
    assert stored(graph, ops.dequantize, 1) != stored(found, ops.dequantize, 1)
    assert str(found) == str(graph)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
def test_blocks_come_nearer_to_those_of_the_unchanged_model(name: str) -> None:
    dense, tokens, probe = trace_decoder(make(name)).graph, ids(128, 16), ids(32, 16, 1)
    graph = Compress((PruneRecipe(sparsity=0.6),), (), tokens)(Pipeline(default_passes()).run(dense)[0])
    step = Reconstruct(RecoverRecipe(learning_rate=0.01), 60, (), dense, tokens, fit_block)
    found, again = step(graph), step(graph)
    assert (block_errors(dense, found, probe) < block_errors(dense, graph, probe)).all()
    assert stored(graph, ops.expand, 1) == stored(found, ops.expand, 1)
    assert stored(graph, ops.expand, 0) != stored(found, ops.expand, 0) == stored(again, ops.expand, 0)
    assert str(found) == str(graph)


@pytest.mark.parametrize("pruned", [pytest.param(False, marks=pytest.mark.slow), True])
def test_codes_are_learned_where_the_recipe_says_so(pruned: bool) -> None:
    dense, tokens = trace_decoder(make("llama")).graph, ids(256, 16)
    rules = (
        QuantizeRecipe(scheme="int3", group=16, symmetric=False, algorithm="autoround"),
        QuantizeRecipe(layers="*.o_proj", scheme="int3", group=16, algorithm="gptq"),
        QuantizeRecipe(layers="head", scheme="none"),
    )
    graph = Compress((PruneRecipe(pattern="2:4"),) if pruned else (), rules, tokens)(dense)
    found = Reconstruct(RecoverRecipe(learning_rate=0.002), 100, rules, dense, tokens, fit_block)(graph)
    fixed = Reconstruct(RecoverRecipe(learning_rate=0.0), 100, rules, dense, tokens, fit_block)(graph)
    start = block_errors(dense, graph, tokens)
    for better in (found, fixed):
        assert block_errors(dense, better, tokens)[-1] < start[-1]
    before, after = stored(graph, ops.dequantize, 0), stored(found, ops.dequantize, 0)
    moved = {name.rpartition(".")[0].rpartition(".")[2] for name in before if before[name] != after[name]}
    assert moved and "o_proj" not in moved
    assert stored(graph, ops.dequantize, 1) == stored(fixed, ops.dequantize, 1)
    assert stored(graph, ops.dequantize, 3) == stored(found, ops.dequantize, 3)
    assert stored(graph, ops.dequantize, 1) != stored(found, ops.dequantize, 1)
    assert str(found) == str(graph)


def test_a_block_that_training_only_worsens_stays() -> None:
    dense, tokens = trace_decoder(make("llama")).graph, ids(8, 16)
    graph = Compress((PruneRecipe(sparsity=0.5),), (), tokens)(dense)
    found = Reconstruct(RecoverRecipe(learning_rate=1.0), 4, (), dense, tokens, fit_block)(graph)
    assert stored(graph, ops.expand, 0) == stored(found, ops.expand, 0)


@pytest.mark.parametrize("coded", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_recipe_recovers(coded: bool) -> None:
    """Codes of pruned matrices are found behind the training, on the masks that were trained."""
    recipe: dict[str, Any] = {
        "prune": "2:4",
        "recover": {"steps": 30, "batch": 4, "learning_rate": 0.01},
        "calibration": {"length": 16},
    }
    if coded:
        recipe["quantize"] = [{"scheme": "int4", "group": 16}, {"layers": "head", "scheme": "none"}]
    model, tokens, probe = make("llama_tied"), ids(16, 16), ids(4, 16, 1)
    want = np.asarray(jisu.compile(model)(probe).logits)
    errors = []
    for steps in (0, 30):
        recipe["recover"]["steps"] = steps
        program = jisu.compile(model, recipe=recipe, calibration=tokens)
        errors.append(float(np.square(np.asarray(program(probe).logits) - want).mean()))
        assert all(0.45 < entry["kept"] <= 0.5 for entry in program.explain()["sparse"])
    assert errors[1] < 0.9 * errors[0], errors
    names = [p["name"] for p in program.explain()["passes"] if not p["exact"]]
    assert names == (
        ["prune", "recover behind prune", "quantize", "recover behind quantize"]
        if coded
        else ["compress", "recover behind compress"]
    )
    module = jisu.to_torch(model, recipe=recipe, calibration=tokens)
    for node in module.graph.nodes:
        if node.op in (ops.expand, ops.dequantize) and node.parents[-1].name.endswith(".mask"):
            keep = masks.unpack_mask(module.graph.weights[node.parents[-1].name].numpy(), node.k)
            assert (keep.reshape(len(keep), -1, 4).sum(-1) == 2).all()


@pytest.mark.slow
def test_recipes_that_train_blocks() -> None:
    model, tokens, probe = make("llama"), ids(16, 16), ids(4, 16, 1)
    want = np.asarray(jisu.compile(model)(probe).logits)

    def error(recipe: dict[str, Any], passes: list[str]) -> float:
        program = jisu.compile(model, recipe=recipe, calibration=tokens)
        assert [p["name"] for p in program.explain()["passes"] if not p["exact"]] == passes
        return float(np.square(np.asarray(program(probe).logits) - want).mean())

    plain = error({"prune": "2:4"}, ["compress"])
    assert error({"prune": "2:4", "recover": {"blocks": 40}}, ["compress", "reconstruct behind compress"]) < plain
    coded = {"scheme": "int3", "group": 16, "algorithm": "autoround"}
    wanted = ["prune", "reconstruct behind prune", "quantize", "reconstruct behind quantize"]
    error({"prune": "2:4", "quantize": coded, "recover": {"blocks": 4}}, wanted)


def test_training_data_of_its_own_and_minutes() -> None:
    recipe = {"prune": {"sparsity": 0.5}, "recover": {"steps": 10**6, "minutes": 0.02}}
    program = jisu.compile(make("llama"), recipe=recipe, calibration=ids(4, 16), training=ids(32, 24, 2))
    assert [p["name"] for p in program.explain()["passes"] if not p["exact"]] == ["compress", "recover behind compress"]


def test_modules_recover_their_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    calls = [(torch.randn(32, 24),) for _ in range(8)]
    want = model(*calls[0]).detach().numpy()
    errors = []
    for steps in (0, 60):
        # By outputs, which leaves training something to do.
        prune = {"sparsity": 0.7, "objective": "output"}
        recipe = {"prune": prune, "recover": {"steps": steps, "learning_rate": 0.02}}
        program = jisu.compile(model, example_inputs=calls[0], recipe=recipe, calibration=calls)
        errors.append(float(np.square(np.asarray(program(*calls[0])) - want).mean()))
    assert errors[1] < 0.5 * errors[0], errors


def test_what_training_gives_is_what_the_program_computes() -> None:
    tokens, recipe = ids(8, 16), {"prune": "2:4", "recover": {"steps": 4}}
    graph = jisu.to_torch(make("llama"), recipe=recipe, calibration=tokens).graph
    program = jisu.compile(make("llama"), recipe=recipe, calibration=tokens)
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(16), (2, 16)))
    want = interpret(graph, [tokens[:2], positions])[0]
    np.testing.assert_allclose(program(tokens[:2]).logits, want, atol=1e-3 * np.abs(want).max())


@pytest.mark.parametrize(
    ("recipe", "error", "words"),
    [
        ({"recover": {"steps": -1}}, RecipeError, "steps must be an integer from 0"),
        ({"recover": {"steps": 4, "learning_rate": float("nan")}}, RecipeError, "learning_rate must be a number"),
        ({"recover": {"stps": 4}}, RecipeError, "did you mean 'steps'"),
        ({"prune": {"sparsity": 0.5}, "recover": {"steps": 4}}, RecipeError, "training needs data"),
        ({"prune": {"sparsity": 0.5}, "recover": {"blocks": 4}}, RecipeError, "blocks are trained on calibration data"),
        ({"quantize": {"scheme": "int4", "algorithm": "autoround"}}, RecipeError, "give calibration"),
        (
            {"quantize": "int4", "rotate": "hadamard", "recover": {"blocks": 4}},
            RecipeError,
            "rotate turns the residual stream",
        ),
        (
            {"quantize": {"algorithm": "autoround"}, "rotate": "hadamard"},
            RecipeError,
            "rotate turns the residual stream",
        ),
        ({"quantize": {"scheme": "nf4", "algorithm": "autoround"}}, RecipeError, "autoround. is for integer schemes"),
    ],
)
def test_recipes_that_do_not_fit(recipe: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        jisu.compile(make("llama"), recipe=recipe)


def test_a_model_without_a_residual_stream_has_no_blocks_to_train() -> None:
    model = nn.Sequential(nn.Linear(24, 64), nn.ReLU(), nn.Linear(64, 4)).eval()
    calls = [(torch.randn(32, 24),)]
    recipe = {"prune": {"sparsity": 0.7}, "recover": {"blocks": 10}}
    with pytest.raises(RecipeError, match=r"leave out recover\.blocks"):
        jisu.compile(model, example_inputs=calls[0], recipe=recipe, calibration=calls)


def test_training_without_a_recipe_that_trains() -> None:
    with pytest.raises(InputError, match="the recipe doesn't train"):
        jisu.compile(make("llama"), recipe={"prune": {"sparsity": 0.5}}, calibration=ids(2, 8), training=ids(2, 8))
    with pytest.raises(InputError, match="lower learning_rate"):
        jisu.compile(
            make("llama"),
            recipe={"prune": {"sparsity": 0.5}, "recover": {"steps": 50, "learning_rate": 1e30}},
            calibration=ids(2, 8),
        )


def test_few_windows_are_spliced_from_the_second_round_on() -> None:
    graph, samples = trace_decoder(make("llama")).graph, ids(6, 16)
    rule = RecoverRecipe(steps=4, batch=4)
    first = [_batches(graph, samples, rule)(step)[0] for step in (0, 1)]
    assert sorted(map(tuple, np.concatenate(first))) == sorted(map(tuple, samples))
    batch = _batches(graph, samples, rule)(2)[0]
    np.testing.assert_array_equal(batch, _batches(graph, samples, rule)(2)[0])
    assert batch.shape == (4, 16)
    for window in batch:
        cuts = [c for c in range(2, 15) if any((w[c:] == window[: 16 - c]).all() for w in samples)]
        assert any((o[:c] == window[16 - c :]).all() for c in cuts for o in samples)
