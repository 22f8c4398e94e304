"""Schedules and their tuning: no schedule changes what a kernel computes, and the search finds, remembers and stops as it says."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_integer import graphs as integer_graphs

import jisu
from jisu.compiler import ops
from jisu.compiler.entry import Entry, stored
from jisu.compiler.graph import Graph, Node, placeholder
from jisu.compiler.types import TensorType, symbol
from jisu.runtime.executable import Executable
from jisu.targets import cpu, tune
from jisu.targets.compile import compile_graphs
from jisu.targets.schedule import Schedule, from_json, kernel_key
from jisu.targets.target import Target
from jisu.targets.tune import Tuned

HOST = Target.resolve("cpu")


def layer(outputs: int = 96, k: int = 144) -> Graph:
    """A linear layer over packed weights, which are inputs."""
    panel = cpu.packing(HOST)[0]
    x = placeholder("x", TensorType((symbol("m"), k), "float32"))
    w = placeholder("w", TensorType((-(-outputs // panel), k, panel), "float32"))
    return Graph((x, w), (ops.packed_linear(x, w, outputs=outputs, activation="none"),))


def kernel(graph: Graph) -> Node:
    (node,) = (n for n in graph.nodes if n.op is ops.packed_linear)
    return node


# --- Schedules -----------------------------------------------------------------------------------------------------------

SCHEDULES = st.builds(
    Schedule,
    rows=st.sampled_from([None, 1, 3, 8, 14]),
    chunk=st.sampled_from([None, 1, 16, 500]),
    depth=st.sampled_from([None, 16, 50, 1000]),
    ahead=st.sampled_from([None, 64, 1 << 16]),
    shares=st.sampled_from([None, 1, 5, 64]),
)


@given(SCHEDULES)
def test_schedules_come_back_from_json(schedule: Schedule) -> None:
    assert from_json({"k": schedule.to_json()}) == {"k": schedule}
    described = attrs.evolve(HOST, schedule=schedule)
    assert Target.from_json(described.to_json()) == described
    assert (described.fingerprint() == HOST.fingerprint()) == (schedule == Schedule())


@pytest.mark.parametrize(
    "schedule",
    [
        Schedule(rows=14, depth=16, shares=1),
        *(
            pytest.param(s, marks=pytest.mark.slow)
            for s in (Schedule(rows=8, chunk=16, depth=50), Schedule(rows=3, ahead=64))
        ),
    ],
)
def test_a_schedule_changes_no_result(schedule: Schedule, tmp_path: Path) -> None:
    """Floats up to the order of sums, integers exactly; and with any schedule a row's result doesn't depend on those beside it."""
    random = np.random.default_rng(0)
    made = {"floats": layer(), **integer_graphs(HOST, "float32", 144, "int8", "group", ("int4", "int8"))}
    keys = [kernel_key(n) for g in made.values() for n in g.nodes if cpu.variants(n, HOST)]
    assert len(keys) > 10
    found: list[dict[str, list[np.ndarray]]] = []
    for name, schedules in (("without", {}), ("with", dict.fromkeys(keys, schedule))):
        info = compile_graphs(made, HOST, out=tmp_path / name, schedules=schedules, cache_dir=tmp_path / "cache")
        run = Executable.load(info.library, info.entries, num_threads=2)
        given_w = random.standard_normal(made["floats"].inputs[1].tensor.shape).astype(np.float32)
        results: dict[str, list[np.ndarray]] = {}
        for entry, graph in made.items():
            weights = {n: s.numpy() for n, s in stored(graph).items()}
            x = np.random.default_rng(1).standard_normal((37, 144)).astype(np.float32)
            more = [np.ones_like(given_w)] if entry == "floats" else []
            results[entry] = [np.asarray(v) for v in run.call(entry, [x, *more], weights)]
            for rows in (1, 13):
                for one, whole in zip(run.call(entry, [x[:rows], *more], weights), results[entry], strict=True):
                    np.testing.assert_array_equal(one, whole[:rows])
        found.append(results)
    for entry in made:
        for one, other in zip(found[0][entry], found[1][entry], strict=True):
            if entry == "floats":
                np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-4)
            else:
                np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("given", "words"),
    [({"rows": 0}, "rows is a number"), ({"ahead": "x"}, "not 'x'"), ({"row": 8}, "unknown fields row")],
)
def test_a_schedule_that_is_none_is_refused(given: dict[str, Any], words: str) -> None:
    with pytest.raises(jisu.TargetError, match=words):
        Target.from_json({**HOST.to_json(), "schedule": given})


def test_a_key_tells_shapes_apart_and_not_the_names_of_symbols() -> None:
    def key(m: Any, outputs: int = 96) -> str:
        x, w = layer(outputs).inputs
        return kernel_key(ops.packed_linear(placeholder("y", x.tensor.with_shape(m, 144)), w, outputs=outputs))

    assert key(symbol("a")) == key(symbol("b") * 2) != key(symbol("a"), 97)
    assert key(5) != key(symbol("a"))


def test_only_the_named_kernel_follows_a_schedule(tmp_path: Path) -> None:
    key, other = kernel_key(kernel(layer())), kernel_key(kernel(layer(97)))
    libraries = [
        compile_graphs({"e": layer()}, HOST, out=tmp_path / str(i), schedules=schedules, cache_dir=tmp_path / "cache")
        for i, schedules in enumerate(({}, {other: Schedule(rows=8)}, {key: Schedule(rows=8)}))
    ]
    texts = [(info.library.parent / "module.txt").read_text() for info in libraries]
    assert texts[0] == texts[1] != texts[2]


# --- The search ----------------------------------------------------------------------------------------------------------

VARIANTS = {"depth": (64, 32), "rows": (8,), "chunk": (96,), "shares": (8,)}


@given(st.randoms(use_true_random=False), st.integers(0, 9))
def test_a_descent_returns_what_was_measured_and_never_what_is_slower(random: Any, known: int) -> None:
    ratios: dict[Schedule, float] = {}

    def measured(schedule: Schedule) -> float | None:
        if schedule not in ratios and len(ratios) >= known:
            return None
        return ratios.setdefault(schedule, random.uniform(0.5, 1.5))

    best, ratio, complete = tune._descend(Schedule(), VARIANTS, measured)
    assert ratio == ratios.get(best, 1.0) <= 1.0
    assert complete == (len(ratios) == 5) if known >= 5 else not complete
    assert all(r >= tune._GAIN * ratio or s == best for s, r in ratios.items())


class Clock:
    """A loader of libraries that takes the time of a made-up machine: how long a call takes is a function of the schedule."""

    def __init__(self, seconds: Mapping[Schedule, float]) -> None:
        self.seconds, self.loaded, self.now = seconds, 0, 0.0
        self.names = {Path(tune._folder(s)).name: s for s in (Schedule(), *self._all())}

    def _all(self) -> list[Schedule]:
        found = [Schedule()]
        for name, values in VARIANTS.items():
            found += [attrs.evolve(s, **{name: value}) for s in found for value in values]
        return found

    def __call__(self, library: Path, entries: Mapping[str, Entry]) -> Any:
        self.loaded += 1
        clock, schedule = self, self.names[library.parent.name]

        class Runner:
            def call(self, entry: str, inputs: Sequence[Any]) -> None:
                clock.now += clock.seconds.get(schedule, 2e-3)

        return Runner()


def search(clock: Clock, cache: Path, seconds: float, monkeypatch: pytest.MonkeyPatch) -> Tuned:
    with monkeypatch.context() as patched:
        patched.setattr(tune, "_clock", lambda: clock.now)
        patched.setattr(cpu, "variants", lambda node, _: VARIANTS if node.op is ops.packed_linear else {})
        (found,) = tune.tune({"e": layer()}, HOST, seconds, load=clock, cache_dir=cache)
    return found


def test_the_faster_variant_is_found_and_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = Schedule(depth=32, shares=8)
    partly = attrs.evolve(best, shares=None)
    clock = Clock({best: 1e-3, partly: 1.5e-3, Schedule(rows=8): 1.98e-3})
    none = search(clock, tmp_path, 0.0, monkeypatch)
    assert (none.schedule, none.ratio, none.variants, none.complete) == (Schedule(), 1.0, 0, False)
    assert not clock.loaded
    found = search(clock, tmp_path, 600.0, monkeypatch)
    assert found.schedule == best and found.ratio == pytest.approx(0.5) and found.complete
    assert found.op == "packed_linear" and found.key == kernel_key(kernel(layer()))
    loaded = clock.loaded
    again = search(clock, tmp_path, 0.0, monkeypatch)
    assert again == found and clock.loaded == loaded  # nothing was measured again


def test_tuning_begins_where_the_target_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the target's description says of all kernels stays, unless another number is faster."""
    target = attrs.evolve(HOST, schedule=Schedule(shares=5))
    clock = Clock({Schedule(shares=5, rows=8): 1e-3})
    clock.names |= {
        tune._folder(s): s for s in (attrs.evolve(s, shares=s.shares or 5) for s in list(clock.names.values()))
    }
    with monkeypatch.context() as patched:
        patched.setattr(tune, "_clock", lambda: clock.now)
        patched.setattr(cpu, "variants", lambda node, _: VARIANTS if node.op is ops.packed_linear else {})
        (found,) = tune.tune({"e": layer()}, target, 600.0, load=clock, cache_dir=tmp_path)
    assert found.schedule == Schedule(shares=5, rows=8) and found.complete


def test_a_choice_that_was_measured_once_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither when it is measured again, slower than it seemed, nor when there is no time for that."""
    lucky = Schedule(rows=8)
    clock = Clock({lucky: 1e-3})
    search(clock, tmp_path, 600.0, monkeypatch)
    (file,) = (tmp_path / "schedules").iterdir()
    known = json.loads(file.read_text())
    known["measured"] = [[numbers, ratio, False] for numbers, ratio, _ in known["measured"]]
    file.write_text(json.dumps(known))
    assert search(Clock({}), tmp_path, 0.0, monkeypatch).schedule == Schedule()
    found = search(Clock({lucky: 2.1e-3}), tmp_path, 600.0, monkeypatch)
    assert found.schedule == Schedule() and found.ratio == 1.0 and found.complete


def test_what_was_measured_elsewhere_or_is_damaged_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search(Clock({}), tmp_path, 600.0, monkeypatch)
    (file,) = (tmp_path / "schedules").iterdir()
    text = file.read_text()
    for damaged in ("", "{", "[]", '{"about": 1}', text.replace('"measured": [', '"measured": [3, '), text[:-9]):
        file.write_text(damaged)
        assert search(Clock({}), tmp_path, 0.0, monkeypatch).variants == 0
    file.write_text(text)
    assert search(Clock({}), tmp_path, 0.0, monkeypatch).complete
    monkeypatch.setattr(tune, "produced_by", lambda: {"sources": "others"})
    assert not search(Clock({}), tmp_path, 0.0, monkeypatch).complete


def test_a_variant_that_cannot_be_compiled_is_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiling = tune.compile_graphs

    def broken(*arguments: Any, **options: Any) -> Any:
        if any(s.rows for s in options["schedules"].values()):
            raise jisu.CompileError("no registers left")
        return compiling(*arguments, **options)

    monkeypatch.setattr(tune, "compile_graphs", broken)
    clock = Clock({Schedule(chunk=96): 1e-3})
    found = search(clock, tmp_path, 600.0, monkeypatch)
    assert found.schedule == Schedule(chunk=96) and found.complete
    again = search(clock, tmp_path, 0.0, monkeypatch)
    assert again == found and math.isfinite(again.ratio)


# --- Compiling -----------------------------------------------------------------------------------------------------------


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.up, self.down = torch.nn.Linear(64, 128), torch.nn.Linear(128, 64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(x)))


def test_a_tuned_program_computes_the_same_and_tells_what_was_found(tmp_path: Path) -> None:
    x, model = torch.randn(5, 64, generator=torch.Generator().manual_seed(0)), Model().eval()
    stages: list[tuple[str, float]] = []
    rows = {"x": {0: torch.export.Dim("rows", max=512)}}
    program = jisu.compile(
        model, example_inputs=(x,), dynamic_shapes=rows, tune=2.0, cache_dir=tmp_path, num_threads=1,
        progress=lambda stage, done: stages.append((stage, done)),
    )  # fmt: skip
    with torch.no_grad():
        np.testing.assert_allclose(np.asarray(program(x)), model(x).numpy(), rtol=1e-5, atol=1e-5)
    found = program.explain()["tuning"]
    assert [t["op"] for t in found] == ["packed_linear", "packed_linear"] and sum(t["variants"] for t in found) > 0
    assert all(t["ratio"] <= 1.0 and isinstance(t["schedule"], dict) for t in found)
    assert program.explain()["times"]["tuning_s"] > 0
    assert "tuning kernels" in dict(stages) and [d for _, d in stages] == sorted(d for _, d in stages)
    program.save(tmp_path / "saved.jisu")
    assert jisu.load(tmp_path / "saved.jisu").explain()["tuning"] == found
    plain = jisu.compile(model, example_inputs=(x,), dynamic_shapes=rows, cache_dir=tmp_path)
    assert "tuning" not in plain.explain()


@pytest.mark.parametrize("bad", [-1, math.nan, math.inf, "yes", None])
def test_a_budget_is_a_time(bad: Any) -> None:
    with pytest.raises(jisu.InputError, match="tune is True, False or seconds"):
        jisu.compile(Model(), example_inputs=(torch.ones(1, 64),), tune=bad)


def test_kernels_of_another_machine_cannot_be_measured() -> None:
    foreign = attrs.evolve(HOST, name="there", triple="riscv64-unknown-linux-gnu")
    more = attrs.evolve(HOST, name="there", features=HOST.features | {"avx10.9"})
    for target, lacks in ((foreign, "architecture riscv64"), (more, r"avx10\.9")):
        with pytest.raises(jisu.TargetError, match=f"can't run code for 'there': it lacks {lacks}"):
            jisu.compile(Model(), target, example_inputs=(torch.ones(1, 64),), tune=True)
