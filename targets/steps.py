"""A graph as calls of kernels: what is called in which order, on which memory. Every target that runs kernel by kernel lowers through this.

Intermediate values lie in an arena that `targets.arena` shares out; views cost nothing; a kernel is chosen per node by a table
(`Choosers`), and what no chooser takes is computed by `targets.cpu.generic`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import attrs

from jisu.compiler import ops
from jisu.compiler.entry import Entry, constant_name
from jisu.compiler.errors import CompileError, TargetError
from jisu.compiler.graph import CONSTANT, INPUT, WEIGHT, Graph, Node, Op
from jisu.compiler.text import attribute_text
from jisu.compiler.types import Dim, TensorType, same_dim, symbol
from jisu.targets.arena import Lifetime, share
from jisu.targets.cpu import generic
from jisu.targets.cpu.generic.build import extra_symbols
from jisu.targets.cpu.generic.element import always_pulled
from jisu.targets.fusion import Region, regions, separable
from jisu.targets.schedule import Schedules, kernel_key
from jisu.targets.target import Target

ALIGNMENT = 64  # bytes, of every value in memory


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


@attrs.frozen(eq=False)
class Joint:
    """Several nodes that a chosen kernel computes together: arguments of `kernel` are numbers of the region's leaves, its results those of the
    region but for appended caches, which it writes where they are."""

    region: Region
    kernel: Kernel


Joiner = Callable[[Graph, Target], Iterable[Joint]]
"""What may become one kernel in a graph."""


@attrs.frozen
class KernelUse:
    """A kernel in the module: its name, the ops it computes, at how many places it is called, and, where the shapes of a call decide, what
    does it ("thin8 where batch*sequence <= 8")."""

    name: str
    op: str
    count: int
    choices: tuple[str, ...] = ()


@attrs.frozen(eq=False)
class Callee:
    """A kernel as steps call it; `code` is the target's.

    shapes: per parameter, a tensor's dimensions (an int, or a variable; None where it is neither), or None for a number.
    sizes: the variables among the dimensions, whose values follow the parameters. scratch: bytes of memory that it wants for itself
    besides, each as one more tensor behind its results. counters: how many numbers int32 it wants, as a tensor behind those, that are 0
    before and after each call, whoever's.
    """

    code: Any
    name: str
    shapes: tuple[tuple[Any, ...] | None, ...] = ()
    sizes: tuple[Any, ...] = ()
    scratch: tuple[Dim, ...] = ()
    counters: Dim = 0


class Kernels:
    """Kernels by content, shared by all entries. A target says how a kernel is kept (`adopt`) and how a generic one is built (`build`), and whether
    kernels are `launched` (see `targets.fusion.regions`)."""

    launched = False

    def __init__(self, target: Target, choosers: Choosers, schedules: Schedules) -> None:
        self.target, self.choosers, self.schedules = target, choosers, schedules
        self.functions: dict[str, Callee] = {}
        self.chosen: dict[str, tuple[Kernel, Callee] | None] = {}
        self.names: Counter[str] = Counter()
        self.counts: Counter[tuple[str, str]] = Counter()

    def add(self, function: Any, wanted: str) -> Callee:
        """Put a kernel into the module under a name that no other has."""
        self.names[wanted] += 1
        name = wanted if self.names[wanted] == 1 else f"{wanted}_v{self.names[wanted]}"
        return self.adopt(function, name)

    def adopt(self, function: Any, name: str) -> Callee:
        """Keep what a chooser or `build` made, under a name that is its own."""
        raise NotImplementedError

    def build(self, name: str, region: Region) -> Any:
        """The generic kernel of a region."""
        return generic.kernel(name, region.results, region.leaves)

    def generic(self, region: Region) -> Callee:
        """The generic kernel of a region."""
        key = describe(region)
        label = "+".join(dict.fromkeys(n.op.name for n in region.results))
        if key not in self.functions:
            name = kernel_name(region)
            try:
                function = self.build(name, region)
            except CompileError:
                raise
            except Exception as error:
                raise CompileError(f"can't lower {label} ({region.results[0]!r}): {error}") from error
            self.functions[key] = self.add(function, name)
        callee = self.functions[key]
        self.counts[callee.name, label] += 1
        return callee

    def specialised(self, node: Node) -> tuple[Kernel, Callee] | None:
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
            named = kernel_name(Region((node,), leaves))
            self.chosen[key] = None if kernel is None else (kernel, self.add(kernel.function, named))
        found = self.chosen[key]
        if found is not None:
            self.counts[found[1].name, node.op.name] += 1
        return found

    def joints(self, graph: Graph) -> Iterable[Sequence[Joint]]:
        """What may be computed together by kernels that the target has for that, kind by kind."""
        return ()

    def joint(self, joint: Joint) -> Callee:
        """The kernel of a joint."""
        key = describe(joint.region)
        if key not in self.functions:
            self.functions[key] = self.add(joint.kernel.function, kernel_name(joint.region))
        callee = self.functions[key]
        self.counts[callee.name, "+".join(dict.fromkeys(n.op.name for n in joint.region.nodes))] += 1
        return callee

    def uses(self) -> tuple[KernelUse, ...]:
        """Every kernel with the number of its calls, most used first."""
        return tuple(KernelUse(name, op, count, self.choices(name)) for (name, op), count in self.counts.most_common())

    def choices(self, name: str) -> tuple[str, ...]:
        """What a kernel consists of where the shapes of a call decide."""
        return ()


@attrs.define(eq=False)
class Memory:
    """Where a value lies: `kind` "input", "weight", "output", "counters" or "arena", and its number there (of the arena: its slot)."""

    kind: str
    number: int = -1
    nbytes: Dim = 0
    first: int = -1
    last: int = -1


@attrs.frozen(eq=False)
class Step:
    """One call: per parameter the memory and the shape in which the kernel sees it, or a number."""

    callee: Callee
    arguments: tuple[tuple[Memory, tuple[Dim, ...]] | Dim, ...]

    def solved(self) -> tuple[list[Dim], list[tuple[Dim, Dim]]]:
        """The sizes that the kernel takes, from the shapes of its arguments, and which dimensions must be equal at run time.

        Raises CompileError where a dimension never is what the kernel was made for.
        """
        known: dict[Any, Dim] = {}
        equal: list[tuple[Dim, Dim]] = []
        for shape, argument in zip(self.callee.shapes, self.arguments, strict=False):
            if shape is None or not isinstance(argument, tuple):
                continue
            name = self.callee.name
            if len(shape) != len(argument[1]):
                raise CompileError(f"{name} takes a tensor of rank {len(shape)}, not of shape {argument[1]}")
            for want, have in zip(shape, argument[1], strict=True):
                if want is None:
                    continue
                settled = want if isinstance(want, int) else known.setdefault(want, have)
                if isinstance(settled, int) and isinstance(have, int) and settled != have:
                    raise CompileError(f"{name} takes a dimension of {settled}, not of {have}")
                if not same_dim(settled, have):
                    equal.append((settled, have))
        return [known[size] for size in self.callee.sizes], equal


class Steps:
    """One graph's calls under construction."""

    def __init__(self, module: Kernels, graph: Graph) -> None:
        self.module, self.graph = module, graph
        self.values: dict[Node, Memory] = {n: Memory("input", i) for i, n in enumerate(graph.inputs)}
        self.tuples: dict[Node, list[Memory]] = {}
        self.weights: dict[str, tuple[int, TensorType]] = {}
        self.steps: list[Step] = []

    def value(self, node: Node) -> Memory:
        """Where a node's value stands."""
        if node not in self.values:
            if node.op not in (WEIGHT, CONSTANT):
                raise CompileError(f"{node!r} was not computed before its use")
            name = node.name if node.op is WEIGHT else constant_name(node)
            number, _ = self.weights.setdefault(name, (len(self.weights), node.tensor))
            self.values[node] = Memory("weight", number)
        return self.values[node]

    def emit(self) -> tuple[Entry, list[tuple[Dim, ...]]]:
        """Note all calls; how the entry is called, and per slot of the arena the sizes of which it takes the largest."""
        joints = self.joints()
        for region in regions(self.graph, self.module.choosers, tuple(joints), launched=self.module.launched):
            if region in joints:
                self.joint(joints[region])
            else:
                self.region(region)
        entry = self.outputs()
        return entry, self.lay_out()

    def joints(self) -> dict[Region, Joint]:
        """What is computed together: of what the target has kernels for as much as can be computed one after another."""
        joints: dict[Region, Joint] = {}
        for kind in self.module.joints(self.graph):
            # Mostly that is all of a kind, and one look at the graph does for them.
            every = {joint.region: joint for joint in kind}
            if separable(self.graph, (*joints, *every)):
                joints |= every
                continue
            for region, joint in every.items():
                if separable(self.graph, (*joints, region)):
                    joints[region] = joint
        return joints

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
        callee: Callee,
        arguments: Sequence[tuple[Memory, tuple[Dim, ...]]],
        extra: Sequence[str],
        types: Sequence[TensorType],
    ) -> list[Memory]:
        """Note a call of a kernel that takes these tensors, then these symbols, and writes results of these types."""
        results = [Memory("arena", nbytes=t.nbytes) for t in types]
        numbers = [symbol(name) for name in extra]
        outs = [(m, t.shape) for m, t in zip(results, types, strict=True)]
        own = [(Memory("arena", nbytes=n), (n,)) for n in callee.scratch]
        own += [(Memory("counters", 0), (callee.counters,))] if callee.counters != 0 else []
        self.steps.append(Step(callee, (*arguments, *numbers, *outs, *own)))
        return results

    def call(self, region: Region) -> list[Memory]:
        """Call the generic kernel of a region."""
        types = [t for n in region.results for t in generic.results_of(n)]
        arguments = [(self.value(n), n.shape) for n in region.leaves]
        return self.step(self.module.generic(region), arguments, _extra(region), types)

    def chosen(self, node: Node, kernel: Kernel, callee: Callee) -> list[Memory]:
        """Call a specialised kernel, with the views that it wants."""
        types = generic.results_of(node)
        if kernel.results is not None:
            types = tuple(t.with_shape(*shape) for t, shape in zip(types, kernel.results, strict=True))
        return self.step(callee, self.operands(node, kernel), kernel.symbols, types)

    def operands(self, node: Node, kernel: Kernel) -> list[tuple[Memory, tuple[Dim, ...]]]:
        """The operands that a specialised kernel takes, as it wants to see them."""
        found = []
        for argument in kernel.arguments:
            operand = node.operands[argument.operand]
            if operand is None:
                raise CompileError(f"the kernel for {node!r} takes operand {argument.operand}, which is absent")
            found.append((self.value(operand), operand.shape if argument.shape is None else argument.shape))
        return found

    def joint(self, joint: Joint) -> None:
        """Call the kernel of several nodes."""
        region, kernel = joint.region, joint.kernel
        caches = {n.parents[0]: self.appended(n) for n in region.results if n.op is ops.cache_append}
        leaves = [region.leaves[argument.operand] for argument in kernel.arguments]
        arguments = [(caches[n] if n in caches else self.value(n), n.shape) for n in leaves]
        made = [n for n in region.results if n.op is not ops.cache_append]
        results = self.step(self.module.joint(joint), arguments, kernel.symbols, [n.tensor for n in made])
        self.values.update(zip(made, results, strict=True))
        self.values.update((n, caches[n.parents[0]]) for n in region.results if n not in made)

    def appended(self, node: Node) -> Memory:
        """Where a cache is appended to: in place where it is an input that nothing else reads, else in a copy."""
        cache = node.parents[0]
        owned = cache.op is INPUT or (cache.op is ops.cache_append and cache not in self.graph.outputs)
        return self.value(cache) if owned and len(self.graph.users[cache]) == 1 else self.copy(cache)

    def append(self, node: Node) -> None:
        """Append to a cache."""
        cache, value = node.parents[0], self.appended(node)
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

    def copy(self, node: Node) -> Memory:
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
        found: dict[Memory, None] = {}
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


def _extra(region: Region) -> list[str]:
    """The symbols that a generic kernel must be told."""
    return extra_symbols([n.tensor for n in region.leaves], generic.region_symbols(region.results, region.leaves))


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
