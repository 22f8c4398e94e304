"""From graphs to one TVM module: every node, or group of fused nodes, becomes a kernel; equal kernels are one.

Each entry function takes the graph's inputs in order, then its weights in the order of `Lowered.weights[entry]`, and
returns a tuple. A kernel is chosen per node by a table (`Choosers`); what no chooser takes is computed by
`targets.cpu.generic`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import attrs
import numpy as np
from tvm import IRModule, relax, runtime, tirx, transform
from tvm.tirx.compilation_pipeline import finalize_device_passes, finalize_host_passes, register_tir_pipeline

from jisu.compiler import ops
from jisu.compiler.errors import CompileError, TargetError
from jisu.compiler.graph import CONSTANT, INPUT, WEIGHT, Graph, Node, Op
from jisu.compiler.text import attribute_text
from jisu.compiler.types import Dim, TensorType
from jisu.targets.cpu import generic
from jisu.targets.cpu.generic.build import expression, extra_symbols
from jisu.targets.cpu.generic.element import always_pulled
from jisu.targets.fusion import Region, regions
from jisu.targets.target import Target


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
    """What `lower` returns: the module, the names of each entry's weights in the order of its arguments, and the kernels."""

    module: IRModule
    weights: Mapping[str, tuple[str, ...]]
    kernels: tuple[KernelUse, ...]


def lower(entries: Mapping[str, Graph], target: Target, *, kernels: Choosers | None = None) -> Lowered:
    """One TVM module with an entry function per graph; equal kernels of all graphs are compiled once.

    Raises CompileError for a graph that can't be lowered, naming the op.
    """
    from jisu.targets.cpu.choose import CHOOSERS  # which imports this module

    module = _Module(target, CHOOSERS if kernels is None else kernels)
    weights = {name: _Entry(module, name, graph).emit() for name, graph in entries.items()}
    return Lowered(module.builder.get(), weights, module.uses())


def pipeline(inspect: Callable[[IRModule], None]) -> Any:
    """The Relax passes that turn a lowered module into calls on planned memory; `inspect` sees the module behind them.

    No legalisation and no fusion: the module holds nothing but calls of kernels and views.
    """
    passes = relax.transform

    @transform.module_pass(opt_level=0)
    def run(module: IRModule, _: Any) -> IRModule:
        planned = transform.Sequential(
            [
                passes.ToNonDataflow(),
                passes.RemovePurityChecking(),
                passes.CallTIRRewrite(),
                passes.StaticPlanBlockMemory(),
            ]
        )(module)
        inspect(planned)
        return transform.Sequential(
            [
                passes.LowerAllocTensor(),
                passes.KillAfterLastUse(),
                passes.LowerRuntimeBuiltin(),
                passes.ComputePrimValue(),
                passes.VMShapeLower(),
                passes.AttachGlobalSymbol(),
            ]
        )(planned)

    return run


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


def planned_bytes(module: IRModule) -> int:
    """Bytes of statically planned intermediate storage in the largest entry function."""
    totals = [0]
    for function in module.functions.values():
        if isinstance(function, relax.Function):
            totals.append(0)

            def visit(expr: Any) -> None:
                if isinstance(expr, relax.Call) and getattr(expr.op, "name", "") == "relax.memory.alloc_storage":
                    (size,) = expr.args[0].values
                    totals[-1] += int(size) if isinstance(size, tirx.IntImm) else 0

            relax.analysis.post_order_visit(function, visit)
    return max(totals)


def lowered_type(t: TensorType, symbols: Mapping[str, Any]) -> Any:
    """A tensor type as Relax writes it."""
    return relax.TensorType([expression(d, symbols) for d in t.shape], t.dtype)


class _Module:
    """Kernels by content, shared by all entries."""

    def __init__(self, target: Target, choosers: Choosers) -> None:
        self.target, self.choosers = target, choosers
        self.builder = relax.BlockBuilder()
        self.functions: dict[str, tuple[Any, Any]] = {}
        self.chosen: dict[str, tuple[Kernel, Any] | None] = {}
        self.names: Counter[str] = Counter()
        self.counts: Counter[tuple[str, str]] = Counter()

    def unique(self, wanted: str) -> str:
        """A name that no kernel has yet."""
        self.names[wanted] += 1
        return wanted if self.names[wanted] == 1 else f"{wanted}_v{self.names[wanted]}"

    def add(self, function: Any, name: str) -> Any:
        """Put a PrimFunc into the module under `name`."""
        return self.builder.add_func(function.with_attr("global_symbol", name), name)

    def generic(self, region: Region) -> Any:
        """The generic kernel of a region."""
        key = describe(region)
        label = "+".join(dict.fromkeys(n.op.name for n in region.results))
        if key not in self.functions:
            name = self.unique(kernel_name(region))
            try:
                function = generic.kernel(name, region.results, region.leaves)
            except CompileError:
                raise
            except Exception as error:
                raise CompileError(f"can't lower {label} ({region.results[0]!r}): {error}") from error
            self.functions[key] = (self.add(function, name), name)
        var, name = self.functions[key]
        self.counts[name, label] += 1
        return var

    def specialised(self, node: Node) -> tuple[Kernel, Any] | None:
        """The chosen kernel of a node, if its op has a chooser that takes it."""
        chooser = self.choosers.get(node.op)
        if chooser is None:
            return None
        leaves = tuple(dict.fromkeys(node.parents))
        key = describe(Region((node,), leaves))
        if key not in self.chosen:
            try:
                kernel = chooser(node, self.target)
            except TargetError:  # the kernel doesn't exist for this dtype or machine
                kernel = None
            if kernel is not None:
                name = self.unique(_clean(kernel_name(Region((node,), leaves))))
                self.chosen[key] = (kernel, self.add(kernel.function, name))
            else:
                self.chosen[key] = None
        found = self.chosen[key]
        if found is not None:
            self.counts[str(found[1].name_hint), node.op.name] += 1
        return found

    def uses(self) -> tuple[KernelUse, ...]:
        """Every kernel with the number of its calls, most used first."""
        return tuple(KernelUse(name, op, count) for (name, op), count in self.counts.most_common())


class _Entry:
    """One graph's entry function under construction."""

    def __init__(self, module: _Module, name: str, graph: Graph) -> None:
        self.module, self.name, self.graph = module, name, graph
        self.symbols = {s: tirx.Var(s, "int64") for s in graph.symbols}
        self.values: dict[Node, Any] = {}
        self.tuples: dict[Node, Any] = {}
        self.weights: dict[str, Any] = {}

    def type(self, t: TensorType) -> Any:
        return lowered_type(t, self.symbols)

    def value(self, node: Node) -> Any:
        """The Relax value of a node that stands in memory."""
        if node not in self.values:
            if node.op is WEIGHT:
                if node.name not in self.weights:
                    self.weights[node.name] = relax.Var(f"w{len(self.weights)}", self.type(node.tensor))
                return self.weights[node.name]
            if node.op is CONSTANT:
                array = np.ascontiguousarray(node.value.array).reshape(
                    node.value.array.shape
                )  # which made 0-d arrays 1-d
                self.values[node] = relax.const(runtime.tensor(array), node.dtype)
            else:
                raise CompileError(f"{node!r} was not computed before its use")
        return self.values[node]

    def emit(self) -> tuple[str, ...]:
        """Write the entry into the module; the names of the weights it takes, in order of first use."""
        b = self.module.builder
        inputs = []
        for i, node in enumerate(self.graph.inputs):
            self.values[node] = relax.Var(f"x{i}", self.type(node.tensor))
            inputs.append(self.values[node])
        with b.function(self.name, attrs={"num_input": len(inputs)}):
            with b.dataflow():
                for region in regions(self.graph, self.module.choosers):
                    self.region(region)
                results = [b.emit_output(r) for r in self.outputs()]
            b.emit_func_output(relax.Tuple(results), params=[*inputs, *self.weights.values()])
        return tuple(self.weights)

    def region(self, region: Region) -> None:
        """Emit the calls that compute a region's results."""
        node = region.results[0]
        if node.op is ops.get:
            self.values[node] = self.tuples[node.parents[0]][node.index]
        elif region.view:
            self.values[node] = self.view(self.value(node.parents[0]), node.tensor)
        elif node.op is ops.cache_append:
            self.append(node)
        else:
            found = self.module.specialised(node) if len(region.results) == 1 else None
            results = self.chosen(node, *found) if found is not None else self.call(region)
            if node.op in generic.MULTIPLE:
                self.tuples[node] = results
            else:
                self.values.update(zip(region.results, results, strict=True))

    def call(self, region: Region) -> list[Any]:
        """Call the generic kernel of a region."""
        types = [t for n in region.results for t in generic.results_of(n)]
        extra = extra_symbols(
            [leaf.tensor for leaf in region.leaves], generic.region_symbols(region.results, region.leaves)
        )
        return self.call_tir(self.module.generic(region), [self.value(n) for n in region.leaves], types, extra)

    def call_tir(
        self, function: Any, arguments: Sequence[Any], types: Sequence[TensorType], extra: Sequence[str]
    ) -> list[Any]:
        """Call a kernel that writes results of these types."""
        b = self.module.builder
        out = [self.type(t) for t in types]
        scalars = [self.symbols[s] for s in extra]
        result = b.emit(
            relax.call_tir(function, relax.Tuple([*arguments, *scalars]), out_ty=out if len(out) > 1 else out[0])
        )
        return [result] if len(out) == 1 else [b.emit(relax.TupleGetItem(result, i)) for i in range(len(out))]

    def view(self, value: Any, t: TensorType) -> Any:
        """The same memory with other axes."""
        shape = relax.ShapeExpr([expression(d, self.symbols) for d in t.shape])
        if 0 in t.shape:  # which relax.op.reshape takes for "as it was"
            return self.module.builder.emit(
                relax.call_pure_packed("vm.builtin.reshape", value, shape, ty_args=self.type(t))
            )
        return self.module.builder.emit(relax.op.reshape(value, shape))

    def chosen(self, node: Node, kernel: Kernel, function: Any) -> list[Any]:
        """Call a specialised kernel, with the views that it wants."""
        arguments = []
        for argument in kernel.arguments:
            operand = node.operands[argument.operand]
            if operand is None:
                raise CompileError(f"the kernel for {node!r} takes operand {argument.operand}, which is absent")
            value = self.value(operand)
            arguments.append(
                value if argument.shape is None else self.view(value, operand.tensor.with_shape(*argument.shape))
            )
        types = generic.results_of(node)
        if kernel.results is None:
            return self.call_tir(function, arguments, types, kernel.symbols)
        seen = [t.with_shape(*shape) for t, shape in zip(types, kernel.results, strict=True)]
        results = self.call_tir(function, arguments, seen, kernel.symbols)
        return [self.view(r, t) for r, t in zip(results, types, strict=True)]

    def append(self, node: Node) -> None:
        """Append to a cache: in place where the cache is an input that nothing else reads, else to a copy."""
        cache = node.operands[0]
        assert cache is not None
        owned = cache.op is INPUT or (cache.op is ops.cache_append and cache not in self.graph.outputs)
        value = self.value(cache)
        if not owned or len(self.graph.users[cache]) > 1:
            value = self.copy(cache)
        found = self.module.specialised(node)
        leaves = tuple(dict.fromkeys(node.parents))
        region = Region((node,), leaves)
        if found is not None:
            function, extra = found[1], found[0].symbols
        else:
            function = self.module.generic(region)
            extra = tuple(extra_symbols([n.tensor for n in leaves], generic.region_symbols((node,), leaves)))
        others = [self.value(n) for n in node.parents[1:]]
        if found is not None:
            others = [self.value(o) for a in found[0].arguments[1:] if (o := node.operands[a.operand]) is not None]
        self.values[node] = self.module.builder.emit(
            relax.call_tir_inplace(
                function,
                relax.Tuple([value, *others, *(self.symbols[s] for s in extra)]),
                inplace_indices=[0],
                out_ty=self.type(node.tensor),
            )
        )

    def copy(self, node: Node) -> Any:
        """A fresh tensor with a node's elements."""
        return self.call(Region((ops.broadcast_to(node, shape=node.shape),), (node,)))[0]

    def outputs(self) -> list[Any]:
        """The results; none shares memory with an input, a weight, a constant or another result (an appended cache is
        the buffer that the caller gave for it)."""
        seen: set[Node] = set()
        results = []
        for node in self.graph.outputs:
            fresh = node.op not in (INPUT, WEIGHT, CONSTANT, ops.get, ops.reshape) and node not in seen
            results.append(self.value(node) if fresh else self.copy(node))
            seen.add(node)
        return results


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
