"""The command line as its users and their scripts meet it: standard output, exit codes, and what is left behind."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from jisu.cli import app
from jisu.compiler.launches import CUBIN


def jisu(*arguments: str | Path, stdin: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "jisu", *map(str, arguments)],
        capture_output=True,
        text=True,
        input=stdin,
        env={**os.environ, **environment},
        timeout=600,
    )


def result(done: subprocess.CompletedProcess[str], code: int = 0) -> dict[str, Any]:
    """The one JSON object on standard output."""
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout.count("\n") == 1
    value = json.loads(done.stdout)
    assert isinstance(value, dict)
    return value


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def compiled(checkpoint: Path, cache: Path) -> dict[str, Any]:
    out = checkpoint.parent / "program.jisu"
    return result(jisu("compile", checkpoint, "-o", out, "--cache-dir", cache, "--json"))


@pytest.fixture(scope="module")
def program(compiled: dict[str, Any]) -> Path:
    return Path(compiled["path"])


# --- Compiling and what comes after ---------------------------------------------------------------------------------


def test_compile_says_what_it_made(compiled: dict[str, Any], program: Path) -> None:
    assert program.is_file() and compiled["artifact_bytes"] == program.stat().st_size
    assert compiled["kind"] == "decoder" and compiled["cache"] == "derived" and compiled["recipe"] == "default"
    assert compiled["weights_bytes"] > 0 and compiled["compile_s"] > 0


def test_generate_writes_the_text_alone(program: Path) -> None:
    options = ("--max-new-tokens", "12", "--seed", "5", "--temperature", "0.9", "--top-k", "20", "--threads", "1")
    plain = jisu("generate", program, "--prompt", "If the object", *options)
    told = result(jisu("generate", program, "--json", *options, stdin="If the object"))
    assert plain.returncode == 0
    assert plain.stdout.rstrip("\n") == told["text"].rstrip("\n")
    assert told["prompt"] == "If the object"
    assert told["new_tokens"] == 12 == len(told["token_ids"]) and told["finish_reason"] == "length"


def test_generate_equals_the_model(program: Path, checkpoint: Path, tmp_path: Path) -> None:
    import torch
    import transformers as hf

    prompt = tmp_path / "prompt.txt"
    prompt.write_text("When a module")
    told = result(jisu("generate", program, "--prompt-file", prompt, "--greedy", "--max-new-tokens", "10", "--json"))
    model = hf.LlamaForCausalLM.from_pretrained(checkpoint).eval()
    ids = torch.tensor([hf.AutoTokenizer.from_pretrained(checkpoint)("When a module")["input_ids"]])
    with torch.no_grad():
        for _ in range(10):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert told["token_ids"] == ids[0, -10:].tolist()


def test_generate_applies_the_chat_template(program: Path, checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    missing = jisu("generate", program, "--chat", "--prompt", "hello", "--json")
    assert "no chat template" in result(missing, 1)["error"]["message"]
    chatty = tmp_path / "chatty"
    shutil.copytree(checkpoint, chatty)
    (chatty / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}[{{ m.role }}] {{ m.content }}{% endfor %}"
    )
    options = ("--greedy", "--max-new-tokens", "4", "--cache-dir", str(cache), "--json")
    chat = result(jisu("generate", chatty, "--chat", "--prompt", "hello", *options))
    plain = result(jisu("generate", chatty, "--prompt", "[user] hello", *options))
    assert chat["token_ids"] == plain["token_ids"] and chat["prompt_tokens"] == plain["prompt_tokens"]


def test_a_saved_program_needs_neither_torch_nor_the_compiler(program: Path) -> None:
    code = (
        "import sys, jisu.__main__ as m; sys.argv = ['jisu', *sys.argv[1:]]\n"
        "try: m.main()\n"
        "except SystemExit as end: assert not end.code\n"
        "print(*sorted({'torch', 'transformers', 'tvm'} & set(sys.modules)), file=sys.stderr)"
    )
    arguments = ["generate", str(program), "-p", "An object", "--max-new-tokens", "3"]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == ""


def test_bench_has_the_keys_that_scripts_read(program: Path, checkpoint: Path, cache: Path) -> None:
    sizes = ("--prompt", "20", "--gen", "6", "--repeat", "3", "--threads", "1", "--batch", "2", "--json")
    loaded = result(jisu("bench", program, *sizes))
    compiled = result(jisu("bench", checkpoint, *sizes, "--target", "cpu", "--cache-dir", cache))
    for told in (loaded, compiled):
        for key in ("prefill_tokens_per_s", "decode_tokens_per_s"):
            assert 0 < told[f"{key}_min"] <= told[key] <= told[f"{key}_max"]
        assert (told["threads"], told["batch"], told["prompt"], told["gen"], told["repeat"]) == (1, 2, 20, 6, 3)
        assert told["target"] == "cpu" and told["recipe"] == "default" and told["dtype"] == "float32"
        assert told["load_s"] > 0 and told["peak_rss_bytes"] > told["weights_bytes"] > 0
    assert loaded["compile_s"] is None and compiled["compile_s"] > 0


def test_explain_has_the_keys_that_scripts_read(program: Path) -> None:
    told = result(jisu("explain", program, "--json"))
    keys = {"name", "exact", "nodes", "weight_bytes", "flops", "launches", "peak_bytes", "predicted_s", "measured_s"}
    assert all(keys | {"error"} <= set(entry) for entry in told["passes"])
    assert told["passes"][-1]["measured_s"] > 0
    assert told["layers"] and told["kernels"] and told["cache"] == "derived"
    shown = jisu("explain", program).stdout
    assert "Passes" in shown and "Kernels" in shown and "measured:" in shown


def test_tuning_shows_in_explain(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    out = tmp_path / "tuned.jisu"
    told = result(jisu("compile", checkpoint, "-o", out, "--cache-dir", cache, "--tune-seconds", "1", "--json"))
    assert "tuning_s" in told["times"]
    assert result(jisu("explain", out, "--json"))["tuning"]
    assert "Tuned kernels" in jisu("explain", out).stdout


def test_bisect_finds_nothing_wrong(checkpoint: Path, cache: Path) -> None:
    told = result(jisu("bisect", checkpoint, "--prompt", "If the object", "--cache-dir", cache, "--json"))
    assert told["at_fault"] is None and told["compiled_error"] < told["tolerance"] and told["passes"]


def test_bisect_does_not_blame_what_a_recipe_means_to_lose(checkpoint: Path, cache: Path) -> None:
    options = ("--prompt", "If the object", "--recipe", "int4", "--cache-dir", cache, "--json")
    told = result(jisu("bisect", checkpoint, *options))
    assert told["at_fault"] is None and told["compiled_error"] < told["tolerance"]


def test_a_model_without_a_tokenizer_takes_and_writes_token_ids(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(checkpoint, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    options = ("--greedy", "--max-new-tokens", "3", "--cache-dir", cache)
    told = result(jisu("generate", bare, "--prompt", "1, 2 3", *options, "--json"))
    assert told["prompt_tokens"] == 3 and told["text"] == "" and len(told["token_ids"]) == 3
    written = jisu("generate", bare, "--prompt", "1 2 3", *options)
    assert written.stdout.split() == list(map(str, told["token_ids"]))
    refused = jisu("generate", bare, "--prompt", "hello", *options, "--json")
    assert "no tokenizer.json; give token ids" in result(refused, 1)["error"]["message"]


def test_a_simulated_program_says_so_when_it_generates(checkpoint: Path, cache: Path) -> None:
    options = ("--prompt", "If", "--greedy", "--max-new-tokens", "1", "--cache-dir", cache, "--json")
    done = jisu("generate", checkpoint, "--target", "tpu:v5e", *options)
    assert result(done)["simulation"].startswith("simulated on this machine's processor")
    assert "for tpu:v5e: simulated" in done.stderr


def test_compiling_for_a_machine_that_is_elsewhere_says_so(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    made = jisu("compile", checkpoint, "-o", tmp_path / "x.jisu", "--target", "cuda:sm_90", "--cache-dir", cache,
                JISU_CUDA_DRIVER="none.so")  # fmt: skip
    assert made.returncode == 0 and "not here: this machine has no NVIDIA driver" in made.stdout
    assert "try:" not in made.stdout


def test_compiling_without_an_assembler_says_so(checkpoint: Path, cache: Path, tmp_path: Path) -> None:
    """What was compiled before, with one, isn't taken for it."""
    made = jisu("compile", checkpoint, "-o", tmp_path / "x", "--target", "cuda:sm_90", "--cache-dir", cache, PATH="")
    found = importlib.util.find_spec("nvidia") is not None and (tmp_path / "x" / CUBIN).exists()  # pip's
    assert made.returncode == 0 and found == (tmp_path / "x" / CUBIN).exists()
    said = " ".join(made.stdout.split())
    assert found or "without machine code" in said and "pip install nvidia-cuda-nvcc" in said


# --- Errors ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        (("compile", "{tmp}/nothing", "-o", "{tmp}/out"), "InputError", "no such file or folder"),
        (("compile", "{tmp}", "-o", "{tmp}/out"), "InputError", "neither config.json"),
        (("compile", "{model}", "-o", "{tmp}/no/out"), "InputError", "there is no folder"),
        (("compile", "{model}", "-o", "{model}"), "InputError", "holds a checkpoint"),
        (("compile", "{model}", "-o", "{tests}"), "InputError", "holds other files, such as"),
        (("compile", "{model}", "-o", "/dev/full"), "InputError", "neither a folder nor a file"),
        (("compile", "{model}", "-o", "{tmp}/out", "--threads", "1"), "InputError", "--threads is for --tune"),
        (("compile", "{model}", "-o", "{tmp}/out", "--target", "gpu"), "TargetError", "known: cpu"),
        (("compile", "{model}", "-o", "{tmp}/out", "--recipe", "pagde"), "RecipeError", "'paged'"),
        (("generate", "some/model", "-p", "x"), "InputError", "nothing is ever downloaded"),
        (("explain", "{model}", "--timeline", "{tmp}/no/out"), "InputError", "there is no folder"),
        (("generate", "{tmp}/text.txt", "-p", "x"), "InputError", "no saved program"),
        (("recipe", "check", "{tmp}/typo.toml"), "RecipeError", "did you mean 'prefill_chunk'"),
        (("recipe", "check", "{tmp}/none.toml"), "RecipeError", "no recipe file"),
    ],
)
def test_errors_are_messages(
    arguments: tuple[str, ...], kind: str, words: str, checkpoint: Path, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("hello")
    (tmp_path / "typo.toml").write_text("prefil_chunk = 8\n")
    filled = [a.format(tmp=tmp_path, model=checkpoint, tests=Path(__file__).parent) for a in arguments]
    plain, told = jisu(*filled), jisu(*filled, "--json")
    assert plain.returncode == 1 and plain.stdout == ""
    assert plain.stderr.startswith("error: ") and words in plain.stderr and "Traceback" not in plain.stderr
    error = result(told, 1)["error"]
    assert error["type"] == kind and words in error["message"]
    assert not (tmp_path / "out").exists()


def test_options_of_compiling_are_refused_for_a_saved_program(program: Path) -> None:
    error = result(jisu("bench", program, "--recipe", "paged", "--json"), 1)["error"]
    assert "--recipe" in error["message"] and "compiled already" in error["message"]


def test_what_does_not_fit_is_refused(program: Path) -> None:
    too_long = result(jisu("bench", program, "--prompt", "100", "--gen", "100", "--json"), 1)
    assert "128 positions" in too_long["error"]["message"]
    too_hot = result(jisu("generate", program, "-p", "x", "--temperature", "-1", "--json"), 1)
    assert "temperature" in too_hot["error"]["message"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("bench",),
        ("bench", "x", "--no-such"),
        ("bench", "x", "--threads", "0"),
        ("compile", "x", "-o", "y", "--check", "z"),
        ("search", "x", "-o", "y", "--calibration", "z", "--threads", "1"),
    ],
)
def test_wrong_usage_is_2(arguments: tuple[str, ...]) -> None:
    plain, told = jisu(*arguments), jisu(*arguments, "--json")
    assert plain.returncode == 2 and plain.stdout == "" and "Traceback" not in plain.stderr
    assert result(told, 2)["error"]["type"] == "UsageError"


def test_a_prompt_is_given_once(program: Path, tmp_path: Path) -> None:
    twice = jisu("generate", program, "--prompt", "x", "--prompt-file", tmp_path / "x", "--json")
    assert "not both" in result(twice, 2)["error"]["message"]


def test_an_internal_error_is_3_and_saves_its_traceback(tmp_path: Path) -> None:
    code = (
        "import sys, jisu.commands.recipe as r; from jisu.cli import run\n"
        "def broken(*_): raise KeyError('lost')\n"
        "r.show = broken; sys.exit(run(['recipe', 'show', '--json', *sys.argv[1:]]))"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    message = result(done, 3)["error"]["message"]
    (saved,) = tmp_path.iterdir()
    assert str(saved) in message and "KeyError: 'lost'" in saved.read_text()
    debug = subprocess.run([sys.executable, "-c", code, "--debug"], capture_output=True, text=True, env=environment)
    assert debug.returncode == 3 and "Traceback" in debug.stderr


# --- Being interrupted ----------------------------------------------------------------------------------------------


def _until(found: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, "it never came so far"
        time.sleep(0.02)


@pytest.fixture
def interrupted(checkpoint: Path, tmp_path: Path) -> Iterator[Callable[[str, int], tuple[int, str]]]:
    """Start a compilation, send a signal when the pattern matches in its temporary folder: exit code and stderr."""
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    started: list[subprocess.Popen[str]] = []

    def run(pattern: str, number: int) -> tuple[int, str]:
        arguments = ["compile", checkpoint, "-o", tmp_path / "out", "--cache-dir", tmp_path / "cache"]
        process = subprocess.Popen(
            [sys.executable, "-m", "jisu", *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(temporary)},
            # What runs in the background of a script ignores interrupts, and so would its children.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        _until(lambda: any(temporary.glob(pattern)), process)
        process.send_signal(number)
        out, errors = process.communicate(timeout=60)
        assert out == ""
        assert list(temporary.iterdir()) == []
        assert {p.name for p in tmp_path.iterdir()} <= {"tmp", "cache"}
        return process.returncode, errors

    yield run
    for process in started:
        if process.poll() is None:
            process.kill()


@pytest.mark.parametrize("pattern", ["jisu-*", "jisu-*/jisu-*/*"], ids=["tracing", "kernels"])
def test_interrupting_leaves_nothing(interrupted: Callable[[str, int], tuple[int, str]], pattern: str) -> None:
    code, errors = interrupted(pattern, signal.SIGINT)
    assert code == 130 and errors.strip() == "interrupted"


def test_terminating_leaves_nothing(interrupted: Callable[[str, int], tuple[int, str]]) -> None:
    code, errors = interrupted("jisu-*/jisu-*", signal.SIGTERM)
    assert code == 143 and "Traceback" not in errors


# --- Small things ---------------------------------------------------------------------------------------------------


def test_help_starts_quickly() -> None:
    code = "import sys; from jisu.cli import run; run(['--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "compile" in done.stdout and done.returncode == 0
    assert not {"torch", "transformers", "tvm", "numpy", "sympy"} & set(done.stderr.split())


def test_help_has_every_word() -> None:
    assert "[recover]" in CliRunner().invoke(app, ["compile", "--help"]).output


def test_version() -> None:
    import jisu as package

    done = CliRunner().invoke(app, ["--version"])
    assert (done.exit_code, done.output) == (0, f"jisu {package.__version__}\n")


def test_recipes_round_trip(tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["recipe", "show", "paged"])
    assert shown.exit_code == 0
    file = tmp_path / "recipe.toml"
    file.write_text(shown.output)
    checked = CliRunner().invoke(app, ["recipe", "check", str(file), "--json"])
    assert json.loads(checked.output) == {"file": str(file), "ok": True, "recipe": json.loads(checked.output)["recipe"]}
    assert json.loads(checked.output)["recipe"]["cache"]["page"] == 16


@pytest.mark.slow
def test_doctor_finds_nothing_wrong() -> None:
    told = result(jisu("doctor", "--json"))
    assert told["ok"] and {"linker", "self test", "apache-tvm"} <= {check["name"] for check in told["checks"]}


def test_doctor_names_the_remedy(tmp_path: Path) -> None:
    told = result(jisu("doctor", "--json", PATH=str(tmp_path), CC="", CXX=""), 1)
    lines = {check["name"]: check for check in told["checks"]}
    assert lines["linker"]["status"] == "problem" and "gcc" in lines["linker"]["remedy"]
    assert lines["self test"]["status"] == "problem" and "no C compiler" in lines["self test"]["detail"]


@pytest.mark.slow
def test_demo_writes_and_races() -> None:
    told = result(jisu("demo", "--threads", "1", "--json"))
    assert told["text"].startswith("When a module is imported") and len(told["text"]) > 100
    for key in ("decode_tokens_per_s", "eager_decode_tokens_per_s", "ratio"):
        assert 0 < told[f"{key}_min"] <= told[key] <= told[f"{key}_max"]
    assert told["ratio"] > 1 and told["dtype"] == "bfloat16" and told["threads"] == 1
