"""The graph: frozen nodes, ops that build them, and a Graph as an immutable value.

A Node is an op applied to operands; calling an op on nodes infers the type and makes the node, calling it on a pattern
(see `rewrite`) makes a pattern. A Graph is its outputs, its inputs in the caller's order, the storage of its weights and
the ranges of its symbols; everything else is derived.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

import attrs
import numpy as np

from jisu.compiler.types import Dim, TensorType, TupleType, Type, TypeRuleError, dim, dtype_name, require

if TYPE_CHECKING:
    import networkx as nx

MAX_INLINE = 64  # elements of the largest constant that stands in the graph itself; larger ones are weights


def _frozen(array: Any) -> np.ndarray:
    array = np.array(array, copy=True)
    array.setflags(write=False)
    return array


@attrs.frozen(eq=False)
class Constant:
    """A small array as an attribute: compared and hashed by its bytes."""

    array: np.ndarray = attrs.field(converter=_frozen)

    @property
    def key(self) -> tuple[str, tuple[int, ...], bytes]:
        """What makes two constants the same: dtype, shape and bits (so NaN equals NaN, and 0.0 differs from -0.0)."""
        return (str(self.array.dtype), self.array.shape, self.array.tobytes())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def _freeze(value: Any) -> Any:
    """Attribute values are hashable: lists become tuples, sympy integers ints, NumPy scalars Python's."""
    if isinstance(value, (list, tuple)):
        return tuple(_freeze(v) for v in value)
    if isinstance(value, np.generic):
        return value.item()
    if getattr(value, "is_Integer", False):
        return int(value)
    if hasattr(value, "free_symbols"):
        return dim(value)
    return value


def _attributes(attributes: Mapping[str, Any]) -> Mapping[str, Any]:
    return {k: _freeze(v) for k, v in attributes.items()}


@attrs.frozen(eq=False, repr=False)
class Node:
    """One application of an op. Nodes are compared by identity; `Graph` compares by content.

    `operands` may hold None where an op's optional operand is absent. `source` is where in the user's model the node
    came from; it never takes part in a comparison.
    """

    op: Op
    operands: tuple[Node | None, ...] = ()
    attributes: Mapping[str, Any] = attrs.field(factory=dict, converter=_attributes)
    type: Any = None  # TensorType or TupleType; None only in patterns
    source: str = ""

    @property
    def parents(self) -> tuple[Node, ...]:
        """The operands that are there."""
        return tuple(o for o in self.operands if o is not None)

    @property
    def shape(self) -> tuple[Dim, ...]:
        """Shape of the (single) result."""
        return self.tensor.shape

    @property
    def dtype(self) -> str:
        """Dtype of the (single) result."""
        return self.tensor.dtype

    @property
    def rank(self) -> int:
        """Rank of the (single) result."""
        return self.tensor.rank

    @property
    def tensor(self) -> TensorType:
        """The type, where the node has one result."""
        require(isinstance(self.type, TensorType), f"{self.op.name} has several results; take one with get(…, index=i)")
        return self.type  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        attributes = object.__getattribute__(self, "attributes")
        if name in attributes:
            return attributes[name]
        raise AttributeError(f"{self.op.name} node has no attribute {name!r}")

    def with_operands(self, operands: Iterable[Node | None]) -> Node:
        """The same op on other operands; the type is inferred anew."""
        operands = tuple(operands)
        if len(operands) == len(self.operands) and all(a is b for a, b in zip(operands, self.operands, strict=True)):
            return self
        if self.op.leaf:
            return self
        return self.op.make(operands, self.attributes, source=self.source)

    def __repr__(self) -> str:
        shown = ", ".join(["…"] * len(self.operands) + [f"{k}={v!r}" for k, v in self.attributes.items()])
        return f"{self.op.name}({shown}): {self.type}"


class Meaning(Protocol):
    """What an op means: NumPy arrays in, NumPy arrays out, attributes by keyword."""

    def __call__(self, *arrays: Any, **attributes: Any) -> Any: ...


AxesRule = str | Callable[..., str | None] | None


@attrs.frozen(eq=False, repr=False)
class Op:
    """An op's declaration, from which everything else is derived (see `defop`)."""

    name: str
    doc: str
    operand_names: tuple[str, ...]
    optional: tuple[bool, ...]
    variadic: bool
    defaults: Mapping[str, Any]  # attribute name -> default; inspect.Parameter.empty where required
    rule: Callable[..., Type] | None
    meaning: Meaning | None
    axes: AxesRule
    commutative: bool = False
    leaf: bool = False
    flops: float | Callable[..., Dim] = 1.0
    samples: Callable[[], Iterable[tuple[tuple[str | None, ...], Mapping[str, Any]]]] | None = None

    def __call__(self, *operands: Any, **attributes: Any) -> Node:
        """Apply the op. Python numbers among the operands become scalar constants of the first operand's dtype."""
        if not self.variadic:
            operands = operands + (None,) * (len(self.operand_names) - len(operands))
        return self.make(operands, attributes)

    def make(self, operands: Iterable[Any], attributes: Mapping[str, Any], source: str = "") -> Node:
        """Build a node; raises TypeRuleError where operands or attributes don't fit the declaration."""
        operands = tuple(operands)
        if not self.variadic:
            require(
                len(operands) == len(self.operand_names),
                f"{self.name} takes {len(self.operand_names)} operands, got {len(operands)}",
            )
            for name, optional, operand in zip(self.operand_names, self.optional, operands, strict=True):
                require(optional or operand is not None, f"{self.name} needs operand {name!r}")
        for i, name in enumerate(self.operand_names[:-1] if self.variadic else ()):
            require(len(operands) > i, f"{self.name} needs operand {name!r}")
        unknown = set(attributes) - set(self.defaults)
        require(
            not unknown, f"{self.name} has no attribute {', '.join(sorted(unknown))}; known: {', '.join(self.defaults)}"
        )
        full = {k: attributes.get(k, v) for k, v in self.defaults.items()}
        missing = [k for k, v in full.items() if v is inspect.Parameter.empty]
        require(not missing, f"{self.name} needs attribute {', '.join(missing)}")
        nodes = [o for o in operands if isinstance(o, Node)]
        is_pattern = any(n.type is None for n in nodes) or any(callable(v) for v in full.values())
        if is_pattern:
            from jisu.compiler.rewrite import literal

            return Node(
                self, tuple(o if o is None or isinstance(o, Node) else literal(o) for o in operands), full, None
            )
        dtype = next((n.dtype for n in nodes if isinstance(n.type, TensorType)), "float32")
        operands = tuple(o if o is None or isinstance(o, Node) else constant(o, dtype) for o in operands)
        full = {k: _freeze(v) for k, v in full.items()}
        try:
            type = self.infer([o.type if o is not None else None for o in operands], full)
        except TypeRuleError as error:
            raise TypeRuleError(f"{self.name}: {error}") from None
        return Node(self, operands, full, type, source)

    def infer(self, types: list[Type | None], attributes: Mapping[str, Any]) -> Type:
        """The type of the result from the operands' types; raises TypeRuleError where they don't fit."""
        if self.rule is not None:
            found = self.rule(*types, **attributes)
            if found is not None:
                return found
        from jisu.compiler.axes import infer_from_axes

        return infer_from_axes(self, types, attributes)

    def __repr__(self) -> str:
        return f"<op {self.name}>"


def defop(
    *,
    meaning: Meaning | None = None,
    axes: AxesRule = None,
    commutative: bool = False,
    leaf: bool = False,
    flops: float | Callable[..., Dim] = 1.0,
    samples: Callable[[], Iterable[tuple[tuple[str | None, ...], Mapping[str, Any]]]] | None = None,
    name: str | None = None,
) -> Callable[[Callable[..., Any]], Op]:
    """Declare an op by a function.

    Positional parameters are operands (a default of None makes one optional, `*xs` any number), keyword-only ones are
    attributes. The body is the type rule (TensorTypes in, a Type out); a body of `...` leaves it to `axes`, the index
    notation of `jisu.compiler.axes`. `meaning` is the NumPy reference. `flops` is per point of the iteration space that
    `axes` spans, or a function of the result's and the operands' types and the attributes that gives them all.
    `samples` yields operand types (in notation, "float32[2, 3]") and attributes for tests, for ops whose
    operands can't be drawn from `axes` alone.
    """

    def declare(function: Callable[..., Any]) -> Op:
        parameters = inspect.signature(function).parameters.values()
        operands = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.VAR_POSITIONAL)]
        return Op(
            name=name or function.__name__.rstrip("_"),
            doc=inspect.getdoc(function) or "",
            operand_names=tuple(p.name for p in operands),
            optional=tuple(p.default is None for p in operands),
            variadic=any(p.kind == p.VAR_POSITIONAL for p in operands),
            defaults={p.name: p.default for p in parameters if p.kind == p.KEYWORD_ONLY},
            rule=function,
            meaning=meaning,
            axes=axes,
            commutative=commutative,
            leaf=leaf,
            flops=flops,
            samples=samples,
        )

    return declare


def _leaf(name: str, doc: str, *attributes: str) -> Op:
    return Op(name, doc, (), (), False, dict.fromkeys(attributes, inspect.Parameter.empty), None, None, None, leaf=True)


INPUT = _leaf("input", "A value given at each call.", "name")
WEIGHT = _leaf("weight", "A tensor in storage, by name; two uses of one name are one tied weight.", "name")
CONSTANT = _leaf("constant", "A small array that stands in the graph.", "value")


def placeholder(name: str, type: TensorType, source: str = "") -> Node:
    """An input of a graph."""
    return Node(INPUT, (), {"name": name}, type, source)


def weight(name: str, type: TensorType, source: str = "") -> Node:
    """A reference to the stored tensor `name`."""
    return Node(WEIGHT, (), {"name": name}, type, source)


def constant(value: Any, dtype: str | None = None) -> Node:
    """A constant of at most `MAX_INLINE` elements; a Python number needs `dtype`."""
    from jisu.compiler.types import numpy_dtype

    array = np.asarray(value)
    if dtype is not None:
        with np.errstate(over="ignore"):
            array = np.asarray(value).astype(numpy_dtype(dtype))
    require(array.size <= MAX_INLINE, f"a constant of {array.size} elements belongs in the weights")
    return Node(CONSTANT, (), {"value": Constant(array)}, TensorType(array.shape, dtype_name(array.dtype)))


class Storage(Protocol):
    """Where a weight's values are: an array in memory, or a reference into a memory-mapped file."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> Any: ...
    def numpy(self) -> np.ndarray:
        """The values, without a copy where the storage allows it."""
        ...


@attrs.frozen(eq=False)
class ArrayStorage:
    """A weight whose values are an array in memory."""

    array: np.ndarray

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    @property
    def dtype(self) -> Any:
        return self.array.dtype

    def numpy(self) -> np.ndarray:
        """The array itself."""
        return self.array


def _nodes(nodes: Iterable[Node]) -> tuple[Node, ...]:
    return tuple(nodes)


@attrs.frozen(eq=False, repr=False)
class Graph:
    """An immutable program: inputs in order, outputs in order, weights' storage, ranges of symbols (inclusive).

    Two graphs are equal when their text forms are.
    """

    inputs: tuple[Node, ...] = attrs.field(converter=_nodes)
    outputs: tuple[Node, ...] = attrs.field(converter=_nodes)
    weights: Mapping[str, Storage] = attrs.field(factory=dict)
    ranges: Mapping[str, tuple[int, int | None]] = attrs.field(factory=dict)

    @functools.cached_property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes, inputs first, every node behind its operands; the order is a function of the graph alone."""
        order: dict[Node, None] = dict.fromkeys(self.inputs)
        for output in self.outputs:
            stack: list[tuple[Node, Iterator[Node]]] = [(output, iter(output.parents))] if output not in order else []
            pending = {output}
            while stack:
                node, parents = stack[-1]
                for parent in parents:
                    if parent not in order and parent not in pending:
                        pending.add(parent)
                        stack.append((parent, iter(parent.parents)))
                        break
                else:
                    stack.pop()
                    order[node] = None
        return tuple(order)

    @functools.cached_property
    def users(self) -> Mapping[Node, tuple[Node, ...]]:
        """For every node, the nodes that use it (one entry per use); being an output counts no use."""
        found: dict[Node, list[Node]] = {node: [] for node in self.nodes}
        for node in self.nodes:
            for parent in node.parents:
                found[parent].append(node)
        return {node: tuple(users) for node, users in found.items()}

    @functools.cached_property
    def digraph(self) -> nx.MultiDiGraph:
        """The derived networkx view (nodes are positions in `nodes`, edges carry the operand's index)."""
        import networkx as nx  # here, since a saved program starts a sixth of a second sooner without

        view = nx.MultiDiGraph()
        index = {node: i for i, node in enumerate(self.nodes)}
        for node, i in index.items():
            view.add_node(i, op=node.op.name, label=f"{node.op.name}\n{node.type}")
            for k, operand in enumerate(node.operands):
                if operand is not None:
                    view.add_edge(index[operand], i, operand=k)
        return view

    @property
    def symbols(self) -> tuple[str, ...]:
        """Names of the symbolic dimensions, sorted."""
        found: set[str] = set()
        for node in self.nodes:
            for t in node.type.items if isinstance(node.type, TupleType) else (node.type,):
                found |= t.symbols
        return tuple(sorted(found))

    def count(self, *ops: Op) -> int:
        """How many nodes apply one of `ops`."""
        return sum(node.op in ops for node in self.nodes)

    def replace(self, **changes: Any) -> Graph:
        """A copy with other inputs, outputs, weights or ranges; weights that nothing uses are dropped."""
        graph = attrs.evolve(self, **changes)
        used = {n.name for n in graph.nodes if n.op is WEIGHT}
        return attrs.evolve(graph, weights={k: v for k, v in graph.weights.items() if k in used})

    def map(self, transform: Callable[[Node, Node], Node]) -> Graph:
        """Rebuild every node bottom-up: `transform(old, rebuilt)` returns the node that takes its place."""
        done: dict[Node, Node] = {}
        for node in self.nodes:
            rebuilt = node.with_operands(done[o] if o is not None else None for o in node.operands)
            done[node] = transform(node, rebuilt)
        return self.replace(inputs=tuple(done[i] for i in self.inputs), outputs=tuple(done[o] for o in self.outputs))

    def apply(self, operands: Iterable[Node]) -> tuple[Node, ...]:
        """The outputs' values with `operands` in the place of the inputs, in order: the graph as a function, inlined.

        Weights stand there by name; their storage is the caller's to add. Raises TypeRuleError where an operand's type
        doesn't fit.
        """
        done: dict[Node, Node] = dict(zip(self.inputs, operands, strict=True))
        for node in self.nodes:
            if node not in done:
                done[node] = node.with_operands(done[o] if o is not None else None for o in node.operands)
        return tuple(done[o] for o in self.outputs)

    def draw(self, path: str | None = None) -> str:
        """The graph in DOT (`path=None` or `*.dot`) or SVG (`*.svg`); returns the text and writes it to `path`."""
        from jisu.compiler.drawing import draw

        return draw(self, path)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __str__(self) -> str:
        from jisu.compiler.text import to_text

        return to_text(self)

    __repr__ = __str__
