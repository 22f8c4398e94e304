"""`jisu doctor`: whether this machine and installation can compile, line by line, each trouble with its remedy."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import attrs
import typer

import jisu
from jisu.commands import units
from jisu.commands.shell import Shell
from jisu.compiler.errors import CompileError, JisuError

if TYPE_CHECKING:
    from rich.console import Console

Status = Literal["ok", "warning", "problem"]
_LEAST_FREE = 1 << 30  # bytes of disk that compiling a small model may need
_SELF_TEST_S = 600


@attrs.frozen
class Check:
    """One line: what was looked at, how it is, and, unless all is well, what to do."""

    name: str
    status: Status
    detail: str
    remedy: str = ""


def run(shell: Shell) -> None:
    """Print all checks. Raises typer.Exit(1) if one of them would stop compiling."""
    steps: tuple[Callable[[], Iterator[Check]], ...] = (
        _system,
        _packages,
        _compiler,
        _gpu,
        _tpu,
        _folders,
        _environment,
        _self_test,
    )
    checks: list[Check] = []
    with shell.progress() as tell:
        for done, step in enumerate(steps):
            tell(step.__name__.strip("_").replace("_", " "), done / len(steps))
            checks += step()
    failed = any(check.status == "problem" for check in checks)
    result: dict[str, Any] = {
        "ok": not failed,
        "jisu_version": jisu.__version__,
        "checks": [attrs.asdict(check) for check in checks],
    }

    def show(console: Console) -> None:
        width = max(len(check.name) for check in checks)
        for check in checks:
            console.print(f"{check.status:8} {check.name:{width}}  {check.detail}", soft_wrap=True)
            if check.remedy:
                console.print(f"{'':8} {'':{width}}  remedy: {check.remedy}", soft_wrap=True)
        console.print("something stops jisu from compiling" if failed else "jisu can compile here")

    shell.finish(result, show)
    if failed:
        raise typer.Exit(1)


# --- The checks ----------------------------------------------------------------------------------------------------


def _system() -> Iterator[Check]:
    from jisu.targets.target import host

    version = platform.python_version()
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        yield Check("python", "ok", version)
    else:
        yield Check("python", "problem", version, "use Python 3.10 to 3.13, which TVM and torch have builds for")
    if sys.platform == "linux":
        yield Check("system", "ok", platform.platform())
    else:
        yield Check("system", "problem", platform.platform(), "use Linux; on Windows, WSL 2 is one")
    machine = host()
    memory = units.nbytes(machine.memory_bytes)
    yield Check("processor", "ok", f"{machine.source}; {machine.cores} cores to use, {memory} of memory")
    features = ", ".join(sorted(machine.features)) or "none"
    if machine.vector_bytes >= 32:
        yield Check("features", "ok", f"{machine.mcpu}: {features}")
    else:
        remedy = "programs run, but slowly: a processor with AVX2 (or a virtual machine that doesn't hide it) helps"
        yield Check("features", "warning", f"{machine.mcpu}: {features}", remedy)


def _packages() -> Iterator[Check]:
    """Each declared dependency against what is installed."""
    try:
        from packaging.requirements import Requirement
    except ImportError:
        yield Check("packages", "problem", "the package 'packaging' is missing", "pip install packaging")
        return
    for line in importlib.metadata.requires("jisu") or ():
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        wanted = f"{requirement.name}{requirement.specifier}"
        try:
            found = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(requirement.name, "problem", f"is not installed, {wanted} is needed", f"pip install '{wanted}'")
            continue
        if requirement.specifier.contains(found, prereleases=True):
            pinned = " (pinned)" if "==" in str(requirement.specifier) else ""
            yield Check(requirement.name, "ok", f"{found}{pinned}")
        else:
            yield Check(
                requirement.name, "problem", f"{found} is installed, {wanted} is needed", f"pip install '{wanted}'"
            )


def _compiler() -> Iterator[Check]:
    from jisu.targets.worker import find_linker

    try:
        yield Check("linker", "ok", " ".join(find_linker()))
    except CompileError as error:
        yield Check(
            "linker", "problem", str(error), "apt install gcc (or your system's equivalent), or set CC to a compiler"
        )


def _gpu() -> Iterator[Check]:
    """Whether programs for CUDA run here, and whether machine code can be made for them."""
    from jisu.compiler.errors import TargetError
    from jisu.targets.cuda.assembler import find_assembler
    from jisu.targets.target import Target

    try:
        yield Check("GPU", "ok", Target.resolve("cuda").source)
    except TargetError as error:
        detail = str(error).partition(": ")[2].partition("; use target")[0]
        yield Check("GPU", "ok", f"none ({detail}); programs for CUDA can be compiled here, not run")
    found = find_assembler()
    if found:
        yield Check("ptxas", "ok", found)
    else:
        remedy = "programs for CUDA hold PTX alone, which a GPU's driver compiles when they are loaded; for machine code: pip install nvidia-cuda-nvcc"
        yield Check("ptxas", "ok", f"none; {remedy}")


def _tpu() -> Iterator[Check]:
    """Whether programs can be exported for TPUs, and compiled by Google's compiler, which needs none."""
    for name, package, extra, what in (
        ("JAX", "jax", "tpu", "TPU programs can be simulated here, not exported"),
        ("libtpu", "libtpu", "tpu-aot", "exports can't be compiled here for a chip"),
    ):
        try:
            yield Check(name, "ok", importlib.metadata.version(package))
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "ok", f'none; {what}: pip install "jisu[{extra}]"')


def _folders() -> Iterator[Check]:
    from jisu.compiler.storage import cache_folder

    for name, folder, remedy in (
        (
            "cache folder",
            cache_folder(None),
            "set JISU_CACHE_DIR to a folder that can be written; without one, every compilation is new",
        ),
        ("temporary folder", Path(tempfile.gettempdir()).parent, "set TMPDIR to a folder that can be written"),
    ):
        existing = next(p for p in (folder, *folder.parents) if p.exists())
        free = shutil.disk_usage(existing).free
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) if name == "cache folder" else 0
        held = f", holds {units.nbytes(size)}" if size else ""
        detail = f"{folder}{held}, {units.nbytes(free)} free"
        stops: Status = "warning" if name == "cache folder" else "problem"
        if not os.access(existing, os.W_OK):
            yield Check(name, stops, f"{detail}, can't be written", remedy)
        elif free < _LEAST_FREE:
            yield Check(name, "warning", detail, f"free some space: less than {units.nbytes(_LEAST_FREE)} is left")
        else:
            yield Check(name, "ok", detail)


def _environment() -> Iterator[Check]:
    for name in ("JISU_DUMP", "JISU_VERIFY", "JISU_BISECT"):
        if os.environ.get(name):
            yield Check(
                name,
                "warning",
                f"is set to {os.environ[name]!r}: a debugging aid that changes how jisu compiles",
                f"unset {name}",
            )


def _self_test() -> Iterator[Check]:
    """Compile and run in a process of its own: what crashes there is a line here."""
    program = (
        f"import sys; sys.path[:] = {sys.path!r}; from jisu.commands.doctor import compile_and_run; compile_and_run()"
    )
    try:
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=_SELF_TEST_S)
    except subprocess.TimeoutExpired:
        yield Check("self test", "problem", f"took longer than {_SELF_TEST_S} s", "look for other load on this machine")
        return
    if done.returncode == 0:
        yield Check("self test", "ok", done.stdout.strip())
        return
    lines = [line for line in done.stderr.strip().splitlines() if line.strip()]
    how = f"exit status {done.returncode}" if done.returncode > 0 else f"signal {-done.returncode}"
    remedy = "mend the problems above first; if there are none, please report this with `jisu doctor --json`"
    yield Check("self test", "problem", f"{how}: {lines[-1] if lines else 'without a word'}", remedy)


def compile_and_run() -> None:
    """Compile a tiny module without the compile cache, run it, and compare it with eager mode; says how long it took.

    Raises JisuError where the results differ.
    """
    import time

    import torch

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(64, 96), torch.nn.SiLU(), torch.nn.Linear(96, 32)).eval()
    x = torch.randn(5, 64)
    with tempfile.TemporaryDirectory() as cache:
        begin = time.perf_counter()
        program = jisu.compile(module, example_inputs=(x,), cache_dir=cache)
        taken = time.perf_counter() - begin
    with torch.no_grad():
        error = float((program(x) - module(x)).abs().max())
    if not error < 1e-4:
        raise JisuError(f"a compiled module is off by {error:.3g} from PyTorch")
    print(f"compiled a small module in {taken:.1f} s, its largest error is {error:.1g}")
