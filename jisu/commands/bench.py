"""`jisu bench`: how fast a program reads a prompt (prefill) and writes (decode)."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import numpy as np

import jisu
from jisu.commands.shell import Progress, Shell, peak_rss_bytes, table
from jisu.commands.source import Opened, Options, compile_checkpoint, load_artifact, recipe_name, recognise
from jisu.compiler.errors import InputError
from jisu.runtime.session import Sampling

if TYPE_CHECKING:
    from rich.console import Console

    from jisu.runtime.program import Program
    from jisu.runtime.session import Session


@attrs.frozen
class Load:
    """What is measured: `prompt` tokens read, `generated` tokens written, `batch` sequences at once, `repeat` times."""

    prompt: int
    generated: int
    batch: int = 1
    repeat: int = 5


@attrs.frozen
class Speeds:
    """Tokens per second over all sequences, one number per repetition."""

    prefill: tuple[float, ...]
    decode: tuple[float, ...]


def run(shell: Shell, path: str, options: Options, load: Load) -> None:
    """Measure the program at `path`."""
    opened = (
        load_artifact(path, options) if recognise(path) == "artifact" else _compiled_and_loaded(shell, path, options)
    )
    program = opened.program
    with shell.progress() as tell:
        speeds = measure(program, load, tell)
    result = {
        **spread("prefill_tokens_per_s", speeds.prefill),
        **spread("decode_tokens_per_s", speeds.decode),
        "compile_s": opened.compile_s,
        "load_s": opened.load_s,
        "peak_rss_bytes": peak_rss_bytes(),
        "weights_bytes": program.weights_bytes,
        "target": program.target["name"],
        "recipe": recipe_name(program, options.recipe),
        "jisu_version": jisu.__version__,
        "threads": program.num_threads,
        "batch": load.batch,
        "prompt": load.prompt,
        "gen": load.generated,
        "repeat": load.repeat,
        "dtype": program.dtype,
        "simulation": program.explain().get("simulation", ""),
    }

    def show(console: Console) -> None:
        rows = [
            [name, *(f"{v:,.1f}" for v in (statistics.median(found), min(found), max(found)))]
            for name, found in (("prefill", speeds.prefill), ("decode", speeds.decode))
        ]
        if result["simulation"]:
            console.print(f"{result['simulation']}: these are no speeds of {result['target']}")
        console.print(table(f"{path}: tokens per second", ("<", "median", "min", "max"), rows))
        for key in ("target", "recipe", "dtype", "threads", "batch", "prompt", "gen", "repeat"):
            console.print(f"  {key:16} {result[key]}")
        for key in ("compile_s", "load_s"):
            console.print(f"  {key:16} {'-' if result[key] is None else format(result[key], '.2f')}")
        for key in ("weights_bytes", "peak_rss_bytes"):
            console.print(f"  {key:16} {result[key]:,}")

    shell.finish(result, show)


def measure(program: Program, load: Load, tell: Progress) -> Speeds:
    """Speeds of reading random prompts and of greedy writing after them; one run before the first is not counted.

    Raises InputError where the program is no language model, or its positions don't suffice.
    """
    info = program.decoder
    if info is None:
        raise InputError("only causal language models can be measured: this program has no prefill and no decode")
    slots = load.prompt + load.generated
    if slots > info.max_positions:
        raise InputError(
            f"--prompt {load.prompt} and --gen {load.generated} exceed the model's {info.max_positions} positions"
        )
    session = program.session(slots)
    prefill, decode = [], []
    for repetition in range(-1, load.repeat):
        ids = np.random.default_rng(repetition + 1).integers(0, info.vocabulary, (load.batch, load.prompt))
        session.reset()
        begin = middle = time.perf_counter()
        for step in _written(session, ids, load.generated + 1):
            middle = middle if step else time.perf_counter()
            tell("measuring", (repetition + 1 + step / load.generated) / (load.repeat + 1))
        end = time.perf_counter()
        if repetition >= 0:
            prefill.append(load.batch * load.prompt / (middle - begin))
            decode.append(load.batch * load.generated / (end - middle))
    return Speeds(tuple(prefill), tuple(decode))


def _written(session: Session, ids: np.ndarray, count: int) -> Iterator[int]:
    """Read ids [b, n], then write `count` tokens, whose numbers come when they are there; where the program draws tokens, as `generate` does."""
    if not session.draws:
        for number in range(count):
            ids = session.append(ids, last_only=True)[:, -1:].argmax(-1)
            yield number
        return
    greedy = Sampling(*np.zeros((4, len(ids))))
    step = session.draw(ids, greedy)
    for number in range(count):
        following = session.draw(step, greedy) if number + 1 < count else step
        step.results()
        yield number
        step = following


def spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Median, smallest and largest under `name`, `name`_min and `name`_max."""
    return {name: statistics.median(values), f"{name}_min": min(values), f"{name}_max": max(values)}


def _compiled_and_loaded(shell: Shell, path: str, options: Options) -> Opened:
    """Compile, save, and load again, so that what runs is what a user of the saved program runs."""
    compiled = compile_checkpoint(shell, path, options)
    folder = Path(tempfile.mkdtemp())
    needed = compiled.program.weights_bytes
    if shutil.disk_usage(folder).free < 1.2 * needed:
        shell.note(f"load_s is left out: saving the program needs {needed:,} bytes in {folder.parent}")
        return compiled
    compiled.program.save(folder / "program")
    loaded = load_artifact(str(folder / "program"), Options(threads=options.threads))
    return Opened(loaded.program, compiled.compile_s, loaded.load_s)
