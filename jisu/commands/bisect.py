"""`jisu bisect`: the first pass after which a model no longer means the same."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from jisu.commands.shell import Progress, Shell
from jisu.commands.source import Options, compile_checkpoint, recognise, token_ids
from jisu.compiler.errors import InputError, JisuError
from jisu.compiler.graph import Graph
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import TOLERANCE, Pass, Pipeline, relative_error
from jisu.compiler.recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console

    from jisu.compiler.driver import Source


def run(shell: Shell, model: str, prompt: str, options: Options) -> None:
    """Compare the meaning of `model` on `prompt` before and after passes, then that of the compiled program.

    What a recipe's lossy passes change is meant: layout and program are compared with what these leave. The reference interpreter computes
    all of it, so it takes a while: a short prompt is enough.
    """
    from jisu.compiler.driver import capture, compressed, layout
    from jisu.compiler.storage import cache_folder
    from jisu.passes import default_passes
    from jisu.targets.target import Target

    if recognise(model) != "checkpoint":
        raise InputError(f"{model!r} is compiled already; give the checkpoint's folder")
    recipe, machine = Recipe.resolve(options.recipe), Target.resolve(options.target or "cpu")
    exact, last = default_passes(recipe.fuse, recipe.max_fold_bytes), layout(recipe, machine)
    with shell.progress() as tell:
        tell("tracing", 0.0)
        kept = cache_folder(Path(options.cache_dir) if options.cache_dir is not None else None)
        source = capture(model, None, None, None, kept)
        ids = _ids(prompt, source)
        tell("rewriting and comparing", 0.3)
        broken = _first_broken(source.graph, ids, exact)
        if broken is None:
            source = compressed(source, recipe, (), None, None, _part_of(tell), kept)
            broken = _first_broken(source.graph, ids, last)
        tell("compared", 1.0)
    compiled_error = None if broken is not None else _compiled_error(shell, model, options, source.graph, ids)
    tolerance = TOLERANCE.get(source.graph.outputs[0].dtype, 0.0)
    at_fault = broken.name if broken else None
    if compiled_error is not None and compiled_error > tolerance:
        at_fault = "kernels"
    passes = (*exact, *last)
    result: dict[str, Any] = {
        "at_fault": at_fault,
        "passes": [step.name for step in passes],
        "compiled_error": compiled_error,
        "tolerance": tolerance,
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


def _part_of(tell: Progress) -> Progress:
    """What tells of all passes as a part of the work."""
    return lambda stage, done: tell(stage, 0.6 + 0.2 * done)


def _ids(prompt: str, source: Source) -> np.ndarray:
    """Token ids int64 [1, n] of the prompt: its text, or without a tokenizer the ids that it names."""
    from jisu.runtime.tokenizer import Tokenizer

    ids = Tokenizer.from_files(source.files).encode(prompt) if "tokenizer.json" in source.files else token_ids(prompt)
    if not ids or max(ids) >= source.vocabulary:
        raise InputError(f"the prompt must have at least one token, all below {source.vocabulary}; got {ids}")
    return np.array([ids], np.int64)


def _samples(graph: Graph, ids: np.ndarray) -> list[np.ndarray]:
    positions = np.arange(ids.shape[1], dtype=np.int64)[None]
    return [positions if node.name == "position_ids" else ids for node in graph.inputs]


def _first_broken(graph: Graph, ids: np.ndarray, passes: tuple[Pass, ...]) -> Pass | None:
    return Pipeline(passes).bisect(graph, _samples(graph, ids))


def _compiled_error(shell: Shell, model: str, options: Options, graph: Graph, ids: np.ndarray) -> float:
    """Error of the compiled program's logits, relative to the largest of the graph's."""
    try:
        program = compile_checkpoint(shell, model, options).program
        return relative_error(program.session().append(ids), interpret(graph, _samples(graph, ids))[0])
    except JisuError as error:
        raise JisuError(f"all passes keep the meaning, but the program doesn't compile or run: {error}") from error
