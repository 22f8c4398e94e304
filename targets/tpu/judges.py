"""Outsiders that judge emitted kernels, neither of which needs a TPU: JAX's TPU interpreter, and Google's TPU compiler, libtpu.

Both are optional: `pip install jisu[tpu]` brings JAX, `jisu[tpu-aot]` libtpu, which is proprietary and compiles without a TPU. What they
say is about values, synchronisation and acceptance; it is no measurement of speed.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import numpy as np

from jisu.compiler.errors import CompileError, InputError, TargetError
from jisu.targets.tpu.code import Code
from jisu.targets.tpu.export import CHIPS

DMA = ("on_wait", "eager")
"""When the interpreter's copies land."""
AOT_PYTHON = "JISU_TPU_AOT_PYTHON"
"""The environment variable that names a Python with jax and libtpu, where this one has none."""
_LOCK = threading.Lock()


@attrs.frozen(eq=False)
class Interpreted:
    """What the interpreter made of a kernel: its result, whether it saw a race, and its lines about semaphores that weren't zero at the end."""

    result: np.ndarray
    raced: bool
    left: tuple[str, ...]

    @property
    def clean(self) -> bool:
        """Whether copies and waits fit together."""
        return not self.raced and not self.left


def interpret(source: str, *arrays: np.ndarray, dma: str = "on_wait") -> Interpreted:
    """Run a kernel's source in JAX's TPU interpreter, with its detector of races. InputError: `dma` is neither "on_wait" nor "eager"; TargetError: no JAX.

    The detector misses races; only both modes together, equal values and no semaphore left say that a kernel's waits are right.
    """
    if dma not in DMA:
        raise InputError(f"dma must be one of {', '.join(DMA)}, got {dma!r}")
    try:
        from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
        from jax.experimental.pallas import tpu as pltpu
    except ImportError as error:
        raise TargetError('the TPU interpreter comes with JAX: pip install "jisu[tpu]"') from error
    module: dict[str, Any] = {"__name__": "kernel"}
    exec(compile(source, "<kernel>", "exec"), module)
    parameters = pltpu.InterpretParams(dma_execution_mode=dma, detect_races=True)
    said = io.StringIO()
    with _LOCK, contextlib.redirect_stdout(said):
        result = np.asarray(module["kernel"](*arrays, interpret=parameters))
        races = interpreter.races
        raced = races is not None and bool(races.races_found)
    left = tuple(line for line in said.getvalue().splitlines() if line.startswith("Semaphore"))
    return Interpreted(result, raced, left)


@attrs.frozen
class Accepted:
    """A kernel that libtpu compiled for a chip: bytes of generated code, and what libtpu estimates (an estimate, not a measurement)."""

    chip: str
    code_bytes: int
    estimates: dict[str, float] = attrs.field(hash=False)


def aot_python() -> str | None:
    """A Python that has jax and libtpu: the one that `JISU_TPU_AOT_PYTHON` names, or this one; None where neither has."""
    for python in filter(None, (os.environ.get(AOT_PYTHON), sys.executable)):
        command = [
            python,
            "-c",
            "import importlib.util as u, sys; sys.exit(not (u.find_spec('jax') and u.find_spec('libtpu')))",
        ]
        if subprocess.run(command, check=False, capture_output=True).returncode == 0:
            return python
    return None


def libtpu_version() -> str:
    """Of the libtpu that compiles; TargetError without one."""
    if (python := aot_python()) is None:
        raise TargetError(f'no libtpu: pip install "jisu[tpu-aot]", or let {AOT_PYTHON} name a Python that has it')
    asked = [python, "-c", "from importlib.metadata import version; print(version('libtpu'))"]
    return subprocess.run(asked, check=True, capture_output=True, text=True).stdout.strip()


def compile_ahead(sources: Sequence[str], chips: Sequence[str]) -> list[list[Accepted]]:
    """Compile kernels' sources with libtpu, each for all chips. CompileError: libtpu refuses one, with its reason; TargetError: no libtpu."""
    return _compiled(sources, chips, {})


def codes(sources: Sequence[str], chip: str) -> list[Code]:
    """The bundles that libtpu makes of kernels' sources. Raises what `compile_ahead` does, and CompileError where libtpu writes others."""
    with tempfile.TemporaryDirectory() as folder:
        flags = (
            f"--xla_jf_dump_to={folder} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=final_bundles"
        )
        _compiled(sources, [chip], {"LIBTPU_INIT_ARGS": flags})
        # Names begin with the time at which the compiler began.
        found = sorted(p for p in Path(folder).iterdir() if re.search(r"-kernel\.\d+-\d+-final_bundles", p.name))
        if len(found) != len(sources):
            raise CompileError(f"libtpu wrote the bundles of {len(found)} kernels instead of {len(sources)}")
        return [Code.parsed(path.read_text()) for path in found]


def _compiled(sources: Sequence[str], chips: Sequence[str], more: Mapping[str, str]) -> list[list[Accepted]]:
    """more: further environment variables of libtpu's process."""
    python = aot_python()
    if python is None:
        raise TargetError(
            f'compiling for a TPU needs libtpu: pip install "jisu[tpu-aot]", or let {AOT_PYTHON} name a Python that has it'
        )
    unknown = [chip for chip in chips if chip not in CHIPS]
    if unknown:
        raise TargetError(f"unknown TPU chip {unknown[0]!r}; known: {', '.join(CHIPS)}")
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"kernel_{number}.py" for number in range(len(sources))]
        for path, source in zip(paths, sources, strict=True):
            path.write_text(source)
        # Without the last one, libtpu's lock lets a machine run one process at a time, as if each held the TPU.
        environment = {
            **os.environ,
            "TPU_SKIP_MDS_QUERY": "1",
            "JAX_PLATFORMS": "cpu",
            "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
            **more,
        }
        command = [python, "-c", _COMPILE, json.dumps([[chip, CHIPS[chip]] for chip in chips]), *map(str, paths)]
        done = subprocess.run(command, check=False, capture_output=True, text=True, env=environment)
    match = re.search(r"^RESULT (.*)$", done.stdout, re.MULTILINE)
    if match is None:
        raise CompileError(f"libtpu ended with {done.returncode}: {done.stderr[-2000:]}")
    results = json.loads(match[1])
    for result in (r for row in results for r in row if "error" in r):
        raise CompileError(f"libtpu refuses a kernel for {result['chip']}: {result['error']}")
    return [[Accepted(r["chip"], r["code_bytes"], r["estimates"]) for r in row] for row in results]


_COMPILE = """
import json, runpy, sys
import jax
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

def attempt(chip, topology, module):
    device = topologies.get_topology_desc(topology, platform="tpu").devices[0]
    sharding = SingleDeviceSharding(device)
    arguments = [jax.ShapeDtypeStruct(s, d, sharding=sharding) for s, d in zip(module["PADDED"], module["DTYPES"])]
    try:
        compiled = jax.jit(module["kernel"]).trace(*arguments).lower().compile()
    except Exception as error:
        return {"chip": chip, "error": f"{type(error).__name__}: {error}"[:2000]}
    estimates = {k: float(v) for k, v in (compiled.cost_analysis() or {}).items()}
    size = compiled.memory_analysis().generated_code_size_in_bytes
    return {"chip": chip, "code_bytes": int(size), "estimates": estimates}

modules = [runpy.run_path(path) for path in sys.argv[2:]]
print("RESULT", json.dumps([[attempt(chip, topology, m) for chip, topology in json.loads(sys.argv[1])] for m in modules]))
"""
