"""The ledger of what compression costs, and the search for recipes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from decoders import VOCABULARY, make
from torch import nn
from typer.testing import CliRunner

import jisu
from jisu.cli import app
from jisu.commands.search import plot, size_of
from jisu.compiler.cost import weight_bytes
from jisu.compiler.errors import InputError
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import Pipeline
from jisu.compiler.recipe import PruneRecipe, QuantizeRecipe, Recipe
from jisu.frontends.gradients import output_gradients
from jisu.frontends.huggingface import trace_decoder
from jisu.passes import default_passes
from jisu.passes.compression import Compress
from jisu.passes.compression.layers import find_layers
from jisu.passes.compression.ledger import keep_ledger
from jisu.passes.compression.search import Option
from jisu.passes.compression.search import search as find
from jisu.passes.compression.sensitivity import Yardstick

OPTIONS = (
    Option(quantize=QuantizeRecipe(scheme="int2", group=16)),
    Option(quantize=QuantizeRecipe(scheme="int4", group=16)),
    Option(PruneRecipe(sparsity=0.5), QuantizeRecipe(scheme="int8", group=0)),
    Option(),
)


def ids(windows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (windows, length))


def divergence(a: Any, b: Any, tokens: np.ndarray) -> float:
    """Mean KL divergence of graph b from a, in nats per token."""
    positions = np.ascontiguousarray(np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape))
    p, q = (
        torch.log_softmax(
            torch.from_numpy(np.asarray(interpret(g, [tokens, positions][: len(g.inputs)])[0], np.float64)), -1
        )
        for g in (a, b)
    )
    return float((p.exp() * (p - q)).sum(-1).mean())


# --- Ledger ----------------------------------------------------------------------------------------------------------


def test_a_ledger_is_what_leaving_one_out_gives() -> None:
    """Against graphs that were compressed without one matrix each, and evaluated whole."""
    graph, tokens = trace_decoder(make("llama")).graph, ids(4, 12)
    rules = (QuantizeRecipe(scheme="int3", group=16, algorithm="rtn"), QuantizeRecipe(layers="head", scheme="none"))
    after = Compress((), rules)(graph)
    ledger = keep_ledger(graph, [("compress", graph, after)], tokens)
    assert ledger.loss == pytest.approx(divergence(graph, after, tokens), rel=1e-3) == ledger.passes[0][1]
    names = [layer.names[0] for layer in find_layers(graph).values() if "head" not in layer.names]
    assert sorted(e.layer for e in ledger.layers) == sorted(names)
    for entry in ledger.layers[::5]:
        without = Compress((), (*rules, QuantizeRecipe(layers=entry.layer, scheme="none")))(graph)
        assert entry.loss == pytest.approx(ledger.loss - divergence(graph, without, tokens), abs=2e-5)
        assert entry.share == pytest.approx(entry.loss / ledger.loss)
        assert entry.bytes == weight_bytes(after) - weight_bytes(without) + entry.dense_bytes
        assert 0 < entry.output_error < 0.5 and entry.form == "int3 g16"


def test_a_ledger_names_every_lossy_pass() -> None:
    recipe = {"prune": "2:4", "quantize": {"scheme": "int8", "activations": "int4"}}
    program = jisu.compile(make("llama"), recipe=recipe, calibration=ids(8, 12), ledger=True)
    ledger = program.explain()["ledger"]
    assert [p["name"] for p in ledger["passes"]] == ["quantize activations", "compress"]
    assert all(p["loss"] > 0 for p in ledger["passes"]) and ledger["unit"].startswith("KL")
    losses = [e["loss"] for e in ledger["layers"]]
    assert losses == sorted(losses, reverse=True)
    forms = {e["form"] for e in ledger["layers"]}
    assert forms == {"50% zeros, int8 per row", "int8 per row"}  # the head stays whole
    with pytest.raises(InputError, match="a ledger is measured on calibration data"):
        jisu.compile(make("llama"), recipe="int8", ledger=True)


def test_modules_are_measured_by_their_outputs() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).eval()
    calls = [(torch.randn(8, 16),) for _ in range(3)]
    program = jisu.compile(
        model, example_inputs=calls[0], recipe={"prune": {"sparsity": 0.5}}, calibration=calls, ledger=True
    )
    ledger = program.explain()["ledger"]
    want = [model(*call).detach().numpy() for call in calls]
    got = [np.asarray(program(*call)) for call in calls]
    error = sum(np.square(a - b).sum() for a, b in zip(want, got, strict=True)) / sum(np.square(a).sum() for a in want)
    assert ledger["loss"] == pytest.approx(error, rel=1e-3) and ledger["unit"] == "relative squared error"


# --- Search ----------------------------------------------------------------------------------------------------------


def test_every_point_is_what_its_recipe_gives() -> None:
    model, tokens, probe = make("llama"), ids(12, 12), ids(4, 12, 1)
    front = jisu.search(
        model,
        calibration=tokens,
        held_out=probe,
        options=OPTIONS,
        recipe={"quantize": {"layers": "head", "scheme": "int8"}},
    )
    sizes = [p.bytes for p in front.points]
    assert len(front.points) >= 4 and sizes == sorted(sizes, reverse=True) and front.unit.startswith("KL")
    graph, _ = Pipeline(default_passes()).run(trace_decoder(model).graph)
    for point in front.points[::2]:
        made = Compress(point.recipe.prune, point.recipe.quantize, tokens, differentiate=output_gradients)(graph)
        assert weight_bytes(made) == point.bytes
        assert divergence(graph, made, probe) == pytest.approx(point.loss, rel=0.02)
    assert front.points[0].loss < front.points[-1].loss
    for p in front.points:
        assert p.on_front == (
            not any(q.bytes <= p.bytes and q.predicted_s <= p.predicted_s and q.loss < p.loss for q in front.points)
        )


def test_a_mixture_beats_a_uniform_recipe_of_its_size() -> None:
    """On a model of which some layers hardly matter."""
    torch.manual_seed(0)

    class Unequal(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return sum(layer(x) * 10.0**-i for i, layer in enumerate(self.layers)).tanh()  # type: ignore[union-attr]

    model, calls = Unequal().eval(), [(torch.randn(64, 64),) for _ in range(8)]
    uniform = Recipe(quantize=(QuantizeRecipe(scheme="int4", group=16),))
    program = jisu.compile(model, example_inputs=calls[0], recipe=uniform, calibration=calls[:6], ledger=True)
    size = sum(e["bytes"] for e in program.explain()["ledger"]["layers"]) + 4 * 64 * 4
    options = [Option(quantize=QuantizeRecipe(scheme=s, group=16)) for s in ("int2", "int3", "int4", "int8")]
    front = jisu.search(
        model, calibration=calls[:6], held_out=calls[6:], budgets=[size], options=options, example_inputs=calls[0]
    )
    (point,) = front.points
    assert point.bytes <= size
    want, got = model(*calls[7]).detach().numpy(), np.asarray(program(*calls[7]))
    assert point.loss < 0.5 * np.square(want - got).sum() / np.square(want).sum()


def test_a_limit_of_time_takes_the_faster_form() -> None:
    graph, tokens = trace_decoder(make("llama")).graph, ids(8, 12)

    def latency(g: Any) -> float:
        return weight_bytes(g) * 1e-9

    slow, fast = (
        find(graph, Recipe(), tokens, ids(2, 12, 1), [(np.inf, s)], latency=latency, options=OPTIONS).points[0]
        for s in (np.inf, 6e-5)
    )
    assert fast.predicted_s <= 6e-5 < slow.predicted_s and slow.loss < fast.loss
    assert fast.predicted_s == pytest.approx(fast.bytes * 1e-9, rel=0.02)
    for budget, words in (
        ((100.0, np.inf), "nothing fits into 100 bytes; the least is"),
        ((np.inf, 1e-9), "nothing is predicted to take"),
    ):
        with pytest.raises(InputError, match=words):
            find(graph, Recipe(), tokens, ids(2, 12, 1), [budget], latency=latency, options=OPTIONS)
    with pytest.raises(InputError, match="the recipe settles all"):
        find(graph, Recipe(quantize=(QuantizeRecipe(),)), tokens, tokens, [], latency=latency)


def test_a_yardstick_is_zero_for_the_model_itself() -> None:
    graph, tokens = trace_decoder(make("llama")).graph, ids(20, 8)
    yardstick = Yardstick(graph, tokens)
    assert yardstick.calls == 1  # 8 windows
    from jisu.passes.compression.calibrate import Run, calls_of

    assert abs(yardstick.of(Run(graph, calls_of(graph, tokens)), None, {})) < 1e-6


@pytest.mark.parametrize(("text", "size"), [("1500000", 1.5e6), ("2.5MB", 2.5e6), ("900 KiB", 921600.0), ("1gb", 1e9)])
def test_sizes(text: str, size: float) -> None:
    assert size_of(text) == size


@pytest.mark.parametrize("text", ["", "MB", "2.5.1MB", "-3", "2 apples", "0", "."])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(InputError, match="a size is a number of bytes"):
        size_of(text)


def test_the_command_writes_recipes_that_compile(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog. " * 400)
    out, run = tmp_path / "found", CliRunner()
    (tmp_path / "base.toml").write_text("[calibration]\nwindows = 8\nlength = 16\n")
    command = [
        "search",
        str(checkpoint),
        "--calibration",
        str(tmp_path / "text.txt"),
        "--out",
        str(out),
        "--recipe",
        str(tmp_path / "base.toml"),
    ]
    done = run.invoke(app, [*command, "--budget", "1.1MB", "--json"])
    assert done.exit_code == 0, done.output
    (point,) = json.loads(done.stdout)["points"]
    assert json.loads((out / "front.json").read_text())["points"][0]["bytes"] == point["bytes"]
    assert "plotly" in (out / "front.html").read_text()
    compiled = run.invoke(
        app,
        [
            "compile",
            str(checkpoint),
            "--recipe",
            str(out / point["file"]),
            "--calibration",
            str(tmp_path / "text.txt"),
            "--out",
            str(tmp_path / "p"),
        ],
    )
    assert compiled.exit_code == 0, compiled.output
    again = run.invoke(app, command)
    assert again.exit_code and "exists already" in again.output


def test_the_plot_holds_every_point() -> None:
    front = find(
        trace_decoder(make("llama")).graph,
        Recipe(),
        ids(4, 8),
        ids(2, 8, 1),
        [],
        latency=lambda g: 0.0,
        options=OPTIONS,
        count=3,
    )
    page = plot(attrs.evolve(front, points=tuple(attrs.evolve(p, loss=0.25 + i) for i, p in enumerate(front.points))))
    assert page is not None and all(str(0.25 + i) in page for i in range(len(front.points)))
