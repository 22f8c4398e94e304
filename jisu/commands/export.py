"""`jisu export`: a program, or a checkpoint, as a folder for the owner of a TPU."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import attrs

import jisu
from jisu.commands import units
from jisu.commands.shell import Shell, table
from jisu.commands.source import Options, compile_checkpoint, load_artifact, recognise
from jisu.compiler.errors import InputError

if TYPE_CHECKING:
    from rich.console import Console


@attrs.frozen
class Shapes:
    """The fixed sizes of what is exported; see `jisu.export`."""

    batch: int
    buckets: tuple[int, ...]
    capacity: int | None
    sizes: Mapping[str, int]
    kernels: bool = False


def run(
    shell: Shell, path: str, folder: str, options: Options, chip: str | None, shapes: Shapes, overwrite: bool
) -> None:
    """Export the program at `path`, which a checkpoint is compiled to first."""
    kind = recognise(path)
    from jisu.targets.tpu import bundle
    from jisu.targets.tpu.chip import Chip
    from jisu.targets.tpu.export import require

    if shapes.capacity is not None and max(shapes.buckets) > shapes.capacity:
        raise InputError(f"a bucket of {max(shapes.buckets)} tokens exceeds the capacity of {shapes.capacity}")
    name = None if chip is None else Chip.named(chip).name
    bundle.check_place(folder, overwrite)  # before the long work
    require()
    if kind == "artifact":
        opened = load_artifact(path, options)
    else:
        opened = compile_checkpoint(shell, path, attrs.evolve(options, target=name or "tpu"))
    with shell.progress() as tell:
        manifest = jisu.export(
            opened.program, folder, batch=shapes.batch, buckets=shapes.buckets, capacity=shapes.capacity,
            sizes=shapes.sizes, chip=name, kernels=shapes.kernels, overwrite=overwrite, progress=tell,
        )  # fmt: skip
    files = {name: (Path(folder) / name).stat().st_size for name in (*manifest["sha256"], "manifest.json")}
    result = {
        "path": os.path.abspath(folder),
        "chip": manifest["chip"],
        "kind": manifest["kind"],
        "batch": manifest["batch"],
        "capacity": manifest.get("capacity"),
        "programs": [p["name"] for p in manifest["programs"]],
        "kernels": [k["file"] for k in manifest["kernels"]],
        "files": files,
        "bytes": sum(files.values()),
        "expected_results": "simulated",
        "run_on_tpu": False,
        "jisu_version": jisu.__version__,
    }

    def show(console: Console) -> None:
        console.print(f"{folder}: {manifest['kind']} for {manifest['chip']}, {units.nbytes(result['bytes'])}\n")
        rows = [
            [p["name"], ", ".join(f"{k} {v}" for k, v in p["sizes"].items()) or "fixed", str(len(p["state"])), units.nbytes(files[p["mlir"]])]
            for p in manifest["programs"]
        ]  # fmt: skip
        console.print(table("Programs", ("<program", "<sizes", "updated in place", "StableHLO"), rows))
        console.print(
            f"{len(manifest['kernels'])} kernels as Pallas source, to be read; the programs leave products to XLA"
            + (", but for those that run_tpu.py takes with --kernels" if shapes.kernels else "")
        )
        console.print("expected results: simulated on this machine's processor; nothing was run on a TPU")
        console.print(f'on a TPU: pip install "jax[tpu]" flatbuffers; python {Path(folder) / bundle.SCRIPT}')
        console.print(f"here: python {Path(folder) / bundle.SCRIPT} --cpu")

    shell.finish(result, show)
