"""The process that runs TVM's compiler: requests and answers are lines of JSON over two pipes.

A request {"entries": {name: graph text}, "target": …, "schedules": …, "out": folder, "single": bool} is answered by lines
{"stage": …}, then one line {"result": …} or {"error": …, "kind": …}. With `single`, kernels are compiled one by one and
nothing is linked: that tells which of them TVM can't survive.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TextIO

LIBRARY = "library.so"
IR = "module.txt"
_LINKERS = ("g++", "gcc", "clang++", "clang", "c++", "cc")
_BARE_LINKERS = ("ld.lld", "lld", "mold", "ld")


def main(requests: int, answers: int) -> None:
    """Serve requests from file descriptor `requests` until it ends."""
    _die_with(os.getppid())
    with os.fdopen(requests, "r", encoding="utf-8") as source, os.fdopen(answers, "w", encoding="utf-8") as sink:
        for line in source:
            _serve(json.loads(line), sink)


def _die_with(parent: int) -> None:
    """End this process soon after its parent has gone, also in the midst of a compilation.

    PR_SET_PDEATHSIG alone would follow the parent's *thread*, which may end long before the process does.
    """

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1.0)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _serve(request: Mapping[str, Any], sink: TextIO) -> None:
    def say(**message: Any) -> None:
        sink.write(json.dumps(message) + "\n")
        sink.flush()

    try:
        say(result=_build(request, lambda stage: say(stage=stage)))
    except Exception as error:  # the answer carries it to the process that asked
        say(error=str(error) or repr(error), kind=type(error).__name__)


def _build(request: Mapping[str, Any], stage: Callable[[str], None]) -> dict[str, Any]:
    begin = time.perf_counter()
    stage("starting TVM")
    from jisu.compiler.text import parse
    from jisu.targets.cpu.isa import tvm_target
    from jisu.targets.lowering import lower
    from jisu.targets.schedule import from_json
    from jisu.targets.target import Target

    out = Path(request["out"])
    target = Target.from_json(request["target"])
    graphs = {name: parse(text) for name, text in request["entries"].items()}
    stage("lowering")
    if target.kind == "cuda":
        entries, kernels, files = _build_device(graphs, target, out, stage)
    else:
        kernels = None
        if target.kind == "tpu":
            from jisu.targets.tpu.choose import CHOOSERS as kernels
        lowered = lower(graphs, target, kernels=kernels, schedules=from_json(request["schedules"]))
        (out / IR).write_text(str(lowered.module))
        entries, kernels, files = lowered.entries, lowered.kernels, [LIBRARY]
        if request["single"]:
            _build_each(lowered.module, tvm_target(target), stage)
        else:
            _build_library(lowered.module, tvm_target(target), out / LIBRARY, stage)
    return {
        "entries": {name: entry.to_json() for name, entry in entries.items()},
        "kernels": [[k.name, k.op, k.count, list(k.choices)] for k in kernels],
        "files": files,
        "seconds": time.perf_counter() - begin,
    }


def _build_device(
    graphs: Mapping[str, Any], target: Any, out: Path, stage: Callable[[str], None]
) -> tuple[Mapping[str, Any], Any, list[str]]:
    """Kernels and plans for a GPU; the names of the files."""
    import attrs

    from jisu.compiler.launches import CUBIN, OWN_PTX, PLANS, PTX
    from jisu.targets.cuda import emulated, ptx
    from jisu.targets.cuda.device import capability
    from jisu.targets.cuda.lowering import lower

    lowered = lower(graphs, target)
    (out / IR).write_text("\n".join(map(str, lowered.functions.values())))
    stage("code generation")
    files = [PLANS]
    if emulated.is_emulated(target):
        library = out / "kernels.so"
        emulated.to_library(lowered.written, target, lowered.functions, library, find_linker())
        os.replace(library, out / CUBIN)
        files.append(CUBIN)
    else:
        portable = [k for k in lowered.written if k.portable]
        later = attrs.evolve(target, mcpu=target.mcpu.rstrip("a"))  # code for sm_90a runs on nothing else
        text = ptx.to_ptx(portable, later, lowered.functions)
        (out / PTX).write_text(text)
        files.append(PTX)
        stage("assembling")
        if later != target:
            text = ptx.to_ptx(lowered.written, target, lowered.functions)
            (out / OWN_PTX).write_text(text)
            files.append(OWN_PTX)
        if (cubin := ptx.assembled(text, target)) is not None:
            (out / CUBIN).write_bytes(cubin)
            files.append(CUBIN)
    plans = {
        "capability": capability(target),
        "faults": [[f.kind, f.message] for f in lowered.faults],
        "entries": {name: plan.to_json() for name, plan in lowered.plans.items()},
    }
    (out / PLANS).write_text(json.dumps(plans))
    return lowered.entries, lowered.kernels, files


def _build_library(module: Any, target: Any, path: Path, stage: Callable[[str], None]) -> None:
    import tvm

    from jisu.targets.lowering import KERNEL_PIPELINE

    linker = find_linker()
    stage("code generation")
    executable = tvm.compile(module, target=target, tir_pipeline=KERNEL_PIPELINE)
    stage("linking")
    executable.export_library(str(path), fcompile=lambda output, objects, **_: _link(linker, output, objects))


def _build_each(module: Any, target: Any, stage: Callable[[str], None]) -> None:
    import tvm

    from jisu.targets.lowering import KERNEL_PIPELINE

    for var, function in module.functions.items():
        if "calling_conv" in function.attrs:  # a kernel; entries call them all
            stage(f"kernel {var.name_hint}")
            tvm.compile(tvm.IRModule({var: function}), target=target, tir_pipeline=KERNEL_PIPELINE)


def find_linker() -> list[str]:
    """The start of a command that links a shared library: the C compiler, or a bare linker where there is none.

    Raises CompileError where the machine has neither.
    """
    from jisu.compiler.errors import CompileError

    for variable in ("CXX", "CC"):
        if os.environ.get(variable) and shutil.which(os.environ[variable].split()[0]):
            return [*os.environ[variable].split(), "-shared", "-fPIC"]
    for name in (*_LINKERS, *_BARE_LINKERS):
        if found := shutil.which(name):
            return [found, "-shared", *([] if name in _BARE_LINKERS else ["-fPIC"])]
    raise CompileError("no C compiler or linker was found; install one (gcc or clang), or set CC to its path")


def _link(linker: list[str], output: str, objects: list[str]) -> None:
    from jisu.compiler.errors import CompileError

    done = subprocess.run([*linker, "-o", output, *objects], capture_output=True, text=True)
    if done.returncode:
        raise CompileError(f"{linker[0]} can't link the kernels: {done.stderr.strip()[-2000:]}")
