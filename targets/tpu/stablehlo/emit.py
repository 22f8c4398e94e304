"""From a graph to the text of a StableHLO module.

`main` has a parameter for every input and weight, in the graph's order, and a line or a few for every node; an op that takes more is
a private function, which all nodes with the same types and attributes call. The values' names are the ops' with the node's number
in the graph's text, locations are the places in the user's model. Weights are never constants of the program.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import attrs

from jisu.compiler.entry import Entry
from jisu.compiler.errors import CompileError
from jisu.compiler.graph import CONSTANT, INPUT, WEIGHT, Graph, Node, Op
from jisu.compiler.ops import cache_append
from jisu.compiler.types import TensorType, TupleType, substitute
from jisu.targets.tpu.stablehlo import contract, elementwise, moves, nn, quantize, rows, sampling, sparse
from jisu.targets.tpu.stablehlo.build import Body, Value, type_text

EMITTERS: Mapping[Op, Callable[..., Any]] = {
    **elementwise.EMITTERS,
    **moves.EMITTERS,
    **contract.EMITTERS,
    **nn.EMITTERS,
    **rows.EMITTERS,
    **quantize.EMITTERS,
    **sparse.EMITTERS,
    **sampling.EMITTERS,
}
"""What each op becomes: called like the op's meaning, with `Value`s instead of arrays and the body before them."""

LEAVES = (INPUT, WEIGHT, CONSTANT)
"""Ops without an emitter: `main`'s parameters, and constants, which `emit` writes itself."""

INLINE = 4
"""Statements that a node may take in `main`; more become a function."""


@attrs.frozen
class Kernel:
    """What a node calls instead of what its op's emitter would write.

    name: of a function that takes the node's operands (those that are there), or the values of the nodes `takes`, which they follow from, and
    returns its results. text: it and whatever it needs, as they stand in the module: `func.func private @name(…) … { … }`, with symbols
    that no other kernel has. Nodes share a kernel by naming it alike, with the same text.
    """

    name: str
    text: str
    takes: tuple[Node, ...] | None = None


Chooser: TypeAlias = "Callable[[Node, Mapping[str, int]], Kernel | None]"
"""Says for a node, at the sizes of the symbols, which kernel computes it, if any."""


def emit(
    graph: Graph,
    sizes: Mapping[str, int],
    kernels: Mapping[Node, Kernel] | Chooser | None = None,
    *,
    name: str = "jisu",
    donate: bool = True,
) -> str:
    """The text of a StableHLO module that computes `graph` where its symbols have these sizes (a bucket).

    kernels: which nodes call which kernel. name: the module's. donate: caches that are appended to are updated in place (the results
    that `signature` says are aliases). `main` takes the inputs and then the weights, as `signature` lists them.

    An index outside its table or a cache's capacity, and an integer divided by zero, are no errors here, as they are on a CPU: the
    nearest place is read, and the quotient is 0. Raises CompileError for a kernel that doesn't fit and for
    types that an emitter got wrong, TypeRuleError for a symbol without a size.
    """
    if kernels is None or isinstance(kernels, Mapping):
        given = kernels or {}
        return _Module(graph, sizes, lambda node, _: given.get(node), donate).text(name)
    return _Module(graph, sizes, kernels, donate).text(name)


def signature(graph: Graph, sizes: Mapping[str, int]) -> Entry:
    """What `emit`'s `main` takes and returns at these sizes: inputs, then weights; results, and which input each is that is updated."""
    inputs = {node: i for i, node in enumerate(graph.inputs)}
    weights: dict[str, TensorType] = {}
    for node in graph.nodes:
        if node.op is WEIGHT:
            weights.setdefault(node.name, node.tensor.at(sizes))
    aliases: list[int | None] = []
    for node in graph.outputs:
        held = node
        while held.op is cache_append:
            held = held.parents[0]
        number = inputs.get(held) if held is not node else None
        aliases.append(number if number not in aliases else None)
    return Entry(
        inputs=tuple((node.name, node.tensor.at(sizes)) for node in graph.inputs),
        weights=tuple(weights.items()),
        outputs=tuple(node.tensor.at(sizes) for node in graph.outputs),
        aliases=tuple(aliases),
        symbols=(),
    )


def _results(node: Node, sizes: Mapping[str, int]) -> tuple[TensorType, ...]:
    items = node.type.items if isinstance(node.type, TupleType) else (node.tensor,)
    return tuple(t.at(sizes) for t in items)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")
    return f'"{escaped}"'


class _Module:
    """The module while it is written."""

    def __init__(self, graph: Graph, sizes: Mapping[str, int], choose: Chooser, donate: bool) -> None:
        self.graph, self.sizes, self.choose, self.donate = graph, sizes, choose, donate
        self.lines: list[str] = []
        self.values: dict[Node, Value | tuple[Value, ...]] = {}
        self.functions: dict[tuple[Any, ...], str] = {}  # what an op's function was made for -> its name
        self.texts: dict[str, str] = {}  # functions by name
        self.taken: set[str] = set()

    def unique(self, name: str) -> str:
        """A name for a value in `main` that nothing else has."""
        name = re.sub(r"[^\w.$-]", "_", name)
        name = name if re.match(r"[A-Za-z_$.-]", name) else f"_{name}"
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return f"%{name}"

    def text(self, name: str) -> str:
        main = Body()
        shown = self.parameters(main)
        for number, node in enumerate(self.graph.nodes):
            if node.op not in (INPUT, WEIGHT):
                self.values[node] = self.node(node, number)
        outputs = [self.values[node] for node in self.graph.outputs]
        assert all(isinstance(v, Value) for v in outputs)
        types = ", ".join(v.type for v in outputs)  # type: ignore[union-attr]
        returned = ", ".join(v.name for v in outputs)  # type: ignore[union-attr]
        parameters = ",\n".join(f"      {p}" for p in shown)
        lines = [
            f"module @{re.sub(r'[^A-Za-z0-9_]', '_', name)} {{",
            f"  func.func public @main(\n{parameters}\n  ) -> ({types}) {{",
            *self.lines,
            f"    return {returned} : {types}" if outputs else "    return",
            "  }",
            *self.texts.values(),
            "}",
        ]
        return "\n".join(lines) + "\n"

    def parameters(self, main: Body) -> list[str]:
        """Makes the inputs' and weights' values; their declarations."""
        entry = signature(self.graph, self.sizes)
        outputs = {a: i for i, a in enumerate(entry.aliases) if a is not None} if self.donate else {}
        found = []
        for i, node in enumerate(self.graph.inputs):
            self.values[node] = value = self.parameter(main, node)
            held = f" {{tf.aliasing_output = {outputs[i]} : i32}}" if i in outputs else ""
            found.append(f"{value.name}: {value.type}{held} loc({_quoted(node.name)})")
        by_name: dict[str, Value] = {}
        for node in self.graph.nodes:
            if node.op is WEIGHT:
                if node.name not in by_name:
                    by_name[node.name] = value = self.parameter(main, node)
                    found.append(f"{value.name}: {value.type} loc({_quoted(node.name)})")
                self.values[node] = by_name[node.name]
        return found

    def parameter(self, main: Body, node: Node) -> Value:
        kind = node.tensor.at(self.sizes)
        return Value(main, self.unique(node.name), kind.shape, kind.dtype)  # type: ignore[arg-type]

    def node(self, node: Node, number: int) -> Value | tuple[Value, ...]:
        """Write a node's statements; its value or values."""
        name = self.unique(f"{node.op.name}_{number}")
        where = f" loc({_quoted(node.source)})" if node.source else ""
        if node.op is CONSTANT:
            body = Body(tail=where)
            return self.inlined(body, body.array(node.value.array, node.dtype), name)
        operands = [None if o is None else self.values[o] for o in node.operands]
        kernel = self.choose(node, self.sizes)
        if kernel is not None:
            if self.texts.setdefault(kernel.name, kernel.text) != kernel.text:
                raise CompileError(f"two kernels are named {kernel.name!r}; name a kernel by what it was made for")
            if kernel.takes is not None:
                operands = [self.values[n] for n in kernel.takes]
            return self.call(kernel.name, node, operands, name, where)
        if node.op not in EMITTERS:
            raise CompileError(f"{node.op.name} has no StableHLO; give it an emitter in targets/tpu/stablehlo")
        body = Body(f"{name}.", tail=where)
        found = self.emitted(body, node, [self.moved(o, body) for o in operands])
        if len(body.lines) <= INLINE:
            return self.inlined(body, found, name)
        return self.call(self.function(node, operands), node, operands, name, where)

    @staticmethod
    def moved(operand: Any, body: Body) -> Any:
        """An operand as a value of another body."""
        if isinstance(operand, tuple):
            return tuple(attrs.evolve(v, body=body) for v in operand)
        return None if operand is None else attrs.evolve(operand, body=body)

    def emitted(self, body: Body, node: Node, operands: Sequence[Any]) -> Value | tuple[Value, ...]:
        """What the op's emitter makes of operands, checked against the node's type."""
        attributes = {k: substitute(v, self.sizes) for k, v in node.attributes.items()}
        found = EMITTERS[node.op](body, *operands, **attributes)
        made = found if isinstance(found, tuple) else (found,)
        types = tuple(TensorType(v.shape, v.dtype) for v in made)
        if types != _results(node, self.sizes):
            wanted = ", ".join(map(str, _results(node, self.sizes)))
            raise CompileError(f"{node.op.name} gives {', '.join(map(str, types))} in StableHLO, not {wanted}")
        return tuple(made) if isinstance(node.type, TupleType) else made[0]

    def inlined(self, body: Body, found: Value | tuple[Value, ...], name: str) -> Value | tuple[Value, ...]:
        """Take a body's statements over into `main`; what the last one defines gets the node's name."""
        *first, last = body.lines or [""]
        if isinstance(found, Value) and last.startswith(f"{body.indent}{found.name} = "):
            last = last.replace(f"{found.name} = ", f"{name} = ", 1)
            found = attrs.evolve(found, name=name)
        self.lines += [*first, last] if body.lines else []
        return found

    def call(
        self, function: str, node: Node, operands: Sequence[Any], name: str, where: str
    ) -> Value | tuple[Value, ...]:
        """Write the call of a function on the operands that are there."""
        body = Body(tail=where)
        body.name = lambda: name  # type: ignore[method-assign]
        given, results = [o for o in operands if o is not None], _results(node, self.sizes)
        types = ", ".join(type_text(t.shape, t.dtype) for t in results)  # type: ignore[arg-type]
        text = f"call @{function}({', '.join(v.name for v in given)}) : ({', '.join(v.type for v in given)}) -> "
        found = body.several(text + (types if len(results) == 1 else f"({types})"), results)
        self.lines += body.lines
        return found if isinstance(node.type, TupleType) else found[0]

    def function(self, node: Node, operands: Sequence[Any]) -> str:
        """The name of the function for a node, which is written at its first use."""
        attributes = tuple(sorted((k, str(substitute(v, self.sizes))) for k, v in node.attributes.items()))
        types = tuple(None if v is None else v.type for v in operands)
        key = (node.op, attributes, types)
        if key not in self.functions:
            count = sum(made is node.op for made, *_ in self.functions)
            name = self.functions[key] = f"{node.op.name}_{count}"
            body = Body()
            names = [f"%{n}" for n in node.op.operand_names]
            if node.op.variadic:
                names = [*names[:-1], *(f"{names[-1]}{i}" for i in range(len(operands) - len(names) + 1))]
            given = [
                None if v is None else Value(body, n, v.shape, v.dtype) for n, v in zip(names, operands, strict=True)
            ]
            found = self.emitted(body, node, given)
            results = found if isinstance(found, tuple) else (found,)
            shown = ", ".join(f"{v.name}: {v.type}" for v in given if v is not None)
            types_text = ", ".join(v.type for v in results)
            head = f"  func.func private @{name}({shown}) -> ({types_text}) {{"
            end = f"    return {', '.join(v.name for v in results)} : {types_text}"
            self.texts[name] = "\n".join([head, *body.lines, end, "  }"])
        return self.functions[key]
