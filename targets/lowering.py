"""From graphs to one TVM module: every node, or group of fused nodes, becomes a kernel; equal kernels are one.

An entry function calls one kernel after the other on addresses, as `jisu.compiler.entry` describes: shapes are checked here or by
who calls, views cost nothing, and intermediate values lie in an arena that `targets.arena` shares out. A kernel is chosen per node
by a table (`Choosers`); what no chooser takes is computed by `targets.cpu.generic`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
from tvm import IRModule, ir, tirx, transform
from tvm.tirx.buffer import BufferType
from tvm.tirx.compilation_pipeline import finalize_device_passes, finalize_host_passes, register_tir_pipeline

from jisu.compiler import ops
from jisu.compiler.entry import Entry, constant_name
from jisu.compiler.errors import CompileError, TargetError
from jisu.compiler.graph import CONSTANT, INPUT, WEIGHT, Graph, Node, Op
from jisu.compiler.text import attribute_text
from jisu.compiler.types import Dim, TensorType, same_dim, symbol
from jisu.targets.arena import Lifetime, share
from jisu.targets.cpu import generic
from jisu.targets.cpu.generic.build import Builder, expression, extra_symbols, i64
from jisu.targets.cpu.generic.element import always_pulled
from jisu.targets.cpu.isa import C_CALL
from jisu.targets.fusion import Region, regions
from jisu.targets.schedule import Schedules, kernel_key
from jisu.targets.target import Target

_ALIGNMENT = 64  # bytes, of every value in memory


@attrs.frozen
class Argument:
    """One tensor argument of a chosen kernel: the node's operand number `operand`, where the kernel wants to see it with
    other axes as a view of `shape`."""

    operand: int
    shape: tuple[Dim, ...] | None = None


@attrs.frozen(eq=False)
class Kernel:
    """A chosen kernel: a PrimFunc over `arguments`, then `symbols`, then the results.

    `results` are the shapes that the kernel gives its results where they differ from the node's (views of the same
    memory). `symbols` are the names of the int64 parameters.
    """

    function: Any
    arguments: tuple[Argument, ...]
    results: tuple[tuple[Dim, ...], ...] | None = None
    symbols: tuple[str, ...] = ()


Choosers = Mapping[Op, Callable[[Node, Target], Kernel | None]]


@attrs.frozen
class KernelUse:
    """A kernel in the module: its name, the ops it computes, and at how many places it is called."""

    name: str
    op: str
    count: int


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

    module = _Module(target, CHOOSERS if kernels is None else kernels, schedules or {})
    made = {name: _Entry(module, graph).emit(name) for name, graph in entries.items()}
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


@attrs.frozen(eq=False)
class _Callee:
    """A kernel as entries call it: on pointers and sizes, returning 0 or, with TVM's error set, -1.

    shapes: per parameter, a tensor's dimensions (an int, or a variable; None where it is neither), or None for a number.
    sizes: the variables among the dimensions, whose values follow the parameters.
    """

    var: Any
    name: str
    shapes: tuple[tuple[Any, ...] | None, ...]
    sizes: tuple[Any, ...]


def _callee(function: Any, name: str) -> tuple[_Callee, Any]:
    """A kernel over tensors as a function on pointers, which has no tensors to take apart and to check."""
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
    plain = tirx.PrimFunc([*parameters, *sizes], body, ret_type=ir.PrimType("int32"))
    # Its name is a symbol, which profilers show; another calling convention than the default keeps TVM from wrapping it.
    attributes = {"tirx.noalias": True, "s_tir": True, "global_symbol": name, "calling_conv": C_CALL}
    for key, attribute in attributes.items():
        plain = plain.with_attr(key, attribute)
    return _Callee(ir.GlobalVar(name), name, tuple(shapes), tuple(sizes)), plain


class _Module:
    """Kernels by content, shared by all entries."""

    def __init__(self, target: Target, choosers: Choosers, schedules: Schedules) -> None:
        self.target, self.choosers, self.schedules = target, choosers, schedules
        self.contents: dict[Any, Any] = {}
        self.functions: dict[str, _Callee] = {}
        self.chosen: dict[str, tuple[Kernel, _Callee] | None] = {}
        self.names: Counter[str] = Counter()
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, function: Any, wanted: str) -> _Callee:
        """Put a kernel into the module under a name that no other has."""
        self.names[wanted] += 1
        name = wanted if self.names[wanted] == 1 else f"{wanted}_v{self.names[wanted]}"
        callee, plain = _callee(function, name)
        self.contents[callee.var] = plain
        return callee

    def generic(self, region: Region) -> _Callee:
        """The generic kernel of a region."""
        key = describe(region)
        label = "+".join(dict.fromkeys(n.op.name for n in region.results))
        if key not in self.functions:
            name = kernel_name(region)
            try:
                function = generic.kernel(name, region.results, region.leaves)
            except CompileError:
                raise
            except Exception as error:
                raise CompileError(f"can't lower {label} ({region.results[0]!r}): {error}") from error
            self.functions[key] = self.add(function, name)
        callee = self.functions[key]
        self.counts[callee.name, label] += 1
        return callee

    def specialised(self, node: Node) -> tuple[Kernel, _Callee] | None:
        """The chosen kernel of a node, if its op has a chooser that takes it."""
        chooser = self.choosers.get(node.op)
        if chooser is None:
            return None
        leaves = tuple(dict.fromkeys(node.parents))
        key = describe(Region((node,), leaves))
        if key not in self.chosen:
            schedule = self.schedules.get(kernel_key(node), self.target.schedule)
            try:
                kernel = chooser(node, attrs.evolve(self.target, schedule=schedule))
            except TargetError:  # the kernel doesn't exist for this dtype or machine
                kernel = None
            named = _clean(kernel_name(Region((node,), leaves)))
            self.chosen[key] = None if kernel is None else (kernel, self.add(kernel.function, named))
        found = self.chosen[key]
        if found is not None:
            self.counts[found[1].name, node.op.name] += 1
        return found

    def uses(self) -> tuple[KernelUse, ...]:
        """Every kernel with the number of its calls, most used first."""
        return tuple(KernelUse(name, op, count) for (name, op), count in self.counts.most_common())


@attrs.define(eq=False)
class _Memory:
    """Where a value lies: `kind` "input", "weight", "output" or "arena", and its number there (of the arena: its slot)."""

    kind: str
    number: int = -1
    nbytes: Dim = 0
    first: int = -1
    last: int = -1


@attrs.frozen(eq=False)
class _Step:
    """One call: per parameter the memory and the shape in which the kernel sees it, or a number."""

    callee: _Callee
    arguments: tuple[tuple[_Memory, tuple[Dim, ...]] | Dim, ...]


class _Entry:
    """One graph's entry function under construction."""

    def __init__(self, module: _Module, graph: Graph) -> None:
        self.module, self.graph = module, graph
        self.values: dict[Node, _Memory] = {n: _Memory("input", i) for i, n in enumerate(graph.inputs)}
        self.tuples: dict[Node, list[_Memory]] = {}
        self.weights: dict[str, tuple[int, TensorType]] = {}
        self.steps: list[_Step] = []

    def value(self, node: Node) -> _Memory:
        """Where a node's value stands."""
        if node not in self.values:
            if node.op not in (WEIGHT, CONSTANT):
                raise CompileError(f"{node!r} was not computed before its use")
            name = node.name if node.op is WEIGHT else constant_name(node)
            number, _ = self.weights.setdefault(name, (len(self.weights), node.tensor))
            self.values[node] = _Memory("weight", number)
        return self.values[node]

    def emit(self, name: str) -> Entry:
        """Write the entry's functions into the module."""
        for region in regions(self.graph, self.module.choosers):
            self.region(region)
        entry = self.outputs()
        slots = self.lay_out()
        functions = (self.calls(name, entry, slots), self.arena(f"{name}_arena", entry, slots))
        for function, own in zip(functions, (name, f"{name}_arena"), strict=True):
            self.module.contents[ir.GlobalVar(own)] = function
        return entry

    def region(self, region: Region) -> None:
        """Note the calls that compute a region's results."""
        node = region.results[0]
        if node.op is ops.get:
            self.values[node] = self.tuples[node.parents[0]][node.index]
        elif region.view:
            self.values[node] = self.value(node.parents[0])
        elif node.op is ops.cache_append:
            self.append(node)
        else:
            found = self.module.specialised(node) if len(region.results) == 1 else None
            results = self.chosen(node, *found) if found is not None else self.call(region)
            if node.op in generic.MULTIPLE:
                self.tuples[node] = results
            else:
                self.values.update(zip(region.results, results, strict=True))

    def step(
        self,
        callee: _Callee,
        arguments: Sequence[tuple[_Memory, tuple[Dim, ...]]],
        extra: Sequence[str],
        types: Sequence[TensorType],
    ) -> list[_Memory]:
        """Note a call of a kernel that takes these tensors, then these symbols, and writes results of these types."""
        results = [_Memory("arena", nbytes=t.nbytes) for t in types]
        numbers = [symbol(name) for name in extra]
        outs = [(m, t.shape) for m, t in zip(results, types, strict=True)]
        self.steps.append(_Step(callee, (*arguments, *numbers, *outs)))
        return results

    def call(self, region: Region) -> list[_Memory]:
        """Call the generic kernel of a region."""
        types = [t for n in region.results for t in generic.results_of(n)]
        arguments = [(self.value(n), n.shape) for n in region.leaves]
        return self.step(self.module.generic(region), arguments, _extra(region), types)

    def chosen(self, node: Node, kernel: Kernel, callee: _Callee) -> list[_Memory]:
        """Call a specialised kernel, with the views that it wants."""
        types = generic.results_of(node)
        if kernel.results is not None:
            types = tuple(t.with_shape(*shape) for t, shape in zip(types, kernel.results, strict=True))
        return self.step(callee, self.operands(node, kernel), kernel.symbols, types)

    def operands(self, node: Node, kernel: Kernel) -> list[tuple[_Memory, tuple[Dim, ...]]]:
        """The operands that a specialised kernel takes, as it wants to see them."""
        found = []
        for argument in kernel.arguments:
            operand = node.operands[argument.operand]
            if operand is None:
                raise CompileError(f"the kernel for {node!r} takes operand {argument.operand}, which is absent")
            found.append((self.value(operand), operand.shape if argument.shape is None else argument.shape))
        return found

    def append(self, node: Node) -> None:
        """Append to a cache: in place where the cache is an input that nothing else reads, else to a copy."""
        cache = node.operands[0]
        assert cache is not None
        owned = cache.op is INPUT or (cache.op is ops.cache_append and cache not in self.graph.outputs)
        value = self.value(cache)
        if not owned or len(self.graph.users[cache]) > 1:
            value = self.copy(cache)
        found = self.module.specialised(node)
        if found is not None:
            arguments = self.operands(node, found[0])
            callee, extra = found[1], found[0].symbols
        else:
            region = Region((node,), tuple(dict.fromkeys(node.parents)))
            arguments = [(self.value(n), n.shape) for n in region.leaves]
            callee, extra = self.module.generic(region), tuple(_extra(region))
        self.step(callee, [(value, cache.shape), *arguments[1:]], extra, ())
        self.values[node] = value

    def copy(self, node: Node) -> _Memory:
        """A fresh tensor with a node's elements."""
        return self.call(Region((ops.broadcast_to(node, shape=node.shape),), (node,)))[0]

    def outputs(self) -> Entry:
        """Settle where the results lie: none shares memory with an input, a weight or another result, but for an appended
        cache, which is the memory that the caller gave for it."""
        aliases: list[int | None] = []
        for i, node in enumerate(self.graph.outputs):
            memory = self.value(node)
            appended = node.op is ops.cache_append and memory.kind == "input"
            aliases.append(memory.number if appended and memory.number not in aliases else None)
            if aliases[-1] is None:
                if memory.kind != "arena":
                    memory = self.copy(node)
                memory.kind, memory.number = "output", i
        named = tuple((n.name, n.tensor) for n in self.graph.inputs)
        weights = tuple((name, kind) for name, (_, kind) in self.weights.items())
        types = tuple(n.tensor for n in self.graph.outputs)
        return Entry(named, weights, types, tuple(aliases), tuple(sorted(self.graph.symbols)))

    def lay_out(self) -> list[tuple[Dim, ...]]:
        """Give every intermediate value a slot of the arena; the slots' sizes."""
        found: dict[_Memory, None] = {}
        for i, step in enumerate(self.steps):
            for argument in step.arguments:
                if isinstance(argument, tuple) and argument[0].kind == "arena":
                    memory = argument[0]
                    memory.first = i if memory.first < 0 else memory.first
                    memory.last = i
                    found[memory] = None
        slots = share([Lifetime(m.nbytes, m.first, m.last) for m in found])
        for memory, slot in zip(found, slots.place, strict=True):
            memory.number = slot
        return list(slots.sizes)

    def calls(self, name: str, entry: Entry, slots: Sequence[tuple[Dim, ...]]) -> Any:
        """The entry function."""
        counts = (len(entry.inputs), len(entry.weights), len(entry.outputs))
        shapes = (sum(counts) + 1, max(len(entry.symbols), 1))
        b = Builder(name, [TensorType((n,), "int64") for n in shapes], [], ())
        addresses, sizes = b.inputs
        symbols = {s: b.let(sizes[i64(i)], s) for i, s in enumerate(entry.symbols)}
        base = b.let(addresses[i64(sum(counts))], "arena")
        places, _ = _offsets(b, slots, symbols)
        before = {"input": 0, "weight": counts[0], "output": counts[0] + counts[1]}

        def address(memory: _Memory) -> Any:
            if memory.kind == "arena":
                return base + places[memory.number]
            return addresses[i64(before[memory.kind] + memory.number)]

        for step in self.steps:
            arguments = [
                tirx.reinterpret("handle", address(a[0])) if isinstance(a, tuple) else expression(a, symbols)
                for a in step.arguments
            ]
            result = ir.Call(step.callee.var, [*arguments, *_solved(b, step, symbols)], ret_ty=ir.PrimType("int32"))
            failed = tirx.Evaluate(ir.Call("tirx.tvm_throw_last_error", [], ret_ty=ir.PrimType("int32")))
            b.emit(tirx.IfThenElse(result != tirx.IntImm("int32", 0), failed, None))
        return b.finish()

    def arena(self, name: str, entry: Entry, slots: Sequence[tuple[Dim, ...]]) -> Any:
        """The function that says how large the arena is."""
        b = Builder(name, [TensorType((max(len(entry.symbols), 1),), "int64")], [TensorType((1,), "int64")], ())
        symbols = {s: b.let(b.inputs[0][i64(i)], s) for i, s in enumerate(entry.symbols)}
        b.store(b.outputs[0], i64(0), _offsets(b, slots, symbols)[1])
        return b.finish()


def _extra(region: Region) -> list[str]:
    """The symbols that a generic kernel must be told."""
    return extra_symbols([n.tensor for n in region.leaves], generic.region_symbols(region.results, region.leaves))


def _offsets(b: Builder, slots: Sequence[tuple[Dim, ...]], symbols: Mapping[str, Any]) -> tuple[list[Any], Any]:
    """Where each slot begins in the arena, and how long that is."""
    total: Any = i64(0)
    places = []
    for sizes in slots:
        places.append(total)
        size = expression(sizes[0], symbols)
        for other in sizes[1:]:
            size = tirx.max(size, expression(other, symbols))
        whole = tirx.floordiv(size + i64(_ALIGNMENT - 1), i64(_ALIGNMENT)) * i64(_ALIGNMENT)
        total = b.let(total + whole, "slot")
    return places, total


def _solved(b: Builder, step: _Step, symbols: Mapping[str, Any]) -> list[Any]:
    """The sizes that a kernel takes, from the shapes of its arguments; what must be equal and may not be is checked at run time."""
    known: dict[Any, Dim] = {}
    for shape, argument in zip(step.callee.shapes, step.arguments, strict=True):
        if shape is None or not isinstance(argument, tuple):
            continue
        if len(shape) != len(argument[1]):
            raise CompileError(f"{step.callee.name} takes a tensor of rank {len(shape)}, not of shape {argument[1]}")
        for want, have in zip(shape, argument[1], strict=True):
            if want is None:
                continue
            settled = want if isinstance(want, int) else known.setdefault(want, have)
            if isinstance(settled, int) and isinstance(have, int) and settled != have:
                raise CompileError(f"{step.callee.name} takes a dimension of {settled}, not of {have}")
            if not same_dim(settled, have):
                equal = tirx.EQ(expression(settled, symbols), expression(have, symbols))
                b.require(equal, "ValueError", f"{step.callee.name}: dimensions {settled} and {have} must be equal")
    return [expression(known[v], symbols) for v in step.callee.sizes]


def describe(region: Region) -> str:
    """The content of a region, equal for regions that one kernel can compute."""
    number: dict[Node, int] = {}
    lines: list[str] = []

    def visit(node: Node) -> int:
        if node in number:
            return number[node]
        if node in leaves:
            lines.append(str(node.type))
        else:
            operands = ["-" if o is None else str(visit(o)) for o in node.operands]
            attributes = [f"{k}={attribute_text(v)}" for k, v in node.attributes.items()]
            lines.append(f"{node.op.name}({', '.join([*operands, *attributes])}): {node.type}")
        number[node] = len(lines) - 1
        return number[node]

    leaves = set(region.leaves)
    for leaf in region.leaves:
        visit(leaf)
    results = [visit(n) for n in region.results]
    return "; ".join(lines) + f" -> {results}"


def kernel_name(region: Region) -> str:
    """A readable name: the ops, the first result's shape and dtype."""
    t: TensorType = generic.results_of(region.results[0])[0]
    inner = [n.op.name for n in region.nodes if not always_pulled(n)]
    label = "_".join(dict.fromkeys(inner))[:60] or region.results[0].op.name
    return _clean(f"{label}_{'x'.join(map(str, t.shape)) or 'scalar'}_{t.dtype}")


def _clean(name: str) -> str:
    return re.sub(r"\W+", "_", name)[:100]
