"""What a path on the command line is, and the program behind it: a checkpoint is compiled, an artifact is loaded."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import attrs

from jisu.commands.shell import Shell
from jisu.compiler.errors import InputError

if TYPE_CHECKING:
    from jisu.runtime.program import Program

Kind = Literal["checkpoint", "artifact"]
_MAGIC = b"JISU"


@attrs.frozen
class Options:
    """How a checkpoint is compiled; None where the user said nothing."""

    target: str | None = None
    recipe: str | None = None
    threads: int | None = None
    cache_dir: str | None = None
    check: str = "verify"
    dump: str | None = None
    calibration: str | None = None
    training: str | None = None
    ledger: bool = False
    tune: bool | float = False


@attrs.frozen
class Opened:
    """A program and how long it took to get: one of the times is None."""

    program: Program
    compile_s: float | None
    load_s: float | None


def recognise(path: str) -> Kind:
    """What lies at `path`, by its content. Raises InputError, with what was found, if it is neither."""
    place = Path(path)
    if place.is_dir():
        names = set(os.listdir(place))
        if "manifest.json" in names:
            return "artifact"
        if "config.json" in names:
            return "checkpoint"
        raise InputError(
            f"{path!r} is a folder with neither config.json (a checkpoint) nor manifest.json (a saved program)"
        )
    if place.is_file():
        with open(place, "rb") as file:
            if file.read(len(_MAGIC)) == _MAGIC:
                return "artifact"
        hint = "; give the checkpoint's folder" if place.suffix in (".safetensors", ".json", ".bin") else ""
        raise InputError(f"{path!r} is a file, but no saved program of jisu{hint}")
    if place.exists():
        raise InputError(f"{path!r} is neither a folder nor a file")
    hint = (
        "; nothing is ever downloaded, so give a local folder" if path.count("/") == 1 and path[0] not in "./~" else ""
    )
    raise InputError(f"{path!r}: there is no such file or folder{hint}")


def compile_checkpoint(shell: Shell, path: str, options: Options) -> Opened:
    """Compile the checkpoint folder at `path`, showing progress."""
    import jisu

    begin = time.perf_counter()
    with shell.progress() as tell:
        program = jisu.compile(
            path,
            target=options.target or "cpu",
            recipe=options.recipe,
            num_threads=options.threads,
            check=options.check,
            dump=options.dump,
            cache_dir=options.cache_dir,
            calibration=options.calibration,
            training=options.training,
            ledger=options.ledger,
            tune=options.tune,
            progress=tell,
        )
    return Opened(program, time.perf_counter() - begin, None)


def load_artifact(path: str, options: Options) -> Opened:
    """Load the saved program at `path`. Raises InputError for options that only compiling has."""
    import jisu

    given = [name for name in ("target", "recipe", "cache_dir") if getattr(options, name) is not None]
    if given:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise InputError(f"{path!r} is compiled already, so {names} can't change it; give the checkpoint's folder")
    begin = time.perf_counter()
    program = jisu.load(path, num_threads=options.threads)
    return Opened(program, None, time.perf_counter() - begin)


def open_program(shell: Shell, path: str, options: Options) -> Opened:
    """The program at `path`, whatever it is."""
    if recognise(path) == "artifact":
        return load_artifact(path, options)
    return compile_checkpoint(shell, path, options)


def token_ids(prompt: str) -> list[int]:
    """The ids that a prompt for a model without a tokenizer names, apart by blanks or commas; raises InputError for any other text."""
    words = prompt.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise InputError(f"the model has no tokenizer.json; give token ids such as '1 2 3', not {prompt!r}")
    return [int(word) for word in words]


def recipe_name(program: Program, given: str | None = None) -> str:
    """What to call a program's recipe: what the user gave, the preset that it equals, or "custom"."""
    from jisu.compiler.recipe import PRESETS

    if given is not None:
        return given
    return next((name for name, preset in PRESETS.items() if preset.to_toml() == program.recipe), "custom")
