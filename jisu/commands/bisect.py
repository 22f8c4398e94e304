"""`jisu bisect`: the first pass after which a model no longer means the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jisu.commands.shell import Progress, Shell
from jisu.commands.source import Options, compile_checkpoint, recognise
from jisu.compiler.errors import InputError, JisuError
from jisu.compiler.graph import Graph
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import TOLERANCE, Pass, Pipeline, relative_error
from jisu.compiler.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from jisu.frontends.checkpoint import Decoder


def run(shell: Shell, model: str, prompt: str, options: Options) -> None:
    """Compare the meaning of `model` on `prompt` before and after passes, then that of the compiled program.

    The reference interpreter computes all of them, so it takes a while: a short prompt is enough.
    """
    from jisu.compiler.storage import cache_folder
    from jisu.frontends.checkpoint import load_checkpoint

    if recognise(model) != "checkpoint":
        raise InputError(f"{model!r} is compiled already; give the checkpoint's folder")
    passes = _passes(options)
    with shell.progress() as tell:
        tell("tracing", 0.0)
        kept = cache_folder(Path(options.cache_dir) if options.cache_dir is not None else None)
        decoder = load_checkpoint(Path(model), kept)
        ids = _ids(model, prompt, decoder)
        tell("rewriting and comparing", 0.3)
        broken, want = _first_broken(decoder.graph, ids, passes, tell)
    compiled_error = None if broken is not None else _compiled_error(shell, model, options, ids, want)
    dtype = decoder.graph.outputs[0].dtype
    at_fault = broken.name if broken else None
    if compiled_error is not None and compiled_error > TOLERANCE.get(dtype, 0.0):
        at_fault = "kernels"
    result: dict[str, Any] = {
        "at_fault": at_fault,
        "passes": [step.name for step in passes],
        "compiled_error": compiled_error,
        "tolerance": TOLERANCE.get(dtype, 0.0),
        "tokens": ids.shape[1],
    }

    def show(console: Console) -> None:
        if broken is not None:
            console.print(f"the first pass that breaks the model is {broken.name!r}")
        elif at_fault:
            console.print(f"all {len(passes)} passes keep the meaning, but the kernels are off by {compiled_error:.3g}")
        else:
            console.print(
                f"all {len(passes)} passes keep the meaning; the compiled program is off by {compiled_error:.3g}"
            )

    shell.finish(result, show)


def _passes(options: Options) -> tuple[Pass, ...]:
    """The passes that keep the graph's inputs and outputs, in the driver's order."""
    from jisu.passes import default_passes, layout_passes
    from jisu.targets import facts
    from jisu.targets.target import Target

    recipe = Recipe.resolve(options.recipe)
    machine = Target.resolve(options.target or "cpu")
    kernels = facts.of(machine)
    panel, pair = kernels.packing(machine)
    return (
        *default_passes(recipe.fuse, recipe.max_fold_bytes),
        *layout_passes(panel, pair if recipe.pack else {}, levels=kernels.levels(machine)),
    )


def _ids(model: str, prompt: str, decoder: Decoder) -> np.ndarray:
    """Token ids int64 [1, n] of the prompt: its text, or ids separated by blanks or commas without a tokenizer."""
    from jisu.runtime.tokenizer import Tokenizer

    if "tokenizer.json" in decoder.files:
        ids = Tokenizer.from_folder(model).encode(prompt)
    else:
        words = prompt.replace(",", " ").split()
        if not words or not all(w.isdecimal() for w in words):
            raise InputError(f"{model!r} has no tokenizer.json; give token ids such as --prompt '1 2 3'")
        ids = [int(w) for w in words]
    if not ids or max(ids) >= decoder.vocabulary:
        raise InputError(f"the prompt must have at least one token, all below {decoder.vocabulary}; got {ids}")
    return np.array([ids], np.int64)


def _first_broken(
    graph: Graph, ids: np.ndarray, passes: tuple[Pass, ...], tell: Progress
) -> tuple[Pass | None, np.ndarray]:
    positions = np.arange(ids.shape[1], dtype=np.int64)[None]
    samples = [positions if node.name == "position_ids" else ids for node in graph.inputs]
    want = interpret(graph, samples)[0]
    broken = Pipeline(passes).bisect(graph, samples)
    tell("compared", 1.0)
    return broken, want


def _compiled_error(shell: Shell, model: str, options: Options, ids: np.ndarray, want: np.ndarray) -> float:
    """Error of the compiled program's logits, relative to the largest."""
    try:
        program = compile_checkpoint(shell, model, options).program
        return relative_error(program.session().append(ids), want)
    except JisuError as error:
        raise JisuError(f"all passes keep the meaning, but the program doesn't compile or run: {error}") from error
