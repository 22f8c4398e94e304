"""`jisu search`: recipes of least loss within budgets, as TOML files, figures and a plot."""

from __future__ import annotations

import json
import math
import re
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jisu
from jisu.commands import units
from jisu.commands.shell import Shell, table
from jisu.commands.source import Options, recognise
from jisu.compiler.errors import InputError
from jisu.compiler.storage import check_parent

if TYPE_CHECKING:
    from rich.console import Console

    from jisu.passes.compression.search import Front

_UNITS = {"": 1, "b": 1, "kb": 1000, "mb": 1000**2, "gb": 1000**3, "kib": 1024, "mib": 1024**2, "gib": 1024**3}


def size_of(text: str) -> float:
    """Bytes of "2.5MB", "900 KiB" or "1500000"; raises InputError for anything else."""
    found = re.fullmatch(r"\s*([0-9.]+)\s*([a-z]*)\s*", text.lower())
    if (
        found is None
        or found[2] not in _UNITS
        or found[1].count(".") > 1
        or not float(found[1] if found[1] != "." else 0)
    ):
        raise InputError(f"a size is a number of bytes such as 1500000, 2.5MB or 900KiB, not {text!r}")
    return float(found[1]) * _UNITS[found[2]]


def run(
    shell: Shell, model: str, options: Options, calibration: str, held_out: str | None, out: str, budgets: Sequence[str],
    latency: float | None,
) -> None:  # fmt: skip
    """Search for the checkpoint folder `model`, and write what was found to the new folder `out`."""
    if recognise(model) == "artifact":
        raise InputError(f"{model!r} is compiled already; give the checkpoint's folder")
    place = Path(out)
    if place.exists():
        raise InputError(f"{out!r} exists already; choose a new folder")
    check_parent(out)
    sizes = [size_of(b) for b in budgets]
    with shell.progress() as tell:
        front = jisu.search(
            model, options.target or "cpu", calibration=calibration, held_out=held_out, budgets=sizes,
            seconds=math.inf if latency is None else latency / 1000, recipe=options.recipe, cache_dir=options.cache_dir,
            progress=tell,
        )  # fmt: skip
    figure = plot(front)
    names = _write(front, place, figure)
    points = [{**point.as_dict(), "file": name} for point, name in zip(front.points, names, strict=True)]
    rows = [
        [p["file"], units.nbytes(p["bytes"]), units.seconds(p["predicted_s"]), f"{p['loss']:.4f} ± {p['stderr']:.4f}", f"{p['expected']:.4f}",
         "" if p["on_front"] else "no"] for p in points
    ]  # fmt: skip

    def show(console: Console) -> None:
        columns = ("<recipe", "weights", "predicted", "loss", "expected", "on the front")
        console.print(table(f"Recipes in {out} ({front.unit})", columns, rows))
        console.print(
            f"plot: {out}/front.html"
            if figure is not None
            else "no plot: plotly isn't installed (pip install 'jisu[plot]')"
        )
        console.print(f"as it was: {units.nbytes(front.dense_bytes)}; try: jisu compile {model} --recipe {out}/{names[-1]} "
                      f"--calibration {calibration} --out …")  # fmt: skip

    shell.finish({**front.as_dict(), "points": points, "path": str(place.absolute())}, show)


def _write(front: Front, place: Path, figure: str | None) -> list[str]:
    """The folder with everything, whole or not at all; the recipes' names."""
    staging = Path(tempfile.mkdtemp(dir=place.absolute().parent, prefix=".jisu-"))
    try:
        names: list[str] = []
        for point in front.points:
            name = f"{point.bytes}.toml"
            names.append(name if name not in names else f"{point.bytes}-{len(names)}.toml")
            (staging / names[-1]).write_text(point.recipe.to_toml())
        (staging / "front.json").write_text(json.dumps(front.as_dict(), indent=1) + "\n")
        if figure is not None:
            (staging / "front.html").write_text(figure)
        staging.chmod(0o755)
        staging.rename(place)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise
    return names


def plot(front: Front) -> str | None:
    """The front as one HTML page; None where plotly isn't installed (`pip install jisu[plot]`)."""
    try:
        from plotly import graph_objects as draw
    except ImportError:
        return None
    figure = draw.Figure()
    for on_front, name in ((True, "Pareto front"), (False, "beaten by another")):
        part = [p for p in front.points if p.on_front == on_front]
        figure.add_scatter(
            x=[p.bytes for p in part], y=[p.loss for p in part], mode="lines+markers" if on_front else "markers", name=name,
            error_y={"array": [0.0 if math.isnan(p.stderr) else p.stderr for p in part]},
            text=[f"{p.predicted_s * 1e3:.3g} ms predicted per token" for p in part],
        )  # fmt: skip
    figure.update_layout(
        title="Recipes, each made and measured", xaxis_title="bytes of weights", yaxis_title=f"loss ({front.unit})"
    )
    return str(figure.to_html(include_plotlyjs=True))
