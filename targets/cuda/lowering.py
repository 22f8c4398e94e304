"""From graphs to kernels for NVIDIA GPUs and plans of their launches."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import attrs

from jisu.compiler.entry import Entry
from jisu.compiler.errors import CompileError
from jisu.compiler.graph import Graph
from jisu.compiler.launches import FAULT, Argument, Launch, Plan, TensorMap, Variant
from jisu.compiler.types import Dim
from jisu.targets.cpu import generic
from jisu.targets.cuda.builder import THREADS, DeviceBuilder, Fault, GenericKernel
from jisu.targets.cuda.device import MAP, DeviceKernel, overlaps
from jisu.targets.cuda.ptx import entry_name
from jisu.targets.fusion import Region
from jisu.targets.lowering import on_pointers
from jisu.targets.steps import Callee, Choosers, Joiner, Joint, Kernels, KernelUse, Step, Steps
from jisu.targets.target import Target

Given = int | TensorMap | Fault | tuple[str, Any]


@attrs.frozen
class DeviceCall:
    """A launch of a kernel, as choosers say it. arguments: numbers of the step's tensors (operands, results, scratch memory), sizes as
    ("size", dimension), maps of the step's tensors, as of ("step", number), the address of the flag of faults as (FAULT, 0), or a fault, whose
    number that is."""

    kernel: DeviceKernel
    grid: tuple[Dim, Dim, Dim]
    arguments: tuple[Given, ...]


@attrs.frozen
class DeviceFunction:
    """What a chooser makes of a node: the first variant of which every (dimension, bound) holds. scratch: bytes of memory that it wants.
    counters: how many numbers int32 that are 0 before and after each launch it wants, as one more tensor behind its scratch memory."""

    variants: tuple[tuple[tuple[tuple[Dim, int], ...], tuple[DeviceCall, ...]], ...]
    scratch: tuple[Dim, ...] = ()
    counters: Dim = 0


@attrs.frozen(eq=False)
class LoweredDevice:
    """What `lower` returns.

    written: kernels written for a GPU. functions: generic ones, TIR functions on pointers by name. faults: what kernels may complain of:
    fault n is number n + 1.
    """

    written: tuple[DeviceKernel, ...]
    functions: Mapping[str, Any]
    entries: Mapping[str, Entry]
    plans: Mapping[str, Plan]
    faults: tuple[Fault, ...]
    kernels: tuple[KernelUse, ...]


class _Kernels(Kernels):
    launched = True

    def __init__(self, target: Target, choosers: Choosers, joiners: Sequence[Joiner]) -> None:
        super().__init__(target, choosers, {})
        self.joiners = joiners
        self.faults: list[Fault] = []
        self.written: dict[str, DeviceKernel] = {}
        self.bodies: dict[str, Any] = {}
        self.chosen_of: dict[str, tuple[Any, ...]] = {}

    def build(self, name: str, region: Region) -> GenericKernel:
        """The generic kernel of a region, each point of its loops by another thread."""
        builder = functools.partial(DeviceBuilder, target=self.target, faults=self.faults)
        made: GenericKernel = generic.kernel(name, region.results, region.leaves, builder)
        return made

    def joints(self, graph: Graph) -> Iterator[Sequence[Joint]]:
        """What kernels compute together."""
        for joiner in self.joiners:
            yield tuple(joiner(graph, self.target))

    def choices(self, name: str) -> tuple[str, ...]:
        """The kernels of a name, each with the sizes that it is for."""
        found = []
        for at_most, calls in self.chosen_of.get(name, ()):
            where = " and ".join(f"{size} <= {bound}" for size, bound in at_most)
            kernels = " + ".join(_short(call.kernel) for call in calls)
            found.append(f"{kernels} where {where}" if where else kernels)
        return tuple(found) or ("generic",)

    def adopt(self, function: DeviceFunction | GenericKernel, name: str) -> Callee:
        """Keep the kernels."""
        if isinstance(function, GenericKernel):
            callee, self.bodies[name] = on_pointers(function.function, name, None)
            return attrs.evolve(callee, code=function, scratch=(function.pool_bytes,) if function.pooled else ())
        self.chosen_of[name] = function.variants
        for _, calls in function.variants:
            for call in calls:
                self.written[call.kernel.name] = call.kernel
                self.faults += [a for a in call.arguments if isinstance(a, Fault) and a not in self.faults]
        return Callee(function, name, scratch=function.scratch, counters=function.counters)


def _short(kernel: DeviceKernel) -> str:
    """A kernel's name without what makes it unique."""
    return kernel.name.removeprefix("jisu_").rpartition("_")[0]


def lower(entries: Mapping[str, Graph], target: Target, *, kernels: Choosers | None = None) -> LoweredDevice:
    """Kernels and plans for the graphs; equal kernels of all graphs are one.

    Raises CompileError for a graph that can't be lowered, naming the op.
    """
    from jisu.targets.cuda.choose import CHOOSERS  # which imports this module
    from jisu.targets.cuda.join import JOINERS

    module = _Kernels(target, CHOOSERS if kernels is None else kernels, JOINERS if kernels is None else ())
    made: dict[str, Entry] = {}
    plans: dict[str, Plan] = {}
    for name, graph in entries.items():
        steps = Steps(module, graph)
        made[name], slots = steps.emit()
        variants, equal = [], []
        for step in steps.steps:
            sizes, must = step.solved()
            equal += [(a, b, step.callee.name) for a, b in must]
            variants.append(_launches(step, sizes, target, module.faults))
        counters = dict.fromkeys(step.callee.counters for step in steps.steps if step.callee.counters != 0)
        plans[name] = Plan(tuple(slots), tuple(variants), tuple(equal), tuple(counters))
    return LoweredDevice(
        tuple(module.written.values()), module.bodies, made, plans, tuple(module.faults), module.uses()
    )


def _kind(argument: Given) -> str:
    """Of a kernel's parameter."""
    if isinstance(argument, TensorMap):
        return MAP
    return "ptr" if isinstance(argument, int) or argument == (FAULT, 0) else "i64"


def _argument(argument: Given, given: Sequence[Argument], faults: Sequence[Fault]) -> Argument:
    """A launch's argument, from those of its step."""
    if isinstance(argument, TensorMap):
        tensor = given[argument.tensor[1]]
        assert isinstance(tensor, tuple)
        return attrs.evolve(argument, tensor=tensor)
    if isinstance(argument, Fault):
        return faults.index(argument) + 1
    return given[argument] if isinstance(argument, int) else (FAULT, 0) if argument == (FAULT, 0) else argument[1]


def _launches(step: Step, sizes: Sequence[Dim], target: Target, faults: Sequence[Fault]) -> tuple[Variant, ...]:
    """A step with its arguments as the run time finds them."""
    given: list[Argument] = [(a[0].kind, a[0].number) if isinstance(a, tuple) else a for a in step.arguments]
    code = step.callee.code
    if isinstance(code, DeviceFunction):
        for _, calls in code.variants:
            for call in calls:
                kinds = tuple(_kind(a) for a in call.arguments)
                if kinds != call.kernel.parameters:
                    raise CompileError(f"{call.kernel.name} takes {call.kernel.parameters}, not {kinds}")
        return tuple(
            Variant(
                at_most,
                tuple(
                    Launch(
                        entry_name(call.kernel), call.grid, call.kernel.threads, call.kernel.shared_bytes,
                        tuple(_argument(a, given, faults) for a in call.arguments),
                        call.kernel.early and all(_is_weight(given, call.arguments[n]) for n in call.kernel.ahead),
                    )
                    for call in calls
                ),
            )
            for at_most, calls in code.variants
        )  # fmt: skip
    if not isinstance(code, GenericKernel):
        raise CompileError(f"{step.callee.name} is no kernel of a GPU")
    # The pool, if there is one, stands last among the tensors; in the function it comes behind the symbols, as an address.
    pool: Argument = given.pop() if code.pooled else 0
    tail = [(FAULT, 0), pool]
    launches = []
    for part in range(len(code.parts)):
        blocks = code.blocks(part, target.cores)
        arguments = (*given, *tail, part, *sizes)
        launches.append(Launch(step.callee.name, (blocks, 1, 1), THREADS, 0, arguments, overlaps(target)))
    return (Variant((), tuple(launches)),)


def _is_weight(given: Sequence[Argument], argument: Given) -> bool:
    """Whether a kernel's argument is memory that no kernel writes."""
    held = given[argument] if isinstance(argument, int) else None
    return isinstance(held, tuple) and held[0] == "weight"
