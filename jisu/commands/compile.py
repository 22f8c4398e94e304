"""`jisu compile`: a checkpoint folder becomes a saved program."""

from __future__ import annotations

import os
from pathlib import Path

from rich.console import Console

import jisu
from jisu.commands import units
from jisu.commands.shell import Shell, peak_rss_bytes
from jisu.commands.source import Options, compile_checkpoint, recipe_name, recognise
from jisu.compiler.errors import InputError
from jisu.compiler.launches import CUBIN, PTX
from jisu.compiler.storage import check_parent


def run(shell: Shell, model: str, out: str, options: Options) -> None:
    """Compile `model` and save it at `out`."""
    if recognise(model) == "artifact":
        raise InputError(f"{model!r} is compiled already; give the checkpoint's folder")
    if options.threads is not None and options.tune is False:
        raise InputError(
            "--threads is for --tune; a saved program runs on as many threads as its user says, such as jisu generate --threads"
        )
    _check_place(out)
    opened = compile_checkpoint(shell, model, options)
    program = opened.program
    program.save(out)
    decoder = program.decoder
    result = {
        "path": os.path.abspath(out),
        "kind": "module" if decoder is None else "decoder",
        "target": program.target["name"],
        "recipe": recipe_name(program, options.recipe),
        "threads": program.num_threads,
        "compile_s": opened.compile_s,
        "times": program.explain().get("times", {}),
        "weights_bytes": program.weights_bytes,
        "artifact_bytes": _size(Path(out)),
        "cache": program.explain().get("cache"),
        "peak_rss_bytes": peak_rss_bytes(),
        "jisu_version": jisu.__version__,
    }

    def show(console: Console) -> None:
        console.print(
            f"{out}: {result['kind']} for {result['target']}, {units.nbytes(program.weights_bytes)} of weights, "
            f"compiled in {units.seconds(opened.compile_s)}"
        )
        if decoder is not None and decoder.reason:
            console.print(f"without a KV cache: {decoder.reason}")
        if PTX in program.parts.code and CUBIN not in program.parts.code:
            console.print(
                "without machine code, as there is no ptxas here: a GPU's driver compiles the PTX when the program is loaded; "
                "`pip install nvidia-cuda-nvcc` brings one"
            )
        console.print(f"not here: {program.lacks}" if program.lacks else f"try: jisu generate {out} --prompt '…'")

    shell.finish(result, show)


def _check_place(out: str) -> None:
    """Fail before the long work where the program couldn't be saved after it."""
    check_parent(out)
    place = Path(out)
    names = os.listdir(place) if place.is_dir() else []
    if names and not {"config.json", "manifest.json"} & set(names):
        raise InputError(
            f"{out!r} holds other files, such as {min(names)!r}; choose another place for the compiled program"
        )
    empty = place.is_dir() and not names or place.is_file() and not place.stat().st_size
    if place.exists() and not empty and recognise(out) != "artifact":
        raise InputError(f"{out!r} holds a checkpoint; choose another place for the compiled program")


def _size(place: Path) -> int:
    files = place.rglob("*") if place.is_dir() else [place]
    return sum(f.stat().st_size for f in files if f.is_file())
