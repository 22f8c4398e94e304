"""From device kernels to PTX, by the LLVM inside TVM, and to a cubin where CUDA's assembler is at hand."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import attrs
import tvm
from tvm import ir, tirx, transform
from tvm.tirx.compilation_pipeline import finalize_host_passes

from jisu.compiler.errors import CompileError, TargetError
from jisu.targets.cpu.isa import C_CALL, link_text
from jisu.targets.cuda.assembler import find_assembler as find_assembler
from jisu.targets.cuda.builder import THREADS
from jisu.targets.cuda.device import MAP, Device, DeviceKernel, overlaps
from jisu.targets.cuda.functions import called, library
from jisu.targets.target import Target

_VERSION = {"sm_80": "ptx71", "sm_86": "ptx71", "sm_89": "ptx84", "sm_90": "ptx84", "sm_90a": "ptx84", "sm_100": "ptx86", "sm_120": "ptx87"}  # fmt: skip
"""PTX by architecture: 8.4 is the first in which warps multiply fp8."""


@attrs.frozen
class Usage:
    """What the assembler says of a kernel: registers per thread, bytes of stack and of spilled registers."""

    registers: int
    stack_bytes: int
    spilled_bytes: int


def to_ptx(kernels: Sequence[DeviceKernel], target: Target, functions: Mapping[str, Any] | None = None) -> str:
    """The kernels as one PTX module for the target's architecture; functions: generic ones, TIR functions on pointers by name.

    Raises TargetError for an architecture without a known version of PTX, CompileError where LLVM leaves a function outside.
    """
    where = tvm.target.Target(
        {"kind": "llvm", "mtriple": "nvptx64-nvidia-cuda", "mcpu": target.mcpu, "mattr": [f"+{_version(target)}"]}
    )
    heads = {entry_name(k): _Head(k.threads, k.parameters.count(MAP), k.alone) for k in kernels}
    heads |= dict.fromkeys(functions or {}, _Head(THREADS))
    return _as_kernels(built(kernels, functions or {}, target, where).inspect_source("asm"), heads)


def built(kernels: Sequence[DeviceKernel], functions: Mapping[str, Any], target: Target, where: Any) -> Any:
    """TVM's module of LLVM code for all kernels on the machine `where`, TVM's target; functions as in `to_ptx`."""
    module = {entry_name(k): as_function(k, entry_name(k), link_text([k.micro]), where) for k in kernels}
    if functions:
        bodies = {
            name: _waiting(_with_library(f, target), target).with_attr("target", where) for name, f in functions.items()
        }
        passes = tirx.transform
        lowered = transform.Sequential([
            passes.FlattenBuffer(), passes.BF16ComputeLegalize(), passes.VectorizeLoop(True), passes.UnrollLoop(),
            passes.BF16StorageLegalize(),
        ])(tvm.IRModule(bodies))  # fmt: skip
        lowered = finalize_host_passes()(lowered)
        for var, function in lowered.functions.items():
            module[var.name_hint] = function
    return tvm.get_global_func("target.build.llvm")(tvm.IRModule(module), where)


def _with_library(function: Any, target: Target) -> Any:
    """The function with the C library's functions, if it calls any."""
    if not called(str(function)):
        return function
    text = ir.StringImm(library(target))
    body = tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_llvm", text, function.body)
    return function.with_body(body)


def _waiting(function: Any, target: Target) -> Any:
    """The function with a wait for earlier launches at its beginning, where there are such."""
    if not overlaps(target):
        return function
    wait = Device("wait", [], target, THREADS).built().micro
    call = tirx.Evaluate(tirx.call_extern("void", wait.symbol))
    body = tirx.AttrStmt(
        tirx.IntImm("int32", 0),
        "pragma_import_llvm",
        ir.StringImm(link_text([wait])),
        tirx.SeqStmt([call, function.body]),
    )
    # LLVM would read restricted pointers before the wait.
    return function.with_body(body).without_attr("tirx.noalias")


def as_function(kernel: DeviceKernel, name: str, text: str, where: Any) -> Any:
    """A TIR function called `name`, of the kernel's parameters, whose body is the kernel, which `text` (LLVM IR) defines; where: TVM's target."""
    parameters = [
        tirx.Var(f"p{i}", ir.PointerType(ir.PrimType("uint8")) if t in ("ptr", MAP) else "int64")
        for i, t in enumerate(kernel.parameters)
    ]
    # LLVM's text is linked where something calls it; the kernel is that call, inlined.
    call = tirx.Evaluate(tirx.call_extern("void", kernel.name, *parameters))
    linked = ir.StringImm(text)
    function = tirx.PrimFunc(
        parameters, tirx.AttrStmt(tirx.IntImm("int32", 0), "pragma_import_llvm", linked, call), ret_type=None
    )
    attributes = {"global_symbol": name, "calling_conv": C_CALL, "target": where}
    for key, value in attributes.items():
        function = function.with_attr(key, value)
    return function


def entry_name(kernel: DeviceKernel) -> str:
    """The kernel's name in the module."""
    return f"kernel_{kernel.name}"


def assembled(ptx: str, target: Target) -> bytes | None:
    """A cubin for the target's architecture; None where there is no assembler, since a GPU's driver compiles PTX, too."""
    return None if find_assembler() is None else assemble(ptx, target)[0]


def assemble(ptx: str, target: Target) -> tuple[bytes, dict[str, Usage]]:
    """A cubin for the target's architecture, and what each kernel uses.

    Raises CompileError where there is no assembler (`ptxas`, in CUDA's toolkit and in pip's nvidia-cuda-nvcc), it is too old, or it fails.
    """
    program = find_assembler()
    if program is None:
        raise CompileError(
            "there is no ptxas to make machine code of PTX; install CUDA's toolkit, or `pip install nvidia-cuda-nvcc`"
        )
    with tempfile.TemporaryDirectory(prefix="jisu-ptx-") as folder:
        source, out = Path(folder) / "k.ptx", Path(folder) / "k.cubin"
        source.write_text(ptx)
        done = subprocess.run(
            [program, f"-arch={target.mcpu}", "-v", "-o", str(out), str(source)], capture_output=True, text=True
        )
        if re.search(r"Unsupported \.version|not defined for option 'gpu-name'", done.stderr):
            raise CompileError(
                f"{program} is too old for {target.mcpu} and PTX of version {_version(target)[3]}.{_version(target)[4:]}: take it off PATH (a GPU's "
                "driver compiles PTX, too), update CUDA's toolkit, or `pip install nvidia-cuda-nvcc`, which is looked for first"
            )
        if done.returncode:
            raise CompileError(f"ptxas: {done.stderr.strip()[-2000:]}")
        return out.read_bytes(), _usage(done.stderr)


def _version(target: Target) -> str:
    if target.mcpu not in _VERSION:
        raise TargetError(f"no PTX version is known for {target.mcpu!r}; known: {', '.join(_VERSION)}")
    return _VERSION[target.mcpu]


@attrs.frozen
class _Head:
    """What an entry says of itself: threads per block, how many of its first parameters are tensor maps, and whether a block may take all registers
    of a multiprocessor."""

    threads: int
    maps: int = 0
    alone: bool = False

    @property
    def directives(self) -> str:
        return f".maxntid {self.threads}, 1, 1\n" + (".minnctapersm 1\n" if self.alone else "")


def _as_kernels(assembly: str, heads: Mapping[str, _Head]) -> str:
    """LLVM's assembly with our functions as kernels, without what TVM adds: helpers, and line numbers of no source."""
    text = assembly.split("\t// .weak")[0]
    text = re.sub(r"^\s*\.loc\b.*\n|^\$L__(?:tmp|func_begin|func_end)\d+:\n", "", text, flags=re.M).replace(
        ", debug", ""
    )
    text = re.sub(r"^\t\.(?:section|file)\b.*", "", text, flags=re.M | re.S)
    for name, head in heads.items():
        found = re.compile(rf"^\.visible \.func {re.escape(name)}\((.*?)\)\n\{{", re.M | re.S)
        text, replaced = found.subn(rf".visible .entry {name}(\1)\n{head.directives}{{", text)
        if replaced != 1:
            raise CompileError(f"LLVM made no function {name} of a device kernel")
        for number in range(head.maps):
            text = _by_value(text, f"{name}_param_{number}")
    if lost := re.findall(r"^\.extern \.func .*?(\w+)\s*$", text, re.M):
        raise CompileError(f"device kernels call what doesn't exist: {', '.join(lost)}")
    return text


def _by_value(text: str, parameter: str) -> str:
    """The assembly with a parameter that was a pointer to a tensor map as the map itself: where the pointer was loaded, the parameter's
    address is taken."""
    text, declared = re.subn(rf"\.param \.b64 {parameter}(?=[,\n])", f".param .align 128 .b8 {parameter}[128]", text)
    loads = re.compile(rf"ld\.param\.b64 \t(%rd\d+), \[{parameter}\];")
    text = loads.sub(rf"mov.b64 \t\1, {parameter};\n\tcvta.param.u64 \t\1, \1;", text)
    if declared != 1 or re.search(rf"\[{parameter}\b", text):
        raise CompileError(f"LLVM uses the tensor map {parameter} in a way that is not known")
    return text


def _usage(log: str) -> dict[str, Usage]:
    found = {}
    pattern = (
        r"Compiling entry function '(\w+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers"
    )
    for name, stack, stores, loads, registers in re.findall(pattern, log, re.S):
        found[name] = Usage(int(registers), int(stack), int(stores) + int(loads))
    return found
