"""Device kernels as a shared library for a CPU, where a library that emulates a GPU supplies what the CPU lacks (tests/emulated_gpu.cc).

A target whose kind is "cuda" and whose triple is a CPU's is compiled so; nothing else of a program differs.
"""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs

from jisu.compiler.errors import CompileError
from jisu.targets.cpu.isa import tvm_target
from jisu.targets.cuda.device import DeviceKernel
from jisu.targets.cuda.ptx import built
from jisu.targets.target import Target, host

_FRAGMENTS = "ldmatrix.sync.aligned.m8n8.x4"
# Several registers come back through memory, since LLVM's and C's ways of returning them differ.
_WRAPPED = {
    f"{_FRAGMENTS}.b16.p3": ("i32", ("ptr addrspace(3)",), "emulated_ldmatrix"),
    f"{_FRAGMENTS}.trans.b16.p3": ("i32", ("ptr addrspace(3)",), "emulated_ldmatrix_trans"),
    "mma.m16n8k16.row.col.bf16": ("float", ("i32",) * 6 + ("float",) * 4, "emulated_mma"),
    "mma.m16n8k16.row.col.f32.f32": ("float", ("<2 x half>",) * 6 + ("float",) * 4, "emulated_mma_f16"),
    "mma.m16n8k32.row.col.s8": ("i32", ("i32",) * 10, "emulated_mma_s8"),
    "mma.m16n8k32.row.col.f32.e4m3.e4m3.f32": ("float", ("i32",) * 6 + ("float",) * 4, "emulated_mma_e4m3"),
    "mma.sp.m16n8k32.row.col.bf16": ("float", ("i32",) * 8 + ("float",) * 4 + ("i32",) * 2, "emulated_mma_sparse"),
    "mma.sp.m16n8k32.row.col.f32.f32": (
        "float",
        ("<2 x half>",) * 8 + ("float",) * 4 + ("i32",) * 2,
        "emulated_mma_sparse_f16",
    ),
}


def is_emulated(target: Target) -> bool:
    """Whether a GPU's kernels are to run on this CPU."""
    return target.kind == "cuda" and target.architecture != "nvptx64"


def to_library(
    kernels: Sequence[DeviceKernel], target: Target, functions: Mapping[str, Any], path: Path, linker: Sequence[str]
) -> None:
    """Write the library; `linker` is the start of a command that links one. Raises CompileError where that fails."""
    wrapped = [attrs.evolve(k, micro=_wrapped(k.micro)) for k in kernels]
    module = built(wrapped, functions, target, tvm_target(attrs.evolve(host(), features=frozenset())))
    made = path.with_suffix(".o")
    module.write_to_file(str(made), "o")
    # Functions of ours that are called like the C library's must not be taken from there.
    done = subprocess.run(
        [*linker, "-Wl,-Bsymbolic", "-o", str(path), str(made)], capture_output=True, text=True
    )  # fmt: skip
    made.unlink()
    if done.returncode:
        raise CompileError(f"can't link emulated kernels: {done.stderr.strip()[-2000:]}")


def _wrapped(micro: Any) -> Any:
    """The kernel with functions instead of declarations where registers come back through memory."""
    declares, bodies = set(micro.declares), list(micro.bodies)
    for name, (element, types, to) in _WRAPPED.items():
        result = "{ " + ", ".join([element] * 4) + " }"
        for declared in [d for d in declares if d.startswith(f"declare {result} @emulated.{name}(")]:
            declares.remove(declared)
            bodies.insert(0, _wrapper(name, result, types, to))
    return attrs.evolve(micro, declares=frozenset(declares), bodies=tuple(bodies))


def _wrapper(name: str, result: str, types: Sequence[str], to: str) -> str:
    plain = {"ptr addrspace(3)": ("ptr", "addrspacecast"), "<2 x half>": ("i32", "bitcast")}
    given = [f"{t} %a{i}" for i, t in enumerate(types)]
    changes, passed = [], []
    for i, t in enumerate(types):
        if t in plain:
            changes.append(f"  %c{i} = {plain[t][1]} {t} %a{i} to {plain[t][0]}")
        passed.append(f"{plain[t][0]} %c{i}" if t in plain else given[i])
    return "\n".join([
        f"declare void @{to}(ptr, {', '.join(p.partition(' ')[0] for p in passed)})",
        f"define {result} @emulated.{name}({', '.join(given)}) {{",
        "  %out = alloca [4 x i32]",
        *changes,
        f"  call void @{to}(ptr %out, {', '.join(passed)})",
        f"  %found = load {result}, ptr %out, align 4",
        f"  ret {result} %found",
        "}",
    ])  # fmt: skip
