"""`jisu merge`: several checkpoint folders become one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console

import jisu
from jisu.commands import units
from jisu.commands.shell import Shell, peak_rss_bytes
from jisu.commands.source import recognise
from jisu.compiler.errors import InputError


def run(shell: Shell, models: Sequence[str], out: str, weights: str | None, options: Mapping[str, Any]) -> None:
    """Merge `models` into the new folder `out`. weights: numbers with commas between them."""
    for path in (*models, *([options["base"]] if options["base"] is not None else [])):
        if recognise(path) == "artifact":
            raise InputError(f"{path!r} is compiled already; give the checkpoint's folder")
    with shell.progress() as tell:
        merged = jisu.merge(models, weights=_numbers(weights), out=out, progress=tell, **options)
    size = os.path.getsize(os.path.join(out, "model.safetensors"))
    result = {
        "path": os.path.abspath(out),
        "method": options["method"],
        "models": list(models),
        "base": options["base"],
        "weights_bytes": size,
        "vocabulary": merged.vocabulary,
        "peak_rss_bytes": peak_rss_bytes(),
    }

    def show(console: Console) -> None:
        console.print(f"{out}: {len(models)} models merged by {options['method']}, {units.nbytes(size)}")
        console.print(f"try: jisu compile {out} -o {out.rstrip(os.sep)}.jisu")

    shell.finish(result, show)


def _numbers(text: str | None) -> list[float] | None:
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--weights: expected numbers with commas between them, such as 0.3,0.7, got {text!r}"
        ) from None
