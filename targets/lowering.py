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
from tvm import IRModule, relax, runtime, tirx

from jisu.compiler import ops
from jisu.compiler.errors import CompileError
from jisu.compiler.graph import CONSTANT, INPUT, WEIGHT, Graph, Node, Op
from jisu.compiler.text import _attribute
from jisu.compiler.types import Dim, TensorType
from jisu.targets.cpu import generic
from jisu.targets.cpu.generic.build import expression, extra_symbols
from jisu.targets.cpu.generic.element import always_pulled
from jisu.targets.fusion import Region, regions
from jisu.targets.target import Target


@attrs.frozen
class Argument:
    """One tensor argument of a chosen kernel.

    `operands` are the node's operands that it stands for: one, or several weights packed into one tensor. `type` is the
    type that the kernel takes where it differs from the operand's (a view with other axes, or the packed weight).
    `layout` names the packing; it is applied to the weight before the first call, by whoever binds the weights.
    """

    operands: tuple[int, ...]
    type: TensorType | None = None
    layout: str = ""


@attrs.frozen(eq=False)
class Kernel:
    """A chosen kernel: a PrimFunc over `arguments`, then the results (as `results` where they are views), then `symbols`.

    Packed arguments (with a layout) must be weights. `symbols` are int64 parameters at the end, by name.
    """

    function: Any
    arguments: tuple[Argument, ...]
    results: tuple[TensorType, ...] | None = None
    symbols: tuple[str, ...] = ()


Choosers = Mapping[Op, Callable[[Node, Target], Kernel | None]]

KERNELS: dict[Op, Callable[[Node, Target], Kernel | None]] = {}
"""The default table of specialised kernels: a chooser returns None where the generic kernel has to do."""


@attrs.frozen
class WeightSlot:
    """One weight argument of an entry: the stored tensors behind it, how they are packed, and the type it then has."""

    names: tuple[str, ...]
    layout: str
    type: TensorType


@attrs.frozen
class KernelUse:
    """A kernel in the module: its name, the ops it computes, and at how many places it is called."""

    name: str
    op: str
    count: int


@attrs.frozen(eq=False)
class Lowered:
    """What `lower` returns: the module, each entry's weight arguments in order, and the kernels."""

    module: IRModule
    weights: Mapping[str, tuple[WeightSlot, ...]]
    kernels: tuple[KernelUse, ...]


def lower(entries: Mapping[str, Graph], target: Target, *, kernels: Choosers | None = None) -> Lowered:
    """One TVM module with an entry function per graph; equal kernels of all graphs are compiled once.

    Raises CompileError for a graph that can't be lowered, naming the op.
    """
    module = _Module(target, KERNELS if kernels is None else kernels)
    weights = {name: _Entry(module, name, graph).emit() for name, graph in entries.items()}
    return Lowered(module.builder.get(), weights, module.uses())


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
        # Whether an operand is a weight decides whether it can be packed, so that it belongs to the key.
        leaves = tuple(dict.fromkeys(node.parents))
        kinds = "".join("w" if o is not None and o.op is WEIGHT else "." for o in node.operands)
        key = f"{kinds} {describe(Region((node,), leaves))}"
        if key not in self.chosen:
            kernel = chooser(node, self.target)
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
        self.slots: dict[tuple[tuple[str, ...], str], tuple[WeightSlot, Any]] = {}

    def type(self, t: TensorType) -> Any:
        return lowered_type(t, self.symbols)

    def weight(self, names: tuple[str, ...], layout: str, t: TensorType) -> Any:
        """The argument that holds these weights in this layout."""
        key = (names, layout)
        if key not in self.slots:
            self.slots[key] = (WeightSlot(names, layout, t), relax.Var(f"w{len(self.slots)}", self.type(t)))
        return self.slots[key][1]

    def value(self, node: Node) -> Any:
        """The Relax value of a node that stands in memory."""
        if node not in self.values:
            if node.op is WEIGHT:
                return self.weight((node.name,), "", node.tensor)
            if node.op is CONSTANT:
                array = np.ascontiguousarray(node.value.array)
                self.values[node] = relax.const(runtime.tensor(array), node.dtype)
            else:
                raise CompileError(f"{node!r} was not computed before its use")
        return self.values[node]

    def emit(self) -> tuple[WeightSlot, ...]:
        """Write the entry into the module; the weights it takes, in order."""
        b = self.module.builder
        inputs = []
        for i, node in enumerate(self.graph.inputs):
            self.values[node] = relax.Var(f"x{i}", self.type(node.tensor))
            inputs.append(self.values[node])
        # The weights are known only after the body, and the builder wants the parameters first.
        found = regions(self.graph, self.module.choosers)
        plan = [self._plan(region) for region in found]
        outputs = self._outputs()
        parameters = [*inputs, *(var for _, var in self.slots.values())]
        with b.function(self.name, parameters, attrs={"num_input": len(inputs)}):
            with b.dataflow():
                for step in plan:
                    step()
                results = [b.emit_output(output()) for output in outputs]
            b.emit_func_output(relax.Tuple(results))
        return tuple(slot for slot, _ in self.slots.values())
