"""What a TPU's owner gets: complete, undamaged or refused, and run by its own script on JAX's CPU; libtpu's word for every program."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as hf
from decoders import make
from typer.testing import CliRunner

import jisu
from jisu.cli import app
from jisu.compiler.errors import InputError, TargetError
from jisu.compiler.graph import ArrayStorage
from jisu.compiler.interpret import interpret
from jisu.compiler.storage import open_safetensors
from jisu.compiler.text import parse
from jisu.compiler.types import numpy_dtype
from jisu.runtime.program import Program
from jisu.targets.tpu import bundle, export, judges, kernels

needs_jax = pytest.mark.skipif(
    not export.has_jax() or importlib.util.find_spec("flatbuffers") is None,
    reason='needs JAX and flatbuffers: pip install "jisu[tpu]"',
)
needs_libtpu = pytest.mark.skipif(
    not (export.has_jax() and export.has_libtpu()), reason='needs JAX and libtpu: pip install "jisu[tpu-aot]"'
)
pytestmark = needs_jax
BUCKETS, CAPACITY = (1, 16), 64


def encoder(shapes: Any = None) -> Program:
    torch.manual_seed(0)
    config = hf.BertConfig(
        vocab_size=99, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
    )
    model = hf.BertModel(config, add_pooling_layer=False).eval().bfloat16()
    ids = torch.ones((2, 9), dtype=torch.long)
    return jisu.compile(model, target="tpu:v5e", example_inputs=(ids,), dynamic_shapes=shapes)


@pytest.fixture(scope="module")
def program() -> Program:
    return jisu.compile(make("llama").bfloat16(), target="tpu:v5e")


@pytest.fixture(scope="module")
def exported(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "tiny"
    jisu.export(program, folder, buckets=BUCKETS, capacity=CAPACITY)
    return folder


@pytest.fixture
def copy(exported: Path, tmp_path: Path) -> Path:
    """An export that a test may damage."""
    return Path(shutil.copytree(exported, tmp_path / "copy"))


def script(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The folder's script, in a process that doesn't find jisu."""
    held = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-P", str(folder / bundle.SCRIPT), *options]
    return subprocess.run(command, capture_output=True, text=True, env={**held, "JAX_PLATFORMS": "cpu"}, timeout=300)


def manifest_of(folder: Path) -> dict[str, Any]:
    found = json.loads((folder / "manifest.json").read_text())
    assert isinstance(found, dict)
    return found


def greedy(program: Program, folder: Path) -> list[list[int]]:
    """What the program itself writes after the prompt of the largest bucket's sample."""
    p = manifest_of(folder)["programs"][0]
    samples = open_safetensors(folder / "samples.safetensors")
    ids, start = (samples[f"{p['name']}.{name}"].numpy() for name in ("input_ids", "start"))
    session = program.session()
    logits, found = session.append(ids, start=start, last_only=True), []
    for _ in range(bundle.TOKENS + 1):
        found.append(logits[:, -1].argmax(-1).tolist())
        logits = session.append(np.array(found[-1])[:, None], last_only=True)
    return found[1:]  # the sample of the second program reads the first


# --- What is written ---------------------------------------------------------------------------------------------------


def test_the_manifest_is_complete(exported: Path, program: Program) -> None:
    manifest = manifest_of(exported)
    assert manifest["format"] == "jisu-tpu" and manifest["version"] == 3 and manifest["chip"] == "tpu:v5e"
    assert manifest["jisu"] == jisu.__version__ and "nothing of this was run on a TPU" in manifest["note"]
    files = {p.relative_to(exported).as_posix() for p in exported.rglob("*") if p.is_file()} - {"manifest.json"}
    assert set(manifest["sha256"]) == files
    for name, wanted in manifest["sha256"].items():
        assert hashlib.sha256((exported / name).read_bytes()).hexdigest() == wanted
    assert [p["name"] for p in manifest["programs"]] == ["append_last-16", "append_last-1"]
    weights = open_safetensors(exported / "weights.safetensors")
    for p in manifest["programs"]:
        assert {p["mlir"], p["export"]} <= files and set(p["weights"]) <= set(weights)
        rows = p["sizes"]["sequence"]
        assert p["inputs"][0] == {"name": "input_ids", "shape": [1, rows], "dtype": "int64"}
        assert [i["name"] for i in p["inputs"]] == ["input_ids", "length", "start"]
        assert [s["name"] for s in p["state"]] == ["key.0", "value.0", "key.1", "value.1"]
        assert p["state"][0]["shape"] == [1, 2, CAPACITY, 8]
        assert [o["name"] for o in p["outputs"]] == ["output.0"]
        text = (exported / p["mlir"]).read_text()
        assert text.startswith("module @append_last_") and "tf.aliasing_output" in text
    arrays = program._parts.weights
    for name, tensor in weights.items():
        np.testing.assert_array_equal(tensor.numpy(), arrays[name])


def test_kernels_are_those_of_the_products(exported: Path, program: Program) -> None:
    manifest = manifest_of(exported)
    count = len(re.findall(r"= (?:gated_)?linear\(", program.ir("append_last")))
    for p in manifest["programs"]:
        assert sum(kernel["nodes"].get(p["name"], 0) for kernel in manifest["kernels"]) == count > 0
    (kernel,) = [k for k in manifest["kernels"] if (k["m"], k["n"], k["k"], k["residual"]) == (16, 16, 32, False)]
    rng = np.random.default_rng(0)
    x, w = (rng.integers(-3, 4, shape).astype(numpy_dtype("bfloat16")) for shape in ((16, 32), (32, 16)))
    done = judges.interpret((exported / kernel["file"]).read_text(), x, w)
    assert done.clean
    want = (x.astype(np.float32) @ w.astype(np.float32)).astype(x.dtype)
    np.testing.assert_array_equal(done.result, want)


def test_large_weights_go_to_several_files(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundle, "SHARD", 8000)
    manifest = jisu.export(program, tmp_path / "out", buckets=(1,), capacity=8)
    assert manifest["weights"][0] == "weights-00001.safetensors" and len(manifest["weights"]) > 3
    found = [name for file in manifest["weights"] for name in open_safetensors(tmp_path / "out" / file)]
    assert sorted(found) == sorted(manifest["programs"][0]["weights"])
    assert script(tmp_path / "out", "--cpu").returncode == 0


# --- The script --------------------------------------------------------------------------------------------------------


def test_the_script_verifies_and_generates(exported: Path, program: Program) -> None:
    done = script(exported, "--cpu")
    assert done.returncode == 0, done.stderr
    tokens = manifest_of(exported)["tokens"]
    assert tokens == greedy(program, exported) and len(tokens) == bundle.TOKENS
    assert f"tokens: {tokens}, as in the simulation" in done.stdout
    assert "append_last-16.output.0 is off by" in done.stdout and " on cpu" in done.stdout
    for name, times in (("append_last-16", bundle.PROMPTS), ("append_last-1", bundle.STEPS)):
        assert re.search(rf"^{name}: [\d.]+ ms, median of {times}; [\d.]+ tokens/s$", done.stdout, re.MULTILINE), name


MODELS: dict[str, Callable[[], Program]] = {
    "int8": lambda: jisu.compile(make("llama").bfloat16(), target="tpu:v5e", recipe="int8"),
    "w8a16": lambda: jisu.compile(make("llama").bfloat16(), target="tpu:v5e", recipe="w8a16"),
    "pages": lambda: jisu.compile(make("qwen3"), target="tpu:v6e", recipe={"cache": {"page": 4}}),
    "ring": lambda: jisu.compile(make("mistral"), target="tpu:v5e", recipe={"cache": {"ring": True}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_other_models(name: str, tmp_path: Path) -> None:
    """Products of integers, caches in pages and in rings, two sequences at once."""
    program = MODELS[name]()
    manifest = jisu.export(program, tmp_path / "out", buckets=(12, 1), capacity=CAPACITY, batch=2)
    done = script(tmp_path / "out", "--cpu")
    assert done.returncode == 0, done.stdout + done.stderr
    assert manifest["tokens"] == greedy(program, tmp_path / "out")
    assert ", as in the simulation" in done.stdout


@pytest.mark.parametrize(
    ("compressed", "layouts"),
    [("int8", 26), *(pytest.param(*c, marks=pytest.mark.slow) for c in (("", 13), ("int4", 37)))],
)
def test_kernels_read_weights_as_they_are_stored(
    compressed: str, layouts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One set of weights and caches, as kernels read them, for both forms of the programs; Pallas' interpreter in the place of Mosaic."""
    rules: list[dict[str, Any]] = [{"scheme": "int8"}]
    if compressed == "int4":  # groups of 32 don't divide 48 inputs
        rules = [{"scheme": "int4", "group": 32, "symmetric": False}, {"layers": "*.down_proj", "scheme": "int8"}]
    recipe = {"quantize": rules, "cache": {"scheme": compressed, "page": 32}} if compressed else None
    program = jisu.compile(make("llama").bfloat16(), target="tpu:v5e", recipe=recipe)
    write, texts = export.export_bytes, []

    def on_cpus(text: str, entry: Any, platform: Any, name: str) -> bytes:
        texts.extend([text] if platform == "tpu" else [])
        return write(text, entry, bundle.PLATFORMS, name)

    monkeypatch.setattr(bundle, "chooser", functools.partial(kernels.chooser, smallest=0, platform="cpu"))
    monkeypatch.setattr(bundle.export, "export_bytes", on_cpus)
    folder = tmp_path / "out"
    manifest = jisu.export(program, folder, buckets=BUCKETS, capacity=CAPACITY, kernels=True)
    stored = open_safetensors(folder / "weights.safetensors")
    assert len(manifest["layouts"]) == layouts  # gate and up are one; codes have scales, and perhaps zeros, too
    for name, text in manifest["layouts"].items():
        graph = parse(text)
        held = {n.name: ArrayStorage(program.parts.weights[n.name]) for n in graph.nodes if n.op.name == "weight"}
        np.testing.assert_array_equal(interpret(graph.replace(weights=held), [])[0], stored[name].numpy())
    for p, text in zip(manifest["programs"], texts, strict=True):
        assert set(manifest["layouts"]) <= set(p["weights"]) <= set(stored)
        assert len(p["state"]) == (8 if compressed else 4) and "attention" in text
        assert [s["name"] for s in p["state"]][:2] == (
            ["key.0.codes", "key.0.tails"] if compressed else ["key.0", "value.0"]
        )
    for form in ([], ["--kernels"]):
        done = script(folder, "--cpu", *form)
        assert done.returncode == 0, done.stdout + done.stderr
        assert form or "NOT as in the simulation" not in done.stdout  # kernels round elsewhere, which may turn a tie


def test_an_encoder(tmp_path: Path) -> None:
    manifest = jisu.export(encoder(), tmp_path / "out")
    (p,) = manifest["programs"]
    assert p["name"] == "main" and p["state"] == [] and "tokens" not in manifest and manifest["kind"] == "module"
    done = script(tmp_path / "out", "--cpu")
    assert done.returncode == 0, done.stderr
    assert "main.output.0 is off by" in done.stdout and "median of 20" in done.stdout


def test_an_encoder_in_buckets(tmp_path: Path) -> None:
    dims = {0: torch.export.Dim("batch", min=1, max=8), 1: torch.export.Dim("sequence", min=2, max=64)}
    program = encoder((dims,))
    for options, message in (
        ({"buckets": (1,)}, r"sequence = 1 is not in 2\.\.64"),
        ({"batch": 9, "buckets": (8,)}, r"batch = 9 is not in 1\.\.8"),
        ({"sizes": {"height": 3}}, "has no size 'height'; it has batch, sequence"),
    ):
        with pytest.raises(InputError, match=message):
            jisu.export(program, tmp_path / "out", **options)  # type: ignore[arg-type]
    manifest = jisu.export(program, tmp_path / "out", batch=2, buckets=(16, 32))
    assert [(p["name"], p["inputs"][0]["shape"]) for p in manifest["programs"]] == [
        ("main-16", [2, 16]),
        ("main-32", [2, 32]),
    ]
    done = script(tmp_path / "out", "--cpu")
    assert done.returncode == 0, done.stderr


def test_the_script_refuses_what_is_damaged(copy: Path) -> None:
    data = bytearray((copy / "weights.safetensors").read_bytes())
    data[-7] ^= 1
    (copy / "weights.safetensors").write_bytes(data)
    done = script(copy, "--cpu")
    assert (
        done.returncode == 1
        and done.stderr.strip() == "weights.safetensors is missing or damaged: copy the folder again"
    )
    (copy / "weights.safetensors").unlink()
    assert script(copy, "--cpu").stderr == done.stderr


def test_the_script_says_where_there_is_no_tpu(copy: Path) -> None:
    done = script(copy)
    assert done.returncode == 1 and "JAX finds no TPU here, only 'cpu'; --cpu" in done.stderr


def test_the_script_sees_wrong_results(copy: Path) -> None:
    """A weight that is another one, with a right hash."""
    tensors = {n: np.array(tensor.numpy()) for n, tensor in open_safetensors(copy / "weights.safetensors").items()}
    name = next(n for n in tensors if "layers.1.mlp.down_proj" in n)
    tensors[name] = -tensors[name] * 2
    with open(copy / "weights.safetensors", "wb") as file:
        bundle._tensors(file, {n: ArrayStorage(array) for n, array in tensors.items()})
    manifest = manifest_of(copy)
    manifest["sha256"]["weights.safetensors"] = hashlib.sha256((copy / "weights.safetensors").read_bytes()).hexdigest()
    (copy / "manifest.json").write_text(json.dumps(manifest))
    done = script(copy, "--cpu")
    assert done.returncode == 1 and done.stderr.strip().endswith("the results are wrong")


def test_the_script_sees_wrong_tokens(copy: Path) -> None:
    manifest = manifest_of(copy)
    manifest["tokens"][3][0] ^= 1
    (copy / "manifest.json").write_text(json.dumps(manifest))
    done = script(copy, "--cpu")
    assert done.returncode == 1 and done.stderr.strip().endswith("the results are wrong") and "NOT as" in done.stdout


def test_the_script_needs_programs_with_kernels_for_them(copy: Path) -> None:
    done = script(copy, "--cpu", "--kernels")
    assert done.returncode == 1 and "no programs with kernels: export it with --kernels" in done.stderr


def test_the_script_imports_jax_alone() -> None:
    text = (Path(bundle.__file__).with_name(bundle.SCRIPT)).read_text()
    imported = {line.split()[1].split(".")[0] for line in text.splitlines() if line.startswith(("import ", "from "))}
    assert imported - set(sys.stdlib_module_names) == {"jax", "numpy"}


# --- What is refused ---------------------------------------------------------------------------------------------------


def test_sizes_that_do_not_fit(program: Program, tmp_path: Path) -> None:
    for options, message in (
        ({"buckets": (1, 128), "capacity": 64}, "a bucket of 128 tokens exceeds the capacity of 64"),
        ({"capacity": 161}, r"capacity 161 is not in 1\.\.160"),
        ({"buckets": (0,)}, "a bucket is a number from 1 on, got 0"),
        ({"buckets": ()}, "give at least one"),
        ({"batch": 0}, "batch is a number from 1 on"),
        ({"sizes": {"sequence": 3}}, "sizes are for modules"),
    ):
        with pytest.raises(InputError, match=message):
            jisu.export(program, tmp_path / "out", **options)  # type: ignore[arg-type]
    with pytest.raises(TargetError, match="unknown TPU 'v9'"):
        jisu.export(program, tmp_path / "out", chip="v9")
    assert not any(tmp_path.iterdir())


def test_programs_for_other_targets(tmp_path: Path) -> None:
    module = torch.nn.Linear(3, 4).eval()
    program = jisu.compile(module, example_inputs=(torch.ones(2, 3),))
    with pytest.raises(
        TargetError, match='this program is for .*; compile the model for a TPU, such as target="tpu:v5e"'
    ):
        jisu.export(program, tmp_path / "out")
    assert program.explain()["simulation"] == ""


def test_without_jax(program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Said before anything is computed."""
    find = importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if name == "jax" else find(name))
    monkeypatch.setattr(program, "run", None)
    with pytest.raises(TargetError, match=re.escape('exporting for TPUs needs jax: pip install "jisu[tpu]"')):
        jisu.export(program, tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_nothing_is_left_behind(program: Program, copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C while weights are written: no folder, or the older one."""

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    before = manifest_of(copy)
    with monkeypatch.context() as patch:
        patch.setattr(bundle, "_weights", interrupted)
        for folder, overwrite in ((tmp_path / "new", False), (copy, True)):
            with pytest.raises(KeyboardInterrupt):
                jisu.export(program, folder, buckets=(1,), capacity=8, overwrite=overwrite)
    assert [p.name for p in tmp_path.iterdir()] == ["copy"] and manifest_of(copy) == before
    with pytest.raises(InputError, match="holds an export already"):
        jisu.export(program, copy)
    jisu.export(program, copy, buckets=(1,), capacity=8, overwrite=True, chip="v6e")
    after = manifest_of(copy)
    assert [p["name"] for p in after["programs"]] == ["append_last-1"] and after["chip"] == "tpu:v6e"
    assert not (copy / "append_last-16.mlir").exists() and [p.name for p in tmp_path.iterdir()] == ["copy"]


def test_what_is_no_export_is_never_replaced(program: Program, tmp_path: Path) -> None:
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "manifest.json").write_text("[]")
    (tmp_path / "file").write_text("")
    for folder, message in (
        ("notes", "holds something else"),
        ("file", "is a file"),
        ("no/where", "there is no folder"),
    ):
        with pytest.raises(InputError, match=message):
            jisu.export(program, tmp_path / folder, overwrite=True)
    assert (tmp_path / "notes" / "manifest.json").read_text() == "[]"


# --- The command line --------------------------------------------------------------------------------------------------


def jisu_command(*arguments: str | Path) -> Any:
    return CliRunner().invoke(app, [*map(str, arguments)])


def test_the_command(program: Program, exported: Path, tmp_path: Path) -> None:
    saved, out = tmp_path / "tiny.jisu", tmp_path / "out"
    program.save(saved)
    sizes = ("--bucket", "1", "--bucket", "16", "--capacity", str(CAPACITY))
    done = jisu_command("export", saved, out, *sizes)
    assert done.exit_code == 0, done.output
    for words in ("append_last-16", "tpu:v5e", "simulated on this machine's processor", "nothing was run on a TPU"):
        assert words in done.stdout
    assert manifest_of(out)["sha256"] == manifest_of(exported)["sha256"]
    told = json.loads(
        jisu_command("export", saved, out, "--force", "--json", "--bucket", "1", "--capacity", "8").stdout
    )
    assert told["programs"] == ["append_last-1"] and not told["run_on_tpu"] and told["chip"] == "tpu:v5e"
    for arguments, message in (
        ((saved, out), "holds an export already; overwrite=True (--force) replaces it"),
        ((tmp_path / "none", out), "there is no such file or folder"),
        (
            (saved, tmp_path / "new", "--bucket", "16", "--capacity", "8"),
            "a bucket of 16 tokens exceeds the capacity of 8",
        ),
        ((saved, tmp_path / "new", "--chip", "v9"), "unknown TPU 'v9'"),
        ((saved, tmp_path / "new", "--recipe", "int8"), "is compiled already"),
    ):
        done = jisu_command("export", *arguments)
        assert done.exit_code == 1 and message in done.stderr, done.output
    assert jisu_command("export", saved, tmp_path / "new", "--size", "height").exit_code == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "tiny.jisu"]


@pytest.mark.parametrize("command", [("generate", "--prompt", "a"), ("explain",)])
def test_commands_say_what_an_export_is(command: tuple[str, ...], exported: Path) -> None:
    name, *options = command
    done = jisu_command(name, exported, *options)
    assert done.exit_code == 1
    said = f"is an export for a TPU, not a saved program; run it there with python {exported}/{bundle.SCRIPT}"
    assert said in done.stderr, done.output


def test_explain_says_what_is_simulated(program: Program, tmp_path: Path) -> None:
    assert program.explain()["simulation"] == "simulated on this machine's processor; not run on a TPU"
    program.save(tmp_path / "tiny.jisu")
    done = jisu_command("explain", tmp_path / "tiny.jisu")
    assert "simulated on this machine's processor" in done.stdout and "measured (the simulation)" in done.stdout
    timeline = tmp_path / "timeline.json"
    told = json.loads(jisu_command("explain", tmp_path / "tiny.jisu", "--timeline", timeline, "--json").stdout)
    assert told["simulation"] and told["simulated"][-1]["tokens"] == 1
    spans = [e for e in json.loads(timeline.read_text())["traceEvents"] if e["ph"] == "X"]
    assert max(e["ts"] + e["dur"] for e in spans) == pytest.approx(told["simulated"][-1]["simulated_s"] * 1e6, rel=1e-3)
    bench = ("bench", tmp_path / "tiny.jisu", "--prompt", "8", "--gen", "2", "--repeat", "1")
    assert "these are no speeds of tpu:v5e" in jisu_command(*bench).stdout


# --- What Google's compiler says ---------------------------------------------------------------------------------------


@needs_libtpu
@pytest.mark.slow
@pytest.mark.parametrize("chip", ["v5e", "v6e"])
def test_exports_compile_for_chips(chip: str, exported: Path, tmp_path: Path) -> None:
    """Every program, as the folder has it."""
    jisu.export(encoder(), tmp_path / "encoder")
    for folder in (exported, tmp_path / "encoder"):
        for p in manifest_of(folder)["programs"]:
            donated = range(len(p["inputs"]), len(p["inputs"]) + len(p["state"]))
            made = export.compile_bytes_for(chip, (folder / p["export"]).read_bytes(), donated)
            held = sum(int(np.prod(s["shape"])) * numpy_dtype(s["dtype"]).itemsize for s in p["state"])
            assert made.memory["code"] > 0 and made.memory["aliased"] >= held and (held > 0) == (folder == exported)
