"""From graphs to one TVM module: every node, or group of fused nodes, becomes a kernel; equal kernels are one.

An entry function calls one kernel after the other on addresses, as `jisu.compiler.entry` describes: shapes are checked here or by
who calls. Which kernels, on which memory, is `targets.steps`' work.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import attrs
from tvm import IRModule, ir, tirx, transform
from tvm.tirx.buffer import BufferType
from tvm.tirx.compilation_pipeline import finalize_device_passes, finalize_host_passes, register_tir_pipeline

from jisu.compiler.entry import Entry
from jisu.compiler.graph import Graph
from jisu.compiler.types import Dim, TensorType
from jisu.targets.cpu.generic.build import Builder, expression, i64
from jisu.targets.cpu.isa import C_CALL
from jisu.targets.schedule import Schedules
from jisu.targets.steps import ALIGNMENT, Callee, Choosers, Kernels, KernelUse, Memory, Step, Steps
from jisu.targets.target import Target


@attrs.frozen(eq=False)
class Lowered:
    """What `lower` returns: the module, how each entry is called, and the kernels."""

    module: IRModule
    entries: Mapping[str, Entry]
    kernels: tuple[KernelUse, ...]


def lower(
    entries: Mapping[str, Graph], target: Target, *, kernels: Choosers | None = None, schedules: Schedules | None = None
) -> Lowered:
    """One TVM module with an entry function per graph; equal kernels of all graphs are compiled once.

    schedules: of kernels that have one of their own. Raises CompileError for a graph that can't be lowered, naming the op.
    """
    from jisu.targets.cpu.choose import CHOOSERS  # which imports this module

    module = _Kernels(target, CHOOSERS if kernels is None else kernels, schedules or {})
    made = {}
    for name, graph in entries.items():
        steps = Steps(module, graph)
        made[name], slots = steps.emit()
        module.contents[ir.GlobalVar(name)] = _calls(name, made[name], steps.steps, slots)
        module.contents[ir.GlobalVar(f"{name}_arena")] = _arena(f"{name}_arena", made[name], slots)
    return Lowered(IRModule(module.contents), made, module.uses())


KERNEL_PIPELINE = "jisu"


def _kernel_pipeline() -> Any:
    """The passes that TVM needs to generate code for plain loops over buffers.

    TVM's default pipeline spends nine tenths of its time in simplifiers that find nothing here, and that fold
    floating-point arithmetic as if there were no NaN.
    """
    passes = tirx.transform
    sequence = [
        passes.FlattenBuffer(),
        passes.BF16ComputeLegalize(),
        passes.VectorizeLoop(True),
        passes.UnrollLoop(),
        passes.AnnotateEntryFunc(),
        passes.SplitHostDevice(),
        passes.MakePackedAPI(),
        passes.BF16StorageLegalize(),
    ]
    return transform.Sequential(sequence), finalize_host_passes, finalize_device_passes


register_tir_pipeline(KERNEL_PIPELINE, _kernel_pipeline)


def on_pointers(function: Any, name: str, returns: Any) -> tuple[Callee, Any]:
    """A kernel over tensors as a function on pointers, which has no tensors to take apart and to check; `returns`: the function's type."""
    shapes: list[tuple[Any, ...] | None] = []
    parameters, declared = [], []
    own = {p for p in function.params if not isinstance(p.ty, BufferType)}
    sizes: dict[Any, None] = {}
    for p in function.params:
        if not isinstance(p.ty, BufferType):
            parameters.append(p)
            shapes.append(None)
            continue
        data = tirx.Var(p.name, p.data.ty)
        parameters.append(data)
        declared.append(tirx.DeclBuffer(p, data=data))
        shapes.append(
            tuple(int(d) if isinstance(d, tirx.IntImm) else d if isinstance(d, tirx.Var) else None for d in p.shape)
        )
        sizes |= {d: None for d in p.shape if isinstance(d, tirx.Var) and d not in own}
    body = tirx.SeqStmt([*declared, function.body])
    for key, value in (("device_type", 1), ("device_id", 0)):  # of the scratch memory that it allocates
        body = tirx.AttrStmt(tirx.IntImm("int32", 0), key, tirx.IntImm("int32", value), body)
    plain = tirx.PrimFunc([*parameters, *sizes], body, ret_type=returns)
    # Its name is a symbol, which profilers show; another calling convention than the default keeps TVM from wrapping it.
    attributes = {"tirx.noalias": True, "s_tir": True, "global_symbol": name, "calling_conv": C_CALL}
    for key, attribute in attributes.items():
        plain = plain.with_attr(key, attribute)
    return Callee(ir.GlobalVar(name), name, tuple(shapes), tuple(sizes)), plain


class _Kernels(Kernels):
    """TIR functions of one module."""

    def __init__(self, target: Target, choosers: Choosers, schedules: Schedules) -> None:
        super().__init__(target, choosers, schedules)
        self.contents: dict[Any, Any] = {}

    def adopt(self, function: Any, name: str) -> Callee:
        """The kernel as a function on pointers that returns 0 or, with TVM's error set, -1; put into the module."""
        callee, plain = on_pointers(function, name, ir.PrimType("int32"))
        self.contents[callee.code] = plain
        return callee


def _calls(name: str, entry: Entry, steps: Sequence[Step], slots: Sequence[tuple[Dim, ...]]) -> Any:
    """The entry function."""
    counts = (len(entry.inputs), len(entry.weights), len(entry.outputs))
    shapes = (sum(counts) + 1, max(len(entry.symbols), 1))
    b = Builder(name, [TensorType((n,), "int64") for n in shapes], [], ())
    addresses, given = b.inputs
    symbols = {s: b.let(given[i64(i)], s) for i, s in enumerate(entry.symbols)}
    base = b.let(addresses[i64(sum(counts))], "arena")
    places, _ = _offsets(b, slots, symbols)
    before = {"input": 0, "weight": counts[0], "output": counts[0] + counts[1]}

    def address(memory: Memory) -> Any:
        if memory.kind == "arena":
            return base + places[memory.number]
        return addresses[i64(before[memory.kind] + memory.number)]

    for step in steps:
        arguments = [
            tirx.reinterpret("handle", address(a[0])) if isinstance(a, tuple) else expression(a, symbols)
            for a in step.arguments
        ]
        sizes, equal = step.solved()
        for one, other in equal:
            same = tirx.EQ(expression(one, symbols), expression(other, symbols))
            b.require(same, "ValueError", f"{step.callee.name}: dimensions {one} and {other} must be equal")
        arguments += [expression(size, symbols) for size in sizes]
        result = ir.Call(step.callee.code, arguments, ret_ty=ir.PrimType("int32"))
        failed = tirx.Evaluate(ir.Call("tirx.tvm_throw_last_error", [], ret_ty=ir.PrimType("int32")))
        b.emit(tirx.IfThenElse(result != tirx.IntImm("int32", 0), failed, None))
    return b.finish()


def _arena(name: str, entry: Entry, slots: Sequence[tuple[Dim, ...]]) -> Any:
    """The function that says how large the arena is."""
    b = Builder(name, [TensorType((max(len(entry.symbols), 1),), "int64")], [TensorType((1,), "int64")], ())
    symbols = {s: b.let(b.inputs[0][i64(i)], s) for i, s in enumerate(entry.symbols)}
    b.store(b.outputs[0], i64(0), _offsets(b, slots, symbols)[1])
    return b.finish()


def _offsets(b: Builder, slots: Sequence[tuple[Dim, ...]], symbols: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """Where each slot begins in the arena, and how long that is."""
    total: Any = i64(0)
    places = []
    for sizes in slots:
        places.append(total)
        size = expression(sizes[0], symbols)
        for other in sizes[1:]:
            size = tirx.max(size, expression(other, symbols))
        whole = tirx.floordiv(size + i64(ALIGNMENT - 1), i64(ALIGNMENT)) * i64(ALIGNMENT)
        total = b.let(total + whole, "slot")
    return places, total
