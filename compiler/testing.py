"""The kit that proves rewrites: drawn graphs, drawn arrays, and checks that bite.

    from jisu.testing import check_pass, check_rule

    def test_rules() -> None:
        for rule in RULES:
            check_rule(rule)

    def test_pass() -> None:
        check_pass(MyPass(), plant=RULES)

Everything is drawn by hypothesis, so a failure comes with the smallest case that was found. Purely random graphs almost
never contain a match and then prove nothing; `graphs(plant=rules)` therefore grows the rules' own left sides into them.

Values are small exact integers most of the time (any difference is a bug), sometimes normal floats, and sometimes NaN,
infinities and the ends of the dtype's range. Results are judged against the left side's value in float64: the right
side may be off by a few roundings of its dtype, or a few times as much as the left side itself, no more. The signs of
zeros are not compared.
"""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

import attrs
import hypothesis
import numpy as np
from hypothesis import HealthCheck, Phase, Verbosity
from hypothesis import strategies as st
from hypothesis.errors import Flaky, Unsatisfiable
from hypothesis.extra import numpy as hnp

from jisu.compiler import ops
from jisu.compiler.errors import InputError, JisuError, VerifyError
from jisu.compiler.graph import INPUT, WEIGHT, ArrayStorage, Graph, Node, Op, constant, placeholder, weight
from jisu.compiler.interpret import interpret
from jisu.compiler.pipeline import Pass
from jisu.compiler.rewrite import EITHER, LITERAL, SCALAR, VARIABLE, Bind, Rule, Trace, rewrite, variable
from jisu.compiler.text import parse_type
from jisu.compiler.types import (
    DTYPES,
    FLOATS,
    Dim,
    TensorType,
    TupleType,
    TypeRuleError,
    dim,
    is_float,
    is_integer,
    numpy_dtype,
    require,
    same_dim,
    same_type,
    symbol,
)
from jisu.compiler.verify import verify

__all__ = [
    "CONTRACTIONS",
    "STEADY_OPS",
    "PassFailure",
    "PassReport",
    "ProgramFailure",
    "RuleFailure",
    "RuleReport",
    "Sample",
    "arrays_for",
    "check_pass",
    "check_program",
    "check_rule",
    "contraction_flops",
    "graph_of",
    "graphs",
    "op_calls",
    "rule_graphs",
    "tensors",
]


class RuleFailure(JisuError, AssertionError):
    """A rule broke a promise; the message says which, on what, and shows both sides."""


class PassFailure(RuleFailure):
    """A pass broke a promise; the message says which, on which graph, and shows both graphs."""


class ProgramFailure(RuleFailure):
    """A program's outputs differ from the interpreter's."""


@attrs.frozen
class RuleReport:
    """What `check_rule` saw: well-typed draws, draws in which the rule fired, the largest relative error."""

    draws: int
    fired: int
    error: float


@attrs.frozen
class PassReport:
    """What `check_pass` saw: graphs, graphs that the pass changed, the largest relative error."""

    graphs: int
    changed: int
    error: float


CONTRACTIONS: frozenset[Op] = frozenset(
    (
        ops.matmul, ops.linear, ops.packed_linear, ops.gated_linear, ops.packed_gated_linear, ops.conv, ops.attention,
        ops.attention_cached, ops.experts, ops.packed_experts, ops.expert_linear,
    )
)  # fmt: skip
"""The ops whose work dominates."""


def contraction_flops(graph: Graph, sizes: Mapping[str, int] | None = None) -> int:
    """Floating-point operations of the graph's contractions; a rule that lost `used_once` makes them grow.

    sizes: what the symbols stand for.
    """
    return sum(_contraction(node, sizes or {}) for node in graph.nodes if node.op in CONTRACTIONS)


def _contraction(node: Node, sizes: Mapping[str, int]) -> int:
    shapes = [tuple(map(int, o.tensor.at(sizes).shape)) if o is not None else () for o in node.operands]
    points = math.prod(map(int, node.tensor.at(sizes).shape))
    if node.op is ops.conv:
        return 2 * points * math.prod(shapes[1][1:])
    if node.op in (ops.experts, ops.packed_experts):
        inner = shapes[4][-1] if node.op is ops.experts else node.inner
        return 2 * math.prod(shapes[1]) * 3 * shapes[0][1] * inner
    if node.op in (ops.attention, ops.attention_cached):
        (batch, queries, heads, width), keys = shapes[0], shapes[1]
        rows = keys[1] if node.op is ops.attention else keys[2] * (shapes[5][1] if shapes[5] else 1)
        return 2 * batch * queries * heads * rows * (width + node.shape[3])
    return 2 * points * shapes[0][-1] * (2 if node.op in (ops.gated_linear, ops.packed_gated_linear) else 1)


def graph_of(*outputs: Node, ranges: Mapping[str, tuple[int, int | None]] | None = None, fill: int = 0) -> Graph:
    """A graph around `outputs`: every input that they reach, and every weight, with small exact integers as values.

    Outputs with several results are returned one by one. `fill` seeds the weights' values.
    """
    flat: list[Node] = []
    for node in outputs:
        items = len(node.type.items) if isinstance(node.type, TupleType) else 0
        flat += [ops.get(node, index=i) for i in range(items)] if items else [node]
    reached = Graph((), tuple(flat)).nodes
    inputs = tuple(n for n in reached if n.op is INPUT)
    weights = {}
    for n in reached:
        if n.op is WEIGHT and n.name not in weights:
            rng = np.random.default_rng([fill, *n.name.encode()])
            weights[n.name] = ArrayStorage(_values(rng, n.tensor, "digits", None))
    return Graph(inputs, tuple(flat), weights, dict(ranges or {}))


# --- Values --------------------------------------------------------------------------------------------------------

Bounds = tuple[int, int]
T = TypeVar("T")
VALUES = ("digits", "normal", "special")


def _digits(dtype: str, bounds: Bounds | None) -> Bounds:
    if bounds is None:
        return (0, 1) if dtype == "bool" else (0, 4) if dtype == "uint8" else (-2, 2)
    low, high = bounds
    if is_integer(dtype):
        info = np.iinfo(dtype)
        low, high = max(low, int(info.min)), min(high, int(info.max))
    return low, max(low, high)


def _special(dtype: str) -> list[float]:
    if is_integer(dtype):
        info = np.iinfo(dtype)
        return [int(info.min), int(info.max), 0, 1, 3]
    # 300 squared overflows float16 only; the others spread through everything that they touch.
    return [np.nan, np.inf, -np.inf, 300.0, -300.0, 1.0, 2.0, 0.5]


def _values(rng: np.random.Generator, type: TensorType, values: str, bounds: Bounds | None) -> np.ndarray:
    shape, dtype = tuple(int(d) for d in type.shape), numpy_dtype(type.dtype)
    if values == "digits" or bounds is not None or type.dtype == "bool":
        low, high = _digits(type.dtype, bounds)
        return rng.integers(low, high + 1, shape).astype(dtype)
    if values == "special":
        choices = _special(type.dtype)
        if is_float(type.dtype) and rng.integers(0, 2):
            choices = [c for c in choices if math.isfinite(c)]  # NaN would hide an overflow
        return (
            np.array([choices[i] for i in rng.integers(0, len(choices), shape).reshape(-1)])
            .astype(dtype)
            .reshape(shape)
        )
    if is_integer(type.dtype):
        return rng.integers(0, 100, shape).astype(dtype)
    return rng.standard_normal(shape).astype(dtype)


def tensors(
    type: TensorType | str, *, values: str = "digits", bounds: Bounds | None = None
) -> st.SearchStrategy[np.ndarray]:
    """Arrays of a type without symbols, given as TensorType or in notation ("float32[2, 3]", "int64[2] < 4").

    values: "digits" (integers from -2 to 2, exact in every dtype), "normal" (standard normal floats) or "special" (with
    NaN, infinities, the ends of an integer dtype). bounds: inclusive range of integers, as for indices ("< 4": (0, 3)).
    """
    if isinstance(type, str):
        spec = _spec(type)
        type, bounds = parse_type(f"{spec.dtype}[{', '.join(spec.dims)}]"), spec.bounds or bounds
    if values not in VALUES:
        raise InputError(f"values is one of {', '.join(VALUES)}, not {values!r}")
    if type.symbols:
        raise InputError(f"{type} has symbols; draw a type without (TensorType.at)")
    found, dtype = type, numpy_dtype(type.dtype)
    # Drawing each element lets small cases shrink to telling ones; hypothesis has no room for large ones.
    if values == "digits" and found.size <= 24:
        low, high = _digits(found.dtype, bounds)
        elements = st.integers(low, high)
        return hnp.arrays(np.int64, found.shape, elements=elements, fill=st.nothing()).map(lambda a: a.astype(dtype))
    return st.integers(0, 2**16).map(lambda seed: _values(np.random.default_rng(seed), found, values, bounds))


@attrs.frozen
class Sample:
    """Arrays that fit a graph: `inputs` in its order, `weights` by name, `sizes` of its symbols."""

    inputs: tuple[np.ndarray, ...]
    weights: Mapping[str, np.ndarray]
    sizes: Mapping[str, int]

    def fill(self, graph: Graph) -> Graph:
        """The graph with these arrays as its weights."""
        return attrs.evolve(graph, weights={k: ArrayStorage(v) for k, v in self.weights.items()})


_PASSING = (
    ops.reshape, ops.transpose, ops.slice_, ops.broadcast_to, ops.concat, ops.flip, ops.windows, ops.cast, ops.take,
    ops.gather, ops.where, ops.pad, ops.maximum, ops.minimum,
)  # fmt: skip


def _index_bounds(graph: Graph, sizes: Mapping[str, int]) -> dict[Node, Bounds]:
    """For every integer value that selects something, the range in which it must lie."""
    found: dict[Node, Bounds] = {}

    def at(node: Node | None, axis: int) -> int:
        assert node is not None
        return int(node.tensor.at(sizes).shape[axis])

    def narrow(node: Node | None, low: int, high: int) -> None:
        if node is not None and is_integer(node.dtype):
            a, b = found.get(node, (low, high))
            found[node] = (max(a, low), min(b, high))

    for node in reversed(graph.nodes):
        o = node.operands
        if node in found and node.op in _PASSING:
            for parent in o[:1] if node.op in (ops.take, ops.gather) else o:
                if parent is not None and parent.type is not None:
                    narrow(parent, *found[node])
        if node.op in (ops.take, ops.gather, ops.scatter):
            size = at(o[0], node.axis)
            narrow(o[1], -size if node.attributes.get("wrap", True) else 0, size - 1)
        elif node.op in (ops.experts, ops.packed_experts):
            narrow(o[1], 0, at(o[3], 0) - 1)
        elif node.op is ops.expert_linear:
            narrow(o[1], 0, at(o[2], 0) - 1)
        elif node.op in ops.LOOKUPS:
            narrow(o[ops.LOOKUPS[node.op]], 0, node.rows - 1)
        elif node.op is ops.cache_append:
            pages = at(o[3], 1) if o[3] is not None else 1
            narrow(o[2], 0, at(o[0], 2) * pages - at(o[1], 1))
            narrow(o[3], 0, at(o[0], 0) - 1)
        elif node.op is ops.attention_cached:
            pages = at(o[5], 1) if o[5] is not None else 1
            narrow(o[3], 0, at(o[1], 2) * pages - at(o[0], 1))
            narrow(o[4], 0, 2)
            narrow(o[5], 0, at(o[1], 0) - 1)
    return found


@st.composite
def arrays_for(draw: st.DrawFn, graph: Graph, *, values: str = "digits") -> Sample:
    """Arrays for a graph's inputs and weights (see `tensors` for `values`), symbols within their ranges.

    Integers that select elements (of `take`, `gather`, `scatter`, experts, caches) stay inside their tables; they are
    found by following the graph back through ops that only move values.
    """
    sizes = {}
    for name in graph.symbols:
        low, high = graph.ranges.get(name, (1, None))
        low = max(low, 1)
        sizes[name] = draw(st.integers(low, low + 4 if high is None else min(high, low + 4)))
    bounds = _index_bounds(graph, sizes)

    def array(node: Node, values: str) -> np.ndarray:
        return draw(tensors(node.tensor.at(sizes), values=values, bounds=bounds.get(node)))

    inputs = tuple(array(node, values) for node in graph.inputs)
    weights: dict[str, np.ndarray] = {}
    for node in graph.nodes:
        if node.op is WEIGHT and node.name not in weights:
            weights[node.name] = array(node, "normal" if values == "special" else values)
    return Sample(inputs, weights, sizes)


# --- Notation of drawn types ---------------------------------------------------------------------------------------

KINDS: Mapping[str, tuple[str, ...]] = {
    "float": ("float32", "float64", "bfloat16", "float16"),
    "int": ("int64", "int32", "int8", "uint8"),
    "any": ("float32", "int64", "bfloat16", "bool", "float64", "int8"),
}
"""Dtypes that the notation leaves open: one is drawn per graph."""


@attrs.frozen
class _Spec:
    """A type to draw: "weight float[*b k]" or "int64[2] < 4" in parts."""

    dtype: str
    dims: tuple[str, ...]
    source: str = ""  # "", "weight", "constant" or "broadcast"
    bounds: Bounds | None = None


@functools.cache
def _spec(text: str) -> _Spec:
    found = re.fullmatch(r"(?:(weight|constant|broadcast) )?(\w+)\[([^\]]*)\](?: < (\d+))?", text.strip())
    known = found is not None and (found[2] in KINDS or found[2] in DTYPES)
    require(
        known, f"can't read {text!r}; expected something like 'float[*b k]', 'weight float32[n 4]' or 'int64[n] < 4'"
    )
    assert found is not None
    bounds = (0, int(found[4]) - 1) if found[4] else None
    return _Spec(found[2], tuple(found[3].replace(",", " ").split()), found[1] or "", bounds)


@functools.cache
def _expression(token: str) -> Dim:
    return parse_type(f"bool[{token}]").shape[0]


def _letters(spec: _Spec) -> set[str]:
    """Names of the drawn sizes in a spec, stars left out."""
    plain = [t.rstrip("?") for t in spec.dims if not t.startswith("*")]
    return {name for token in plain for name in TensorType((_expression(token),), "bool").symbols}


# --- Growing graphs from patterns ----------------------------------------------------------------------------------

_SCALARS = (2.0, 1.0, 0.5, -1.0, 0.0)
_ATTRIBUTES: Mapping[str, tuple[Any, ...]] = {
    "dtype": ("float32", "float64", "bfloat16", "float16", "int64", "int32"),
    "approximate": ("none", "tanh"),
    "activation": tuple(ops.ACTIVATIONS),
    "eps": (1e-6, 1e-2),
}


def _attribute_samples(op: Op, key: str) -> tuple[Any, ...]:
    """Values of an op's attribute for which it has been written: a table's, its samples', its default."""
    found = list(_ATTRIBUTES.get(key, ()))
    found += [attributes[key] for _, attributes in (op.samples or tuple)() if key in attributes]
    if isinstance(op.defaults[key], (bool, int, float, str, tuple)):
        found.append(op.defaults[key])
    if isinstance(op.defaults[key], bool):
        found.append(not op.defaults[key])
    return tuple(found)


def _pick(draw: st.DrawFn, items: Sequence[T]) -> T:
    """One of `items`, by its index: `sampled_from` would print them all to name itself."""
    return items[draw(st.integers(0, len(items) - 1))]


class _Growth:
    """A graph being drawn: values so far, the names that are taken, and the sizes that dimensions may have."""

    def __init__(
        self, draw: st.DrawFn, sizes: st.SearchStrategy[Dim], dtypes: Mapping[str, str], symbolic: bool = False
    ) -> None:
        self.draw, self.sizes, self.dtypes, self.symbolic = draw, sizes, dict(dtypes), symbolic
        self.nodes: list[Node] = []
        self.aliases = False  # whether variables may share the values made for one another
        self.names = itertools.count()

    def leaf(self, type: TensorType, source: str) -> Node:
        """A new value of this type."""
        draw = self.draw
        if source == "broadcast":
            keep = draw(st.integers(0, type.rank))
            slim = tuple(1 if draw(st.integers(0, 2)) == 0 else d for d in type.shape[type.rank - keep :])
            return ops.broadcast_to(self.leaf(type.with_shape(*slim), ""), shape=type.shape)
        if source == "constant":
            require(not type.symbols, f"a constant can't be {type}")
            return constant(_values(np.random.default_rng(draw(st.integers(0, 99))), type, "digits", None))
        if source == "weight" or (not type.symbols and type.rank and draw(st.integers(0, 2)) == 2):
            require(not type.symbols, f"a weight can't be {type}")
            return weight(f"w{next(self.names)}", type)
        return placeholder(f"x{next(self.names)}", type)

    def size(self, token: str, env: dict[str, Any], fixed: set[str]) -> Dim:
        """The size of a drawn dimension such as "k", "4" or "2*k"."""
        expression = _expression(token)
        if isinstance(expression, int):
            return expression
        for s in expression.free_symbols:
            if s.name not in env:
                named = self.symbolic and s.name not in fixed and self.draw(st.booleans())
                env[s.name] = symbol(s.name) if named else self.draw(self.sizes)
        return dim(expression.subs({s: env[s.name] for s in expression.free_symbols}))

    def type(self, spec: _Spec, env: dict[str, Any], fixed: set[str]) -> TensorType:
        """A drawn type; `env` keeps what names stand for."""
        draw, shape = self.draw, []
        for token in spec.dims:
            slack, body = token.endswith("?"), token.rstrip("?")
            if body.startswith("*"):
                if body not in env:
                    env[body] = tuple(draw(self.sizes) for _ in range(draw(st.integers(0, 2))))
                group = env[body]
                if slack:
                    group = tuple(
                        1 if draw(st.integers(0, 3)) == 0 else d for d in group[draw(st.integers(0, len(group))) :]
                    )
                shape += group
            else:
                size = self.size(body, env, fixed)
                shape.append(1 if slack and draw(st.integers(0, 3)) == 0 else size)
        return TensorType(tuple(shape), self.dtype(spec.dtype))

    def dtype(self, name: str) -> str:
        """A dtype by name; an open one is drawn once."""
        if name in KINDS and name not in self.dtypes:
            self.dtypes[name] = self.draw(st.sampled_from(KINDS[name]))
        return self.dtypes.get(name, name)

    def known(self, spec: _Spec, env: dict[str, Any]) -> list[tuple[Node, dict[str, Any]]]:
        """Values so far that a spec accepts, each with the names that it settles."""
        if spec.source in ("constant", "broadcast"):
            return []
        found = []
        for node in self.nodes:
            if isinstance(node.type, TensorType) and (spec.source != "weight" or node.op is WEIGHT):
                settled = self.fits(spec, node.type, dict(env))
                if settled is not None:
                    found.append((node, settled))
        return found

    def fits(self, spec: _Spec, type: TensorType, env: dict[str, Any]) -> dict[str, Any] | None:
        """`env` extended so that `spec` is `type`, or None."""
        if type.dtype != self.dtype(spec.dtype):
            return None
        stars = [i for i, t in enumerate(spec.dims) if t.startswith("*")]
        spread = type.rank - len(spec.dims) + len(stars)
        if spread < 0 or (spread and not stars):
            return None
        shape = list(type.shape)
        if stars:
            group = tuple(shape[stars[0] : stars[0] + spread])
            name = spec.dims[stars[0]].rstrip("?")
            if len(env.setdefault(name, group)) != len(group) or not all(map(same_dim, env[name], group)):
                return None
            del shape[stars[0] : stars[0] + spread]
        for token, have in zip((t for t in spec.dims if not t.startswith("*")), shape, strict=True):
            expression = _expression(token.rstrip("?"))
            if not isinstance(expression, int) and expression.is_Symbol:
                env.setdefault(expression.name, have)
            if not isinstance(expression, int):
                if not all(s.name in env for s in expression.free_symbols):
                    return None
                expression = dim(expression.subs({s: env[s.name] for s in expression.free_symbols}))
            if not same_dim(expression, have):
                return None
        return env

    def instance(self, pattern: Node, types: Mapping[str, str], attributes: Mapping[str, Sequence[Any]]) -> Node:
        """A value that has the pattern's form; raises TypeRuleError where the draws don't fit together."""
        return _Instance(self, types, attributes).build(pattern)


class _Instance:
    """One drawn instance of a pattern."""

    def __init__(self, growth: _Growth, types: Mapping[str, str], attributes: Mapping[str, Sequence[Any]]) -> None:
        self.growth, self.types, self.attributes = growth, types, attributes
        self.env: dict[str, Any] = {}
        specs = [_spec(t) for t in types.values()]
        self.fixed = set().union(*(_letters(s) for s in specs if s.source in ("weight", "constant")))
        self.bound: dict[str, Any] = {}
        self.done: dict[Node, Node | None] = {}

    def build(self, pattern: Node) -> Node:
        """The instance of a pattern that isn't an absent operand."""
        node = self.part(pattern, "float32")
        require(node is not None, "an operand that must be there is absent")
        assert node is not None
        return node

    def part(self, pattern: Node, dtype: str) -> Node | None:
        """The instance of a part; scalars take the dtype of their neighbour."""
        if pattern not in self.done:
            self.done[pattern] = self.fresh(pattern, dtype)
        return self.done[pattern]

    def fresh(self, pattern: Node, dtype: str) -> Node | None:
        draw = self.growth.draw
        if pattern.op is VARIABLE:
            if pattern.name not in self.bound:
                self.bound[pattern.name] = self.variable(pattern)
            return self.bound[pattern.name]  # type: ignore[no-any-return]
        if pattern.op is EITHER:
            return self.part(_pick(draw, pattern.operands), dtype)  # type: ignore[arg-type]
        if pattern.op in (SCALAR, LITERAL):
            shape = draw(st.sampled_from(((), (), (1,), (1, 1, 1))))
            value = self.chosen(pattern.name, _SCALARS) if pattern.op is SCALAR else pattern.value
            return constant(np.full(shape, value), dtype)
        return self.application(pattern)

    def application(self, pattern: Node) -> Node:
        draw, late = self.growth.draw, (SCALAR, LITERAL)
        # Scalars last: they take their neighbours' dtype.
        built = {p: self.part(p, "") for p in pattern.operands if p is not None and p.op not in late}
        dtype = next((n.dtype for n in built.values() if n is not None and isinstance(n.type, TensorType)), "float32")
        operands = [None if p is None else self.part(p, dtype) for p in pattern.operands]
        attributes = {}
        for key, value in pattern.attributes.items():
            if isinstance(value, Bind):
                value = self.chosen(value.name, _attribute_samples(pattern.op, key))
            attributes[key] = value
        if pattern.op.commutative and draw(st.booleans()):
            operands.reverse()
        return pattern.op.make(operands, attributes)

    def chosen(self, name: str, otherwise: Sequence[Any]) -> Any:
        if name not in self.bound:
            samples = self.attributes.get(name, otherwise)
            if not samples:
                raise RuleFailure(f"nothing to draw for the bound name {name!r}; give attributes={{{name!r}: (…,)}}")
            self.bound[name] = _pick(self.growth.draw, list(samples))
        return self.bound[name]

    def variable(self, pattern: Node) -> Node | None:
        draw, growth = self.growth.draw, self.growth
        if pattern.optional and (pattern.name not in self.types or draw(st.integers(0, 2)) == 0):
            return None
        spec = _spec(self.types.get(pattern.name, "float[*b? k?]"))
        known = growth.known(spec, self.env)
        if known and draw(st.integers(0, 3)):  # type: ignore[arg-type]
            node, self.env = _pick(draw, known)
            return node
        node = growth.leaf(growth.type(spec, self.env, self.fixed), spec.source)
        if growth.aliases:
            growth.nodes.append(node)
        return node


def _symbol_ranges(nodes: Iterable[Node]) -> dict[str, tuple[int, int | None]]:
    return {name: (1, 5) for node in nodes if isinstance(node.type, TensorType) for name in node.type.symbols}


# --- Calls of single ops -------------------------------------------------------------------------------------------


@attrs.frozen
class _Call:
    """An op applied to variables, ready to be drawn."""

    pattern: Node
    types: Mapping[str, str]


def _generalised(text: str) -> str:
    """A sample's type with sizes as letters (equal sizes stay equal) and float32 as any float."""
    spec = _spec(text)
    limit = f" < {spec.bounds[1] + 1}" if spec.bounds else ""
    return f"{'float' if spec.dtype == 'float32' else spec.dtype}[{' '.join(f'd{d}' for d in spec.dims)}]{limit}"


def _call(op: Op, types: Sequence[str | None], attributes: Mapping[str, Any]) -> _Call:
    names = [None if t is None else f"v{i}" for i, t in enumerate(types)]
    operands = [None if n is None else variable(n) for n in names]
    known = {k: v if v is not None else "float[]" for k, v in zip(names, types, strict=True) if k is not None}
    full = {**{k: v for k, v in op.defaults.items()}, **attributes}
    return _Call(Node(op, tuple(operands), full, None), known)


_LITERAL = (
    ops.cache_append,
    ops.attention_cached,
    ops.packed_experts,
)  # a cache must have room for what its other operands say


@functools.cache
def _calls(op: Op) -> tuple[_Call, ...]:
    """Ways to call an op: by its notation where that is a plain string, by its samples, and by their literal sizes."""
    if op is ops.get:
        several = Node(ops.sort, (variable("v0"),), {"axis": 0, "descending": False}, None)
        return tuple(_Call(Node(op, (several,), {"index": i}, None), {"v0": "float[n m]"}) for i in (0, 1))
    samples = list((op.samples or tuple)())
    found = []
    required = {k: _ATTRIBUTES.get(k, ()) for k, v in op.defaults.items() if k in _ATTRIBUTES}
    variants = [dict(zip(required, choice, strict=True)) for choice in itertools.product(*required.values())]
    if isinstance(op.axes, str):
        operands = [item.replace("!", "").replace("<", "").split() for item in op.axes.partition("->")[0].split(",")]
        if op in ops.ELEMENTWISE:
            operands = [[f"{t}?" if len(operands) > 1 else t for t in tokens] for tokens in operands]
        if not samples and op not in _LITERAL:
            for variant, dtype in itertools.product(variants, DTYPES):
                found.append(_call(op, [f"{dtype}[{' '.join(tokens)}]" for tokens in operands], variant))
        for types, attributes in samples if op not in _LITERAL else ():
            dtypes = [
                None if t is None else ("float" if _spec(t).dtype == "float32" else _spec(t).dtype) for t in types
            ]
            specs = [None if d is None else f"{d}[{' '.join(ts)}]" for d, ts in zip(dtypes, operands, strict=True)]
            found.append(_call(op, specs, attributes))
    for types, attributes in samples:
        if op not in _LITERAL:
            found.append(_call(op, [None if t is None else _generalised(t) for t in types], attributes))
        found.append(_call(op, types, attributes))
    return tuple(call for call in found if _possible(call))


def _possible(call: _Call) -> bool:
    """Whether the op accepts the call's dtypes at all (tried with drawn sizes of 2)."""

    def leaf(p: Node | None) -> Node | None:
        if p is None:
            return None
        spec = _spec(call.types[p.name])
        shape = [2 if t.startswith("*") else int(t) if t.isdecimal() else 2 for t in spec.dims]
        return placeholder(p.name, TensorType(tuple(shape), "float32" if spec.dtype == "float" else spec.dtype))

    spread = any(not t.isdecimal() for text in call.types.values() for t in _spec(text).dims)
    try:
        call.pattern.op.make(tuple(map(leaf, call.pattern.operands)), call.pattern.attributes)
    except TypeRuleError:
        return spread and call.pattern.op.samples is not None  # sizes of 2 needn't suit it
    return True


@st.composite
def op_calls(draw: st.DrawFn, op: Op) -> Node:
    """The op applied to fresh inputs of drawn shapes and dtypes with drawn attributes, well-typed.

    Shapes come from the axis notation where that is a plain string, else from the op's samples: with their sizes drawn
    anew where that suits the attributes, else literally.
    """
    calls = _calls(op)
    if not calls:
        raise InputError(f"{op.name} has neither a notation nor samples that it accepts; give samples= in its defop")
    for call in (_pick(draw, calls), _pick(draw, calls), calls[-1], calls[-1]):
        growth = _Growth(draw, st.integers(1, 4), {})
        with suppress(TypeRuleError):
            return growth.instance(call.pattern, call.types, {})
    hypothesis.reject()
    raise AssertionError("unreachable")


STEADY_OPS: tuple[Op, ...] = (
    ops.add, ops.mul, ops.sub, ops.maximum, ops.relu, ops.neg, ops.sigmoid, ops.silu, ops.tanh, ops.square, ops.sum_,
    ops.reduce_max, ops.softmax, ops.scan, ops.matmul, ops.linear, ops.transpose, ops.reshape, ops.concat, ops.slice_,
    ops.broadcast_to, ops.take, ops.where, ops.rms_norm, ops.layer_norm,
)  # fmt: skip
"""Ops that graphs grow from by default: a rounding error stays one in them (`floor` would make a whole step of it)."""


@st.composite
def graphs(
    draw: st.DrawFn,
    plant: Iterable[Rule] = (),
    *,
    grow: Iterable[Op] = STEADY_OPS,
    symbolic: bool = False,
    dtypes: Sequence[str] = ("float32",),
    steps: int = 8,
) -> Graph:
    """Random well-typed graphs of up to `steps` calls of `grow` and left sides of `plant`, with filled weights.

    Later steps share earlier (also inner) values, every value that nothing uses is an output, and one value more.
    symbolic: some dimensions are symbols with a range. dtypes: those of floating-point values, one per graph.
    """
    plant, grown = tuple(plant), tuple(grow)
    sizes: list[Dim] = [*draw(st.lists(st.integers(1, 4), min_size=2, max_size=2, unique=True))]
    if symbolic:
        sizes += [symbol("s0"), symbol("s0"), symbol("s1")]
    growth = _Growth(draw, st.sampled_from(sizes), {"float": draw(st.sampled_from(list(dtypes)))})
    # As many seeds from rules as from ops, or the rules would drown.
    seeds: list[Rule | Op] = [*grown, *plant * (len(grown) // max(len(plant), 1) + 1)]
    outputs: list[Node] = []
    for index in draw(st.lists(st.integers(0, len(seeds) - 1), min_size=2, max_size=steps)):
        seed = seeds[index]
        with suppress(TypeRuleError):
            if isinstance(seed, Rule):
                root = growth.instance(seed.match, seed.types, seed.attributes)
            else:
                call = _pick(draw, _calls_of_kind(seed, growth.dtypes["float"]))
                root = growth.instance(call.pattern, call.types, {})
            if isinstance(root.type, TupleType):
                root = ops.get(root, index=draw(st.integers(0, len(root.type.items) - 1)))
            new = [n for n in Graph((), (root,)).nodes if n not in growth.nodes]
            if all(map(_fits_every_size, new)):
                growth.nodes += new
                outputs.append(root)
    if not outputs:
        hypothesis.reject()
    used = {parent for node in growth.nodes for parent in node.parents}
    sinks = [n for n in growth.nodes if n not in used and isinstance(n.type, TensorType)]
    values = [n for n in growth.nodes if isinstance(n.type, TensorType)]
    extra = _pick(draw, values)
    return graph_of(*sinks, extra, ranges=_symbol_ranges(growth.nodes), fill=draw(st.integers(0, 99)))


def _fits_every_size(node: Node) -> bool:
    """False for a slice or window that a symbol's smallest size may be too small for."""
    if node.op not in (ops.slice_, ops.windows, ops.conv):
        return True
    assert node.operands[0] is not None
    return not node.operands[0].tensor.symbols


@functools.cache
def _calls_of_kind(op: Op, dtype: str) -> tuple[_Call, ...]:
    """The calls of an op whose floats can be of `dtype`, where there are such."""
    calls = _calls(op)
    fitting = [c for c in calls if any(_spec(t).dtype in ("float", dtype) for t in c.types.values())]
    return tuple(fitting or calls)


# --- Judging results -----------------------------------------------------------------------------------------------

ROUNDINGS: Mapping[str, float] = {"float16": 16, "bfloat16": 6, "float32": 64, "float64": 4096}
"""How many roundings of its dtype (machine epsilons of the largest element) a result may be off."""


def _epsilon(dtype: str) -> float:
    return 2.0**-7 if dtype == "bfloat16" else float(np.finfo(numpy_dtype(dtype)).eps)


def _judge(
    got: np.ndarray, want: np.ndarray, exact: np.ndarray, dtype: str, noise: float, excuse: bool
) -> tuple[float, str]:
    """(relative error, complaint or "") of `got`, where `want` is the left side's value and `exact` that in float64.

    noise: the largest magnitude on the way, whose rounding a cancellation may leave. excuse: whether `got` may differ
    from `want` where it is closer to `exact`.
    """
    if got.shape != want.shape or got.dtype != want.dtype:
        return np.inf, f"is {got.dtype}{list(got.shape)} instead of {want.dtype}{list(want.shape)}"
    if not is_float(dtype):
        wrong = int(np.count_nonzero(got != want))
        return (np.inf, f"differs in {wrong} of {want.size} elements") if wrong else (0.0, "")
    with np.errstate(all="ignore"):
        return _judge_floats(
            got.astype(np.float64), want.astype(np.float64), exact.astype(np.float64), dtype, noise, excuse
        )


def _judge_floats(
    g: np.ndarray, w: np.ndarray, e: np.ndarray, dtype: str, noise: float, excuse: bool
) -> tuple[float, str]:
    e = e if excuse else w
    odd = ~np.isfinite(w) & ~np.isfinite(e)  # where only rounding made `want` infinite, anything is as good
    same = (g == e) | (g == w) | (np.isnan(g) & (np.isnan(w) | np.isnan(e)))
    if np.any(odd & ~same):
        return np.inf, f"is {g[odd & ~same][0]} where {w[odd & ~same][0]} belongs"
    solid = np.isfinite(w) & np.isfinite(e)
    if np.any(solid & ~np.isfinite(g)):
        return np.inf, f"is {g[solid & ~np.isfinite(g)][0]} where {w[solid & ~np.isfinite(g)][0]} belongs"
    if not solid.any():
        return 0.0, ""
    scale = max(float(np.max(np.abs(e[solid]))), min(noise, 100.0), 1e-30)
    error = float(np.max(np.abs(g[solid] - e[solid]))) / scale
    allowed = ROUNDINGS[dtype] * _epsilon(dtype) + 4 * float(np.max(np.abs(w[solid] - e[solid]))) / scale
    if error > allowed:
        worst = np.unravel_index(np.argmax(np.where(solid, np.abs(g - e), -1)), g.shape)
        where = f"[{', '.join(map(str, worst))}]"
        return (
            error,
            f"is {g[worst]:.9g} at {where} where {e[worst]:.9g} belongs: off by {error:.3g}, allowed {allowed:.3g}",
        )
    return error, ""


def _narrowest(graph: Graph) -> float:
    """Machine epsilon of the coarsest floating-point dtype in a graph."""
    types = [t for n in graph.nodes for t in (n.type.items if isinstance(n.type, TupleType) else (n.type,))]
    return max((_epsilon(t.dtype) for t in types if t.dtype in FLOATS), default=0.0)


@attrs.frozen
class _Truth:
    """What a graph gives on some inputs: its outputs, and every value in float64."""

    graph: Graph
    inputs: tuple[np.ndarray, ...]
    outputs: tuple[np.ndarray, ...]
    exact: Mapping[Node, Any]


def _truth(graph: Graph, inputs: Sequence[np.ndarray]) -> _Truth:
    """The graph's values; rejects the draw where it has none (an index outside its table)."""
    inputs = tuple(a.copy() for a in inputs)
    try:
        outputs = interpret(graph, inputs)
        exact = interpret(graph, inputs, float64=True, keep=True)
    except JisuError:
        hypothesis.reject()
    assert isinstance(outputs, tuple) and isinstance(exact, dict)
    return _Truth(graph, inputs, outputs, exact)


def _difference(truth: _Truth, new: Graph, inputs: Sequence[np.ndarray]) -> tuple[float, str]:
    """(largest relative error, complaint or "") of the outputs of `new` on `inputs`."""
    got = interpret(new, inputs)
    assert isinstance(got, tuple)
    floats = [v for v in truth.exact.values() if isinstance(v, np.ndarray) and v.dtype.kind == "f"]
    noise = float(max((np.abs(v[np.isfinite(v)]).max(initial=0.0) for v in floats), default=0.0))
    worst = 0.0
    for i, (output, g, w) in enumerate(zip(truth.graph.outputs, got, truth.outputs, strict=True)):
        # A rounding to a coarser dtype that stands in the left side is meant: dropping it is no gain.
        rounds = output.dtype in FLOATS and _narrowest(truth.graph) > max(_narrowest(new), _epsilon(output.dtype))
        error, complaint = _judge(g, w, truth.exact[output], output.dtype, noise, excuse=not rounds)
        if complaint:
            return error, f"output {i} ({output.type}) {complaint}"
        worst = max(worst, error)
    return worst, ""


def _both(left: Graph, right: Graph | None) -> str:
    shown = f"--- before\n{left}"
    return shown if right is None else f"{shown}\n--- after\n{right}"


class _Enough(BaseException):
    """Ends hypothesis's search for a smaller failure."""


_CHUNK = 12
_SHRINKS = 100  # draws after the first failure: enough to be readable, and never minutes


def _run(prove: Callable[[st.DataObject], None], examples: int, seed: int) -> None:
    """Run a property over `examples` draws, a function of `seed`; raises the smallest failure."""
    smallest: RuleFailure | None = None
    left = _SHRINKS

    def watched(data: st.DataObject) -> None:
        nonlocal smallest, left
        if smallest is not None:
            left -= 1
            if left < 0:
                raise _Enough
        try:
            prove(data)
        except RuleFailure as failure:
            if smallest is None or len(str(failure)) < len(str(smallest)):
                smallest = failure
            raise

    # Short runs: in a long one hypothesis varies what it has drawn already, and half of the draws are repetitions.
    for chunk, size in enumerate([_CHUNK] * (examples // _CHUNK) + [examples % _CHUNK] * bool(examples % _CHUNK)):
        settings = hypothesis.settings(
            max_examples=size,
            database=None,
            deadline=None,
            phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck),
            verbosity=Verbosity.quiet,
            report_multiple_bugs=False,
            print_blob=False,
        )
        try:
            settings(hypothesis.seed(1000 * seed + chunk)(hypothesis.given(st.data())(watched)))()
        except (_Enough, RuleFailure, Flaky):  # the search that was cut short looks flaky to hypothesis
            if smallest is None:
                raise
        if smallest is not None:
            raise smallest


_MODES = st.sampled_from(("digits", "digits", "normal", "digits", "special"))


def _mode(data: st.DataObject, special: bool) -> str:
    values = data.draw(_MODES)
    return "normal" if values == "special" and not special else values


# --- Rules ---------------------------------------------------------------------------------------------------------


@st.composite
def rule_graphs(draw: st.DrawFn, rule: Rule) -> Graph:
    """Graphs that are one instance of the rule's left side, drawn from its `types` and `attributes`."""
    for _ in range(6):
        growth = _Growth(draw, st.integers(1, 5), {}, symbolic=draw(st.integers(0, 3)) == 3)
        growth.aliases = draw(st.integers(0, 7)) == 7
        with suppress(TypeRuleError):
            root = growth.instance(rule.match, rule.types, rule.attributes)
            return graph_of(root, ranges=_symbol_ranges(Graph((), (root,)).nodes))
    hypothesis.reject()
    raise AssertionError("unreachable")


def _rewritten(rule: Rule, graph: Graph, trace: Trace) -> Graph:
    """The graph after the rule; whatever goes wrong is the rule's failure."""
    text = str(graph)
    try:
        new = verify(rewrite(graph, [rule], trace=trace), f"rule {rule.name!r}")
    except Exception as error:
        kind = "" if isinstance(error, JisuError) else f"{type(error).__name__}: "
        raise RuleFailure(f"rule {rule.name!r} fails: {kind}{error}\n{_both(graph, None)}") from error
    if str(graph) != text:
        raise RuleFailure(f"rule {rule.name!r} changed the graph that it was given\n--- was\n{text}\n--- is\n{graph}")
    for old, made in zip(graph.outputs, new.outputs, strict=True):
        if not same_type(old.type, made.type):
            raise RuleFailure(f"rule {rule.name!r} turns {old.type} into {made.type}\n{_both(graph, new)}")
    return new


def _prove(rule: Rule, graph: Graph, sample: Sample, trace: Trace) -> float:
    """The error of one application; raises RuleFailure where a promise breaks."""
    graph = sample.fill(graph)
    truth = _truth(graph, sample.inputs)
    new = _rewritten(rule, graph, trace)
    if new is graph:
        return 0.0
    before, after = contraction_flops(graph, sample.sizes), contraction_flops(new, sample.sizes)
    if after > before:
        raise RuleFailure(
            f"rule {rule.name!r} turns {before} FLOPs of matrix products into {after}: an inner value that others use "
            f"is computed again; guard it with used_once(…)\n{_both(graph, new)}"
        )
    try:
        error, complaint = _difference(truth, new, sample.inputs)
    except JisuError as failure:
        raise RuleFailure(f"rule {rule.name!r} makes a graph that fails: {failure}\n{_both(graph, new)}") from failure
    if complaint:
        shown = "\n".join(
            f"{n.name} = {a.tolist()}" for n, a in zip(graph.inputs, sample.inputs, strict=True) if a.size <= 64
        )
        raise RuleFailure(
            f"rule {rule.name!r} changes the meaning: {complaint}\n{_both(graph, new)}\n--- inputs\n{shown}"
        )
    return error


def check_rule(
    rule: Rule, *, examples: int = 60, seed: int = 0, share: float = 0.1, special: bool = True
) -> RuleReport:
    """Prove a rule on its own: draw left sides, apply it to a fixed point, compare both sides.

    Draws shapes, dtypes, attributes, operands and values as the rule's `types` and `attributes` say; every branch of
    `either`, absent optional operands, swapped operands of commutative ops, scalars of shape [1] and [1, 1, 1], one
    value in two places, symbolic sizes, and outer users of inner values included. Checks that the rule fires in at
    least `share` of the well-typed draws, ends, builds what the verifier accepts, keeps types and values (see the
    module's text),
    adds no matrix product, and doesn't touch what it was given. special: also draw NaN, infinities and extreme values.
    examples: how many draws. seed: other draws (the same seed gives the same).

    Raises RuleFailure with the smallest failing case. Returns what it saw.
    """
    draws = fired = 0
    worst = 0.0
    trace = Trace()

    def prove(data: st.DataObject) -> None:
        nonlocal draws, fired, worst
        graph = data.draw(rule_graphs(rule))
        sample = data.draw(arrays_for(graph, values=_mode(data, special)))
        draws += 1
        before = trace.fired.get(rule.name, 0)
        worst = max(worst, _prove(rule, graph, sample, trace))
        fired += trace.fired.get(rule.name, 0) > before
        inner = [
            n for n in graph.nodes if not n.op.leaf and n is not graph.outputs[0] and isinstance(n.type, TensorType)
        ]
        if inner:
            shared = inner[data.draw(st.integers(0, len(inner) - 1))]
            _prove(rule, attrs.evolve(graph, outputs=(*graph.outputs, shared)), sample, Trace())

    try:
        _run(prove, examples, seed)
    except Unsatisfiable:
        raise RuleFailure(
            f"rule {rule.name!r}: no well-typed left side could be drawn; give types= for its variables and "
            "attributes= for its bound names that fit together"
        ) from None
    if fired < max(1, share * draws):
        reasons = sorted(trace.refused.get(rule.name, {}).items(), key=lambda item: -item[1])
        shown = (
            "".join(f"\n  {count} x {reason}" for reason, count in reasons)
            or "\n  no guard refused: the replacement was None"
        )
        raise RuleFailure(
            f"rule {rule.name!r} fired in {fired} of {draws} drawn left sides; what kept it from firing:{shown}"
        )
    return RuleReport(draws, fired, worst)


# --- Passes --------------------------------------------------------------------------------------------------------


def _weight_arrays(graph: Graph) -> dict[str, np.ndarray]:
    names = sorted({n.name for n in graph.nodes if n.op is WEIGHT})
    return {name: graph.weights[name].numpy() for name in names}


def _copies(arrays: Mapping[str, np.ndarray]) -> int:
    """How many weights of 4 elements or more repeat the bits of another one."""
    bits = [(str(a.dtype), a.shape, a.tobytes()) for a in arrays.values() if a.size >= 4]
    return len(bits) - len(set(bits))


def _check_form(pass_: Pass, graph: Graph, new: Graph) -> None:
    """The result is a well-formed graph with the same face."""
    try:
        verify(new, f"pass {pass_.name!r}")
    except VerifyError as error:
        raise PassFailure(f"{error}\n{_both(graph, new)}") from error
    reason = ""
    if [(i.name, str(i.type)) for i in graph.inputs] != [(i.name, str(i.type)) for i in new.inputs]:
        reason = "changes the graph's inputs"
    elif [str(o.type) for o in graph.outputs] != [str(o.type) for o in new.outputs]:
        reason = "changes the number or types of the outputs"
    elif any(new.ranges.get(name) != graph.ranges.get(name) for name in new.symbols):
        reason = f"changes the ranges of symbols from {dict(graph.ranges)} to {dict(new.ranges)}"
    if reason:
        raise PassFailure(f"pass {pass_.name!r} {reason}\n{_both(graph, new)}")


def _check_promises(
    pass_: Pass, graph: Graph, new: Graph, sizes: Mapping[str, int], idempotent: bool, may_add_weights: bool
) -> None:
    """Weights keep their ties and size, work doesn't grow, and a second run gives nothing new."""

    def fail(reason: str, before: Graph = graph, after: Graph = new) -> None:
        raise PassFailure(f"pass {pass_.name!r} {reason}\n{_both(before, after)}")

    before, after = _weight_arrays(graph), _weight_arrays(new)
    if _copies(after) > _copies(before):
        fail("loses a tie: one weight has become two of the same content")
    if not may_add_weights and sum(a.nbytes for a in after.values()) > sum(a.nbytes for a in before.values()):
        fail("makes the weights larger")
    work = contraction_flops(graph, sizes), contraction_flops(new, sizes)
    if pass_.exact and work[1] > work[0]:
        fail(f"turns {work[0]} FLOPs of matrix products into {work[1]}")
    again = pass_(graph)
    if str(again) != str(new) or {k: a.tobytes() for k, a in _weight_arrays(again).items()} != {
        k: a.tobytes() for k, a in after.items()
    }:
        fail("gives another result when run again on the same graph", new, again)
    if idempotent and str(pass_(new)) != str(new):
        fail("changes its own result when run a second time", new, pass_(new))


def check_pass(
    pass_: Pass,
    *,
    plant: Iterable[Rule] = (),
    graphs: st.SearchStrategy[Graph] | None = None,
    examples: int = 60,
    seed: int = 0,
    share: float | None = None,
    idempotent: bool = True,
    may_add_weights: bool = False,
    special: bool = False,
    max_error: float | None = None,
) -> PassReport:
    """Prove a pass on drawn graphs (by default `graphs(plant=plant, …)` with and without symbols).


    Checks that it keeps inputs, output types, ranges and meaning (within rounding where it says `exact`; a lossy pass's
    error, relative to the largest element, is reported and bounded by `max_error`), that the verifier accepts it,
    that it is a function (same text twice), idempotent (unless `idempotent=False`), neither unties nor grows weights
    (`may_add_weights`: folded constants may), adds no matrix product, and leaves what it was given alone.
    share: how large a part of the graphs it must change (by default some, where rules are planted). special: also draw
    NaN, infinities and extremes.

    Raises PassFailure with the smallest failing graph. Returns what it saw.
    """
    plant = tuple(plant)
    drawn = graphs if graphs is not None else _default_graphs(plant)
    count = changed = 0
    worst = 0.0

    def prove(data: st.DataObject) -> None:
        nonlocal count, changed, worst
        graph = data.draw(drawn)
        sample = data.draw(arrays_for(graph, values=_mode(data, special)))
        # Normal weights all differ, so that equal ones in the result are copies.
        fresh = {n.name: n for n in graph.nodes if n.op is WEIGHT}
        limits = _index_bounds(graph, sample.sizes)
        weights = {k: data.draw(tensors(n.tensor, values="normal", bounds=limits.get(n))) for k, n in fresh.items()}
        graph = attrs.evolve(sample, weights=weights).fill(graph)
        error, fired = _prove_pass(pass_, graph, sample, idempotent, may_add_weights, max_error)
        count, changed, worst = count + 1, changed + fired, max(worst, error)

    _run(prove, examples, seed)
    wanted = share * count if share is not None else float(bool(plant))
    if changed < wanted:
        raise PassFailure(
            f"pass {pass_.name!r} changed {changed} of {count} drawn graphs; plant the left sides of its rules"
        )
    return PassReport(count, changed, worst)


@st.composite
def _default_graphs(draw: st.DrawFn, plant: tuple[Rule, ...]) -> Graph:
    return draw(graphs(plant, symbolic=draw(st.booleans()), dtypes=("float32", "bfloat16")))


def _prove_pass(
    pass_: Pass, graph: Graph, sample: Sample, idempotent: bool, may_add_weights: bool, max_error: float | None
) -> tuple[float, bool]:
    """(error, whether the graph changed) of one run of a pass."""

    def fail(reason: str, after: Graph | None) -> None:
        raise PassFailure(f"pass {pass_.name!r} {reason}\n{_both(graph, after)}")

    text, kept = str(graph), {k: v.tobytes() for k, v in _weight_arrays(graph).items()}
    truth = _truth(graph, sample.inputs)
    try:
        new = pass_(graph)
        if str(graph) != text:
            fail(f"changed the graph that it was given; it was\n{text}", new)
        if {k: v.tobytes() for k, v in _weight_arrays(graph).items()} != kept:
            fail("wrote into the weights' arrays", new)
        _check_form(pass_, graph, new)
        error, complaint = _difference(truth, new, sample.inputs)
        if any(a.tobytes() != b.tobytes() for a, b in zip(truth.inputs, sample.inputs, strict=True)):
            fail("builds a graph that writes into the input arrays", new)
        if complaint and pass_.exact:
            fail(f"claims to be exact, but {complaint}", new)
        if max_error is not None and error > max_error:
            fail(f"is off by {error:.3g} of the largest element, allowed {max_error:.3g}", new)
        _check_promises(pass_, graph, new, sample.sizes, idempotent, may_add_weights)
    except PassFailure:
        raise
    except Exception as failure:
        kind = "" if isinstance(failure, JisuError) else f"{type(failure).__name__}: "
        raise PassFailure(f"pass {pass_.name!r} fails: {kind}{failure}\n{_both(graph, None)}") from failure
    return error, str(new) != text


# --- Programs ------------------------------------------------------------------------------------------------------


def check_program(
    program: Callable[..., Any],
    graph: Graph,
    *,
    inputs: Sequence[np.ndarray] | None = None,
    examples: int = 10,
    seed: int = 0,
    values: str = "normal",
    tolerance: float | None = None,
) -> float:
    """Compare any executor of a graph with the interpreter: `program(*arrays)` gives one array or a sequence of them.

    Draws inputs (`values` as in `tensors`; symbols within their ranges) `examples` times, or takes `inputs` once. An
    output may be off by a few roundings (see the module's text), or by `tolerance` of its largest element.
    Returns the largest relative error; raises ProgramFailure.
    """
    worst = 0.0

    def compare(arrays: Sequence[np.ndarray]) -> None:
        nonlocal worst
        copies = [a.copy() for a in arrays]
        want, yardstick = interpret(graph, arrays), interpret(graph, arrays, float64=True)
        found = program(*copies)
        got = [np.asarray(g) for g in (found if isinstance(found, (tuple, list)) else (found,))]
        shown = ", ".join(f"{n.name}: {a.dtype}{list(a.shape)}" for n, a in zip(graph.inputs, arrays, strict=True))
        if len(got) != len(want):
            raise ProgramFailure(f"the program returns {len(got)} outputs, the graph has {len(want)}\n{graph}")
        if any(a.tobytes() != b.tobytes() for a, b in zip(arrays, copies, strict=True)):
            raise ProgramFailure(f"the program wrote into its inputs ({shown})\n{graph}")
        for i, (output, g) in enumerate(zip(graph.outputs, got, strict=True)):
            error, complaint = _judge(g, want[i], yardstick[i], output.dtype, 0.0, excuse=True)  # type: ignore[index]
            if complaint and not (tolerance is not None and error <= tolerance):
                raise ProgramFailure(f"output {i} ({output.type}) {complaint}, for {shown}\n{graph}")
            worst = max(worst, error)

    if inputs is not None:
        compare(inputs)
        return worst

    def prove(data: st.DataObject) -> None:
        arrays = data.draw(arrays_for(graph, values=values)).inputs
        try:
            interpret(graph, arrays)
        except JisuError:
            hypothesis.reject()
        compare(arrays)

    _run(prove, examples, seed)
    return worst
